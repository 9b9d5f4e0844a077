"""What one type of PEFT's is: its tensors, its config, and what they make of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.peft.config import HARMLESS, rank_and_scale
from loratool.adapters.dialects.peft.types.sizes import Size, sizes_in
from loratool.adapters.factors import Factors
from loratool.adapters.functions import RowFunction
from loratool.adapters.told import Scaling, scaling
from loratool.errors import AdapterError
from loratool.models.checkpoint import Checkpoint
from loratool.storage.fields import ABSENT, NAMES, TEXT, FieldType, check_fields
from loratool.storage.tensors import TensorInfo

#: Fields of all types that are read, or have no effect on a merge.
_COMMON = {
    "peft_type", "task_type", "base_model_name_or_path", "peft_version", "modules_to_save",
    "target_modules", "fan_in_fan_out", "bias", "init_weights",
}  # fmt: skip
_TYPES = {"target_modules": NAMES | TEXT | ABSENT, "bias": TEXT | ABSENT}


class Trouble(Exception):
    """Why the tensors of a module make nothing: the code of a notice, and what of them."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


class Replacement(NamedTuple):
    """A tensor that takes the place of the base's of that name."""

    name: str
    info: TensorInfo


Made = Factors | RowFunction | Replacement


@dataclass
class PeftContents:
    """What an adapter of a type holds: the tensors of its `modules` by path and slot, and those
    that all of them `share`."""

    adapter: Adapter
    modules: Mapping[str, Mapping[str, TensorInfo]]
    shared: Mapping[str, TensorInfo]
    base: Checkpoint | None
    _sizes: dict[str, Size] | None = None

    def size(self, path: str, known: Size) -> Size:
        """The size of one module's weight; see `sizes`."""
        everything = dict.fromkeys(self.modules, (0, 0))
        out, width = found = self.sizes(everything)[path]
        if known[0] not in (0, out) or known[1] not in (0, width):
            raise Trouble("pair-mismatch", f"it is for {list(known)}, the weight is {list(found)}")
        return found

    def sizes(self, known: Mapping[str, Size]) -> dict[str, Size]:
        """The size of every module's weight, of which the file may tell a side.

        Raises Trouble where there is no base to tell, or its weights are others.
        """
        if self._sizes is None:
            if self.base is None:
                raise Trouble("needs-base", "the sizes of weights")
            transposes = bool(self.adapter.config.get("fan_in_fan_out"))
            self._sizes = sizes_in(self.base, known, transposes)
        missing = next((path for path in known if path not in self._sizes), None)
        if missing is not None:
            raise Trouble(
                "peft-options",
                f"{self.base.label if self.base else ''} has no weight of its size "
                f"{list(known[missing])} for {missing} (0: any), which all modules depend on",
            )
        return self._sizes


@dataclass(frozen=True)
class PeftModule:
    """The tensors of one module by slot, and what else decides what they mean."""

    path: str
    tensors: Mapping[str, TensorInfo]
    contents: PeftContents

    @property
    def adapter(self) -> Adapter:
        return self.contents.adapter

    @property
    def config(self) -> dict[str, Any]:
        return self.adapter.config

    def need(self, *slots: str) -> list[TensorInfo]:
        """The tensors in these slots. Raises Trouble where one is missing."""
        return [_needed(slot, self.tensors, "it") for slot in slots]

    def need_shared(self, *slots: str) -> list[TensorInfo]:
        return [_needed(slot, self.contents.shared, "the file") for slot in slots]

    def require(self, fits: bool) -> None:
        """Raise Trouble about the shapes unless they fit."""
        if not fits:
            shapes = ", ".join(f"{slot} {list(t.shape)}" for slot, t in self.tensors.items())
            raise Trouble("pair-mismatch", shapes)

    def rank_and_scale(self, alpha_field: str) -> tuple[int, Scaling]:
        """By the config's r and alpha and their patterns."""
        return rank_and_scale(self.config, self.adapter.told, alpha_field)(self.path)

    def size(self, known: Size = (0, 0)) -> Size:
        """(out, in) of the weight, of which the file may tell a side; the base tells the rest.

        Raises Trouble where there is none, or its weight is another one.
        """
        return self.contents.size(self.path, known)

    def scaled(self, scale: float = 1.0, origin: str = "config") -> Scaling:
        """A scale that is no alpha by a rank."""
        return scaling(self.adapter.told, 1.0, scale=scale, origin=origin, where=self.path)


def _needed(slot: str, tensors: Mapping[str, TensorInfo], what: str) -> TensorInfo:
    if slot not in tensors:
        raise Trouble("half-a-pair", f"{what} has no {slot}")
    return tensors[slot]


@dataclass(frozen=True)
class PeftMethod:
    """A type of PEFT's. `code` is its peft_type, `words` its name for people.

    `slots` are regular expressions of the names of its tensors after a module's path, `fields` the
    types of the fields that are read, `harmless` those that matter in training only, and `refused`
    those that, when set, make what `make` returns wrong, with the reason.
    `shown` are the fields that people know a config by.
    """

    code: str
    words: str
    slots: tuple[str, ...]
    make: Callable[[PeftModule], Iterable[Made]]
    fields: Mapping[str, FieldType] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    shown: tuple[str, ...] = ()
    #: What may follow a slot and be a part of it: numbers of a list, names of a table.
    rest: str = ""
    #: What is said of each adapter of the type, by the codes of notices.
    warnings: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> set[str]:
        """All fields of its config."""
        return _COMMON | HARMLESS | self.fields.keys() | self.harmless | self.refused.keys()

    def check(self, config: dict[str, Any], where: object) -> None:
        """Raise AdapterError for a field of a wrong type."""
        check_fields(config, {**_TYPES, **self.fields}, where, AdapterError)
