"""The front page says what happens: its code runs, its outputs are compared, its links lead somewhere.

Python blocks run in order, in one namespace; a text block after one is its output.  In console blocks, lines that begin
with `$` are commands and the lines below them what they print on stdout.  `--update-golden` writes the outputs and the
picture anew.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from mugraph.viz.svg import draw_svg

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "rmsnorm_linear.svg"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)|src=\"([^\"#:]+)\"")


def python_outputs(text: str, namespace: dict[str, Any]) -> str:
    """The page with each text block after a Python block replaced by what the Python block prints."""
    printed: str | None = None

    def fresh(block: re.Match[str]) -> str:
        nonlocal printed
        kind, body = block.groups()
        if kind == "python":
            stdout = io.StringIO()
            with contextlib.redirect_stdout(stdout):
                exec(compile(body, str(README), "exec"), namespace)
            printed = stdout.getvalue()
            return block[0]
        output, printed = printed, None
        return f"```text\n{output}```" if kind == "text" and output is not None else block[0]

    return FENCE.sub(fresh, text)


def console_outputs(text: str, directory: Path) -> str:
    """The page with the output of each console command replaced by what it prints in `directory`."""

    def fresh(block: re.Match[str]) -> str:
        kind, body = block.groups()
        if kind != "console":
            return block[0]
        commands = [line for line in body.splitlines() if line.startswith("$ ")]
        return "```console\n" + "".join(f"{c}\n{shell(c[2:], directory)}" for c in commands) + "```"

    return FENCE.sub(fresh, text)


def shell(command: str, directory: Path) -> str:
    """What a command prints on stdout.  It has `mugraph` and the examples; it must succeed."""
    script = f'mugraph() {{ "{sys.executable}" -m mugraph "$@"; }}\npython() {{ "{sys.executable}" "$@"; }}\n{command}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} ends with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def without_times(text: str) -> str:
    """Measured times differ from run to run, rounding from machine to machine; predicted times, in µs, do not."""
    text = re.sub(r"\d+(\.\d+)? m?s\b", "# s", text)
    return re.sub(r"error at most [\d.]+ of", "error at most # of", text)


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    return {"__name__": "readme"}


def settle(request: pytest.FixtureRequest, found: str, page: Path = README) -> None:
    """Compares the page with what was found, or writes it."""
    if request.config.getoption("--update-golden"):
        page.write_text(found, encoding="utf-8")
    assert without_times(page.read_text(encoding="utf-8")) == without_times(found)


def test_python_blocks_print_what_the_page_says(request, namespace):
    settle(request, python_outputs(README.read_text(encoding="utf-8"), namespace))
    picture = draw_svg(namespace["result"].graph)
    if request.config.getoption("--update-golden"):
        PICTURE.write_text(picture, encoding="utf-8")
    assert PICTURE.read_text(encoding="utf-8") == picture
    assert ElementTree.fromstring(picture).tag.endswith("svg")


@pytest.mark.parametrize("name", ["search", pytest.param("tuning", marks=pytest.mark.full), "pytorch"])
def test_pages_print_what_they_say(request, name):
    page = ROOT / "docs" / f"{name}.md"
    settle(request, python_outputs(page.read_text(encoding="utf-8"), {"__name__": name}), page)


@pytest.mark.parametrize(
    "page", [README, pytest.param(ROOT / "docs" / "pytorch.md", marks=pytest.mark.full)], ids=lambda p: p.name
)
def test_commands_print_what_the_page_says(request, tmp_path, page):
    for name in ("examples", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    settle(request, console_outputs(page.read_text(encoding="utf-8"), tmp_path), page)


def test_another_output_is_noticed(tmp_path):
    page = "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    assert python_outputs(page, {}) == page.replace("3", "2")
    page = "```console\n$ echo a\nb\n$ echo c\n```\n"
    assert console_outputs(page, tmp_path) == "```console\n$ echo a\na\n$ echo c\nc\n```\n"
    assert without_times("in 3.5 ms, 7 µs") == without_times("in 12 s, 7 µs") != without_times("in 12 s, 8 µs")


def test_a_command_that_fails_is_noticed(tmp_path):
    with pytest.raises(AssertionError, match="ends with 3"):
        shell("exit 3", tmp_path)


def broken_links(page: Path) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
    return [link for pair in LINK.findall(prose) for link in pair if link and not (page.parent / link).exists()]


@pytest.mark.parametrize(
    "page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '[here](page.md) [out](https://example.org) [no](absent.md) <img src="a.svg"/> `p[i](q)`\n```\na[i](j)\n```\n'
    )
    assert broken_links(page) == ["absent.md", "a.svg"]


def test_make_targets_on_the_page_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z][\w-]*)", README.read_text().split("## From Python")[0])) <= targets
    assert set(re.findall(r"`make ([\w-]+)`", README.read_text())) <= targets
