"""Stacks of experts as PEFT saves them today: each expert's product is PEFT's own delta."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import shake
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from loratool.adapters.experts import ExpertStack
from loratool.adapters.reading import read_adapter
from loratool.storage.tensors import FilePool

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "num_experts_per_tok": 2,
}  # fmt: skip
MOE = {**SIZES, "num_local_experts": 4}
NEMOTRON = {
    **SIZES, "layers_block_type": ["moe"], "n_routed_experts": 4, "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 8,
    "ssm_state_size": 8, "n_groups": 1,
}  # fmt: skip
JET = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2,
    "kv_channels": 8, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip

#: A tiny model, and targets in an order that is not the one of registration.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "qwen3_moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24)),
        {"target_modules": "all-linear"}),
    "one of two, rsLoRA": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24)),
        {"target_modules": [], "target_parameters": ["down_proj"], "use_rslora": True}),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**MOE)),
        {"target_modules": ["q_proj", "w1", "w2", "w3", "gate"]}),
    "gpt_oss, all square": (
        lambda: GptOssForCausalLM(GptOssConfig(**{**MOE, "intermediate_size": 32})),
        {"target_modules": ["q_proj"], "rank_pattern": {".*down_proj": 2}, "target_parameters": [
            "mlp.experts.down_proj_bias", "experts.down_proj", "mlp.experts.gate_up_proj_bias",
            "gate_up_proj"]}),
    "llama4_text": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(**MOE, intermediate_size_mlp=40, interleave_moe_layer_step=1)),
        {"target_modules": ["q_proj"], "target_parameters": [
            "feed_forward.experts.down_proj", "feed_forward.experts.gate_up_proj"]}),
    "nemotron_h": (
        lambda: NemotronHForCausalLM(NemotronHConfig(**NEMOTRON)),
        {"target_modules": [], "target_parameters": ["down_proj", "up_proj"]}),
    "jetmoe": (
        lambda: JetMoeForCausalLM(JetMoeConfig(**JET)),
        {"target_modules": [],
         "target_parameters": ["output_linear.weight", "input_linear.weight"]}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_each_experts_delta_is_pefts(name: str, tmp_path: Path) -> None:
    """Names, ranks, scales and orientation of what PEFT trains with target_parameters."""
    make, options = CASES[name]
    torch.manual_seed(0)
    model = get_peft_model(make(), LoraConfig(**{"r": 3, "lora_alpha": 8, **options}))
    shake(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = read_adapter(tmp_path)
    assert [n for n in adapter.notices if n.refused] == []
    found = {m.weight_name: m for m in adapter.modules.values()}
    wrappers = {p: m for p, m in model.named_modules() if isinstance(m, ParamWrapper)}
    assert wrappers
    for path, wrapper in wrappers.items():
        plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
        module = found[f"{plain}.{wrapper.parameter_name}"]
        wanted = wrapper.get_delta_weight("default").detach()
        if not isinstance(module, ExpertStack):
            left, right = module.left_right()  # type: ignore[misc]
            got = module.scale * torch.from_numpy(left @ right)
        else:
            shape = tuple(wanted.shape[-2:])
            turned = shape != module.shape
            if module.experts > 1 and shape[0] == shape[1]:
                turned = bool(module.orientation(name.startswith("gpt_oss")))
            with FilePool() as files:
                pairs = [module.expert(e, turned).left_right(files) for e in range(module.experts)]
            got = module.scale * torch.stack([torch.from_numpy(b @ a) for b, a in pairs])
        assert torch.allclose(got.reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)
