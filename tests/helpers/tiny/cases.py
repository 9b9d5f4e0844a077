"""All tiny models, by the names of their classes."""

from __future__ import annotations

from helpers.tiny import (
    audio,
    dense,
    encoders,
    image_text,
    moe,
    omni,
    seq2seq,
    state_space,
    vision,
    vision_language,
    vision_stages,
)

CASES = {
    **moe.CASES,
    **dense.CASES,
    **state_space.CASES,
    **vision_language.CASES,
    **image_text.CASES,
    **omni.CASES,
    **audio.CASES,
    **encoders.CASES,
    **seq2seq.CASES,
    **vision.CASES,
    **vision_stages.CASES,
}
