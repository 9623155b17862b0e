"""Calibration: what a fake device hides is found again, stored, and preferred; what is malformed is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mugraph import settings
from mugraph.cli import main
from mugraph.errors import CacheError, CacheWarning, UnknownTargetError
from mugraph.ir.types import DType
from mugraph.pipeline import optimize
from mugraph.runtime import calibrate as calibration
from mugraph.runtime.calibrate import (
    Probe,
    calibrate,
    description,
    generated_work,
    present_device,
    store,
)
from mugraph.search.cost import (
    DRAIN_SECONDS,
    Device,
    calibrated_devices,
    calibration_directory,
    device,
    device_of,
    floor_seconds,
    predict,
    predict_attention,
    predict_matmul,
    sheet_devices,
)
from mugraph.search.driver import search
from tests.search import programs

HIDDEN = replace(
    sheet_devices()["h200"],
    name="NVIDIA H200",
    dram_efficiency=0.91,
    l2_bytes_per_second=6.3e12,
    launch_seconds=1.1e-6,
    fill_seconds=0.7e-6,
    block_seconds=2e-8,
    load_latency_seconds=6.5e-7,
    library_efficiency=0.71,
    tensor_efficiency=0.53,
    attention_efficiency=0.47,
)


class FakeProbe:
    """A device that takes exactly the time that its description says, but for `noise`."""

    def __init__(self, hidden: Device, noise: float = 1.0) -> None:
        self.hidden, self.noise = hidden, noise
        self.name, self.arch, self.sms, self.l2_bytes = hidden.name, hidden.arch, hidden.sms, int(hidden.l2_bytes)

    def copy(self, size: int) -> float:
        return 2 * size / self.hidden.bandwidth * self.noise

    def read(self, size: int, rounds: int) -> float:
        return size * rounds / self.hidden.l2_bytes_per_second * self.noise + self.empty(1)

    def empty(self, blocks: int) -> float:
        return self.hidden.launch_seconds + DRAIN_SECONDS + max(0, blocks / self.sms - 1) * self.hidden.block_seconds

    def touch(self) -> float:
        return self.empty(1) + self.hidden.fill_seconds

    def chase(self, steps: int) -> float:
        return self.empty(1) + steps * self.hidden.load_latency_seconds

    def matmul(self, m: int, n: int, k: int, dtype: DType) -> float | None:
        if dtype is DType.f8e4m3 and m % 16:
            return None
        unique = (m * k + k * n + m * n) * dtype.bits / 8
        return predict_matmul(1, m, n, k, unique, dtype, self.hidden).seconds

    def generated(self, size: int) -> float:
        return predict(generated_work(size), self.hidden).seconds

    def attention(self, heads: int, rows: int, keys: int, depth: int) -> float:
        moved = 2.0 * heads * (2 * rows + 2 * keys) * depth
        return predict_attention(heads, rows, keys, depth, depth, moved, DType.f16, self.hidden).seconds


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "cache"))


def figures(d: Device) -> dict[str, float]:
    plain = {k: v for k, v in asdict(d).items() if isinstance(v, int | float)}
    return plain | {f"rate of {k}": v for k, v in d.tensor_flops.items()}


def test_a_hidden_device_is_found_again() -> None:
    probe: Probe = FakeProbe(HIDDEN)
    found, checks = calibrate(probe, "2026-01-31")
    assert figures(found) == pytest.approx(figures(HIDDEN), rel=1e-3)
    assert (found.base, found.calibrated, found.name) == ("h200", "2026-01-31", "NVIDIA H200")
    assert all(c.predicted == pytest.approx(c.measured, rel=0.02) for c in checks)


def test_an_unknown_device_gets_rates_from_its_matmuls() -> None:
    slower = {k: v / 3 for k, v in HIDDEN.tensor_flops.items()}
    odd = replace(HIDDEN, name="NVIDIA L40S", arch=89, sms=142, dram_bytes_per_second=0.9e12, tensor_flops=slower)
    found, checks = calibrate(FakeProbe(odd), "2026-01-31")
    assert found.base == "h100"
    assert (found.arch, found.sms) == (89, 142)
    assert found.bandwidth == pytest.approx(odd.bandwidth)
    assert found.matmul_rate(DType.f16) < 0.5 * sheet_devices()["h100"].matmul_rate(DType.f16)
    assert all(c.predicted == pytest.approx(c.measured, rel=0.25) for c in checks if "f16" in c.what)
    assert floor_seconds(0, 2.0 * 8192**3, DType.f16, found) <= odd_seconds(odd)


def odd_seconds(d: Device) -> float:
    seconds = FakeProbe(d).matmul(8192, 8192, 8192, DType.f16)
    assert seconds is not None
    return seconds


@pytest.mark.parametrize(
    ("name", "sms", "base"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "h100"),
        ("NVIDIA H200", 132, "h200"),
        ("NVIDIA A100-SXM4-40GB", 108, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 108, "a100"),
        ("NVIDIA B200", 148, "b200"),
    ],
)
def test_the_data_file_of_a_device_is_found_by_its_name(name: str, sms: int, base: str) -> None:
    like = sheet_devices()[base]
    found, _ = calibrate(FakeProbe(replace(like, name=name, sms=sms)), "2026-01-31")
    assert found.base == base
    assert found.dram_bytes_per_second == like.dram_bytes_per_second
    assert found.sources["dram_bytes_per_second"] == like.sources["dram_bytes_per_second"]


def test_every_measured_figure_says_so() -> None:
    found, _ = calibrate(FakeProbe(HIDDEN), "2026-01-31")
    by = "measured by mugraph calibrate on NVIDIA H200, 2026-01-31"
    measured = {k for k, source in found.sources.items() if source == by}
    assert measured >= {"dram_efficiency", "l2_bytes_per_second", "launch_seconds", "tensor_efficiency", "fill_seconds"}
    assert {"vector_flops", "shared_bytes_per_sm", "clock_hz"}.isdisjoint(measured)
    assert found.sources.keys() == sheet_devices()["h200"].sources.keys()


def test_a_difference_that_drowns_in_noise_leaves_the_figure_as_it_was() -> None:
    class Noisy(FakeProbe):
        def touch(self) -> float:
            return 0.5 * self.empty(1)

    found, _ = calibrate(Noisy(HIDDEN), "2026-01-31")
    base = sheet_devices()["h200"]
    assert found.fill_seconds == base.fill_seconds
    assert found.sources["fill_seconds"] == base.sources["fill_seconds"]


def test_more_than_the_sheet_says_raises_the_sheet() -> None:
    found, _ = calibrate(FakeProbe(HIDDEN, noise=0.8), "2026-01-31")
    assert found.dram_efficiency <= 1
    assert found.dram_bytes_per_second == pytest.approx(HIDDEN.bandwidth / 0.8)


# -- storing and finding


@pytest.fixture
def stored() -> Device:
    found, _ = calibrate(FakeProbe(HIDDEN), "2026-01-31")
    place = store(found)
    assert place == calibration_directory() / "nvidia-h200.json"
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    return found


def test_a_stored_description_is_preferred_by_architecture_and_by_name(stored: Device) -> None:
    assert device("h200") == device("90") == device("nvidia-h200") == stored
    assert not device("h100").calibrated
    assert device("h200").digest != sheet_devices()["h200"].digest


def test_the_setting_leaves_it_aside(stored: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.calibration.env, "0")
    assert device("h200") == sheet_devices()["h200"]
    assert device("90") == sheet_devices()["h100"]


def test_the_report_says_what_the_prediction_rests_on(stored: Device) -> None:
    program = programs.chain()
    assert search(program, accept=lambda g: g, on=device("90")).report.device == "NVIDIA H200, calibrated 2026-01-31"
    assert search(program, accept=lambda g: g, on=device("80")).report.device == "A100 SXM 80GB, not calibrated"


def test_a_result_of_before_the_calibration_is_not_taken_from_the_cache() -> None:
    program = programs.softmax(8)
    assert not optimize(program, target="triton").cached
    assert optimize(program, target="triton").cached
    store(replace(HIDDEN, name="NVIDIA H100", base="h100", calibrated="2026-01-31"))
    assert not optimize(program, target="triton").cached


GOOD = json.loads(description(HIDDEN))
BAD = {
    "not JSON": "{",
    "a list": "[]",
    "another schema": json.dumps(GOOD | {"schema_version": 1}),
    "a figure is missing": json.dumps({k: v for k, v in GOOD.items() if k != "sms"}),
    "a figure too many": json.dumps(GOOD | {"colour": 3}),
    "a text for a figure": json.dumps(GOOD | {"clock_hz": "fast"}),
    "a negative figure": json.dumps(GOOD | {"launch_seconds": -1e-6}),
    "not a number": json.dumps(GOOD | {"launch_seconds": float("nan")}),
    "a rate of zero": json.dumps(GOOD | {"tensor_flops": GOOD["tensor_flops"] | {"f16": 0}}),
    "no rates": json.dumps(GOOD | {"tensor_flops": 3}),
    "an odd name": json.dumps(GOOD | {"name": 3}),
}


def test_the_good_one_is_a_description() -> None:
    assert device_of(GOOD) == HIDDEN


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_file_is_ignored_with_a_warning(what: str) -> None:
    place = calibration_directory() / "nvidia-h200.json"
    place.parent.mkdir(parents=True)
    place.write_text(BAD[what])
    with pytest.warns(CacheWarning, match=r"nvidia-h200.json is ignored: .*mugraph calibrate"):
        assert device("h200") == sheet_devices()["h200"]


def test_a_draft_that_was_left_behind_is_no_description(stored: Device) -> None:
    (calibration_directory() / ".nvidia-h200.json.0.tmp").write_text("{")
    (calibration_directory() / ".hidden.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(calibrated_devices()) == ["nvidia-h200"]


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CacheError, match=r"cannot write.*\n.*MUGRAPH_CACHE_DIR"):
        store(HIDDEN)


# -- the present device


def test_without_a_device_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnknownTargetError, match=r"no CUDA device to measure\n(.*\n)*.*try: "):
        present_device()


def test_the_command_without_a_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["calibrate", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "MG0013"
    assert "no CUDA device" in err
    assert not calibration_directory().exists()


def test_the_command_measures_and_stores(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(calibration, "present_device", lambda index: FakeProbe(HIDDEN))
    assert main(["calibrate", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["file"]) == calibration_directory() / "nvidia-h200.json"
    assert document["figures"]["library_efficiency"] == pytest.approx(0.71, rel=1e-3)
    assert document["sources"].keys() == document["figures"].keys()
    assert device("h200").calibrated == document["calibrated"]
    assert main(["calibrate"]) == 0
    assert "library_efficiency" in capsys.readouterr().out


KERNELS = """
import torch
from mugraph.runtime.calibrate import READ_SIZE, TorchProbe

probe = TorchProbe(where="cpu", repeats=1)
k = probe.kernels
x = torch.arange(3 * READ_SIZE, dtype=torch.float32)
y = torch.zeros(3)
k.read[(3,)](x, y, 3, 3, READ_SIZE)
assert torch.allclose(y, x.sum().expand(3), rtol=1e-4), y
a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64).half()
k.matmul[(4,)](a, b, c, 64, 32, 32, 16)
assert torch.allclose(c.float(), a.float() @ b.float(), atol=0.1, rtol=0.01)
links = torch.tensor([3, 0, 1, 2])
end = torch.zeros(1, dtype=torch.int64)
k.chase[(1,)](links, end, 2)
assert end.item() == 1, end
k.touch[(2,)](x, z := torch.zeros(512), 256)
assert torch.equal(z, x[:512] + 1)
k.empty[(3,)](w := torch.ones(1), 3)
assert w.item() == 1
for seconds in (probe.touch(), probe.empty(2), probe.chase(3), probe.generated(32), probe.attention(1, 4, 8, 16)):
    assert 0 < seconds < 60
"""


def test_the_kernels_do_what_is_timed() -> None:
    """Under the interpreter; it is switched on before the kernels load, hence the process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
