"""Keys of a PEFT file: prefixes, names, formats, halves and bare parameters."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.layer_cases import edit_adapter, layer, linear, refuse, same_logits, write_shards
from helpers.models import (
    Holder,
    Trained,
    differing,
    edit_config,
    lora,
    read,
    tiny_llama,
    train,
    train_on_disk,
)
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

import loratool
from loratool.errors import AdapterError, LoraToolError


@pytest.fixture(scope="module")
def dora_llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An adapter with every kind of key: factors, magnitudes, embedding factors, a saved head."""
    config = lora("q_proj", "down_proj", "embed_tokens", use_dora=True, modules_to_save=["lm_head"])
    trained = train_on_disk(tmp_path_factory.mktemp("llama"), tiny_llama(), config)
    trained.merge()
    return trained


def adapter_name_in_keys(key: str) -> str:
    """As a raw state dict has them."""
    for leaf in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
        key = key.replace(f".{leaf}", f".{leaf}.default")
    key = key.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight")
    return key.replace(".lm_head.", ".lm_head.modules_to_save.default.")


KEY_VARIANTS: dict[str, Callable[[str], str]] = {
    "adapter-name": adapter_name_in_keys,
    "magnitude-weight": lambda k: k.replace("_vector", "_vector.weight"),
    "no-prefix": lambda k: k.removeprefix("base_model.model."),
    "no-prefix-adapter-name": lambda k: adapter_name_in_keys(k).removeprefix("base_model.model."),
    "compiled": lambda k: f"_orig_mod.{k}",
    "compiled-inside": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled-layers": lambda k: k.replace(".self_attn.", "._orig_mod.self_attn."),
    "distributed": lambda k: f"module.{k}",
    "fsdp": lambda k: f"_fsdp_wrapped_module.{k}",
    "fsdp-layers": lambda k: k.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "fsdp-compiled": lambda k: f"_fsdp_wrapped_module._orig_mod.{k}",
    "distributed-compiled": lambda k: f"module._orig_mod.{k}",
    "compiled-distributed": lambda k: f"_orig_mod.module.{k}",
}


@pytest.mark.parametrize("name", KEY_VARIANTS)
def test_training_prefixes_and_adapter_names_change_nothing(
    name: str, dora_llama: Trained, tmp_path: Path
) -> None:
    """Keys with training frameworks' prefixes or the adapter's name give the same output bytes."""
    adapter = shutil.copytree(dora_llama.adapter, tmp_path / "adapter")
    tensors = read(adapter)
    renamed = {KEY_VARIANTS[name](key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, adapter / "adapter_model.safetensors")
    Trained(dora_llama.base, adapter, dora_llama.model).merge(tmp_path / "out")
    plain = dora_llama.base.parent / "merged"
    assert digest(tmp_path / "out") == digest(plain)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_torch_adapter_equals_safetensors(dora_llama: Trained, tmp_path: Path) -> None:
    """An adapter_model.bin merges to the same output bytes."""
    adapter = shutil.copytree(dora_llama.adapter, tmp_path / "adapter")
    torch.save(read(adapter), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    loratool.merge(dora_llama.base, adapter, tmp_path / "out", dtype="base")
    assert digest(tmp_path / "out") == digest(dora_llama.base.parent / "merged")


def test_one_adapter_file_equals_its_directory(dora_llama: Trained, tmp_path: Path) -> None:
    """An adapter may be named by its weights file, a base too."""
    weights = dora_llama.adapter / "adapter_model.safetensors"
    base = dora_llama.base / "model.safetensors"
    loratool.merge(base, weights, tmp_path / "out", dtype="base")
    assert digest(tmp_path / "out") == digest(dora_llama.base.parent / "merged")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_form_of_the_base_changes_nothing(
    shards: int, suffix: str, dora_llama: Trained, tmp_path: Path
) -> None:
    """A base in one file or in shards, of safetensors or of torch, merges to the same tensors."""
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(dora_llama.base / "config.json", base)
    write_shards(dora_llama.base_state(), base, shards, suffix)
    loratool.merge(base, dora_llama.adapter, tmp_path / "out", dtype="base")
    assert differing(read(tmp_path / "out"), read(dora_llama.base.parent / "merged")) == {}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert same_logits(model, dora_llama.model)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolution_is_refused(groups: int, tmp_path: Path) -> None:
    """PEFT's adapter of a grouped convolution mixes groups, so no merged weight exists."""
    case = layer(lambda: nn.Conv2d(8, 8, 3, groups=groups))
    refuse(case.train(tmp_path), LoraToolError, "grouped convolution")


class Experts(nn.Module):
    """A stack of experts in one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 8, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->bo", self.stack, x)


def test_a_parameter_without_a_name_is_refused(tmp_path: Path) -> None:
    """Where the config does not say which parameter was adapted, nothing is merged."""
    config = lora(target_parameters=["experts.stack"])
    trained = train(tmp_path, Holder(experts=Experts()), config)
    edit_config(trained.adapter, target_parameters=None)
    refuse(trained, LoraToolError, "names none of its parameters")


@pytest.mark.parametrize("empty", [torch.zeros(0), torch.zeros(0, 12)], ids=["1-d", "2-d"])
def test_ungathered_factors_are_refused(empty: torch.Tensor, tmp_path: Path) -> None:
    """The empty factors that ZeRO-3 leaves when shards were not gathered are refused."""
    trained = linear(12, 20).train(tmp_path)
    edit_adapter(trained, lambda state: {key: empty.clone() for key in state})
    refuse(trained, AdapterError, "ZeRO-3")


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    """A lora_A without its lora_B is never dropped in silence."""
    trained = linear(12, 20).train(tmp_path)
    edit_adapter(trained, lambda s: {k: v for k, v in s.items() if "lora_B" not in k})
    refuse(trained, AdapterError, "only one of lora_A and lora_B")
