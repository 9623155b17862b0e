"""Emitted files joined with others, under names that do not clash, and written; numbers of things."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path

from mugraph.errors import CacheError
from mugraph.runtime.files import write_whole


def counted(number: int, what: str) -> str:
    """`2 kernels`."""
    return f"{number} {what}{'s' * (number != 1)}"


def without_extras(text: str, tree: ast.Module) -> str:
    """An emitted file without its docstring and what compiling ahead of time needs."""
    lines = text.splitlines()
    for node in reversed(tree.body):
        match node:
            case ast.Expr(ast.Constant(str())) | ast.Assign(targets=[ast.Name("SIGNATURES")]):
                start = node.lineno - 1
                while start and lines[start - 1].startswith("#"):
                    start -= 1
                del lines[start : node.end_lineno]
    return "\n".join(lines)


def defined(tree: ast.Module) -> set[str]:
    """The names that a file defines or imports at its top level, except modules under the names that everybody has for
    them."""
    usual = {"import functools", "import torch", "import triton", "import triton.language as tl"}
    found: set[str] = set()
    rest: list[ast.AST] = list(tree.body)
    while rest:
        match node := rest.pop():
            case ast.Import(names) | ast.ImportFrom(names=names):
                if ast.unparse(node) not in usual:
                    found |= {(a.asname or a.name).partition(".")[0] for a in names}
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case _:
                rest += ast.iter_child_nodes(node)
    return found


def free(name: str, taken: set[str]) -> str:
    count = 1
    while f"{name}_{count}" in taken:
        count += 1
    return f"{name}_{count}"


def renamed(text: str, names: Mapping[str, str]) -> str:
    """The text with other names, in code and not in strings, comments and attributes."""
    lines = text.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for before, t in reversed(list(pairwise(tokens))):
        if t.type == tokenize.NAME and t.string in names and before.string != ".":
            (row, start), (_, end) = t.start, t.end
            lines[row - 1] = lines[row - 1][:start] + names[t.string] + lines[row - 1][end:]
    return "".join(lines)


def check_place(out: Path, names: Collection[str]) -> None:
    """Raises CacheError unless a directory is absent, or holds nothing but these names."""
    if out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - set(names)):
        raise CacheError(f"{out} is there, and holds something else", remedy="name another directory")


def write_files(out: Path, files: Mapping[str, str]) -> None:
    """Writes texts into a directory, each of them whole.  Raises CacheError where that does not go."""
    try:
        for name, text in files.items():
            write_whole(out / name, text)
    except OSError as error:
        raise CacheError(f"cannot write {out}: {error}", remedy="name another place") from error
