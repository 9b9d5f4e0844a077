"""What every verb on models asks of its arguments, before and after the files are opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratool.adapters.experts import flat_packing
from loratool.adapters.told import Told
from loratool.adapters.weighting import PLAIN, Weight, parse_weight
from loratool.dtypes import MODEL_DTYPES
from loratool.errors import UsageError, unknown
from loratool.models.checkpoint import Checkpoint, open_checkpoint
from loratool.models.quantised.base import dequantised
from loratool.storage.placing import recover
from loratool.words import counted

Source = str | Path

#: A size of shards without a unit that nobody means.
_SMALLEST = 1_000_000
#: A size that is as good as any larger one.
_MOST = 1e30


def as_list(adapters: Source | Sequence[Source]) -> list[Source]:
    return [adapters] if isinstance(adapters, str | Path) else list(adapters)


def model_at(base: Source | None) -> Checkpoint | None:
    """The plain model that `base` stands for, where one is given."""
    return None if base is None else dequantised(open_checkpoint(base))


def as_texts(given: str | Sequence[str]) -> list[str]:
    """The texts in a list; one that was given alone is one, not its letters."""
    return [given] if isinstance(given, str) else list(given)


def told_of(
    told: Told | Sequence[Told], adapters: Sequence[Source], expert_b_layout: str | None = None
) -> list[Told]:
    """What is said of each adapter: the same of all, or one after the other. Raises UsageError."""
    layout = flat_packing(expert_b_layout)
    said = [told] if isinstance(told, Told) else list(told) or [Told()]
    if isinstance(told, Told) or not told:
        said *= len(adapters)
    if len(said) != len(adapters):
        given = counted(len(adapters), "adapter")
        raise UsageError(
            f"{counted(len(said), 'adapter')} described, {given} given.",
            "Say what a file does not tell once per adapter, in their order.",
        )
    for one in said:
        one.check()
    return [replace(one, expert_b_layout=one.expert_b_layout or layout) for one in said]


def told_before(record: dict[str, Any] | None, adapters: Sequence[Source]) -> list[Told] | None:
    """What was said of these adapters when they were merged, by the record of the model; None
    where nothing was. Adapters are known by their names, in their order."""
    entries = list(record["adapters"]) if record else []
    if not any("told" in entry for entry in entries):
        return None
    found = []
    for source in adapters:
        name = str(source).rstrip("/").rpartition("/")[2]
        entry = next((e for e in entries if e["name"] == name), None)
        if entry is not None:
            entries.remove(entry)
        found.append(Told.from_dict(entry["told"]) if entry and "told" in entry else Told())
    return found


def check_paths(paths: Sequence[Source], adapters: Sequence[Source], usage: str) -> None:
    """Raise UsageError for an empty path and for no adapter at all.

    What a run that died had moved aside at one of the paths is put back.
    """
    if not all(str(path) for path in (*paths, *adapters)):
        raise UsageError("A path is empty.", "Check the variables in your command.")
    if not adapters:
        raise UsageError("No adapter given.", usage)
    for path in (*paths, *adapters):
        recover(Path(path))


def parse_bytes(size: int | str) -> int:
    """50_000_000 from "50MB", "50 mb" or 50_000_000; MiB and the like count in powers of two."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kMGT]?)(i?)B?)\s*", str(size), re.IGNORECASE)
    if match is None:
        raise UsageError(f"{size!r} is not a size.", "Write 50MB, 1.5GB or a number of bytes.")
    power = " kmgt".index(match[2].lower() or " ")
    return int(min(float(match[1]), _MOST) * (1024 if match[3] else 1000) ** power)


def shard_size(size: int | str | None) -> int | None:
    """The bytes of the largest shard that is asked for. Raises UsageError for none at all."""
    if size is None:
        return None
    found = parse_bytes(size)
    if found == 0:
        raise UsageError("Shards of 0 bytes hold nothing.", "Write 5GB, 500MB or the like.")
    if isinstance(size, str) and size.strip().replace(".", "").isdigit() and found < _SMALLEST:
        raise UsageError(
            f"Shards of {counted(found, 'byte')}: a unit is missing.",
            f"Write 5GB, 500MB or the like; {size}B where bytes are meant.",
        )
    return found


def check_dtype(dtype: str) -> None:
    if dtype not in MODEL_DTYPES:
        raise unknown("dtype", dtype, MODEL_DTYPES)


def check_weights(
    weights: Sequence[float | str | Weight] | None, adapters: Sequence[Source]
) -> list[Weight]:
    """The weights, 1 each if none were given. Raises UsageError."""
    try:
        given = [parse_weight(w) for w in weights] if weights else [PLAIN] * len(adapters)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"The weights {weights!r} are not numbers.", "Give numbers.") from None
    if len(given) != len(adapters):
        layered = any(weight.ranges for weight in given)
        raise UsageError(
            f"{counted(len(given), 'weight', 'was')} given for "
            f"{counted(len(adapters), 'adapter')}.",
            "Give --weight once per adapter, in their order"
            + ("; ranges of layers of one adapter go into one, with commas." if layered else "."),
        )
    return given


def check_sizes(weights: Sequence[Weight]) -> None:
    """Raise UsageError for weights with which squares of norms leave the range of float64."""
    for weight in (value for given in weights for value in given.values):
        if weight and not 1e-30 < abs(weight) < 1e30:
            raise UsageError(
                f"Weight {weight:g} is out of range: its square "
                + ("overflows." if abs(weight) > 1 else "underflows."),
                "Weights are mostly between -2 and 2.",
            )
