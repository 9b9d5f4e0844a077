"""The adapter directory that combine and resize make, and what they say about its modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapters.dialects.peft.config import adapter_config
from loratool.adapters.dialects.peft.names import bias_key, magnitude_key, rows_key, saved_key
from loratool.adapters.factorfile import (
    AdapterWriter,
    Extra,
    checked_bytes,
    encode,
    file_size,
    note_ranks,
    rounding_loss,
    tensors_of,
)
from loratool.combining.alignment import Contribution, Joined, Saved
from loratool.combining.rank_change import Changes, NewFactors, RankPolicy, measure, refuse_nothing
from loratool.dtypes import FACTOR_DTYPES
from loratool.errors import explained_os_errors, unknown
from loratool.merging.output import refuse_full_disk
from loratool.merging.provenance import describe_adapter, versions
from loratool.models.sidefiles import tokenizer_files
from loratool.notices import Notice
from loratool.storage.filenames import ADAPTER_CONFIG, ADAPTER_MODEL, PROVENANCE
from loratool.storage.hashing import file_sha256
from loratool.storage.jsonfile import write_json
from loratool.storage.staging import StagedDirectory, explain
from loratool.storage.tensors import Bytes
from loratool.storage.values import float_blocks, raw_blocks, read_float32
from loratool.streams.progress import Progress
from loratool.streams.threads import computed


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
    *,
    zero: tuple[str, str] = ("", ""),
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Changes, int]:
    """Write the adapter of these modules to `output`, all or nothing; only measure if `dry_run`.

    Returns what became of the modules, and the bytes of the weights file. `record` goes into
    loratool.json. `zero` says why a result may be zero, and what to do about it.
    """
    with explained_os_errors():
        tokenizer = _agreed_tokenizer(joined)
        extras = _extras(joined, dtype)
    metadata = {**_common_metadata(joined), "format": "pt"}
    outlines = [parts[0].module.outline for parts in joined.modules.values()]

    def compute(writer: AdapterWriter | None) -> tuple[Changes, int]:
        shrunk = []
        work = (partial(_encoded, call, dtype) for call in modules)
        for done, (module, rank, data) in enumerate(computed(work, threads), 1):
            if writer is not None:
                writer.add(module.parts[0].module.outline, rank, data)
            shrunk.append(module)
            if progress is not None:
                progress(done, len(joined.modules), module.path)
        refuse_nothing(shrunk, *zero)
        ranks = policy.ranks(shrunk)
        changes = measure(joined, shrunk, ranks)
        if len(set(ranks)) > 1:
            changes.notices.append(note_ranks(ranks))
        return changes, file_size(tensors_of(outlines, ranks, dtype, extras), metadata)

    if dry_run:
        return compute(None)
    with StagedDirectory(output, overwrite) as stage:
        try:
            with AdapterWriter(stage.path, dtype, metadata) as writer:
                changes, nbytes = compute(writer)
                refuse_full_disk(nbytes, output)
                writer.finish(outlines, [m.rank for m in changes.modules], extras, threads)
            _write_beside(joined, changes, stage.path, record, policy.uniform, tokenizer)
            stage.commit()
        except OSError as error:
            raise explain(error, output) from error
    return changes, nbytes


def _common_metadata(joined: Joined) -> dict[str, str]:
    """What all the adapters' files say alike in their metadata; loratool.json has the rest."""
    first, *others = [adapter.metadata for adapter in joined.used]
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}


def _encoded(compute: Callable[[], NewFactors], dtype: str) -> tuple[NewFactors, int, Bytes]:
    """A module without its factors, their rank, and their bytes."""
    with explained_os_errors():
        module = compute()
    data = encode(module.path, module.b, module.a, dtype)
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
                Extra(bias_key(module.path), dtype, shape, partial(_bias_bytes, parts, dtype))
            )
        if module.magnitude is not None:
            info = module.magnitude
            key = magnitude_key(module.path)
            extras.append(Extra(key, info.dtype, info.shape, partial(raw_blocks, info)))
    for saved in joined.saved.values():
        info = saved.sources[0][1]
        key = saved_key(saved.name, info.name, joined.modules)
        extras.append(Extra(key, info.dtype, info.shape, partial(_saved_bytes, saved)))
    for rows in joined.token_rows.values():
        info = rows.rows
        key = rows_key(info.name)
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
    """The tokenizer files beside the adapters, if those of one name are the same for all."""
    agreed: dict[str, Path] = {}
    for adapter in joined.used:
        found = tokenizer_files(adapter.folder) if adapter.source.is_dir() else {}
        for name, path in found.items():
            if file_sha256(agreed.setdefault(name, path)) != file_sha256(path):
                text = f"The adapters come with different tokenizers ({name}); none was copied."
                joined.notices.append(Notice("tokenizers-differ", text))
                return {}
    return agreed


def _write_beside(
    joined: Joined,
    changes: Changes,
    folder: Path,
    record: dict[str, Any],
    uniform: bool,
    tokenizer: dict[str, Path],
) -> None:
    """adapter_config.json, the tokenizer, and loratool.json, which holds no path and no date."""
    modules = [parts[0].module for parts in joined.modules.values()]
    rows = {path: rows.indices for path, rows in joined.token_rows.items()}
    ranks = [m.rank for m in changes.modules]
    config = adapter_config(
        joined.used, modules, ranks, list(joined.saved), rows, uniform, joined.biased
    )
    write_json(folder / ADAPTER_CONFIG, config)
    for name, path in tokenizer.items():
        shutil.copyfile(path, folder / name)
    document = {
        "schema_version": 1,
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
        "files": {name: file_sha256(folder / name) for name in (ADAPTER_MODEL, ADAPTER_CONFIG)},
    }
    write_json(folder / PROVENANCE, document)
