"""KernelBench files: `Model`, `get_inputs` and `get_init_inputs` in, the same with a `ModelNew` out.

`ModelNew` is a subclass of `Model`, so that it is constructed in the same way and a seed gives it the same weights.
Its `forward` calls the functions made from what mugraph understands, and PyTorch's operators between them.
"""

from __future__ import annotations

import ast
import copy
import keyword
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from mugraph import pipeline, settings
from mugraph.cli.subject import loaded, located
from mugraph.cli.texts import counted, defined, free, renamed, without_extras
from mugraph.errors import CaptureError, MugraphError, SettingError, VerificationError
from mugraph.pytorch.regions import Composed, Region, compose, graph_text
from mugraph.result import Result
from mugraph.runtime.load import load_module
from mugraph.search.space import space_of
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler.target import parse_target

NAMES = ("Model", "get_inputs", "get_init_inputs")
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-2}  # KernelBench's own, relative and absolute
SEED = 42


@dataclass(frozen=True)
class Imported:
    """What became of a file.

    `text` is the file with `ModelNew`.  `taken` of `total` operators are in regions that run as something else than
    they were written; `left` says why the others stayed.  `results` are what runs in the regions.
    """

    name: str
    text: str
    taken: int
    total: int
    left: Mapping[str, str]
    results: tuple[Result, ...]

    @property
    def share(self) -> float:
        return self.taken / self.total if self.total else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "operators": self.total,
            "taken_over": self.taken,
            "left": dict(self.left),
            "regions": [{"program": r.program.name, "kernels": len(r.graph.kernels())} for r in self.results],
        }

    def __str__(self) -> str:
        kernels = counted(sum(len(r.graph.kernels()) for r in self.results), "kernel")
        head = f"{self.name}: {self.taken} of {self.total} operators taken over, in {kernels}"
        return "\n".join([head, *(f"  stays PyTorch: {name}: {why}" for name, why in self.left.items())])


def import_file(
    file: Path,
    target: str | None = None,
    dtype: str = "f32",
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Imported:
    """A KernelBench file with its `ModelNew`, which is checked against `Model` on a CPU, by way of PyTorch code made
    from the same μGraphs where the target is a GPU.  Runs the file.  `options` are those of `pipeline.optimize`.

    Raises CaptureError where the file is no such file or does not run, VerificationError where ModelNew differs."""
    import torch

    if dtype not in DTYPES:
        raise SettingError(f"{dtype} is no element type of KernelBench", remedy=f"one of {', '.join(DTYPES)}")
    type_ = getattr(torch, DTYPES[dtype])
    chosen = parse_target(target)
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CaptureError(f"cannot read {file}: {error}", remedy="name a file of KernelBench") from error
    with redirect_stdout(sys.stderr):
        module = loaded(file)
        if missing := [n for n in NAMES if not hasattr(module, n)]:
            raise CaptureError(f"{file} has no {', '.join(missing)}", remedy=f"a KernelBench file defines {NAMES}")
        with located(file, f"Model of {file.name}"), torch.no_grad():
            given, start = (_listed(module, n, file) for n in ("get_inputs", "get_init_inputs"))
            make = module.Model
            model = _seeded(make, start).to(type_)
            if not isinstance(model, torch.nn.Module):
                raise CaptureError(f"Model of {file} is no torch.nn.Module")
            args, again = ([_as_type(x, type_) for x in g] for g in (given, _listed(module, "get_inputs", file)))
            before = _attributes(model)
            model(*copy.deepcopy(args))  # what is wrong with it is said with the user's line
            kept = _changed(before, _attributes(model))
        name = _name(file.stem)
        try:
            _check_arguments(args, start)
            if kept:
                raise CaptureError(f"it keeps state from call to call in {', '.join(kept)}")
            composed = compose(model, args, name)
            weights = {w: attrgetter(w)(model) for w in composed.weights}
            made = _Made(start, args, weights, None if _same_in_both_modes(model, args) else bool(model.training))
        except MugraphError as error:
            say(f"{name}: {error.message}")
            return _as_it_stands(name, source, error.message)
        space = space_of(settings.effort.get(options.pop("effort", None)))
        results: dict[str, Result] = {}
        left = dict(composed.reasons)
        for region in composed.regions:
            result = _optimized(region, chosen, left, say, space=space.but(ahead=False), **options)
            if result is not None:
                results[region.name] = result
        if not results:
            return _as_it_stands(name, source, "nothing beats the program as it stands", left, composed)
        sources = {n: r.source for n, r in results.items()}
        try:
            composed.text(sources)
        except CaptureError as error:
            return _as_it_stands(name, source, error.message, left, composed)
        text = _assembled(source, composed, sources, made, on_gpu=chosen.kind == "triton")
        twins = {n: torch_code.emit(r.graph) for n, r in results.items()}
        twin = _assembled(source, composed, twins, made, on_gpu=False)
        _check(name, twin, make, start, (args, again), type_)
        compile(text, f"{name}.py", "exec")
    taken = [o for r in composed.regions if r.name in results for o in r.operators]
    total = len(composed.left) + sum(len(r.operators) for r in composed.regions)
    found = Imported(name, text, len(taken), total, left, tuple(results.values()))
    return replace(found, text=_commented(found) + text)


def _name(stem: str) -> str:
    plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in stem).strip("_").lower()
    return plain if plain.isidentifier() and not keyword.iskeyword(plain) else f"model_{plain}"


def _seeded(make: Any, start: Sequence[Any]) -> Any:
    import torch

    torch.manual_seed(SEED)
    return make(*start)


def _listed(module: Any, name: str, file: Path) -> list[Any]:
    found = getattr(module, name)()
    if not isinstance(found, list | tuple):
        raise CaptureError(f"{name} of {file} returns a {type(found).__name__}", remedy="return a list of arguments")
    return list(found)


def _attributes(model: Any) -> dict[str, Any]:
    """The attributes of a module and its submodules, to be compared with `_changed`."""
    own = {name: vars(m).items() for name, m in model.named_modules()}
    return {f"{name}.{n}".lstrip("."): _frozen(x) for name, items in own.items() for n, x in items}


def _frozen(x: Any) -> Any:
    """Containers by what is in them now, tensors with the number of writes."""
    import torch

    match x:
        case torch.Tensor():
            return (x, x._version)
        case dict():
            return tuple((k, _frozen(v)) for k, v in x.items())
        case list() | tuple():
            return tuple(map(_frozen, x))
    return x


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The attributes that are others."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, tuple) and isinstance(b, tuple):
            return len(a) == len(b) and all(map(same, a, b))
        return a is b or (type(a) is type(b) and isinstance(a, int | float | complex | str | bytes | set) and a == b)

    return [n for n in {**before, **after} if n not in before or n not in after or not same(before[n], after[n])]


def _as_type(x: Any, dtype: Any) -> Any:
    import torch

    return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _check_arguments(args: Sequence[Any], start: Sequence[Any]) -> None:
    import torch

    for i, x in enumerate(start):
        try:
            ast.literal_eval(repr(x))
        except (ValueError, SyntaxError):
            raise CaptureError(f"argument {i} of its constructor is a {type(x).__name__}, no plain value") from None

    for i, x in enumerate(args):
        if not isinstance(x, torch.Tensor | int | float | bool | None):
            raise CaptureError(f"argument {i} is a {type(x).__name__}, no tensor and no number")


def _same_in_both_modes(model: Any, args: Sequence[Any]) -> bool:
    texts = []
    was = model.training
    for mode in (True, False):
        try:
            texts.append(graph_text(model.train(mode), args))
        except CaptureError:
            texts.append(str(mode))
    model.train(was)
    return texts[0] == texts[1]


def _optimized(
    region: Region, target: Any, left: dict[str, str], say: Callable[[str], None], **options: Any
) -> Result | None:
    """What runs instead of a region, or None where it stays as it is, with the reason in `left`."""
    try:
        result = pipeline.optimize(region.program, target=target, **options)
    except MugraphError as error:
        why = error.message
    else:
        if not result.unchanged:
            kernels = counted(len(result.graph.kernels()), "kernel")
            say(f"{region.program.name}: {counted(len(region.operators), 'operator')}, {kernels}")
            return result
        why = "nothing beats it as it stands"
    left.update(dict.fromkeys(region.operators, why))
    return None


# -- the new file


def _commented(found: Imported) -> str:
    lines = [f"# {line}" for line in str(found).splitlines()]
    return "\n".join([lines[0] + "; see ModelNew, below Model as it was given.", *lines[1:]]) + "\n"


def _as_it_stands(
    name: str, source: str, reason: str, left: Mapping[str, str] | None = None, of: Composed | None = None
) -> Imported:
    total = len(of.left) + sum(len(r.operators) for r in of.regions) if of else 0
    new = 'class ModelNew(Model):\n    """Model as it stands."""\n'
    found = Imported(name, f"{source.rstrip()}\n\n\n{new}", 0, total, left or {"all": " ".join(reason.split())}, ())
    return replace(found, text=_commented(found) + found.text)


@dataclass(frozen=True)
class _Made:
    """What forward is made for: constructor arguments, arguments, weights by attribute, and the training flag unless
    it does not matter."""

    start: Sequence[Any]
    args: Sequence[Any]
    weights: Mapping[str, Any]
    training: bool | None


def _assembled(source: str, composed: Composed, sources: Mapping[str, str], made: _Made, on_gpu: bool) -> str:
    """The file: Model as it was given, the functions, ModelNew.  Names of the functions differ from the file's."""
    taken = defined(ast.parse(source))
    pieces = []
    for region, text in sources.items():
        tree = ast.parse(text)
        own = defined(tree)
        names = {n: free(n, taken | own | {f"run_{region}"}) for n in own if n in taken and n != "run"}
        names["run"] = f"run_{region}"
        pieces.append(renamed(without_extras(text, tree), names))
        taken |= defined(ast.parse(pieces[-1]))
    body = composed.text(sources)
    fixed: dict[str, str] = {n: free(n, taken) for n in ("composed", "EXPECTED", "what_is_read") if n in taken}
    new = TEMPLATE.format(
        expected="\n".join(f"    {_described(x)}," for x in (*made.args, *made.weights.values())),
        start=", ".join(map(repr, made.start)) + "," * bool(made.start),
        weights="".join(f"            {_attribute(w)},\n" for w in made.weights),
        result={"one": "found[0]", "tuple": "found", "list": "list(found)"}[composed.result],
        on_gpu=" and t.is_cuda" if on_gpu else "",
        training="" if made.training is None else f"self.training is {made.training} and ",
    )
    pieces += [renamed(body, fixed), renamed(new, fixed)]
    return "\n\n\n".join([source.rstrip(), "import functools\n\nimport torch", *(p.strip("\n") for p in pieces)]) + "\n"


TEMPLATE = '''# What forward was made for: shape and element type of each argument (or its value), then of each weight.
EXPECTED = (
{expected}
)


def what_is_read(model):
    """Of each module its submodules, hooks, attributes that are no tensors, and a forward of its own: as they are."""
    internal = set(vars(torch.nn.Module())) - {{"_modules", "_forward_hooks", "_forward_pre_hooks"}}
    for m in model.modules():
        yield m, "forward", vars(m).get("forward")
        for name, x in vars(m).items():
            inside = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple, set)) else (x,)
            if name not in internal and not any(isinstance(y, torch.Tensor) for y in inside):
                yield m, name, x.copy() if isinstance(x, (dict, list, set)) else x


class ModelNew(Model):
    """Model, with the functions above in its forward.  Whatever they were not made for goes through Model's own: other
    arguments, other arguments of the constructor, gradients, tensors elsewhere than kernels run, and a model whose
    submodules, hooks or attributes were changed after it was made.  Not looked at are globals, attributes of classes,
    and what is inside an attribute that is no dict, list or set."""

    @functools.wraps(Model.__init__)
    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        self.read_as_made = tuple(what_is_read(self))
        self.as_made = repr((args, named)) == repr((({start}), {{}}))

    def forward(self, *args, **named):
        given = (
            *args,
{weights}        )
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        fits = (
            {training}self.as_made
            and not named
            and all((y := vars(m).get(n)) is x or (type(y) is type(x) and y == x) for m, n, x in self.read_as_made)
            and tuple((tuple(x.shape), x.dtype) if isinstance(x, torch.Tensor) else repr(x) for x in given) == EXPECTED
            and all(t.device == tensors[0].device{on_gpu} for t in tensors)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        )
        if not fits:
            return super().forward(*args, **named)
        with torch.cuda.device_of(tensors[0]):  # kernels are launched on the current device
            found = composed(*given[len(args) :], *args)
        return {result}'''


def _described(x: Any) -> str:
    import torch

    return f"({tuple(x.shape)}, {x.dtype})" if isinstance(x, torch.Tensor) else repr(repr(x))


def _attribute(path: str) -> str:
    """`net.0.weight` -> `getattr(self.net, "0").weight`."""
    text = "self"
    for part in path.split("."):
        text = f"{text}.{part}" if part.isidentifier() else f'getattr({text}, "{part}")'
    return text


# -- the check


def _check(name: str, text: str, make: Any, start: Sequence[Any], inputs: Sequence[Sequence[Any]], dtype: Any) -> None:
    """Raises VerificationError unless ModelNew has the weights of Model, and its results in calls in a row."""
    import torch

    def refused(*args: Any, **named: Any) -> Any:
        raise VerificationError(f"{name}: ModelNew calls the forward of Model for the arguments that it is made for")

    module = load_module(text, f"{name}_checked")
    module.Model.forward = refused  # of the copy of Model in this module
    with torch.no_grad():
        expected, found = _seeded(make, start).to(dtype), _seeded(module.ModelNew, start).to(dtype)
        for key, value in expected.state_dict().items():
            if not torch.equal(value, found.state_dict()[key]):
                raise VerificationError(f"{name}: {key} of ModelNew is not that of Model")
        wanted, got = ([_run(m, copy.deepcopy(args)) for args in inputs] for m in (expected, found))
    tolerance = TOLERANCES[str(dtype).removeprefix("torch.")]
    try:
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    except AssertionError as error:
        text = textwrap.shorten(str(error), 300)
        raise VerificationError(f"{name}: ModelNew does not compute what Model does: {text}") from error


def _run(model: Any, args: Sequence[Any]) -> Any:
    import torch

    torch.manual_seed(SEED)
    return model(*args)
