"""Random programs in the DSL, reproducible from a seed, and their shrinking to few lines.

    recipe = random_recipe(seed)      up to 12 lines over a few inputs; sizes 1, primes and symbolic among them
    print(recipe)                     the program as a Python function
    recipe.program()                  traced
    shrunk(recipe, fails)             a smaller recipe that `fails` still holds of

A recipe is text: a line is an expression over earlier names.  The generator proposes expressions that fit the shapes of
what is there and asks the tracer; what it refuses is proposed no more.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import mugraph as mg
from mugraph.dsl.tensor import Tensor
from mugraph.errors import MugraphError, UnsupportedOpError
from mugraph.ir.axes import Axis
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import Gather
from mugraph.ir.types import DType, Input, Storage
from mugraph.ir.types import Tensor as Typed

MOST_LINES = 12
B = mg.Dim("B", 1, 64)
SMALL = (1, 2, 3, 4, 5, 6, 7, 8, 12)
LARGE = (16, 37, 64, 101, 128, 257, 1009, 3584, 4096, 7168, 11008, 14336)
NUMBERS = ("2", "0.5", "3", "-1", "0.125", "1", "0", "1e-6", "1e-30")
LARGEST = 2**27  # elements of one value
CONSTANT = "constant "  # before the element type of an input that stays as it is from call to call
Size = int | str


@dataclass(frozen=True)
class Recipe:
    """Inputs as (name, element type, sizes), lines as (name, expression), and the names that are returned."""

    inputs: tuple[tuple[str, str, tuple[Size, ...]], ...]
    lines: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]

    def __str__(self) -> str:
        given = ", ".join(f"{n}: {_spec(*i)}" for n, *i in self.inputs)
        body = [f"    {name} = {expression}" for name, expression in self.lines]
        return "\n".join([f"def program({given}):", *body, f"    return {', '.join(self.outputs)}"])

    def program(self) -> Program:
        """Raises MugraphError where the lines do not fit."""
        scope: dict[str, Any] = {"mg": mg, "B": B}
        exec(str(self), scope)
        return mg.trace(scope["program"], name="random")

    def needed(self) -> "Recipe":
        """Without lines and inputs that no output needs."""
        alive = set(self.outputs)
        for name, expression in reversed(self.lines):
            if name in alive:
                alive.update(names_in(expression))
        return Recipe(
            tuple(i for i in self.inputs if i[0] in alive),
            tuple(line for line in self.lines if line[0] in alive),
            self.outputs,
        )


def _spec(dtype: str, sizes: Sequence[Size]) -> str:
    spec = f"mg.{dtype.removeprefix(CONSTANT)}[{_sizes(sizes)}]"
    return f"mg.constant({spec})" if dtype.startswith(CONSTANT) else spec


def _sizes(sizes: Sequence[Size]) -> str:
    return ", ".join(map(str, sizes)) if sizes else "()"


def names_in(expression: str) -> list[str]:
    """The values that an expression uses: x0, v3."""
    return re.findall(r"\b[xv]\d+\b", expression)


# -- generation


def random_recipe(seed: int, lines: int = MOST_LINES, kinds: Sequence[str] = ()) -> Recipe:
    """At most so many lines, of all kinds or of these: the names of methods of the generator.  A program that rounds on
    the way to a wider type is none: another takes its place."""
    random = Random(seed)
    while True:
        with suppress(UnsupportedOpError):
            found = _Generator(random, lines, kinds or KINDS).recipe()
            found.program()
            return found


class _Generator:
    def __init__(self, random: Random, lines: int, kinds: Sequence[str]) -> None:
        self.random, self.kinds = random, kinds
        self.count = 1 + int((lines - 1) * random.random() ** 1.5)
        self.dtype = random.choice(["f32", "f32", "f16", "bf16"])
        self.pool: list[Size] = [random.choice(SMALL), random.choice(SMALL)]
        self.pool.append(random.choice(LARGE if random.random() < 0.5 else SMALL))
        if random.random() < 0.5:
            self.pool.append("B")
        self.values: dict[str, Tensor] = {}

    def recipe(self) -> Recipe:
        inputs = tuple((f"x{i}", self.kind_of_input(), sizes) for i, sizes in enumerate(self.shapes()))
        lines: list[tuple[str, str]] = []

        def body(*given: Tensor) -> list[Tensor]:
            self.values = {name: x for (name, _, _), x in zip(inputs, given, strict=True)}
            for i in range(self.count):
                expression, value = self.line()
                lines.append((f"v{i}", expression))
                self.values[f"v{i}"] = value
            return [self.values[lines[-1][0]]]

        specs = {name: eval(_spec(dtype, sizes), {"mg": mg, "B": B}) for name, dtype, sizes in inputs}
        mg.trace(body, specs)
        others = [name for name, _ in lines[:-1] if self.values[name].masked is None]
        extra = self.random.sample(others, min(len(others), self.random.choice([0, 0, 0, 1, 2])))
        return Recipe(inputs, tuple(lines), (*extra, lines[-1][0])).needed()

    def kind_of_input(self) -> str:
        """Mostly one element type; some are of another, and some constant."""
        dtype = self.dtype if self.random.random() < 0.9 else self.random.choice(["f32", "f16", "bf16"])
        return CONSTANT + dtype if self.random.random() < 0.15 else dtype

    def shapes(self) -> list[tuple[Size, ...]]:
        """Shapes over one small pool of sizes, so that many fit each other."""
        r = self.random
        first = tuple(r.choice(self.pool) for _ in range(r.choice([1, 2, 2, 2, 3, 4])))
        found = [first, first, first[-1:], (first[-1], r.choice(self.pool))]
        found += [tuple(r.choice(self.pool) for _ in range(r.choice([1, 2, 2, 3]))) for _ in range(2)]
        return found

    def line(self) -> tuple[str, Tensor]:
        """An expression that the tracer takes, and what it gives."""
        while True:
            expression = getattr(self, self.random.choice(self.kinds))(self.name())
            if expression is None:
                continue
            try:
                value = eval(expression, {"mg": mg, **self.values})
            except MugraphError:
                continue
            if value.dtype.is_float and value.masked is None and value.ndim <= 4 and elements(value) <= LARGEST:
                return expression, value

    def name(self) -> str:
        """Recent values are likelier, so that the program hangs together."""
        names = list(self.values)
        return names[-1] if self.random.random() < 0.6 else self.random.choice(names)

    def other(self, fits: Callable[[Tensor], bool]) -> str | None:
        found = [n for n, x in self.values.items() if fits(x)]
        return self.random.choice(found) if found else None

    def axis(self, x: str) -> int | None:
        n = self.values[x].ndim
        return self.random.choice([-1, self.random.randrange(n)]) if n else None

    def beside(self, x: str) -> str | None:
        """A value that broadcasts with x."""
        sizes = self.values[x].sizes

        def fits(other: Tensor) -> bool:
            pairs = zip(reversed(sizes), reversed(other.sizes), strict=False)
            return all(a == b or a == 1 or b == 1 for a, b in pairs)

        return self.other(fits)

    # -- the kinds of lines; None where x does not fit

    def function(self, x: str) -> str:
        names = [
            "exp",
            "silu",
            "gelu",
            "relu",
            "tanh",
            "sigmoid",
            "square",
            "neg",
            "abs",
            "sqrt",
            "rsqrt",
            "log",
            "reciprocal",
        ]
        return f"mg.{self.random.choice(names)}({x})"

    def affine(self, x: str) -> str:
        c = self.random.choice(NUMBERS)
        return self.random.choice([f"{x} * {c}", f"{x} + {c}", f"{c} - {x}", f"{x} / 3", f"mg.pow({x}, 3)"])

    def binary(self, x: str) -> str | None:
        y = self.beside(x)
        forms = ["{} + {}", "{} - {}", "{} * {}", "{} * {}", "{} / {}", "mg.maximum({}, {})", "mg.minimum({}, {})"]
        return self.random.choice(forms).format(x, y) if y else None

    def term(self, x: str) -> str | None:
        y = self.beside(x)
        return f"{x} {self.random.choice('+*')} {y}" if y else None

    def select(self, x: str) -> str | None:
        y, z = self.beside(x), self.beside(x)
        relation = self.random.choice(["<", ">=", "!="])
        return self.random.choice([f"mg.where({x} {relation} {y}, {x}, {z})", f"mg.where({y} {relation} 0, {x}, 0)"])

    def reduction(self, x: str) -> str | None:
        axis, n = self.axis(x), self.values[x].ndim
        if axis is None:
            return None
        several = ["(0, -1)", "None"] if n < 3 else ["(0, -1)", "(0, 1)", "(1, 2)", "None"]
        chosen = repr(axis) if n < 2 or self.random.random() < 0.8 else self.random.choice(several)
        kind = self.random.choice(["sum", "sum", "mean", "amax", "amin"])
        return f"mg.{kind}({x}, {chosen}, {self.random.random() < 0.6})"

    def softmax(self, x: str) -> str | None:
        axis = self.axis(x)
        return None if axis is None else f"mg.{self.random.choice(['softmax', 'softmax', 'logsumexp'])}({x}, {axis})"

    def masked(self, x: str) -> str | None:
        if self.values[x].ndim < 2:
            return None
        causal = f"mg.causal_mask({x}.shape[-2], {x}.shape[-1], {self.random.choice([0, 0, 2])})"
        one, other = (f"{self.beside(x)} > {n}" for n in (0, 1))
        mask = self.random.choice([causal, one, f"({one}) & ({other})", f"({one}) | ~{causal}"])
        forms = [f"mg.softmax(mg.where({mask}, {x}, float('-inf')))", f"mg.where({mask}, {x}, 0)"]
        forms += [f"mg.masked_fill({x}, {mask}, 1)", f"mg.tril({x})", f"mg.triu({x}, 1)"]
        return self.random.choice(forms)

    def normalised(self, x: str) -> str | None:
        if not self.values[x].ndim:
            return None
        weight = self.other(lambda y: y.sizes == self.values[x].sizes[-1:])
        return self.random.choice(
            [f"mg.rms_norm({x})", f"mg.layer_norm({x})", f"mg.rms_norm({x}, {weight})", f"mg.layer_norm({x}, {weight})"]
        )

    def matmul(self, x: str) -> str | None:
        a, found = self.values[x], []
        for name, b in self.values.items():
            if a.ndim and b.ndim > 1:
                found += [f"{x} @ {name}"] * (a.sizes[-1] == b.sizes[-2])
                found += [f"{x} @ {name}.mT"] * (a.sizes[-1] == b.sizes[-1])
            if a.ndim > 1 and b.ndim > 1 and a.sizes[-2] == b.sizes[-2]:
                found.append(f"{x}.mT @ {name}")
        return self.random.choice(found) if found else None

    def outer(self, x: str) -> str | None:
        y = self.other(lambda y: y.ndim == 1)
        forms = ["{}.unsqueeze(-1) * {}", "{}.unsqueeze(-1) - {}", "mg.maximum({}.unsqueeze(-1), {})"]
        return self.random.choice(forms).format(x, y) if y else None

    def summed_product(self, x: str) -> str | None:
        """Contractions that @ does not say: over several axes, traces, diagonals."""
        n = self.values[x].ndim
        y = self.other(lambda y: y.ndim == n)
        letters = "abcd"[:n]
        if not n or not y:
            return None
        kept = "".join(a for a in letters if self.random.random() < 0.5)
        forms = [f"mg.einsum('{letters},{letters}->{kept}', {x}, {y})", f"mg.einsum('{letters}->{kept}', {x})"]
        if n == 2:
            forms += [f"mg.einsum('ab,ac->bc', {x}, {x})", f"mg.einsum('ab,cb->ac', {x}, {y})"]
        return self.random.choice(forms)

    def view(self, x: str) -> str | None:
        sizes, r = self.values[x].sizes, self.random
        n = len(sizes)
        forms = [f"{x}.unsqueeze({r.randrange(n + 1)})", f"{x}.squeeze()"]
        if n > 1:
            forms += [f"{x}.mT", f"{x}.permute({', '.join(map(str, r.sample(range(n), n)))})", f"{x}.flatten()"] * 2
        if n > 2:
            forms += [f"{x}.flatten(0, 1)", f"{x}.flatten(-2)", f"{x}.transpose(0, -1)"] * 2
        if n and isinstance(sizes[-1], int):
            forms += [f"{x}.unflatten(-1, ({d}, {sizes[-1] // d}))" for d in (2, 3) if sizes[-1] % d == 0] * 2
            forms.append(f"{x}.repeat_interleave(2, -1)")
        return r.choice(forms)

    def cut(self, x: str) -> str | None:
        sizes, r = self.values[x].sizes, self.random
        places = [i for i, s in enumerate(sizes) if isinstance(s, int) and s > 1]
        if not places:
            return None
        i = r.choice(places)
        size = int(str(sizes[i]))
        start = r.randrange(size)
        stop = r.randrange(start + 1, size + 1)
        step = r.choice([1, 1, 2])
        return f"{x}[{':, ' * i}{start}:{stop}:{step}]"

    def joined(self, x: str) -> str | None:
        a = self.values[x]
        places = [i for i, s in enumerate(a.sizes) if isinstance(s, int)]
        if not places:
            return None
        i = self.random.choice(places)

        def fits(y: Tensor) -> bool:
            return y.ndim == a.ndim and all(a.sizes[j] == y.sizes[j] for j in range(a.ndim) if j != i)

        y = self.other(fits)
        forms = [f"mg.concat([{x}, {y}], {i})", f"mg.concat([{x}, {x} * 2], {i})", f"mg.stack([{x}, {x} * 2], {i})"]
        if int(str(a.sizes[i])) % 2 == 0:
            forms.append(f"mg.concat([-{x}.chunk(2, {i})[1], {x}.chunk(2, {i})[0]], {i})")  # rotated by halves
        return self.random.choice(forms)

    def cast(self, x: str) -> str:
        return self.random.choice([f"{x}.half()", f"{x}.float()", f"{x}.to(mg.bf16)"])

    def counted(self, x: str) -> str | None:
        if not self.values[x].ndim:
            return None
        return self.random.choice([f"{x} * mg.iota({x}.shape[-1])", f"mg.cumsum({x}, -1)", f"{x} / {x}.shape[-1]"])

    def attention(self, x: str) -> str | None:
        a = self.values[x]
        if a.ndim < 2:
            return None
        keys = self.other(lambda k: k.ndim > 1 and k.sizes[-1] == a.sizes[-1])
        values = self.other(lambda v: v.ndim > 1 and v.sizes[-2] == self.values[str(keys)].sizes[-2]) if keys else None
        return f"mg.attention({x}, {keys}, {values})" if values else None


FREQUENT = ("function", "affine", "binary", "binary", "reduction", "matmul", "matmul")
RARE = ("select", "softmax", "masked", "normalised", "outer", "summed_product", "view", "cut", "joined", "cast")
KINDS = (*FREQUENT * 3, *RARE, "counted", "attention")


def elements(x: Tensor) -> int:
    """Symbolic sizes count as 64."""
    return math.prod(s if isinstance(s, int) else 64 for s in x.sizes)


def looked_up(program: Program, seed: int) -> Program:
    """The program with the rows of one of its inputs taken from a table, by an index: x = table[index]."""
    places = [i for i in program.inputs if i.tensor.axes and len(i.tensor.dims[0]) == 1]
    if not places:
        return program
    chosen = Random(seed).choice(places)
    x = chosen.tensor
    rows = Axis("rows", 50)
    table = replace(x, name="table", dims=((rows,), *x.dims[1:]))
    index = Input(Typed("index", x.dims[:1], DType.i64), Storage(DType.i64))
    inputs = tuple(replace(i, tensor=table) if i is chosen else i for i in program.inputs)
    take = Equation((x,), Gather("rows"), ("table", "index"))
    return replace(program, inputs=(*inputs, index), equations=(take, *program.equations))


# -- shrinking


def shrunk(recipe: Recipe, fails: Callable[[Program], bool], tries: int = 300) -> Recipe:
    """Greedy: the first smaller recipe that still fails, again and again."""
    while tries:
        for smaller in _smaller(recipe):
            if not tries:
                break
            try:
                program = smaller.program()
            except (MugraphError, IndexError):
                continue
            tries -= 1
            if fails(program):
                recipe = smaller
                break
        else:
            return recipe
    return recipe


def _smaller(recipe: Recipe) -> Iterator[Recipe]:
    for name in recipe.outputs if len(recipe.outputs) > 1 else ():
        yield replace(recipe, outputs=(name,)).needed()
    for name in recipe.outputs if len(recipe.outputs) > 2 else ():
        yield replace(recipe, outputs=tuple(o for o in recipe.outputs if o != name)).needed()
    for at, (name, expression) in enumerate(recipe.lines):
        for operand in dict.fromkeys(names_in(expression)):
            lines = recipe.lines[:at] + tuple((n, _renamed(e, name, operand)) for n, e in recipe.lines[at + 1 :])
            outputs = tuple(operand if o == name else o for o in recipe.outputs)
            if all(o.startswith("v") for o in outputs):
                yield Recipe(recipe.inputs, lines, outputs).needed()
        dtype = recipe.inputs[0][1].removeprefix(CONSTANT)
        for sizes in dict.fromkeys(s for _, _, s in recipe.inputs):  # a computed value becomes an input
            given = (*recipe.inputs, (f"x{len(recipe.inputs) + 20}", dtype, sizes))
            lines = recipe.lines[:at] + tuple((n, _renamed(e, name, given[-1][0])) for n, e in recipe.lines[at + 1 :])
            if name not in recipe.outputs:
                yield Recipe(given, lines, recipe.outputs).needed()
        for shorter in _simpler(expression):
            yield replace(recipe, lines=(*recipe.lines[:at], (name, shorter), *recipe.lines[at + 1 :])).needed()
    known = list(dict.fromkeys(s for _, _, sizes in recipe.inputs for s in sizes))
    for size in known:
        for new in (2, 3, 5):
            if size == "B" or (isinstance(size, int) and size > new):
                shapes = (tuple(new if s == size else s for s in sizes) for _, _, sizes in recipe.inputs)
                inputs = tuple((n, d, s) for (n, d, _), s in zip(recipe.inputs, shapes, strict=True))
                yield replace(recipe, inputs=inputs)
    for i, (n, d, sizes) in enumerate(recipe.inputs):
        for k in range(len(sizes)):
            fewer = (n, d, sizes[:k] + sizes[k + 1 :])
            yield replace(recipe, inputs=(*recipe.inputs[:i], fewer, *recipe.inputs[i + 1 :]))
    if any(d != "f32" for _, d, _ in recipe.inputs):
        yield replace(recipe, inputs=tuple((n, "f32", sizes) for n, _, sizes in recipe.inputs))


def _simpler(expression: str) -> Iterator[str]:
    """A simpler function in the place of another."""
    for pattern, new in (
        (r"mg\.softmax\((\w+), .*\)", r"mg.exp(\1)"),
        (r"mg\.logsumexp\((\w+), (.*)\)", r"mg.sum(\1, \2)"),
        (r"mg\.(mean|amax|amin)\(", "mg.sum("),
        (r"mg\.(gelu|silu|tanh|sigmoid|log|sqrt|rsqrt|square|reciprocal|exp)\(", "mg.abs("),
        (r"mg\.(rms_norm|layer_norm)\((\w+).*\)", r"\2 * mg.sum(\2, -1, True)"),
        (r"^(\w+) [-*/] (\w+)$", r"\1 + \2"),
        (r"mg\.(maximum|minimum)\((\w+), (\w+)\)", r"\2 + \3"),
        (r"mg\.attention\((\w+), (\w+), (\w+)\)", r"\1 @ \2.mT @ \3"),
    ):
        shorter = re.sub(pattern, new, expression)
        if shorter != expression:
            yield shorter


def _renamed(expression: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, expression)
