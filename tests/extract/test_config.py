"""The config that extract writes means exactly what the file holds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import WEIGHTS, codes, config_of
from helpers.extracting import (
    EVERYTHING,
    PREFIX,
    Q0,
    UP1,
    Pair,
    assert_selected,
    model,
    moved,
    products,
    random_for,
    ranks_of,
    saved,
    write,
)
from helpers.files import load
from safetensors.torch import load_file
from transformers import AutoConfig

import loratool


@pytest.mark.parametrize(
    "ends",
    [(), ("q_proj.weight",), (f"{Q0}.weight",), (f"{Q0}.weight", f"{UP1}.weight", "k_proj.bias"),
     ("q_proj.weight", "norm.weight"), ("q_proj.weight", "1.input_layernorm.weight"),
     ("1.self_attn.k_proj.weight", "1.self_attn.k_proj.bias", "lm_head.weight"),
     ("embed_tokens.weight", "model.norm.weight", "1.mlp.down_proj.weight")],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("patterns", [False, True])
def test_the_config_means_the_modules_of_the_file(
    tmp_path: Path, ends: tuple[str, ...], patterns: bool
) -> None:
    """target_modules, exclude_modules, modules_to_save and bias mean what is in the file."""
    state = model()
    pair = Pair(tmp_path, state, moved(state, *ends))
    report = pair.extract(energy=0.8, patterns=patterns, **(EVERYTHING if patterns else {}))
    assert_selected(pair.out, state)
    config = config_of(pair.out)
    assert config["r"] == config["lora_alpha"] == report.rank
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert (config["task_type"], config["peft_type"]) == ("CAUSAL_LM", "LORA")
    merged = loratool.merge(pair.base, pair.out, tmp_path / "merged", dtype="float32")
    assert merged
    back = load(tmp_path / "merged")
    parts = products(pair.out)
    for name, value in load(pair.base).items():
        expected = saved(pair.out).get(name, value).double() + parts.get(name, 0.0)
        assert torch.allclose(back[name].double(), expected, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize(
    ("ends", "bias"),
    [
        (("k_proj.weight",), "none"),
        (("k_proj.weight", "k_proj.bias"), "lora_only"),
        (("k_proj.weight", "0.self_attn.k_proj.bias"), "lora_only"),
        (("q_proj.weight", "k_proj.bias"), "all"),
        (("0.self_attn.k_proj.weight", "k_proj.bias"), "all"),
    ],
    ids=str,
)
def test_bias_says_whose_biases_are_in_the_file(
    tmp_path: Path, ends: tuple[str, ...], bias: str
) -> None:
    """`bias` is lora_only where only biases of adapted layers changed, and all where others did;
    those of adapted layers have `base_layer` in their name, the others not."""
    state = model()
    pair = Pair(tmp_path, state, moved(state, *ends))
    pair.extract(rank=2, save=["biases"])
    adapted = {n.removesuffix(".weight") for n in products(pair.out)}
    for name in load_file(pair.out / WEIGHTS):
        if name.endswith(".bias"):
            path = name.removeprefix(PREFIX).removesuffix(".bias").removesuffix(".base_layer")
            assert (".base_layer." in name) == (path in adapted)
    assert config_of(pair.out)["bias"] == bias


@pytest.mark.parametrize(
    ("names", "changed"),
    [
        (["proj", "enc.proj"], ["enc.proj"]),
        (["proj", "enc.proj"], ["proj"]),
        (["0.proj", "enc.0.proj", "enc.1.proj"], ["enc.0.proj", "enc.1.proj"]),
        (["layers.0.q", "enc.layers.0.q", "enc.layers.1.q"], ["enc.layers.0.q", "enc.layers.1.q"]),
        (["layers.0.q", "enc.layers.0.q", "enc.layers.1.q", "x.q"], ["layers.0.q"]),
        (["enc.0", "enc.1", "enc.2"], ["enc.1"]),
        (["enc.0", "enc.10", "dec.0"], ["enc.0", "dec.0"]),
    ],
    ids=str,
)
def test_paths_that_end_like_others_are_told_apart(
    tmp_path: Path, names: list[str], changed: list[str]
) -> None:
    """A path that is the end of another one is neither selected nor excluded by mistake."""
    state = {f"{n}.weight": random_for(n, 6, 6).float() for n in names}
    tuned = {n: t.clone() for n, t in state.items()}
    for name in changed:
        tuned[f"{name}.weight"] = moved(state)[f"{name}.weight"]
    pair = Pair(tmp_path, state, tuned)
    pair.extract(rank=2)
    assert products(pair.out).keys() == {f"{n}.weight" for n in changed}
    assert_selected(pair.out, state)


def test_different_ranks_are_told_apart_by_path(tmp_path: Path) -> None:
    """Where one path ends like another and both have ranks of their own, the patterns agree."""
    state = {f"{n}.weight": random_for(n, 9, 9).float() for n in ("q", "a.q", "b.a.q")}
    tuned = {n: moved(state, decay=d)[n] for n, d in zip(state, (0.3, 0.6, 0.9), strict=True)}
    pair = Pair(tmp_path, state, tuned)
    report = pair.extract(energy=0.9, patterns=True)
    assert len(set(ranks_of(report).values())) == 3
    assert len(products(pair.out)) == 3  # which checks every rank and alpha


def test_the_base_is_named_as_it_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """base_model_name_or_path is --base-name, else the base's absolute path, however it was given.
    What its config.json calls it is the model that it was made from, and no name for it."""
    pair = Pair(tmp_path, model(), moved(model()), _name_or_path="org/parent")
    monkeypatch.chdir(tmp_path)
    for base in (pair.base, "in/base", "in/../in/base/", pair.base / "model.safetensors"):
        report = loratool.extract(base, pair.tuned, pair.out, rank=1, overwrite=True)
        assert config_of(pair.out)["base_model_name_or_path"] == str(pair.base)
        assert "base-name" not in codes(report)
    assert AutoConfig.from_pretrained(pair.base).model_type == "llama"
    pair.extract(rank=1, base_name="org/mine")
    assert config_of(pair.out)["base_model_name_or_path"] == "org/mine"


def test_a_base_of_the_download_cache_is_named_by_its_id(tmp_path: Path) -> None:
    """A snapshot, and a link to one, has the id of its repository; a folder inside of one has no
    name that loads it."""
    pair = Pair(tmp_path, model(), moved(model()))
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(pair.base, snapshot)
    shutil.copytree(pair.base, snapshot / "inner")
    (tmp_path / "link").symlink_to(snapshot)
    for base in (snapshot, tmp_path / "link"):
        report = loratool.extract(base, pair.tuned, pair.out, rank=1, overwrite=True)
        assert config_of(pair.out)["base_model_name_or_path"] == "org/tiny"
        assert "base-name" not in codes(report)
    report = loratool.extract(snapshot / "inner", pair.tuned, pair.out, rank=1, overwrite=True)
    assert config_of(pair.out)["base_model_name_or_path"] is None
    assert "base-name" in codes(report)


@pytest.mark.parametrize("kind", ["bare", "no config", "no type", "odd name"])
def test_a_base_that_nothing_loads_has_no_name_but_a_warning(tmp_path: Path, kind: str) -> None:
    """Weights without a config.json of a known architecture, or under a name that no library looks
    for: the config names no base, and a warning points to --base-name."""
    pair = Pair(tmp_path, model(), moved(model()))
    base = pair.base
    if kind == "bare":
        base = write(tmp_path / "bare", model(), "bare")
    elif kind == "no config":
        (base / "config.json").unlink()
    elif kind == "no type":
        (base / "config.json").write_text("{}")
    else:
        base = (base / "model.safetensors").rename(base / "weights.safetensors")
    report = loratool.extract(base, pair.tuned, pair.out, rank=1)
    assert config_of(pair.out)["base_model_name_or_path"] is None
    (notice,) = [n for n in report.warnings if n.code == "base-name"]
    assert str(base) in notice.message
    assert "--base-name" in notice.message
    report = loratool.extract(
        base, pair.tuned, pair.out, rank=1, base_name="org/mine", overwrite=True
    )
    assert "base-name" not in codes(report)
