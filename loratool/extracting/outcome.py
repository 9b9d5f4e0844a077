"""What became of every tensor of a fine-tune: factors, saved whole, left out; what to say of it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from loratool.adapters.dialects import WRITTEN
from loratool.adapters.factorfile import note_ranks
from loratool.adapters.factors import ModuleShape
from loratool.errors import MatchError, ValueRangeError, listed
from loratool.extracting.counterparts import Counterpart, Counterparts
from loratool.extracting.decomposition import Decomposed, Policy
from loratool.models.layouts.names import is_vocabulary
from loratool.notices import Notice
from loratool.words import format_bytes

#: Modules of which models in memory have one tensor for all.
_EXPERT = re.compile(r"\.experts\.\d+\.")
#: Architectures of which PEFT 0.21 was seen to load such factors rightly.
_EXPERTS_READ = {"mixtral", "qwen3_moe", "olmoe"}


#: From this share on, rounding to half precision is worth a warning.
_LARGE_ROUNDING = 0.01

#: Bytes from which on it matters how many of them are saved whole.
_LARGE = 10_000_000


@dataclass
class Outcome:
    """What became of every tensor that changed: factors, saved whole, or left out.

    `factors` have their `ranks` (none in a dry run). `total` is ‖tuned - base‖² over the tensors
    that both models have.
    """

    factors: list[Decomposed]
    whole: list[Decomposed]
    left: list[Decomposed]
    unchanged: int
    notices: list[Notice]
    ranks: list[int] = field(default_factory=list)
    nbytes: int = 0
    verified: float | None = None

    @property
    def changed(self) -> list[Decomposed]:
        return [*self.factors, *self.whole, *self.left]

    @property
    def total(self) -> float:
        return math.fsum(f.size.energy for f in self.changed)

    @property
    def lost(self) -> tuple[float, float]:
        """‖tuned - base - adapter‖² before rounding, and what no adapter of these ranks beats."""
        cut, least = 0.0, math.fsum(f.size.energy for f in self.left)
        cut += least
        for found, rank in zip(self.factors, self.ranks, strict=True):
            more = found.at(rank)
            cut, least = cut + more[0], least + more[1]
        return cut, least

    @property
    def placed(self) -> list[tuple[ModuleShape, int]]:
        """The places that get factors, and their ranks."""
        pairs = zip(self.factors, self.ranks, strict=True)
        return [(outline, rank) for f, rank in pairs if rank for outline in f.part.outlines]


def gather(pairs: Counterparts, found: Sequence[Decomposed]) -> Outcome:
    """Sort what was found, in the order of the tuned model.

    Raises ValueRangeError if there is nothing that an adapter could hold.
    """
    by_name = {f.part.name: f for f in found}
    ordered = [by_name[part.name] for part in pairs.found]
    changed = [f for f in ordered if f.changed]
    fates = {
        fate: [f for f in changed if f.part.fate == fate] for fate in ("factors", "whole", "left")
    }
    _refuse_nothing(len(ordered), changed, fates)
    shared = [f.part.name for f in changed if f.part.shared and f.part.fate != "left"]
    if shared:
        raise MatchError(
            f"{shared[0]}: this model shares one matrix between encoder, decoder and head, and an "
            "adapter has no place for a change of it.",
            f"Leave it out: --exclude {shared[0].rpartition('.')[0]}.",
        )
    whole = with_siblings(fates["whole"], ordered, [f.part for f in fates["factors"]], pairs)
    kept = {id(f) for f in (*whole, *fates["left"], *fates["factors"])}
    unchanged = sum(id(f) not in kept for f in ordered)
    return Outcome(fates["factors"], whole, fates["left"], unchanged, list(pairs.notices))


def _refuse_nothing(
    count: int, changed: list[Decomposed], fates: dict[str, list[Decomposed]]
) -> None:
    if not changed:
        raise ValueRangeError(
            f"The two models are the same: none of {count} tensors differs.",
            "Give the fine-tuned model, not a copy of the base.",
        )
    if fates["factors"]:
        return
    selected = "in what was selected " if fates["left"] else ""
    if fates["whole"]:
        names = listed(f.part.name for f in fates["whole"])
        raise ValueRangeError(
            f"No weight that could become factors differs {selected}but only these:\n{names}",
            "PEFT has no adapter without factors. Select a linear layer too, or copy the tensors.",
        )
    raise ValueRangeError(
        f"Nothing differs {selected.strip()}. These tensors do:\n"
        + listed(f.part.name for f in fates["left"]),
        "Check --include, --exclude and --skip.",
    )


def with_siblings(
    whole: list[Decomposed],
    found: Sequence[Decomposed],
    adapted: list[Counterpart],
    pairs: Counterparts,
) -> list[Decomposed]:
    """`whole`, and what else PEFT saves with it: all tensors of a saved module."""
    names = [f.part.name for f in whole]
    saved = set(WRITTEN.saved_modules(names, pairs.modules, {part.module for part in adapted}))
    chosen = set(names)
    return [
        f
        for f in found
        if f.part.name in chosen
        or (WRITTEN.saved_unit(f.part.module) in saved and f.part.fate == "whole")
    ]


def note(outcome: Outcome, kind: str, policy: Policy) -> None:
    """Say what people should know about the result."""
    _note_ranks(outcome, policy.criterion.rank or 0)
    _note_experts(outcome, kind)
    _note_saved(outcome)
    if any(f.part.twin for f in outcome.factors):
        text = (
            "Embedding and head are one matrix. PEFT 0.21's merge_and_unload adds the factors of "
            "such a matrix twice; its forward pass and loratool merge are right."
        )
        outcome.notices.append(Notice("tied-in-peft", text))
    lost = max(f.rounding or 0.0 for f in outcome.factors)
    if lost > _LARGE_ROUNDING:
        text = f"Rounding the factors changes a delta by up to {lost:.1%}. Write float32."
        outcome.notices.append(Notice("rounding-large", text))


def _note_ranks(outcome: Outcome, asked: int) -> None:
    ranks = [rank for _, rank in outcome.placed]
    if len(set(ranks)) > 1:
        outcome.notices.append(note_ranks(ranks))
    needed = max(len(f.values) for f in outcome.factors)
    if needed < asked:
        text = f"No module changed by more than rank {needed}; --rank {needed} holds as much."
        outcome.notices.append(Notice("rank-not-needed", text))
    small = [f.part.module for f in outcome.factors if asked > min(f.part.outline.shape)]
    if small:
        text = f"Rank {asked} is more than these matrices have; zeros fill it up:\n{listed(small)}"
        outcome.notices.append(Notice("rank-too-large", text, small[0]))
    dropped = [
        f.part.module for f, rank in zip(outcome.factors, outcome.ranks, strict=True) if not rank
    ]
    if dropped:
        text = f"The budget leaves no rank for these modules:\n{listed(dropped)}"
        outcome.notices.append(Notice("no-budget", text, dropped[0]))


def _note_saved(outcome: Outcome) -> None:
    grown = [f.part for f in outcome.whole if f.part.base is not None and not f.part.is_comparable]
    if grown:
        lines = [
            f"{p.name}: {list(p.base.shape if p.base else ())} in the base, now "
            f"{list(p.tuned.shape)}"
            for p in grown
        ]
        rows = next((p.tuned.shape[0] for p in grown if is_vocabulary(p.name)), None)
        how = f"model.resize_token_embeddings({rows})" if rows else "num_labels=..."
        text = f"Tensors of another shape than in the base:\n{listed(lines)}\n"
        text += f"Before PEFT can load them, make the base fit: {how}."
        outcome.notices.append(Notice("shape-changed", text, grown[0].name))
    saved = sum(f.part.tuned.nbytes for f in outcome.whole)
    if saved > max(outcome.nbytes - saved, _LARGE):
        text = (
            f"{format_bytes(saved)} of {format_bytes(outcome.nbytes)} are tensors saved whole. "
            "Leave them out with --skip or --exclude if the adapter should be small."
        )
        outcome.notices.append(Notice("saved-large", text))
    stacks = [
        f.part for f in outcome.whole if ".experts" in f.part.name and f.part.group == "others"
    ]
    if stacks:
        text = f"Stacks of experts have no factors and are saved whole ({len(stacks)} tensors)."
        outcome.notices.append(Notice("experts-whole", text, stacks[0].name))


def _note_experts(outcome: Outcome, kind: str) -> None:
    ranks = [rank for _, rank in outcome.placed]
    experts = [f.part.module for f in outcome.factors if _EXPERT.search(f.part.module)]
    if experts and kind not in _EXPERTS_READ:
        text = (
            f"transformers 5 holds the experts of a {kind} in one tensor, and PEFT 0.21 may not "
            "apply factors for each of them. merge does."
        )
        outcome.notices.append(Notice("experts-in-peft", text, experts[0]))
    elif experts and len(set(ranks)) > 1:
        text = (
            "transformers 5 holds all experts of a layer in one tensor, for which PEFT needs "
            "one rank: add --uniform to load this adapter with it."
        )
        outcome.notices.append(Notice("ranks-of-experts", text, experts[0]))
