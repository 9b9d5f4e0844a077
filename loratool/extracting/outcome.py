"""What became of every tensor of a fine-tune: factors, saved whole, left out; what to say of it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from loratool.adapters.dialects import WRITTEN
from loratool.adapters.factorfile import note_ranks
from loratool.adapters.factors import ModuleShape
from loratool.errors import MatchError, ValueRangeError, listed
from loratool.extracting.counterparts import Counterpart, Counterparts
from loratool.extracting.decomposed import Decomposed, joined_stacks
from loratool.extracting.policy import Policy
from loratool.extracting.quantised_sides import note_quantised
from loratool.extracting.unasked import (
    asked_with,
    note_left_by_one_name,
    note_unasked,
    ways_to_ask,
)
from loratool.linalg.ranks import note_too_wide
from loratool.models.layouts.names import is_vocabulary
from loratool.models.quantised.ends import form_of
from loratool.notices import Notice
from loratool.paths import ranged_names
from loratool.words import agreeing, counted, format_bytes

#: Modules of which models in memory mostly have one tensor for all.
_EXPERT = re.compile(r"\.experts\.\d+\.")

#: From this share on, rounding to half precision is worth a warning.
_LARGE_ROUNDING = 0.01

#: Bytes from which on it matters how many of them are saved whole.
_LARGE = 10_000_000


@dataclass
class Outcome:
    """What became of every tensor that changed: factors, saved whole, or left out.

    `factors` have their `ranks` (none in a dry run). `left` are those that the user does not want,
    norms, biases and embeddings that nobody asked for, and changes that are rounding alone. `total`
    is ‖tuned - base‖² over the tensors that both models have.
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
    def total(self) -> float:
        return energy_of([*self.factors, *self.whole, *self.left])

    @property
    def noise(self) -> list[Decomposed]:
        """What is left out because its change is rounding alone."""
        return [f for f in self.left if f.noise]

    @property
    def unasked(self) -> list[Decomposed]:
        """What changed of the groups `ON_REQUEST`, and is left out because nobody asked for it."""
        return [f for f in self.left if f.part.fate == "unasked" and not f.noise]

    @property
    def lost(self) -> tuple[float, float]:
        """‖tuned - base - adapter‖² before rounding, and what no adapter of these ranks beats."""
        cut = least = energy_of(self.left)
        for found, rank in zip(self.factors, self.ranks, strict=True):
            more = found.at(rank)
            cut, least = cut + more[0], least + more[1]
        return cut, least

    @property
    def placed(self) -> list[tuple[ModuleShape, int]]:
        """The places that get factors, and their ranks; a stack is one."""
        pairs = zip(self.factors, self.ranks, strict=True)
        placed = [(f.part, rank) for f, rank in pairs if rank]
        orders: dict[str, list[int]] = defaultdict(list)
        for part, _ in placed:
            if part.stack:
                orders[part.module].append(part.stack.order)
        return [
            (outline, rank)
            for part, rank in placed
            for later in [sum(o > part.stack.order for o in orders[part.module])
                          if part.stack else 0]
            for outline in part.filed(later)
        ]  # fmt: skip


def energy_of(found: Sequence[Decomposed]) -> float:
    """Σ‖Δ‖² of these."""
    return math.fsum(f.size.energy for f in found)


def gather(pairs: Counterparts, found: Sequence[Decomposed]) -> Outcome:
    """Sort what was found, in the order of the tuned model.

    Raises ValueRangeError if there is nothing that an adapter could hold.
    """
    by_name = {f.part.name: f for f in found}
    ordered = joined_stacks([by_name[part.name] for part in pairs.found])
    changed = [f for f in ordered if f.changed]
    fates: dict[str, list[Decomposed]] = {
        fate: [f for f in changed if f.part.fate == fate]
        for fate in ("factors", "whole", "unasked", "left")
    }
    _refuse_nothing(len(ordered), [f for f in ordered if f.noise], fates)
    wanted = [f.part for f in changed if f.part.fate in ("factors", "whole")]
    shared = [part.name for part in wanted if part.shared]
    if shared:
        raise MatchError(
            f"{shared[0]}: this model shares one matrix between encoder, decoder and head, and an "
            "adapter has no place for a change of it.",
            f"Leave it out: --exclude {shared[0].rpartition('.')[0]}.",
        )
    whole = with_siblings(fates["whole"], ordered, [f.part for f in fates["factors"]], pairs)
    held = {f.part.name for f in (*whole, *fates["factors"])}
    left = [f for f in ordered if f.size.changed and f.part.name not in held]
    unchanged = len(ordered) - len(held) - len(left)
    outcome = Outcome(fates["factors"], whole, left, unchanged, list(pairs.notices))
    outcome.notices += note_unasked(outcome.unasked, outcome.total)
    outcome.notices += note_left_by_one_name([f.part for f in left])
    _note_untied(outcome)
    _note_noise(outcome)
    outcome.notices += note_quantised(outcome.factors)
    return outcome


def _refuse_nothing(
    count: int, noise: list[Decomposed], fates: dict[str, list[Decomposed]]
) -> None:
    if fates["factors"]:
        return
    beyond = " beyond rounding" if noise else ""
    with_what = "" if any(f.part.fate == "factors" for f in noise) else asked_with(noise)
    kept = f"--keep-noise{with_what} makes an adapter of the rounding all the same"
    keep = f"; {kept}" if noise else ""
    if not any(fates.values()):
        which = f"{len(noise):,}" if noise else "none"
        verb = agreeing(len(noise) or count, "differs")
        raise ValueRangeError(
            f"The two models are the same{beyond}: {which} of {counted(count, 'tensor')} {verb}"
            + (", by no more than how they are stored rounds off." if noise else "."),
            f"Give the fine-tuned model, not a copy of the base{keep}.",
        )
    selected = " in what was selected" if fates["left"] else ""
    others = [*fates["whole"], *fates["unasked"]]
    if others:
        names = listed(f.part.name for f in others)
        if any(f.part.takes_factors and not f.part.shared for f in fates["unasked"]):
            raise ValueRangeError(
                f"Nothing differs{beyond}{selected} that becomes factors without being asked for, "
                f"but only these:\n{names}",
                ways_to_ask(fates["unasked"]) + (f" {kept}." if noise else ""),
            )
        raise ValueRangeError(
            f"No weight that could become factors differs{beyond}{selected} but only these:\n"
            f"{names}",
            "PEFT has no adapter without factors. Select a linear layer too, or copy the tensors"
            f"{keep}.",
        )
    raise ValueRangeError(
        f"Nothing differs{beyond}{selected}. These tensors do:\n"
        + listed(f.part.name for f in fates["left"]),
        f"Check --include, --exclude and --skip{keep}.",
    )


def with_siblings(
    whole: list[Decomposed],
    found: Sequence[Decomposed],
    adapted: list[Counterpart],
    pairs: Counterparts,
) -> list[Decomposed]:
    """`whole`, and what else PEFT saves with it: all tensors of a saved module, its bias too."""
    names = [f.part.name for f in whole]
    saved = set(WRITTEN.saved_modules(names, pairs.modules, {part.module for part in adapted}))
    chosen = set(names)
    return [
        replace(f, noise=False)
        for f in found
        if f.part.name in chosen
        or (WRITTEN.saved_unit(f.part.module) in saved and f.part.fate in ("whole", "unasked"))
    ]


def note(outcome: Outcome, kind: str, policy: Policy) -> None:
    """Say what people should know about the result."""
    _note_ranks(outcome, policy.criterion.rank or 0)
    _note_experts(outcome, kind)
    _note_shared_blocks(outcome, kind)
    _note_renamed(outcome, kind)
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
    if asked and needed < max(ranks):
        text = f"No module changed by more than rank {needed}; --rank {needed} holds as much."
        outcome.notices.append(Notice("rank-not-needed", text))
    if asked:
        shapes = {f.part.outline.path: f.part.outline.shape for f in outcome.factors}
        outcome.notices += note_too_wide(asked, shapes)
    dropped = [
        f.part.outline.path
        for f, rank in zip(outcome.factors, outcome.ranks, strict=True)
        if not rank
    ]
    if dropped:
        text = f"The budget leaves no rank for these modules:\n{listed(dropped)}"
        outcome.notices.append(Notice("no-budget", text, dropped[0]))


def _note_untied(outcome: Outcome) -> None:
    for name in (f.part.name for f in outcome.factors if f.part.untied):
        text = (
            f"{name} is the embedding in the base, and a matrix of its own in the fine-tune. The "
            "adapter has factors of it, which llama.cpp and Ollama refuse with a base whose head "
            "is tied; --skip heads leaves them out."
        )
        outcome.notices.append(Notice("head-untied", text, name))


def _note_noise(outcome: Outcome) -> None:
    noise = outcome.noise
    if not noise:
        return
    forms = {form_of(info) for f in noise for info in (f.part.base, f.part.tuned) if info}
    text = (
        f"{counted(len(noise), 'tensor', 'differs')} by rounding alone "
        f"({', '.join(sorted(forms))}) and {agreeing(len(noise), 'is')} left out:\n"
        f"{listed(ranged_names(f.part.name for f in noise))}\n  "
        f"--keep-noise{asked_with(noise)} keeps them."
    )
    outcome.notices.append(Notice("rounding-only", text, noise[0].part.name))


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
        text += f"  Before PEFT can load them, make the base fit: {how}."
        outcome.notices.append(Notice("shape-changed", text, grown[0].name))
    saved = sum(f.part.tuned.nbytes for f in outcome.whole)
    if saved > max(outcome.nbytes - saved, _LARGE):
        text = (
            f"{format_bytes(saved)} of {format_bytes(outcome.nbytes)} are tensors saved whole. "
            "Leave them out with --skip or --exclude if the adapter should be small."
        )
        outcome.notices.append(Notice("saved-large", text))


def _note_experts(outcome: Outcome, kind: str) -> None:
    experts = [f.part.module for f in outcome.factors if _EXPERT.search(f"{f.part.module}.")]
    if experts:
        text = (
            f"The experts of a {kind} are not in the table of layouts. transformers 5 may hold "
            "those of a layer in one tensor, and PEFT then not apply factors for each of them. "
            "merge does."
        )
        outcome.notices.append(Notice("experts-in-peft", text, experts[0]))


def _note_shared_blocks(outcome: Outcome, kind: str) -> None:
    """Zamba has one block in several layers, each a module of its own with the same weights."""
    shared = [f.part.module for f in outcome.factors if ".shared_trans" in f.part.module]
    if shared and kind in ("zamba", "zamba2"):
        text = (
            "One block is in several layers, and PEFT's forward pass adapts it in the first of "
            "them only. PEFT's merge_and_unload and loratool merge change it in all."
        )
        outcome.notices.append(Notice("shared-in-peft", text, shared[0]))


#: Modules whose names in memory PEFT 0.21 renames as if they were those of files, by model_type.
_RENAMED_AGAIN = {
    **dict.fromkeys(("deepseek_ocr2", "unlimited_ocr"), re.compile(r"(^|\.)language_model\.")),
    "laguna": re.compile(r"\.shared_experts\."),
    "mistral_large4": re.compile(r"\.(shared_)?experts(\.|$)"),
    "pi0": re.compile(r"(^|\.)embed_action_time\."),
}


def _note_renamed(outcome: Outcome, kind: str) -> None:
    renamed = _RENAMED_AGAIN.get(kind)
    found = [f.part.module for f in outcome.factors if renamed and renamed.search(f.part.module)]
    if found:
        text = (
            f"PEFT 0.21 renames these modules of a {kind} once more when it loads the adapter, and "
            f"does not find them (it warns of missing keys). merge does.\n"
            f"{listed(ranged_names(dict.fromkeys(found)))}"
        )
        outcome.notices.append(Notice("names-in-peft", text, found[0]))
