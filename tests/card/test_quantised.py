"""Cards of models that are quantised, or were: sizes of the plain model, and what became of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.adapters import pair, write_adapter
from helpers.cards import blocks, data
from helpers.files import write_base
from helpers.quantised import llama_state, write_fp8_base, write_nf4_base

import loratool
from loratool.publishing.cards.document import make_card
from loratool.publishing.manifest import pack

Q, HEAD = "model.layers.0.self_attn.q_proj", "lm_head"


def bases(folder: Path) -> dict[str, Path]:
    state = llama_state(64)
    write_nf4_base(folder / "nf4", state)
    write_fp8_base(folder / "fp8", state)
    return {name: folder / name for name in ("nf4", "fp8")}


def lora(folder: Path, path: str = Q, rows: int = 64) -> Path:
    config = {"base_model_name_or_path": "org/base-bnb-4bit", "target_modules": [path]}
    return write_adapter(folder, pair(path, rows, 64), config)


KINDS = {
    "plain": ("nf4", Q, {}, ["(NF4): all of it was dequantised", "parameters in float16"]),
    "keep": ("fp8", Q, {}, [
        "what is adapted was dequantised, the rest is as it was",
        "(4 weights are quantised as FP8 in blocks of 128×128, all else is bfloat16)",
    ]),
    "untouched": ("nf4", HEAD, {}, [
        "what is quantised of it is as it was",
        "(7 weights are quantised as NF4, all else is bfloat16)",
    ]),
    "requantise": ("fp8", Q, {"quantised": "requantise"}, ["was quantised again"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_a_quantised_base(tmp_path: Path, kind: str) -> None:
    """What became of the base, parameters without packed tensors and scales, and whether loading
    takes a library; the result can be pushed."""
    base, path, options, words = KINDS[kind]
    rows = 32 if path == HEAD else 64
    out = tmp_path / "out"
    adapter = lora(tmp_path / "a", path, rows)
    loratool.merge(bases(tmp_path)[base], adapter, out, **options)
    text = make_card(out, None, repo_id="me/merged")
    assert data(text)["base_model_relation"] == "merge"
    for word in words:
        assert word in text
    count = sum(value.numel() for value in llama_state(64).values())
    assert f"{count:,} parameters" in text
    stays = kind != "plain"
    assert ("needs the library of that method" in text) == stays
    (command, *_) = blocks(text, "sh")
    assert ("--force" in command) == (kind == "requantise")
    manifest = pack(out)
    assert manifest.kind == "model"
    assert {"model.safetensors", "config.json"} <= manifest.needed


def test_a_dequantised_model(tmp_path: Path) -> None:
    """It is said to be the plain model of the other, and the command gives it again."""
    loratool.dequantise(bases(tmp_path)["nf4"], tmp_path / "out")
    text = make_card(tmp_path / "out", None)
    assert "dequantised: the plain model that its NF4 weights stand for" in text
    assert "parameters in float16" in text
    assert "base_model_relation" not in data(text)
    assert blocks(text, "sh")[0].strip() == "loratool dequantise nf4 -o OUT"
    assert "needs the library" not in text


def test_a_form_that_is_not_read(tmp_path: Path) -> None:
    """Nothing is counted that is not known, and it can be pushed all the same."""
    state = llama_state(64)
    del state[f"{Q}.weight"]
    state |= {f"{Q}.codes": torch.ones(64, 8, 1, dtype=torch.int16), f"{Q}.scales": torch.ones(64)}
    config = {"quantization_config": {"quant_method": "aqlm"}}
    folder = write_base(tmp_path / "model", state, config=config)
    text = make_card(folder, None)
    assert "of quantised weights" in text
    assert " parameters" not in text
    assert "needs the library of that method" in text
    assert pack(folder).kind == "model"


def test_uploaded_shards_of_which_the_headers_are_left(tmp_path: Path) -> None:
    """With --no-keep a shard is a header and zeros when the card is made: descriptions of weights
    are not there any more, and nothing is made up."""
    folder = bases(tmp_path)["nf4"]
    shard = folder / "model.safetensors"
    raw = shard.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    shard.write_bytes(raw[:end])
    with shard.open("r+b") as file:
        file.truncate(len(raw))
    text = make_card(folder, None)
    assert "of quantised weights" in text
    assert "needs the library of that method" in text
