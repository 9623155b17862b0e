"""The import graph is the architecture: imports point one way, nothing is cyclic, and the front door is light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A part may import the parts of earlier lines; parts of one line do not know each other.
ORDER = [
    {"errors"},
    {"settings", "typed"},
    {"ir"},
    {"viz"},
    {"dsl"},
    {"search", "verify"},
    {"codegen"},
    {"transpiler"},
    {"runtime"},
    {"result"},
    {"pipeline"},
    {"pytorch"},
    {"cli"},
    {"__main__", "mugraph"},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}

HEAVY = {"torch", "triton", "z3", "sympy", "networkx", "scipy", "numba", "cupy", "ray", "msgspec", "rich", "typer"}


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file, for every module of the package below `root`."""
    files = sorted((root / "mugraph").rglob("*.py"))
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(root: Path, *, eager_only: bool) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports; with `eager_only`, those that run when it is imported."""
    modules = sources(root)
    graph: dict[str, set[str]] = {}
    for module, file in modules.items():
        is_package = file.name == "__init__.py"
        statements = walk(ast.parse(file.read_text(encoding="utf-8")), eager_only)
        names = {name for statement in statements for name in targets(statement, module, is_package)}
        graph[module] = {found for name in names if (found := resolve(name, modules))} - {module}
    return graph


def walk(node: ast.AST, eager_only: bool) -> Iterator[ast.AST]:
    """All nodes, leaving out function bodies and `if TYPE_CHECKING:` when only eager ones are asked for."""
    yield node
    for child in ast.iter_child_nodes(node):
        is_lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_type_only = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if not (eager_only and (is_lazy or is_type_only)):
            yield from walk(child, eager_only)


def targets(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """The dotted names that a statement asks for: `from a.b import c` -> `a.b.c`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module.split(".") if is_package else module.split(".")[:-1]
        kept = package[: len(package) - node.level + 1]
        base = ".".join([*kept, *filter(None, [base])])
    return [f"{base}.{alias.name}" for alias in node.names]


def resolve(name: str, modules: dict[str, Path]) -> str | None:
    """The module that holds a dotted name; `mugraph.__version__` is a constant that anyone may read."""
    while name and name not in modules and name != "mugraph.__version__":
        name = name.rpartition(".")[0]
    return name if name in modules else None


def part(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else pieces[0]


def check_direction(root: Path) -> None:
    """Every import, lazy ones included, leads to an earlier part or stays within its own."""
    wrong = []
    for module, found in imports(root, eager_only=False).items():
        assert part(module) in RANK, f"{module} has no place in ORDER"
        for target in found:
            if part(target) != part(module) and RANK[part(target)] >= RANK[part(module)]:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "imports against the order: " + "; ".join(sorted(wrong))


def check_acyclic(root: Path) -> None:
    try:
        TopologicalSorter(imports(root, eager_only=True)).prepare()
    except CycleError as error:
        raise AssertionError("import cycle: " + " -> ".join(error.args[1])) from None


def plant(root: Path, files: dict[str, str]) -> Path:
    """A package `mugraph` below `root` with these files."""
    for name, text in {"__init__.py": "", **files}.items():
        path = root / "mugraph" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_imports_point_one_way():
    check_direction(ROOT)


def test_no_module_imports_itself_through_others():
    check_acyclic(ROOT)


@pytest.mark.parametrize(
    "statement",
    [
        "import mugraph.search.driver",
        "from mugraph.search import driver",
        "from mugraph.search.driver import superoptimize",
        "from ..search.driver import superoptimize",
        "from .. import search",
        "from mugraph import optimize",
        "def late():\n    from mugraph.search import driver",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mugraph.search import driver",
    ],
)
def test_an_import_against_the_order_is_refused(statement, tmp_path):
    files = {"ir/__init__.py": "", "ir/axes.py": statement, "search/__init__.py": "", "search/driver.py": ""}
    with pytest.raises(AssertionError, match=r"against the order: mugraph\.ir\.axes imports mugraph"):
        check_direction(plant(tmp_path, files))


def test_an_import_along_the_order_is_accepted(tmp_path):
    check_direction(
        plant(
            tmp_path,
            {
                "ir/__init__.py": "from .axes import Axis",
                "ir/axes.py": "from mugraph import __version__\nimport mugraph.errors\nimport math",
                "errors.py": "",
                "search/driver.py": "from ..ir.axes import Axis\nfrom mugraph.ir import types",
            },
        )
    )


def test_siblings_do_not_import_each_other(tmp_path):
    files = {"search/a.py": "from mugraph.verify import b", "verify/b.py": ""}
    with pytest.raises(AssertionError, match=r"search\.a imports mugraph\.verify\.b"):
        check_direction(plant(tmp_path, files))


def test_a_part_without_a_place_is_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"mugraph\.helpers has no place"):
        check_direction(plant(tmp_path, {"helpers.py": ""}))


@pytest.mark.parametrize(
    "back", ["from .a import f", "import mugraph.ir.a", "from mugraph.ir import a", "from . import a"]
)
def test_a_cycle_is_refused(back, tmp_path):
    files = {"ir/__init__.py": "", "ir/a.py": "from mugraph.ir.b import g", "ir/b.py": back}
    with pytest.raises(AssertionError, match=r"import cycle: mugraph\.ir"):
        check_acyclic(plant(tmp_path, files))


def test_a_lazy_import_makes_no_cycle(tmp_path):
    files = {"ir/a.py": "from mugraph.ir.b import g", "ir/b.py": "def g():\n    from mugraph.ir.a import f"}
    check_acyclic(plant(tmp_path, files))


def probe(statement: str) -> tuple[float, set[str]]:
    """Seconds that `statement` takes in a fresh interpreter, and the top-level modules that it loads."""
    script = (
        "import sys, time; start = time.perf_counter(); "
        f"{statement}; seconds = time.perf_counter() - start; "
        "print(seconds, *{name.partition('.')[0] for name in sys.modules})"
    )
    command = [sys.executable, "-c", script]
    seconds, *names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return float(seconds), set(names)


def check_light(statement: str, heavy: set[str], seconds: float) -> None:
    runs = [probe(statement) for _ in range(5)]
    assert not runs[0][1] & heavy, f"`{statement}` loads {sorted(runs[0][1] & heavy)}"
    best = min(taken for taken, _ in runs)
    assert best < seconds, f"`{statement}` takes {best:.3f} s"


def test_the_front_door_is_light():
    check_light("import mugraph", HEAVY, seconds=0.3)


def test_a_heavy_front_door_is_refused():
    with pytest.raises(AssertionError, match="loads \\['json'\\]"):
        check_light("import json", {"json"}, seconds=0.3)


def test_a_slow_front_door_is_refused():
    with pytest.raises(AssertionError, match="takes 0"):
        check_light("time.sleep(0.02)", HEAVY, seconds=0.01)
