"""Models of images and text, in tiny."""

from __future__ import annotations

from helpers.tiny.build import DROP, Case, by_name, plain
from helpers.tiny.inputs import text

CASES = by_name(
    *plain(
        """
        LlavaNextForConditionalGeneration LlavaOnevisionForConditionalGeneration
        VipLlavaForConditionalGeneration VideoLlavaForConditionalGeneration
        PaliGemmaForConditionalGeneration Mistral3ForConditionalGeneration
        InternVLForConditionalGeneration Idefics3ForConditionalGeneration
        SmolVLMForConditionalGeneration Idefics2ForConditionalGeneration
         AyaVisionForConditionalGeneration
        Lfm2VlForConditionalGeneration
        FuyuForCausalLM Qwen2AudioForConditionalGeneration VoxtralForConditionalGeneration
        Ovis2ForConditionalGeneration DeepseekVLForConditionalGeneration GitForCausalLM
        AudioFlamingo3ForConditionalGeneration
    """,
        text,
    ),
    *plain("""
        Blip2ForConditionalGeneration InstructBlipForConditionalGeneration
         Kosmos2ForConditionalGeneration
        ColQwen2ForRetrieval ColPaliForRetrieval Kimi_K25ForConditionalGeneration
        Gemma4UnifiedForConditionalGeneration BlipForConditionalGeneration
        Cosmos3OmniForConditionalGeneration EvollaForProteinText2Text
        Exaone4_5_ForConditionalGeneration Glm46VForConditionalGeneration
        GlmOcrForConditionalGeneration GraniteDoclingForConditionalGeneration
        HyperCLOVAXVisionV2ForConditionalGeneration IdeficsForVisionText2Text
        InstructBlipVideoForConditionalGeneration Kosmos2_5ForConditionalGeneration
        Lfm3VlForConditionalGeneration LightOnOcrForConditionalGeneration
        LlavaForConditionalGeneration LlavaNextVideoForConditionalGeneration
        MiniCPMOcrForConditionalGeneration MiniCPMV4_6ForConditionalGeneration
        MiniCPMV4_7ForConditionalGeneration MiniMaxM3SparseForConditionalGeneration
        MistralLarge4ForConditionalGeneration MuseGlimmerForConditionalGeneration
        PaddleOCRVLForConditionalGeneration PI0ForConditionalGeneration
        Pix2StructForConditionalGeneration QianfanOCRForConditionalGeneration
        Qwen4ExpForConditionalGeneration Step3p7ForConditionalGeneration
        T5Gemma2ForConditionalGeneration UdopForConditionalGeneration
        VideoLlama3ForConditionalGeneration VisionEncoderDecoderModel
    """),
    Case("Cohere2VisionForConditionalGeneration", {"alignment_intermediate_size": 48}, text),
    Case("AriaForConditionalGeneration", {"vision_config.image_size": 16}, inputs=text),
    Case(
        "Glm4vForConditionalGeneration",
        {
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            }
        },
        inputs=text,
    ),
    Case(
        "Qwen2VLForConditionalGeneration",
        {
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            }
        },
        inputs=text,
    ),
    Case(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "vision_config.fullatt_block_indexes": [0],
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        inputs=text,
    ),
    Case(
        "Gemma3ForConditionalGeneration",
        {"text_config.layer_types": ["sliding_attention", "full_attention"]},
        inputs=text,
    ),
    Case(
        "Qwen3VLForConditionalGeneration",
        {
            "vision_config.deepstack_visual_indexes": [0],
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
        },
        inputs=text,
    ),
    Case(
        "Qwen3VLMoeForConditionalGeneration",
        {
            "vision_config.deepstack_visual_indexes": [0],
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
            "text_config.num_local_experts": DROP,
            "text_config.num_experts": 4,
        },
        inputs=text,
    ),
    Case(
        "Qwen3_5ForConditionalGeneration",
        {"text_config.layer_types": ["linear_attention", "full_attention"]},
        inputs=text,
    ),
    Case(
        "Qwen3_5MoeForConditionalGeneration",
        {"text_config.layer_types": ["linear_attention", "full_attention"]},
        inputs=text,
    ),
    Case(
        "Glm4vMoeForConditionalGeneration",
        {
            "text_config.first_k_dense_replace": 1,
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 0],
            },
        },
        inputs=text,
    ),
    Case(
        "MllamaForConditionalGeneration",
        {
            "vision_config.intermediate_layers_indices": [0],
            "vision_config.vision_output_dim": 64,
            "text_config.cross_attention_layers": [1],
        },
    ),
    Case(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {
            "vision_config.fullatt_block_indexes": [0],
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        inputs=text,
    ),
    Case(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {
            "vision_config.deepstack_visual_indexes": [0],
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
        },
        inputs=text,
    ),
    Case(
        "GraniteSpeechForConditionalGeneration",
        {
            "encoder_config.context_size": 8,
            "window_size": 8,
            "downsample_rate": 2,
            "encoder_config.hidden_dim": 32,
            "encoder_config.dim_head": 8,
            "encoder_config.num_heads": 4,
        },
        inputs=text,
    ),
    Case(
        "Gemma4ForConditionalGeneration",
        {
            "text_config.layer_types": ["sliding_attention", "full_attention"],
            "text_config.per_layer_config": {},
            "text_config.num_kv_shared_layers": 0,
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 8,
            },
        },
        inputs=text,
    ),
    Case(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "text_config.moe_intermediate_size": [24, 16],
            "text_config.rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        },
        inputs=text,
    ),
    Case(
        "Phi4MultimodalForCausalLM",
        {
            "audio_config.nemo_conv_channels": 8,
            "audio_config.input_size": 8,
            "audio_config.ext_pw_out_channel": 32,
            "audio_config.depthwise_separable_out_channel": 32,
        },
        inputs=text,
    ),
    Case(
        "Florence2ForConditionalGeneration",
        {
            "vision_config.embed_dim": [8, 8],
            "vision_config.depths": [1, 1],
            "vision_config.num_heads": [2, 2],
            "vision_config.num_groups": [2, 2],
            "vision_config.patch_size": [7, 3],
            "vision_config.patch_stride": [4, 2],
            "vision_config.patch_padding": [3, 1],
            "vision_config.patch_prenorm": [False, True],
        },
    ),
    Case(
        "GotOcr2ForConditionalGeneration",
        {"vision_config.global_attn_indexes": [1], "vision_config.output_channels": 32},
        inputs=text,
    ),
    Case("Llama4ForConditionalGeneration"),
    Case(
        "JanusForConditionalGeneration",
        {
            "vq_config.base_channels": 32,
            "vq_config.channel_multiplier": [1, 1],
            "vq_config.num_res_blocks": 1,
            "vq_config.latent_channels": 32,
            "vq_config.num_embeddings": 16,
        },
    ),
)
