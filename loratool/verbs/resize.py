"""resize: an adapter of another rank, the best one of that rank, module by module."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.reading import read_lora
from loratool.adapters.told import Told
from loratool.adapters.weighting import PLAIN
from loratool.answers import Answer
from loratool.combining.alignment import Contribution, explained_overflow, join
from loratool.combining.extras import settle
from loratool.combining.output import output_dtype, write_adapter
from loratool.combining.rank_change import ModuleChange, NewFactors, RankPolicy, shrink
from loratool.dtypes import dtype_name
from loratool.errors import UsageError, explained_os_errors
from loratool.linalg.ranks import Criterion, check_patterns, check_rank, note_too_wide
from loratool.notices import Notice, document
from loratool.storage.destination import Overwrite, check_output, refuse_company
from loratool.storage.tensors import FilePool
from loratool.storage.worksites import refuse_other_run
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.verbs.inputs import check_paths, model_at, told_of


@dataclass(repr=False)
class ResizeReport(Answer):
    """What became of the ranks. `kept` is the share of ‖ΔW‖² left, `error` ‖cut off‖/‖ΔW‖, and
    `rounding` what half precision adds to it (None for float32), over all modules together. Bytes
    are of the weights files."""

    ROWS = "modules"

    adapter: str
    output: str
    dtype: str
    dry_run: bool
    rank: int
    uniform: bool
    modules: list[ModuleChange]
    kept: float | None
    error: float
    rounding: float | None
    bytes_before: int
    bytes_written: int
    warnings: list[Notice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return document(self, "modules", "warnings")


@explained_os_errors()
def resize(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    sv_fro: float | None = None,
    sv_cumulative: float | None = None,
    noise: bool = False,
    max_rank: int | None = None,
    pad_to: int | None = None,
    uniform: bool = False,
    patterns: bool = False,
    told: Told | Sequence[Told] = (),
    base: str | Path | None = None,
    dtype: str | None = None,
    overwrite: Overwrite = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ResizeReport:
    """Give every module of a LoRA adapter another rank and write it as a PEFT directory.

    Each module keeps its largest singular values, which no other choice of that rank betters. All
    get one rank: `rank`, or the largest that a module needs by another criterion (see
    `loratool.linalg.ranks.Criterion`). What has fewer singular values is filled up with zeros, and
    no rank is above what the widest matrix has. One criterion is needed, or `max_rank` or `pad_to`
    alone. Whatever the scale was (rsLoRA), it goes into the factors, and alpha is the rank.

    Parameters
    ----------
    adapter: PEFT adapter directory or file. With DoRA the factors are cut and the magnitudes stay.
    output: directory to make; it appears complete or not at all.
    noise: keep what stands above the noise edge (see `loratool.linalg.noise`).
    max_rank: no module gets more. pad_to: the one rank is a multiple of this.
    patterns: each module gets the rank that it needs itself, written as a rank_pattern, which not
        all programs read. uniform: one rank for all, as without either.
    told: what the user says of the adapter, because its file does not; see `merge`. base: the base
        model, where row orders or products depend on it.
    dtype: "float16", "bfloat16" or "float32"; the adapter's own if not given.
    threads: worker threads; the result does not depend on it.
    progress: called with (modules done, modules in all, module).

    Raises
    ------
    UsageError: criteria that contradict each other. FileError, AdapterError: an adapter that cannot
    be read. ValueRangeError: NaN, infinity, overflow, or nothing but zeros. OutputError.
    """
    started = time.perf_counter()
    check_paths([adapter, output], [adapter], "loratool resize ADAPTER --rank 8 -o OUT")
    run = Run(threads, progress, overwrite, dry_run)
    criterion = Criterion(rank, energy, sv_ratio, sv_fro, sv_cumulative, max_rank, noise)
    criterion.check()
    if pad_to is not None:
        check_rank("--pad-to", pad_to)
        for name, limit in (("--rank", rank), ("--max-rank", max_rank)):
            if limit is not None and limit % pad_to:
                raise UsageError(
                    f"{name} {limit} is not a multiple of --pad-to {pad_to}.",
                    "Omit one of them, or choose ranks that fit.",
                )
    single = "--rank" if rank is not None else "--pad-to" if pad_to is not None else ""
    check_patterns(uniform, patterns, single)
    if not criterion.given and max_rank is None and pad_to is None:
        raise UsageError(
            "No rank given.", "Say how much to keep: --rank 8, --energy 0.99 or --sv-ratio 10."
        )
    target = Path(output)
    check_output(target, [Path(adapter)], overwrite)
    refuse_other_run(target)
    (said,) = told_of(told, [adapter])
    model = model_at(base)
    lora = read_lora(adapter, said, model)
    check_output(target, [path.resolve() for path in lora.files], overwrite)
    refuse_company(target, (), overwrite)
    joined = join([lora], [PLAIN], "resized", with_dora=True)
    settle(joined, "refuse")
    code = output_dtype(joined, dtype)
    shapes = {m.path: m.shape for m in lora.modules.values()}
    options = {
        "rank": rank, "energy": energy, "sv_ratio": sv_ratio, "sv_fro": sv_fro,
        "sv_cumulative": sv_cumulative, "noise": noise, "max_rank": max_rank, "pad_to": pad_to,
        "patterns": patterns, "dtype": dtype_name(code),
    }  # fmt: skip
    whole = not patterns and rank is None
    with FilePool() as files:
        work = (
            partial(_resize, path, parts, files, criterion, whole)
            for path, parts in joined.modules.items()
        )
        done, nbytes = write_adapter(
            joined, work, target, code,
            {"command": "resize", "options": options},
            RankPolicy(not patterns, least=rank or 1, multiple=pad_to or 1), run,
        )  # fmt: skip
    notices = [*joined.notices, *done.notices]
    if rank is not None:
        notices += note_too_wide(rank, shapes) or _note_zeros(lora, done.rank)
    notices += _note_padding(pad_to or 1, max(map(min, shapes.values())))
    if not all(m.adds for m in lora.modules.values()):
        text = "DoRA: the magnitudes are kept as they are; energies are of scale·B·A alone."
        notices.append(Notice("dora-magnitudes-kept", text))
    return ResizeReport(
        adapter=lora.label,
        output=str(target),
        dtype=dtype_name(code),
        dry_run=dry_run,
        rank=done.rank,
        uniform=not patterns,
        modules=done.modules,
        kept=done.kept,
        error=done.error,
        rounding=done.rounding,
        bytes_before=lora.folder.nbytes_of(lora.files),
        bytes_written=nbytes,
        warnings=notices,
        seconds=time.perf_counter() - started,
    )


def _note_padding(multiple: int, widest: int) -> list[Notice]:
    """A multiple is given as asked for, however much of it is zeros."""
    if multiple <= widest:
        return []
    text = f"--pad-to {multiple}: no matrix has more than rank {widest}; the rest is zeros."
    return [Notice("rank-too-large", text)]


def _note_zeros(lora: Adapter, rank: int) -> list[Notice]:
    """A rank above the adapter's own adds nothing: is that meant?"""
    before = max(m.rank for m in lora.modules.values())
    if rank <= before:
        return []
    text = (
        f"The adapter has rank {before}; up to rank {rank} there are zeros, which change nothing "
        "but the size."
    )
    return [Notice("rank-not-needed", text, lora.label)]


def _resize(
    path: str, parts: Sequence[Contribution], files: FilePool, criterion: Criterion, whole: bool
) -> NewFactors:
    (part,) = parts
    term = part.read(files)
    with explained_overflow(path):
        result = shrink(
            path, [part], term.b, term.a, term.scale, criterion, whole, rounding=term.rounding
        )
    return replace(result, alive=frozenset({0} if result.energy > 0 else ()))
