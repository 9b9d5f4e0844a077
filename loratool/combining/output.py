"""The adapter directory that combine and resize make, and what they say about its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapters.dialects import WRITTEN
from loratool.adapters.dialects.dialect import Recipe
from loratool.adapters.directory import adapter_directory
from loratool.adapters.factorfile import (
    AdapterWriter,
    Extra,
    checked_bytes,
    factor_bytes,
    file_size,
    note_ranks,
    rounding_loss,
    tensors_of,
)
from loratool.combining.alignment import Contribution, Joined, Saved
from loratool.combining.rank_change import (
    Changes,
    NewFactors,
    RankPolicy,
    changes_at,
    refuse_nothing,
)
from loratool.dtypes import FACTOR_DTYPES
from loratool.errors import explained_os_errors, unknown
from loratool.merging.provenance import describe_adapter, versions
from loratool.models.tokenizers import common_files, tokenizer_files
from loratool.notices import Notice
from loratool.storage.destination import refuse_full_disk
from loratool.storage.links import refuse_leading_out
from loratool.storage.record import SCHEMA_VERSION
from loratool.storage.tensors import Bytes
from loratool.storage.values import float_blocks, raw_blocks, read_float32
from loratool.streams.run import Run
from loratool.streams.threads import computed
from loratool.words import enumerated


def output_dtype(joined: Joined, dtype: str | None) -> str:
    """The safetensors code to write: as asked, or the inputs' own; float32 where they differ."""
    if dtype is not None:
        if dtype not in FACTOR_DTYPES:
            raise unknown("dtype", dtype, FACTOR_DTYPES)
        return FACTOR_DTYPES[dtype]
    found = {t.dtype for parts in joined.modules.values() for p in parts
             for t in p.module.parts.values()}  # fmt: skip
    return next(iter(found)) if len(found) == 1 and found <= set(FACTOR_DTYPES.values()) else "F32"


def write_adapter(
    joined: Joined,
    modules: Iterable[Callable[[], NewFactors]],
    output: Path,
    dtype: str,
    record: dict[str, Any],
    policy: RankPolicy,
    run: Run,
    zero: tuple[str, str] = ("", ""),
) -> tuple[Changes, int]:
    """Write the adapter of these modules to `output`, all or nothing; in a dry run only measure.

    Returns what became of the modules, and the bytes of the weights file. `record` goes into
    loratool.json. `zero` says why a result may be zero, and what to do about it.
    """
    with explained_os_errors():
        beside = _agreed_tokenizer(joined) | joined.companions
        refuse_leading_out(beside)
        extras = _extras(joined, dtype)
    metadata = {**_common_metadata(joined), "format": "pt"}
    outlines = [parts[0].module.outline for parts in joined.modules.values()]

    def compute(writer: AdapterWriter | None) -> tuple[Changes, int]:
        shrunk = []
        work = (partial(_encoded, call, dtype) for call in modules)
        for done, (module, rank, data) in enumerate(computed(work, run.threads), 1):
            if writer is not None:
                writer.add(module.parts[0].module.outline, rank, data)
            shrunk.append(module)
            if run.progress is not None:
                run.progress(done, len(joined.modules), module.path)
        refuse_nothing(shrunk, *zero)
        ranks = policy.ranks(shrunk)
        changes = changes_at(joined, shrunk, ranks)
        if len(set(ranks)) > 1:
            changes.notices.append(note_ranks(ranks))
        return changes, file_size(tensors_of(outlines, ranks, dtype, extras), metadata)

    if run.dry_run:
        changes, nbytes = compute(None)
        refuse_full_disk(nbytes, output)
        return changes, nbytes
    with adapter_directory(output, dtype, metadata, run.overwrite) as folder:
        changes, nbytes = compute(folder.writer)
        folder.finish(outlines, [m.rank for m in changes.modules], extras, run.threads)
        folder.write_config(_recipe(joined, changes, policy.uniform))
        folder.copy(beside)
        for adapter in joined.used:
            adapter.folder.refuse_changed()
        folder.write_record(_record(joined, changes, record))
    changes.notices += folder.notices
    return changes, nbytes


def _common_metadata(joined: Joined) -> dict[str, str]:
    """What all the adapters' files say alike in their metadata; loratool.json has the rest."""
    first, *others = [adapter.metadata for adapter in joined.used]
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}


def _encoded(compute: Callable[[], NewFactors], dtype: str) -> tuple[NewFactors, int, Bytes]:
    """A module without its factors, their rank, and their bytes."""
    with explained_os_errors():
        module = compute()
    data = factor_bytes(module.path, module.b, module.a, dtype)
    lost = None if dtype == "F32" else rounding_loss(module.b, module.a, data, dtype)
    nothing = np.zeros((0, 0))
    return replace(module, b=nothing, a=nothing, rounding=lost), len(module.a), data


def _extras(joined: Joined, dtype: str) -> list[Extra]:
    """Biases, magnitudes, saved tensors and token rows of the result."""
    extras = []
    for parts in joined.modules.values():
        module = parts[0].module
        if joined.biased:
            shape = (module.shape[0],)
            extras.append(
                Extra(
                    WRITTEN.bias_key(module.path), dtype, shape, partial(_bias_bytes, parts, dtype)
                )
            )
        if module.magnitude is not None:
            info = module.magnitude
            key = WRITTEN.magnitude_key(module.path)
            extras.append(Extra(key, info.dtype, info.shape, partial(raw_blocks, info)))
    adapted = Counter(parts[0].module.outline.owner for parts in joined.modules.values())
    for saved in joined.saved.values():
        info = saved.sources[0][1]
        key = WRITTEN.saved_key(saved.name, info.name, adapted)
        extras.append(Extra(key, info.dtype, info.shape, partial(_saved_bytes, saved)))
    for rows in joined.token_rows.values():
        info = rows.rows
        key = WRITTEN.rows_key(info.name)
        extras.append(Extra(key, info.dtype, info.shape, partial(raw_blocks, info)))
    return extras


def _bias_bytes(parts: list[Contribution], dtype: str) -> Iterator[Bytes]:
    total = np.zeros(parts[0].module.shape[0])
    for part in parts:
        if part.module.bias is not None:
            total += part.weight * part.scale * read_float32(part.module.bias)
    yield checked_bytes(f"{parts[0].module.path}: lora_bias", total, dtype)


def _saved_bytes(saved: Saved) -> Iterator[Bytes]:
    (_, first), *others = saved.sources
    if not others:
        yield from raw_blocks(first)
        return
    weights = np.asarray([weight for weight, _ in saved.sources])
    shares = weights / weights.sum()
    for pieces in zip(*(float_blocks(info) for _, info in saved.sources), strict=True):
        mean = sum(share * x.astype(np.float64) for share, x in zip(shares, pieces, strict=True))
        yield checked_bytes(f"{saved.name}: the mean", np.asarray(mean), first.dtype)


def _agreed_tokenizer(joined: Joined) -> dict[str, Path]:
    """The tokenizer beside the adapters, whole, if it is the same for all that bring one."""
    folders = [(a.name, a.folder) for a in joined.used if a.source.is_dir()]
    brought = [(name, files) for name, folder in folders if (files := tokenizer_files(folder))]
    common = common_files([files for _, files in brought])
    if brought and common is None:
        text = (
            f"{enumerated([name for name, _ in brought])} come with different tokenizers; none was "
            "copied."
        )
        joined.notices.append(Notice("tokenizers-differ", text))
        return {}
    return brought[common][1] if common is not None else {}


def _recipe(joined: Joined, changes: Changes, uniform: bool) -> Recipe:
    modules = [parts[0].module for parts in joined.modules.values()]
    return Recipe(
        outlines=[m.outline for m in modules],
        ranks=[m.rank for m in changes.modules],
        saved=list(joined.saved),
        sources=joined.used,
        rows={path: rows.indices for path, rows in joined.token_rows.items()},
        uniform=uniform,
        biased=joined.biased,
        scaled=any(m.magnitude is not None for m in modules),
    )


def _record(joined: Joined, changes: Changes, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "command": record["command"],
        "versions": versions("numpy"),
        "options": record["options"],
        "adapters": [
            {**describe_adapter(adapter, weight), "metadata": adapter.metadata}
            for adapter, weight in zip(joined.adapters, joined.weights, strict=True)
        ],
        "result": {
            "rank": changes.rank,
            "modules": [m.to_dict() for m in changes.modules],
            "kept": changes.kept,
            "warnings": [n.code for n in (*joined.notices, *changes.notices)],
        },
    }
