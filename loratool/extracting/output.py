"""The adapter directory that extract makes, and what it holds of the fine-tune."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratool.adapters.dialects import WRITTEN
from loratool.adapters.dialects.dialect import Recipe
from loratool.adapters.directory import adapter_within
from loratool.adapters.factorfile import Extra, file_size, tensors_of
from loratool.errors import VerifyError
from loratool.extracting.counterparts import Counterpart, Counterparts
from loratool.extracting.decomposed import Decomposed
from loratool.extracting.decomposition import Extraction
from loratool.extracting.options import ExtractOptions
from loratool.extracting.outcome import Outcome, gather, note, with_siblings
from loratool.extracting.policy import Policy, cost, widest_of
from loratool.extracting.readback import distance
from loratool.linalg.ranks import Criterion
from loratool.merging.provenance import describe_model, versions
from loratool.models.checkpoint import Checkpoint
from loratool.models.tasks import CLASSIFYING, TASK_BY_END, TEXT_TO_TEXT
from loratool.models.tokenizers import tokenizer_files
from loratool.notices import Notice
from loratool.storage.hashing import file_sha256
from loratool.storage.links import refuse_leading_out
from loratool.storage.record import SCHEMA_VERSION
from loratool.storage.values import raw_blocks
from loratool.streams.results import ResultLog
from loratool.streams.run import Run
from loratool.streams.shares import WorkShare

#: Ranks whose file sizes a dry run shows.
_PROPOSED = (4, 8, 16, 32, 64, 128)

#: The metadata that transformers asks for.
_METADATA = {"format": "pt"}


def propose(
    outcome: Outcome, pairs: Counterparts, dtype: str, options: ExtractOptions
) -> dict[int, int]:
    """Bytes of the weights file by rank; with a budget, of the one rank that it allows."""
    parts = [f.part for f in outcome.factors]
    policy = replace(choosing(options, outcome.whole, pairs, dtype), uniform=True)
    largest = widest_of(parts)
    ranks = [rank for rank in _PROPOSED if rank <= largest]
    if policy.criterion.rank is not None:
        ranks = [min(policy.criterion.rank, largest)]
    elif policy.budget is not None:
        ranks = [policy.even(parts)]
    elif policy.criterion.energy is not None:
        text = "Ranks by --energy need the decomposition, which a dry run does not make."
        outcome.notices.append(Notice("not-planned", text))
    return {rank: policy.size(parts, [rank] * len(parts)) for rank in ranks}


@dataclass(frozen=True)
class Extracting:
    """An extraction, with all that its steps have in common.

    Results go into `log`, and what is there is not computed again.
    """

    base: Checkpoint
    tuned: Checkpoint
    pairs: Counterparts
    work: Extraction
    options: ExtractOptions
    log: ResultLog

    @property
    def first(self) -> Criterion:
        """What factors are asked for at first, whatever the others turn out to be."""
        policy = choosing(self.options, [], self.pairs, self.work.dtype)
        return policy.first(_by_way(self.pairs.found)[0])

    def begin(self, parts: Sequence[Counterpart]) -> None:
        """Put into the log what `write` will want to know of these parts first."""
        adapted, others = _by_way(parts)
        self.work.measure(others, self.log)
        self.work.begin(adapted, self.first, self.log)
        self.log.flush()

    def unknown(self) -> list[str]:
        """The parts of which the log has not what `write` will want to know first."""
        self.log.refresh()
        adapted, others = _by_way(self.pairs.found)
        known = self.work.knows
        return [part.name for part in others if not known(part, None, self.log)] + [
            part.name for part in adapted if not known(part, self.first, self.log)
        ]

    def write(
        self, folder: Path, output: Path, run: Run, *, base_name: str | None, verify: bool
    ) -> Outcome:
        """Decompose everything and write the adapter into `folder`, which is to become `output`."""
        pairs, work, base, tuned = self.pairs, self.work, self.base, self.tuned
        beside = _new_tokenizer(base, tuned)
        made = adapter_within(folder, output, work.dtype, _METADATA, self.log)
        parts, rest = _by_way(pairs.found)
        others = work.measure(rest, self.log)
        policy = choosing(self.options, others, pairs, work.dtype)
        factors, ranks = work.decompose(parts, policy, made.writer)
        outcome = gather(pairs, [*others, *factors])
        outcome.ranks = [ranks[f.part.unit] for f in outcome.factors]
        outlines = [outline for outline, _ in outcome.placed]
        final = [rank for _, rank in outcome.placed]
        outcome.nbytes = made.finish(outlines, final, _extras(outcome), run.threads)
        note(outcome, tuned.model_type, policy)
        saved = [name for f in outcome.whole for name in f.part.names]
        made.write_config(
            Recipe(
                outlines, final, saved, modules=pairs.modules, stacks=pairs.stacks,
                model_type=tuned.model_type,
                base_name=base_name,
                task_type=_task(tuned, saved),
                tied=any(f.part.twin for f in (*outcome.factors, *outcome.whole)),
                transposes=pairs.fan_in_fan_out,
            )
        )  # fmt: skip
        made.copy(beside)
        if verify:
            outcome.verified = _verified(outcome, base, tuned, folder, pairs, work, run.threads)
        for model in (base, tuned):
            model.folder.refuse_changed()
        made.write_record(_record(base, tuned, outcome, self.options))
        return outcome


def share_of(pairs: Counterparts, share: WorkShare) -> list[Counterpart]:
    """The parts that a worker begins with."""
    mine: set[str] = set()
    for parts in _by_way(pairs.found):  # to read costs less than to take apart
        mine.update(share.of({part.name: part.nbytes for part in parts}))
    return [part for part in pairs.found if part.name in mine]


def _by_way(parts: Sequence[Counterpart]) -> tuple[list[Counterpart], list[Counterpart]]:
    """Those that get factors, and those that are only compared."""
    return [p for p in parts if p.fate == "factors"], [p for p in parts if p.fate != "factors"]


def choosing(
    options: ExtractOptions, others: Sequence[Decomposed], pairs: Counterparts, dtype: str
) -> Policy:
    """How ranks are chosen, with `others` in the file beside the factors."""
    changed = [f for f in others if f.changed and f.part.fate == "whole"]
    adapted = [part for part in pairs.found if part.fate == "factors"]
    whole = with_siblings(changed, others, adapted, pairs)

    def size(parts: Sequence[Counterpart], ranks: Sequence[int]) -> int:
        outcome = Outcome([Decomposed(part) for part in parts], whole, [], 0, [], list(ranks))
        return file_size(_tensors(outcome, dtype), _METADATA)

    by_bytes = partial(cost, dtype=dtype)
    return Policy(options.criterion, by_bytes, size, options.budget, not options.patterns)


def _tensors(outcome: Outcome, dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of all tensors in the file."""
    outlines, ranks = (
        [outline for outline, _ in outcome.placed],
        [rank for _, rank in outcome.placed],
    )
    return tensors_of(outlines, ranks, dtype, _extras(outcome))


def _extras(outcome: Outcome) -> list[Extra]:
    """The tensors that are saved whole, a tied one under both of its names."""
    modules = Counter(outline.owner for outline, _ in outcome.placed)
    return [
        Extra(
            WRITTEN.saved_key(name, name, modules), f.part.tuned.dtype, f.part.tuned.shape,
            partial(raw_blocks, f.part.tuned),
        )
        for f in outcome.whole
        for name in f.part.names
    ]  # fmt: skip


def _task(tuned: Checkpoint, saved: Sequence[str]) -> str | None:
    """The task_type; none for a classifier without its head, which PEFT would want in the file."""
    architectures = tuned.config.get("architectures") or [""]
    name = architectures[0]
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if tuned.model_type in TEXT_TO_TEXT else None
    task = next((task for end, task in TASK_BY_END.items() if name.endswith(end)), None)
    headless = all(WRITTEN.saved_unit(name) == name for name in saved)
    return None if headless and task in CLASSIFYING else task


def _new_tokenizer(base: Checkpoint, tuned: Checkpoint) -> dict[str, Path]:
    """The tuned model's tokenizer, if it is another one than the base's."""
    if not tuned.is_directory:
        return {}
    old = tokenizer_files(base.folder) if base.is_directory else {}
    new = tokenizer_files(tuned.folder)
    refuse_leading_out(new)
    same = old.keys() == new.keys() and all(
        file_sha256(old[name]) == file_sha256(path) for name, path in new.items()
    )
    return {} if same else new


def _verified(
    outcome: Outcome,
    base: Checkpoint,
    tuned: Checkpoint,
    folder: Path,
    pairs: Counterparts,
    work: Extraction,
    threads: int | None,
) -> float:
    """The error of base + adapter, which must be what the singular values say."""
    saved = [f.part.name for f in outcome.whole]
    off, size = distance(base, tuned, folder, pairs, saved, work.advance, threads)
    cut, _ = outcome.lost
    rounded = sum(f.size.energy * (f.rounding or 0) ** 2 for f in outcome.factors)
    if off > 1.02 * math.sqrt(cut + rounded) + 1e-5 * size:
        raise VerifyError(
            f"Read back, the adapter is {off / size:.3%} off the tuned model, and "
            f"{math.sqrt(cut + rounded) / size:.3%} was computed.",
            "Nothing was written; please report this.",
        )
    return off / size


def _record(
    base: Checkpoint, tuned: Checkpoint, outcome: Outcome, options: ExtractOptions
) -> dict[str, Any]:
    lost = outcome.lost[0] / outcome.total
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "extract",
        "versions": versions("torch", "numpy"),
        "options": options.to_dict(),
        "base": describe_model(base),
        "tuned": describe_model(tuned),
        "result": {
            "rank": max(outcome.ranks),
            "held": max(0.0, 1 - lost),
            "error": math.sqrt(lost),
            "modules": {
                f.part.outline.path: {"rank": rank, "kept": 1 - f.at(rank)[0] / f.size.energy}
                for f, rank in zip(outcome.factors, outcome.ranks, strict=True)
            },
            "saved": [f.part.name for f in outcome.whole],
            "left": [f.part.name for f in outcome.left],
            "warnings": [n.code for n in outcome.notices],
        },
    }
