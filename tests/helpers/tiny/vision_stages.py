"""Models of images in stages, and detectors on top of them, in tiny; models of waves with
convolutions in front."""

from __future__ import annotations

from typing import Any

from helpers.tiny.build import DROP, Case, by_name
from helpers.tiny.inputs import image, image64, wave

_RESNET = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
    "layer_type": "basic", "out_features": ["stage1", "stage2"],
}  # fmt: skip
_DETR = {
    "backbone_config": _RESNET, "use_timm_backbone": False, "backbone": None,
    "backbone_kwargs": DROP, "use_pretrained_backbone": False, "num_queries": 4,
}  # fmt: skip
_RT_DETR: dict[str, Any] = {
    "backbone_config": {
        "model_type": "rt_detr_resnet", "embedding_size": 16, "hidden_sizes": [16] * 4,
        "depths": [1] * 4, "out_features": ["stage2", "stage3", "stage4"],
    },
    "backbone": None, "use_timm_backbone": False, "backbone_kwargs": DROP, "encoder_layers": 1,
    "encoder_in_channels": [16] * 3, "decoder_in_channels": [32] * 3, "encoder_hidden_dim": 32,
    "num_queries": 4, "encoder_ffn_dim": 48, "hidden_expansion": 0.5,
}  # fmt: skip
_HGNET: dict[str, Any] = {
    "model_type": "hgnet_v2", "stage_in_channels": [16] * 4, "stage_mid_channels": [8] * 4,
    "stage_out_channels": [16] * 4, "stage_num_blocks": [1] * 4, "stage_numb_of_layers": [1] * 4,
    "stage_downsample": [False, True, True, True], "stage_kernel_size": [3, 3, 3, 3],
    "stage_light_block": [False, False, True, True], "stem_channels": [3, 8, 16],
    "embedding_size": 16, "hidden_sizes": [16] * 4, "depths": [1] * 4,
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
_SWIN: dict[str, Any] = {
    "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "image_size": 32,
    "patch_size": 4, "hidden_size": DROP,
}  # fmt: skip
_SEGFORMER: dict[str, Any] = {
    "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "sr_ratios": [2, 1],
    "num_attention_heads": [2, 4], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16, "image_size": 64,
}  # fmt: skip
_WAVES: dict[str, Any] = {
    "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_DATA2VEC = {**_WAVES, "num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 7}

CASES = by_name(
    Case("DetrForObjectDetection", _DETR),
    Case("ConditionalDetrForObjectDetection", _DETR),
    Case("DeformableDetrForObjectDetection", {**_DETR, "num_feature_levels": 2}),
    Case("TableTransformerForObjectDetection", _DETR),
    Case("SwinForImageClassification", _SWIN),
    Case("Swinv2ForImageClassification", _SWIN),
    Case("DonutSwinModel", _SWIN),
    Case("SegformerForImageClassification", _SEGFORMER, image64),
    Case("SegformerForSemanticSegmentation", _SEGFORMER, image64),
    *(
        Case(name, _WAVES, wave)
        for name in (
            "Wav2Vec2ForCTC",
            "HubertForCTC",
            "UniSpeechForCTC",
            "UniSpeechSatForCTC",
            "WavLMForCTC",
            "Wav2Vec2ConformerForSequenceClassification",
        )
    ),
    Case("Data2VecAudioForCTC", _DATA2VEC, wave),
    Case(
        "ResNetForImageClassification",
        {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 16},
        image64,
    ),
    Case(
        "ConvNextForImageClassification",
        {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2},
        image64,
    ),
    Case(
        "PvtForImageClassification",
        {"depths": [1] * 4, "hidden_sizes": [16] * 4, "num_attention_heads": [1, 2, 2, 2]},
    ),
    Case(
        "GLPNForDepthEstimation",
        {
            "depths": [1] * 4,
            "hidden_sizes": [16] * 4,
            "num_attention_heads": [1, 2, 2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    Case("Dinov2ForImageClassification", {"use_swiglu_ffn": True}, image, name="Dinov2-swiglu"),
    Case(
        "Dinov2WithRegistersForImageClassification",
        {"use_swiglu_ffn": True},
        image,
        name="Dinov2WithRegisters-swiglu",
    ),
    Case("ViTMAEForPreTraining", {"decoder_hidden_size": 32, "decoder_intermediate_size": 48}),
    Case("TimesFm2_5ModelForPrediction"),
    Case("VideoMAEForVideoClassification"),
    Case(
        "DPTForDepthEstimation",
        {
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
            "backbone_out_indices": [0, 1, 1, 1],
        },
    ),
    Case("SamModel"),
    Case("SeamlessM4TForSpeechToText"),
    Case("Speech2TextForConditionalGeneration", {"conv_channels": 16}),
    Case("RTDetrForObjectDetection", _RT_DETR),
    Case("RTDetrV2ForObjectDetection", _RT_DETR),
    Case("PPDocLayoutV4ForObjectDetection", _RT_DETR),
    Case("DFineForObjectDetection", {**_RT_DETR, "backbone_config": _HGNET, "decoder_layers": 2}),
    Case(
        "LwDetrForObjectDetection",
        {
            "projector_scale_factors": [1.0],
            "backbone_config": {
                "model_type": "lw_detr_vit",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "pretrain_image_size": 32,
                "patch_size": 8,
                "window_block_indices": [0],
                "out_indices": [1, 2],
                "num_windows": 4,
            },
            "num_queries": 4,
            "hidden_expansion": 0.5,
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
        },
    ),
    Case("DINOv3ConvNextModel", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
    Case(
        "Sam3TrackerModel",
        {
            "vision_config.backbone_config": {
                "model_type": "sam3_vit_model",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
                "window_size": 2,
                "global_attn_indexes": [1],
                "pretrain_image_size": 32,
            },
            "vision_config.fpn_hidden_size": 32,
        },
    ),
)
