"""Adapters that compute the same, written differently, combine to the same adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import PREFIX, WEIGHTS, K, Q, config_of, deltas, lora, write_adapter
from helpers.combining import assert_near
from safetensors.numpy import load_file

import loratool
from loratool.linalg.methods import METHODS

#: All but those that add up the factors as they are stored.
OF_DELTAS = sorted(n for n, m in METHODS.items() if n == "cat" or not m.keeps_factors)


@pytest.mark.parametrize("how", ["total", "frequency"])
@pytest.mark.parametrize("method", OF_DELTAS)
def test_resized_and_rescaled_adapters(tmp_path: Path, method: str, how: str) -> None:
    """Resized to its own rank, or with alpha in B, an adapter is the same to every such method."""
    sources = [lora(tmp_path / str(n), Q, K, rank=3 + n, lora_alpha=5 + n, seed=n) for n in (1, 2)]
    loratool.resize(sources[0], tmp_path / "resized", rank=4)
    tensors, config = load_file(sources[1] / WEIGHTS), config_of(sources[1])
    for path in (Q, K):
        tensors[f"{PREFIX}{path}.lora_B.weight"] *= np.float32(config["lora_alpha"] / config["r"])
    plain = write_adapter(tmp_path / "plain", tensors, {"r": 5, "lora_alpha": 5})
    options = {
        "method": method, "weights": [0.7, -1.2], "majority_sign_method": how, "rank": 9,
        "density": 0.55 if METHODS[method].prunes else None,
    }  # fmt: skip
    loratool.combine(sources, tmp_path / "a", **options)
    loratool.combine([tmp_path / "resized", plain], tmp_path / "b", **options)
    assert_near(deltas(tmp_path / "b"), deltas(tmp_path / "a"), 100)


@pytest.mark.parametrize("method", ["ties", "ties_svd", "ties_core", "knots_ties", "dare_ties_svd"])
def test_a_negated_adapter_and_a_negative_weight(tmp_path: Path, method: str) -> None:
    """Where signs are elected too, weight −w on an adapter is w on its negative."""
    one, two = (lora(tmp_path / str(n), Q, K, seed=n) for n in (1, 2))
    tensors = {n: -t if "lora_A" in n else t for n, t in load_file(two / WEIGHTS).items()}
    other = write_adapter(tmp_path / "other", tensors, {})
    for name, sources, sign in (("a", [one, two], -1), ("b", [one, other], 1)):
        loratool.combine(
            sources, tmp_path / name, method=method, density=0.6, weights=[0.7, sign * 1.2]
        )
    assert_near(deltas(tmp_path / "b"), deltas(tmp_path / "a"), 100)
