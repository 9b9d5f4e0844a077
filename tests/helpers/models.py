"""Tiny models, adapters that PEFT trained on them (random values stand in for training), and
comparisons of what `loratool.merge` writes with what PEFT computes."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

import helpers.cardless  # noqa: F401  # by being imported
import loratool

os.environ.setdefault("HF_HUB_OFFLINE", "1")

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()

State = dict[str, torch.Tensor]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Holder(nn.Module):
    """A model that is nothing but its layers, one after the other, under the names given."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@dataclass
class Trained:
    """A base on disk, an adapter on disk, and the PEFT model both came from."""

    base: Path
    adapter: Path
    model: PeftModel

    def peft_merge(self) -> State:
        """What PEFT's own merge makes of the model, by tensor name."""
        with torch.no_grad():
            merged = copy.deepcopy(self.model).merge_and_unload()
        return {name: value.detach() for name, value in merged.state_dict().items()}

    def merge(self, output: Path | None = None, **options: Any) -> State:
        """What loratool makes of base and adapter, by tensor name; each tensor keeps its dtype."""
        output = output or self.base.parent / "merged"
        loratool.merge(self.base, self.adapter, output, **{"dtype": "base", **options})
        return read(output)

    def base_state(self) -> State:
        return read(self.base)


def lora(*targets: str, **options: Any) -> LoraConfig:
    """A LoRA config whose B does not start at zero, so that there is something to merge."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    return LoraConfig(**{**settings, "target_modules": list(targets) or None, **options})


def shake(model: nn.Module, amount: float = 0.05) -> None:
    """Move all trainable parameters but the factors, which are random already, as training would:
    magnitudes, biases, saved modules, token rows."""
    for name, parameter in model.named_parameters():
        factor = ("lora_A." in name or "lora_B." in name) and name.endswith(".weight")
        random = (factor or "lora_embedding" in name) and bool(parameter.any())
        if parameter.requires_grad and not random:
            noise = amount * torch.randn(parameter.shape)
            parameter.data += noise.to(parameter.dtype)


def write_base(folder: Path, model: nn.Module, base_config: dict[str, Any] | None = None) -> None:
    """Write a plain model as a base directory, with a config.json if one is given."""
    folder.mkdir(parents=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    if base_config is not None:
        write_json(folder / "config.json", base_config)


def write_adapter(folder: Path, model: nn.Module, config: PeftConfig) -> PeftModel:
    """Adapt `model` in place, give the adapter values and write it."""
    adapted = get_peft_model(model, config)
    shake(adapted)
    adapted.save_pretrained(folder)
    return adapted.eval()


def train(
    folder: Path,
    model: nn.Module,
    config: PeftConfig,
    dtype: torch.dtype = torch.float32,
    base_config: dict[str, Any] | None = None,
) -> Trained:
    """Write `model` to folder/base, adapt it and write the adapter to folder/adapter."""
    torch.manual_seed(1)
    base, adapter = folder / "base", folder / "adapter"
    write_base(base, model.to(dtype), base_config)
    return Trained(base, adapter, write_adapter(adapter, model, config))


def train_on_disk(folder: Path, model: PreTrainedModel, config: PeftConfig) -> Trained:
    """Like `train`, for a transformers model, which writes its base itself as on the Hub."""
    torch.manual_seed(1)
    base, adapter = folder / "base", folder / "adapter"
    model.save_pretrained(base)
    return Trained(base, adapter, write_adapter(adapter, model, config))


def tiny_llama_config(**options: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return LlamaConfig(**{**settings, **options})


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(**options)).eval()


def token_ids(vocabulary: int = 48, length: int = 12) -> torch.Tensor:
    """Two rows of token ids without special tokens."""
    torch.manual_seed(7)
    return torch.randint(3, vocabulary, (2, length))


def read(folder: Path) -> State:
    """All tensors of a checkpoint directory."""
    found: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_config(adapter: Path, **changes: Any) -> None:
    """Set fields of an adapter's adapter_config.json."""
    path = adapter / "adapter_config.json"
    write_json(path, {**read_json(path), **changes})


def once_rounded(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`W + Δ` computed in float32 and rounded once to the dtype of W."""
    return (weight.float() + delta.float()).to(weight.dtype)


def ulps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between the elements of two tensors of one dtype."""
    assert one.dtype == other.dtype, f"{one.dtype} is not {other.dtype}"
    assert one.shape == other.shape, f"{one.shape} is not {other.shape}"
    return (_ordered(one) - _ordered(other)).abs()


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Integers that count representable numbers upwards from zero, negative ones below."""
    bits = values.contiguous().view(_BITS[values.dtype])
    smallest = torch.iinfo(bits.dtype).min
    wide = bits.long()
    return torch.where(wide < 0, smallest - wide, wide)


def step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance from each number to the next larger one of `dtype`, in float64."""
    limits = torch.finfo(dtype)
    exponents = torch.frexp(values.double().clamp(min=limits.tiny)).exponent
    return torch.ldexp(torch.full_like(values, limits.eps, dtype=torch.float64), exponents - 1)


def differing(found: State, expected: State) -> dict[str, str]:
    """The tensors whose bytes differ, and how; {} where two checkpoints are the same."""
    report = {}
    for name in found.keys() ^ expected.keys():
        report[name] = "missing" if name in expected else "not expected"
    for name in found.keys() & expected.keys():
        one, other = found[name], expected[name]
        if one.dtype != other.dtype or one.shape != other.shape:
            report[name] = f"{one.dtype} {[*one.shape]} is not {other.dtype} {[*other.shape]}"
        elif not torch.equal(_integers(one), _integers(other)):
            steps = ulps(one, other)
            report[name] = f"{int((steps > 0).sum())} elements, up to {int(steps.max())} ulp"
    return report


def _integers(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(_BITS.get(values.dtype, torch.uint8))


def float64_oracle(
    weight: torch.Tensor, terms: Iterable[tuple[float, torch.Tensor, torch.Tensor]], dtype: str
) -> torch.Tensor:
    """`W + Σ s·B·A` in float64, rounded once to `dtype`; the terms are `(s, B, A)`."""
    total = weight.double()
    for scale, b, a in terms:
        total = total + scale * (b.double() @ a.double())
    # numpy rounds float64 to float16 at once; torch goes by way of float32, which rounds twice.
    return torch.from_numpy(total.numpy().astype(np.dtype(dtype)))


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """True if no element differs by more than `tolerance` of the largest expected one."""
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    assert bool(torch.isfinite(expected).all()), "the reference itself is not finite"
    scale = float(expected.abs().max())
    return float((found.float() - expected.float()).abs().max()) <= tolerance * scale
