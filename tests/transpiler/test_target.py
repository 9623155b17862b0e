"""Targets are named by text, and unknown names list the valid ones."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from mugraph.errors import UnknownTargetError
from mugraph.transpiler.target import ARCHES, Target, default_target, parse_target


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return monkeypatch


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("arch", ARCHES)
def test_an_architecture_names_a_target_that_prints_as_it_reads(arch: int) -> None:
    target = parse_target(f"cuda:{arch}")
    assert target == Target("triton", arch)
    assert parse_target(str(target)) == target


def test_torch_needs_no_architecture() -> None:
    assert parse_target("torch") == Target("torch", None)
    assert str(Target("torch")) == "torch"


def test_a_target_is_its_own_name() -> None:
    assert parse_target(Target("triton", 80)) == Target("triton", 80)


@pytest.mark.usefixtures("device")
def test_the_present_device_is_the_default() -> None:
    assert default_target() == parse_target() == parse_target("cuda") == parse_target("triton") == Target("triton", 90)


@pytest.mark.usefixtures("no_device")
def test_without_a_device_the_default_is_torch() -> None:
    assert default_target() == parse_target() == Target("torch")
    assert parse_target("triton") == Target("triton", None)


@pytest.mark.usefixtures("no_device")
def test_cuda_without_a_device_says_what_to_give() -> None:
    with pytest.raises(UnknownTargetError, match="no usable CUDA device") as caught:
        parse_target("cuda")
    assert "cuda:90" in str(caught.value.remedy)


def test_a_device_without_tensor_cores_runs_torch(device: pytest.MonkeyPatch) -> None:
    device.setattr(torch.cuda, "get_device_capability", lambda: (6, 1))
    assert default_target() == Target("torch")


@pytest.mark.parametrize("name", ["", "cuda:", "cuda:91", "cuda:90a", "cuda:9.0", "Cuda:90", "rocm", "torch:90", "tpu"])
def test_unknown_targets_list_the_valid_ones(name: str) -> None:
    with pytest.raises(UnknownTargetError) as caught:
        parse_target(name)
    assert repr(name) in caught.value.message
    for valid in ("torch", "triton", "cuda:80", "cuda:90", "cuda:100"):
        assert valid in str(caught.value.remedy)


def test_targets_are_frozen_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Target("torch").arch = 90  # type: ignore[misc]
    assert len({parse_target("cuda:90"), Target("triton", 90)}) == 1


def test_naming_a_target_does_not_load_torch() -> None:
    code = (
        "import sys; from mugraph.transpiler.target import parse_target; parse_target('cuda:90');"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tf32_is_asked_for_by_the_name_of_the_target():
    assert parse_target("cuda:90+tf32") == Target("triton", 90, "tf32")
    assert parse_target("cuda:90").precision == "ieee"
    assert str(parse_target("cuda:80+tf32")) == "cuda:80+tf32"
    for wrong in ("torch+tf32", "cuda:90+tf16", "cuda:91+tf32", "+tf32"):
        with pytest.raises(UnknownTargetError, match=r"tf32|tf16"):
            parse_target(wrong)
