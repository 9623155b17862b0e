"""Arguments against their annotations: one place that says what was given, what is expected, and what to give.

    fitted(tuple[int, ...], [1, 64], "SearchSpace.sizes")      # (1, 64)
    fitted(Positive, "many", "SearchSpace.states")             # SettingError

It is a class, a `Literal`, a union, `tuple` or `Callable`, and may carry limits: `Annotated[int, Limits(1)]`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mugraph.errors import SettingError


@dataclass(frozen=True)
class Limits:
    """What a number may be: from `least` to `most`; `above` and `below` are left out themselves."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    power_of_two: bool = False

    def hold(self, x: float) -> bool:
        return (
            (self.least is None or x >= self.least)
            and (self.most is None or x <= self.most)
            and (self.above is None or x > self.above)
            and (self.below is None or x < self.below)
            and not (self.power_of_two and int(x) & (int(x) - 1))
        )

    def __str__(self) -> str:
        words = {"from": self.least, "to": self.most, "above": self.above, "below": self.below}
        limits = " ".join(f"{word} {x:g}" for word, x in words.items() if x is not None)
        return limits + (" that is a power of two" if self.power_of_two else "")


Positive = Annotated[int, Limits(least=1)]
Natural = Annotated[int, Limits(least=0)]
PowerOfTwo = Annotated[int, Limits(least=1, power_of_two=True)]
Probability = Annotated[float, Limits(above=0, below=1)]


class Unfit(ValueError):
    """A value that an annotation does not allow."""


def fitted(hint: Any, value: object, name: str) -> Any:
    """The value as the annotation has it: a list where a tuple is expected becomes one, a mapping where pairs are
    expected its items, and what counts as an integer (NumPy's, say) an `int`.  Raises SettingError for any other
    value: text is no number, a number no flag."""
    try:
        return fit(hint, value)
    except Unfit:
        raise SettingError(f"{name} is {_shown(value)}, not {words(hint)}", remedy=f"give {words(hint)}") from None


def fit_fields(made: Any) -> None:
    """Every field of a frozen dataclass as its annotation has it, in place, while it is made."""
    kind: Any = type(made)
    hints = _hints(kind)
    for f in fields(made):
        value = fitted(hints[f.name], getattr(made, f.name), f"{kind.__name__}.{f.name}")
        object.__setattr__(made, f.name, value)


def fit_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name as the function's annotations have them.  Raises SettingError, also for an unknown name."""
    hints = {n: h for n, h in _hints(function).items() if n != "return"}
    for name in given:
        if name not in hints:
            known = ", ".join(hints)
            raise SettingError(f"{function.__name__} has no argument {name!r}", remedy=f"known: {known}")
    return {name: fitted(hints[name], value, name) for name, value in given.items()}


@lru_cache
def _hints(owner: Any) -> dict[str, Any]:
    return get_type_hints(owner, include_extras=True)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def fit(hint: Any, value: Any) -> Any:
    """The value as `fitted` gives it.  Raises Unfit for any other value."""
    args, origin = get_args(hint), get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        found = fit(args[0], value)
        if not all(limits.hold(found) for limits in args[1:] if isinstance(limits, Limits)):
            raise Unfit(f"{_shown(value)} is not {words(hint)}")
        return found
    if origin is Literal:
        return _one(value, lambda: any(type(value) is type(x) and value == x for x in args))
    if origin in (Union, UnionType):
        return _any_of(args, value)
    if origin is tuple:
        return _tuple(args, value)
    if origin is not None:
        return _one(value, lambda: callable(value) if origin.__name__ == "Callable" else isinstance(value, origin))
    return _plain(hint, value)


def _one(value: Any, holds: Callable[[], bool]) -> Any:
    if not holds():
        raise Unfit(f"{_shown(value)} does not fit")
    return value


def _any_of(hints: Sequence[Any], value: Any) -> Any:
    for hint in hints:
        try:
            return fit(hint, value)
        except Unfit:
            continue
    raise Unfit


def _tuple(args: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    many = args[-1] is Ellipsis
    if many and isinstance(value, Mapping) and _is_pair(args[0]):
        value = tuple(value.items())
    if not isinstance(value, list | tuple) or not (many or len(value) == len(args)):
        raise Unfit
    return tuple(fit(h, x) for h, x in zip(args[:1] * len(value) if many else args, value, strict=True))


def _is_pair(hint: Any) -> bool:
    return get_origin(hint) is tuple and len(get_args(hint)) == 2 and get_args(hint)[1] is not Ellipsis


def _plain(kind: type, value: Any) -> Any:
    if kind in (int, float) and not isinstance(value, bool | str | bytes):
        try:
            found = value if kind is float and isinstance(value, int | float) else _number(kind, value)
        except (TypeError, ValueError, OverflowError):
            raise Unfit from None
        return _one(found, lambda: not math.isnan(found))
    return _one(value, lambda: kind not in (int, float) and isinstance(value, kind))


def _number(kind: type, value: Any) -> int | float:
    return operator.index(value) if kind is int else float(value)


def words(hint: Any) -> str:
    """What an annotation allows, in words.

    >>> words(tuple[Positive, ...] | None)
    'a tuple of integers from 1, or None'
    >>> words(Literal["closure", "off"])
    "'closure' or 'off'"
    """
    args, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        return " ".join([words(args[0]), *(str(x) for x in args[1:] if isinstance(x, Limits))])
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin in (Union, UnionType):
        texts = [words(h) for h in args]
        return f"{', '.join(texts[:-1])}{',' if len(args) > 2 or args[-1] is NoneType else ''} or {texts[-1]}"
    if origin is tuple and args[-1] is Ellipsis:
        mapping = ", or a mapping of these" if _is_pair(args[0]) else ""
        return f"a tuple of {_several(args[0])}{mapping}"
    if origin is tuple:
        return f"({', '.join(map(words, args))})"
    if origin is not None:
        return "a function" if origin.__name__ == "Callable" else f"a {origin.__name__}"
    return _NAMED.get(hint) or f"a {hint.__module__}.{hint.__name__}"


def _several(hint: Any) -> str:
    args = get_args(hint)
    match get_origin(hint):
        case origin if origin is Annotated:
            return " ".join([_several(args[0]), *(str(x) for x in args[1:] if isinstance(x, Limits))])
        case origin if origin is tuple:
            return f"pairs {words(hint)}"
    return {int: "integers", float: "numbers", str: "names"}.get(hint) or words(hint)


_NAMED: dict[Any, str] = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a text",
    NoneType: "None",
}
