"""`register.py` of a saved result: the program as a PyTorch operator, without mugraph.

The file holds the text of `custom_op` with the errors that it raises, the program as PyTorch code, and what callers
see; kernels come from kernel.py beside it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from mugraph.errors import UnsupportedOpError
from mugraph.ir.graph import Program
from mugraph.runtime.aot import chosen_classes, joined_imports, signature_of
from mugraph.runtime.custom_op import NAMESPACE, Operator
from mugraph.runtime.load import load_module
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler.signature import shapes_text

REFERENCE = "reference"
IMPORTS = """
import hashlib, importlib.util, sys
from pathlib import Path
from types import ModuleType
"""
ERRORS = ("MugraphError", "LaunchError")


def problem_of(program: Program) -> str | None:
    """Why there is no operator for a program, or None."""
    if not program.inputs:
        return "it has no inputs, and operators are found by those"
    if overwritten := [o.alias_of for o in program.outputs if o.alias_of is not None]:
        return f"it writes into {overwritten[0]}, and operators return new tensors"
    return None


def check_operable(program: Program) -> None:
    """Raises UnsupportedOpError where there is no operator for a program."""
    if problem := problem_of(program):
        raise UnsupportedOpError(f"{program.name} is no operator: {problem}", remedy="call the result itself")


def digest_of(program: Program, source: str) -> str:
    """A hash of all code that the operator of a program with this emitted source runs."""
    parts = [json.dumps(signature_of(program), sort_keys=True), source, torch_code.emit(program, REFERENCE)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def operator_of(program: Program, source: str, run: object, everywhere: bool) -> Operator:
    """The operator that `register.py` of the same program and source defines, with a function that runs the source.
    `everywhere`: on a CPU too, where otherwise the program as PyTorch code runs."""
    reference = load_module(torch_code.emit(program, REFERENCE), f"{program.name}_{REFERENCE}").reference
    assert callable(run)
    return Operator(signature_of(program), digest_of(program, source), run, reference, everywhere)


def register_text(program: Program, source: str, everywhere: bool) -> str:
    """The text of `register.py` for a program and its emitted source, kernel.py."""
    signature, digest = signature_of(program), digest_of(program, source)
    own = ast.parse(text := files("mugraph.runtime").joinpath("custom_op.py").read_text(encoding="utf-8"))
    imports = [n for n in own.body if isinstance(n, ast.Import | ast.ImportFrom)]
    body = "\n".join(text.splitlines()[max(n.end_lineno or 0 for n in imports) :]).strip("\n")
    errors = chosen_classes(files("mugraph").joinpath("errors.py").read_text(encoding="utf-8"), ERRORS)
    head = HEAD.format(
        program=program.name,
        name=Operator(signature, digest, print, print).name,
        namespace=NAMESPACE,
        arguments=", ".join(i.name for i in program.inputs),
        inputs=shapes_text([i.tensor for i in program.inputs]),
        outputs=shapes_text([program.tensors()[o.value] for o in program.outputs]),
        elsewhere="" if everywhere else ", on a CPU the program as PyTorch code, `reference` below",
    )
    tail = TAIL.format(
        signature=literal(signature),
        digest=digest,
        kernel=hashlib.sha256(source.encode()).hexdigest(),
        everywhere=everywhere,
    )
    pieces = [
        f"{head}\n\nfrom __future__ import annotations\n\n{joined_imports([*imports, *ast.parse(IMPORTS).body])}",
        f"Location = str  # `file.py:12: y = x @ w`\n\n\n{errors}",
        body,
        without_head(torch_code.emit(program, REFERENCE)),
        tail,
    ]
    return "\n\n\n".join(pieces)


def literal(data: Mapping[str, Any]) -> str:
    """Strings, numbers and lists of dictionaries, as Python, a line for each."""
    lines = ["{"]
    for name, value in data.items():
        if isinstance(value, list) and len(value) > 1:
            lines += [f'    "{name}": [', *(f"        {json.dumps(v, ensure_ascii=False)}," for v in value), "    ],"]
        else:
            lines.append(f'    "{name}": {json.dumps(value, ensure_ascii=False)},')
    return "\n".join([*lines, "}"])


def without_head(source: str) -> str:
    """An emitted file without its docstring and its import of torch."""
    first, second = ast.parse(source).body[:2]
    assert isinstance(first, ast.Expr)
    assert isinstance(second, ast.Import)
    return "\n".join(source.splitlines()[second.end_lineno :]).strip("\n")


HEAD = '''"""{program} as a PyTorch operator, torch.ops.{namespace}.{name}.

    import register

    y = register.op({arguments})
    differentiable = register.register(gradients=True)

takes {inputs}
gives {outputs}

On CUDA tensors kernel.py beside this file runs{elsewhere}.
torch.compile, torch.export and AOTInductor keep the operator whole.  It needs torch, and triton for its kernels.
"""'''
TAIL = '''# What callers see: sizes are numbers, or expressions of the symbolic sizes.
SIGNATURE = {signature}
DIGEST = "{digest}"
KERNEL_HASH = "{kernel}"
loaded: dict[str, ModuleType] = {{}}


def kernel() -> ModuleType:
    """kernel.py beside this file, loaded at the first call.  Raises LaunchError unless it is what was emitted."""
    if "kernel" not in loaded:
        file = Path(__file__).with_name("kernel.py")
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != KERNEL_HASH:
            problem = f"{{file}} is missing, or not the file that was emitted with {{Path(__file__).name}}"
            raise LaunchError(problem, op=OPERATOR.name, remedy="keep the two files together")
        name = f"mugraph_kernel_{{OPERATOR.name}}"
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded["kernel"] = module
    return loaded["kernel"]


def run(*tensors: torch.Tensor) -> Any:
    if not tensors[0].is_cuda:
        return kernel().run(*tensors)
    with torch.cuda.device(tensors[0].device):  # kernels are launched on the current device
        return kernel().run(*tensors)


OPERATOR = Operator(SIGNATURE, DIGEST, run, reference, everywhere={everywhere})
register = OPERATOR.register
op = register()
'''
