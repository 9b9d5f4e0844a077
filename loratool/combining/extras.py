"""What adapters hold beside their factors: tensors saved whole, biases, token rows, magnitudes.

None of these can be added up, so where several adapters hold different ones for the same place
somebody has to say which to take; nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.combining.alignment import Joined, Saved
from loratool.errors import MatchError, ValueRangeError, listed
from loratool.models.carried import sentence_modules, value_heads
from loratool.models.tokenizers import common_files
from loratool.notices import Notice
from loratool.storage.tensors import TensorInfo
from loratool.storage.values import count_not_finite, float_blocks, same_values
from loratool.words import counted

#: What to do with a tensor that several adapters hold whole, with different values.
CLASHES = ("refuse", "first", "last", "mean")


def settle(joined: Joined, clash: str) -> None:
    """Fill `saved` and `token_rows` of `joined`, as the result of combining is to have them.

    Raises MatchError where adapters hold different tensors for one place (unless `clash` says what
    to take) or have parts that no one adapter can have, and ValueRangeError for NaN and infinity.
    """
    _refuse_not_finite(joined)
    _collect_companions(joined, clash)
    _collect_saved(joined, clash)
    _collect_rows(joined, clash)
    _refuse_biased_embeddings(joined)
    _refuse_adapted_rows(joined)
    _refuse_adapted_inside(joined)
    _note_weights(joined)


def _refuse_not_finite(joined: Joined) -> None:
    held = [info for a in joined.used for info in a.replaced.values()]
    held += [rows.rows for a in joined.used for rows in a.token_rows.values()]
    held += [
        info
        for parts in joined.modules.values()
        for part in parts
        for info in (part.module.magnitude, part.module.bias)
        if info is not None
    ]
    broken = [f"{info.name} in {info.file}" for info in held if count_not_finite(info)]
    if broken:
        raise ValueRangeError(
            f"{counted(len(broken), 'tensor', 'holds')} NaN or infinity:\n{listed(broken)}",
            "Training diverged or the file is damaged; use an earlier checkpoint.",
        )


def _collect_companions(joined: Joined, clash: str) -> None:
    """Take what lies beside the factors as the files that it is: programs that read them look for
    them by name. Each sort comes whole from one adapter; where they differ somebody has to say
    from which."""
    sorts: tuple[Callable[[Adapter], dict[str, Path]], ...] = (
        lambda adapter: {path.name: path for path in adapter.wanted_companions},
        lambda adapter: value_heads(adapter.folder),
        lambda adapter: sentence_modules(adapter.folder),
    )
    for sort in sorts:
        brought = [(adapter, files) for adapter in joined.used if (files := sort(adapter))]
        if not brought:
            continue
        common = common_files([files for _, files in brought])
        if common is None and clash not in ("first", "last"):
            (one, files), (other, _) = brought[0], brought[-1]
            raise MatchError(
                f"{one.label} and {other.label} bring different files ({', '.join(files)}), and no "
                "mean can be taken of them.",
                "--saved first or last says whose to take.",
            )
        index = common if common is not None else 0 if clash == "first" else -1
        joined.companions |= brought[index][1]


def _collect_saved(joined: Joined, clash: str) -> None:
    held: dict[str, list[tuple[float, TensorInfo]]] = {}
    for adapter, weight in zip(joined.adapters, joined.weights, strict=True):
        for name, info in adapter.replaced.items() if weight else ():
            if info.file not in adapter.companions:
                held.setdefault(name, []).append((weight.at(name), info))
    clashing = []
    for name, sources in held.items():
        first = sources[0][1]
        if all(same_values(first, info) for _, info in sources[1:]):
            chosen = sources[:1]
        elif clash == "refuse" or (clash == "mean" and not _can_be_averaged(sources)):
            clashing.append(name)
            continue
        else:
            chosen = {"first": sources[:1], "last": sources[-1:], "mean": sources}[clash]
            if sum(weight for weight, _ in chosen) == 0:
                raise MatchError(
                    f"{name}: the weights of the adapters that hold it add up to 0, so there is no "
                    "mean.",
                    "Take one of them: --saved first or --saved last.",
                )
        joined.saved[name] = Saved(name, tuple(chosen))
    if clashing:
        raise _clash(clashing, clash)


def _can_be_averaged(sources: Sequence[tuple[float, TensorInfo]]) -> bool:
    return len({info.shape for _, info in sources}) == 1 and all(i.is_float for _, i in sources)


def _clash(names: Sequence[str], clash: str) -> MatchError:
    shapes = " and with different shapes, or integers" if clash == "mean" else ""
    return MatchError(
        f"{counted(len(names), 'tensor', 'is')} held whole by several adapters, with different "
        f"values{shapes}; "
        f"there is no sum of them:\n{listed(names)}",
        "Say which to take: --saved first or --saved last"
        + (", or --saved mean for their weighted mean." if clash == "refuse" else "."),
    )


def _collect_rows(joined: Joined, clash: str) -> None:
    clashing = []
    for adapter in joined.used:
        for path, rows in adapter.token_rows.items():
            taken = joined.token_rows.setdefault(path, rows)
            alike = taken.indices == rows.indices and same_values(taken.rows, rows.rows)
            if taken is rows or alike:
                continue
            if clash == "last":
                joined.token_rows[path] = rows
            elif clash != "first":
                clashing.append(f"{path} (token rows)")
    if clashing:
        raise _clash(clashing, "rows")


def _refuse_biased_embeddings(joined: Joined) -> None:
    """PEFT has a bias for all the modules of an adapter or for none, and none on embeddings."""
    kinds = {parts[0].module.kind for parts in joined.modules.values()}
    if joined.biased and kinds & {"embedding", "attention-in", "attention-out"}:
        raise MatchError(
            "One adapter has lora_bias, another adapts an embedding or an attention module; PEFT "
            "has no adapter with both.",
            "Merge them into the base together instead: `loratool merge BASE ADAPTER ADAPTER`.",
        )


def _refuse_adapted_rows(joined: Joined) -> None:
    """PEFT trains single rows of an embedding, or puts factors on it, not both."""
    both = sorted(joined.token_rows.keys() & joined.modules.keys())
    if both:
        raise MatchError(
            f"One adapter trains token rows of {', '.join(both)}, another has factors for it; PEFT "
            "has no adapter with both.",
            "Merge them into the base together instead: `loratool merge BASE ADAPTER ADAPTER`.",
        )


def _refuse_adapted_inside(joined: Joined) -> None:
    """PEFT replaces a saved module by a copy; factors inside it have no place there."""
    named = {s for a in joined.used for s in a.declared.saved_modules}
    inside = [
        f"{path} (in {name})"
        for path in joined.modules
        for name in sorted(named)
        if f".{name}." in f".{path}" and any(f".{name}." in f".{saved}" for saved in joined.saved)
    ]
    if inside:
        raise MatchError(
            "One adapter saves a module whole, another has factors for a part of it; PEFT has no "
            f"adapter with both:\n{listed(inside)}",
            "Merge them into the base together instead: `loratool merge BASE ADAPTER ADAPTER`.",
        )


def _note_weights(joined: Joined) -> None:
    for adapter, weight in zip(joined.adapters, joined.weights, strict=True):
        if weight and not weight.is_one and (adapter.replaced or adapter.token_rows):
            text = (
                f"The weight {weight} does not apply to the tensors that {adapter.label} holds "
                "whole."
            )
            joined.notices.append(Notice("weight-not-applied", text, adapter.label))


def unequal(one: Adapter, other: Adapter, tolerance: float) -> list[str]:
    """What differs between two adapters beside their low-rank modules."""
    first, second = _beside(one), _beside(other)
    found = []
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            found.append(f"{name}: only in {(one if name in first else other).source}")
            continue
        (x_info, x_scale), (y_info, y_scale) = first[name], second[name]
        if x_info.shape != y_info.shape:
            found.append(f"{name}: {list(x_info.shape)} and {list(y_info.shape)}")
        elif not (x_info.is_float and y_info.is_float):
            if not same_values(x_info, y_info):
                found.append(f"{name}: other values")
        else:
            apart, size = _distance(x_info, x_scale, y_info, y_scale)
            if not apart <= tolerance * size:
                found.append(f"{name}: differs by {apart / size:.2g} of its norm")
    return found


def _distance(x: TensorInfo, x_scale: float, y: TensorInfo, y_scale: float) -> tuple[float, float]:
    """‖x − y‖ and the larger of the norms, of the scaled tensors."""
    apart = x_size = y_size = 0.0
    for a, b in zip(float_blocks(x), float_blocks(y), strict=True):
        wide_a, wide_b = x_scale * a.astype(np.float64), y_scale * b.astype(np.float64)
        apart += float(np.sum((wide_a - wide_b) ** 2))
        x_size, y_size = x_size + float(wide_a @ wide_a), y_size + float(wide_b @ wide_b)
    return math.sqrt(apart), math.sqrt(max(x_size, y_size))


def _beside(adapter: Adapter) -> dict[str, tuple[TensorInfo, float]]:
    """Tensors that matter beside the factors, by name, and what they are multiplied with."""
    found = {name: (info, 1.0) for name, info in adapter.replaced.items()}
    for path, rows in adapter.token_rows.items():
        found[f"{path} (token rows {list(rows.indices)})"] = (rows.rows, 1.0)
    for path, module in adapter.modules.items():
        if module.magnitude is not None:
            found[f"{path} (DoRA magnitude)"] = (module.magnitude, 1.0)
        if module.bias is not None:
            found[f"{path} (lora_bias)"] = (module.bias, module.scale or 0.0)
    return found
