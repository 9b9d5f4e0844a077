"""What an adapter covers of a base: which of its weights, and how large these are."""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from loratool.adapters.adapter import Adapter
from loratool.errors import by_cause, listed
from loratool.merging.identity import note_other_base
from loratool.merging.match import Delta
from loratool.merging.matching import match
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.assembly import view_of
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.names import is_token_embedding
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.treatment import leftover, note_leftover
from loratool.models.tokenizers import note_ids_without_rows, tokenizer_files
from loratool.notices import Notice
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import squared_norm
from loratool.words import agreeing, counted


@dataclass
class Coverage:
    """How many base weights of one sort (`name` with `*` for numbers) are adapted."""

    name: str
    adapted: int
    total: int


@dataclass
class BaseReport:
    """What an adapter covers of a base. Shares and counts are of parameters."""

    source: str
    model_type: str
    parameters: int
    trainable_share: float
    coverage: list[Coverage]
    unmatched: list[str]
    #: Whether its weights were read, for ‖ΔW‖/‖W‖.
    measured: bool
    #: What its weights are quantised as, in words, "" where none is; how many are, and how many of
    #: these the adapter changes. Parameters are counted as in the plain model.
    quantised: str = ""
    quantised_weights: int = 0
    quantised_adapted: int = 0


@dataclass(frozen=True)
class Covered:
    """The report, what a user should know, and ‖W‖ of the weight of each module, by its path."""

    report: BaseReport
    notices: list[Notice]
    lengths: dict[str, float]


def cover(
    adapter: Adapter,
    paths: Collection[str],
    checkpoint: Checkpoint,
    norms: bool,
    components: Sequence[str] = (),
) -> Covered:
    """Place an adapter in a base, or in some `components` of it.

    The weights that the modules at `paths` adapt are measured if they are on this disk, or may be
    downloaded (`norms`).
    """
    layout = Layout(checkpoint, components)
    found = match(adapter, layout)
    lengths, broken = _lengths(checkpoint, layout, found.deltas, paths, norms)
    notices = [*checkpoint.notices, *layout.notices, *note_other_base(checkpoint, [adapter])]
    notices += _ids_without_rows(checkpoint, adapter)
    if broken:
        notices.append(note_broken_base(checkpoint, broken))
    # Of factors without values it is said already that they are empty.
    empty = {path for path, module in adapter.modules.items() if 0 in module.shape}
    lost = [(what, reason) for what, reason in found.unmatched if what not in empty]
    if lost:
        does = agreeing(len(lost), "does")
        text = f"{counted(len(lost), 'part')} of the adapter {does} not fit this base:\n"
        notices.append(Notice("unmatched", text + by_cause(lost), checkpoint.label))
    adapted = {d.tensor for d in found.deltas} | found.replaced.keys()
    adapted |= {name for name, _ in found.rows}
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, info in checkpoint.tensors.items():
        if len(info.shape) >= 2:
            entry = counts[re.sub(r"\b\d+\b", "*", name)]
            entry[0] += name in adapted
            entry[1] += 1
    report = BaseReport(
        source=checkpoint.label,
        model_type=checkpoint.model_type,
        parameters=checkpoint.parameters,
        trainable_share=adapter.parameters / checkpoint.parameters,
        coverage=[Coverage(name, *entry) for name, entry in counts.items()],
        unmatched=[what for what, _ in found.unmatched],
        measured=lengths is not None,
    )
    if isinstance(checkpoint, Dequantised):
        report.quantised = checkpoint.title
        report.quantised_weights = len(checkpoint.weights)
        report.quantised_adapted = len(adapted & checkpoint.weights.keys())
    elif leftover(checkpoint):
        notices.append(note_leftover(checkpoint))
    return Covered(report, notices, lengths or {})


def _ids_without_rows(base: Checkpoint, adapter: Adapter) -> list[Notice]:
    """A warning for ids of the tokenizer that a merge would take which the model has no row for."""
    held = {**base.tensors, **adapter.replaced}
    rows = {n: i.shape[0] for n, i in held.items() if is_token_embedding(n) and i.shape}
    files = tokenizer_files(adapter.folder) or tokenizer_files(base.folder)
    return note_ids_without_rows(files, rows)


def _lengths(
    base: Checkpoint, layout: Layout, deltas: list[Delta], paths: Collection[str], norms: bool
) -> tuple[dict[str, float] | None, list[str]]:
    """‖W‖ of what each module changes, of a stack all its matrices; None where the weights are not
    on this disk; and the tensors of which it cannot be computed."""
    parts: dict[str, list[TensorInfo]] = defaultdict(list)
    for delta in deltas:
        if delta.module in paths:
            # What is tied to another matrix has no tensor of its own.
            name = delta.tensor
            whole = base.tensors[layout.aliases.get(name, name)]
            place = delta.place
            if place.rows is None:  # of all of a matrix the norm is the same either way round
                place = replace(place, transposed=False)
            parts[delta.module] += view_of(whole, place)
    names = {info.name for found in parts.values() for info in found}
    if norms:
        base.fetch(names)
    if not all(file.is_file() for name in names for file in base.tensors[name].files):
        return None, []
    flat = [info for found in parts.values() for info in found]
    with FilePool() as files, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        squares = list(pool.map(lambda t: squared_norm(t, files) if t.is_float else 0, flat))
    broken = {info.name for info, x in zip(flat, squares, strict=True) if not math.isfinite(x)}
    each = iter(squares)
    found = {module: math.sqrt(sum(next(each) for _ in infos)) for module, infos in parts.items()}
    sound = {module: length for module, length in found.items() if math.isfinite(length)}
    return sound, sorted(broken)


def note_broken_base(base: Checkpoint, names: Sequence[str]) -> Notice:
    """A warning for tensors of a base that are not all numbers."""
    text = (
        f"{counted(len(names), 'tensor')} of {base.label} "
        f"{agreeing(len(names), 'holds')} NaN, infinity or values beyond float32, so nothing is "
        f"measured there:\n{listed(names)}"
    )
    return Notice("not-finite", text, names[0])
