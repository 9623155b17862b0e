"""FlashInfer-Trace: a Definition as a program, and a result as a Definition with a Solution.

The schema is that of github.com/flashinfer-ai/flashinfer-bench (docs/flashinfer-trace).  A Definition names its axes,
constant or variable, gives the types of its inputs and outputs, and computes them in a Python function `run`.  A
Solution has the sources of another such function.
"""

from __future__ import annotations

import ast
import json
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mugraph import pipeline
from mugraph.cli.subject import located
from mugraph.cli.texts import check_place, counted, defined, free, renamed, without_extras, write_files
from mugraph.errors import CaptureError, CompileError, ParseError, ShapeError, UnsupportedOpError
from mugraph.ir.axes import Dim, Size
from mugraph.ir.graph import Program
from mugraph.ir.types import DType
from mugraph.pytorch.capture import capture, signature_of
from mugraph.result import Result, check_writable
from mugraph.runtime.load import load_module
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler.signature import size_text
from mugraph.transpiler.target import Target

DTYPES = {
    "float32": DType.f32, "float16": DType.f16, "bfloat16": DType.bf16, "float8_e4m3fn": DType.f8e4m3,
    "float8_e5m2": DType.f8e5m2, "int64": DType.i64, "int32": DType.i32, "int16": DType.i16, "int8": DType.i8,
    "bool": DType.bool,
}  # fmt: skip
TORCH = {"float8_e4m3": "float8_e4m3fn"}  # older files have this name
HARDWARE = {80: "NVIDIA_A100", 89: "NVIDIA_L40S", 90: "NVIDIA_H100", 100: "NVIDIA_B200"}
DEFINITION, SOLUTION, RESULT = "definition.json", "solution.json", "result"
SAMPLE = 4  # of variable axes, where the reference is run


@dataclass(frozen=True)
class TensorSpec:
    """`shape` names axes; None for a Python number."""

    name: str
    shape: tuple[str, ...] | None
    dtype: str


@dataclass(frozen=True)
class Definition:
    """`axes` gives the size of constant axes, and None for variable ones."""

    name: str
    op_type: str
    axes: Mapping[str, int | None]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reference: str

    def size(self, axis: str) -> int:
        return self.axes[axis] or SAMPLE


# -- reading


def parse_definition(text: str) -> Definition:
    """A Definition from JSON.  Raises ParseError for what is not well formed, with the place in it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParseError(f"it is no JSON: {error}", remedy="give a definition.json of FlashInfer-Trace") from error
    if not isinstance(data, dict):
        raise _wrong("", "an object", data)
    name, op_type, reference = (_get(data, key, str) for key in ("name", "op_type", "reference"))
    axes = {axis: _axis(axis, found) for axis, found in _get(data, "axes", dict).items()}
    inputs, outputs = (
        tuple(_tensor(f"{key}.{n}", n, found, axes) for n, found in _get(data, key, dict).items())
        for key in ("inputs", "outputs")
    )
    if both := [t.name for t in outputs if t.name in data["inputs"]]:
        raise ParseError(
            f"{both[0]} is an input and an output",
            where=f"outputs.{both[0]}",
            remedy="give the output another name: solutions take inputs and outputs by their names",
        )
    if not inputs or not outputs:
        raise ParseError("it has no inputs or no outputs", remedy="a definition has at least one of both")
    try:
        tree = ast.parse(reference)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ParseError(f"its reference is no Python: {error}", where=f"reference, line {line}") from error
    if not any(isinstance(n, ast.FunctionDef) and n.name == "run" for n in tree.body):
        raise ParseError("its reference has no function run", remedy="define `def run(...)` at the top level")
    return Definition(name, op_type, axes, inputs, outputs, reference)


def _get(data: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in data:
        raise ParseError(f"it has no {key}", remedy="give a definition.json of FlashInfer-Trace")
    if not isinstance(data[key], kind) or not data[key]:
        raise _wrong(key, "a text" if kind is str else "an object", data[key])
    return data[key]


def _axis(name: str, found: Any) -> int | None:
    match found:
        case {"type": "const", "value": int(value)} if value > 0 and not isinstance(value, bool):
            return value
        case {"type": "var"}:
            return None
    raise _wrong(f"axes.{name}", 'an axis: {"type": "var"}, or {"type": "const", "value": 4096}', found)


def _tensor(where: str, name: str, found: Any, axes: Mapping[str, Any]) -> TensorSpec:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ParseError(f"{name!r} is no name of an argument", where=where)
    match found:
        case {"shape": None, "dtype": str(dtype)}:
            shape = None
        case {"shape": [*sizes], "dtype": str(dtype)} if all(isinstance(s, str) for s in sizes):
            shape = tuple(sizes)
        case _:
            raise _wrong(where, 'a tensor: {"shape": ["M", "K"], "dtype": "float16"}', found)
    if unknown := [a for a in shape or () if a not in axes]:
        raise ParseError(f"there is no axis {unknown[0]}", where=where, remedy=f"one of {', '.join(axes)}")
    dtype = TORCH.get(dtype, dtype)
    if dtype not in DTYPES:
        raise UnsupportedOpError(
            f"the element type {dtype} is not supported", where=where, remedy=f"one of {', '.join(DTYPES)}"
        )
    return TensorSpec(name, shape, dtype)


def _wrong(where: str, wanted: str, found: Any) -> ParseError:
    shown = json.dumps(found, default=str)
    return ParseError(f"{where or 'the file'} is not {wanted}: {shown[:80]}", where=where or None)


def program_of(definition: Definition, say: Callable[[str], None] = lambda _: None) -> Program:
    """The reference as a program, once it has run on zeros and small numbers.  Variable axes become symbolic sizes,
    from 1 on, or from 2 on where that is said; numbers become tensors without axes.  Raises CaptureError where it does
    not run, ShapeError where it returns something else than the definition says, and what `capture` raises."""
    import torch

    label = f"the reference of {definition.name}"
    module_file = Path(f"{definition.name}.py")
    with located(module_file, label):
        run = load_module(definition.reference, f"{definition.name}_reference").run
        wanted = [t.name for t in definition.inputs]
        parameters = signature_of(run).parameters.items()
        names = [n for n, p in parameters if n in wanted or p.default is p.empty]
        if sorted(names) != sorted(wanted):
            raise CaptureError(
                f"{label} takes {', '.join(names)}, the inputs are {', '.join(wanted)}", remedy="name them alike"
            )
        examples = {t.name: _example(definition, t) for t in definition.inputs}
        with torch.no_grad():
            found = run(**examples)
    _check_outputs(definition, found)
    dims = {a: Dim(a) for a, size in definition.axes.items() if size is None}
    dynamic = {
        t.name: {i: dims[a] for i, a in enumerate(t.shape) if a in dims}
        for t in definition.inputs
        if t.shape and set(t.shape) & set(dims)
    }
    ordered = tuple(examples[n] for n in names)
    captured = capture(_bare(run), ordered, dynamic, name=plain(definition.name))
    for note in captured.notes:
        say(f"note: {note}")
    return captured.program


def _bare(run: Callable[..., Any]) -> Callable[..., Any]:
    """Without `torch.no_grad` and its like around it, under which a trace knows no lines."""
    from torch.utils import _contextlib

    while getattr(run, "__code__", None) and run.__code__.co_filename == _contextlib.__file__:
        run = run.__wrapped__  # type: ignore[attr-defined]
    return run


def _example(definition: Definition, spec: TensorSpec) -> Any:
    import torch

    dtype = getattr(torch, spec.dtype)
    shape = [definition.size(a) for a in spec.shape or ()]
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.linspace(0.1, 1.0, max(1, torch.Size(shape).numel())).reshape(shape).to(dtype)


def _check_outputs(definition: Definition, found: Any) -> None:
    import torch

    results = found if isinstance(found, tuple | list) else (found,)
    if isinstance(found, dict):
        raise UnsupportedOpError("the reference returns a dict", remedy="return tensors in the order of the outputs")
    if len(results) != len(definition.outputs):
        raise ShapeError(f"the reference returns {len(results)} results for {len(definition.outputs)} outputs")
    for spec, r in zip(definition.outputs, results, strict=True):
        shape = tuple(definition.size(a) for a in spec.shape or ())
        if not isinstance(r, torch.Tensor) or spec.shape is None:
            raise UnsupportedOpError(f"the output {spec.name} is no tensor")
        if tuple(r.shape) != shape or r.dtype is not getattr(torch, spec.dtype):
            raise ShapeError(
                f"the reference returns {r.dtype}{list(r.shape)} for {spec.name}, not {spec.dtype}{list(shape)}",
                where=f"outputs.{spec.name}, with {SAMPLE} along variable axes",
            )


def plain(name: str) -> str:
    found = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
    return found if found[:1].isalpha() else f"program_{found}"


def import_file(
    file: Path,
    out: Path | None = None,
    target: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Result:
    """A definition.json, optimised.  With `out`, a directory of the definition as it is, the solution, and the saved
    result below `result/`.  Runs the reference.  Raises ParseError where the file cannot be read or is malformed."""
    if out is not None:
        check_place(out, (DEFINITION, SOLUTION, RESULT))
        check_writable(out / RESULT)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ParseError(f"cannot read {file}: {error}", remedy="name a definition.json of FlashInfer-Trace") from error
    try:
        definition = parse_definition(text)
    except ParseError as error:
        error.where = f"{file}: {error.where}" if error.where else str(file)
        raise
    program = program_of(definition, say)
    result = pipeline.optimize(program, target=target, say=say, **options)
    if out is not None:
        solution = solution_of(result, definition)
        result.save(out / RESULT)
        write_files(out, {DEFINITION: text, SOLUTION: _json(solution)})
    return result


# -- writing


def export(result: Result, out: Path) -> None:
    """A saved result as `definition.json` and `solution.json`.  Raises CacheError where they cannot be written."""
    check_place(out, (DEFINITION, SOLUTION))
    definition = definition_of(result.program)
    write_files(out, {DEFINITION: _json(to_dict(definition)), SOLUTION: _json(solution_of(result, definition))})


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def definition_of(program: Program) -> Definition:
    """A program as a Definition; its reference is the program as PyTorch code.  Axes are named as in the program; a
    size that is a product of others is an axis of its own, and an output that is an input has a name of its own."""
    names = {kind: name for name, kind in DTYPES.items()}
    axes: dict[str, int | None] = {}
    tensors = program.tensors()

    def spec(name: str, tensor: Any, dtype: DType) -> TensorSpec:
        if dtype not in names:
            raise UnsupportedOpError(f"FlashInfer-Trace has no element type {dtype}, which {name} has")
        shape = []
        for label, size in zip(_labels(tensor), tensor.shape, strict=True):
            shape.append(_named(axes, label, size))
        return TensorSpec(name, tuple(shape), names[dtype])

    inputs = tuple(spec(i.name, i.tensor, i.storage.dtype) for i in program.inputs)
    taken, outputs = {i.name for i in program.inputs}, []
    for o in program.outputs:
        outputs.append(spec(free(o.value, taken) if o.value in taken else o.value, tensors[o.value], o.storage.dtype))
        taken.add(outputs[-1].name)
    names_of = ", ".join(i.name for i in program.inputs)
    run = f"def run({names_of}):\n    return reference({names_of})\n"
    reference = f"{torch_code.emit(program, 'reference')}\n\n{run}"
    return Definition(program.name, program.name, axes, inputs, tuple(outputs), reference)


def _labels(tensor: Any) -> list[str]:
    return ["_".join(a.name for a in dims) or "one" for dims in tensor.dims]


def _named(axes: dict[str, int | None], label: str, size: Size) -> str:
    """The axis for a dimension: by the name of its size where that is symbolic, else by its label, with a number where
    that names another size."""
    value = size if isinstance(size, int) else None
    name = size.name if isinstance(size, Dim) else label if value is not None else plain(size_text(size))
    found, count = name, 1
    while axes.setdefault(found, value) != value:
        found, count = f"{name}_{count}", count + 1
    return found


def to_dict(definition: Definition) -> dict[str, Any]:
    def tensors(specs: Sequence[TensorSpec]) -> dict[str, Any]:
        return {t.name: {"shape": None if t.shape is None else list(t.shape), "dtype": t.dtype} for t in specs}

    sizes = definition.axes.items()
    return {
        "name": definition.name,
        "op_type": definition.op_type,
        "axes": {a: {"type": "var"} if n is None else {"type": "const", "value": n} for a, n in sizes},
        "inputs": tensors(definition.inputs),
        "outputs": tensors(definition.outputs),
        "reference": definition.reference,
    }


def solution_of(result: Result, definition: Definition) -> dict[str, Any]:
    """The result as a Solution.  Its `run` takes the inputs, and the outputs to write into, or returns them."""
    kernels = result.has_kernels
    about = [counted(len(result.graph.kernels()), "kernel"), ", ".join(result.certificate.tiers)]
    about += [f"{d.name} from {d.min} on" for d in result.program.dims() if d.min > 1]
    return {
        "name": f"{definition.name}_mugraph_{plain(str(result.target))}",
        "definition": definition.name,
        "author": "mugraph",
        "description": "; ".join(about),
        "spec": {
            "language": "triton" if kernels else "python",
            "target_hardware": _hardware(result.target),
            "entry_point": "main.py::run",
            "dependencies": ["torch", "triton"] if kernels else ["torch"],
            "destination_passing_style": True,
        },
        "sources": [{"path": "main.py", "content": main_text(result, definition)}],
    }


def _hardware(target: Target) -> list[str]:
    if target.arch is None:
        return ["CPU", "CUDA"] if target.kind == "torch" else ["CUDA"]
    return [HARDWARE.get(target.arch, f"sm_{target.arch}")]


def main_text(result: Result, definition: Definition) -> str:
    """The emitted source with an entry point that has the names of the definition.  Raises CompileError if it is no
    Python."""
    tree = ast.parse(result.source)
    inputs, outputs = ([t.name for t in specs] for specs in (definition.inputs, definition.outputs))
    taken = defined(tree) | set(inputs) | set(outputs)
    launch = free("launch", taken)
    source = renamed(without_extras(result.source, tree), {"run": launch})
    first = next((t.name for t in definition.inputs if t.shape is not None), None)
    numbers = [
        f"    {t.name} = torch.as_tensor({t.name}, dtype=torch.{t.dtype}"
        + (f", device={first}.device)" if first else ")")
        for t in definition.inputs
        if t.shape is None
    ]
    places = {a: f"{t.name}.shape[{i}]" for t in reversed(definition.inputs) for i, a in enumerate(t.shape or ())}
    checks = [
        line
        for d in result.program.dims()
        if d.min > 1 and d.name in places
        for line in (
            f"    if {places[d.name]} < {d.min}:",
            f'        raise ValueError("this solution is for {d.name} from {d.min} on")',
        )
    ]
    order = ", ".join(i.name for i in result.program.inputs)
    given = f"({', '.join(outputs)})" if len(outputs) > 1 else outputs[0]
    lines = [
        f"def run({', '.join([*inputs, *(f'{o}=None' for o in outputs)])}):",
        '    """The results, written into the outputs where they are given."""',
        *checks,
        *numbers,
        f"    if {outputs[0]} is None:",
        f"        return {launch}({order})",
        f"    {launch}({order}, out={given})",
    ]
    text = f"{source.strip()}\n\n\n" + "\n".join(lines) + "\n"
    try:
        compile(text, "main.py", "exec")
    except SyntaxError as error:
        raise CompileError(f"the solution of {definition.name} does not compile: {error}") from error
    return text
