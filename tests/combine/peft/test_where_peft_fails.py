"""Right where PEFT is not: rsLoRA, unlike ranks, unlike targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import State, close, lora, read_json, tiny_llama
from helpers.peft_live import (
    FLOAT32,
    KINDS,
    SVD32,
    Products,
    assert_same,
    assert_same_factors,
    close_double,
    combined,
    convolution,
    factors_of,
    linears,
    live,
    products,
    truncated,
)
from helpers.peft_loading import assert_loads, loading
from peft import LoraConfig, PeftModel


def scaled(state: State, scale: float) -> Products:
    return {path: scale * value for path, value in products(state).items()}


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_rslora_is_not_applied_twice(kind: str, method: str, tmp_path: Path) -> None:
    """Of rsLoRA adapters PEFT makes one that is √r too large; here the scale is in the factors."""
    make, targets, _ = KINDS[kind]
    configs = [lora(*targets, lora_alpha=alpha, use_rslora=True) for alpha in (6, 2.5)]
    scene, weights = live(tmp_path, make, *configs), [0.7, -1.3]
    options = {"density": 0.5} if method == "ties" else {}
    peft, config = scene.peft("ab", weights, method, **options)
    sources = scene.paths("ab")
    found = products(combined(sources, tmp_path / "out", weights=weights, method=method, **options))
    # The factors are right, but the config it gives them multiplies them with r/√r.
    assert config.use_rslora
    assert config.r == config.lora_alpha
    assert_same(found, products(peft), SVD32)
    if method == "cat":
        right = scene.sums("ab", weights)
        assert_same(found, right, FLOAT32)
        pefts = scaled(peft, config.lora_alpha / config.r**0.5)
        assert_same(pefts, {path: config.r**0.5 * delta for path, delta in right.items()}, FLOAT32)


def test_peft_itself_applies_the_rslora_scale_twice(tmp_path: Path) -> None:
    """What PEFT's live model computes with its combined rsLoRA adapter is off by √r as well."""
    configs = [lora("l", lora_alpha=alpha, use_rslora=True) for alpha in (6, 2.5)]
    scene, weights = live(tmp_path, linears, *configs), [0.7, -1.3]
    right = scene.sums("ab", weights)["l"]
    scene.model.add_weighted_adapter(["a", "b"], weights, "new", "cat")
    delta = scene.model.get_submodule("base_model.model.l").get_delta_weight("new").double()
    assert close_double(delta, 8**0.5 * right, FLOAT32)
    combined(scene.paths("ab"), tmp_path / "out", weights=weights)
    loaded = PeftModel.from_pretrained(linears(), tmp_path / "out")
    delta = loaded.get_submodule("base_model.model.l").get_delta_weight("default").double()
    assert close_double(delta, right, FLOAT32)


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_one_rslora_adapter_among_others(order: str, tmp_path: Path) -> None:
    """An rsLoRA and a plain adapter add up in either order; PEFT's result depends on the order."""
    scene = live(tmp_path, linears, lora("l", "z"), lora("l", "z", use_rslora=True))
    weights = [0.7, -1.3] if order == "ab" else [-1.3, 0.7]
    found = combined(scene.paths(order), tmp_path / "out", weights=weights)
    assert_same(products(found), scene.sums("ab", [0.7, -1.3]), FLOAT32)
    assert scene.peft(order, weights, "cat")[1].use_rslora == (order == "ba")


SOURCES: dict[str, list[dict[str, Any]]] = {
    "unequal-ranks": [{"r": 3}, {"r": 5, "lora_alpha": 2.5}],
    "rslora": [{"use_rslora": True}, {"r": 5, "lora_alpha": 2.5, "use_rslora": True}],
    "rank-pattern": [{"rank_pattern": {".*l|c_fc|q_proj": 2}}, {"r": 3, "rank_pattern": {"z": 6}}],
    "alpha-pattern": [{"alpha_pattern": {"l|c_fc|q_proj": 1.5}}, {"r": 2}],
    "both-patterns": [
        {"rank_pattern": {"l": 2, "q_proj": 1, "c_fc": 1}, "alpha_pattern": {".*": 7.5}},
        {"r": 2, "alpha_pattern": {"z|l": 3}, "use_rslora": True},
    ],
    "narrower": [{"r": 3}, {"fewer": True, "r": 2}],
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOURCES)
def test_sums_of_unlike_adapters_are_exact(name: str, kind: str, tmp_path: Path) -> None:
    """`sum`, `cat` and an uncut `svd` are Σ weight·scale·B·A, whatever ranks and scales go in."""
    make, targets, fewer = KINDS[kind]
    configs = []
    for source in SOURCES[name]:
        options = {k: v for k, v in source.items() if k != "fewer"}
        configs.append(lora(*(fewer if source.get("fewer") else targets), **options))
    scene, weights = live(tmp_path, make, *configs), [0.7, -1.3]
    right = scene.sums("ab", weights)
    runs = (("sum", None, True), ("cat", None, False), ("svd", 40, False))
    for method, rank, keep_patterns in runs:
        out = tmp_path / method
        found = combined(
            scene.paths("ab"), out, weights=weights, method=method, rank=rank,
            keep_patterns=keep_patterns,
        )  # fmt: skip
        assert_same(products(found), right, FLOAT32)
        with loading() as results:
            PeftModel.from_pretrained(make(), out)
        assert results == [([], [])]
        ranks = {value.shape[0] for key, value in found.items() if "_A" in key}
        assert keep_patterns or len(ranks) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_svd_of_unequal_ranks_is_the_best_of_its_rank(kind: str, tmp_path: Path) -> None:
    """`svd`, and `sum` with a rank, cut Σ weight·scale·B·A as a float64 SVD does."""
    make, targets, fewer = KINDS[kind]
    configs = [lora(*targets, r=3, use_rslora=True), lora(*fewer, r=5, lora_alpha=2.5)]
    scene, weights = live(tmp_path, make, *configs), [0.7, -1.3]
    sums = scene.sums("ab", weights)
    for method, rank, expected in (("svd", None, 5), ("svd", 2, 2), ("sum", 4, 4)):
        out = tmp_path / f"{method}-{rank}"
        found = combined(scene.paths("ab"), out, weights=weights, method=method, rank=rank)
        assert read_json(out / "adapter_config.json")["r"] == expected
        right = {path: truncated(delta, expected) for path, delta in sums.items()}
        assert_same(products(found), right, FLOAT32)


@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_ranks_count_as_filled_up_with_zeros(kind: str, method: str, tmp_path: Path) -> None:
    """Of unequal ranks, which PEFT refuses, factors are as PEFT's of the lower one with zeros."""
    make, targets, _ = KINDS[kind]
    unequal = live(tmp_path / "unequal", make, lora(*targets, r=3), lora(*targets, r=5))
    options = {"density": 1.0} if method == "ties" else {}
    weights = [0.7, -1.3]
    with pytest.raises(ValueError, match="same r value"):
        unequal.peft("ab", weights, method, **options)
    equal = live(
        tmp_path / "equal", make, lora(*targets, r=5, lora_alpha=10), lora(*targets, r=5)
    )  # α/r of the first is 6/3 in both
    others = dict(unequal.modules())
    for path, module in equal.modules():
        for name in "ab":
            b, a = factors_of(module, name)
            new_b, new_a = factors_of(others[path], name)
            b.zero_()[:, : new_b.shape[1]] = new_b
            a.zero_()[: new_a.shape[0]] = new_a
    peft, _ = equal.peft("ab", weights, method, **options)
    sources = unequal.paths("ab")
    found = combined(sources, tmp_path / "out", weights=weights, method=method, **options)
    assert_same_factors(found, peft)


@pytest.mark.parametrize("second", [{"target_modules": ".*z"}, {"target_modules": ["z"]}])
def test_targets_of_other_forms_are_joined(second: dict[str, Any], tmp_path: Path) -> None:
    """A list of names and a regular expression, which PEFT refuses to join, are joined."""
    first = LoraConfig(r=4, init_lora_weights=False, target_modules=["l"])
    other = LoraConfig(r=3, init_lora_weights=False, **second)
    scene = live(tmp_path, linears, first, other)
    if isinstance(second["target_modules"], str):
        with pytest.raises(ValueError, match="same target modules type"):
            scene.peft("ab", [1.0, 1.0], "cat")
    found = combined(scene.paths("ab"), tmp_path / "out")
    assert_same(products(found), scene.sums("ab", [1.0, 1.0]), FLOAT32)
    assert_loads(linears, tmp_path / "out")


def test_layers_of_the_second_adapter_are_not_lost(tmp_path: Path) -> None:
    """Adapters of different layers are joined; PEFT keeps only the layers of the first."""
    two = lambda: tiny_llama(num_hidden_layers=2)  # noqa: E731
    configs = [lora("q_proj", layers_to_transform=[i]) for i in (0, 1)]
    scene = live(tmp_path, two, *configs)
    found = combined(scene.paths("ab"), tmp_path / "out", weights=[0.5, 2.0])
    assert_same(products(found), scene.sums("ab", [0.5, 2.0]), FLOAT32)
    assert len(products(scene.peft("ab", [0.5, 2.0], "cat")[0])) == 1
    assert_loads(two, tmp_path / "out")


def test_nn_conv1d_is_cut_right(tmp_path: Path) -> None:
    """`svd` cuts the delta of an `nn.Conv1d`, of which PEFT does not know how to take an SVD."""
    scene = live(tmp_path, convolution, lora("l", "z"), lora("l", "z", lora_alpha=2.5))
    found = combined(scene.paths("ab"), tmp_path / "out", weights=[0.7, -1.3], method="svd")
    right = {p: truncated(d, 4) for p, d in scene.sums("ab", [0.7, -1.3]).items()}
    assert_same(products(found), right, FLOAT32)
    with pytest.raises(RuntimeError):
        scene.peft("ab", [0.7, -1.3], "svd")


def test_one_adapter_is_pruned_where_peft_falls_back_to_linear(tmp_path: Path) -> None:
    """With a single adapter `magnitude_prune` prunes; PEFT takes `linear` without a word."""
    scene = live(tmp_path, linears, lora("l"))
    found = combined(scene.paths("a"), tmp_path / "out", method="magnitude_prune", density=0.5)
    peft, _ = scene.peft("a", [1.0], "magnitude_prune", density=0.5)
    linear, _ = scene.peft("a", [1.0], "linear")
    for key, value in linear.items():
        assert torch.equal(peft[key], value)
        expected = torch.where(value.abs() > value.abs().median(), value, torch.zeros(()))
        assert close(found[key], expected, FLOAT32)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_untrained_modules_count_as_in_peft(method: str, tmp_path: Path) -> None:
    """A module whose B is zero, but not its A, takes part in the sums of factors as in PEFT."""
    scene = live(tmp_path, linears, lora("l", "z"), lora("l", "z"))
    scene.model.get_submodule("base_model.model.l").lora_B["b"].weight.data.zero_()
    scene.model.save_pretrained(tmp_path)
    options = {"density": 0.5} if method == "ties" else {}
    peft, _ = scene.peft("ab", [1.0, 1.0], method, **options)
    found = combined(scene.paths("ab"), tmp_path / "out", method=method, **options)
    assert_same_factors(found, peft)
