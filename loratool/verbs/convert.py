"""convert: write an adapter in another dialect, exactly or not at all."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects import TARGETS, WRITTEN
from loratool.adapters.dialects.writing import Asked, Draft, Fate
from loratool.adapters.finite import refuse_not_finite
from loratool.adapters.picking import picked
from loratool.adapters.reading import read_adapter, read_lora
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.answers import Answer
from loratool.converting.cutting import note_cuts, within_rank
from loratool.converting.files import draft_bytes, write_documents, write_weights
from loratool.converting.readback import prove
from loratool.converting.unchanged import unchanged
from loratool.dtypes import FACTOR_DTYPES, dtype_name
from loratool.errors import AdapterError, UsageError, explained_os_errors, listed, unknown
from loratool.merging.provenance import describe_adapter, describe_model, versions
from loratool.models.tokenizers import tokenizer_files
from loratool.notices import Notice, document
from loratool.paths import Choice, matches
from loratool.storage.destination import (
    Overwrite,
    check_output,
    refuse_company,
    refuse_full_disk,
)
from loratool.storage.fields import strict
from loratool.storage.filenames import PROVENANCE
from loratool.storage.ggufwriting import TypedValue
from loratool.storage.hashing import digest_of, file_digest, file_sha256
from loratool.storage.journal import WorkOrder
from loratool.storage.jsonfile import write_json
from loratool.storage.links import copy_own, refuse_leading_out
from loratool.storage.record import SCHEMA_VERSION
from loratool.storage.system import sync
from loratool.storage.workfolder import WorkFolder
from loratool.storage.worksites import refuse_other_run
from loratool.streams.progress import Progress
from loratool.streams.run import Run
from loratool.verbs.inputs import as_texts, check_paths, model_at, told_of
from loratool.words import counted

#: Elements of a list that a record keeps.
_MOST = 100


@dataclass(repr=False)
class ConvertReport(Answer):
    """What became of each module. `error` is the largest ‖BA − B′A′‖/‖BA‖ of any of them, measured
    from the file that was written; None in a dry run. `bytes` are those of the tensors."""

    ROWS = "fates"

    adapter: str
    dialect: str
    output: str
    to: str
    file: str
    dry_run: bool
    dtypes: list[str]
    fates: list[Fate]
    error: float | None
    bytes: int
    warnings: list[Notice] = field(default_factory=list)
    #: What --include and --exclude left out of the adapter, as its only entry.
    excluded: list[list[str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> dict[str, int]:
        """How many modules and tensors there are of each outcome."""
        return dict(Counter(fate.outcome for fate in self.fates))

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return {**document(self, "fates", "warnings"), "counts": self.counts}


@explained_os_errors()
def convert(
    adapter: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    max_rank: int | None = None,
    allow_lossy: bool = False,
    set_metadata: Mapping[str, str] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    told: Told = NOTHING_TOLD,
    overwrite: Overwrite = False,
    dry_run: bool = False,
    restart: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write an adapter in another dialect. What the dialect has no place for is refused, all of it
    in one error, before anything is written; what was written is read again and compared.

    Parameters
    ----------
    adapter: directory, file or Hub id, of any dialect that loratool reads.
    output: directory to make; it appears complete or not at all.
    to: a name in `loratool.adapters.dialects.TARGETS`; the adapter's own dialect if not given.
    base: the base model, where names, row orders or products depend on it.
    dtype: "float16", "bfloat16" or "float32" for the factors; their own if not given.
    max_rank: the largest rank that a module may have in the new file; with `allow_lossy` it is cut
        to that, else refused.
    set_metadata: entries of the header of a safetensors file, which replace those of their name.
    include, exclude: globs; write only these parts of the adapter, or leave these out; see `merge`.
    told: what the user says of the adapter, because its file does not; see `merge`.
    restart: write weights again that an earlier, killed run had finished.
    progress: called with (tensors done, tensors in all, key).

    Raises
    ------
    UsageError, FileError, AdapterError: what cannot be read, or not written so. ValueRangeError: a
    value too large for the dtype. VerifyError: what was written is something else. OutputError.
    """
    started = time.perf_counter()
    check_paths([adapter, output], [adapter], "loratool convert ADAPTER --to peft -o OUT")
    run = Run(threads, progress, overwrite, dry_run, restart=restart)
    asked = _asked(base, dtype, max_rank, allow_lossy)
    choice = Choice(tuple(as_texts(include)), tuple(as_texts(exclude)))
    if to is None and not set_metadata and not choice:
        raise UsageError("Nothing to convert to.", f"Say --to {'|'.join(TARGETS)}.")
    if to is not None and to not in TARGETS:
        raise unknown("target", to, TARGETS)
    (said,) = told_of(told, [adapter])
    target = Path(output)
    check_output(target, [Path(adapter)], overwrite)
    refuse_other_run(target)
    (source,) = picked([read_lora(adapter, said, asked.base)], choice)
    check_output(target, [path.resolve() for path in source.files], overwrite)
    refuse_company(target, (), overwrite)
    draft = _drafted(source, to, asked, dict(set_metadata or {}))
    nbytes = draft_bytes(draft)
    report = ConvertReport(
        adapter=source.label,
        dialect=source.format,
        output=str(target),
        to=to or source.format,
        file=draft.weights,
        dry_run=dry_run,
        dtypes=sorted({dtype_name(t.dtype) for t in draft.tensors.values()}),
        fates=draft.fates,
        error=None,
        bytes=nbytes,
        excluded=[list(source.left_out)],
        warnings=[*(n for n in source.notices if not n.refused), *draft.notices],
    )
    refuse_full_disk(nbytes, target)
    if dry_run:
        refuse_not_finite(source)  # which the writing of a file notices by itself
    else:
        options = {
            "to": report.to, "dtype": dtype, "max_rank": max_rank, "allow_lossy": allow_lossy,
            "set_metadata": dict(set_metadata or {}), **choice.to_dict(),
        }  # fmt: skip
        report.warnings += _write(source, draft, asked, target, run, options)
        report.error = max((fate.error or 0.0 for fate in draft.fates), default=0.0)
    report.seconds = time.perf_counter() - started
    return report


def _asked(
    base: str | Path | None, dtype: str | None, max_rank: int | None, allow_lossy: bool
) -> Asked:
    if dtype is not None and dtype not in FACTOR_DTYPES:
        raise unknown("dtype", dtype, FACTOR_DTYPES)
    if max_rank is not None and max_rank < 1:
        raise UsageError(f"--max-rank {max_rank} is no rank.", "Give a number above 0.")
    if allow_lossy and max_rank is None:
        raise UsageError("--allow-lossy goes with --max-rank.", "Say how large ranks may be.")
    return Asked(model_at(base), FACTOR_DTYPES[dtype] if dtype else None, max_rank, allow_lossy)


def _drafted(source: Adapter, to: str | None, asked: Asked, metadata: dict[str, str]) -> Draft:
    """The files to write. Raises AdapterError with all that has no place in them."""
    reasons = [n for n in source.notices if n.refused]
    if reasons and to is not None:
        raise AdapterError(
            f"{source.label}: this adapter cannot be converted.\n"
            + "\n".join(f"  [{n.code}] {n.message}" for n in reasons),
            "`loratool inspect` shows what is in it.",
        )
    if source.left_out and to is None:
        to = source.format
        if to not in TARGETS:
            raise UsageError(
                f"{source.label}: files of {to} are not written, so parts of one are not either.",
                f"Say what it is to become: --to {'|'.join(TARGETS)}.",
            )
    source, cuts = within_rank(source, asked)
    in_safetensors = all(path.suffix == ".safetensors" for path in source.files)
    # A config that speaks of modules that are not there would have them made anew, with values.
    is_whole = not cuts and not source.left_out
    if to is None or (to == source.format and source.is_plain and in_safetensors and is_whole):
        draft = unchanged(source, asked, metadata, tidy=to is not None)
    else:
        draft = TARGETS[to].draft(source, asked)
        if to != WRITTEN.name:
            _refuse_turned(draft, source, asked, to)
        if metadata and draft.container == "torch":
            raise UsageError(
                f"--set-metadata: files of {to} have no metadata.",
                "Omit it, or choose a target in safetensors or GGUF.",
            )
        if draft.container == "gguf":
            draft.metadata |= {key: TypedValue("string", text) for key, text in metadata.items()}
        else:
            draft.metadata |= metadata
    note_cuts(draft, cuts)
    refused = [f"{fate.what}: {fate.detail}" for fate in draft.fates if fate.outcome == "refused"]
    if refused:
        raise AdapterError(
            f"{source.label}: {counted(len(refused), 'part')} of the adapter cannot be written as "
            f"{to or source.format}:\n{listed(refused)}",
            "Nothing was written. `loratool merge` takes all that loratool reads.",
        )
    if not draft.tensors:
        raise AdapterError(f"{source.label}: nothing in it can be written.", "Inspect it first.")
    return draft


def _refuse_turned(draft: Draft, source: Adapter, asked: Asked, to: str) -> None:
    """Refuse modules whose weights are `[in, out]` because the user says so, where only the base's
    config.json could say it after that."""
    if asked.base is None or not asked.base.model_type:
        for path in source.modules:
            if matches(path, source.told.fan_in_fan_out):
                draft.refuse(
                    path, f"its weight is stored [in, out] (--fan-in-fan-out), which files of {to} "
                    "cannot say; name a --base with a config.json",
                )  # fmt: skip


def _write(
    source: Adapter, draft: Draft, asked: Asked, target: Path, run: Run, options: dict[str, Any]
) -> list[Notice]:
    """Write the files, read them again, and put them into place. Returns what came up then."""
    nbytes = draft_bytes(draft)
    beside = tokenizer_files(source.folder) if source.source.is_dir() else {}
    beside = {name: path for name, path in beside.items() if name not in draft.documents}
    refuse_leading_out({**beside, **draft.copies})
    order = WorkOrder(
        "convert", {}, _made_of(source, draft, asked, options), {draft.weights: nbytes}
    )
    with WorkFolder(target, order, run.overwrite, run.restart) as work:
        if work.note_of(draft.weights) is None:
            write_weights(draft, work.own, run.threads, run.progress)
            sync(work.own / draft.weights)
            work.publish(draft.weights, file_digest(work.own / draft.weights), {})
        with work.finishing() as folder:
            write_documents(draft, folder)
            for name, path in (*beside.items(), *draft.copies.items()):
                copy_own(path, name, folder / name)
            source.folder.refuse_changed()
            if draft.is_copy:
                written = read_adapter(folder, source.told, asked.base)
            else:
                written = read_lora(folder, draft.told, asked.base)
            prove(draft, written, run.threads)
            write_json(folder / PROVENANCE, _record(source, draft, options, folder))
            return [*work.notices, *work.commit(folder)]


def _made_of(
    source: Adapter, draft: Draft, asked: Asked, options: dict[str, Any]
) -> dict[str, Any]:
    """What the weights of a conversion are made of; see `WorkOrder`."""
    return {
        "versions": versions("numpy"),
        "options": options,
        "adapter": describe_adapter(source),
        "base": describe_model(asked.base) if asked.base is not None else None,
        "tensors": digest_of(
            repr([(key, t.dtype, t.shape) for key, t in draft.tensors.items()]).encode()
        ),
        "metadata": digest_of(repr(draft.metadata).encode()),
    }


def _record(source: Adapter, draft: Draft, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The document that says how the output in `folder` came about."""
    names = (draft.weights, *draft.documents, *draft.copies)
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "convert",
        "versions": versions("numpy"),
        "options": options,
        "adapters": [
            {
                **describe_adapter(source),
                "format": source.format,
                "metadata": source.metadata,
                "config": source.config,
                **({"values": _small(source.values)} if source.values else {}),
            }
        ],
        "result": {
            "modules": [fate.to_dict() for fate in draft.fates],
            "warnings": [n.code for n in (*source.notices, *draft.notices)],
        },
        "files": {name: file_sha256(folder / name) for name in names},
    }


def _small(values: Mapping[str, Any]) -> dict[str, Any]:
    """Key-values of a GGUF file without the lists of whole vocabularies."""
    return {k: strict(v) for k, v in values.items() if not isinstance(v, list) or len(v) <= _MOST}
