"""Models of text, images and sounds together, in tiny; also whole ones that speak."""

from __future__ import annotations

from helpers.tiny.build import Case, by_name
from helpers.tiny.inputs import text

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MROPE3 = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_INKLING2 = {"rel_extent": 16, "d_rel": 8, "swa_num_attention_heads": 4, "swa_head_dim": 8}
_INKLING2 |= {"swa_num_key_value_heads": 2, "sliding_window_size": 8}

_MIMI = {
    "model_type": "mimi", "hidden_size": 32, "num_filters": 4, "upsampling_ratios": [2, 2],
    "codebook_size": 16, "codebook_dim": 8, "num_quantizers": 4, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 48,
    "vector_quantization_hidden_dimension": 8, "upsample_groups": 32, "sampling_rate": 64,
}  # fmt: skip
_TOKENIZER = {
    "model_type": "vibevoice_acoustic_tokenizer_encoder", "num_filters": 4,
    "downsampling_ratios": [2, 2], "depths": [1, 1, 1], "hidden_size": 8,
}  # fmt: skip

CASES = by_name(
    Case(
        "Qwen2_5OmniForConditionalGeneration",
        {
            # With a talker it asks for a file of voices.
            "enable_audio_output": False,
            "thinker_config.vision_config.fullatt_block_indexes": [0],
            "thinker_config.text_config.rope_parameters": _MROPE,
        },
    ),
    Case(
        "Qwen3OmniMoeForConditionalGeneration",
        {
            "thinker_config.vision_config.deepstack_visual_indexes": [0],
            "thinker_config.text_config.rope_parameters": _MROPE3,
            "talker_config.text_config.rope_parameters": _MROPE3,
            "talker_config.thinker_hidden_size": 32,
            "talker_config.accept_hidden_layer": 1,
            "talker_config.spatial_merge_size": 2,
            "talker_config.text_config.shared_expert_intermediate_size": 24,
            "talker_config.speaker_id": {},
            "talker_config.code_predictor_config.num_code_groups": 2,
            "talker_config.num_code_groups": 2,
            "code2wav_config.upsample_rates": (2, 2),
            "code2wav_config.upsampling_ratios": (2, 2),
            "code2wav_config.decoder_dim": 32,
            "code2wav_config.num_quantizers": 2,
            "code2wav_config.codebook_size": 16,
        },
    ),
    Case(
        "InklingForConditionalGeneration",
        {
            "vision_config.n_layers": 4,
            "vision_config.patch_size": 4,
            "audio_config.n_mel_bins": 4,
            "audio_config.mel_vocab_size": 8,
            "text_config.mlp_layer_types": ["dense", "sparse"],
            **{f"text_config.{key}": value for key, value in _INKLING2.items()},
        },
        inputs=text,
    ),
    Case("InklingForCausalLM", {"mlp_layer_types": ["dense", "sparse"], **_INKLING2}, inputs=text),
    *(
      Case(
        name,
        {
            "vision_config.text_hidden_size": 32,
            "vision_config.intermediate_size": 48,
            "vision_config.posemb_grid_size": 4,
            "vision_config.projection_hidden_dim": 48,
            **{f"text_config.{key}": value for key, value in _INKLING2.items()},
        },
    )
    for name in ("Inkling2ForConditionalGeneration", "Inkling2LoopForConditionalGeneration")
    ),
    Case("Inkling2ForCausalLM", _INKLING2, inputs=text),
    Case("Inkling2LoopForCausalLM", _INKLING2, inputs=text),
    Case(
        "NemotronH_Omni_Reasoning_V3",
        {
            "vision_config.video_temporal_patch_size": 2,
            "vision_config.max_img_size": 32,
            "audio_config": {
                "model_type": "parakeet_encoder", "hidden_size": 32, "num_hidden_layers": 2,
                "num_attention_heads": 4, "intermediate_size": 48, "num_mel_bins": 8,
                "subsampling_conv_channels": 8, "projection_hidden_size": 32,
                "projection_bias": False,
            },
        },
    ),
    Case(
        "Dots3NoteForConditionalGeneration",
        {
            "vision_config.adapter_in_dim": 32,
            "vision_config.adapter_out_dim": 32,
            "vision_config.mlp_layer_types": ["dense", "sparse"],
            "audio_config.adapter_input_size": 32,
            "audio_config.adapter_out_dim": 32,
            "text_config.num_key_value_heads": 4,
            "text_config.mlp_layer_types": ["dense", "sparse"],
        },
    ),
    Case(
        "Dots3NoteForCausalLM",
        {"num_key_value_heads": 4, "mlp_layer_types": ["dense", "sparse"]},
    ),
    Case(
        "GraniteSpeechPlusForConditionalGeneration",
        {
            "encoder_config.context_size": 8,
            "window_size": 8,
            "downsample_rate": 2,
            "encoder_config.hidden_dim": 32,
            "encoder_config.dim_head": 8,
            "encoder_config.num_heads": 4,
        },
    ),
    Case("MimiModel", {key: value for key, value in _MIMI.items() if key != "model_type"}),
    Case(
        "CsmForConditionalGeneration",
        {
            "codec_config": _MIMI,
            "num_codebooks": 4,
            "depth_decoder_config.num_codebooks": 4,
            "depth_decoder_config.backbone_hidden_size": 32,
        },
    ),
    Case(
        "KyutaiSpeechToTextForConditionalGeneration",
        {
            "codec_config": _MIMI, "num_codebooks": 4, "head_dim": 8, "num_key_value_heads": 4,
            "codebook_vocab_size": 17,
        },
    ),
    Case(
        "VibeVoiceAsrForConditionalGeneration",
        {
            "text_config": {
                "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "vocab_size": 96,
            },
            "acoustic_tokenizer_encoder_config": _TOKENIZER,
            "semantic_tokenizer_encoder_config": _TOKENIZER,
        },
    ),
)  # fmt: skip
