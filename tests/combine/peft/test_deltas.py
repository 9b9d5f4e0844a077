"""Deltas that combine makes are PEFT's."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.models import read_json
from helpers.peft_live import (
    FACTORS,
    KINDS,
    MIXES,
    SVD32,
    Live,
    assert_same,
    close_double,
    combined,
    drawn_alike,
    products,
    variants,
)

DENSE = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


@pytest.mark.parametrize("rank", [None, 2, 5])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_svd_equals_pefts_delta(
    kind: str, mix: str, rank: int | None, lives: dict[str, Live], tmp_path: Path
) -> None:
    """`svd` has the delta of PEFT's `svd`, at the largest rank of the adapters and at any other."""
    scene, (names, weights) = lives[kind], MIXES[mix]
    peft, config = scene.peft(names, weights, "svd", svd_rank=rank)
    out = tmp_path / "out"
    found = combined(scene.paths(names), out, weights=weights, method="svd", rank=rank)
    assert read_json(out / "adapter_config.json")["r"] == config.r == (rank or 4)
    assert_same(products(found), products(peft), SVD32)


@pytest.mark.parametrize("mix", ["negative", "three"])
@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("kind", KINDS)
def test_pruned_deltas_equal_pefts(
    kind: str, method: str, mix: str, lives: dict[str, Live], tmp_path: Path
) -> None:
    """The `*_svd` methods prune and elect in the dense deltas as PEFT does, and cut alike.

    Which entry is the last one kept could turn on the last bit of a delta; with these seeds no two
    magnitudes at the threshold and no sum of entries are so close to each other or to zero.
    """
    scene, (names, weights) = lives[kind], MIXES[mix]
    for number, options in enumerate(variants(method)):
        rank = (None, 2, 5)[number]
        with drawn_alike(scene, names, method, options["density"], number):
            peft, config = scene.peft(names, weights, method, svd_rank=rank, **options)
        out = tmp_path / str(number)
        found = combined(
            scene.paths(names), out, weights=weights, method=method, seed=number, rank=rank,
            **options,
        )  # fmt: skip
        assert read_json(out / "adapter_config.json")["r"] == config.r == (rank or 4)
        assert_same(products(found), products(peft), SVD32)


def test_methods_that_prune_differ_from_the_sum(lives: dict[str, Live], tmp_path: Path) -> None:
    """No two methods of PEFT give one result here, so a comparison tells them apart."""
    names, weights = MIXES["three"]
    found = []
    for method in ("sum", *FACTORS, *DENSE):
        options = {"density": 0.5} if method not in ("sum", "linear") else {}
        out = tmp_path / method
        sources = lives["linear"].paths(names)
        state = combined(sources, out, weights=weights, method=method, **options)
        found.append(products(state)["model.layers.0.self_attn.q_proj"])
    for number, one in enumerate(found):
        assert not any(close_double(one, other, 1e-2) for other in found[:number])
