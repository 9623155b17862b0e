"""Every program in every type: found, verified in all tiers, and its kernels run under the interpreter.

The numeric tier takes reduced sizes with two tiles and a tail, which are odd.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import mugraph as mg
from benchmarks.programs import FAMILIES
from benchmarks.resources import DTYPES, in_dtype
from mugraph.runtime.cache import Cache

pytestmark = pytest.mark.full


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_passes_all_tiers(name: str, dtype: str, tmp_path: Path) -> None:
    program = in_dtype(next(iter(FAMILIES[name].variants.values())), dtype)
    result = mg.optimize(program, target="cuda:90", cache=Cache(tmp_path))
    assert {"tested", "proved", "numerics"} <= set(result.certificate.tiers)
    (report,) = result.certificate.numerics
    assert report.passed
    assert report.how == ("interpreted" if result.graph.kernels() else "torch")
    if result.graph.kernels():
        assert "bounds" in result.certificate.tiers
    assert not any("refused" in note for note in result.notes)
