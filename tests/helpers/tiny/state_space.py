"""State-space and hybrid models that write text, in tiny."""

from __future__ import annotations

from helpers.tiny.build import Case, by_name, plain
from helpers.tiny.inputs import text

CASES = by_name(
    *plain(
        """
        RwkvForCausalLM
    """,
        text,
    ),
    Case(
        "Qwen3_5ForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}, inputs=text
    ),
    Case("BambaForCausalLM", {"attn_layer_indices": [1]}, inputs=text),
    Case("FalconH1ForCausalLM", {"mamba_d_ssm": 64}, inputs=text),
    Case(
        "Zamba2ForCausalLM",
        {
            "layers_block_type": ["mamba", "hybrid"],
            "hybrid_layer_ids": [1],
            "num_mem_blocks": 1,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "adapter_rank": 4,
            "mamba_ngroups": 1,
            "n_mamba_heads": 4,
            "use_mem_rope": False,
        },
        inputs=text,
    ),
    Case("MambaForCausalLM", {"intermediate_size": 64}, inputs=text),
    Case("Mamba2ForCausalLM", {"num_heads": 4, "head_dim": 16}, inputs=text),
    Case("FalconMambaForCausalLM", {"intermediate_size": 64}, inputs=text),
    Case(
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        inputs=text,
    ),
    Case("RecurrentGemmaForCausalLM", {"block_types": ["recurrent", "attention"]}, inputs=text),
    Case(
        "OlmoHybridForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"]},
        inputs=text,
    ),
    Case(
        "ZambaForCausalLM",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["mamba", "hybrid", "hybrid"],
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
        },
        inputs=text,
    ),
    *plain("""
        xLSTMForCausalLM
    """),
)
