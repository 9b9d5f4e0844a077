"""Adapters of all layer kinds and options, and PEFT loading them with nothing left over."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.config import BdLoraConfig
from torch import nn

from helpers.models import read, token_ids, write_adapter
from helpers.peft_live import (
    Make,
    attention,
    blocks,
    convolution,
    convolutions,
    embeddings,
    gpt2,
    gpt_layers,
    linears,
    llama,
)


@dataclass(frozen=True)
class Sources:
    """A base, its inputs, and LoRA options of the adapters; `replaced` matches the tensors (or
    "0:" and the tensors of the first adapter) that are replaced as a whole, without weights."""

    make: Make
    inputs: torch.Tensor
    adapters: tuple[dict[str, Any], ...]
    replaced: str = ""

    def write(self, folder: Path) -> list[Path]:
        """The adapters on disk, each trained from the same base."""
        paths = []
        for number, options in enumerate(self.adapters):
            model = self.make()
            torch.manual_seed(20 + number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = LoraConfig(**{"r": 4, "lora_alpha": 3, "init_lora_weights": False,
                                       **options})  # fmt: skip
                write_adapter(folder / f"adapter-{number}", model, config)
            paths.append(folder / f"adapter-{number}")
        return paths

    def expected(self, adapters: Sequence[Path], weights: Sequence[float]) -> torch.Tensor:
        """What a plain model computes that has the base's weights and Σ w·(PEFT's own delta)."""
        model = self.make()
        base = {name: value.double() for name, value in model.state_dict().items()}
        total = dict(base)
        for number, (folder, weight) in enumerate(zip(adapters, weights, strict=True)):
            adapted = PeftModel.from_pretrained(self.make(), folder)
            merged = adapted.merge_and_unload().state_dict()
            for name, value in merged.items():
                delta = value.double() - base[name]
                replaced = any(
                    re.fullmatch(self.replaced, tried) for tried in (name, f"{number}:{name}")
                )
                total[name] = total[name] + (1.0 if replaced else weight) * delta
        model.load_state_dict({name: value.float() for name, value in total.items()})
        return output_of(model, self.inputs)

    def plain(self) -> torch.Tensor:
        return output_of(self.make(), self.inputs)


def output_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


@contextmanager
def loading() -> Iterator[list[tuple[list[str], list[str]]]]:
    """Collect the missing LoRA keys and the unexpected keys of everything that PEFT loads."""
    results: list[tuple[list[str], list[str]]] = []
    original = PeftModel.load_adapter

    def load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        missing = [key for key in result.missing_keys if "lora_" in key]
        results.append((missing, list(result.unexpected_keys)))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "load_adapter", load_adapter)
        yield results


def assert_loads(make: Make, folder: Path) -> PeftModel:
    """Load an adapter: no key of it is left over, none is missing, and all its values arrive."""
    with loading() as results:
        model = PeftModel.from_pretrained(make(), folder).eval()
    assert results == [([], [])]
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for key, value in read(folder).items():
        if ".lora_" in key:
            assert torch.equal(state[key], value.to(state[key].dtype)), key
    assert {k for k in state if ".lora_" in k} <= read(folder).keys()
    return model


X12 = torch.randn(5, 12, generator=torch.Generator().manual_seed(3))
IDS = torch.arange(30)
SIGNAL = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(4))
IMAGE = torch.randn(2, 5, 6, 6, generator=torch.Generator().manual_seed(5))
SEQUENCE = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(6))
WIDE = torch.randn(5, 24, generator=torch.Generator().manual_seed(8))
TOKENS = token_ids(length=8)

Options = dict[str, Any]


def on(*targets: str, **options: Any) -> Options:
    return {"target_modules": list(targets), **options}


#: Every kind of layer, with adapters that are alike in nothing.
LAYERS: dict[str, Sources] = {
    "linear": Sources(linears, X12, (on("l", "z"), on("l", r=3, use_rslora=True))),
    "linear-rank-above-width": Sources(linears, X12, (on("l", "z", r=16), on("l", r=14))),
    "conv1d-layers": Sources(
        gpt_layers, X12,
        (on("c_fc", "c_proj", fan_in_fan_out=True), on("c_fc", r=2, fan_in_fan_out=True)),
    ),
    "llama": Sources(
        llama, TOKENS,
        (on("q_proj", "down_proj"), {"target_modules": r".*\.(q_proj|k_proj)", "r": 2}),
    ),
    "gpt2": Sources(gpt2, TOKENS, (on("c_attn", "c_proj"), on("c_attn", "wte", r=2))),
    "nn-conv1d": Sources(convolution, SIGNAL, (on("l", "z"), on("l", r=3))),
    "nn-conv2d": Sources(convolutions, IMAGE, (on("l", "z", r=3), on("z", use_rslora=True))),
    "embedding": Sources(embeddings, IDS, (on("l", "z"), on("l", r=3))),
    "token-embedding": Sources(llama, TOKENS, (on("embed_tokens"), on("embed_tokens", "q_proj"))),
    "attention": Sources(
        attention, SEQUENCE, (on("l"), on("l", r=3, alpha_pattern={"l": 2.5})),
    ),
    "rank-pattern": Sources(
        linears, X12,
        (on("l", "z", rank_pattern={"z": 2}), on("l", "z", alpha_pattern={"l": 1.5})),
    ),
    "bdlora": Sources(
        blocks, WIDE,
        (on("l", use_bdlora=BdLoraConfig(target_modules_bd_a=["l"], nblocks=2)), on("l", r=3)),
    ),
}  # fmt: skip

#: What adapters hold beside their factors.
BESIDE: dict[str, Sources] = {
    "lora-bias": Sources(linears, X12, (on("l", lora_bias=True), on("l", "z", r=3))),
    "lora-bias-both": Sources(
        linears, X12,
        (on("l", lora_bias=True, use_rslora=True), on("l", "z", r=3, lora_bias=True)),
    ),
    "bias-all": Sources(linears, X12, (on("l", bias="all"), on("l", "z", r=3)), r".*\.bias"),
    "bias-lora-only": Sources(
        linears, X12, (on("l", r=3), on("z", bias="lora_only")), r".*\.bias",
    ),
    "both-biases": Sources(
        linears, X12, (on("l", bias="lora_only"), on("z", bias="lora_only")), r".*\.bias",
    ),
    "modules-to-save": Sources(
        linears, X12, (on("l", modules_to_save=["z"]), on("l", r=3)), r"z\..*",
    ),
    "saved-head": Sources(
        llama, TOKENS, (on("q_proj"), on("k_proj", modules_to_save=["lm_head"])), r"lm_head\..*",
    ),
    "saved-and-adapted": Sources(
        linears, X12, (on("l", modules_to_save=["z"]), on("l", "z", r=3)), r"0:z\..*",
    ),
    "saved-and-all-biases": Sources(
        linears, X12, (on("l", modules_to_save=["z"], bias="all"), on("l", r=3)),
        r"z\..*|.*\.bias",
    ),
    "token-rows": Sources(
        llama, TOKENS,
        (on("q_proj", trainable_token_indices={"embed_tokens": [3, 9, 20]}), on("q_proj", r=2)),
        r".*embed_tokens\.weight",
    ),
    "token-rows-as-a-list": Sources(
        llama, TOKENS,
        (on("q_proj", r=2), on("q_proj", trainable_token_indices=[4, 5])),
        r".*embed_tokens\.weight",
    ),
}  # fmt: skip

WEIGHTS = [0.7, -1.3]

#: float32 sums through a model of a few layers, as a share of the largest logit.
LOGITS = 1e-5
