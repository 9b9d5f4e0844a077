"""What of a result is chance or noise: modules in which the adapters do not decide it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratool.errors import listed
from loratool.linalg.chance import SINGLE, Spectrum
from loratool.linalg.noise import NO_EDGE_WORDS, NoiseEdge
from loratool.notices import Notice
from loratool.words import counted, percent

#: Of a module that is not cut.
_UNCUT = Spectrum(np.zeros(0))

#: From this share of ‖ΔW‖² on, tied votes are worth a warning; a few entries always tie.
_TIED = 0.01

#: A result that is so many times larger than a sum that is noise is something else.
_MADE = 10

#: Weighted deltas have cancelled where their sum is this many times what rounding takes of them.
_LEFT = 4


@dataclass(frozen=True)
class Doubts:
    """What is doubtful about one module.

    `spectrum` has the singular values that a cut chooses from. `tied` is the share of ‖ΔW‖² that a
    tied vote on signs decided, `elects` whether there was a vote, `turns` whether the rule's basis
    has directions that are free to turn. `total` is ‖Σ wᵢΔᵢ‖, `size` Σ ‖wᵢΔᵢ‖, and `rounding` that
    of the factors as stored. `edge` is that of the noise, where the rank was chosen by it.
    """

    spectrum: Spectrum = _UNCUT
    tied: float = 0.0
    elects: bool = False
    turns: bool = False
    total: float = 0.0
    size: float = 0.0
    rounding: float = SINGLE
    edge: NoiseEdge | None = None

    @property
    def cancels(self) -> bool:
        """Whether the sum is no more than what rounding the factors takes of its parts."""
        return self.total <= _LEFT * self.rounding * self.size if self.size else False


NO_DOUBTS = Doubts()


@dataclass(frozen=True)
class Doubtful:
    """A module that is not zero: how many singular values it keeps, ‖ΔW‖, and the doubts."""

    path: str
    kept: int
    norm: float
    doubts: Doubts

    @property
    def what(self) -> str:
        """What a module holds whose weighted deltas cancel."""
        if self.doubts.elects:
            return (
                "TIES does not add them: it writes one side of each entry in full, which is "
                "neither their sum nor either of them"
            )
        if self.norm > _MADE * self.doubts.total:
            return "what the result has comes of the method, which is no sum"
        return "what the result has is noise"


def notices_of(modules: Sequence[Doubtful]) -> list[Notice]:
    """What to say about them; nothing twice about one module."""
    cancelled = [m for m in modules if m.doubts.cancels]
    others = [m for m in modules if not m.doubts.cancels]
    return [
        *(
            _cancelled([m for m in cancelled if m.what == what], what)
            for what in dict.fromkeys(m.what for m in cancelled)
        ),
        *_tied([m for m in others if m.doubts.tied >= _TIED]),
        *_flat(
            [m for m in others if m.doubts.spectrum.is_chance_at(m.kept)],
            "the cut falls between singular values that are equal within rounding: which "
            "directions stay is chance. Cut elsewhere, or before the values were made equal "
            "(`combine --method iso_c --rank`)",
        ),
        *_flat(
            [m for m in others if m.doubts.turns],
            "directions of the adapters are equally strong within rounding, so the basis that the "
            "method works in is chance. `sum`, `svd` and the `_svd` methods do not depend on one",
        ),
        *_all_noise([m for m in others if m.doubts.edge and not m.doubts.edge.above]),
        *_edgeless([m for m in others if m.doubts.edge and m.doubts.edge.edge is None]),
    ]


def _all_noise(found: Sequence[Doubtful]) -> list[Notice]:
    if not found:
        return []
    text = (
        f"In {counted(len(found), 'module')} no singular value stands above the noise edge: the "
        f"factors look like random ones. The largest value stays:\n{_names(found)}"
    )
    return [Notice("all-noise", text, found[0].path)]


def _edgeless(found: Sequence[Doubtful]) -> list[Notice]:
    """Modules that `--noise` does not cut; where all get one rank, one of them is enough."""
    if not found:
        return []
    lines = [f"{m.path}: {NO_EDGE_WORDS[m.doubts.edge.why]}" for m in found if m.doubts.edge]
    text = (
        f"{counted(len(found), 'module', 'has')} no noise edge, so --noise cuts nothing there; "
        f"--energy does, and --patterns lets the others be cut:\n{listed(lines)}"
    )
    return [Notice("no-noise-edge", text, found[0].path)]


def _cancelled(found: Sequence[Doubtful], what: str) -> Notice:
    left = max(m.doubts.total / m.doubts.size for m in found)
    text = (
        f"In {counted(len(found), 'module')} the weighted deltas cancel: their sum is at most "
        f"{left:.1g} of their norms, no more than rounding leaves (`loratool compare` shows how "
        f"near the adapters are). {what[0].upper()}{what[1:]}:\n"
    )
    return Notice("cancelled", text + _names(found), found[0].path)


def _tied(found: Sequence[Doubtful]) -> list[Notice]:
    if not found:
        return []
    most = max(m.doubts.tied for m in found)
    text = (
        f"In {counted(len(found), 'module')} the vote on signs is a tie for up to {percent(most)} "
        "of ‖ΔW‖², and the positive side was taken, however small. Of an even number of adapters "
        "`--majority-sign-method frequency` has many ties, `total` few:\n"
    )
    return [Notice("sign-ties", text + _names(found), found[0].path)]


def _flat(found: Sequence[Doubtful], what: str) -> list[Notice]:
    if not found:
        return []
    text = f"In {counted(len(found), 'module')} {what}:\n{_names(found)}"
    return [Notice("flat-spectrum", text, found[0].path)]


def _names(found: Sequence[Doubtful]) -> str:
    return listed(m.path for m in found)
