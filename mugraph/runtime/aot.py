"""Makes what `artefact` reads: cubins of an emitted file, its host part, and a loader that needs no compiler.

    files = made(program, {"host.py": source}, [80, 90])      # by name: aot.py, host.py, index.json, *.cubin

Which cubins there have to be is found by running the host part on tensors without memory, at sizes on both sides of
each power of two: a constant of a kernel changes there or nowhere.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from itertools import product
from typing import Any

from mugraph import __version__
from mugraph.errors import CacheError, CompileError
from mugraph.ir.axes import Dim, Size, dims_of, size_value
from mugraph.ir.graph import Program
from mugraph.ir.resize import limited
from mugraph.runtime.artefact import INDEX, INDEX_VERSION, digest, sealed
from mugraph.runtime.compile import SHARED_LIMITS, Compiler
from mugraph.runtime.dispatch import HOST_NAMES, Host, Range, Table, parted
from mugraph.transpiler.signature import bindings, size_text
from mugraph.transpiler.torch import TORCH_DTYPES

HOST, LOADER = "host.py", "aot.py"
MOST_SIZES = 4_096  # combinations of symbolic sizes at which the host part is run
ERRORS = (
    "Location", "MugraphError", "CacheError", "CompileError", "LaunchError", "TargetMismatchError", "MugraphWarning",
    "TargetWarning",
)  # fmt: skip

Wanted = tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]  # kernel, options, constants


def whole_range(program: Program, file: str) -> Table:
    """The table that serves every size by one file."""
    dims = program.dims()
    if not dims:
        return Table(None, (Range(0, 0, file),))
    return Table(dims[0].name, (Range(dims[0].min, dims[0].max, file),))


def made(
    program: Program,
    sources: Mapping[str, str],
    arches: Sequence[int],
    *,
    table: Table | None = None,
    timed: Mapping[str, Any] | None = None,
    compiler: Compiler | None = None,
) -> dict[str, bytes]:
    """The files of an artefact for these architectures.

    `sources` are emitted files of the program, under the names that their host parts get; `table` says which sizes each
    of them serves, without one the first serves all.  One without kernels is the program as library calls.  `timed`
    names the device and the driver version that the kernels were timed with, None where they were not.  Raises
    CompileError where a kernel does not compile, CacheError where the table does not fit the program or the sources,
    UnknownTargetError for an unknown architecture."""
    if compiler is None:
        with Compiler() as own:
            return made(program, sources, arches, table=table, timed=timed, compiler=own)
    table = table or whole_range(program, next(iter(sources)))
    for d in program.dims():
        if d.name == table.dim:
            table.check_covers(d.min, d.max)
    if missing := set(table.files) - set(sources):
        raise CacheError(f"the table names {min(missing)}, which is not given", remedy=f"name {', '.join(sources)}")
    found: dict[str, bytes] = {}
    hosts: dict[str, list[str]] = {}
    binaries: list[dict[str, Any]] = []
    for name in table.files:
        text, signatures = host_part(sources[name])
        found[name], hosts[name] = text.encode(), list(signatures)
        served = [r for r in table.ranges if r.file == name]
        sizes = (min(r.low for r in served), max(r.high for r in served))
        part = limited(program, table.dim, *sizes) if table.dim else program
        for b, image in compiled(part, sources[name], arches, compiler):
            file = f"{b['kernel']}.sm_{b['arch']}.{len(binaries)}.cubin"
            binaries.append({"file": file, "host": name, **b})
            found[file] = image
    index = {
        "schema_version": INDEX_VERSION,
        "program": signature_of(program),
        "table": table.to_dict(),
        "hosts": hosts,
        "binaries": binaries,
        "versions": versions(),
        "timed": dict(timed) if timed is not None else None,
        "files": {name: digest(content) for name, content in found.items()},
    }
    text = json.dumps(sealed(index), indent=1, ensure_ascii=False)
    return {**found, LOADER: loader_text().encode(), INDEX: text.encode()}


def signature_of(program: Program) -> dict[str, Any]:
    """What callers of the program see, as `artefact.Signature` reads it."""
    tensors = program.tensors()

    def described(name: str, dtype: Any, shape: Sequence[Size]) -> dict[str, Any]:
        sizes = [s if isinstance(s, int) else size_text(s, names_of(s)) for s in shape]
        return {"name": name, "dtype": TORCH_DTYPES[dtype], "shape": sizes}

    found = bindings(program)
    names = {b.dim: f"size_{b.dim.name}" for b in found}
    return {
        "name": program.name,
        "inputs": [described(i.name, i.storage.dtype, i.tensor.shape) for i in program.inputs],
        "outputs": [described(o.value, o.storage.dtype, tensors[o.value].shape) for o in program.outputs],
        "sizes": [
            {"name": b.dim.name, "input": b.source, "value": b.text("shape", names), "min": b.dim.min, "max": b.dim.max}
            for b in found
        ],
    }


def names_of(size: Size) -> dict[Dim, str]:
    return {d: f"size_{d.name}" for d in dims_of(size)}


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"mugraph": __version__}
    for name in ("triton", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# -- which cubins


def compiled(
    program: Program, source: str, arches: Sequence[int], compiler: Compiler
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Each cubin that some size of the program needs, with its entry in the index: for each kernel an aligned one, then
    a general."""
    text, signatures = host_part(source)
    host = Host.of(text, list(signatures), HOST)
    for arch in arches:
        for kernel, options, constants in wanted(program, host):
            types, _ = signatures[kernel]
            fixed = {n: f"tl.{v}" if isinstance(v, str) else v for n, v in constants}
            assumed = {n: kind for n, kind in types.items() if n not in fixed}
            for parameters in unique(assumed, general(assumed)):
                b = compiler.binary(source, arch, kernel, {**parameters, **fixed}, dict(options))
                if b["shared"] > SHARED_LIMITS[arch]:
                    needs = f"{kernel} needs {b['shared']} bytes of shared memory"
                    raise CompileError(needs, op=f"sm_{arch}", remedy="use smaller tiles")
                entry = {
                    "kernel": kernel,
                    "arch": arch,
                    "parameters": parameters,
                    "constants": dict(constants),
                    "options": dict(options),
                }
                yield {**entry, **{k: b[k] for k in ("entry", "shared", "scratch", "ptxas")}}, b["image"]


def unique(*kinds: dict[str, Any]) -> list[dict[str, Any]]:
    return [k for i, k in enumerate(kinds) if k not in kinds[:i]]


def general(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same parameters with nothing taken for granted."""
    return {n: kind.partition(":")[0] if isinstance(kind, str) else "i32" for n, kind in parameters.items()}


def wanted(program: Program, host: Host) -> list[Wanted]:
    """Each kernel with the options and constants that it is launched with at some sizes."""
    import torch

    found: dict[Wanted, None] = {}

    def note(kernel: str, grid: Sequence[int], given: Sequence[Any], named: Mapping[str, Any]) -> None:
        options, constants = parted(named)
        found[kernel, tuple(options.items()), tuple(constants.items())] = None

    # tensors may be laid out for descriptors or not, whatever their sizes
    layouts = (True, False) if "descriptors" in host.code.co_names else (True,)
    runs = [host.names(note, descriptors=lambda *_, fit=fit: fit)["run"] for fit in layouts]
    for sizes in turning_points(program.dims()):
        tensors = [
            torch.empty(
                [size_value(s, sizes) for s in i.tensor.shape],
                dtype=getattr(torch, TORCH_DTYPES[i.storage.dtype]),
                device="meta",
            )
            for i in program.inputs
        ]
        for run in runs:
            run(*tensors)
    return list(found)


def turning_points(dims: Sequence[Dim]) -> Iterator[dict[str, int]]:
    """Symbolic sizes, each at its ends and on both sides of every power of two between; all combinations if they are
    few, else each along its range with the others at their ends."""
    values = {}
    for d in dims:
        powers = (2**k + e for k in range(d.max.bit_length()) for e in (0, 1))
        values[d.name] = sorted({d.min, d.max, *(p for p in powers if d.min <= p <= d.max)})
    count = 1
    for v in values.values():
        count *= len(v)
    if count <= MOST_SIZES:
        for combination in product(*values.values()):
            yield dict(zip(values, combination, strict=True))
        return
    for name, along in values.items():
        for end in (0, -1):
            for value in along:
                yield {n: v[end] for n, v in values.items()} | {name: value}


# -- texts


def host_part(source: str) -> tuple[str, dict[str, tuple[dict[str, Any], dict[str, int]]]]:
    """An emitted file without its kernels and without its imports of torch and triton, the rest as it stands; and what
    its SIGNATURES say."""
    lines = source.splitlines()
    kept: list[str] = []
    signatures: dict[str, Any] = {}
    end = 0
    for node in ast.parse(source).body:
        start, end = end, node.end_lineno or end
        match node:
            case ast.Import(names=[ast.alias(name="torch" | "triton" | "triton.language")]):
                continue
            case ast.FunctionDef(decorator_list=[first, *_]) if "triton.jit" in ast.unparse(first):
                continue
            case ast.Assign(value=ast.Call(func=ast.Attribute(attr="constexpr"))):
                continue
            case ast.Assign(targets=[ast.Name("SIGNATURES")]):
                names: dict[str, Any] = dict(HOST_NAMES)
                exec("\n".join(lines[node.lineno - 1 : end]), names)
                signatures = names["SIGNATURES"]
                continue
        kept += lines[start:end]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(kept)).strip("\n") + "\n", signatures


HEAD = '''"""Loads the kernels beside this file and launches them; it needs torch and a CUDA driver, and no compiler.

    import aot

    program = aot.load()          # or aot.load(directory)
    program.warmup()              # loads every kernel: before a CUDA graph is captured, before serving
    y = program(*tensors)

`index.json` says what the program takes, which file serves which sizes, and what each cubin takes for granted;
`host.py` is the host part of kernel.py as it stands.
"""'''
TAIL = '''# -- the front door


def load(directory: Path | str = Path(__file__).parent, driver: str = DRIVER) -> Dispatch:
    """The program of a directory that `--aot` wrote, to be called with tensors."""
    return Artefact.read(directory).dispatch(driver=driver)'''


def loader_text() -> str:
    """`aot.py`: the texts of `driver`, `dispatch` and `artefact`, with the errors that they raise, as one module."""
    imports: list[ast.stmt] = list(ast.parse("from typing import ClassVar").body)
    parts = [chosen_classes(files("mugraph").joinpath("errors.py").read_text(encoding="utf-8"), ERRORS)]
    for name in ("driver", "dispatch", "artefact"):
        text = files("mugraph.runtime").joinpath(f"{name}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        imports += (found := [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)])
        body = text.splitlines()[max(n.end_lineno or 0 for n in found) :]
        what = "\n".join(f"# {line}".rstrip() for line in (ast.get_docstring(tree) or "").splitlines())
        parts.append(f"# -- {name}\n#\n{what}\n\n" + "\n".join(body).strip("\n"))
    head = [HEAD, "from __future__ import annotations", joined_imports(imports)]
    return "\n\n".join(head) + "\n\n\n" + "\n\n\n".join([*parts, TAIL]) + "\n"


def joined_imports(found: Sequence[ast.stmt]) -> str:
    """These imports, each module once, those of the standard library first; none from mugraph."""
    plain = sorted({a.name for n in found if isinstance(n, ast.Import) for a in n.names})
    named: dict[str, set[str]] = {}
    for n in found:
        if isinstance(n, ast.ImportFrom) and n.module != "__future__" and not (n.module or "").startswith("mugraph"):
            named.setdefault(n.module or "", set()).update(a.name for a in n.names)
    own = [f"import {name}" for name in plain if name != "torch"]
    own += [f"from {module} import {', '.join(sorted(named[module], key=constants_first))}" for module in sorted(named)]
    return "\n".join([*own, "", "import torch"])


def constants_first(name: str) -> tuple[bool, str]:
    return not name[0].isupper(), name


def chosen_classes(text: str, names: Sequence[str]) -> str:
    """The classes of a module with their decorators."""
    lines = text.splitlines()
    found = {n.name: n for n in ast.parse(text).body if isinstance(n, ast.ClassDef)}
    starts = {n: min([c.lineno, *(d.lineno for d in c.decorator_list)]) - 1 for n, c in found.items()}
    return "\n\n\n".join("\n".join(lines[starts[n] : found[n].end_lineno]) for n in names)
