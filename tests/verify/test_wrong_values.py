"""Single bits, single units and values that are no numbers are seen."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers.files import ADAPTED, NORM, OTHER, load, small_lora, small_state, write_base
from helpers.verifying import (
    DTYPES,
    INTEGERS,
    UNTOUCHED,
    Q,
    bad,
    check,
    code_by_tensor,
    finding,
    flipped,
    merged,
    written,
)

import loratool

#: The bits of the fraction and of the exponent.
LAYOUT = {"float16": (10, 5), "bfloat16": (7, 8), "float32": (23, 8)}


@pytest.mark.parametrize("bit", ["lowest", "highest-of-fraction", "exponent", "sign"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_of_an_untouched_tensor_is_seen(dtype: str, bit: str, tmp_path: Path) -> None:
    """Any flipped bit of a tensor that no adapter touches is found."""
    fraction, exponent = LAYOUT[dtype]
    number = {
        "lowest": 0, "highest-of-fraction": fraction - 1,
        "exponent": fraction, "sign": fraction + exponent,
    }[bit]  # fmt: skip
    state = merged(DTYPES[dtype])
    state[UNTOUCHED] = flipped(state[UNTOUCHED], number, 1234)
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {UNTOUCHED: "changed"}
    one = finding(report, UNTOUCHED)
    assert one.elements - round(one.equal * one.elements) == 1
    assert report.summary[0] == f"1 tensor changed although no adapter touches it: {UNTOUCHED}"
    assert report.untouched == 10


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_flipped_bit_passes_for_a_rounding(dtype: str, tmp_path: Path) -> None:
    """A flipped bit is found even where the wrong value is what bfloat16 would make of it."""
    state = {**small_state(64, DTYPES[dtype])}
    base = write_base(tmp_path / "base", state)
    adapter = small_lora(tmp_path / "a", 64)
    loratool.merge(base, adapter, tmp_path / "right", dtype="base")
    right = load(tmp_path / "right")
    kinds = [torch.bfloat16] if dtype == "float16" else [torch.bfloat16, torch.float16]
    tried = 0
    for half in kinds:
        flat = state[OTHER].view(-1)
        there = flat.to(half).to(flat.dtype)
        changed = flat.view(INTEGERS[flat.dtype]) ^ there.view(INTEGERS[flat.dtype])
        for index in torch.nonzero((changed & (changed - 1) == 0) & (changed != 0)).view(-1)[:3]:
            value = right[OTHER].clone()
            value.view(-1)[index] = there[index]
            model = written(tmp_path / f"m{tried}", {**right, OTHER: value}, base)
            report = loratool.verify(model, base, adapter)
            assert (report.verdict, bad(report)) == ("no", {OTHER: "changed"})
            tried += 1
    assert tried or dtype == "float32"


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_untouched_tensor_one_unit_off_everywhere_is_seen(
    dtype: str, direction: int, tmp_path: Path
) -> None:
    """One unit in the last place is a change, where nothing should change."""
    state = merged(DTYPES[dtype])
    norm = "model.norm.weight"
    state[norm] = state[norm].clone()
    state[norm].view(INTEGERS[DTYPES[dtype]]).add_(direction)
    report = check(tmp_path / "m", state)
    assert bad(report) == {norm: "changed"}
    one = finding(report, norm)
    assert (one.equal, one.largest_ulp) == (0.0, 1)
    assert one.ulps["1"] == one.elements


@pytest.mark.parametrize("bit", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_high_bit_of_an_adapted_tensor_is_seen(dtype: str, bit: int, tmp_path: Path) -> None:
    """A merged tensor with one wrong value is merged but damaged, whatever the value became."""
    state = merged(DTYPES[dtype])
    width = 8 * DTYPES[dtype].itemsize
    state[Q] = flipped(state[Q], width - bit, 77)
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {Q: "damaged"}
    assert finding(report, Q).off == 1
    name = Q.removesuffix(".weight")
    assert report.summary == [
        f"1 of 28 modules is merged, but some of its values are off: {name}",
        "27 of 28 modules are the once-rounded result",
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tensor", [Q, UNTOUCHED])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_seen(
    dtype: str, tensor: str, value: float, tmp_path: Path
) -> None:
    """NaN or infinity in the merged model is found, and the report stays strict JSON."""
    state = merged(DTYPES[dtype])
    state[tensor] = state[tensor].clone()
    state[tensor][3, 5] = value
    report = check(tmp_path / "m", state)
    assert report.verdict == "no"
    assert bad(report) == {tensor: "damaged" if tensor == Q else "changed"}
    json.dumps(report.to_dict(), allow_nan=False)


def test_infinity_is_never_as_it_should_be(tmp_path: Path) -> None:
    """A value that overflowed to infinity is off, although rounding x gives infinity too."""
    state = {**small_state(), NORM: torch.ones(8)}
    state[ADAPTED][0, 0] = state[NORM][0] = 1e5
    base, lora = write_base(tmp_path / "base", state), small_lora(tmp_path / "lora")
    loratool.merge(base, lora, tmp_path / "sound", dtype="float32")
    right = load(tmp_path / "sound")
    merged = write_base(tmp_path / "m", {n: t.half() for n, t in right.items()})
    report = loratool.verify(merged, base, lora)
    assert (report.verdict, code_by_tensor(report)) == ("no", {ADAPTED: "other", NORM: "changed"})
    right[NORM][0] = torch.inf
    report = loratool.verify(write_base(tmp_path / "n", right), base, lora)
    assert report.verdict == "no"
    assert code_by_tensor(report)[NORM] == "changed"
