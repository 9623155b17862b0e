"""What tests of the backend share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def fresh_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache of its own, and nothing compiled or reported so far."""
    from mugraph.pytorch import backend

    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    backend._reports.clear()
    backend._told.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
