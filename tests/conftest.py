"""What every test shares: a private cache, deterministic hypothesis, and golden files.

A golden file holds the text that a test expects, at `tests/golden/<test module>/<test name>.<suffix>`, in the language
of that text. `pytest --update-golden` writes them anew; read the diff before you commit it.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from benchmarks.stub import Stub
    from mugraph.runtime.compile import Compiler
    from mugraph.runtime.interpret import Interpreter

TESTS = Path(__file__).parent

hypothesis.settings.register_profile("mugraph", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mugraph")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _clean_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No setting of the developer's shell reaches a test, and no test reaches the developer's cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MUGRAPH_")]:
            patch.delenv(name)
        patch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MUGRAPH_TUNE", "none")  # compiling takes seconds: tests that want it say so
        yield


@pytest.fixture(scope="module")
def interpreter() -> Iterator["Interpreter"]:
    from mugraph.runtime.interpret import Interpreter

    with Interpreter() as worker:
        yield worker


@pytest.fixture(scope="module")
def compiler() -> Iterator["Compiler"]:
    from mugraph.runtime.compile import Compiler

    with Compiler() as worker:
        yield worker


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> "Stub":
    """A driver library that does nothing but write down what it is asked for."""
    from benchmarks.stub import Stub
    from mugraph.errors import MugraphError

    try:
        return Stub(tmp_path_factory.mktemp("stub"))
    except MugraphError as error:
        pytest.skip(error.message)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(text, suffix)` compares `text` with this test's golden file of that suffix."""
    module = request.path.relative_to(TESTS).with_suffix("")
    name = re.sub(r"[^\w.-]+", "-", request.node.name).strip("-")

    def check(text: str, suffix: str) -> None:
        path = TESTS / "golden" / module / f"{name}.{suffix}"
        if request.config.getoption("--update-golden"):
            write_golden(path, text)
        else:
            compare_golden(path, text)

    return check


def write_golden(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def compare_golden(path: Path, text: str) -> None:
    if not path.exists():
        pytest.fail(f"no golden file {path.relative_to(TESTS.parent)}; write it with `pytest --update-golden`")
    expected = path.read_text(encoding="utf-8")
    assert text == expected, f"differs from {path.name}; if that is meant, run `pytest --update-golden`"
