"""The cost model: its data, its monotony, what each limit answers to, and that nothing is predicted below the floor."""

import json
import math
from dataclasses import fields, replace
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mugraph.errors import UnknownTargetError
from mugraph.ir.axes import Axis, Dim
from mugraph.ir.check import check
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import Elementwise, Gather
from mugraph.ir.types import DType, Input, Output, Storage, tensor
from mugraph.search.cost import (
    L2_SHARE,
    Device,
    Prediction,
    Product,
    Read,
    Work,
    beside,
    blocks_at_once,
    columns,
    device,
    dram_bytes,
    explain,
    floor_seconds,
    predict,
    predict_attention,
    predict_each,
    predict_library,
    predict_matmul,
    sheet_devices,
)  # fmt: skip
from mugraph.search.driver import search
from tests.search import programs
from tests.search.programs import SMALL

NAMES = ["a100", "a100-40gb", "b200", "h100", "h200"]
H100 = sheet_devices()["h100"]
WORK = Work(
    blocks=256,
    trips=16,
    reads=(Read(0, 4e6, ((16, True), (16, False))), Read(1, 4e6, ((16, False), (16, True)))),
    written=2e6,
    writing=1.0,
    stage=16_384,
    resident=1024,
    partial=0,
    products=(Product(1e9, 64, 64, DType.f16),),
    vector=1e6,
    accumulators=4096,
    depth=4,
)


def term(p: Prediction, name: str) -> float:
    return dict(p.terms)[name]


# -- the data


def test_every_device_file_is_known() -> None:
    there = [p.name for p in files("mugraph.search").joinpath("devices").iterdir() if p.name.endswith(".json")]
    assert sorted(n.removesuffix(".json") for n in there) == sorted([*NAMES, "cpu"]) == list(sheet_devices())


@pytest.mark.parametrize("name", [*NAMES, "cpu"])
def test_every_figure_has_a_source(name: str) -> None:
    d = sheet_devices()[name]
    figures = {f.name for f in fields(Device)} - {"name", "arch", "sources", "base", "calibrated", "kind"}
    assert set(d.sources) == figures
    for source in d.sources.values():
        assert any(
            kind in source
            for kind in ("data sheet", "guide", "white paper", "PTX ISA", "arXiv", "estimate", "published")
        )
    text = files("mugraph.search").joinpath("devices", f"{name}.json").read_text()
    assert json.loads(text)["schema_version"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_plausible(name: str) -> None:
    d = sheet_devices()[name]
    assert not d.calibrated
    assert d.label.endswith("not calibrated")
    assert d.bandwidth < d.dram_bytes_per_second < d.l2_bytes_per_second
    assert d.shared_bytes_per_block < d.shared_bytes_per_sm
    assert d.matmul_rate(DType.i8) > d.matmul_rate(DType.f16) > d.matmul_rate(DType.f32) >= d.vector_flops
    for share in (
        d.tensor_efficiency,
        d.library_efficiency,
        d.attention_efficiency,
        d.small_tile_share,
        d.vector_efficiency,
    ):
        assert 0 < share < 1
    assert 30e6 < d.l2_bytes < 200e6


def test_eight_bit_floats_have_a_rate_from_hopper_on() -> None:
    for name in NAMES:
        d = sheet_devices()[name]
        assert (d.matmul_rate(DType.f8e4m3) > d.matmul_rate(DType.f16)) == (not name.startswith("a100"))


def test_devices_go_by_name_and_by_architecture() -> None:
    assert device() == device("h100") == device("H100") == device("90")
    assert device("80").name == "A100 SXM 80GB"
    assert device("h200").dram_bytes_per_second > device("h100").dram_bytes_per_second


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownTargetError, match=r"z80.*\n.*a100, a100-40gb, b200, cpu, h100, h200"):
        device("z80")


# -- monotony and floors

counts = st.integers(1, 400)
amounts = st.floats(0, 1e9, allow_subnormal=False)
types = st.sampled_from([DType.f16, DType.bf16, DType.f32])
products = st.builds(Product, amounts, counts, counts, types)


@st.composite
def works(draw: st.DrawFn) -> Work:
    grid = draw(st.lists(st.integers(1, 64), max_size=3))
    cuts = st.lists(st.booleans(), min_size=len(grid), max_size=len(grid))
    reads = [
        Read(draw(st.integers(0, 3)), draw(amounts), tuple(zip(grid, draw(cuts), strict=True)), draw(st.floats(1, 8)))
        for _ in range(draw(st.integers(0, 4)))
    ]
    same = {r.source: r.bytes for r in reversed(reads)}  # a tensor has one size
    return Work(
        blocks=math.prod(grid),
        trips=draw(st.integers(0, 1000)),
        reads=tuple(replace(r, bytes=same[r.source]) for r in reads),
        written=draw(amounts),
        writing=draw(st.floats(1, 8)),
        stage=draw(st.floats(0, 1e5)),
        resident=draw(st.floats(0, 1e5)),
        partial=draw(amounts),
        products=tuple(draw(st.lists(products, max_size=3))),
        vector=draw(amounts),
        accumulators=draw(st.floats(0, 32768)),
        depth=draw(st.integers(1, 40)),
    )


@settings(max_examples=40)
@given(works(), st.sampled_from(NAMES))
def test_no_work_is_predicted_below_the_floor(work: Work, name: str) -> None:
    d = sheet_devices()[name]
    flops = sum(2 * p.volume for p in work.products)
    fastest = max((p.dtype for p in work.products), key=d.matmul_rate, default=DType.f16)
    p = predict(work, d)
    assert p.seconds >= floor_seconds(work.unique, flops, fastest, d)
    assert p.seconds >= d.launch_seconds + work.unique / d.bandwidth
    assert p.unique_bytes == work.unique


@settings(max_examples=40)
@given(works(), st.sampled_from(NAMES))
def test_what_moves_is_between_once_and_always(work: Work, name: str) -> None:
    d = sheet_devices()[name]
    at_once = min(work.blocks, d.sms * blocks_at_once(work, d))
    moved = dram_bytes(work, d, at_once, math.ceil(work.blocks / at_once))
    always = work.written + work.partial + sum(r.bytes * r.copies for r in work.reads)
    assert work.unique <= moved <= max(always, work.unique + work.partial) * (1 + 1e-9)


GROWING = ["trips", "written", "writing", "partial", "vector", "depth"]


@settings(max_examples=40)
@given(works(), st.sampled_from(GROWING), st.floats(1.0, 1e3), st.sampled_from(NAMES))
def test_more_work_never_takes_less_time(work: Work, field: str, factor: float, name: str) -> None:
    d = sheet_devices()[name]
    value = getattr(work, field)
    more = replace(work, **{field: math.ceil(value * factor) if isinstance(value, int) else value * factor})
    assert predict(more, d).seconds >= predict(work, d).seconds * (1 - 1e-9)


@settings(max_examples=40)
@given(works(), st.floats(1.0, 1e3), st.sampled_from(NAMES))
def test_larger_products_and_reads_never_take_less_time(work: Work, factor: float, name: str) -> None:
    d = sheet_devices()[name]
    more = replace(work, products=tuple(replace(p, volume=p.volume * factor) for p in work.products))
    assert predict(more, d).seconds >= predict(work, d).seconds * (1 - 1e-9)
    more = replace(work, reads=tuple(replace(r, bytes=r.bytes * factor) for r in work.reads))
    assert predict(more, d).seconds >= predict(work, d).seconds * (1 - 1e-9)


@settings(max_examples=40)
@given(works(), works())
def test_two_works_beside_each_other_take_as_long_as_each_of_them(a: Work, b: Work) -> None:
    """But for occupancy, launches are only saved: bytes and operations add up."""
    both = beside([a, b])
    assert both.blocks == a.blocks + b.blocks
    assert both.flops == pytest.approx(a.flops + b.flops)
    assert both.unique <= (a.unique + b.unique) * (1 + 1e-9)
    assert beside([a]) == replace(a, writing=pytest.approx(a.writing)) or a.written == 0


@settings(max_examples=60)
@given(st.lists(works(), min_size=1, max_size=4), st.sampled_from(NAMES), st.integers(1, 3))
def test_works_in_columns_are_predicted_as_each_alone(several: list[Work], name: str, width: int) -> None:
    d = sheet_devices()[name]
    seconds, predicted = predict_each(columns(several, [width] * len(several)), d)
    for n, work in enumerate(several):
        alone = predict(work, d)
        for column in range(n * width, (n + 1) * width):
            there = predicted(column)
            assert seconds[column] == pytest.approx(alone.seconds)
            assert dict(there.terms) == pytest.approx(dict(alone.terms))
            assert (there.unique_bytes, there.flops) == pytest.approx((alone.unique_bytes, alone.flops))


# -- what the limits answer to


def test_twice_the_bytes_take_about_twice_the_time_where_they_bind() -> None:
    def streaming(size: float) -> Prediction:
        return predict(
            replace(WORK, blocks=10_000, reads=(Read(0, size, ((10_000, True),)),), stage=0, resident=32_768), H100
        )

    once, twice = streaming(1e10), streaming(2e10)
    assert once.bound == "dram"
    assert twice.seconds == pytest.approx(2 * once.seconds, rel=0.1)


def test_blocks_that_share_a_tile_read_it_once_while_a_wave_fits_l2() -> None:
    small = WORK
    assert dram_bytes(small, H100, 132, 2) == small.unique
    grid = ((64, True), (64, False))
    large = replace(WORK, blocks=4096, reads=(Read(0, 2e8, grid), Read(1, 2e8, ((64, False), (64, True)))))
    waves = math.ceil(4096 / 264)
    moved = dram_bytes(large, H100, 264, waves)
    assert large.unique < moved < large.written + 64 * 4e8
    wide = replace(H100, l2_bytes=1e9)
    assert dram_bytes(large, wide, 264, waves) == large.unique
    narrow = replace(H100, l2_bytes=264 * WORK.stage / L2_SHARE)
    assert dram_bytes(large, narrow, 264, waves) == large.written + 64 * 4e8


def test_consecutive_blocks_share_along_the_slow_axes() -> None:
    read = Read(0, 1.0, ((16, True), (16, False)))
    assert read.copies == 16
    assert read.share(1.0) == 1.0
    assert read.share(16 / 256) == 1.0
    assert read.share(4 / 256) == 0.25
    across = Read(0, 1.0, ((16, False), (16, True)))
    assert across.share(16 / 256) == 1 / 16
    assert across.share(32 / 256) == 2 / 16


@pytest.mark.parametrize(
    ("d", "rows", "share"), [("h100", 64, 1.0), ("h100", 16, 0.62), ("a100", 16, 1.0), ("b200", 64, 0.5)]
)
def test_small_tiles_do_not_reach_the_rate(d: str, rows: int, share: float) -> None:
    assert sheet_devices()[d].tile_share(rows, 8) == share


def test_a_tile_of_few_rows_is_bound_by_its_operands() -> None:
    """A product of 16 rows reads (1/16 + 1/64) elements for each multiply-add, a square one of 128 a fifth of that."""

    def operands(rows: int, columns: int) -> float:
        return term(predict(replace(WORK, products=(Product(1e9, rows, columns, DType.f16),)), H100), "shared")

    assert operands(16, 64) == pytest.approx(5 * operands(128, 128))


def test_small_rows_are_padded_or_multiplied_and_summed() -> None:
    def arithmetic(rows: int, columns: int = 64, d: Device = H100) -> tuple[float, float]:
        p = predict(replace(WORK, vector=0, products=(Product(1e8, rows, columns, DType.f16),)), d)
        return term(p, "tensor"), term(p, "vector")

    tensor, vector = arithmetic(1)
    assert tensor == 0
    assert vector > 0
    assert arithmetic(4)[0] == pytest.approx(4 * arithmetic(16)[0])
    slow = replace(H100, tensor_flops={**H100.tensor_flops, "f16": 1.01 * H100.vector_flops})
    assert arithmetic(2, 64, slow)[0] == 0 < arithmetic(2, 64, slow)[1]
    assert arithmetic(64, 64, slow)[0] > 0 == arithmetic(64, 64, slow)[1]


def test_single_precision_runs_on_vector_units() -> None:
    p = predict(replace(WORK, products=(Product(1e9, 64, 64, DType.f32),)), H100)
    assert term(p, "tensor") == 0
    assert term(p, "vector") > term(predict(WORK, H100), "tensor")


def test_the_fullest_sm_sets_the_pace() -> None:
    def tensor(blocks: int) -> float:
        return term(predict(replace(WORK, blocks=blocks, reads=()), H100), "tensor")

    assert tensor(133) == pytest.approx(tensor(132) * 264 / 133)
    assert tensor(66) == pytest.approx(2 * tensor(132))
    assert tensor(264) == pytest.approx(tensor(132))


def test_occupancy_is_what_shared_memory_registers_and_threads_leave() -> None:
    light = replace(WORK, stage=0, resident=0, accumulators=1)
    assert blocks_at_once(light, H100) == 2048 // 128 - 1  # registers: 32 for each thread
    assert blocks_at_once(replace(light, stage=32_768), H100) == 2
    assert blocks_at_once(replace(light, accumulators=16_384), H100) == 2
    assert blocks_at_once(replace(light, stage=10**9), H100) == 1


def test_waves_wait_one_after_the_other() -> None:
    heavy = replace(WORK, stage=60_000)
    one, two = (predict(replace(heavy, blocks=n, reads=()), H100) for n in (132, 264))
    assert term(two, "chain") == 2 * term(one, "chain")
    assert term(one, "tail") == 0 < term(two, "tail")


def test_partial_results_cost_a_combine() -> None:
    assert term(predict(replace(WORK, partial=1e5), H100), "combine") > 0
    assert term(predict(WORK, H100), "combine") == 0


def test_an_explanation_names_what_binds_and_the_floor() -> None:
    p = predict(WORK, H100)
    floor = floor_seconds(WORK.unique, 2e9, DType.f16, H100)
    text = p.explain(floor)
    assert text.startswith(f"{1e6 * p.seconds:.1f} µs, bound by {p.bound} ")
    assert text.endswith(f"; {100 * floor / p.seconds:.0f} % of floor")
    both = explain([p, p], floor)
    assert both.startswith(f"{2e6 * p.seconds:.1f} µs, bound by {p.bound} ")
    assert "floor" not in p.explain()
    assert explain([]).startswith("0.0 µs")


# -- library calls


@given(st.floats(1, 1e10), st.floats(1, 1e10), st.floats(0, 1e13))
def test_more_bytes_never_take_a_library_less_time(a: float, b: float, flops: float) -> None:
    low, high = (predict_library(n, flops, DType.f16, H100).seconds for n in sorted((a, b)))
    assert low <= high


sizes = st.integers(1, 5000)


@given(st.integers(1, 40), sizes, sizes, sizes, st.sampled_from(NAMES), types)
def test_no_library_matmul_is_below_the_floor(b: int, m: int, n: int, k: int, name: str, dtype: DType) -> None:
    d = sheet_devices()[name]
    unique = b * (m * k + k * n + m * n) * dtype.bits / 8
    p = predict_matmul(b, m, n, k, unique, dtype, d)
    assert p.seconds >= floor_seconds(unique, 2 * b * m * n * k, dtype, d)
    assert p.seconds >= d.launch_seconds + unique / d.bandwidth


@given(st.integers(1, 64), sizes, sizes, st.sampled_from([64, 128]), st.booleans())
def test_no_library_attention_is_below_the_floor(b: int, rows: int, keys: int, depth: int, causal: bool) -> None:
    unique = 4.0 * b * (rows + keys) * depth
    p = predict_attention(b, rows, keys, depth, depth, unique, DType.f16, H100, causal)
    flops = 4 * b * rows * keys * depth * (0.5 if causal else 1)
    assert p.seconds >= min(1.0, 2 if causal and rows == 1 else 1) * floor_seconds(unique, flops, DType.f16, H100)


@pytest.mark.parametrize(("m", "measured"), [(1, 46.0), (16, 45.4), (64, 46.3)])
def test_small_matmuls_take_what_was_measured(m: int, measured: float) -> None:
    """cuBLAS on one H100, bf16, 12288 x 5376, in µs: vLLM's pull request 49363."""
    unique = 2.0 * (m * 5376 + 5376 * 12288 + m * 12288)
    p = predict_matmul(1, m, 12288, 5376, unique, DType.bf16, H100)
    assert p.bound == "dram"
    assert 1e6 * p.seconds == pytest.approx(measured, rel=0.2)


def test_large_matmuls_are_bound_by_arithmetic_or_l2_and_small_ones_fall_short() -> None:
    def share(n: int) -> float:
        p = predict_matmul(1, n, n, n, 6.0 * n * n, DType.f16, H100)
        return 2 * n**3 / p.seconds / H100.matmul_rate(DType.f16)

    assert 0.5 < share(8192) < 0.8
    assert share(512) < share(1024) < share(2048) < share(8192)


def test_attention_of_few_rows_leaves_sms_idle() -> None:
    def rate(rows: int) -> float:
        unique = 4.0 * 8 * (rows + 4096) * 128
        p = predict_attention(8, rows, 4096, 128, 128, unique, DType.f16, H100)
        return p.flops / p.seconds

    assert rate(16) < 0.05 * rate(4096)
    assert 0.2 < rate(4096) / H100.matmul_rate(DType.f16) < 0.5


# -- whole programs

QUICK = [n for n in SMALL if n not in ("ntrans", "layernorm_linear")]


@pytest.mark.parametrize("name", [*QUICK, "true gated_mlp", "true gqa", "true lora", "true rmsnorm_linear"])
def test_no_program_is_predicted_below_its_floor(name: str) -> None:
    program = SMALL[name]() if name in SMALL else getattr(programs, name.removeprefix("true "))()
    report = search(program, accept=lambda graph: None).report
    assert 0 < report.floor_seconds <= report.predicted_seconds
    assert report.percent_of_floor <= 100
    assert report.predicted_seconds == pytest.approx(sum(k.seconds for k in report.kernels)) or not report.kernels


def test_of_a_table_only_the_rows_that_are_asked_for_count() -> None:
    rows = Dim("N", 1, 64)
    n, words, k = Axis("n", rows), Axis("words", 100_000), Axis("k", 1024)
    table, index = tensor("table", (words, k), DType.f16), tensor("index", (n,), DType.i64)
    taken, out = tensor("taken", (n, k), DType.f16), tensor("out", (n, k), DType.f16)
    program = Program(
        "lookup",
        (Input(table, Storage(DType.f16)), Input(index, Storage(DType.i64))),
        (Equation((taken,), Gather("words"), ("table", "index")), Equation((out,), Elementwise("exp"), ("taken",))),
        (Output("out", Storage(DType.f16)),),
    )
    check(program)
    report = search(program, accept=lambda graph: None).report
    assert 0 < report.floor_seconds <= report.predicted_seconds < 1e-4


def test_the_floor_is_bytes_or_operations() -> None:
    assert floor_seconds(3.35e12, 0, DType.f16, H100) == pytest.approx(1.0)
    assert floor_seconds(0, 989e12, DType.f16, H100) == pytest.approx(1.0)
    assert floor_seconds(0, 1979e12, DType.f8e4m3, H100) == pytest.approx(1.0)
