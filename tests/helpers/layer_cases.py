"""Every kind of layer that PEFT adapts, with bases and adapters of it on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from helpers.models import (
    Holder,
    State,
    Trained,
    close,
    lora,
    shake,
    tiny_llama,
    token_ids,
    train,
    write_adapter,
    write_base,
    write_json,
)
from loratool.errors import LoraToolError

GPT2 = {"model_type": "gpt2"}


@dataclass(frozen=True)
class Case:
    """A model of one layer kind and the LoRA options to adapt it with."""

    make: Callable[[], nn.Module]
    targets: tuple[str, ...] = ("l",)
    options: dict[str, Any] = field(default_factory=dict)
    base_config: dict[str, Any] | None = None

    def train(self, folder: Path, dtype: torch.dtype = torch.float32) -> Trained:
        torch.manual_seed(0)
        config = lora(*self.targets, **self.options)
        return train(folder, self.make(), config, dtype, self.base_config)


def linear(inner: int, outer: int, **options: Any) -> Case:
    return Case(lambda: Holder(l=nn.Linear(inner, outer)), options=options)


def conv1d(inner: int, outer: int, **options: Any) -> Case:
    """The `Conv1D` of GPT-2, whose weight is stored [in, out]."""
    return Case(lambda: Holder(c_fc=Conv1D(outer, inner)), ("c_fc",), options, GPT2)


def embedding(tokens: int, width: int, **options: Any) -> Case:
    return Case(lambda: Holder(l=nn.Embedding(tokens, width)), options=options)


def layer(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(lambda: Holder(l=make()), options=options)


def two_linear(**options: Any) -> Case:
    """Two layers of which only the first is a target."""
    return Case(lambda: Holder(l=nn.Linear(12, 20), z=nn.Linear(20, 6)), options=options)


DORA = {"use_dora": True}

ROUNDED_ONCE = {
    "linear-wide": linear(40, 24),
    "linear-tall": linear(24, 40),
    "linear-square": linear(32, 32),
    "linear-rank-1": linear(24, 40, r=1),
    "linear-rank-above-width": linear(8, 12, r=24),
    "linear-one-row": linear(17, 1),
    "linear-one-column": linear(1, 17),
    "linear-rslora": linear(24, 32, use_rslora=True),
    "linear-float-alpha": linear(24, 32, lora_alpha=6.5),
    "linear-float-alpha-rslora": linear(24, 32, lora_alpha=6.5, r=5, use_rslora=True),
    "linear-alpha-pattern": linear(24, 32, alpha_pattern={"l": 2.5}),
    "linear-lora-bias": linear(24, 32, lora_bias=True),
    "linear-lora-bias-rslora": linear(24, 32, lora_bias=True, use_rslora=True),
    "conv1d-wide": conv1d(40, 24),
    "conv1d-tall": conv1d(24, 40),
    "conv1d-square": conv1d(32, 32),
    "conv1d-rank-1": conv1d(24, 40, r=1),
    "conv1d-rank-above-width": conv1d(8, 12, r=24),
    "conv1d-lora-bias": conv1d(24, 40, lora_bias=True),
    "nn-conv1d": layer(lambda: nn.Conv1d(6, 8, 3)),
    "nn-conv2d": layer(lambda: nn.Conv2d(6, 8, 3)),
    "nn-conv2d-1x1": layer(lambda: nn.Conv2d(6, 8, 1)),
    "nn-conv2d-oblong": layer(lambda: nn.Conv2d(8, 6, (3, 5), stride=2, padding=1, dilation=2)),
    "nn-conv2d-lora-bias": layer(lambda: nn.Conv2d(6, 8, 3), lora_bias=True),
    "nn-conv3d": layer(lambda: nn.Conv3d(4, 6, (1, 2, 3))),
    "dora-linear-wide": linear(40, 24, **DORA),
    "dora-linear-tall": linear(24, 40, **DORA),
    "dora-linear-square": linear(32, 32, **DORA),
    "dora-linear-rslora": linear(24, 32, use_rslora=True, **DORA),
    "dora-conv1d-wide": conv1d(40, 24, **DORA),
    "dora-conv1d-tall": conv1d(24, 40, **DORA),
    "dora-conv1d-square": conv1d(32, 32, **DORA),
    "dora-embedding": embedding(50, 24, **DORA),
    "dora-embedding-square": embedding(24, 24, **DORA),
    "dora-nn-conv1d": layer(lambda: nn.Conv1d(6, 8, 3), **DORA),
    "dora-nn-conv2d": layer(lambda: nn.Conv2d(6, 8, 3), **DORA),
    "dora-nn-conv3d": layer(lambda: nn.Conv3d(4, 6, (1, 2, 3)), **DORA),
    "bias-all": two_linear(bias="all"),
    "bias-lora-only": two_linear(bias="lora_only"),
    "modules-to-save": two_linear(modules_to_save=["z"]),
}


def linear_delta(adapter: State, scale: float) -> dict[str, torch.Tensor]:
    return {"l.weight": scale * (adapter["l.lora_B.weight"] @ adapter["l.lora_A.weight"])}


def embedding_delta(adapter: State, scale: float) -> dict[str, torch.Tensor]:
    product = adapter["l.lora_embedding_B"] @ adapter["l.lora_embedding_A"]
    return {"l.weight": scale * product.T}


def attention_delta(adapter: State, scale: float) -> dict[str, torch.Tensor]:
    """PEFT's forward pass applies the delta of the output projection twice."""
    inner = {k.replace("l.base_layer.out_proj", "l"): v for k, v in adapter.items() if "out" in k}
    outer = {k: v for k, v in adapter.items() if "out_proj" not in k}
    return {
        "l.in_proj_weight": linear_delta(outer, scale)["l.weight"],
        "l.out_proj.weight": linear_delta(inner, 2 * scale)["l.weight"],
    }


def block_delta(side: str) -> Callable[[State, float], dict[str, torch.Tensor]]:
    """Two blocks on the diagonal of one factor, stored one above the other."""

    def delta(adapter: State, scale: float) -> dict[str, torch.Tensor]:
        key = f"l.lora_{side}.weight"
        return linear_delta({**adapter, key: torch.block_diag(*adapter[key].chunk(2))}, scale)

    return delta


def attention(**options: Any) -> Case:
    return layer(lambda: nn.MultiheadAttention(16, 2), lora_alpha=1, **options)


BLOCKS_A = BdLoraConfig(target_modules_bd_a=["l"], nblocks=2)
BLOCKS_B = BdLoraConfig(target_modules_bd_b=["l"], nblocks=2)

Delta = Callable[[State, float], dict[str, torch.Tensor]]

#: Case, scale and the deltas by tensor.
ROUNDED_TWICE: dict[str, tuple[Case, float, Delta]] = {
    "embedding-tall": (embedding(50, 24, lora_alpha=1), 1 / 4, embedding_delta),
    "embedding-wide": (embedding(24, 50, lora_alpha=1), 1 / 4, embedding_delta),
    "embedding-square": (embedding(24, 24, lora_alpha=1), 1 / 4, embedding_delta),
    "embedding-rank-1": (embedding(50, 24, r=1, lora_alpha=0.5), 0.5, embedding_delta),
    "embedding-rslora": (embedding(50, 24, lora_alpha=1, use_rslora=True), 0.5, embedding_delta),
    "attention": (attention(), 1 / 4, attention_delta),
    "attention-rslora": (attention(use_rslora=True), 1 / 2, attention_delta),
    "attention-patterns": (
        attention(rank_pattern={"l": 2}, alpha_pattern={"l": 3}), 3 / 2, attention_delta,
    ),
    "bdlora-a": (linear(24, 32, use_bdlora=BLOCKS_A), 6 / 4, block_delta("A")),
    "bdlora-b": (linear(24, 32, use_bdlora=BLOCKS_B), 6 / 4, block_delta("B")),
    "mica": (linear(24, 32, init_lora_weights="mica"), 6 / 4, linear_delta),
}  # fmt: skip


def write_adapters(folder: Path, case: Case, *options: dict[str, Any]) -> list[Path]:
    """One adapter per table of options, all for the base of `case` in folder/base."""
    torch.manual_seed(0)
    model = case.make()
    write_base(folder / "base", model, case.base_config)
    found = []
    for i, changes in enumerate(options):
        torch.manual_seed(10 + i)
        config = lora(*case.targets, **{**case.options, **changes})
        write_adapter(folder / f"adapter-{i}", copy.deepcopy(model), config)
        found.append(folder / f"adapter-{i}")
    return found


SEVERAL = {
    "two-dora": ({"use_dora": True}, {"use_dora": True, "r": 3}),
    "dora-and-plain": ({"use_dora": True}, {}),
    "plain-and-dora": ({"r": 3}, {"use_dora": True}),
    "three": ({"use_dora": True}, {"r": 3}, {"use_dora": True, "use_rslora": True}),
}

INPUTS = {
    "linear": (linear(12, 20), torch.randn(5, 12, generator=torch.Generator().manual_seed(0))),
    "conv1d": (conv1d(12, 20), torch.randn(5, 12, generator=torch.Generator().manual_seed(0))),
    "embedding": (embedding(30, 8), torch.arange(30)),
    "conv2d": (
        layer(lambda: nn.Conv2d(6, 8, 3)),
        torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0)),
    ),
}


def write_shards(state: State, folder: Path, count: int, suffix: str) -> None:
    """Deal the tensors out to `count` files, with an index if there are several."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i in range(count):
        name = f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}" if count > 1 else f"{stem}.{suffix}"
        part = {k: state[k] for k in sorted(state)[i::count]}
        if suffix == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if count > 1:
        write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": weight_map})


def same_logits(
    model: nn.Module, expected: nn.Module, vocabulary: int = 48, tolerance: float = 1e-5
) -> bool:
    """True if two models give the same logits for the same tokens."""
    ids = token_ids(vocabulary)
    with torch.no_grad():
        wanted = expected(input_ids=ids).logits
        return close(model(input_ids=ids).logits, wanted, tolerance)


def merged_model(trained: Trained, auto: type = AutoModelForCausalLM) -> PreTrainedModel:
    out = trained.base.parent / "merged"
    trained.merge(out, dtype="float32")
    model: PreTrainedModel = auto.from_pretrained(out, dtype=torch.float32).eval()
    return model


TOKEN_ROWS: dict[str, list[int] | dict[str, list[int]]] = {
    "list": [7, 3, 11],
    "dict": {"embed_tokens": [40, 3, 4, 5]},
    "dict-path": {"model.embed_tokens": [40, 3]},
    "head-alike": {"embed_tokens": [9, 4], "lm_head": [9, 4]},
}

RESIZED = {
    "lora-elsewhere": lora("q_proj"),
    "lora-on-both": lora("q_proj", "embed_tokens", "lm_head"),
    "modules-to-save": lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]),
    "token-rows": lora("q_proj", trainable_token_indices=[40, 3, 46]),
}


def train_resized(folder: Path, size: int, tied: bool, config: LoraConfig) -> Trained:
    """Adapt a model whose vocabulary was resized after its base was written."""
    base, adapter = folder / "base", folder / "adapter"
    tiny_llama(tie_word_embeddings=tied).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    model.resize_token_embeddings(size)
    adapted = get_peft_model(model, config)
    shake(adapted)
    adapted.save_pretrained(adapter)
    return Trained(base, adapter, adapted.eval())


#: Options, and whether one matrix can still serve as embedding and head.
TIED: dict[str, tuple[LoraConfig, bool]] = {
    "neither": (lora("q_proj"), True),
    "embedding": (lora("q_proj", "embed_tokens"), False),
    "embedding-dora": (lora("q_proj", "embed_tokens", use_dora=True), False),
    "head": (lora("q_proj", "lm_head"), False),
    "both": (lora("embed_tokens", "lm_head"), False),
    "saved-embedding": (lora("q_proj", modules_to_save=["embed_tokens"]), False),
    "saved-head": (lora("q_proj", modules_to_save=["lm_head"]), False),
    "ensure-lora": (lora("q_proj", "embed_tokens", ensure_weight_tying=True), True),
    # Magnitudes belong to one dimension of the embedding and to the other one of the head.
    "ensure-dora": (
        lora("q_proj", "embed_tokens", use_dora=True, ensure_weight_tying=True), False,
    ),
    "ensure-both": (lora("embed_tokens", "lm_head", ensure_weight_tying=True), True),
    "ensure-saved": (
        lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True), True,
    ),
    "ensure-rows": (
        lora("q_proj", trainable_token_indices=[3, 9], ensure_weight_tying=True), True,
    ),
}  # fmt: skip


def train_head(folder: Path, auto: type, task: str, tied: bool, **options: Any) -> Trained:
    base, adapter = folder / "base", folder / "adapter"
    tiny_llama(tie_word_embeddings=tied).save_pretrained(base)
    torch.manual_seed(1)
    model = auto.from_pretrained(base, num_labels=5, dtype=torch.float32)
    config = lora("q_proj", "v_proj", task_type=task, **options)
    adapted = get_peft_model(model, config)
    shake(adapted)
    adapted.save_pretrained(adapter)
    return Trained(base, adapter, adapted.eval())


def refuse(trained: Trained, error: type[LoraToolError], reason: str) -> None:
    """Merging raises `error` for this reason and leaves nothing behind."""
    before = sorted(trained.base.parent.iterdir())
    with pytest.raises(error, match=reason) as caught:
        trained.merge()
    assert sorted(trained.base.parent.iterdir()) == before
    assert caught.value.hint


def edit_adapter(trained: Trained, change: Callable[[State], State]) -> None:
    path = trained.adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def edit_base(trained: Trained, change: Callable[[State], State]) -> None:
    path = trained.base / "model.safetensors"
    save_file(change(load_file(path)), path)
