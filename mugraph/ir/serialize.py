"""Graphs as JSON: `loads(dumps(g)) == g`.

    {"schema_version": 1, "value": {"type": "KernelGraph", "name": ..., ...}}

A dataclass is an object with its class name under `type` and its fields by name; a tuple is an array, a rational
`{"rational": "1/8"}`, an element type its name.  Reading is directed by the declared types of the fields, so whatever
is missing, unknown or of another type is refused with its path.  A block graph also carries the maps that follow from
its roles; they may be left out, and are compared when they are there.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import fields, is_dataclass
from enum import Enum
from fractions import Fraction
from functools import cache
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from mugraph.errors import GraphError, Location, MugraphError, ParseError
from mugraph.ir import axes, graph, ops
from mugraph.ir import types as ir_types
from mugraph.ir.graph import BlockGraph, Map
from mugraph.ir.printer import canonical_text, load_maps, store_map

__all__ = ["SCHEMA_VERSION", "canonical_text", "dumps", "from_json", "loads", "to_json"]

SCHEMA_VERSION = 1

_MODULES = (axes, ir_types, ops, graph)
# Every dataclass of the IR, by name: what `type` may say.
CLASSES: dict[str, type[Any]] = {
    name: cls
    for module in _MODULES
    for name, cls in vars(module).items()
    if isinstance(cls, type) and is_dataclass(cls)
} | {"Location": Location}


def dumps(value: object, indent: int | None = None) -> str:
    """The value as JSON text."""
    return json.dumps(to_json(value), indent=indent)


def loads(text: str) -> Any:
    """The value of JSON text.  Raises ParseError where it is no JSON, GraphError where it is no graph."""
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ParseError(f"not JSON: {error}", remedy="write the file again with `dumps`") from None
    return from_json(data)


def to_json(value: object) -> dict[str, Any]:
    """Any dataclass of the IR as JSON-ready data."""
    return {"schema_version": SCHEMA_VERSION, "value": _encoded(value)}


def from_json(data: Any) -> Any:
    """The value of such data.  Raises GraphError for an unknown schema version, an unknown or misplaced type, a
    missing or unknown field, and for maps that do not follow from the roles."""
    if not isinstance(data, dict) or "schema_version" not in data or "value" not in data:
        raise GraphError("JSON without schema_version and value", remedy="write it with `to_json`")
    if data["schema_version"] != SCHEMA_VERSION:
        raise GraphError(
            f"schema version {data['schema_version']!r}, not {SCHEMA_VERSION}",
            remedy="write the file again with this version of mugraph",
        )
    return _object(data["value"], "value")


def _encoded(value: object) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case Fraction():
            return {"rational": str(value)}
        case Enum():
            return value.value
        case tuple():
            return [_encoded(v) for v in value]
        case _ if type(value).__name__ in CLASSES:
            found = {f.name: _encoded(getattr(value, f.name)) for f in fields(value)}  # type: ignore[arg-type]
            maps = {"maps": _maps(value)} if isinstance(value, BlockGraph) else {}
            return {"type": type(value).__name__, **found, **maps}
    raise GraphError(f"{type(value).__name__} is no part of a graph")


def _maps(block: BlockGraph) -> dict[str, Any]:
    """The derived maps: imap and fmap of each load, in order, and omap of each store."""

    def entries(found: tuple[tuple[str, int | None], ...]) -> list[list[Any]]:
        return [list(entry) for entry in found]

    def of_load(m: Map) -> dict[str, Any]:
        return {"imap": entries(m.grid), "fmap": entries(m.loops)}

    loads_ = [of_load(load_maps(block, load, p.loops)) for p in block.passes for load in p.loads]
    loads_ += [of_load(load_maps(block, load, ())) for load in block.loads]
    stores = [store_map(block, s) for s in block.stores]
    return {"loads": loads_, "stores": [{"omap": entries(m.grid), "fmap": entries(m.loops)} for m in stores]}


def _refuse(path: str, message: str) -> NoReturn:
    raise GraphError(f"{message}, at {path}")


def _object(data: Any, path: str, allowed: tuple[type[Any], ...] | None = None) -> Any:
    """A dataclass: one of `allowed`, or a subclass of one."""
    if not isinstance(data, dict) or "type" not in data:
        _refuse(path, f"expected an object with a type, found {_short(data)}")
    name = data["type"]
    cls = CLASSES.get(name) if isinstance(name, str) else None
    if cls is None:
        _refuse(path, f"there is no type {_short(name)}")
    if allowed is not None and not issubclass(cls, allowed):
        _refuse(path, f"{name} where {' or '.join(a.__name__ for a in allowed)} belongs")
    given = {key: v for key, v in data.items() if key != "type"}
    maps = given.pop("maps", None) if cls is BlockGraph else None
    hints = _hints(name)
    if wrong := sorted(given.keys() ^ hints.keys()):
        _refuse(path, f"{name} has the fields {', '.join(hints)}; missing or unknown: {', '.join(wrong)}")
    values = {key: _decoded(hint, given[key], f"{path}.{key}") for key, hint in hints.items()}
    try:
        result = cls(**values)
    except MugraphError as error:
        raise GraphError(f"{error.message}, at {path}", remedy=error.remedy) from None
    if maps is not None and maps != _maps(result):
        _refuse(path, "the stored maps are not those that follow from the axes' roles")
    return result


@cache
def _hints(name: str) -> dict[str, Any]:
    """The declared types of a class's fields, forward references across modules resolved."""
    cls = CLASSES[name]
    known = dict(vars(typing)) | {n: v for module in _MODULES for n, v in vars(module).items()} | CLASSES
    found = get_type_hints(cls, globalns=known)
    return {f.name: found[f.name] for f in fields(cls)}


def _decoded(hint: Any, data: Any, path: str) -> Any:
    """The data as a value of the declared type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(args, data, path)
    if origin is tuple:
        if not isinstance(data, list):
            _refuse(path, f"expected an array, found {_short(data)}")
        items = (args[0],) * len(data) if args[-1:] == (Ellipsis,) else args
        if len(items) != len(data):
            _refuse(path, f"expected {len(items)} entries, found {len(data)}")
        return tuple(_decoded(h, d, f"{path}[{i}]") for i, (h, d) in enumerate(zip(items, data, strict=True)))
    if origin is Literal:
        if data not in args:
            _refuse(path, f"{_short(data)} is not one of {', '.join(map(str, args))}")
        return data
    if hint is Fraction:
        return _rational(data, path)
    if isinstance(hint, type) and issubclass(hint, Enum):
        known = [member.value for member in hint]
        if data not in known:
            _refuse(path, f"{_short(data)} is not one of {', '.join(known)}")
        return hint(data)
    if isinstance(hint, type) and is_dataclass(hint):
        return _object(data, path, (hint,))
    if type(data) is not hint:
        _refuse(path, f"expected {hint.__name__}, found {_short(data)}")
    return data


def _one_of(hints: tuple[Any, ...], data: Any, path: str) -> Any:
    """The data as a value of one of the types; what JSON says about it decides which."""
    classes = tuple(h for h in hints if isinstance(h, type) and is_dataclass(h))
    if isinstance(data, dict):
        return _rational(data, path) if Fraction in hints and "rational" in data else _object(data, path, classes)
    for hint in hints:
        if hint is type(data):
            return data
        if get_origin(hint) is tuple and isinstance(data, list):
            return _decoded(hint, data, path)
    _refuse(path, f"expected {' or '.join(h.__name__ for h in hints)}, found {_short(data)}")


def _rational(data: Any, path: str) -> Fraction:
    text = data.get("rational") if isinstance(data, dict) else None
    try:
        return Fraction(text if isinstance(text, str) else "")
    except (ValueError, ZeroDivisionError):
        _refuse(path, f'expected {{"rational": "1/8"}}, found {_short(data)}')


def _short(data: Any) -> str:
    text = json.dumps(data, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
