"""A certificate survives its file, and a damaged file is refused."""

import json
import math

import pytest

from mugraph.errors import ParseError, TargetMismatchError
from mugraph.verify.certificate import Certificate, NumericReport, NumericRow, graph_hash
from mugraph.verify.equivalence import verify
from tests import graphs

ROW = NumericRow("Y", "f16", (("B", 7),), "normal", 0.5, 1.0, 0.5, None, True)


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    report = NumericReport(
        "interpreted",
        "cuda:90",
        "abc",
        (ROW, NumericRow("Y", "f16", (), "wide", math.inf, 0.0, math.inf, 1.0, False, "overflow")),
    )
    return verify(graphs.lora(), graphs.lora_fused()).certificate.with_numerics(report)


def test_json_gives_the_certificate_back(certificate):
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_json_is_strict(certificate):
    json.loads(certificate.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_text_says_what_was_established_and_what_was_not(certificate):
    text = str(certificate)
    for piece in ("tested, numerics", "error ≤ 2^-", "sizes b=3", "assumes: values are real numbers",
                  "interpreted on cuda:90: 1 comparisons with float64, 1 excluded"):  # fmt: skip
        assert piece in text


def test_the_text_says_which_outputs_were_not_compared():
    out = NumericRow("Z", "f16", (), "wide", math.inf, 0.0, math.inf, None, False, "the float64 result leaves f16")
    some, none = (NumericReport("torch", "torch", "abc", rows) for rows in ((ROW, out), (out, out)))
    text = "NOT COMPARED: Z, as for every input drawn the float64 result leaves f16"
    assert text in str(some)
    assert "1 comparisons" in str(some)
    assert text in str(none)
    assert "0 comparisons" in str(none)
    assert "tolerance" not in str(none)
    assert "NOT COMPARED" not in str(NumericReport("torch", "torch", "abc", (ROW,)))


def test_another_schema_version_is_refused(certificate):
    with pytest.raises(TargetMismatchError, match="schema version 3"):
        Certificate.from_json(certificate.to_json().replace('"schema_version": 2', '"schema_version": 3'))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: [],
        lambda d: {"schema_version": 2},
        lambda d: {k: v for k, v in d.items() if k != "draws"},
        lambda d: d | {"unknown": 1},
        lambda d: d | {"seed": "one"},
        lambda d: d | {"delta_log2": None},
        lambda d: d | {"draws": 3},
        lambda d: d | {"draws": [{"sizes": []}]},
        lambda d: d | {"assumptions": "none"},
    ],
)
def test_a_damaged_certificate_is_refused(certificate, damage):
    with pytest.raises(ParseError, match="not a certificate"):
        Certificate.from_json(json.dumps(damage(json.loads(certificate.to_json()))))


def test_a_truncated_certificate_is_refused(certificate):
    with pytest.raises(ParseError, match="not a certificate"):
        Certificate.from_json(certificate.to_json()[:-20])


def test_the_hash_tells_graphs_apart():
    assert graph_hash(graphs.lora_fused()) == graph_hash(graphs.lora_fused())
    assert graph_hash(graphs.lora_fused()) != graph_hash(graphs.lora_fused(r_size=8))


def test_a_report_in_which_nothing_counts_has_not_passed():
    left_out = NumericRow("Y", "f16", (), "wide", 0.0, 1.0, 0.0, None, False, "overflow")
    assert NumericReport("torch", "cpu", "", (ROW, left_out)).passed
    assert not NumericReport("torch", "cpu", "", (left_out,)).passed
