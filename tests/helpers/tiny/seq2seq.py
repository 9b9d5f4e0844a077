"""Models from text to text, in tiny."""

from __future__ import annotations

from helpers.tiny.build import Case, by_name, plain
from helpers.tiny.inputs import pair

CASES = by_name(
    *plain(
        """
        MT5ForConditionalGeneration UMT5ForConditionalGeneration
        MBartForConditionalGeneration M2M100ForConditionalGeneration
        PegasusForConditionalGeneration MarianMTModel BlenderbotForConditionalGeneration
        ProphetNetForConditionalGeneration LongT5ForConditionalGeneration
        PLBartForConditionalGeneration T5GemmaForConditionalGeneration
        BartForConditionalGeneration BigBirdPegasusForConditionalGeneration
        BlenderbotSmallForConditionalGeneration EncoderDecoderModel
        MvpForConditionalGeneration PegasusXForConditionalGeneration
        T5ForConditionalGeneration
    """,
        pair,
    ),
    Case(
        "LEDForConditionalGeneration",
        {
            "attention_window": [4, 4],
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    Case(
        "FSMTForConditionalGeneration",
        {"langs": ["en", "de"], "src_vocab_size": 96, "tgt_vocab_size": 96},
        inputs=pair,
    ),
    Case(
        "T5ForConditionalGeneration",
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        inputs=pair,
        name="T5-gated",
    ),
)
