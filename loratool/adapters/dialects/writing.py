"""What a conversion is: the files of an adapter in another dialect, before a byte is written.

A dialect that can be written has a `draft`: the tensors of the new file, each a `TensorInfo` whose
elements are those of the old one, re-ordered, transposed or computed; and for each module its
`Fate`. Nothing is read yet, but for what decides a fate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from loratool.adapters.adapter import Adapter
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import LowRank
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.models.checkpoint import Checkpoint
from loratool.notices import Notice
from loratool.storage.tensors import TensorInfo

#: What becomes of a module, best first.
Outcome = Literal["exact", "rounded", "expanded", "cut", "refused"]
#: The kind of file that holds the tensors.
Container = Literal["safetensors", "torch", "gguf"]


@dataclass(frozen=True)
class Asked:
    """What a user asks of a conversion.

    `dtype` is the safetensors code that factors are written in, None for their own. `max_rank`
    is what an expansion may not exceed; with `allow_lossy` what does is cut by SVD.
    """

    base: Checkpoint | None = None
    dtype: str | None = None
    max_rank: int | None = None
    allow_lossy: bool = False


@dataclass
class Fate:
    """What becomes of one module or tensor, called `what` as in the adapter.

    `detail` says why, or what was done. `error` is ‖BA − B′A′‖/‖BA‖ of the file that was written,
    filled in when that is read back. `rank` and `new_rank` are those before and after.
    """

    what: str
    outcome: Outcome
    detail: str = ""
    rank: int | None = None
    new_rank: int | None = None
    error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class Draft:
    """The files of a converted adapter.

    `tensors` are those of the file `weights`, by their keys, in its order. `metadata` goes into its
    header: text of safetensors, typed key-values of GGUF. In a torch file the tensors are in
    dictionaries of the names `within`, one in the other. `documents` are the other files: a table
    is written as JSON, text as it is.

    What is written is read again, and must be what it was: `pieces` says by its path there which
    module of the adapter (or a part of one, as a pair of its own) each module of the file is, and
    `whole` the same of replaced tensors, by name. `told` is what a reader must be told to read it.
    A draft that `is_copy` has the keys of the adapter itself. `copies` are files that go along as
    they are.
    """

    container: Container
    weights: str
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    within: Sequence[str] = ()
    documents: dict[str, dict[str, Any] | str] = field(default_factory=dict)
    pieces: dict[str, LowRank | ExpertStack] = field(default_factory=dict)
    whole: dict[str, TensorInfo] = field(default_factory=dict)
    told: Told = NOTHING_TOLD
    is_copy: bool = False
    copies: dict[str, Path] = field(default_factory=dict)
    fates: list[Fate] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    def refuse(self, what: str, why: str) -> None:
        self.fates.append(Fate(what, "refused", why))


class Writer(ABC):
    """A dialect that adapters can be converted to. `needs_base` says that names or rows depend on
    the base."""

    name: str
    needs_base: bool = False

    @abstractmethod
    def draft(self, adapter: Adapter, asked: Asked) -> Draft:
        """The files of `adapter` in this dialect.

        Each module, replaced tensor, token row and function of the adapter has exactly one fate.
        """
