"""Models of speech and other sounds, in tiny."""

from __future__ import annotations

from helpers.tiny.build import by_name, plain
from helpers.tiny.inputs import image, pair

CASES = by_name(
    *plain("""
        MoshiForCausalLM MossTranscribeDiarizeForConditionalGeneration MusicgenForCausalLM
        MusicgenMelodyForCausalLM GlmAsrForConditionalGeneration
        Qwen3ASRForConditionalGeneration VoxtralRealtimeForConditionalGeneration
        ASTForAudioClassification Wav2Vec2BertForSequenceClassification
        WhisperForAudioClassification LasrForCTC ParakeetForCTC
        CanaryForConditionalGeneration CohereAsrForConditionalGeneration
        MoonshineForConditionalGeneration Pop2PianoForConditionalGeneration
        WhisperForConditionalGeneration
    """),
    *plain(
        """
        MusicFlamingoForConditionalGeneration SeamlessM4TForTextToText
        SeamlessM4Tv2ForTextToText
    """,
        pair,
    ),
    *plain(
        """

    """,
        image,
    ),
    *plain("""
        SpeechT5Model
    """),
)
