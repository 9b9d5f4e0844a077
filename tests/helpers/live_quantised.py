"""Models quantised by the libraries themselves, and adapters that PEFT saved.

Needs the extra `quantised`; so only tests of that marker import it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)

from helpers.golden import GOLDEN

Weights = dict[str, torch.Tensor]


def maker(name: str) -> ModuleType:
    """A script that makes golden files, as a module."""
    sys.path.insert(0, str(GOLDEN))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(GOLDEN))


def plain_llama(folder: Path) -> Path:
    """A small Llama of random values in bfloat16; all sizes are multiples of 64."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():  # larger than usual, so that layers matter
        parameter.data *= 3 if parameter.ndim == 2 else 1
    model.save_pretrained(folder)
    return folder


def plain_gpt_oss(folder: Path) -> Path:
    torch.manual_seed(12)
    config = GptOssConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path, *modules: str, parameters: tuple[str, ...] = ()) -> Path:
    """An adapter by PEFT with random factors on modules of these names."""
    torch.manual_seed(13)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list(modules), target_parameters=list(parameters),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


# --- by library -----------------------------------------------------------------------------------


def _loaded_so(plain: Path, folder: Path, settings: object) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype="auto")
    model.save_pretrained(folder)


def nf4(plain: Path, folder: Path) -> None:
    _loaded_so(plain, folder, BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ))  # fmt: skip


def int8(plain: Path, folder: Path) -> None:
    _loaded_so(plain, folder, BitsAndBytesConfig(load_in_8bit=True))


def torchao_int8(plain: Path, folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    _loaded_so(plain, folder, TorchAoConfig(Int8WeightOnlyConfig()))


def _projections(weights: Weights) -> list[str]:
    return [name for name in weights if name.endswith("_proj.weight")]


def _written(plain: Path, folder: Path, weights: Weights, settings: dict[str, object]) -> None:
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"})


def fp8_blocks(plain: Path, folder: Path) -> None:
    """By transformers' own writer, which loading on a CPU does not call."""
    make = maker("make_transformers")
    weights = load_file(plain / "model.safetensors")
    for name in _projections(weights):
        weights[name], weights[f"{name}_scale_inv"] = make.quantised(
            weights[name], (32, 32), "float"
        )
    _written(plain, folder, weights, {
        "quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
        "weight_block_size": [32, 32],
    })  # fmt: skip


def _compressed(plain: Path, folder: Path, scheme: object) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    make = maker("make_compressed_tensors")
    model = AutoModelForCausalLM.from_pretrained(plain, dtype="auto")
    settings = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    with torch.no_grad():
        apply_quantization_config(model, settings)
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                make.scaled(module)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
    _written(plain, folder, model.state_dict(), {})
    compressor.update_config(str(folder))


def ct_fp8_channel(plain: Path, folder: Path) -> None:
    make = maker("make_compressed_tensors")
    _compressed(plain, folder, make.preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]))


def ct_int4(plain: Path, folder: Path) -> None:
    _compressed(plain, folder, maker("make_compressed_tensors").packed(4))


def mxfp4(plain: Path, folder: Path) -> None:
    """gpt-oss with random codes and scales for its experts (its quantiser needs a GPU)."""
    weights = load_file(plain / "model.safetensors")
    for name in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, rows = weights.pop(name).shape
        shape = (experts, rows, width // 32)
        weights[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16)).to(torch.uint8)
        weights[f"{name}_scales"] = torch.randint(118, 122, shape).to(torch.uint8)
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    _written(plain, folder, weights, {
        "quant_method": "mxfp4", "modules_to_not_convert": [*skipped, "lm_head"],
    })  # fmt: skip


BASES: dict[str, Callable[[Path, Path], None]] = {
    "nf4": nf4, "int8": int8, "fp8_blocks": fp8_blocks, "ct_fp8_channel": ct_fp8_channel,
    "ct_int4": ct_int4, "torchao_int8": torchao_int8,
}  # fmt: skip


def loaded(folder: Path) -> PreTrainedModel:
    """A model as transformers loads it. Raises where tensors and model do not fit each other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {key: names for key, names in info.items() if names}
    assert not wrong, wrong
    return model
