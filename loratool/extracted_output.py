"""The adapter directory that extract makes, and what it holds of the fine-tune."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratool.adapter import Notice, Place
from loratool.adapter_output import note_ranks
from loratool.attesting import distance
from loratool.checkpoint.base import Checkpoint
from loratool.checkpoint.sidefiles import PROVENANCE, tokenizer_files
from loratool.checkpoint.tensors import format_bytes, raw_blocks
from loratool.checkpoint.writer import StagedDirectory, explain
from loratool.counterparts import Counterpart, Counterparts
from loratool.errors import MatchError, ValueRangeError, VerifyError, listed
from loratool.extraction import Extraction, Found, Policy, cost
from loratool.formats.peft_targets import extracted_config, saved_modules, saved_unit
from loratool.formats.peft_writer import (
    WEIGHTS,
    AdapterWriter,
    Extra,
    file_size,
    saved_key,
    tensors_of,
)
from loratool.linalg.ranks import Criterion
from loratool.matching import is_vocabulary
from loratool.output import refuse_full_disk
from loratool.provenance import CONFIG, describe_model, file_sha256, versions, write_json

#: Ranks whose file sizes a dry run shows.
_PROPOSED = (4, 8, 16, 32, 64, 128)

#: The task that PEFT has for a class of transformers, by the end of its name.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

#: Encoder-decoder models that read and write text, for which PEFT's class of that task is made.
_TEXT_TO_TEXT = {
    "t5",
    "mt5",
    "umt5",
    "longt5",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "m2m_100",
    "led",
}


#: Modules of which models in memory have one tensor for all.
_EXPERT = re.compile(r"\.experts\.\d+\.")
#: Architectures of which PEFT 0.21 was seen to load such factors rightly.
_EXPERTS_READ = {"mixtral", "qwen3_moe", "olmoe"}

#: The metadata that transformers asks for.
_METADATA = {"format": "pt"}

#: From this share on, rounding to half precision is worth a warning.
_LARGE_ROUNDING = 0.01


@dataclass
class Held:
    """What became of every tensor that changed: factors, saved whole, or left out.

    `factors` have their `ranks` (none in a dry run). `total` is ‖tuned - base‖² over the tensors
    that both models have.
    """

    factors: list[Found]
    whole: list[Found]
    left: list[Found]
    unchanged: int
    notices: list[Notice]
    ranks: list[int] = field(default_factory=list)
    nbytes: int = 0
    verified: float | None = None

    @property
    def changed(self) -> list[Found]:
        return [*self.factors, *self.whole, *self.left]

    @property
    def total(self) -> float:
        return math.fsum(f.size.energy for f in self.changed)

    @property
    def placed(self) -> list[tuple[Place, int]]:
        """The places that get factors, and their ranks."""
        pairs = zip(self.factors, self.ranks, strict=True)
        return [(place, rank) for f, rank in pairs if rank for place in f.part.places]


def gather(pairs: Counterparts, found: Sequence[Found]) -> Held:
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
    whole = _with_siblings(fates["whole"], ordered, [f.part for f in fates["factors"]], pairs)
    kept = {id(f) for f in (*whole, *fates["left"], *fates["factors"])}
    unchanged = sum(id(f) not in kept for f in ordered)
    return Held(fates["factors"], whole, fates["left"], unchanged, list(pairs.notices))


def _refuse_nothing(count: int, changed: list[Found], fates: dict[str, list[Found]]) -> None:
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


def _with_siblings(
    whole: list[Found], found: Sequence[Found], adapted: list[Counterpart], pairs: Counterparts
) -> list[Found]:
    """`whole`, and what else PEFT saves with it: all tensors of a saved module."""
    names = [f.part.name for f in whole]
    saved = set(saved_modules(names, pairs.modules, {part.module for part in adapted}))
    chosen = set(names)
    return [
        f
        for f in found
        if f.part.name in chosen or (saved_unit(f.part.module) in saved and f.part.fate == "whole")
    ]


def propose(held: Held, pairs: Counterparts, dtype: str, options: dict[str, Any]) -> dict[int, int]:
    """Bytes of the weights file by rank; with a budget, of the one rank that it allows."""
    parts = [f.part for f in held.factors]
    policy = replace(choosing(options, held.whole, pairs, dtype), uniform=True)
    largest = max(min(part.place.shape) for part in parts)
    ranks = [rank for rank in _PROPOSED if rank <= largest]
    if policy.criterion.rank is not None:
        ranks = [policy.criterion.rank]
    elif policy.budget is not None:
        ranks = [policy.even(parts)]
    elif policy.criterion.energy is not None:
        text = "Ranks by --energy need the decomposition, which a dry run does not make."
        held.notices.append(Notice("not-planned", text))
    return {rank: policy.size(parts, [rank] * len(parts)) for rank in ranks}


def write(
    base: Checkpoint,
    tuned: Checkpoint,
    pairs: Counterparts,
    work: Extraction,
    output: Path,
    options: dict[str, Any],
    *,
    base_name: str,
    overwrite: bool,
    verify: bool,
    threads: int | None,
) -> Held:
    """Decompose everything and write the adapter to `output`, all or nothing."""
    with StagedDirectory(output, overwrite) as stage:
        try:
            with AdapterWriter(stage.path, work.dtype, _METADATA) as writer:
                others = work.measure(part for part in pairs.found if part.fate != "factors")
                parts = [part for part in pairs.found if part.fate == "factors"]
                policy = choosing(options, others, pairs, work.dtype)
                factors, ranks = work.decompose(parts, policy, writer)
                held = gather(pairs, [*others, *factors])
                held.ranks = ranks
                places = [place for place, _ in held.placed]
                final = [rank for _, rank in held.placed]
                extras = _extras(held)
                held.nbytes = file_size(_tensors(held, work.dtype), _METADATA)
                refuse_full_disk(held.nbytes, output)
                writer.finish(places, final, extras, threads)
            _note(held, tuned.model_type, policy)
            saved = [name for f in held.whole for name in f.part.names]
            config = extracted_config(
                places, final, saved, pairs.modules, base_name=base_name,
                task_type=_task(tuned, saved),
                tied=any(f.part.twin for f in (*held.factors, *held.whole)),
                fan_in_fan_out=pairs.fan_in_fan_out,
            )  # fmt: skip
            write_json(stage.path / CONFIG, config)
            for name, path in _new_tokenizer(base, tuned).items():
                shutil.copyfile(path, stage.path / name)
            if verify:
                held.verified = _verified(held, base, stage.path, pairs, work, threads)
            write_json(stage.path / PROVENANCE, _record(base, tuned, held, options, stage.path))
            stage.commit()
        except OSError as error:
            raise explain(error, output) from error
    return held


def choosing(
    options: dict[str, Any], others: Sequence[Found], pairs: Counterparts, dtype: str
) -> Policy:
    """How ranks are chosen, with `others` in the file beside the factors."""
    changed = [f for f in others if f.changed and f.part.fate == "whole"]
    adapted = [part for part in pairs.found if part.fate == "factors"]
    whole = _with_siblings(changed, others, adapted, pairs)

    def size(parts: Sequence[Counterpart], ranks: Sequence[int]) -> int:
        held = Held([Found(part) for part in parts], whole, [], 0, [], list(ranks))
        return file_size(_tensors(held, dtype), _METADATA)

    criterion = Criterion(
        rank=options["rank"], energy=options["energy"], max_rank=options["max_rank"]
    )
    return Policy(
        criterion, partial(cost, dtype=dtype), size, options["budget"], options["uniform"]
    )


def _tensors(held: Held, dtype: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """Names, dtypes and shapes of all tensors in the file."""
    places, ranks = [place for place, _ in held.placed], [rank for _, rank in held.placed]
    return tensors_of(places, ranks, dtype, _extras(held))


def _extras(held: Held) -> list[Extra]:
    """The tensors that are saved whole, a tied one under both of its names."""
    modules = dict.fromkeys(place.path for place, _ in held.placed)
    return [
        Extra(
            saved_key(name, name, modules), f.part.tuned.dtype, f.part.tuned.shape,
            partial(raw_blocks, f.part.tuned),
        )
        for f in held.whole
        for name in f.part.names
    ]  # fmt: skip


def _task(tuned: Checkpoint, saved: Sequence[str]) -> str | None:
    """The task_type; none for a classifier without its head, which PEFT would want in the file."""
    architectures = tuned.config.get("architectures") or [""]
    name = str(architectures[0])
    if name.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM" if tuned.model_type in _TEXT_TO_TEXT else None
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    headless = all(saved_unit(name) == name for name in saved)
    return None if headless and task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else task


def _new_tokenizer(base: Checkpoint, tuned: Checkpoint) -> dict[str, Path]:
    """The tuned model's tokenizer, if it is another one than the base's."""
    if not tuned.source.is_dir():
        return {}
    old = tokenizer_files(base.directory) if base.source.is_dir() else {}
    new = tokenizer_files(tuned.directory)
    same = old.keys() == new.keys() and all(
        file_sha256(old[name]) == file_sha256(path) for name, path in new.items()
    )
    return {} if same else new


def _verified(
    held: Held,
    base: Checkpoint,
    folder: Path,
    pairs: Counterparts,
    work: Extraction,
    threads: int | None,
) -> float:
    """The error of base + adapter, which must be what the singular values say."""
    saved = [f.part.name for f in held.whole]
    off, size = distance(base, folder, pairs.found, saved, work.advance, threads)
    cut = sum(f.at(rank)[0] for f, rank in zip(held.factors, held.ranks, strict=True))
    cut += math.fsum(f.size.energy for f in held.left)
    rounded = sum(f.size.energy * (f.rounding or 0) ** 2 for f in held.factors)
    if off > 1.02 * math.sqrt(cut + rounded) + 1e-5 * size:
        raise VerifyError(
            f"Read back, the adapter is {off / size:.3%} off the tuned model, and "
            f"{math.sqrt(cut + rounded) / size:.3%} was computed.",
            "Nothing was written; please report this.",
        )
    return off / size


def _note(held: Held, kind: str, policy: Policy) -> None:
    """What people should know about the result."""
    ranks = [rank for _, rank in held.placed]
    if len(set(ranks)) > 1:
        held.notices.append(note_ranks(ranks))
    _note_experts(held, kind, ranks)
    asked = policy.criterion.rank or 0
    needed = max(len(f.values) for f in held.factors)
    if needed < asked:
        text = f"No module changed by more than rank {needed}; --rank {needed} holds as much."
        held.notices.append(Notice("rank-not-needed", text))
    small = [f.part.module for f in held.factors if asked > min(f.part.place.shape)]
    if small:
        text = (
            f"Rank {asked} is more than {len(small)} modules can have; their factors are filled "
            f"up with zeros:\n{listed(small)}"
        )
        held.notices.append(Notice("rank-too-large", text, small[0]))
    dropped = [f.part.module for f, rank in zip(held.factors, held.ranks, strict=True) if not rank]
    if dropped:
        text = f"The budget leaves no rank for these modules:\n{listed(dropped)}"
        held.notices.append(Notice("no-budget", text, dropped[0]))
    grown = [f.part for f in held.whole if f.part.base is not None and not f.part.is_comparable]
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
        held.notices.append(Notice("shape-changed", text, grown[0].name))
    saved = sum(f.part.tuned.nbytes for f in held.whole)
    if saved > max(held.nbytes - saved, 10_000_000):
        text = (
            f"{format_bytes(saved)} of {format_bytes(held.nbytes)} are tensors saved whole. Leave "
            "them out with --skip or --exclude if the adapter should be small."
        )
        held.notices.append(Notice("saved-large", text))
    lost = [f.rounding for f in held.factors if f.rounding and f.rounding > _LARGE_ROUNDING]
    if any(f.part.twin for f in held.factors):
        text = (
            "Embedding and head are one matrix. PEFT 0.21's merge_and_unload adds the factors of "
            "such a matrix twice; its forward pass and loratool merge are right."
        )
        held.notices.append(Notice("tied-in-peft", text))
    if lost:
        text = f"Rounding the factors changes a delta by up to {max(lost):.1%}. Write float32."
        held.notices.append(Notice("rounding-large", text))


def _note_experts(held: Held, kind: str, ranks: list[int]) -> None:
    experts = [f.part.module for f in held.factors if _EXPERT.search(f.part.module)]
    if experts and kind not in _EXPERTS_READ:
        text = (
            f"transformers 5 holds the experts of a {kind} in one tensor, and PEFT 0.21 may not "
            "apply factors for each of them. merge does."
        )
        held.notices.append(Notice("experts-in-peft", text, experts[0]))
    elif experts and len(set(ranks)) > 1:
        text = (
            "transformers 5 holds all experts of a layer in one tensor, for which PEFT needs "
            "one rank: add --uniform to load this adapter with it."
        )
        held.notices.append(Notice("ranks-of-experts", text, experts[0]))
    stacks = [f.part for f in held.whole if ".experts" in f.part.name and f.part.group == "others"]
    if stacks:
        text = f"Stacks of experts have no factors and are saved whole ({len(stacks)} tensors)."
        held.notices.append(Notice("experts-whole", text, stacks[0].name))


def _record(
    base: Checkpoint, tuned: Checkpoint, held: Held, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """loratool.json, which holds no path and no date."""
    return {
        "schema_version": 1,
        "command": "extract",
        "versions": versions("torch", "numpy"),
        "options": options,
        "base": describe_model(base),
        "tuned": describe_model(tuned),
        "result": {
            "rank": max(held.ranks),
            "modules": {
                f.part.module: {"rank": rank, "kept": 1 - f.at(rank)[0] / f.size.energy}
                for f, rank in zip(held.factors, held.ranks, strict=True)
            },
            "saved": [f.part.name for f in held.whole],
            "left": [f.part.name for f in held.left],
            "warnings": [n.code for n in held.notices],
        },
        "files": {name: file_sha256(folder / name) for name in (WEIGHTS, CONFIG)},
    }
