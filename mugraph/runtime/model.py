"""Predicts what a compiled launch takes, to rank configurations of one kernel; only measuring tells the truth.

Where the search's model (`search/cost.py`) guesses from tiles, this one reads what the compiler made: registers and
shared memory say how many blocks an SM holds, the instructions of the main loop how busy its issue slots are.  Several
limits act at once, so their 4-norm is taken: a plain maximum cannot rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mugraph.codegen.plan import Call, Combined, Launch, Plan, Read, Write
from mugraph.ir.axes import Axis, representative
from mugraph.ir.types import Tensor
from mugraph.runtime.compile import Resources
from mugraph.search.cost import BLOCK_SHARED, DRAIN_SECONDS, TRIP_CLOCKS, Device

NORM = 4
WARP = 32
REGISTER_UNIT = 256  # registers are given to warps in such portions
ISSUE_SLOTS = 4  # instructions that an SM issues in one clock
UNDER_WAY = 1.5  # stages of which the loads are waited for, or being issued
WAVE_SECONDS = 1e-6  # to drain one wave of blocks and fill the next


@dataclass(frozen=True)
class Traffic:
    """What a launch does, at its representative sizes.  `unique`: bytes of the buffers that it touches; `moved`: bytes
    that all blocks read and write; `stage`: bytes that one block loads in one iteration, all at once without a loop."""

    blocks: int
    trips: int
    unique: float
    moved: float
    stage: float


def occupancy(warps: int, found: Resources, d: Device) -> int:
    """Blocks that one SM holds at a time; 0 where none fits."""
    registers = math.ceil(max(found.registers, 1) * WARP / REGISTER_UNIT) * REGISTER_UNIT * warps
    return min(
        d.registers_per_sm // registers,
        d.shared_bytes_per_sm // (found.shared_bytes + BLOCK_SHARED),
        d.threads_per_sm // (WARP * warps),
        d.blocks_per_sm,
    )


def predicted_seconds(call: Call, plan: Plan, found: Resources, d: Device, symbolic: int = 16) -> float:
    """Seconds of one launch, symbolic sizes being `symbolic`.

    Infinite where no block fits on an SM.  Formula: sum of fixed costs, the 4-norm of the
    limits, and what each further wave of blocks costs: nothing where blocks are persistent."""
    warps = call.options.num_warps or 1
    stages = call.options.num_stages or 1
    held = occupancy(warps, found, d)
    if not held:
        return math.inf
    persistent = call.options.persistent if isinstance(call, Launch) else 0
    held = min(held, persistent) if persistent else held
    launches = call.launches
    each = [traffic(x, plan, symbolic) for x in launches]
    blocks = each[0].blocks if isinstance(call, Combined) else sum(t.blocks for t in each)
    unique, moved = sum(t.unique for t in each), sum(t.moved for t in each)
    trips, stage = max(t.trips for t in each), max(t.stage for t in each)
    resident = min(blocks, d.sms * held)
    memory = sum(fetched(x, plan, resident, symbolic) for x in launches) if unique > d.l2_bytes else unique
    rounds, waves = math.ceil(blocks / d.sms), math.ceil(blocks / (d.sms * held))
    in_flight = resident * max(stages - UNDER_WAY, 0.5) * stage if trips else resident * stage
    limits = (
        memory / d.bandwidth,
        moved * d.load_latency_seconds / max(in_flight, 1.0),
        moved / d.l2_bytes_per_second,
        moved / (min(d.sms, blocks) * d.sm_bytes_per_second),
        rounds * trips * found.loop_instructions / call.options.unroll * warps / ISSUE_SLOTS / d.clock_hz,
        waves * trips * TRIP_CLOCKS / d.clock_hz,
    )
    streaming: float = math.fsum(x**NORM for x in limits) ** (1 / NORM)
    further = 0 if persistent else waves - 1  # blocks that stay give way to none
    return d.launch_seconds + d.fill_seconds + streaming + DRAIN_SECONDS + further * WAVE_SECONDS


def traffic(launch: Launch, plan: Plan, symbolic: int = 16) -> Traffic:
    """Counts of a launch, from its plan."""

    def size_of(t: Tensor, held: Mapping[str, int]) -> float:
        return math.prod(held.get(a.name, representative(a.size, symbolic)) for a in t.axes) * t.dtype.bits / 8

    blocks = math.prod(count for _, count in digits(launch, symbolic))
    trips, moved, stage, whole = 0, 0.0, 0.0, 0.0
    for scope in launch.scopes:
        times = 1
        if scope.loop:
            e = scope.extent(scope.loop)
            parts = launch.split[1] if launch.split and launch.split[0] == scope.loop else 1
            times = math.ceil(representative(e.axis.size, symbolic) / (e.tile * parts))
            trips += times
        held = {e.axis.name: e.tile for e in scope.extents if e.role != "whole"}
        for actions, count in ((scope.before, 1), (scope.body, times)):
            loaded = sum(size_of(a.value, held) for a in actions if isinstance(a, Read))
            stored = sum(size_of(a.value, held) for a in actions if isinstance(a, Write))
            moved += blocks * count * (loaded + stored)
            if scope.loop and actions is scope.body:
                stage = max(stage, loaded)
            else:
                whole += loaded
    unique = sum(size_of(plan.buffer(name).tensor, {}) for name in touched_by(launch))
    return Traffic(blocks, trips, min(unique, moved), moved, stage if trips else whole)


def digits(launch: Launch, symbolic: int = 16) -> list[tuple[str, int]]:
    """What a program id is made of, the fastest first: a grid axis, or the split one, and a count."""
    counts = {e.axis.name: math.ceil(representative(e.axis.size, symbolic) / e.tile) for e in launch.parallel()}
    found = list(counts.items())
    axis, group = launch.grouped()
    if axis:
        found[:2] = [(axis, group), found[0], (axis, math.ceil(counts[axis] / group))]
    return [*found, *([launch.split] if launch.split else [])]


def fetched(launch: Launch, plan: Plan, resident: int, symbolic: int = 16) -> float:
    """Bytes that come from memory where L2 does not hold all: of each buffer, for each wave of resident blocks, those
    that they touch together."""
    found = digits(launch, symbolic)
    tiles = {e.axis.name: e.tile for e in launch.parallel()}
    together: dict[str, int] = {}
    left = resident
    for axis, count in found:
        together[axis] = together.get(axis, 1) * min(count, left)
        left = math.ceil(left / count)

    def touched(a: Axis) -> int:
        size = representative(a.size, symbolic)
        if launch.split and a.name == launch.split[0]:
            return math.ceil(size * together[a.name] / launch.split[1])
        return min(size, together[a.name] * tiles[a.name]) if a.name in tiles else size

    waves = math.prod(count for _, count in found) / resident
    total = 0.0
    for t in (plan.buffer(name).tensor for name in touched_by(launch)):
        whole = math.prod(representative(a.size, symbolic) for a in t.axes)
        total += max(whole, waves * math.prod(map(touched, t.axes))) * t.dtype.bits / 8
    return total


def touched_by(launch: Launch) -> tuple[str, ...]:
    """Buffers read or written."""
    return tuple(dict.fromkeys([*launch.sources(), *(w.target for w in launch.writes())]))
