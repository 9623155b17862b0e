"""Measures the present device and fits a description of it, which the search then predicts with.

    probe = present_device()              # raises UnknownTargetError without one
    device, checks = calibrate(probe, date)
    store(device)

A probe runs small kernels and returns seconds, each the median of samples that are taken inside CUDA graphs.  What is
measured replaces the figures of the data file that fits the device best; what is not stays, with its source.
Efficiencies are fitted through the cost model itself: the one at which it predicts what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mugraph.errors import CacheError, UnknownTargetError
from mugraph.ir.types import DType
from mugraph.runtime.files import write_whole
from mugraph.search.cost import (
    DRAIN_SECONDS,
    GPU,
    SCHEMA_VERSION,
    Device,
    Product,
    Read,
    Work,
    calibration_directory,
    predict,
    predict_attention,
    predict_matmul,
    sheet_devices,
    slug,
)  # fmt: skip

FLOATS = (DType.f16, DType.bf16, DType.f32, DType.f8e4m3)
LARGE = 8192
SMALL_ROWS = (1, 16, 64)
TILE = (128, 128, 64)  # of the generated matmul
ATTENTION = (32, 4096, 4096, 128)  # heads, queries, keys, depth
COPY_BYTES = 1 << 30
CHASES = (1_000, 5_000)  # dependent loads
BLOCKS_PER_SM = 64  # of the larger empty launch


class Probe(Protocol):
    """A device that can be measured.  All times are seconds of one call."""

    name: str
    arch: int
    sms: int
    l2_bytes: int

    def copy(self, size: int) -> float:
        """Reading and writing `size` bytes each."""

    def read(self, size: int, rounds: int) -> float:
        """Reading the same `size` bytes `rounds` times, by other blocks each time."""

    def empty(self, blocks: int) -> float:
        """A launch that does nothing, node to node in a CUDA graph."""

    def touch(self) -> float:
        """A launch of one block on each SM that loads a few bytes and stores them."""

    def chase(self, steps: int) -> float:
        """One thread that loads from where the last load says, all over a buffer larger than L2."""

    def matmul(self, m: int, n: int, k: int, dtype: DType) -> float | None:
        """The library's [m, k] x [k, n]; None where it has none for the type."""

    def generated(self, size: int) -> float:
        """A generated f16 matmul of that size, with tiles `TILE`."""

    def attention(self, heads: int, rows: int, keys: int, depth: int) -> float:
        """The library's attention in f16."""


@dataclass(frozen=True)
class Check:
    """A call that was measured, and what the fitted description predicts for it.  Seconds."""

    what: str
    measured: float
    predicted: float


def calibrate(
    probe: Probe, date: str, say: Callable[[str], None] = lambda text: None
) -> tuple[Device, tuple[Check, ...]]:
    """The description of the probed device.  `date` goes into its sources."""
    base_key, base, same = _base(probe)
    figures: dict[str, Any] = {}

    def measured(key: str, value: float) -> None:
        if 0 < value < math.inf:  # a difference of two times may drown in noise
            figures[key] = value

    say("bandwidth")
    bandwidth = 2 * COPY_BYTES / probe.copy(COPY_BYTES)
    sheet = base.dram_bytes_per_second if same else bandwidth / base.dram_efficiency
    measured("dram_bytes_per_second", max(sheet, bandwidth))
    measured("dram_efficiency", bandwidth / figures["dram_bytes_per_second"])
    inside = probe.l2_bytes // 4
    once, often = probe.read(inside, 4), probe.read(inside, 20)
    measured("l2_bytes_per_second", 16 * inside / max(often - once, 1e-12))
    say("launches")
    empty = probe.empty(1)
    measured("launch_seconds", empty - DRAIN_SECONDS)
    full = probe.empty(probe.sms * BLOCKS_PER_SM) - probe.empty(probe.sms)
    measured("block_seconds", full / (BLOCKS_PER_SM - 1))
    measured("fill_seconds", probe.touch() - empty)
    short, long = (probe.chase(n) for n in CHASES)
    measured("load_latency_seconds", (long - short) / (CHASES[1] - CHASES[0]))
    say("matmuls")
    times = {
        (m, dtype): seconds
        for dtype in FLOATS
        for m in (LARGE, *SMALL_ROWS)
        if (seconds := probe.matmul(m, LARGE, LARGE, dtype)) is not None
    }
    rates = dict(base.tensor_flops)
    for dtype in FLOATS:
        if (LARGE, dtype) in times:
            rate = 2 * LARGE**3 / times[LARGE, dtype]
            rates[dtype.value] = max(rate, base.matmul_rate(dtype) if same else rate / base.library_efficiency)
    figures["tensor_flops"] = rates
    figures |= {"sms": probe.sms, "arch": probe.arch, "l2_bytes": probe.l2_bytes}
    by = f"measured by mugraph calibrate on {probe.name}, {date}"
    sources = dict(base.sources) | dict.fromkeys((k for k in figures if k in base.sources), by)
    if same:
        sources["dram_bytes_per_second"] = base.sources["dram_bytes_per_second"]
        sources["tensor_flops"] = base.sources["tensor_flops"]
    d = replace(base, name=probe.name, base=base_key, calibrated=date, sources=sources, **figures)
    d = _fitted(d, "library_efficiency", times[LARGE, DType.f16], lambda d: _matmul(d, LARGE, DType.f16))
    say("generated kernels")
    generated = probe.generated(LARGE)
    d = _fitted(d, "tensor_efficiency", generated, lambda d: predict(generated_work(LARGE), d).seconds)
    say("attention")
    attention = probe.attention(*ATTENTION)
    d = _fitted(d, "attention_efficiency", attention, _attention)
    fitted = ("library_efficiency", "tensor_efficiency", "attention_efficiency")
    d = replace(d, sources={**d.sources, **dict.fromkeys(fitted, by)})
    checks = [Check(f"matmul {m}x{LARGE}x{LARGE} {t}", s, _matmul(d, m, t)) for (m, t), s in times.items()]
    checks.append(Check(f"generated matmul {LARGE}", generated, predict(generated_work(LARGE), d).seconds))
    checks.append(Check("attention " + "x".join(map(str, ATTENTION)), attention, _attention(d)))
    return d, tuple(checks)


def _base(probe: Probe) -> tuple[str, Device, bool]:
    """The data file that fits the device best, and whether it is a description of this very device."""
    known = {key: d for key, d in sheet_devices().items() if d.kind == GPU}
    here = slug(probe.name)
    named = [k for k in known if k.split("-")[0] in here and known[k].sms == probe.sms]
    named.sort(key=lambda k: (not all(part in here for part in k.split("-")), k))
    if named:
        exact = [k for k in named if all(part in here for part in k.split("-"))]
        key = max(exact, key=len) if exact else named[0]
        return key, known[key], True
    key = min(known, key=lambda k: (abs(known[k].arch - probe.arch), k))
    return key, known[key], False


def _matmul(d: Device, m: int, dtype: DType) -> float:
    unique = (m * LARGE * 2 + LARGE * LARGE) * dtype.bits / 8
    return predict_matmul(1, m, LARGE, LARGE, unique, dtype, d).seconds


def _attention(d: Device) -> float:
    heads, rows, keys, depth = ATTENTION
    unique = 2 * heads * (rows + keys) * depth * 2.0
    return predict_attention(heads, rows, keys, depth, depth, unique, DType.f16, d).seconds


def generated_work(size: int) -> Work:
    """What `Probe.generated` does, for the cost model."""
    m, n, k = TILE
    along = math.ceil(size / m), math.ceil(size / n)
    whole = size * size * 2.0
    reads = (
        Read(0, whole, ((along[0], True), (along[1], False))),
        Read(1, whole, ((along[0], False), (along[1], True))),
    )
    return Work(
        blocks=math.prod(along),
        trips=math.ceil(size / k),
        reads=reads,
        written=whole,
        writing=1.0,
        stage=(m + n) * k * 2.0,
        resident=0.0,
        partial=0.0,
        products=(Product(float(size) ** 3, m, n, DType.f16),),
        vector=0.0,
        accumulators=m * n,
        depth=1 + k // 16,
    )


def _fitted(d: Device, key: str, seconds: float, predicted: Callable[[Device], float]) -> Device:
    """The device with the efficiency at which the model predicts the measured time: by bisection, as predictions fall
    with efficiency."""

    def at(efficiency: float) -> Device:
        changes: dict[str, Any] = {key: efficiency}
        return replace(d, **changes)

    low, high = 0.01, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if predicted(at(middle)) > seconds else (low, middle)
    return at(round((low + high) / 2, 6))


def store(d: Device) -> Path:
    """Writes the description where `cost.device` looks first; the file.  Raises CacheError where that fails."""
    place = calibration_directory() / f"{slug(d.name)}.json"
    try:
        write_whole(place, description(d))
    except OSError as error:
        raise CacheError(
            f"cannot write {place}: {error.strerror or error}", remedy="set MUGRAPH_CACHE_DIR to a directory of yours"
        ) from error
    return place


def description(d: Device) -> str:
    """The device as JSON text, in the schema of the data files."""
    return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(d)}, indent=2, ensure_ascii=False) + "\n"


# -- the present device

KERNELS = '''"""Kernels that measure a device."""

import triton
import triton.language as tl


@triton.jit
def empty(X, BLOCKS):
    if tl.program_id(0) >= BLOCKS:  # none is
        tl.store(X, 0.0)


@triton.jit
def touch(X, Y, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(Y + i, tl.load(X + i) + 1.0)


@triton.jit
def read(X, Y, BLOCKS, ROUNDS, SIZE: tl.constexpr):
    pid = tl.program_id(0)
    total = tl.zeros((SIZE,), tl.float32)
    for r in range(ROUNDS):
        block = (pid + r * 7919) % BLOCKS
        total += tl.load(X + block * SIZE + tl.arange(0, SIZE))
    tl.store(Y + pid, tl.sum(total, 0))


@triton.jit
def chase(X, Y, STEPS):
    i = tl.load(X)
    for _ in range(STEPS):
        i = tl.load(X + i)
    tl.store(Y, i)


@triton.jit
def matmul(A, B, C, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0) % tl.cdiv(N, BM) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) // tl.cdiv(N, BM) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, N, BK):
        ks = k + tl.arange(0, BK)
        a = tl.load(A + rows[:, None] * N + ks[None, :])
        b = tl.load(B + ks[:, None] * N + columns[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + rows[:, None] * N + columns[None, :], total.to(tl.float16))
'''

READ_SIZE = 2048  # elements of a block of `read`
TOUCH_SIZE = 256


class TorchProbe:
    """The current CUDA device (or, for tests of the kernels under the Triton interpreter, the CPU)."""

    def __init__(self, index: int = 0, where: str = "cuda", repeats: int = 20) -> None:
        import torch

        from mugraph.runtime.load import load_module

        self.torch: Any = torch
        self.where = f"{where}:{index}" if where == "cuda" else where
        self.repeats = repeats
        self.kernels: Any = load_module(KERNELS, "mugraph_probes")
        self.name, self.arch, self.sms, self.l2_bytes = "cpu", 80, 2, 1 << 20
        if where == "cuda":
            torch.cuda.set_device(index)
            found: Any = torch.cuda.get_device_properties(index)
            self.name, self.sms = found.name, found.multi_processor_count
            self.arch = 10 * found.major + found.minor
            self.l2_bytes = getattr(found, "L2_cache_size", 0) or 40_000_000

    def seconds(self, call: Callable[[], object], repeats: int | None = None) -> float:
        from mugraph.runtime.bench import measure

        device = self.where.split(":")[0]
        return measure({"call": call}, repeats or self.repeats, device=device).seconds("call").median

    def zeros(self, *shape: int, dtype: str = "float32") -> Any:
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device=self.where)

    def random(self, *shape: int) -> Any:
        return self.torch.randn(shape, device=self.where, dtype=self.torch.float16)

    def copy(self, size: int) -> float:
        source, target = self.zeros(size // 4), self.zeros(size // 4)
        return self.seconds(lambda: target.copy_(source))

    def read(self, size: int, rounds: int) -> float:
        blocks = max(1, size // 4 // READ_SIZE)
        x, y = self.zeros(blocks * READ_SIZE), self.zeros(blocks)
        return self.seconds(lambda: self.kernels.read[(blocks,)](x, y, blocks, rounds, READ_SIZE))

    def empty(self, blocks: int) -> float:
        x = self.zeros(1)
        return self.seconds(lambda: self.kernels.empty[(blocks,)](x, blocks))

    def touch(self) -> float:
        x, y = self.zeros(self.sms * TOUCH_SIZE), self.zeros(self.sms * TOUCH_SIZE)
        return self.seconds(lambda: self.kernels.touch[(self.sms,)](x, y, TOUCH_SIZE))

    def chase(self, steps: int) -> float:
        n = max(64, 4 * self.l2_bytes // 8)
        generator = self.torch.Generator(device="cpu").manual_seed(0)
        order = self.torch.randperm(n, generator=generator)
        links = self.torch.empty(n, dtype=self.torch.int64)
        links[order] = order.roll(-1)
        x, y = links.to(self.where), self.zeros(1, dtype="int64")
        return self.seconds(lambda: self.kernels.chase[(1,)](x, y, steps, num_warps=1))

    def matmul(self, m: int, n: int, k: int, dtype: DType) -> float | None:
        torch = self.torch
        a, b = self.random(m, k), self.random(n, k)
        if dtype is DType.f8e4m3:
            if m % 16 or self.arch < 89:
                return None
            one = torch.ones((), device=self.where)
            a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
            return self.seconds(lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.float16))
        kind = {DType.f16: torch.float16, DType.bf16: torch.bfloat16, DType.f32: torch.float32}[dtype]
        a, b = a.to(kind), b.to(kind)
        return self.seconds(lambda: a @ b.T)

    def generated(self, size: int) -> float:
        a, b = self.random(size, size), self.random(size, size)
        c = self.zeros(size, size, dtype="float16")
        m, n, k = (min(t, size) for t in TILE)
        grid = (math.ceil(size / m) * math.ceil(size / n),)
        return self.seconds(lambda: self.kernels.matmul[grid](a, b, c, size, m, n, k, num_warps=8, num_stages=3))

    def attention(self, heads: int, rows: int, keys: int, depth: int) -> float:
        q, k, v = (
            self.random(1, heads, rows, depth),
            self.random(1, heads, keys, depth),
            self.random(1, heads, keys, depth),
        )
        return self.seconds(lambda: self.torch.nn.functional.scaled_dot_product_attention(q, k, v))


def present_device(index: int = 0) -> Probe:
    """The CUDA device of that number.  Raises UnknownTargetError where there is none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not 0 <= index < count:
        raise UnknownTargetError(
            f"there is no CUDA device {index} to measure" if count else "there is no CUDA device to measure",
            op="calibrate",
            remedy=f"name one of the {count} devices"
            if count
            else "run it on a machine with one; until then the data sheets count",
        )
    return TorchProbe(index)
