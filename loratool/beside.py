"""What adapters hold beside their factors: tensors saved whole, biases, token rows, magnitudes.

None of these can be added up, so where several adapters hold different ones for the same place
somebody has to say which to take; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loratool.adapter import Adapter
from loratool.checkpoint.tensors import TensorInfo, read_float32
from loratool.errors import MatchError, ValueRangeError, listed
from loratool.joining import Joined, Saved

#: What to do with a tensor that several adapters hold whole, with different values.
CLASHES = ("refuse", "first", "last", "mean")


def settle(joined: Joined, clash: str) -> None:
    """Fill `saved` and `token_rows` of `joined`, as the result of combining is to have them.

    Raises MatchError where adapters hold different tensors for one place (unless `clash` says what
    to take) or have parts that no one adapter can have, and ValueRangeError for NaN and infinity.
    """
    _collect_saved(joined, clash)
    _collect_rows(joined, clash)
    _refuse_biased_embeddings(joined)
    kept = [info for saved in joined.saved.values() for _, info in saved.sources]
    kept += [rows.rows for rows in joined.token_rows.values()]
    kept += [
        info
        for parts in joined.modules.values()
        for part in parts
        for info in (part.module.magnitude, part.module.bias)
        if info is not None
    ]
    broken = [t.name for t in kept if t.is_float and not np.isfinite(read_float32(t)).all()]
    if broken:
        raise ValueRangeError(
            f"{len(broken)} tensors hold NaN or infinity:\n{listed(broken)}",
            "Training diverged or the file is damaged; use an earlier checkpoint.",
        )


def _same(one: TensorInfo, other: TensorInfo) -> bool:
    if one.shape != other.shape:
        return False
    return bool(np.array_equal(read_float32(one), read_float32(other)))


def _collect_saved(joined: Joined, clash: str) -> None:
    held: dict[str, list[tuple[float, TensorInfo]]] = {}
    for adapter, weight in zip(joined.adapters, joined.weights, strict=True):
        for name, info in adapter.replaced.items() if weight else ():
            sources = held.setdefault(name, [])
            if not any(_same(info, other) for _, other in sources):
                sources.append((weight, info))
    clashing = [name for name, sources in held.items() if len(sources) > 1]
    if clash == "mean":
        clashing = [n for n in clashing if len({info.shape for _, info in held[n]}) > 1]
    if clashing and clash in ("refuse", "mean"):
        raise _clash(clashing, clash)
    for name, sources in held.items():
        chosen = sources[:1] if clash == "first" else sources[-1:] if clash == "last" else sources
        if sum(weight for weight, _ in chosen) == 0:
            raise MatchError(
                f"{name}: the weights of the adapters that hold it add up to 0, so there is no "
                "mean.",
                "Take one of them: --saved first or --saved last.",
            )
        joined.saved[name] = Saved(name, tuple(chosen))


def _clash(names: Sequence[str], clash: str) -> MatchError:
    shapes = " and of different shapes" if clash == "mean" else ""
    return MatchError(
        f"{len(names)} tensors are held whole by several adapters, with different values{shapes}; "
        f"there is no sum of them:\n{listed(names)}",
        "Say which to take: --saved first or --saved last"
        + (", or --saved mean for their weighted mean." if clash == "refuse" else "."),
    )


def _collect_rows(joined: Joined, clash: str) -> None:
    clashing = []
    for adapter in joined.used:
        for path, rows in adapter.token_rows.items():
            taken = joined.token_rows.setdefault(path, rows)
            if taken is rows or (taken.indices == rows.indices and _same(taken.rows, rows.rows)):
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


def unequal(joined: Joined, tolerance: float) -> list[str]:
    """What differs between the first adapter and the others beside the low-rank modules."""
    first, *others = [_beside(adapter) for adapter in joined.adapters]
    found = []
    for adapter, other in zip(joined.adapters[1:], others, strict=True):
        for name in sorted(first.keys() | other.keys()):
            if name not in first or name not in other:
                which = joined.adapters[0] if name in first else adapter
                found.append(f"{name}: only in {which.source}")
                continue
            (one, scale), (two, other_scale) = first[name], other[name]
            if one.shape != two.shape:
                found.append(f"{name}: {list(one.shape)} and {list(two.shape)}")
                continue
            x = scale * read_float32(one).astype(np.float64)
            y = other_scale * read_float32(two).astype(np.float64)
            apart, size = np.linalg.norm(x - y), max(np.linalg.norm(x), np.linalg.norm(y))
            if not apart <= tolerance * size:
                found.append(f"{name}: differs by {apart / size:.2g} of its norm")
    return found


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
