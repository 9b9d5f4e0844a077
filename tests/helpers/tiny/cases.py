"""All tiny models, by the names of their classes."""

from __future__ import annotations

from helpers.tiny import (
    audio,
    dense,
    encoders,
    moe,
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
    **audio.CASES,
    **encoders.CASES,
    **seq2seq.CASES,
    **vision.CASES,
    **vision_stages.CASES,
}
