"""Some parts of an adapter, chosen by globs on their paths: the rest of it is not there then.

A part is a module with all that is trained of it (its factors, a magnitude, a `lora_bias`), a
tensor that is replaced whole, or the trained rows of an embedding. A whole tensor goes by its own
name and by the path of its module, so that "score" means "score.weight" too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from loratool.adapters.adapter import Adapter
from loratool.adapters.factors import Factors
from loratool.adapters.functions import Function
from loratool.errors import MatchError, UsageError
from loratool.paths import Choice, matches, path_hint
from loratool.storage.composed import Composed
from loratool.storage.tensors import TensorInfo


def called(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """The parts of an adapter by name, and all names that each goes by."""
    names = {path: (path, module.path) for path, module in adapter.modules.items()}
    names |= {path: (path, function.path) for path, function in adapter.functions.items()}
    names |= {name: (name, name.rpartition(".")[0] or name) for name in adapter.replaced}
    return names | {path: (path,) for path in adapter.token_rows}


def picked(adapters: Sequence[Adapter], choice: Choice) -> list[Adapter]:
    """The adapters with the parts that are wanted.

    Raises UsageError for a glob that fits no part of any of them, and where nothing of one is left.
    """
    if not choice:
        return list(adapters)
    _refuse_idle(adapters, choice)
    found = [with_only(adapter, choice) for adapter in adapters]
    for adapter in found:
        if not called(adapter):
            raise UsageError(
                f"{adapter.label}: --include and --exclude leave nothing of it.",
                f"{_look(adapter.left_out)} Omit the adapter, or choose otherwise.",
            )
    return found


def _refuse_idle(adapters: Sequence[Adapter], choice: Choice) -> None:
    parts = {part: names for adapter in adapters for part, names in called(adapter).items()}
    for option, globs in choice.to_dict().items():
        for glob in globs:
            if not any(matches(name, [glob]) for names in parts.values() for name in names):
                raise UsageError(
                    f"--{option} {glob!r} matches no part of "
                    f"{'the adapter' if len(adapters) == 1 else 'any adapter'}.",
                    path_hint(glob, parts),
                )


def _look(parts: Iterable[str]) -> str:
    return f"The paths look like {next(iter(parts), '…')}."


def with_only(adapter: Adapter, choice: Choice) -> Adapter:
    """The adapter with the parts that are wanted, and the tensors that these need."""
    if not choice:
        return adapter
    names = called(adapter)
    gone = {part for part in names if not choice.takes(*names[part])}
    kept = replace(
        adapter,
        modules={path: one for path, one in adapter.modules.items() if path not in gone},
        functions={path: one for path, one in adapter.functions.items() if path not in gone},
        replaced={name: one for name, one in adapter.replaced.items() if name not in gone},
        token_rows={path: one for path, one in adapter.token_rows.items() if path not in gone},
        # What the base holds in their place may be merged already.
        frozen={n: one for n, one in adapter.frozen.items() if n.rpartition(".")[0] not in gone},
        choice=choice,
        left_out=(*adapter.left_out, *(part for part in names if part in gone)),
    )
    stored = _Stored(adapter)
    unneeded = stored.of(adapter) - stored.of(kept)
    kept.tensors = {key: one for key, one in adapter.tensors.items() if key not in unneeded}
    return kept


def share_parts(adapter: Adapter, other: Choice) -> bool:
    """Whether an adapter, as it was chosen, has a part that another choice of it has too."""
    return any(other.takes(*names) for names in called(adapter).values())


class _Stored:
    """The tensors of an adapter's files, found by where their bytes are."""

    def __init__(self, adapter: Adapter) -> None:
        self._places: dict[Path, list[tuple[int, str]]] = {}
        for key, info in adapter.tensors.items():
            self._places.setdefault(info.file, []).append((info.start, key))
        for places in self._places.values():
            places.sort()

    def of(self, adapter: Adapter) -> set[str]:
        """The keys of those that the parts of an adapter are made of."""
        return {
            key for used in _used(adapter) for info in _leaves(used) if (key := self._key_of(info))
        }

    def _key_of(self, info: TensorInfo) -> str:
        places = self._places.get(info.file, [])
        index = bisect_right(places, (info.start, "\U0010ffff")) - 1
        return places[index][1] if index >= 0 else ""


def _used(adapter: Adapter) -> Iterator[TensorInfo]:
    parts: list[Factors | Function] = [*adapter.modules.values(), *adapter.functions.values()]
    for part in parts:
        yield from part.tensors
        yield from getattr(part, "stored", ())
    yield from adapter.replaced.values()
    yield from (rows.rows for rows in adapter.token_rows.values())


def _leaves(info: TensorInfo) -> Iterator[TensorInfo]:
    if not isinstance(info, Composed):
        yield info
    else:
        for part in info.parts:
            yield from _leaves(part)


def refuse_half_companions(before: Sequence[Adapter], after: Sequence[Adapter]) -> None:
    """Raise MatchError where a file that goes along as it is holds both what is wanted and what is
    not."""
    for whole, adapter in zip(before, after, strict=True):
        for path in whole.companions:
            held = [key for key, info in whole.tensors.items() if info.file == path]
            left = [key for key in held if key in adapter.tensors]
            if 0 < len(left) < len(held):
                raise MatchError(
                    f"{path} goes along as it is, and of its {len(held)} tensors {len(left)} are "
                    "wanted.",
                    "Let --include and --exclude take all of them, or none.",
                )
