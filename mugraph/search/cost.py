"""What a kernel costs: a roofline over a device description, with the fixed costs that decide small kernels.

Several limits act at once, so the time of the streaming part is the 4-norm of the single times: near a plain maximum
when one limit dominates, above it when two are close.  Every figure is in seconds, bytes and operations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from mugraph.errors import UnknownTargetError
from mugraph.ir.types import DType


@dataclass(frozen=True)
class Device:
    """A GPU, from a data file beside this module.  `sources` says where each figure comes from."""

    name: str
    arch: int
    sms: int
    clock_hz: float
    dram_bytes_per_second: float
    dram_efficiency: float
    l2_bytes_per_second: float
    sm_bytes_per_second: float
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    registers_per_sm: int
    tensor_flops: Mapping[str, float]
    vector_flops: float
    tensor_efficiency: float
    library_efficiency: float
    launch_seconds: float
    fill_seconds: float
    block_seconds: float
    load_latency_seconds: float
    sources: Mapping[str, str]

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a streaming kernel reaches."""
        return self.dram_bytes_per_second * self.dram_efficiency

    def matmul_rate(self, dtype: DType) -> float:
        """Dense multiply-add operations per second, as the data sheet counts them."""
        return self.tensor_flops.get(dtype.value, self.vector_flops)


@lru_cache
def device(name: str = "h100") -> Device:
    """The description of a device, by file name ("h100") or architecture ("90").  Raises UnknownTargetError."""
    found = {}
    for path in sorted(files("mugraph.search").joinpath("devices").iterdir(), key=lambda p: p.name):
        if path.name.endswith(".json"):
            data = json.loads(path.read_text())
            data.pop("schema_version")
            found[path.name.removesuffix(".json")] = Device(**data)
    for key, d in found.items():
        if name.lower() in (key, str(d.arch)):
            return d
    raise UnknownTargetError(f"there is no device {name!r}", remedy=f"known: {', '.join(found)}")


@dataclass(frozen=True)
class Work:
    """What one launch does.  Bytes: `unique` counts each tensor once, `traffic` as often as blocks read it, `stage`
    is one loop iteration of one block, `resident` what a block loads outside loops."""

    blocks: int
    trips: int
    unique: float
    traffic: float
    stage: float
    resident: float
    partial: float
    tensor_flops: float
    vector_flops: float
    accumulators: float
    depth: int
    dtype: DType


@dataclass(frozen=True)
class Prediction:
    """Seconds, and the terms that they come from."""

    seconds: float
    terms: tuple[tuple[str, float], ...]
    unique_bytes: float
    flops: float

    @property
    def bound(self) -> str:
        """The term that binds."""
        return max(self.terms, key=lambda t: t[1])[0]


STAGES = 3


def predict(work: Work, d: Device) -> Prediction:
    """The time of one launch (two when it has partial results, whose combine is counted here)."""
    shared = max(STAGES * work.stage + work.resident, 1.0)
    registers = max(work.accumulators, 1.0) * 1.5 + 32 * 128
    per_sm = max(1, min(16, int(d.shared_bytes_per_sm // (shared + 1024)), int(d.registers_per_sm // registers)))
    resident = min(work.blocks, d.sms * per_sm)
    busy = min(1.0, work.blocks / d.sms)
    waves = math.ceil(work.blocks / (d.sms * per_sm))
    in_flight = resident * ((STAGES - 1.5) * work.stage if work.stage else work.resident)
    terms = (
        ("dram", work.unique / d.bandwidth),
        ("latency", work.traffic * d.load_latency_seconds / max(in_flight, 1.0)),
        ("l2", (work.traffic + work.partial) / d.l2_bytes_per_second),
        ("sm", work.traffic / (min(d.sms, work.blocks) * d.sm_bytes_per_second)),
        ("tensor", work.tensor_flops / (d.matmul_rate(work.dtype) * d.tensor_efficiency * busy)),
        ("vector", work.vector_flops / (d.vector_flops * 0.5 * busy)),
        ("chain", work.trips * (180 + 30 * work.depth) / d.clock_hz),
    )
    stream = sum(t**4 for _, t in terms) ** 0.25
    started = work.blocks / d.sms * d.block_seconds
    fixed = d.launch_seconds + d.fill_seconds + 0.2e-6 + (waves - 1) * 1.0e-6 + started
    combine = d.launch_seconds + 0.5e-6 + work.partial / d.l2_bytes_per_second if work.partial else 0.0
    return Prediction(
        fixed + stream + combine,
        (*terms, ("fixed", fixed), ("combine", combine)),
        work.unique,
        work.tensor_flops + work.vector_flops,
    )


def predict_library(unique: float, flops: float, dtype: DType, d: Device) -> Prediction:
    """The time of a library matmul, einsum or elementwise call."""
    terms = (
        ("dram", unique / d.bandwidth),
        ("tensor", flops / (d.matmul_rate(dtype) * d.library_efficiency)),
    )
    fixed = d.launch_seconds + d.fill_seconds + 0.2e-6
    return Prediction(fixed + sum(t**4 for _, t in terms) ** 0.25, (*terms, ("fixed", fixed)), unique, flops)


def floor_seconds(io_bytes: float, flops: float, dtype: DType, d: Device) -> float:
    """No kernel is faster: bytes that must move over the sheet bandwidth, or operations over the sheet rate."""
    return max(io_bytes / d.dram_bytes_per_second, flops / d.matmul_rate(dtype))
