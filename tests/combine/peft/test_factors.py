"""Factors that combine makes are PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.models import lora, read_json, step
from helpers.peft_live import (
    FACTORS,
    FLOAT32,
    KINDS,
    MIXES,
    Live,
    assert_same,
    assert_same_factors,
    combined,
    drawn_alike,
    in_dtype,
    linears,
    live,
    products,
    variants,
)
from helpers.peft_loading import WEIGHTS
from peft import PeftModel


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_cat_equals_pefts_factors(
    kind: str, mix: str, lives: dict[str, Live], tmp_path: Path
) -> None:
    """`cat` stacks the scaled A and the B as PEFT does, zeros behind where an adapter has none."""
    names, weights = MIXES[mix]
    peft, config = lives[kind].peft(names, weights, "cat")
    found = combined(lives[kind].paths(names), tmp_path / "out", weights=weights, method="cat")
    assert read_json(tmp_path / "out" / "adapter_config.json")["r"] == config.r
    assert_same_factors(found, peft)
    assert_same(products(found), lives[kind].sums(names, weights), FLOAT32)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_linear_equals_pefts_factors(
    kind: str, mix: str, lives: dict[str, Live], tmp_path: Path
) -> None:
    """`linear` gives PEFT's sums of the A and of the B, signs on the A."""
    names, weights = MIXES[mix]
    peft, config = lives[kind].peft(names, weights, "linear")
    found = combined(lives[kind].paths(names), tmp_path / "out", weights=weights, method="linear")
    assert read_json(tmp_path / "out" / "adapter_config.json")["r"] == config.r
    assert_same_factors(found, peft)


@pytest.mark.parametrize("mix", ["negative", "three"])
@pytest.mark.parametrize("method", FACTORS[1:])
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_factors_equal_pefts(
    kind: str, method: str, mix: str, lives: dict[str, Live], tmp_path: Path
) -> None:
    """Pruned and sign-elected factors are PEFT's, at every density and by both majorities."""
    scene, (names, weights) = lives[kind], MIXES[mix]
    for number, options in enumerate(variants(method)):
        with drawn_alike(scene, names, method, options["density"], number):
            peft, _ = scene.peft(names, weights, method, **options)
        found = combined(
            scene.paths(names), tmp_path / str(number), weights=weights, method=method,
            seed=number, **options,
        )  # fmt: skip
        assert_same_factors(found, peft)


@pytest.mark.parametrize("method", FACTORS[1:])
def test_density_one_prunes_nothing(method: str, lives: dict[str, Live], tmp_path: Path) -> None:
    """At density 1 all entries stay, in PEFT and here, and nothing is drawn."""
    scene, (names, weights) = lives["linear"], MIXES["three"]
    peft, _ = scene.peft(names, weights, method, density=1.0)
    sources = scene.paths(names)
    found = combined(sources, tmp_path / "out", weights=weights, method=method, density=1.0)
    assert_same_factors(found, peft)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("method", ["cat", "linear"])
def test_half_precision_factors_are_pefts(method: str, stored: str, tmp_path: Path) -> None:
    """Of half-precision adapters the factors are PEFT's, which computes them in float32."""
    scene = live(tmp_path, linears, lora("l", "z"), lora("l", "z", lora_alpha=2.5))
    halves = [
        in_dtype(folder, tmp_path / f"half-{folder.name}", stored) for folder in scene.paths("ab")
    ]
    loaded = PeftModel.from_pretrained(linears(), halves[0], adapter_name="a")
    loaded.load_adapter(halves[1], "b")
    peft, _ = Live(loaded, tmp_path).peft("ab", WEIGHTS, method)
    found = combined(halves, tmp_path / "out", weights=WEIGHTS, method=method, dtype="float32")
    assert_same_factors(found, peft)
    rounded = combined(halves, tmp_path / "rounded", weights=WEIGHTS, method=method)
    for key, value in found.items():
        # Rounded once, from float64: half a unit, and what float32 already lost of the reference.
        unit = step(value.abs(), getattr(torch, stored))
        assert bool(((rounded[key].double() - value).abs() <= (0.5 + 2**-10) * unit).all()), key
