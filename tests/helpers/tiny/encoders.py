"""Encoders of text, in tiny."""

from __future__ import annotations

from helpers.tiny.build import Case, by_name, plain
from helpers.tiny.inputs import image, text

CASES = by_name(
    *plain(
        """
        ModernBertForMaskedLM XLMRobertaForMaskedLM EuroBertForMaskedLM AlbertForMaskedLM
        ElectraForMaskedLM MPNetForMaskedLM RoFormerForMaskedLM NomicBertForMaskedLM
        NomicBertModel GteForMaskedLM XLMRobertaXLForMaskedLM CamembertForMaskedLM
        ConvBertForMaskedLM SqueezeBertForMaskedLM
        ModernBertForSequenceClassification XLMRobertaForSequenceClassification
        DebertaV2ForMaskedLM BigBirdForMaskedLM DebertaForMaskedLM BertForMaskedLM
        Data2VecTextForMaskedLM DistilBertForMaskedLM ErnieForMaskedLM FNetForMaskedLM
        IBertForMaskedLM JinaEmbeddingsV3ForMaskedLM LayoutLMForMaskedLM LukeForMaskedLM
        MegatronBertForMaskedLM ModernVBertForMaskedLM
        MraForMaskedLM NystromformerForMaskedLM PerceiverForMaskedLM RemBertForMaskedLM
        RobertaForMaskedLM RobertaPreLayerNormForMaskedLM TapasForMaskedLM
        UltrabertForMaskedLM UltraVBertForMaskedLM YosoForMaskedLM
    """,
        text,
    ),
    *plain(
        """

    """,
        image,
    ),
    Case("MobileBertForMaskedLM", {"embedding_size": 24, "intra_bottleneck_size": 16}, inputs=text),
    Case("EsmForMaskedLM", {"vocab_size": 96, "mask_token_id": 5, "pad_token_id": 1}, inputs=text),
    Case("LongformerForMaskedLM", {"attention_window": [4, 4]}),
    *plain("""
        XmodForMaskedLM OpenAIPrivacyFilterModel
        LayoutLMv3Model
    """),
)
