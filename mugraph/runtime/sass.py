"""Reads disassembled kernels (`nvdisasm -c`): what is in their loops, and what instructions they use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", re.MULTILINE)
LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)
TARGET = re.compile(r"`\((\.L_\w+)\)")
MATRIX = ("HMMA", "IMMA", "QMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
LOADS = ("LDG.", "LDGSTS", "UTMALDG")
SPILLS = ("LDL", "STL")  # local memory


@dataclass(frozen=True)
class Instruction:
    """At an address, perhaps under a predicate; `target` is the address that it branches to."""

    address: int
    opcode: str
    predicated: bool
    target: int | None = None


def instructions(text: str) -> list[Instruction]:
    found: list[tuple[int, re.Match[str]]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for match in re.finditer(f"{LINE.pattern}|{LABEL.pattern}", text, re.MULTILINE):
        if label := match.group(5):
            waiting.append(label)
            continue
        address = int(match.group(1), 16)
        labels.update(dict.fromkeys(waiting, address))
        waiting.clear()
        found.append((address, match))
    result = []
    for address, match in found:
        target = TARGET.search(match.group(4)) if match.group(3).startswith("BRA") else None
        result.append(
            Instruction(
                address,
                match.group(3),
                match.group(2) is not None,
                labels.get(target.group(1)) if target else None,
            )
        )
    return result


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each loop.  Waits on a barrier are laid out behind the end of a kernel and branch back
    to its middle: what has the kernel's end inside is no loop."""
    ends = [i.address for i in code if i.opcode == "EXIT" and not i.predicated]
    found = [(i.target, i.address) for i in code if i.target is not None and i.target < i.address]
    return [(low, high) for low, high in found if not any(low <= e <= high for e in ends)]


SHARE = 0.9  # of the work that a kernel's main loop does


def main_loop(code: Sequence[Instruction], around: Sequence[tuple[int, int]]) -> int:
    """Instructions of the smallest loop that holds most of the matrix multiplies in loops, or where there are none, of
    the loads from global memory; 0 without such a loop."""
    for words in (MATRIX, LOADS):
        places = [i.address for i in code if i.opcode.startswith(words)]
        places = [a for a in places if any(low <= a <= high for low, high in around)]
        if places:
            held = {loop: sum(loop[0] <= a <= loop[1] for a in places) for loop in around}
            low, high = min((x for x in around if held[x] >= SHARE * max(held.values())), key=lambda x: x[1] - x[0])
            return sum(low <= i.address <= high for i in code)
    return 0


def read_code(text: str) -> dict[str, int]:
    """Counts of instructions: spills in loops and outside, global loads of 16 bytes and of less, matrix multiplies,
    all of the main loop."""
    code = instructions(text)
    around = loops(code)
    spills = [i for i in code if i.opcode.startswith(SPILLS)]
    inside = [i for i in spills if any(low <= i.address <= high for low, high in around)]
    loads = [i for i in code if i.opcode.startswith(LOADS)]
    wide = [i for i in loads if ".128" in i.opcode or i.opcode.startswith("UTMALDG")]
    return {
        "spills": len(inside),
        "spills_outside": len(spills) - len(inside),
        "wide_loads": len(wide),
        "narrow_loads": len(loads) - len(wide),
        "matrix_ops": sum(i.opcode.startswith(MATRIX) for i in code),
        "loop_instructions": main_loop(code, around),
    }
