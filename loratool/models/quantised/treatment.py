"""What becomes of a quantised base: which of its weights are opened, and what its config says then.

Nothing that no adapter touches need be opened. Which weights are, depends on the formats: what
bitsandbytes quantised while loading is quantised again while loading, so the whole model becomes
plain; calibrated and native formats are what people chose the model for, so all but the adapted
weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratool.dtypes import FACTOR_DTYPES
from loratool.errors import BaseError, UsageError
from loratool.models.checkpoint import Checkpoint
from loratool.models.config import Rewriting
from loratool.models.layouts.layout import in_memory
from loratool.models.quantised.base import Dequantised, as_stored
from loratool.models.quantised.declared import BESIDE, quantisation_of
from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.models.quantised.fused import experts_of, with_fused
from loratool.models.quantised.ignoring import can_ignore, exported_with_ignored, with_ignored
from loratool.models.quantised.module import Quantisation
from loratool.notices import Notice
from loratool.storage.filenames import QUANTISATION
from loratool.storage.tensors import TensorInfo
from loratool.words import counted

#: What `--quantised` may be.
TREATMENTS = ("plain", "keep", "requantise")
#: What becomes of a base of which no adapter changes a quantised weight, unless it becomes plain.
_UNTOUCHED = "untouched"

#: What torchao has in the metadata of a file for a weight that is plain.
_PLAIN_IN_METADATA = '{"_type": "Tensor"}'


@dataclass(frozen=True)
class Quantised:
    """What a user says of a quantised base: what becomes of it (one of TREATMENTS, or what is usual
    for its format), whether the adapter was trained on its very weights, and whether weights go
    back into formats of few bits, which lose most of a delta."""

    how: str | None = None
    trained_here: bool = False
    force: bool = False


#: What is usual for the format.
AS_USUAL = Quantised()
#: The plain model that every treatment comes from: what a result is held against.
AS_IT_WAS_TRAINED = Quantised("plain", trained_here=True)


@dataclass(frozen=True)
class Treatment:
    """What becomes of the quantised weights of `base`.

    `how` is one of TREATMENTS, or "untouched" where no adapter changes one of them. Those of
    `opened` become plain tensors of `dtype`, the base's own 16-bit one; those of `back` are
    quantised again; all others are copied byte for byte. `touched` are those that adapters change.
    """

    base: Dequantised
    how: str
    touched: frozenset[str]
    opened: frozenset[str]
    back: frozenset[str] = frozenset()
    dtype: str = "BF16"

    @property
    def trained_here(self) -> bool:
        """Whether a user said so of weights that were rescaled."""
        return bool(self.base.rescaled_by)

    @property
    def is_plain(self) -> bool:
        """Whether the result is a model without any quantised weight."""
        return len(self.opened) == len(self.base.weights)

    def sources(self) -> Iterator[tuple[str, list[TensorInfo]]]:
        """What each output shard begins with: tensors of the plain model where they are opened, of
        the files where they are not."""
        weights, owners = self.base.weights, self.base.owners
        for shard, names in self.base.packed.shards.items():
            found = []
            for name in names:
                owner = owners.get(name)
                if owner is None or owner not in self.opened:
                    if not (self.is_plain and name in self.base.extras):
                        found.append(self.base.packed.tensors[name])
                elif name == weights[owner].stored_as.main.name:
                    found.append(weights[owner])
            if found:
                yield shard, found

    @property
    def metadata(self) -> dict[str, str]:
        """What the files of the result say of themselves: of weights as torchao has them, how each
        is stored."""
        said = self.base.packed.metadata
        if self.is_plain or not said.keys() & self.base.weights.keys():
            return {}
        return {**said, **dict.fromkeys(said.keys() & self.opened, _PLAIN_IN_METADATA)}

    def rewriting(self) -> Rewriting | None:
        """What config.json and its like must say differently; None where nothing."""
        places = self.base.settings.places
        if self.is_plain:
            return Rewriting(places, None, without=QUANTISATION)
        if not self.opened:
            return None
        paths, plain = _paths(self.base, self.opened), _paths(self.base, _plain(self.base))
        table = with_ignored(self.base.settings, paths, plain) if places else None
        others = {
            name: partial(_beside_with_ignored, method, paths, plain)
            for name, method in BESIDE.items()
        }
        return Rewriting(places, table, others)

    @property
    def notices(self) -> list[Notice]:
        """Which model comes of it."""
        if self.how == _UNTOUCHED or not self.touched:
            return []
        result = (
            "The result is the dequantised base plus the adapter: the model that was trained, "
            "where this was its base, as in QLoRA. The 16-bit original, where there is one, gives "
            "another model, often as good."
        )
        if self.how == "requantise":
            result = (
                "The dequantised weights plus the adapter are quantised again. Who needs that "
                "format loses less by merging into the 16-bit original and quantising the result."
            )
        text = f"{self.base.label} is quantised ({self.base.title}). {result}"
        if self.trained_here:
            text = (
                f"{self.base.label} is quantised ({self.base.title}), and its weights were "
                "rescaled for that: the result is right only for an adapter that was trained on "
                "this very base, as was said."
            )
        return [Notice("quantised-base", text, self.base.label)]

    def __str__(self) -> str:
        """One line for people."""
        title = self.base.title
        if self.how == _UNTOUCHED:
            return f"{title}, copied as it is: no adapted weight is quantised"
        if self.how == "plain":
            return f"{title}, dequantised: the result is a plain model"
        if self.is_plain:
            return f"{title}, all of it plain {_name(self.dtype)}: all is adapted, or one with that"
        opened, rest = len(self.opened), len(self.base.weights) - len(self.opened)
        if self.how == "requantise":
            return f"{title}, quantised again where adapted ({counted(len(self.back), 'weight')})"
        siblings = opened - len(self.touched)
        beside = f" ({siblings} beside adapted ones)" if siblings else ""
        return (
            f"{title}, kept: {counted(opened, 'weight', 'is')} plain {_name(self.dtype)}{beside}, "
            f"{rest} copied as {'it is' if rest == 1 else 'they are'}"
        )


def leftover(base: Checkpoint) -> Rewriting | None:
    """What config.json must not say any more where it speaks of quantisation and no weight is
    quantised: programs that load the model would look for scales."""
    places = quantisation_of(base).places
    return Rewriting(places, None, without=QUANTISATION) if places else None


def note_leftover(base: Checkpoint) -> Notice:
    """A warning for such a base."""
    said = quantisation_of(base)
    text = (
        f"{base.label}: {said.where} of its config.json says {said.method or 'quantised'}, and no "
        "weight of it is quantised. It is taken as the plain model that it is, and the entry does "
        "not go along."
    )
    return Notice("leftover-quantisation", text, base.label)


def treat(
    base: Dequantised, changed: Collection[str], asked: str | None, trained_here: bool
) -> Treatment:
    """What becomes of a base whose tensors of these names adapters change.

    `asked` is one of TREATMENTS, or None. Raises BaseError for a base of rescaled weights (unless
    `trained_here`), of formats that are only read, or of which it is not known how its config names
    plain modules.
    """
    _refuse_rescaled(base, trained_here)
    touched = frozenset(changed) & base.weights.keys()
    how = asked or (_UNTOUCHED if not touched else _usual(base, touched))
    if not touched and how in ("keep", "requantise"):
        how = _UNTOUCHED
    dtype = own_dtype(base)
    if how == _UNTOUCHED:
        return Treatment(base, how, touched, frozenset(), dtype=dtype)
    if how == "plain":
        return Treatment(base, how, touched, frozenset(base.weights), dtype=dtype)
    if how == "requantise":
        _refuse_unwritten(base, touched)
        return Treatment(base, how, touched, frozenset(), touched, dtype)
    opened = frozenset(with_fused(touched, base.weights))
    if base.settings.where and not can_ignore(base.settings):
        raise BaseError(
            f"{base.label} is quantised with {base.settings.method or 'no known method'}, and it "
            "is not known where its config names modules that are not.",
            "--quantised plain dequantises all of it.",
        )
    return Treatment(base, how, touched, opened, dtype=dtype)


def _usual(base: Dequantised, touched: frozenset[str]) -> str:
    """What bitsandbytes quantised while loading becomes plain; all else is kept."""
    return "plain" if touched <= _made_on_load(base) else "keep"


def _made_on_load(base: Dequantised) -> frozenset[str]:
    return frozenset(n for n, weight in base.weights.items() if weight.stored_as.on_load)


def _refuse_rescaled(base: Dequantised, trained_here: bool) -> None:
    if base.rescaled_by and not trained_here:
        raise BaseError(
            f"{base.label} is quantised with {base.title}: its weights were rescaled for "
            f"quantisation ({base.rescaled_by}), so an adapter of the original model does not fit "
            "them.",
            "If the adapter was trained on this very base: --trained-here.",
        )


def _refuse_unwritten(base: Dequantised, touched: Collection[str]) -> None:
    only_read = {
        base.weights[name].stored_as.title
        for name in touched
        if encoder_of(base.weights[name].stored_as) is None
    }
    if only_read:
        raise BaseError(
            f"{base.label} is quantised with {' and '.join(sorted(only_read))}, which is read and "
            "not written.",
            "--quantised keep or plain loses nothing of the adapter.",
        )


def own_dtype(base: Checkpoint) -> str:
    """The 16-bit dtype that a quantised model computes in: its config's, or the one that most of
    its plain tensors have."""
    tables = [base.config, base.config.get("text_config") or {}]
    for table in tables:
        for key in ("dtype", "torch_dtype"):
            code = FACTOR_DTYPES.get(str(table.get(key)))
            if code in ("F16", "BF16"):
                return code
    sizes = {"BF16": 0, "F16": 0}
    for info in as_stored(base).tensors.values():
        if info.dtype in sizes:
            sizes[info.dtype] += info.nbytes
    return max(sizes, key=lambda code: sizes[code])


def _name(code: str) -> str:
    return next(name for name, known in FACTOR_DTYPES.items() if known == code)


def _beside_with_ignored(
    method: str, paths: list[str], plain: list[str], old: dict[str, Any]
) -> dict[str, Any]:
    """A file beside config.json that says the same."""
    if method == "modelopt":
        return exported_with_ignored(old, paths)
    return with_ignored(Quantisation(method, old), paths, plain)


def _plain(base: Dequantised) -> list[str]:
    """Matrices that are plain in the files already."""
    return [
        name
        for name, info in base.tensors.items()
        if name not in base.weights and name.endswith(".weight") and len(info.shape) == 2
    ]


def _paths(base: Dequantised, opened: Collection[str]) -> list[str]:
    """Modules that are plain now, by path: in files, in memory, and the experts as a whole."""
    called = in_memory(base)
    found: dict[str, None] = {}
    for name in sorted(opened):
        for known in (name, called(name)):
            found[known.removesuffix(".weight")] = None
            experts = experts_of(known)
            if experts is not None:
                found[experts] = None
    return list(found)


def refuse_dtype(
    dtype: str | None, treatment: Treatment, plainly: str = "--quantised plain"
) -> None:
    """Raise UsageError for a dtype where the model stays quantised; `plainly` dequantises it."""
    if dtype not in (None, "base") and treatment.how != "plain":
        own = "every weight keeps its dtype"
        if treatment.opened:
            own = f"what is opened gets its own dtype, {_name(treatment.dtype)}"
        raise UsageError(
            f"--dtype {dtype} has no meaning here: the model stays {treatment.base.title}, and "
            f"{own}.",
            f"Omit --dtype; or dequantise all of it: {plainly}.",
        )
