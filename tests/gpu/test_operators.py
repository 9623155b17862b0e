"""Results as PyTorch operators on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.checks import listed
from mugraph.runtime.load import load_module
from tests.gpu.results import call_of, drawn, every_program, every_way

pytestmark = pytest.mark.gpu


@every_way
@every_program
def test_an_operator_is_the_result(name: str, way: str, tmp_path: Path) -> None:
    result, call = call_of(name, way)
    inputs = drawn(result, 17)
    expected = listed(call(*inputs))
    op = result.register()
    torch.library.opcheck(op, tuple(inputs))
    torch.testing.assert_close(listed(op(*inputs)), expected)
    torch.testing.assert_close(listed(torch.compile(op, backend="aot_eager", fullgraph=True)(*inputs)), expected)
    place = result.save(tmp_path / "saved")
    alone = load_module((place / "register.py").read_text(), "register", place)
    assert alone.op is op
    torch.testing.assert_close(listed(alone.run(*inputs)), expected)
