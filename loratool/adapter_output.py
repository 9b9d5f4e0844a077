"""The adapter directory that combine and resize make, and what they say about its modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import LowRank, Notice
from loratool.changes import Changes, Shrunk, measure, refuse_nothing, rounding_loss
from loratool.checkpoint.sidefiles import PROVENANCE, tokenizer_files
from loratool.checkpoint.tensors import read_float32, read_raw
from loratool.checkpoint.writer import StagedDirectory, explain
from loratool.errors import UsageError, explained_os_errors, nearest
from loratool.formats.peft_config import adapter_config
from loratool.formats.peft_writer import (
    FACTOR_DTYPES,
    WEIGHTS,
    AdapterWriter,
    Bytes,
    Extra,
    bias_key,
    checked_bytes,
    encode,
    file_size,
    magnitude_key,
    rows_key,
    saved_key,
    tensors_of,
)
from loratool.joining import Joined, Part, Saved
from loratool.output import Progress, refuse_full_disk
from loratool.provenance import CONFIG, describe_adapter, file_sha256, versions, write_json
from loratool.threads import computed

#: What `--dtype` may be, and the safetensors code of it.
DTYPES = {name: code for code, name in FACTOR_DTYPES.items()}


def output_dtype(joined: Joined, dtype: str | None) -> str:
    """The safetensors code to write: as asked, or the inputs' own; float32 where they differ."""
    if dtype is not None:
        if dtype not in DTYPES:
            near = nearest(dtype, DTYPES)
            raise UsageError(
                f"Unknown dtype {dtype!r}.",
                (f"Did you mean {near}? " if near else "") + f"Choose among {', '.join(DTYPES)}.",
            )
        return DTYPES[dtype]
    found = {t.dtype for parts in joined.modules.values() for p in parts
             for t in (p.module.a, p.module.b)}  # fmt: skip
    return next(iter(found)) if len(found) == 1 and found <= set(DTYPES.values()) else "F32"


def write_adapter(
    joined: Joined,
    modules: Iterable[Callable[[], Shrunk]],
    output: Path,
    dtype: str,
    record: dict[str, Any],
    *,
    uniform: bool,
    zero: tuple[str, str] = ("", ""),
    least: int = 1,
    multiple: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Changes, int]:
    """Write the adapter of these modules to `output`, all or nothing; only measure if `dry_run`.

    Returns what became of the modules, and the bytes of the weights file.

    With `uniform` all modules get the largest rank, at least `least` and raised to a multiple of
    `multiple`; those that have fewer singular values are filled up with zeros. `record` goes into
    loratool.json. `zero` says why a result may be zero, and what to do about it.
    """
    with explained_os_errors():
        tokenizer = _agreed_tokenizer(joined)
        extras = _extras(joined, dtype)
    staged = nullcontext() if dry_run else StagedDirectory(output, overwrite)
    with staged as stage:
        try:
            with nullcontext() if stage is None else AdapterWriter(stage.path, dtype) as writer:
                shrunk = []
                work = (partial(_encoded, call, dtype) for call in modules)
                for done, (module, rank, data) in enumerate(computed(work, threads), 1):
                    if writer is not None:
                        writer.add(module.parts[0].module, rank, data)
                    shrunk.append(module)
                    if progress is not None:
                        progress(done, len(joined.modules), module.path)
                refuse_nothing(shrunk, *zero)
                changes = measure(joined, shrunk, least, multiple if uniform else 0)
                ranks = [m.rank for m in changes.modules]
                templates = [parts[0].module for parts in joined.modules.values()]
                nbytes = file_size(tensors_of(templates, ranks, dtype, extras))
                if writer is not None:
                    refuse_full_disk(nbytes, output)
                    writer.finish(ranks, extras, threads)
            if stage is not None:
                _write_beside(joined, changes, stage.path, record, uniform, tokenizer)
                stage.commit()
        except OSError as error:
            raise explain(error, output) from error
    return changes, nbytes


def _encoded(compute: Callable[[], Shrunk], dtype: str) -> tuple[Shrunk, int, Bytes]:
    """A module without its factors, their rank, and their bytes."""
    module = compute()
    data = encode(module.parts[0].module, module.b, module.a, dtype)
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
            extras.append(Extra(bias_key(module), dtype, shape, partial(_bias_bytes, parts, dtype)))
        if module.magnitude is not None:
            info = module.magnitude
            key = magnitude_key(module)
            extras.append(Extra(key, info.dtype, info.shape, partial(read_raw, info)))
    for saved in joined.saved.values():
        info = saved.sources[0][1]
        key = saved_key(saved.name, info.name, joined.modules)
        extras.append(Extra(key, info.dtype, info.shape, partial(_saved_bytes, saved)))
    for rows in joined.token_rows.values():
        info = rows.rows
        key = rows_key(info.name)
        extras.append(Extra(key, info.dtype, info.shape, partial(read_raw, info)))
    return extras


def _bias_bytes(parts: list[Part], dtype: str) -> Bytes:
    total = np.zeros(parts[0].module.shape[0])
    for part in parts:
        if part.module.bias is not None:
            total += part.weight * part.scale * read_float32(part.module.bias)
    return checked_bytes(f"{parts[0].module.path}: lora_bias", total, dtype)


def _saved_bytes(saved: Saved) -> Bytes:
    if len(saved.sources) == 1:
        return read_raw(saved.sources[0][1])
    total = sum(weight for weight, _ in saved.sources)
    mean = np.zeros(saved.sources[0][1].shape)
    for weight, info in saved.sources:
        mean += weight / total * read_float32(info)
    return checked_bytes(f"{saved.name}: the mean", mean, saved.sources[0][1].dtype)


def _agreed_tokenizer(joined: Joined) -> dict[str, Path]:
    """The tokenizer files beside the adapters, if they are the same for all that have any."""
    found = [tokenizer_files(a.source) for a in joined.used if a.source.is_dir()]
    contents = {
        tuple((name, file_sha256(path)) for name, path in files.items()) for files in found if files
    }
    if len(contents) > 1:
        text = "The adapters come with different tokenizers; none was copied."
        joined.notices.append(Notice("tokenizers-differ", text))
    return next(filter(None, found), {}) if len(contents) == 1 else {}


def _write_beside(
    joined: Joined,
    changes: Changes,
    folder: Path,
    record: dict[str, Any],
    uniform: bool,
    tokenizer: dict[str, Path],
) -> None:
    """adapter_config.json, the tokenizer, and loratool.json, which holds no path and no date."""
    modules: list[LowRank] = [parts[0].module for parts in joined.modules.values()]
    rows = {path: rows.indices for path, rows in joined.token_rows.items()}
    ranks = [m.rank for m in changes.modules]
    config = adapter_config(
        joined.used, modules, ranks, list(joined.saved), rows, uniform, joined.biased
    )
    write_json(folder / CONFIG, config)
    for name, path in tokenizer.items():
        shutil.copyfile(path, folder / name)
    document = {
        "schema_version": 1,
        "command": record["command"],
        "versions": versions("numpy"),
        "options": record["options"],
        "adapters": [
            describe_adapter(adapter, weight)
            for adapter, weight in zip(joined.adapters, joined.weights, strict=True)
        ],
        "result": {
            "rank": changes.rank,
            "modules": [m.to_dict() for m in changes.modules],
            "kept": changes.kept,
            "warnings": [n.code for n in (*joined.notices, *changes.notices)],
        },
        "files": {name: file_sha256(folder / name) for name in (WEIGHTS, CONFIG)},
    }
    write_json(folder / PROVENANCE, document)
