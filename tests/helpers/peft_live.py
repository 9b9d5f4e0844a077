"""PEFT models with several adapters at once, and what PEFT makes of these."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import loratool
from helpers.models import Holder, State, close, read, read_json, tiny_llama
from loratool.linalg.methods import Settings

#: Sums of a few float32 products, as shares of the largest element: two roundings per term.
FLOAT32 = 2.0**-21

FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")

PREFIX = "base_model.model."

Products = dict[str, torch.Tensor]
Make = Callable[[], nn.Module]


def llama() -> nn.Module:
    return tiny_llama(num_hidden_layers=1)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=48, n_embd=16, n_layer=1, n_head=2, n_inner=24, n_positions=16,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def holder(**layers: Callable[[], nn.Module]) -> Make:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return Holder(**{name: layer() for name, layer in layers.items()}).eval()

    return make


class Attention(nn.Module):
    """Self-attention as PEFT's MultiheadAttention layer adapts it."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.l(x, x, x)[0]


convolutions = holder(l=lambda: nn.Conv2d(5, 7, 3), z=lambda: nn.Conv2d(7, 6, 1))
convolution = holder(l=lambda: nn.Conv1d(5, 7, 3), z=lambda: nn.Conv1d(7, 6, 1))
embeddings = holder(l=lambda: nn.Embedding(30, 8), z=lambda: nn.Linear(8, 6))
linears = holder(l=lambda: nn.Linear(12, 20), z=lambda: nn.Linear(20, 6))
gpt_layers = holder(c_fc=lambda: Conv1D(20, 12), c_proj=lambda: Conv1D(12, 20))
blocks = holder(l=lambda: nn.Linear(24, 32))
attention = holder(attn=Attention)

#: Model and two sets of targets, of which the third adapter has only the second.
KINDS: dict[str, tuple[Make, list[str], list[str]]] = {
    "linear": (llama, ["q_proj", "v_proj", "down_proj"], ["q_proj", "up_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_fc", "mlp.c_proj"], ["c_fc"]),
    "conv2d": (convolutions, ["l", "z"], ["l"]),
    "embedding": (embeddings, ["l", "z"], ["l"]),
}


@dataclass(frozen=True)
class Live:
    """A PEFT model with the adapters "a", "b" and "c", and the same adapters on disk."""

    model: PeftModel
    folder: Path

    def paths(self, names: Sequence[str]) -> list[Path]:
        return [self.folder / name for name in names]

    def peft(self, names: Sequence[str], weights: Sequence[float], how: str, **options: Any) -> Any:
        """The tensors of what `add_weighted_adapter` makes, and its config.

        PEFT elects signs as if every weight were positive. So where signs are elected, what is
        subtracted is given to it negated, to be added.
        """
        below = [n for n, w in zip(names, weights, strict=True) if w < 0 and "ties" in how]
        used = [abs(w) if n in below else w for n, w in zip(names, weights, strict=True)]
        self.negate(below)
        try:
            self.model.add_weighted_adapter(list(names), used, "new", how, **options)
        finally:
            self.negate(below)
        try:
            state = get_peft_model_state_dict(
                self.model, adapter_name="new", save_embedding_layers=False
            )
            cloned = {name: value.detach().clone() for name, value in state.items()}
            return cloned, self.model.peft_config["new"]
        finally:
            self.model.delete_adapter("new")

    def negate(self, names: Sequence[str]) -> None:
        """Change the sign of these adapters' A in memory."""
        for _, module in self.modules():
            for name in names:
                if name in module.scaling:
                    factors_of(module, name)[1].neg_()

    def modules(self) -> Iterator[tuple[str, LoraLayer]]:
        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer):
                yield name.removeprefix(PREFIX), module

    def sums(self, names: Sequence[str], weights: Sequence[float]) -> Products:
        """`Σ wᵢsᵢBᵢAᵢ` in float64, by module, with the scales that PEFT gave its layers."""
        found: Products = {}
        for path, module in self.modules():
            for name, weight in zip(names, weights, strict=True):
                if name not in module.scaling:
                    continue
                b, a = factors_of(module, name)
                delta = weight * module.scaling[name] * (b.double() @ a.double())
                found[path] = found.get(path, 0) + delta
        return found


def factors_of(module: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`B [out, r]` and `A [r, in]` of an adapter of a live layer."""
    if name in module.lora_embedding_A:
        return module.lora_embedding_B[name].detach(), module.lora_embedding_A[name].detach()
    b, a = module.lora_B[name].weight.detach(), module.lora_A[name].weight.detach()
    return b.flatten(1), a.flatten(1)


def live(folder: Path, make: Make, *configs: LoraConfig) -> Live:
    """Give `make()` adapters named a, b, c, … and save each of them."""
    torch.manual_seed(1)
    first, *others = configs
    model = get_peft_model(make(), first, adapter_name="a")
    for name, config in zip("bcd", others, strict=False):
        model.add_adapter(name, config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return Live(model.eval(), folder)


def products(state: State) -> Products:
    """`B·A` in float64, by module, of the tensors of a file whose scale is one."""
    found = {}
    for key, a in state.items():
        if ".lora_A." in key or key.endswith(".lora_embedding_A"):
            b = state[key.replace("lora_A.", "lora_B.").replace("embedding_A", "embedding_B")]
            path = re.sub(r"\.lora_(A\.weight|embedding_A)$", "", key).removeprefix(PREFIX)
            found[path] = b.double().flatten(1) @ a.double().flatten(1)
    return found


def combined(sources: Sequence[Path], output: Path, **options: Any) -> State:
    """The factors of what loratool makes, after a look at the config: every scale is one."""
    loratool.combine(sources, output, **options)
    config = read_json(output / "adapter_config.json")
    assert config["r"] == config["lora_alpha"]
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert not config["use_rslora"]
    return {k: v for k, v in read(output).items() if ".lora_" in k}


def assert_same(found: Products, expected: Products, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert bool(value.any()), f"{path}: nothing to compare"
        assert close_double(found[path], value, tolerance), path


def close_double(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    apart = float((found - expected).abs().max())
    return apart <= tolerance * float(expected.abs().max())


@contextmanager
def pefts_masks(
    scene: Live, names: Sequence[str], method: str, density: float, seed: int
) -> Iterator[None]:
    """Let `torch.bernoulli` give the masks that loratool draws, in the order in which PEFT asks:
    module by module, and of the factors first all A, then all B."""
    masks: list[torch.Tensor] = []
    for path, module in scene.modules():
        draws = Settings(path, 0, seed=seed).random
        held = [name for name in names if name in module.scaling]
        flip = bool(getattr(module, "fan_in_fan_out", False)) or bool(module.lora_embedding_A)
        if method.endswith("svd"):
            for name in held:
                b, a = factors_of(module, name)
                mask = draws(names.index(name), 0).random((len(b), a.shape[1]), dtype=np.float32)
                masks.append(torch.from_numpy(np.ascontiguousarray(mask.T if flip else mask)))
        else:
            for side in (0, 1):
                for name in held:
                    b, a = factors_of(module, name)
                    shape = a.shape if side == 0 else b.T.shape
                    mask = draws(names.index(name), side).random(tuple(shape), dtype=np.float32)
                    masks.append(torch.from_numpy(mask if side == 0 else mask.T.copy()))
    masks.reverse()

    def drawn(probability: torch.Tensor) -> torch.Tensor:
        return (masks.pop() < density).reshape(probability.shape).to(probability.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bernoulli", drawn)
        yield
    assert not masks, "PEFT drew less often than loratool"


MIXES: dict[str, tuple[str, list[float]]] = {
    "plain": ("ab", [1.0, 1.0]),
    "negative": ("ab", [0.7, -1.3]),
    "three": ("abc", [0.05, 2.0, -0.6]),
    "three-other-order": ("cba", [-3.0, 0.4, 1.0]),
}


def assert_same_factors(found: State, peft: State) -> None:
    assert found.keys() == peft.keys()
    for key, value in peft.items():
        assert found[key].dtype == torch.float32
        assert close(found[key], value, FLOAT32), key


def variants(method: str) -> list[dict[str, Any]]:
    """Densities, and for methods that elect signs how they do."""
    densities = [{"density": density} for density in (0.3, 0.5, 0.9)]
    if "ties" not in method:
        return densities
    signs = ("frequency", "total", "frequency")
    return [{**d, "majority_sign_method": s} for d, s in zip(densities, signs, strict=True)]


@contextmanager
def drawn_alike(scene: Live, names: str, method: str, density: float, seed: int) -> Iterator[None]:
    if "dare" not in method:
        yield
        return
    with pefts_masks(scene, names, method, density, seed):
        yield


#: PEFT cuts by a float32 SVD. Its rounding, about 2⁻²³ of σ₁, is enlarged in a cut delta by
#: σₖ/(σₖ-σₖ₊₁), which for these matrices is up to 144.
SVD32 = 2e-5


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


def in_dtype(folder: Path, output: Path, dtype: str) -> Path:
    """A copy of an adapter with its tensors in another dtype."""
    output.mkdir()
    state = {k: v.to(getattr(torch, dtype)) for k, v in read(folder).items()}
    save_file(state, output / "adapter_model.safetensors")
    (output / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return output
