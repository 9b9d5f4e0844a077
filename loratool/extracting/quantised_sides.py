"""A base or a fine-tune that is quantised: what to say of the change that is found between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratool.errors import BaseError
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.ends import schemes_of
from loratool.notices import Notice
from loratool.words import percent

if TYPE_CHECKING:
    from loratool.extracting.decomposed import Decomposed

#: From this share of ‖ΔW‖ on, what quantising rounded off is worth a warning.
_LARGE = 0.05


def title_of(model: Checkpoint) -> str:
    """What a model is quantised as, for people; "" for a plain one."""
    return model.title if isinstance(model, Dequantised) else ""


def note_rescaled(base: Checkpoint, tuned: Checkpoint) -> list[Notice]:
    """A warning for a base whose weights were rescaled before they were quantised.

    Raises BaseError for a fine-tune of which that is true, and not of its base: what differs is the
    rescaling, and no change that the base could get.
    """
    by = [model.rescaled_by if isinstance(model, Dequantised) else "" for model in (base, tuned)]
    if by[1] and not by[0]:
        raise BaseError(
            f"{tuned.label}: its weights were rescaled for quantisation ({by[1]}), and those of "
            f"{base.label} were not: their difference is no change that training made.",
            "Give the fine-tune as it was before it was quantised.",
        )
    if not by[0]:
        return []
    text = (
        f"{base.label}: its weights were rescaled for quantisation ({by[0]}). The difference is "
        "what training changed only if TUNED was made from this very base."
    )
    return [Notice("quantised-side", text, base.label)]


def quantising_share(factors: Sequence[Decomposed]) -> float:
    """What quantising rounded off, as a share of ‖ΔW‖ of the modules with factors."""
    energy = math.fsum(f.size.energy for f in factors)
    return math.sqrt(math.fsum(f.size.quantising for f in factors) / energy) if energy else 0.0


def note_quantised(factors: Sequence[Decomposed]) -> list[Notice]:
    """A warning where much of what the factors are made of is what quantising rounded off."""
    share = quantising_share(factors)
    if share < _LARGE:
        return []
    found = [f for f in factors if f.size.quantising]
    titles: list[dict[str, None]] = []
    chosen = False
    for side in ("base", "tuned"):
        infos = [info for f in found if (info := getattr(f.part, side)) is not None]
        schemes = [scheme for info in infos for scheme in schemes_of(info)]
        titles.append(dict.fromkeys(scheme.title for scheme in schemes))
        chosen = chosen or not all(scheme.is_nearest for scheme in schemes)
    base, tuned = (" and ".join(own) for own in titles)
    about = "about"
    if base and tuned:
        what = f"BASE ({base}) and TUNED ({tuned}) are quantised"
        hint = "Give both as they were before."
        about = "up to"  # less where TUNED was made from the values of BASE
    elif base:
        what = f"BASE is quantised ({base}), and TUNED was made from the weights before that"
        hint = "Give the 16-bit model that BASE was made from."
    else:
        what = f"TUNED is quantised ({tuned})"
        hint = "Give the fine-tune as it was before."
    text = (
        f"{what}: of the change in the modules with factors {about} {percent(min(share, 1.0))} of "
        f"‖ΔW‖ is what quantising rounded off, which is no training. {hint}"
    )
    if chosen:
        text += (
            "\n  Values of this format were chosen with data, so modules that nobody trained are "
            "not known from others: they have factors too."
        )
    return [Notice("quantised-side", text, found[0].part.name)]
