"""Merging equals PEFT, layer kind by layer kind, or is rounded once where PEFT rounds twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.layer_cases import ROUNDED_ONCE, ROUNDED_TWICE, two_linear
from helpers.models import DTYPES, close, differing, once_rounded, read, step, ulps

#: Where PEFT adds up in another order: it convolves the factors of convolutions, and takes norms
#: over stored columns at once. In float32, where nothing is rounded away, that shows.
ORDER_SHOWS = ("nn-conv", "dora-nn-conv", "dora-conv1d", "dora-embedding", "conv1d-rank-above")
#: Norms over stored columns reach a float16 or bfloat16 result where it lies on a tie.
COLUMN_NORMS = ("dora-conv1d", "dora-embedding")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUNDED_ONCE)
def test_layer_merges_to_pefts_bits(name: str, dtype: str, tmp_path: Path) -> None:
    """Layers whose sum PEFT rounds once merge to the very bytes of PEFT's merge."""
    trained = ROUNDED_ONCE[name].train(tmp_path, DTYPES[dtype])
    found, peft = trained.merge(), trained.peft_merge()
    assert differing(found, trained.base_state()), "the adapter changed nothing"
    assert found.keys() == peft.keys()
    if dtype == "float32" and name.startswith(ORDER_SHOWS):
        assert all(close(found[key], peft[key], 1e-6) for key in peft)
    elif name.startswith(COLUMN_NORMS):
        for key in peft:
            steps = ulps(found[key], peft[key])
            assert int(steps.max()) <= 1
            assert int((steps > 0).sum()) <= steps.numel() // 200
    else:
        assert differing(found, peft) == {}


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_trained_biases_replace_those_of_the_base(kind: str, tmp_path: Path) -> None:
    """bias="all" replaces every bias, bias="lora_only" only those of adapted layers."""
    trained = two_linear(bias=kind).train(tmp_path)
    changed = differing(trained.merge(), trained.base_state()).keys()
    expected = {"l.weight", "l.bias"} | ({"z.bias"} if kind == "all" else set())
    assert changed == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUNDED_TWICE)
def test_layer_is_rounded_once_where_peft_rounds_twice(
    name: str, dtype: str, tmp_path: Path
) -> None:
    """Layers whose delta PEFT rounds first are still rounded once, one unit from PEFT at most."""
    case, scale, formula = ROUNDED_TWICE[name]
    trained = case.train(tmp_path, DTYPES[dtype])
    found, peft, base = trained.merge(), trained.peft_merge(), trained.base_state()
    adapter = {k.removeprefix("base_model.model."): v for k, v in read(trained.adapter).items()}
    deltas = formula(adapter, scale)
    expected = {**base, **{k: once_rounded(base[k], d) for k, d in deltas.items()}}
    assert differing(found, expected) == {}
    assert found.keys() == peft.keys()
    for key in found:
        # A unit of the largest summand: where W and delta cancel, those of the sum are finer.
        unit = step(torch.maximum(base[key].abs(), peft[key].abs()).maximum(
            deltas.get(key, torch.zeros(())).abs()), DTYPES[dtype])  # fmt: skip
        assert bool(((found[key].double() - peft[key].double()).abs() <= unit).all()), key
