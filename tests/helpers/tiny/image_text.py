"""Models of images and text that came with transformers 5, in tiny."""

from __future__ import annotations

from helpers.tiny.build import Case, by_name
from helpers.tiny.inputs import text

_MROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SAM = {"num_hidden_layers": 1, "global_attn_indexes": [0], "window_size": 2, "hidden_size": 16}
_SAM |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8, "output_channels": 16}
_SAM |= {"downsample_channels": [16, 32], "mlp_dim": 32}

CASES = by_name(
    Case(
        "Glm5NextForConditionalGeneration",
        {
            "text_config.num_key_value_heads": 4,
            "text_config.layer_types": ["linear_attention", "full_attention"],
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "text_config.index_n_heads": 4,
            "vision_config.projection_intermediate_size": 48,
        },
    ),
    Case(
        "HunYuanVLForConditionalGeneration",
        {"text_config.head_dim": 8, "vision_config.max_image_size": 64},
        inputs=text,
    ),
    Case(
        "Molmo2ForConditionalGeneration",
        {
            "adapter_config.vision_feature_layer": [1, 0],
            "adapter_config.text_hidden_size": 32,
            "text_config.additional_vocab_size": 96,  # transformers divides into halves
        },
        inputs=text,
    ),
    Case(
        "Emu3ForConditionalGeneration",
        {
            "vocabulary_map": {"<image>": 5, "<|extra_200|>": 6},
            "vq_config.base_channels": 32,
            "vq_config.channel_multiplier": [1, 1],
            "vq_config.num_res_blocks": 1,
            "vq_config.attn_resolutions": [1],
            "vq_config.codebook_size": 16,
            "vq_config.num_attention_heads": 1,
        },
        inputs=text,
    ),
    Case(
        "DeepseekOcr2ForConditionalGeneration",
        {
            "vision_config.sam_config": {"model_type": "deepseek_ocr2_sam_vision_model", **_SAM},
            "text_config.num_experts_per_tok": 2,
            "text_config.mlp_layer_types": ["dense", "sparse"],
        },
    ),
    Case(
        "UnlimitedOcrForConditionalGeneration",
        {"vision_config.sam_config": {"model_type": "unlimited_ocr_sam_vision_model", **_SAM}},
    ),
    Case(
        "HYV4VLForConditionalGeneration",
        {
            "text_config.rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]},
            "text_config.mlp_layer_types": ["dense", "sparse"],
            "vision_config.max_image_size": 64,
        },
    ),
    Case(
        "Cosmos3EdgeForConditionalGeneration",
        {"text_config.rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
    ),
    Case(
        "GotOcr2ForConditionalGeneration",
        {"vision_config.global_attn_indexes": [1], "vision_config.output_channels": 32},
        name="PPChart2Table",
        config_class="PPChart2TableConfig",
    ),
    Case("JevForDecision"),
    Case("RadioModel", {"max_img_size": 32}),
    Case("MLCDVisionModel"),
)
