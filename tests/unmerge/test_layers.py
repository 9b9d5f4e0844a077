"""Every layer kind, chain and vocabulary comes back bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers.files import load, small_lora, small_state, write_base
from helpers.layer_cases import (
    INPUTS,
    RESIZED,
    ROUNDED_ONCE,
    ROUNDED_TWICE,
    SEVERAL,
    TIED,
    TOKEN_ROWS,
    train_head,
    train_resized,
    write_adapters,
)
from helpers.models import lora, read_json, tiny_llama, train_on_disk
from helpers.unmerging import TORCH, UNDO, comes_back
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from loratool.storage.header import read_header

LAYERS = {**ROUNDED_ONCE, **{name: case for name, (case, _, _) in ROUNDED_TWICE.items()}}
#: Base dtype and output dtype: the default for most bases, and the one that keeps least.
PAIRS = {"half": ("BF16", "float16"), "narrow": ("F32", "bfloat16")}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_kind_comes_back(name: str, pair: str, tmp_path: Path) -> None:
    """Linear, Conv1D, embeddings, convolutions, attention, biases, DoRA, BD-LoRA, MiCA, replaced
    modules: what an adapter of PEFT changed is as it was."""
    stored, dtype = PAIRS[pair]
    trained = LAYERS[name].train(tmp_path, TORCH[stored])
    comes_back(trained.base, trained.adapter, tmp_path, dtype=dtype)


@pytest.mark.parametrize("weights", [[0.6, -1.4, 0.3], [0.0, -1.0, 0.0]])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SEVERAL)
def test_chained_adapters_come_back(
    name: str, kind: str, weights: list[float], tmp_path: Path
) -> None:
    """DoRA beside other adapters, in every order and with weights of either sign or zero."""
    adapters = write_adapters(tmp_path, INPUTS[kind][0], *SEVERAL[name])
    comes_back(tmp_path / "base", adapters, tmp_path, weights=weights[: len(adapters)])


#: One case of each way in which a delta is taken back; none replaces values.
PREDICTED = [
    "linear-wide", "conv1d-tall", "nn-conv2d", "embedding-tall", "attention", "bdlora-b", "mica",
    "linear-lora-bias", "nn-conv2d-lora-bias", "dora-linear-wide", "dora-conv1d-tall",
    "dora-embedding", "dora-nn-conv3d",
]  # fmt: skip


@pytest.mark.parametrize("name", PREDICTED)
def test_what_was_not_rounded_away_is_not_stored(name: str, tmp_path: Path) -> None:
    """A bfloat16 base merged in float32 is predicted nearly everywhere: the undo file is small
    because deltas, biases and DoRA's factors are taken back, not because it stores the base."""
    trained = LAYERS[name].train(tmp_path, torch.bfloat16)
    comes_back(trained.base, trained.adapter, tmp_path, dtype="float32")
    assert corrections(tmp_path / "out") <= 3


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", SEVERAL)
def test_chains_are_taken_back_in_their_order(name: str, kind: str, tmp_path: Path) -> None:
    """So are several adapters: the last one first, each with its own factors and weight."""
    case = INPUTS[kind][0]
    adapters = write_adapters(tmp_path, case, *SEVERAL[name])
    state = {n: t.bfloat16() for n, t in load(tmp_path / "base").items()}
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    weights = [0.6, -0.4, 0.3][: len(adapters)]
    comes_back(tmp_path / "base", adapters, tmp_path, weights=weights, dtype="float32")
    assert corrections(tmp_path / "out") <= 3


def corrections(merged: Path) -> int:
    """How many elements were not predicted; these tensors are of one chunk, which begins so."""
    entries, _ = read_header(merged / UNDO)
    content = (merged / UNDO).read_bytes()
    starts = [info.start for name, info in entries.items() if name.startswith("residual:")]
    return sum(int.from_bytes(content[start : start + 4], "little") for start in starts)


@pytest.mark.parametrize("on_disk", [False, True], ids=["one-matrix", "two-copies"])
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings_come_back(name: str, on_disk: bool, tmp_path: Path) -> None:
    """Where the merge untied embedding and head, the added head goes and the config ties again."""
    trained = train_on_disk(
        tmp_path, tiny_llama(tie_word_embeddings=True), copy.deepcopy(TIED[name][0])
    )
    if on_disk:
        state = trained.base_state()
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, trained.base / "model.safetensors", {"format": "pt"})
    comes_back(trained.base, trained.adapter, tmp_path)
    assert read_json(tmp_path / "back" / "config.json")["tie_word_embeddings"] is True


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [47, 64])
@pytest.mark.parametrize("name", RESIZED)
def test_a_resized_vocabulary_comes_back(name: str, size: int, tied: bool, tmp_path: Path) -> None:
    """Rows that were added go, rows that were cut off return, in weights and config."""
    trained = train_resized(tmp_path, size, tied, copy.deepcopy(RESIZED[name]))
    comes_back(trained.base, trained.adapter, tmp_path)
    assert read_json(tmp_path / "out" / "config.json")["vocab_size"] == size


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", TOKEN_ROWS)
def test_trained_token_rows_come_back(name: str, tied: bool, tmp_path: Path) -> None:
    """Rows that were replaced are the base's again."""
    config = lora("q_proj", trainable_token_indices=TOKEN_ROWS[name])
    trained = train_on_disk(tmp_path, tiny_llama(tie_word_embeddings=tied), config)
    comes_back(trained.base, trained.adapter, tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_added_head_goes(tied: bool, tmp_path: Path) -> None:
    """A classifier's head that the base lacks goes, with its labels and its class."""
    trained = train_head(tmp_path, AutoModelForSequenceClassification, "SEQ_CLS", tied)
    comes_back(trained.base, trained.adapter, tmp_path)
    assert "score.weight" in load(tmp_path / "out")
    assert read_json(tmp_path / "back" / "config.json")["architectures"] == ["LlamaForCausalLM"]


def test_parts_that_were_left_out_stay_out(tmp_path: Path) -> None:
    """A merge with --allow-unmatched is taken back without asking for the rest."""
    base = write_base(tmp_path / "base", small_state())
    lora_dir = small_lora(tmp_path / "lora")
    path = lora_dir / "adapter_model.safetensors"
    more = {k.replace("q_proj", "x_proj"): v for k, v in load_file(path).items()}
    save_file({**load_file(path), **more}, path)
    comes_back(base, lora_dir, tmp_path, allow_unmatched=True)
