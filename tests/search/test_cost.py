"""The cost model: its data, its monotony, and that nothing is predicted below the floor."""

import json
import math
from dataclasses import fields, replace
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mugraph.errors import UnknownTargetError
from mugraph.ir.types import DType
from mugraph.search.cost import Device, Work, device, floor_seconds, predict, predict_library
from mugraph.search.driver import search
from tests.search import programs
from tests.search.programs import SMALL

NAMES = ["a100", "b200", "h100"]
COUNTS = {"arch", "sms"}
WORK = Work(
    blocks=256,
    trips=16,
    unique=1e7,
    traffic=2e7,
    stage=16_384,
    resident=1024,
    partial=0,
    tensor_flops=1e9,
    vector_flops=1e6,
    accumulators=1024,
    depth=4,
    dtype=DType.f16,
)


def test_every_device_file_is_known() -> None:
    there = [p.name for p in files("mugraph.search").joinpath("devices").iterdir() if p.name.endswith(".json")]
    assert sorted(n.removesuffix(".json") for n in there) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source_or_is_a_count(name: str) -> None:
    d = device(name)
    figures = {f.name for f in fields(Device)} - {"name", "sources"} - COUNTS
    assert set(d.sources) == figures
    assert all(d.sources.values())
    text = files("mugraph.search").joinpath("devices", f"{name}.json").read_text()
    assert json.loads(text)["schema_version"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_plausible(name: str) -> None:
    d = device(name)
    for figure in figures_of(d):
        assert math.isfinite(figure)
        assert figure > 0
    assert d.bandwidth < d.dram_bytes_per_second < d.l2_bytes_per_second
    assert d.shared_bytes_per_block < d.shared_bytes_per_sm
    assert d.matmul_rate(DType.f16) > d.matmul_rate(DType.f32) >= d.vector_flops
    assert 0 < d.tensor_efficiency < 1
    assert 0 < d.library_efficiency < 1


def figures_of(d: Device) -> list[float]:
    plain = [getattr(d, f.name) for f in fields(d) if f.name not in ("name", "sources", "tensor_flops")]
    return [*plain, *d.tensor_flops.values()]


def test_devices_go_by_name_and_by_architecture() -> None:
    assert device() == device("h100")
    assert device("H100") == device("90")
    assert device("80").name.startswith("A100")


def test_an_unknown_device_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownTargetError, match=r"z80.*\n.*a100, b200, h100"):
        device("z80")


GROWING = ["trips", "unique", "traffic", "partial", "tensor_flops", "vector_flops", "depth"]


@given(st.sampled_from(GROWING), st.floats(1.0, 1e3), st.sampled_from(NAMES))
def test_more_work_never_takes_less_time(field: str, factor: float, name: str) -> None:
    work = replace(WORK, partial=1e5)
    more = replace(work, **{field: math.ceil(getattr(work, field) * factor)})
    assert predict(more, device(name)).seconds >= predict(work, device(name)).seconds


@given(st.floats(1, 1e10), st.floats(1, 1e10), st.floats(0, 1e13))
def test_more_bytes_never_take_a_library_less_time(a: float, b: float, flops: float) -> None:
    low, high = (predict_library(n, flops, DType.f16, device()).seconds for n in sorted((a, b)))
    assert low <= high


def test_twice_the_bytes_take_about_twice_the_time_where_they_bind() -> None:
    big = replace(WORK, unique=1e10, traffic=1e10, blocks=10_000)
    once, twice = predict(big, device()), predict(replace(big, unique=2e10, traffic=2e10), device())
    assert once.bound == "dram"
    assert twice.seconds == pytest.approx(2 * once.seconds, rel=0.05)


def test_partial_results_cost_a_combine() -> None:
    with_partial = predict(replace(WORK, partial=1e5), device())
    assert dict(with_partial.terms)["combine"] > 0
    assert dict(predict(WORK, device()).terms)["combine"] == 0


QUICK = [n for n in SMALL if n not in ("ntrans", "layernorm_linear")]


@pytest.mark.parametrize("name", [*QUICK, "true gated_mlp", "true gqa", "true lora", "true rmsnorm_linear"])
def test_no_program_is_predicted_below_its_floor(name: str) -> None:
    program = SMALL[name]() if name in SMALL else getattr(programs, name.removeprefix("true "))()
    report = search(program, accept=lambda graph: None).report
    assert 0 < report.floor_seconds <= report.predicted_seconds
    assert report.percent_of_floor <= 100
    assert report.predicted_seconds == pytest.approx(sum(k.seconds for k in report.kernels)) or not report.kernels


def test_the_floor_is_bytes_or_operations() -> None:
    d = device()
    assert floor_seconds(3.35e12, 0, DType.f16, d) == pytest.approx(1.0)
    assert floor_seconds(0, 989e12, DType.f16, d) == pytest.approx(1.0)
