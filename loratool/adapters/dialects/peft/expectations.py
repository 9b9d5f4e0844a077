"""What the config announces and the file does not hold, and other oddities of a PEFT adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.peft.names import plain_path
from loratool.adapters.dialects.troubles import refuse_unknown
from loratool.errors import by_cause, listed
from loratool.models.layouts.names import CLASSIFIERS, is_value_head, is_vocabulary
from loratool.notices import Notice
from loratool.paths import dotted_ends
from loratool.storage.filenames import ADAPTER_CONFIG
from loratool.words import counted

#: A byte-level tokenizer has 256 tokens; an "embedding" with fewer rows than half of that is none.
_SMALLEST_VOCABULARY = 128


def note_expectations(adapter: Adapter, halves: Collection[str]) -> None:
    """Add a notice for everything that is not as the config says.

    `halves` are the paths of modules of which a part is there; they have a notice of their own.
    """
    adapter.notices += [
        *_absent_targets(adapter, halves),
        *_absent_saved_modules(adapter),
        *_absent_biases(adapter),
        *_absent_magnitudes(adapter),
        *_undeclared_magnitudes(adapter),
        *_square_transposes(adapter),
        *_few_rows(adapter),
        *_value_head(adapter),
    ]
    refuse_unknown(adapter)


def _quoted(names: Collection[str]) -> str:
    return ", ".join(map(repr, names))


def _absent_targets(adapter: Adapter, halves: Collection[str]) -> Iterator[Notice]:
    functions = [function.path for function in adapter.functions.values()]
    owners = {name.rpartition(".")[0] for name in adapter.replaced}
    modules = [*adapter.modules, *halves, *functions, *owners]
    weights = [*(m.weight_name for m in adapter.modules.values()), *halves]
    for field, what, paths in (
        ("target_modules", "module", modules),
        ("target_parameters", "parameter", weights),
    ):
        targets = adapter.config.get(field)
        if not isinstance(targets, list):
            continue
        there = {end for path in paths for end in dotted_ends(path)}
        # PEFT targets an attention module by its own name, and `out_proj` comes along.
        absent = sorted(set(targets) - there)
        if absent and paths:
            text = f"{field} names {_quoted(absent)}, but no such {what} is in the file."
            yield Notice("target-absent", text, ADAPTER_CONFIG)


def _absent_saved_modules(adapter: Adapter) -> Iterator[Notice]:
    saved = [plain_path(name) for name in adapter.declared.saved_modules]
    absent = [s for s in saved if not any(f".{s}." in f".{name}" for name in adapter.replaced)]
    if len(saved) > len(absent):
        absent = [s for s in absent if s not in CLASSIFIERS]
    if absent:
        text = f"modules_to_save names {_quoted(absent)}, but no such tensor is in the file."
        yield Notice("saved-module-absent", text, ADAPTER_CONFIG)


def _absent_biases(adapter: Adapter) -> Iterator[Notice]:
    bias = adapter.config.get("bias") or "none"
    if bias != "none" and not any(name.endswith(".bias") for name in adapter.replaced):
        text = f"bias={bias!r}, but no bias tensor is in the file."
        yield Notice("bias-absent", text, ADAPTER_CONFIG)


def _absent_magnitudes(adapter: Adapter) -> Iterator[Notice]:
    missing = [path for path, m in adapter.modules.items() if m.magnitude is None]
    if adapter.config.get("use_dora") and missing:
        text = f"use_dora is set, but {counted(len(missing), 'module', 'has')} no magnitude vector:"
        lines = by_cause((path, "") for path in missing)
        yield Notice("magnitude-absent", f"{text}\n{lines}", refused=True)


def _undeclared_magnitudes(adapter: Adapter) -> Iterator[Notice]:
    scaled = [path for path, m in adapter.modules.items() if m.magnitude is not None]
    if scaled and adapter.config and not adapter.config.get("use_dora"):
        text = (
            f"{counted(len(scaled), 'module', 'has')} a magnitude vector, and use_dora is not set, "
            "so PEFT would leave these out. torchtune exports DoRA so, with the magnitudes of q "
            "and k in an order that is wrong; give the adapter_N.pt that it saved beside. Of "
            "another program, set use_dora in adapter_config.json."
        )
        yield Notice("magnitude-undeclared", text, ADAPTER_CONFIG, refused=True)


def _square_transposes(adapter: Adapter) -> Iterator[Notice]:
    square = [m.path for m in adapter.modules.values() if m.shape[0] == m.shape[1]]
    if adapter.declared.transposes and square:
        text = (
            f"{counted(len(square), 'module', 'is')} square and fan_in_fan_out is set: whether "
            "weights are stored [in, out] cannot be seen here; the base's config.json tells."
        )
        yield Notice("square-conv1d", text, square[0])


def _value_head(adapter: Adapter) -> Iterator[Notice]:
    names = [name for name in adapter.replaced if is_value_head(name)]
    if names:
        text = (
            "The adapter holds a value head of reinforcement learning. It is no part of the "
            f"language model; a merge writes it beside its tensors:\n{listed(names)}"
        )
        yield Notice("value-head", text, names[0])


def _few_rows(adapter: Adapter) -> Iterator[Notice]:
    few = {
        name: info.shape[0]
        for name, info in adapter.replaced.items()
        if is_vocabulary(name) and info.shape and info.shape[0] < _SMALLEST_VOCABULARY
    }
    if few:
        counts = ", ".join(f"{name} {rows}" for name, rows in few.items())
        text = (
            f"Very few rows are saved ({counts}): perhaps the added tokens alone, not the whole "
            "embedding."
        )
        yield Notice("partial-embedding-rows", text, next(iter(few)))
