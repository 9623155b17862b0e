"""The code of docs/pytorch.md, section "Functions and modules", runs and prints what the page says."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_section_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    section = PAGE.read_text(encoding="utf-8").partition("## Functions and modules")[2].split("\n## ")[0]
    space: dict[str, Any] = {"__name__": "page"}
    printed, said = [], []
    for kind, body in FENCE.findall(section):
        if kind == "python":
            stdout = io.StringIO()
            with contextlib.redirect_stdout(stdout):
                exec(compile(body, str(PAGE), "exec"), space)
            printed.append(stdout.getvalue())
        elif kind == "text":
            said.append(body)
    assert printed == said
    assert said
