"""What a launch costs: the limits of a device that act on it, and the fixed costs that decide small kernels.

Several limits act at once, so the time of the streaming part is the 4-norm of the single times: near a plain maximum
when one limit dominates, above it when two are close.  Figures are in seconds, bytes and operations.

Blocks run in *waves*: as many at once as shared memory, registers and threads leave room for.  What only one SM does
(arithmetic, shared memory, its share of the path to L2) ends when the SM with the most blocks ends, so it pays for
ceil(blocks / SMs) rounds; what a block waits for (loads, loop iterations) it waits for in each wave.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache, reduce
from importlib.resources import files
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np

from mugraph import settings
from mugraph.errors import CacheWarning, UnknownTargetError
from mugraph.ir.types import DType, Tensor

SCHEMA_VERSION = 2
STAGES = 3  # loop iterations whose loads are in flight
TRIP_CLOCKS, STEP_CLOCKS = 180, 30  # one loop iteration, and each matrix instruction in sequence in it
LEAST_SIDE = 16  # rows and columns that a matrix instruction works on at least
L2_SHARE = 0.75  # of L2 that holds what the kernel reads again; the rest is streamed through
VECTOR_WEIGHT = 4  # operations that one elementwise step is counted as
DRAIN_SECONDS = 0.2e-6  # from the last store to the end of the launch
BLOCK_SHARED = 1024  # bytes of shared memory that the system keeps for each block
THREAD_REGISTERS = 32  # addresses and counters
ACCUMULATOR_REGISTERS = 1.5  # an accumulator and its share of operands
STREAMED = 2048  # bytes in flight of a block that loads nothing into tiles

GPU, CPU = "gpu", "cpu"

Amount = Any  # a number, or an array with one for each way to cut a kernel


@dataclass(frozen=True)
class Device:
    """A GPU, from a data file beside this module or from `mugraph calibrate`.  `sources` says where each figure comes
    from.

    kind                "gpu", or "cpu": a program is calls of PyTorch there, and of the figures only the bandwidth, the
                        rate of matmuls and what a call costs count
    tensor_rows         rows of a tile from which on matrix instructions reach their rate
    small_tile_share    the share of it that a smaller tile reaches
    attention_efficiency  the share of it that the library's attention reaches
    base, calibrated    for a measured description: the data file that it refines, and the date
    """

    name: str
    arch: int
    sms: int
    clock_hz: float
    dram_bytes_per_second: float
    dram_efficiency: float
    l2_bytes: float
    l2_bytes_per_second: float
    sm_bytes_per_second: float
    shared_bytes_per_clock: float
    shared_bytes_per_block: int
    shared_bytes_per_sm: int
    registers_per_sm: int
    threads_per_sm: int
    blocks_per_sm: int
    tensor_flops: Mapping[str, float]
    tensor_efficiency: float
    tensor_rows: int
    small_tile_share: float
    vector_flops: float
    vector_efficiency: float
    library_efficiency: float
    attention_efficiency: float
    launch_seconds: float
    fill_seconds: float
    block_seconds: float
    load_latency_seconds: float
    sources: Mapping[str, str]
    base: str = ""
    calibrated: str = ""
    kind: str = GPU

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a streaming kernel reaches."""
        return self.dram_bytes_per_second * self.dram_efficiency

    @property
    def label(self) -> str:
        """The name, and whether its figures were measured."""
        return f"{self.name}, calibrated {self.calibrated}" if self.calibrated else f"{self.name}, not calibrated"

    @cached_property
    def digest(self) -> str:
        """What tells one description from another, whatever their names."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def matmul_rate(self, dtype: DType) -> float:
        """Dense multiply-add operations per second, as the data sheet counts them."""
        return self.tensor_flops.get(dtype.value, self.vector_flops)

    def on_tensor_cores(self, dtype: DType) -> bool:
        return self.matmul_rate(dtype) > self.vector_flops

    def tile_share(self, rows: Amount, columns: Amount) -> Amount:
        """The share of the tensor rate that a tile reaches: instructions of `tensor_rows` rows on the longer side
        (operands may change places), or small ones."""
        reached = np.minimum(1.0, np.maximum(rows, columns) / self.tensor_rows)
        return np.where(reached >= 1.0, 1.0, np.maximum(self.small_tile_share, reached))


# -- descriptions


def device(name: str = "h100") -> Device:
    """The description of a device, by file name ("h100") or architecture ("90"): a calibrated one first, unless the
    setting `calibration` is off.  Raises UnknownTargetError."""
    wanted = name.lower()
    if settings.calibration.get():
        for key, d in calibrated_devices().items():
            if wanted in (key, d.base, str(d.arch)):
                return d
    known = sheet_devices()
    for key, d in known.items():
        if wanted in (key, str(d.arch)):
            return d
    raise UnknownTargetError(f"there is no device {name!r}", remedy=f"known: {', '.join(known)}")


@lru_cache
def sheet_devices() -> Mapping[str, Device]:
    """The descriptions beside this module, by file name."""
    place = files("mugraph.search").joinpath("devices")
    paths = {p.name.removesuffix(".json"): p for p in place.iterdir() if p.name.endswith(".json")}
    return {key: device_of(json.loads(p.read_text(encoding="utf-8"))) for key, p in sorted(paths.items())}


def calibration_directory() -> Path:
    """Where `mugraph calibrate` keeps what it measured."""
    return settings.cache_dir.get() / "devices"


def calibrated_devices() -> dict[str, Device]:
    """What `mugraph calibrate` stored, by file name.  A file that is no description is ignored with a CacheWarning."""
    found = {}
    for path in sorted(calibration_directory().glob("[!.]*.json")):
        try:
            found[path.stem] = device_of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            warnings.warn(
                f"the calibrated device description {path} is ignored: {error}; "
                "run `mugraph calibrate` again, or remove the file",
                CacheWarning,
                stacklevel=3,
            )
    return found


_TEXTS = ("name", "base", "calibrated", "kind")


def device_of(data: Any) -> Device:
    """A description from JSON data.  Raises ValueError with what is wrong."""
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"its schema_version is {data.get('schema_version')!r}, not {SCHEMA_VERSION}")
    values = {k: v for k, v in data.items() if k != "schema_version"}
    known = {f.name for f in fields(Device)}
    if odd := sorted(values.keys() - known) or sorted(known - {"base", "calibrated", "kind"} - values.keys()):
        raise ValueError(f"{'it lacks' if odd[0] in known else 'there is no figure'} {odd[0]!r}")
    for key in _TEXTS:
        if not isinstance(values.get(key, ""), str):
            raise ValueError(f"{key} is {values[key]!r}, not a text")
    rates, sources = values["tensor_flops"], values["sources"]
    if not isinstance(rates, dict) or not isinstance(sources, dict):
        raise ValueError("tensor_flops and sources are objects")
    figures = {k: v for k, v in values.items() if k not in (*_TEXTS, "tensor_flops", "sources")}
    for key, value in (figures | rates).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{key} is {value!r}, not a positive number")
    return Device(**values)


def slug(name: str) -> str:
    """A device's name as a file name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


# -- what a launch does


@dataclass(frozen=True)
class Read:
    """A load of the tensor `source`, `bytes` long.  `grid`: the blocks along each grid axis, the fastest first, and
    whether they read different parts.  `waste`: bytes that move for each that is wanted."""

    source: Amount
    bytes: Amount
    grid: tuple[tuple[Amount, Amount], ...]
    waste: Amount = 1.0

    @cached_property
    def copies(self) -> Amount:
        """How often blocks read each element."""
        return math.prod(np.where(cut, 1, n) for n, cut in self.grid)

    def share(self, of_blocks: Amount) -> Amount:
        """The share of the tensor that some of the blocks read together, if they are consecutive."""
        share: Amount = 1.0
        left = of_blocks * math.prod(n for n, _ in self.grid)
        for n, cut in self.grid:
            share = share * np.where(cut, np.minimum(n, left) / n, 1.0)
            left = np.maximum(1.0, left / n)
        return share


@dataclass(frozen=True)
class Product:
    """A contraction on tiles of rows x columns: `volume` multiply-adds by all blocks together."""

    volume: Amount
    rows: Amount
    columns: Amount
    dtype: DType

    @cached_property
    def padded(self) -> Amount:
        """Multiply-adds of matrix instructions, whose sides have at least 16 elements."""
        return self.volume * np.maximum(1.0, LEAST_SIDE / self.rows) * np.maximum(1.0, LEAST_SIDE / self.columns)


@dataclass(frozen=True)
class Work:
    """What one launch does; or, with arrays, many launches side by side.

    trips         loop iterations of one block, all passes together
    written       bytes of results, and `writing` the bytes that move for each
    stage         bytes of one loop iteration of one block; `resident`: what it loads outside loops
    partial       bytes of partial results, written and read
    vector        elementwise operations by all blocks together
    accumulators  elements that a block holds in registers
    depth         matrix instructions in sequence in one iteration
    """

    blocks: Amount
    trips: Amount
    reads: tuple[Read, ...]
    written: Amount
    writing: Amount
    stage: Amount
    resident: Amount
    partial: Amount
    products: tuple[Product, ...]
    vector: Amount
    accumulators: Amount
    depth: Amount

    @cached_property
    def unique(self) -> Amount:
        """Bytes that must move: each tensor once."""
        total = self.written
        for n, r in enumerate(self.reads):
            again = reduce(or_, (r.source == other.source for other in self.reads[:n]), False)
            total = total + r.bytes * (1 - again)
        return total

    @property
    def flops(self) -> Amount:
        return self.vector + sum(2 * p.volume for p in self.products)


def beside(works: Sequence[Work]) -> Work:
    """Independent works in one launch, whose blocks fill the device together."""
    written = sum(w.written for w in works)
    return Work(
        blocks=sum(w.blocks for w in works),
        trips=max(w.trips for w in works),
        reads=tuple(r for w in works for r in w.reads),
        written=written,
        writing=sum(w.written * w.writing for w in works) / written if written else 1.0,
        stage=max(w.stage for w in works),
        resident=max(w.resident for w in works),
        partial=sum(w.partial for w in works),
        products=tuple(p for w in works for p in w.products),
        vector=sum(w.vector for w in works),
        accumulators=max(w.accumulators for w in works),
        depth=max(w.depth for w in works),
    )


NO_READ, NO_PRODUCT = Read(-1, 0.0, ()), (0.0, 1.0, 1.0)


def columns(works: Sequence[Work], widths: Sequence[int]) -> Work:
    """One work whose arrays have those of several kernels side by side, `widths` columns of each.  What a kernel has
    fewer of than another is filled up with reads and products of nothing."""
    spans = list(itertools.pairwise(itertools.accumulate(widths, initial=0)))

    def side(amounts: Iterable[Amount], dtype: type = float) -> Amount:
        found: Amount = np.empty(spans[-1][1], dtype)
        for (start, stop), amount in zip(spans, amounts, strict=True):
            found[start:stop] = amount
        return found

    reads = []
    for each in itertools.zip_longest(*(w.reads for w in works), fillvalue=NO_READ):
        grid = itertools.zip_longest(*(r.grid for r in each), fillvalue=(1, False))
        reads.append(
            Read(
                side([r.source for r in each], int),
                side([r.bytes for r in each]),
                tuple((side([n for n, _ in axis]), side([cut for _, cut in axis], bool)) for axis in grid),
                side([r.waste for r in each]),
            )
        )
    products = []
    for dtype in dict.fromkeys(p.dtype for w in works for p in w.products):
        same = [[(p.volume, p.rows, p.columns) for p in w.products if p.dtype is dtype] for w in works]
        for ones in itertools.zip_longest(*same, fillvalue=NO_PRODUCT):
            volume, rows, across = (side(amounts) for amounts in zip(*ones, strict=True))
            products.append(Product(volume, rows, across, dtype))
    names = [f.name for f in fields(Work) if f.name not in ("reads", "products")]
    rest = {name: side([getattr(w, name) for w in works]) for name in names}
    return Work(reads=tuple(reads), products=tuple(products), **rest)


@dataclass(frozen=True)
class Prediction:
    """Seconds, and the terms that they come from: limits that act at once, and what adds up."""

    seconds: float
    terms: tuple[tuple[str, float], ...]
    unique_bytes: float
    flops: float

    @property
    def bound(self) -> str:
        """The term that binds."""
        return max(self.terms, key=lambda t: t[1])[0]

    def explain(self, floor: float | None = None) -> str:
        """One line: the time, which term binds, the others that matter, and the percentage of the floor."""
        return explain([self], floor)


def explain(predictions: Sequence[Prediction], floor: float | None = None) -> str:
    """One line for launches in sequence.

    >>> explain([Prediction(4e-6, (("dram", 3e-6), ("l2", 2e-6), ("launch", 1e-6), ("chain", 1e-9)), 0, 0)], 3e-6)
    '4.0 µs, bound by dram 3.0; l2 2.0, launch 1.0; 75 % of floor'
    """
    terms: dict[str, float] = {}
    for p in predictions:
        for name, seconds in p.terms:
            terms[name] = terms.get(name, 0.0) + seconds
    total = sum(p.seconds for p in predictions)
    first, *rest = sorted(terms.items(), key=lambda t: -t[1]) or [("nothing", 0.0)]
    text = f"{1e6 * total:.1f} µs, bound by {first[0]} {1e6 * first[1]:.1f}"
    if others := [f"{name} {1e6 * t:.1f}" for name, t in rest if t >= 0.05 * total]:
        text += f"; {', '.join(others)}"
    return text if floor is None else text + f"; {100 * floor / total if total else 100:.0f} % of floor"


Terms = Sequence[tuple[str, Amount]]


def prediction(limits: Terms, added: Terms, unique: float, flops: Amount) -> Prediction:
    """The 4-norm of the limits, plus what adds up."""
    terms = tuple((name, float(t)) for name, t in (*limits, *added))
    return Prediction(float(_total(limits, added)), terms, float(unique), float(flops))


def _total(limits: Terms, added: Terms) -> Amount:
    squares = [t * t for _, t in limits]
    return np.sqrt(np.sqrt(sum(s * s for s in squares))) + sum(t for _, t in added)


def predict(work: Work, d: Device) -> Prediction:
    """The time of one launch (two when it has partial results, whose combine is counted here)."""
    return prediction(*_terms(work, d), work.unique, work.flops)


def predict_beside(works: Sequence[Work], d: Device) -> Prediction:
    """Independent works in one launch: they share the device, and none is done sooner than alone."""
    return max((predict(beside(works), d), *(predict(w, d) for w in works)), key=lambda p: p.seconds)


def predict_each(work: Work, d: Device) -> tuple[Amount, Callable[[int], Prediction]]:
    """The seconds of many launches at once, and what is predicted for the n-th."""
    limits, added = _terms(work, d)
    unique, flops = work.unique, work.flops

    def at(n: int) -> Prediction:
        limit, more = ([(name, _nth(t, n)) for name, t in terms] for terms in (limits, added))
        return prediction(limit, more, _nth(unique, n), _nth(flops, n))

    return _total(limits, added), at


def _nth(amounts: Amount, n: int) -> float:
    return float(amounts[n] if np.size(amounts) > 1 else np.ravel(amounts)[0])


def blocks_at_once(work: Work, d: Device) -> Amount:
    """How many blocks of the launch one SM holds."""
    shared = STAGES * work.stage + work.resident + BLOCK_SHARED
    threads = np.where(work.accumulators <= 8192, 128, 256)
    registers = ACCUMULATOR_REGISTERS * np.maximum(work.accumulators, 1.0) + THREAD_REGISTERS * threads
    room = np.minimum(d.shared_bytes_per_sm // shared, d.registers_per_sm // registers)
    room = np.minimum(room, d.threads_per_sm // threads)
    return np.maximum(1, np.minimum(d.blocks_per_sm, room))


def _terms(work: Work, d: Device) -> tuple[Terms, Terms]:
    """Limits that act at once, and what adds up."""
    blocks, per_sm = work.blocks, blocks_at_once(work, d)
    at_once = np.minimum(blocks, d.sms * per_sm)
    waves = np.ceil(blocks / (d.sms * per_sm))
    rounds = np.ceil(blocks / d.sms) * d.sms / blocks  # the fullest SM over the average
    loaded = sum(r.bytes * r.copies * r.waste for r in work.reads)
    traffic = loaded + work.written * work.writing
    ahead = np.where(work.stage != 0, (STAGES - 1.5) * work.stage, work.resident)
    tensor, vector, operands = _arithmetic(work, d)
    limits = (
        ("dram", dram_bytes(work, d, at_once, waves) / d.bandwidth),
        ("latency", waves * loaded / blocks * d.load_latency_seconds / np.maximum(ahead, STREAMED)),
        ("l2", (traffic + work.partial) / d.l2_bytes_per_second),
        ("sm", traffic * rounds / (d.sms * d.sm_bytes_per_second)),
        ("tensor", tensor * rounds),
        ("vector", vector * rounds),
        ("shared", operands * rounds / (d.sms * d.shared_bytes_per_clock * d.clock_hz)),
        ("chain", waves * work.trips * (TRIP_CLOCKS + STEP_CLOCKS * work.depth) / d.clock_hz),
    )
    added = (
        ("launch", least_kernel_seconds(d)),
        ("start", np.ceil(blocks / d.sms) * d.block_seconds),
        ("tail", (waves - 1) * d.fill_seconds / per_sm),
        ("combine", (d.launch_seconds + 0.5e-6) * (work.partial > 0) + work.partial / d.l2_bytes_per_second),
    )
    return limits, added


def dram_bytes(work: Work, d: Device, at_once: Amount, waves: Amount) -> Amount:
    """Bytes between DRAM and L2.

    Blocks of one wave that share a part find it in L2, if what they hold at once fits there.  A later wave (or pass)
    finds it there if all that one wave reads fits: between two uses of a part lies at most that much.
    """
    room = L2_SHARE * d.l2_bytes
    partial = work.partial * (work.partial > room)
    once = work.unique + partial
    in_wave = [r.bytes * r.share(at_once / work.blocks) for r in work.reads]
    fits = at_once * (STAGES * work.stage + work.resident) <= room
    moved = work.written + partial
    for r, one in zip(work.reads, in_wave, strict=True):
        all_copies = r.bytes * r.copies
        moved = moved + np.where(fits, np.minimum(np.maximum(waves * one, r.bytes), all_copies), all_copies)
    return np.where(sum(in_wave) <= room, once, np.maximum(moved, once))


def _arithmetic(work: Work, d: Device) -> tuple[Amount, Amount, Amount]:
    """(seconds of tensor cores, seconds of vector units, operand bytes from shared memory), on all SMs.

    A product whose tile has a single row or column is multiplied and summed on the vector units; so is a small one
    where that takes less time.
    """
    vector_rate = d.vector_flops * d.vector_efficiency
    tensor: Amount = 0.0
    operands: Amount = 0.0
    vector = work.vector / vector_rate
    for p in work.products:
        summed = VECTOR_WEIGHT * p.volume / vector_rate
        rows, columns = np.maximum(p.rows, LEAST_SIDE), np.maximum(p.columns, LEAST_SIDE)
        rate = d.matmul_rate(p.dtype) * d.tensor_efficiency
        narrow = np.minimum(p.rows, p.columns) <= 1
        staged = np.where(narrow, 0.0, p.padded * (1 / rows + 1 / columns) * p.dtype.bits / 8)
        if d.on_tensor_cores(p.dtype):
            multiplied = 2 * p.padded / (rate * d.tile_share(rows, columns))
            summing = narrow | (multiplied > summed)
            tensor += np.where(summing, 0.0, multiplied)
            vector = vector + np.where(summing, summed, 0.0)
            operands += np.where(summing, 0.0, staged)
        else:
            vector = vector + np.where(narrow, summed, np.minimum(2 * p.padded / rate, summed))
            operands += staged
    return tensor, vector, operands


# -- library calls


def predict_library(unique: float, flops: float, dtype: DType, d: Device) -> Prediction:
    """The time of a library call that moves `unique` bytes: elementwise, a reduction, a view."""
    limits = (("dram", unique / d.bandwidth), ("tensor", flops / (d.matmul_rate(dtype) * d.library_efficiency)))
    return prediction(limits, (("launch", least_kernel_seconds(d)),), unique, flops)


def least_kernel_seconds(d: Device) -> float:
    """What any kernel takes: its launch, the filling of its first loads and the draining of its stores."""
    return d.launch_seconds + d.fill_seconds + DRAIN_SECONDS


LIBRARY_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64))
LIBRARY_DEPTH = 64  # elements of the sum in one loop iteration
LEAST_DEPTH = 256  # and in a part of a split, at least
MULTICAST = 90  # the architecture whose copies go to several blocks (CUDA programming guide, thread block clusters)


def predict_matmul(batch: int, m: int, n: int, k: int, unique: float, dtype: DType, d: Device) -> Prediction:
    """The time of a library matmul [batch, m, k] x [batch, k, n], at the best of the tiles that libraries have, the sum
    split over blocks where there are fewer than SMs.  So small m is bound by bandwidth, and sizes that leave SMs idle
    in the last round fall short of the rate."""
    flops = 2.0 * batch * m * n * k
    if d.kind == CPU:
        return predict_library(unique, flops, dtype, d)
    found = []
    for rows, columns in LIBRARY_TILES:
        tall, wide = math.ceil(m / rows), math.ceil(n / columns)
        volume = float(batch * tall * rows * wide * columns * k)
        product = Product(volume, rows, columns, dtype)
        together = 2 if d.arch >= MULTICAST else 1  # neighbours read their common operand once
        traffic = batch * k * (m * wide + n * math.ceil(tall / together)) * dtype.bits / 8
        most = min(k // LEAST_DEPTH, math.ceil(d.sms / (batch * tall * wide)))
        for parts in {1, max(1, most)}:
            slabs = 2.0 * parts * batch * m * n * 4 if parts > 1 else 0.0
            trips = math.ceil(k / parts / LIBRARY_DEPTH)
            blocks = batch * tall * wide * parts
            found.append(_library_loop(blocks, trips, unique, traffic + slabs, product, d.library_efficiency, flops, d))
    return min(found, key=lambda p: p.seconds)


def _library_loop(
    blocks: int, trips: int, unique: float, traffic: float, product: Product, efficiency: float, flops: float, d: Device
) -> Prediction:
    """A library kernel whose blocks loop over tiles."""
    rounds = math.ceil(blocks / d.sms) * d.sms / blocks
    rate = d.matmul_rate(product.dtype) * efficiency
    share, operands = 1.0, 0.0
    if d.on_tensor_cores(product.dtype):
        share = d.tile_share(product.rows, product.columns)
        operands = product.volume * (1 / product.rows + 1 / product.columns) * product.dtype.bits / 8
    limits = (
        ("dram", unique / d.bandwidth),
        ("latency", d.load_latency_seconds),  # the loads of the first iteration
        ("l2", traffic / d.l2_bytes_per_second),
        ("sm", traffic * rounds / (d.sms * d.sm_bytes_per_second)),
        ("tensor", 2 * product.volume * rounds / (rate * share)),
        ("shared", operands * rounds / (d.sms * d.shared_bytes_per_clock * d.clock_hz)),
        ("chain", math.ceil(blocks / (2 * d.sms)) * trips * TRIP_CLOCKS / d.clock_hz),
    )
    return prediction(
        limits,
        (("launch", least_kernel_seconds(d)), ("start", math.ceil(blocks / d.sms) * d.block_seconds)),
        unique,
        flops,
    )


ATTENTION_ROWS = 128  # queries of one block


def predict_attention(
    batch: int, rows: int, keys: int, depth: int, width: int, unique: float, dtype: DType, d: Device,
    causal: bool = False, share: float = 1.0,
) -> Prediction:  # fmt: skip
    """The time of the library's attention: [batch, rows, depth] queries, [batch, keys, depth] keys and [batch, keys,
    width] values.

    A block holds up to 128 queries and walks over all keys.  Few queries leave tensor cores and SMs idle: the library
    is not counted on to split the keys.  `share`: the part of the usual rate that the kernel reaches.
    """
    block_rows = ATTENTION_ROWS if rows > 64 else 64
    blocks = batch * math.ceil(rows / block_rows)
    seen = 0.5 if causal and rows > 1 else 1.0
    volume = blocks * block_rows * keys * (depth + width) * seen
    traffic = blocks * keys * (depth + width) * dtype.bits / 8 * seen + unique
    trips = math.ceil(keys * seen / LIBRARY_DEPTH)
    flops = 2 * batch * rows * keys * (depth + width) * seen
    product = Product(volume, block_rows, LIBRARY_DEPTH, dtype)
    return _library_loop(blocks, trips, unique, traffic, product, d.attention_efficiency * share, flops, d)


def bytes_of(tensors: Iterable[Tensor], sizes: Mapping[str, int]) -> float:
    """What the tensors hold."""
    return math.fsum(math.prod(sizes[a.name] for a in t.axes) * t.dtype.bits / 8 for t in tensors)


def floor_seconds(io_bytes: float, flops: float, dtype: DType, d: Device) -> float:
    """No kernel is faster: bytes that must move over the sheet bandwidth, or operations over the sheet rate."""
    return max(io_bytes / d.dram_bytes_per_second, flops / d.matmul_rate(dtype))
