"""PEFT to a dialect and back: what is exact by its algebra comes back bit for bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import PREFIX, deltas, write_adapter
from helpers.dialects import DIALECTS
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import loratool
from loratool.adapters.dialects import TARGETS

BASE = DIALECTS / "bases" / "llama"
SHAPES = {
    f"model.layers.{layer}.{leaf}": tuple(value.shape)
    for layer in (0, 1)
    for name, value in load_file(BASE / "model.safetensors").items()
    for leaf in [name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")]
    if name.startswith(f"model.layers.{layer}.") and value.ndim == 2
}
OTHERS = sorted(TARGETS.keys() - {"peft"})


def _adapter(folder: Path, ranks: dict[str, int], scales: dict[str, float], seed: int) -> Path:
    """An adapter with these ranks and scales, by module."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for path, rank in ranks.items():
        out, width = SHAPES[path]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = rng.standard_normal((rank, width), np.float32)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = rng.standard_normal((out, rank), np.float32)
    config: dict[str, Any] = {
        "r": 1, "lora_alpha": 1, "rank_pattern": ranks,
        "alpha_pattern": {path: scales[path] * rank for path, rank in ranks.items()},
        "target_modules": sorted(ranks), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return write_adapter(folder, tensors, config)


def _there_and_back(source: Path, target: str, work: Path) -> Path:
    there, back = work / target, work / "back"
    report = loratool.convert(source, there, to=target, base=BASE)
    assert set(report.counts) <= {"exact"}, report.fates
    assert report.error == 0.0
    report = loratool.convert(there, back, to="peft", base=BASE)
    assert report.error == 0.0
    return back


@pytest.mark.parametrize("target", OTHERS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_factors_and_scales_come_back(target: str, data: st.DataObject) -> None:
    """One rank and one scale for all modules: the same bytes of every factor, the same scale."""
    paths = data.draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    if target in ("litgpt", "torchtune"):  # whose layers are alike, and their MLPs one thing
        leaves = {path.split(".", 3)[3] for path in paths}
        mlp = any(leaf.startswith("mlp.") for leaf in leaves)
        paths = [p for p in SHAPES if p.split(".", 3)[3] in leaves or (mlp and ".mlp." in p)]
    rank = data.draw(st.integers(1, 5))
    scale = data.draw(st.sampled_from([1, 2, 3, 8, 16, 20.5])) / rank  # of such alphas
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        ranks, scales = dict.fromkeys(paths, rank), dict.fromkeys(paths, scale)
        source = _adapter(work / "in", ranks, scales, data.draw(st.integers(0, 9)))
        back = _there_and_back(source, target, work)
        old, new = (load_file(f / "adapter_model.safetensors") for f in (source, back))
        assert old.keys() == new.keys()
        assert all(old[key].tobytes() == new[key].tobytes() for key in old)
        config = json.loads((back / "adapter_config.json").read_text())
        assert config["lora_alpha"] / config["r"] == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("target", OTHERS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_products_of_unlike_ranks_and_scales_come_back(target: str, data: st.DataObject) -> None:
    """Zeros up to the largest rank, and powers of two between the scales, change no product."""
    if target in ("litgpt", "torchtune"):
        paths = list(SHAPES)
    else:
        paths = data.draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=2, unique=True))
    # llama.cpp divides alpha by the rank of each factor, which is exact for these.
    some = st.sampled_from([1, 2, 4]) if target == "gguf" else st.integers(1, 4)
    ranks = {path: data.draw(some) for path in paths}
    scales = {path: 2.0 ** data.draw(st.integers(-3, 3)) for path in paths}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = _adapter(work / "in", ranks, scales, data.draw(st.integers(0, 9)))
        back = _there_and_back(source, target, work)
        old = deltas(source)
        new = loratool.inspect(back)
        tensors = load_file(back / "adapter_model.safetensors")
        scale = {module.path: module.scale for module in new.modules}
        for path, delta in old.items():
            a, b = (tensors[f"{PREFIX}{path}.lora_{side}.weight"] for side in "AB")
            product = (scale[path] or 0) * (b.astype(np.float64) @ a.astype(np.float64))
            assert np.allclose(product, delta, rtol=1e-12, atol=1e-12)
