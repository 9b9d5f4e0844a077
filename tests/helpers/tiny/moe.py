"""Mixtures of experts that write text, in tiny."""

from __future__ import annotations

from helpers.tiny.build import DROP, Case, by_name, plain
from helpers.tiny.inputs import pair, text

_MLA = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "head_dim": DROP,
    "num_experts_per_tok": 2,
}

CASES = by_name(
    *plain(
        """
        Qwen2MoeForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM
        PhimoeForCausalLM MiniMaxM2ForCausalLM AfmoeForCausalLM AriaTextForCausalLM
        SolarOpenForCausalLM ExaoneMoeForCausalLM Cohere2MoeForCausalLM MellumForCausalLM
           BeamForCausalLM
         GraniteMoeSWAForCausalLM HYV3ForCausalLM
        HYV4ForCausalLM Kolibri1ForCausalLM LagunaForCausalLM LaraMiniForCausalLM
        MixtralForCausalLM OlmoeForCausalLM Qwen3MoeForCausalLM
    """,
        text,
    ),
    Case("HunYuanMoEV1ForCausalLM", {"num_experts": 4, "moe_topk": 2, "head_dim": 8}, inputs=text),
    Case("FlexOlmoForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}, inputs=text),
    Case("DeepseekV2ForCausalLM", _MLA, inputs=text),
    Case("FlintForCausalLM", {"mlp_only_layers": [0]}, inputs=text),
    Case("DeepseekV3ForCausalLM", _MLA, inputs=text),
    Case(
        "DeepseekV4ForCausalLM",
        {
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "layer_types": [
                "sliding_attention",
                "heavily_compressed_attention",
                "compressed_sparse_attention",
            ],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "head_dim": 16,
            "o_groups": 2,
            "o_lora_rank": 8,
            "index_n_heads": 4,
        },
        inputs=text,
    ),
    Case(
        "Glm4MoeForCausalLM",
        {"first_k_dense_replace": 1, "n_routed_experts": 4},
        text,
        "SarvamMoE",
        "SarvamMoEConfig",
    ),
    Case(
        "DeepseekV3ForCausalLM",
        {"first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
        text,
        "SarvamMLA",
        "SarvamMLAConfig",
    ),
    Case("Glm4MoeForCausalLM", {"first_k_dense_replace": 1, "n_routed_experts": 4}, inputs=text),
    Case(
        "Dots1ForCausalLM",
        {
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "head_dim": DROP,
            "num_experts_per_tok": 2,
        },
        inputs=text,
    ),
    Case(
        "Glm4MoeLiteForCausalLM", {"first_k_dense_replace": 1, "n_routed_experts": 4}, inputs=text
    ),
    Case("Mistral4ForCausalLM", {"first_k_dense_replace": 1, "n_routed_experts": 4}, inputs=text),
    Case(
        "MiMoV2FlashForCausalLM", {"first_k_dense_replace": 1, "n_routed_experts": 4}, inputs=text
    ),
    Case("DeepseekV32ForCausalLM", {"first_k_dense_replace": 1, "n_routed_experts": 4}),
    Case("GlmMoeDsaForCausalLM", {"first_k_dense_replace": 1, "n_routed_experts": 4}),
    Case(
        "Qwen3NextForCausalLM", {"layer_types": ["linear_attention", "full_attention"]}, inputs=text
    ),
    Case(
        "Qwen3_5MoeForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"]},
        inputs=text,
    ),
    Case("GraniteMoeHybridForCausalLM", {"layer_types": ["mamba", "attention"]}, inputs=text),
    Case(
        "JambaForCausalLM",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        inputs=text,
    ),
    Case(
        "MiniMaxForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
        inputs=text,
    ),
    Case(
        "Ernie4_5_MoeForCausalLM",
        {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
        inputs=text,
    ),
    Case(
        "NemotronHForCausalLM",
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
        inputs=text,
    ),
    Case(
        "Llama4ForCausalLM", {"num_experts_per_tok": 1, "interleave_moe_layer_step": 1}, inputs=text
    ),
    Case(
        "DbrxForCausalLM",
        {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "ffn_hidden_size": 24,
                "hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
        inputs=text,
    ),
    Case("JetMoeForCausalLM", {"num_key_value_heads": 2, "num_attention_heads": 4}, inputs=text),
    Case(
        "Lfm2MoeForCausalLM",
        {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
        inputs=text,
    ),
    Case(
        "KimiLinearForCausalLM",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
        inputs=text,
    ),
    Case(
        "LongcatFlashForCausalLM",
        {"num_layers": 1, "zero_expert_num": 2, "head_dim": 4, "moe_topk": 2},
        inputs=text,
    ),
    Case(
        "Gemma4ForCausalLM",
        {
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "per_layer_config": {},
            "num_kv_shared_layers": 0,
        },
        inputs=text,
        name="Gemma4-moe",
    ),
    Case(
        "SwitchTransformersForConditionalGeneration",
        {
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
        },
        inputs=pair,
    ),
    Case(
        "NllbMoeForConditionalGeneration",
        {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
        inputs=pair,
    ),
    Case("AXK1ForCausalLM", {"head_dim": DROP, "num_experts_per_tok": 2}, inputs=text),
    Case("AXK2ForCausalLM", {"head_dim": DROP, "num_experts_per_tok": 2}),
    Case(
        "BailingHybridForCausalLM",
        {"layer_types": ["linear_attention", "full_attention"], "num_experts_per_tok": 2},
        inputs=text,
    ),
    *plain("""
        Qwen4ExpForCausalLM
    """),
)
