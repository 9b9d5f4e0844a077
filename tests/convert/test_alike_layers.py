"""convert --to litgpt and --to torchtune: the same modules in all layers, and what has no place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.adapters import PREFIX, pair, write_adapter
from helpers.dialects import CASES, DIALECTS
from safetensors.numpy import load_file, save_file

import loratool
from loratool.adapters.dialects.litgpt.families import LLAMA, family_of
from loratool.errors import LoraToolError

BASE = DIALECTS / "bases/llama"
SHAPES = {k: v.shape for k, v in load_file(BASE / "model.safetensors").items()}
Q, V, GATE = (f"model.layers.0.{leaf}" for leaf in (
    "self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"))  # fmt: skip
BOTH = ("litgpt", "torchtune")
Tensors = dict[str, np.ndarray]


def on(*paths: str, rank: int = 2) -> Tensors:
    tensors: Tensors = {}
    for seed, path in enumerate(paths):
        tensors |= pair(path, *SHAPES[f"{path}.weight"], rank=rank, seed=seed)
    return tensors


def written(folder: Path, tensors: Tensors, **config: Any) -> Path:
    return write_adapter(folder, tensors, {"r": 2, "lora_alpha": 4, **config})


def merged(adapter: Path, out: Path, base: Path = BASE) -> Tensors:
    loratool.merge(base, adapter, out, dtype="float32")
    return load_file(out / "model.safetensors")


def based_on(folder: Path, **config: Any) -> Path:
    shutil.copytree(BASE, folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return folder


@pytest.mark.parametrize("to", BOTH)
def test_what_other_layers_lack_is_zero(to: str, tmp_path: Path) -> None:
    """q, v and gate of one layer become those of all, with up and down; nothing changes."""
    adapter = written(tmp_path / "in", on(Q, V, GATE))
    report = loratool.convert(adapter, tmp_path / to, to=to, base=BASE)
    assert (report.error, report.counts) == (0.0, {"exact": 3})
    assert [notice.code for notice in report.warnings] == ["filled-up"]
    one, other = merged(adapter, tmp_path / "one"), merged(tmp_path / to, tmp_path / "other")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    names = {
        "litgpt": {"transformer.h.1.attn.qkv.lora_A", "transformer.h.1.mlp.proj.lora_B"},
        "torchtune": {"layers.1.attn.v_proj.lora_a.weight", "layers.1.mlp.w3.lora_b.weight"},
    }
    state = torch.load(tmp_path / to / report.file, weights_only=True, mmap=True)
    assert names[to] <= state.get("model", state).keys()


def test_litgpt_is_told_of_the_factors_and_the_base(tmp_path: Path) -> None:
    """hyperparameters.yaml and model_config.yaml, by which its own commands read the file."""
    loratool.convert(written(tmp_path / "in", on(Q, V)), tmp_path / "out", to="litgpt", base=BASE)
    run, model = (
        yaml.safe_load((tmp_path / "out" / f"{name}.yaml").read_text())
        for name in ("hyperparameters", "model_config")
    )
    flags = {name for name, is_on in run.items() if is_on is True}
    assert (run["lora_r"], run["lora_alpha"], flags) == (2, 4, {"lora_query", "lora_value"})
    assert run["checkpoint_dir"] == "checkpoints/llama"
    wanted = yaml.safe_load((CASES["litgpt-qv"].adapter / "model_config.yaml").read_text())
    told = ("n_layer", "n_head", "n_query_groups", "head_size", "n_embd", "mlp_class_name",
            "intermediate_size", "padded_vocab_size", "norm_class_name", "rope_base",
            "bias")  # fmt: skip
    assert {key: model[key] for key in told} == {key: wanted[key] for key in told}


def test_torchtune_is_told_rank_and_alpha(tmp_path: Path) -> None:
    """adapter_config.json as its recipes write it, from which loratool reads them too."""
    loratool.convert(
        written(tmp_path / "in", on(Q, V)), tmp_path / "out", to="torchtune", base=BASE
    )
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("to", BOTH)
@pytest.mark.parametrize("name", ["torchtune-dora-epoch", "torchtune-epoch", "litgpt-all"])
def test_from_one_to_the_other(name: str, to: str, tmp_path: Path) -> None:
    """Orders of rows are turned there and back; litgpt has no magnitudes, and says so."""
    case = CASES[name]
    if (name, to) == ("torchtune-dora-epoch", "litgpt"):
        with pytest.raises(LoraToolError, match="no magnitudes"):
            loratool.convert(case.adapter, tmp_path / "out", to=to, base=case.base)
        return
    report = loratool.convert(case.adapter, tmp_path / "out", to=to, base=case.base)
    assert report.error == 0.0
    one = merged(case.adapter, tmp_path / "one", case.base)
    other = merged(tmp_path / "out", tmp_path / "other", case.base)
    assert all(np.array_equal(one[tensor], other[tensor]) for tensor in one)


def test_magnitudes_are_turned_like_rows(tmp_path: Path) -> None:
    """DoRA through PEFT is the file that torchtune wrote."""
    case = CASES["torchtune-dora-epoch"]
    loratool.convert(case.adapter, tmp_path / "peft", to="peft", base=case.base)
    loratool.convert(tmp_path / "peft", tmp_path / "out", to="torchtune", base=case.base)
    old, new = (
        torch.load(path, weights_only=True)
        for path in (case.adapter / "adapter_model.pt", tmp_path / "out/adapter_0.pt")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("to", BOTH)
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((2, 40), np.float32),
          f"{PREFIX}model.embed_tokens.lora_embedding_B": np.ones((16, 2), np.float32)},
         "alone"),
        ({f"{PREFIX}model.norm.weight": np.ones(16, np.float32)}, "factors alone"),
        (pair("model.layers.2.self_attn.q_proj", 24, 16, rank=2), "has 2 layers"),
        (pair("model.layers.1.self_attn.q_proj", 16, 16, rank=2), "in the base"),
        (pair("model.layers.1.self_attn.qkv_proj", 16, 16, rank=2), "alone"),
    ],
)  # fmt: skip
def test_what_has_no_place_is_refused(to: str, more: Tensors, words: str, tmp_path: Path) -> None:
    """Embeddings, whole tensors, other layers and shapes; all are named, nothing is written."""
    adapter = written(tmp_path / "in", on(Q) | more)
    with pytest.raises(LoraToolError, match=words):
        loratool.convert(adapter, tmp_path / "out", to=to, base=BASE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", BOTH)
def test_the_base_must_be_one_that_is_known(to: str, tmp_path: Path) -> None:
    """Without it, or for another family, there is one error that says what to do."""
    adapter = written(tmp_path / "in", on(Q))
    other = based_on(tmp_path / "other", model_type="gpt2")
    for base, hint in ((None, "--base"), (other, "is gpt2")):
        with pytest.raises(LoraToolError, match="known are bases of llama") as error:
            loratool.convert(adapter, tmp_path / "out", to=to, base=base)
        assert hint in error.value.hint


def test_bases_that_litgpt_has_no_layers_for_are_refused(tmp_path: Path) -> None:
    """Biases, other activations, other rotary positions."""
    adapter = written(tmp_path / "in", on(Q))
    for number, config in enumerate((
        {"attention_bias": True}, {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
    )):  # fmt: skip
        base = based_on(tmp_path / f"base{number}", **config)
        with pytest.raises(LoraToolError, match="litgpt"):
            loratool.convert(adapter, tmp_path / "out", to="litgpt", base=base)


def test_a_tensor_that_the_base_has_too_is_left_out(tmp_path: Path) -> None:
    """PEFT saves the head beside factors of it, as it was."""
    head = load_file(BASE / "model.safetensors")["lm_head.weight"]
    tensors = on("lm_head") | {f"{PREFIX}lm_head.base_layer.weight": head}
    for to in BOTH:
        report = loratool.convert(
            written(tmp_path / "in", tensors), tmp_path / to, to=to, base=BASE
        )
        assert report.error == 0.0
        assert {fate.what for fate in report.fates} == {"lm_head", "lm_head.weight"}


def test_a_head_that_is_the_embedding_has_no_factors_in_torchtune(tmp_path: Path) -> None:
    adapter = written(tmp_path / "in", on("lm_head"))
    base = based_on(tmp_path / "base", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors")
    with pytest.raises(LoraToolError, match="embedding for the head"):
        loratool.convert(adapter, tmp_path / "out", to="torchtune", base=base)


@pytest.mark.parametrize("name", ["phi-tuned", "falcon-llama", "Gemma-2-x", "qwen3", "Llama-2-7b"])
def test_names_of_bases_do_not_lead_litgpt_astray(name: str, tmp_path: Path) -> None:
    """litgpt goes by names on its way back to Hugging Face."""
    base = based_on(tmp_path / name)
    loratool.convert(written(tmp_path / "in", on(Q)), tmp_path / "out", to="litgpt", base=base)
    model = yaml.safe_load((tmp_path / "out/model_config.yaml").read_text())
    assert family_of(model, "") is LLAMA
    assert not model["name"].lower().startswith(("phi", "gemma", "qwen"))
