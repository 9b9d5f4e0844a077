"""PEFT loads what resize writes and computes the best approximation of its rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import close, read
from helpers.peft_live import (
    EPS,
    FLOAT32,
    Live,
    Make,
    Products,
    assert_same,
    close_double,
    convolutions,
    embeddings,
    factors_of,
    gpt_layers,
    linears,
    llama,
    truncated,
)
from helpers.peft_loading import (
    BESIDE,
    IDS,
    IMAGE,
    LAYERS,
    LOGITS,
    TOKENS,
    X12,
    Sources,
    assert_loads,
    on,
    output_of,
)
from peft import PeftModel

import loratool

DORA = {"use_dora": True}

RESIZED: dict[str, Sources] = {
    **{name: Sources(s.make, s.inputs, s.adapters[:1]) for name, s in LAYERS.items()},
    **{
        name: Sources(BESIDE[name].make, BESIDE[name].inputs, BESIDE[name].adapters[:1])
        for name in ("lora-bias", "bias-all", "modules-to-save", "token-rows")
    },
    "rslora": Sources(linears, X12, (on("l", "z", use_rslora=True),)),
    "dora-linear": Sources(linears, X12, (on("l", "z", **DORA),)),
    "dora-conv1d-layers": Sources(
        gpt_layers, X12, (on("c_fc", "c_proj", fan_in_fan_out=True, **DORA),)
    ),
    "dora-nn-conv2d": Sources(convolutions, IMAGE, (on("l", "z", **DORA),)),
    "dora-embedding": Sources(embeddings, IDS, (on("l", "z", use_rslora=True, **DORA),)),
    "dora-llama": Sources(
        llama, TOKENS, (on("q_proj", "down_proj", rank_pattern={"q_proj": 2}, **DORA),)
    ),
}


def loaded_output(sources: Sources, folder: Path) -> torch.Tensor:
    return output_of(PeftModel.from_pretrained(sources.make(), folder), sources.inputs)


@pytest.mark.parametrize("options", [{"rank": 20}, {"pad_to": 8}], ids=["rank", "pad"])
@pytest.mark.parametrize("name", RESIZED)
def test_a_larger_rank_computes_the_same(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Resized up, every module has the new rank, or the largest that any can have, and PEFT
    computes what it did before."""
    sources, out = RESIZED[name], tmp_path / "out"
    (adapter,) = sources.write(tmp_path)
    report = loratool.resize(adapter, out, **options)
    widest = max(min(m.shape) for m in report.modules)
    rank = 8 * -(-max(largest_ranks(adapter)) // 8)
    if "rank-above-width" not in name:
        assert report.rank == (min(20, widest) if "rank" in options else rank)
    assert set(largest_ranks(out)) == {report.rank}
    found = output_of(assert_loads(sources.make, out), sources.inputs)
    expected = loaded_output(sources, adapter)
    assert close(found, expected, LOGITS)
    assert not close(sources.plain(), expected, 1e-3)


def largest_ranks(folder: Path) -> list[int]:
    return [v.shape[0] for k, v in read(folder).items() if ".lora_A." in k or "embedding_A" in k]


def layer_deltas(make: Make, folder: Path) -> Products:
    """scale·B·A by module in float64, as PEFT scales it; of attention both projections."""
    model = PeftModel.from_pretrained(make(), folder)
    found = {}
    for path, module in Live(model, folder).modules():
        b, a = factors_of(module, "default")
        found[path] = module.scaling["default"] * (b.double() @ a.double())
    return found


#: Block-diagonal factors are no plain product.
CUT = [name for name in RESIZED if name != "bdlora"]


@pytest.mark.parametrize("name", CUT)
def test_a_smaller_rank_is_the_best_of_it(name: str, tmp_path: Path) -> None:
    """Resized down, the delta of each module is its truncated SVD, as float64 computes it."""
    sources, out, rank = RESIZED[name], tmp_path / "out", 2
    (adapter,) = sources.write(tmp_path)
    loratool.resize(adapter, out, rank=rank)
    assert_loads(sources.make, out)
    assert set(largest_ranks(out)) == {rank}
    before = layer_deltas(sources.make, adapter)
    right = {path: truncated(delta, rank) for path, delta in before.items()}
    assert_same(layer_deltas(sources.make, out), right, FLOAT32)


@pytest.mark.parametrize("name", [name for name in RESIZED if name.startswith("dora")])
def test_dora_magnitudes_stay_when_the_rank_falls(name: str, tmp_path: Path) -> None:
    """Of DoRA the factors are cut and the magnitudes keep every bit."""
    sources, out = RESIZED[name], tmp_path / "out"
    (adapter,) = sources.write(tmp_path)
    loratool.resize(adapter, out, rank=1)
    before, after = read(adapter), read(out)
    magnitudes = [key for key in before if "lora_magnitude" in key]
    assert magnitudes
    assert all(torch.equal(after[key], before[key]) for key in magnitudes)


@pytest.mark.parametrize("name", CUT)
def test_energy_gives_each_module_its_rank(name: str, tmp_path: Path) -> None:
    """With `energy` and `patterns` each module has the fewest ranks that keep so much, and PEFT
    loads them."""
    sources, out, energy = RESIZED[name], tmp_path / "out", 0.8
    (adapter,) = sources.write(tmp_path)
    loratool.resize(adapter, out, energy=energy, patterns=True)
    assert_loads(sources.make, out)
    after = layer_deltas(sources.make, out)
    for path, delta in layer_deltas(sources.make, adapter).items():
        squares = torch.linalg.svdvals(delta) ** 2
        shares = squares.cumsum(0) / squares.sum()
        rank = int((shares < energy).sum()) + 1
        found = torch.linalg.matrix_rank(after[path], rtol=1e-5)
        if "attention" not in name:  # both projections have one rank in PEFT, the larger one
            assert found == rank, path
            assert close_double(after[path], truncated(delta, rank), FLOAT32), path
        assert found >= rank


@pytest.mark.parametrize("multiple", [None, 3])
def test_energy_is_one_rank(tmp_path: Path, multiple: int | None) -> None:
    """A criterion gives all modules one rank, with `pad_to` a multiple of it."""
    sources, out = LAYERS["linear"], tmp_path / "out"
    adapter = sources.write(tmp_path)[0]
    report = loratool.resize(adapter, out, energy=0.5, pad_to=multiple)
    assert report.rank % (multiple or 1) == 0
    assert "ranks-differ" not in {n.code for n in report.warnings}
    assert set(largest_ranks(out)) == {report.rank}
    assert_loads(linears, out)


@pytest.mark.parametrize("written", ["float16", "bfloat16"])
def test_resized_half_precision_loads(written: str, tmp_path: Path) -> None:
    """resize writes other dtypes, and PEFT computes the same within their rounding."""
    sources, out = RESIZED["dora-linear"], tmp_path / "out"
    (adapter,) = sources.write(tmp_path)
    loratool.resize(adapter, out, rank=8, dtype=written)
    factors = [v for k, v in read(out).items() if "magnitude" not in k]
    assert {value.dtype for value in factors} == {getattr(torch, written)}
    found = output_of(assert_loads(linears, out), X12)
    assert close(found, loaded_output(sources, adapter), 8 * EPS[written])
