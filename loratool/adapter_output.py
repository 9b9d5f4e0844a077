"""The adapter directory that combine and resize make, and what they say about its modules."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratool.adapter import LowRank, Notice
from loratool.checkpoint.sidefiles import PROVENANCE, tokenizer_files
from loratool.checkpoint.tensors import (
    DTYPE_BITS,
    as_bytes,
    as_float32,
    read_float32,
    read_raw,
)
from loratool.checkpoint.writer import StagedDirectory, explain
from loratool.errors import UsageError, ValueRangeError, listed, nearest
from loratool.formats.peft_writer import (
    CONFIG,
    WEIGHTS,
    AdapterWriter,
    Bytes,
    Extra,
    adapter_config,
    bias_key,
    encode,
    factor_shapes,
    magnitude_key,
    rows_key,
    saved_key,
)
from loratool.joining import Joined, Part, Saved
from loratool.linalg.lowrank import Factor, Float64, decompose
from loratool.linalg.ranks import Criterion
from loratool.output import Progress
from loratool.provenance import describe_adapter, file_sha256, versions, write_json
from loratool.threads import computed

#: What `--dtype` may be, and the safetensors code of it.
DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_HALF = ("F16", "BF16")

#: From this share on, rounding to half precision is worth a warning: bfloat16 takes about 0.3 %.
_LARGE_ROUNDING = 0.01
NAMES = {code: name for name, code in DTYPES.items()}


@dataclass(frozen=True)
class Shrunk:
    """New factors of one module.

    `b [out, k]` and `a [k, in]` are sorted by singular value, so that the first columns are the
    best of their number; `squares [k]` are the squared singular values, and `energy` the ‖·‖² of
    what they stand for, with what was cut. `rank` is how many the criterion wants. `ranks` are
    those of the inputs, `from_sum` is ‖result − Σ wᵢsᵢBᵢAᵢ‖/‖Σ‖ for methods that are no sum.
    """

    path: str
    parts: list[Part]
    b: Factor
    a: Factor
    squares: Float64
    energy: float
    rank: int
    from_sum: float | None = None
    rounding: float | None = None


@dataclass(frozen=True)
class ModuleChange:
    """One module of the new adapter. `ranks` are those of the inputs, None where it was not there.

    `kept` is the share of ‖ΔW‖² that the new rank holds, None for a module that does nothing;
    `error` is ‖cut off‖/‖ΔW‖. `norm` is ‖ΔW‖ before the cut. `rounding` is what rounding the
    factors to half precision adds to the error, None for float32.
    """

    path: str
    kind: str
    shape: tuple[int, int]
    ranks: tuple[int | None, ...]
    rank: int
    norm: float
    kept: float | None
    error: float
    from_sum: float | None = None
    rounding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "shape": list(self.shape), "ranks": list(self.ranks)}


def shrink(
    path: str,
    parts: list[Part],
    b: Factor,
    a: Factor,
    scale: float,
    criterion: Criterion,
    whole: bool,
    energy: float | None = None,
) -> Shrunk:
    """The factors of `scale·b·a` that the criterion asks for; all if `whole`, to be cut later.

    `energy` is the ‖·‖² that the product approximates, if it is not exact.
    """
    found = decompose(b, a, scale)
    total = found.energy if energy is None else energy
    rank = criterion.choose(found.values, total)
    new_b, new_a = found.factors(None if whole else rank)
    return Shrunk(path, parts, new_b, new_a, found.values[: len(new_a)] ** 2, total, rank)


@dataclass
class AdapterFiles:
    """What was written: the changes module by module, the rank of the adapter, and its bytes.

    `kept`, `error` and `rounding` are those of `ModuleChange`, over all modules together.
    """

    modules: list[ModuleChange]
    rank: int
    nbytes: int
    kept: float | None
    error: float
    rounding: float | None
    notices: list[Notice]


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
    least: int = 1,
    multiple: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> AdapterFiles:
    """Write the adapter of these modules to `output`, all or nothing; only measure if `dry_run`.

    With `uniform` all modules get the largest rank, at least `least` and raised to a multiple of
    `multiple`; those that have fewer singular values are filled up with zeros. `record` goes into
    loratool.json.
    """
    staged = nullcontext() if dry_run else StagedDirectory(output, overwrite)
    with staged as stage:
        try:
            with nullcontext() if stage is None else AdapterWriter(stage.path, dtype) as writer:
                shrunk = []
                work = (partial(_encoded, call, None if dry_run else dtype) for call in modules)
                for done, (module, rank, data) in enumerate(computed(work, threads), 1):
                    if writer is not None:
                        writer.add(module.parts[0].module, rank, data)
                    shrunk.append(module)
                    if progress is not None:
                        progress(done, len(joined.modules), module.path)
                files = _measure(joined, shrunk, least, multiple if uniform else 0)
                extras = _extras(joined, dtype)
                files.nbytes = _size(joined, files, extras, dtype)
                if writer is not None and stage is not None:
                    files.nbytes = writer.finish([m.rank for m in files.modules], extras, threads)
            if stage is not None:
                _write_beside(joined, files, stage.path, record, uniform)
                stage.commit()
        except OSError as error:
            raise explain(error, output) from error
    return files


def _encoded(compute: Callable[[], Shrunk], dtype: str | None) -> tuple[Shrunk, int, Bytes]:
    """A module without its factors, their rank, and their bytes (none if no dtype is given)."""
    module = compute()
    template, rank = module.parts[0].module, len(module.a)
    data = np.zeros(0, np.uint8) if dtype is None else encode(template, module.b, module.a, dtype)
    lost = rounding_loss(module.b, module.a, data, dtype) if dtype in _HALF else None
    nothing = np.zeros((0, 0))
    return replace(module, b=nothing, a=nothing, rounding=lost), rank, data


def rounding_loss(b: Factor, a: Factor, data: Bytes, dtype: str) -> float:
    """About ‖B'A' − BA‖/‖BA‖ of the rounded factors in `data`, as `encode` made it.

    To first order, and with the columns of B orthogonal to each other, and the rows of A, it is
    `√Σ(‖δbₖ‖²‖aₖ‖² + ‖bₖ‖²‖δaₖ‖²) / √Σ‖bₖ‖²‖aₖ‖²`.
    """
    rounded = as_float32(data, dtype)
    squares = []
    for exact, found in ((a, rounded[: a.size]), (b.T, rounded[a.size :])):
        squares.append(np.einsum("ij,ij->i", exact, exact))
        off = exact - found.reshape(exact.shape)
        squares.append(np.einsum("ij,ij->i", off, off))
    size_a, off_a, size_b, off_b = squares
    size = float(size_b @ size_a)
    return float(np.sqrt((off_b @ size_a + size_b @ off_a) / size)) if size else 0.0


def _measure(joined: Joined, shrunk: list[Shrunk], least: int, multiple: int) -> AdapterFiles:
    """The final ranks, equal for all modules unless `multiple` is 0, and what they keep."""
    if not any(m.energy > 0 for m in shrunk):
        raise ValueRangeError(
            "The result does nothing: every module is zero"
            + (", because the weights cancel." if len(joined.used) > 1 else "."),
            "`loratool compare` shows whether the adapters are the same.",
        )
    largest = max(least, *(m.rank for m in shrunk))
    if multiple:
        largest = -(-largest // multiple) * multiple
    changes, kept_all, all_, lost_all = [], 0.0, 0.0, 0.0
    for m in shrunk:
        ranks: list[int | None] = [None] * len(joined.adapters)
        for part in m.parts:
            ranks[part.index] = part.module.rank
        rank = largest if multiple else m.rank
        kept = min(float(m.squares[:rank].sum()), m.energy)
        template = m.parts[0].module
        changes.append(
            ModuleChange(
                m.path, template.kind, template.shape, tuple(ranks), rank, m.energy**0.5,
                kept / m.energy if m.energy else None,
                max(0.0, 1 - kept / m.energy) ** 0.5 if m.energy else 0.0, m.from_sum, m.rounding,
            )
        )  # fmt: skip
        kept_all, all_ = kept_all + kept, all_ + m.energy
        lost_all += kept * (m.rounding or 0.0) ** 2
    silent = [m.path for m in shrunk if m.energy == 0]
    notices = []
    if silent:
        text = f"{len(silent)} modules of the result do nothing, their delta is zero:\n"
        notices.append(Notice("zero-delta", text + listed(silent), silent[0]))
    error = max(0.0, 1 - kept_all / all_) ** 0.5
    rounding = None
    if any(m.rounding is not None for m in shrunk):
        rounding = (lost_all / kept_all) ** 0.5
        if rounding > _LARGE_ROUNDING:
            text = f"Rounding the factors changes the delta by {rounding:.1%}. Write float32."
            notices.append(Notice("rounding-large", text))
    rank = max(m.rank for m in changes)
    return AdapterFiles(changes, rank, 0, kept_all / all_, error, rounding, notices)


def _size(joined: Joined, files: AdapterFiles, extras: list[Extra], dtype: str) -> int:
    numbers = sum(
        int(np.prod(shape))
        for change, parts in zip(files.modules, joined.modules.values(), strict=True)
        for _, shape in factor_shapes(parts[0].module, change.rank)
    )
    others = sum(int(np.prod(e.shape)) * DTYPE_BITS[e.dtype] for e in extras)
    return (numbers * DTYPE_BITS[dtype] + others) // 8


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
    return as_bytes(total, dtype)


def _saved_bytes(saved: Saved) -> Bytes:
    if len(saved.sources) == 1:
        return read_raw(saved.sources[0][1])
    total = sum(weight for weight, _ in saved.sources)
    mean = np.zeros(saved.sources[0][1].shape)
    for weight, info in saved.sources:
        mean += weight / total * read_float32(info)
    return as_bytes(mean, saved.sources[0][1].dtype)


def _write_beside(
    joined: Joined, files: AdapterFiles, folder: Path, record: dict[str, Any], uniform: bool
) -> None:
    """adapter_config.json, the tokenizer if the adapters agree about it, and loratool.json."""
    modules: list[LowRank] = [parts[0].module for parts in joined.modules.values()]
    rows = {path: rows.indices for path, rows in joined.token_rows.items()}
    ranks = [m.rank for m in files.modules]
    config = adapter_config(
        joined.used, modules, ranks, list(joined.saved), rows, uniform, joined.biased
    )
    write_json(folder / CONFIG, config)
    tokenizers = [tokenizer_files(a.source) for a in joined.used if a.source.is_dir()]
    found = [t for t in tokenizers if t]
    contents = {tuple((name, file_sha256(path)) for name, path in t.items()) for t in found}
    if len(contents) == 1:
        for name, path in found[0].items():
            shutil.copyfile(path, folder / name)
    elif contents:
        text = "The adapters come with different tokenizers; none was copied."
        files.notices.append(Notice("tokenizers-differ", text))
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
            "rank": files.rank,
            "modules": [m.to_dict() for m in files.modules],
            "kept": files.kept,
            "warnings": [n.to_dict() for n in (*joined.notices, *files.notices)],
        },
        "files": {name: file_sha256(folder / name) for name in (WEIGHTS, CONFIG)},
    }
    write_json(folder / PROVENANCE, document)
