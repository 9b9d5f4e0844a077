"""What is base + adapters passes, and one adapter of several that is missing does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.files import OTHER, lora_on, small_state, write_base
from helpers.places import FIXTURES
from helpers.verifying import DTYPES, bad, check, codes, merged

import loratool


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_own_output_is_the_once_rounded_result(dtype: str, tmp_path: Path) -> None:
    """What `merge` writes is verified value by value, in every dtype."""
    out = tmp_path / "out"
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", out, dtype=dtype)
    report = loratool.verify(out, FIXTURES / "base", FIXTURES / "adapter")
    assert report.verdict == "yes"
    assert report.summary == ["all 28 modules are the once-rounded result"]
    assert codes(report) == {"once": 28}
    assert (report.modules, report.untouched, report.equal) == (28, 11, 1.0)
    assert all(f.applied == pytest.approx(1, abs=1e-3) for f in report.findings)
    assert all(f.ulps == {**dict.fromkeys(f.ulps, 0), "0": f.elements} for f in report.findings)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula_by_hand_is_the_once_rounded_result(dtype: str, tmp_path: Path) -> None:
    """What torch computes by the formula passes; this file's broken models start from it."""
    report = check(tmp_path / "m", merged(DTYPES[dtype]))
    assert report.verdict == "yes"
    assert codes(report) == {"once": 28}


@pytest.mark.parametrize("weights", [[0.7, -0.4], [-1.0, 1.5], [0.3, 0.3]])
def test_several_adapters_are_verified_with_their_weights(
    weights: list[float], tmp_path: Path
) -> None:
    """Weights of either sign are part of what is verified: swapped, they are not the same merge."""
    base = write_base(tmp_path / "base", small_state(64))
    rng = np.random.default_rng(3)
    adapters = [
        lora_on(tmp_path / f"a{i}", rng.standard_normal((64, 4)), rng.standard_normal((4, 64)))
        for i in range(2)
    ]
    loratool.merge(base, adapters, tmp_path / "out", weights=weights)
    assert loratool.verify(tmp_path / "out", base, adapters, weights=weights).verdict == "yes"
    for wrong in (weights[::-1], [1.0, 1.0], [-w for w in weights]):
        report = loratool.verify(tmp_path / "out", base, adapters, weights=wrong)
        assert report.verdict == ("yes" if wrong == weights else "no")


@pytest.mark.parametrize("missing", [0, 1])
def test_one_of_two_adapters_missing_is_seen(missing: int, tmp_path: Path) -> None:
    """A model that holds only one of two adapters is not the merge of both."""
    base = write_base(tmp_path / "base", small_state(64))
    rng = np.random.default_rng(3)
    adapters = [
        lora_on(tmp_path / f"a{i}", rng.standard_normal((64, 4)), rng.standard_normal((4, 64)))
        for i in range(2)
    ]
    loratool.merge(base, adapters[1 - missing], tmp_path / "out")
    report = loratool.verify(tmp_path / "out", base, adapters)
    assert report.verdict == "no"
    (one,) = report.findings
    assert one.code == "weights"
    assert one.applied is not None
    assert 0.2 < one.applied < 0.8
    # Both weights were 1 in the plan; of what is there, one is 1 and the other 0.
    names = ("1.00 × a0", "0.00 × a1") if missing else ("0.00 × a0", "1.00 × a1")
    assert " and ".join(names) in report.summary[0]


def test_two_adapters_on_different_modules_show_which_one_is_missing(tmp_path: Path) -> None:
    """Where two adapters adapt different modules, those of the missing one were never merged."""
    base = write_base(tmp_path / "base", small_state(32))
    rng = np.random.default_rng(3)
    b, a = rng.standard_normal((32, 2)), rng.standard_normal((2, 32))
    adapters = [lora_on(tmp_path / "q", b, a), lora_on(tmp_path / "k", b, a, OTHER)]
    loratool.merge(base, adapters[0], tmp_path / "out")
    report = loratool.verify(tmp_path / "out", base, adapters)
    assert bad(report) == {OTHER: "not-merged"}


def test_adapters_merged_one_after_the_other_are_named(tmp_path: Path) -> None:
    """Two merges in a row round twice, and that is what verify calls it."""
    base, one = FIXTURES / "base", FIXTURES / "adapter"
    loratool.merge(base, one, tmp_path / "first", dtype="base")
    loratool.merge(
        tmp_path / "first", one, tmp_path / "both", dtype="base", weights=[0.5], again=True
    )
    report = loratool.verify(tmp_path / "both", base, [one, one], weights=[1, 0.5])
    assert report.verdict == "yes"
    assert any("one after the other" in sentence for sentence in report.summary)
