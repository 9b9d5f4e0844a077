"""What a dialect is: one way in which adapters lie in files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.factors import ModuleShape
from loratool.models.checkpoint import Checkpoint
from loratool.storage.folder import Folder
from loratool.storage.tensors import TensorInfo

#: The key of a tensor in a file, and its shape.
Entry = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)  # so that what is found of a file can be kept for it
class Evidence:
    """What a dialect recognises a file by: headers, and what lies beside it.

    `entry` is the name of the weights file in `folder`, `top` the outermost object of a torch file
    ("dict", "list", "tensor"), `metadata` what the header says beside tensors and `values` the
    typed key-values of a GGUF file. `config` is the adapter_config.json beside the weights, or {};
    `in_torch` says that torch wrote the file, whatever its name.
    """

    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    folder: Folder
    entry: str
    top: str = "dict"
    metadata: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    in_torch: bool = False


@dataclass(frozen=True)
class Recipe:
    """An adapter that is to be written, in the terms of its config.

    `outlines` and `ranks` are its modules, whose factors hold all of the scale, `saved` the names
    of tensors that replace one of the base, `rows` the trained token rows by module path. `scaled`
    says that there are magnitudes (DoRA), `biased` that layers have trained biases, `uniform` that
    all ranks are the same. `sources` are the adapters that it is made of.

    An adapter that is made of two models has none. For it `modules` are the paths of all modules of
    the model that hold tensors, `stacks` the names of its parameters with a matrix per expert, and
    `model_type`, `base_name`, `task_type` and `transposes` say what is known.
    """

    outlines: Sequence[ModuleShape]
    ranks: Sequence[int]
    saved: Sequence[str]
    sources: Sequence[Adapter] = ()
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uniform: bool = False
    biased: bool = False
    scaled: bool = False
    modules: Collection[str] = ()
    stacks: Collection[str] = ()
    model_type: str = ""
    base_name: str | None = None
    task_type: str | None = None
    tied: bool = False
    transposes: bool = False


class Dialect(ABC):
    """Reads adapters of one kind. `name` is its code, in reports and on the command line.

    Exactly one dialect claims a file; what none claims is named by `adapters.recognise`.
    """

    name: str

    @abstractmethod
    def claims(self, evidence: Evidence) -> str | None:
        """What the file is, in words, if it is of this dialect; None otherwise.

        Types in the config have not been checked.
        """

    def accepts(self, evidence: Evidence) -> bool:
        """Whether the file may be of this dialect if the user says so, though another claims it."""
        return self.claims(evidence) is not None

    def check(self, config: dict[str, Any], where: object) -> None:  # noqa: B027
        """Raise AdapterError for a field of a wrong type; `where` is the file. What follows may
        rely on the types."""

    def declared(self, config: dict[str, Any]) -> Declared:
        """What a config declares; nobody else reads the config."""
        return Declared()

    @abstractmethod
    def read(self, adapter: Adapter, base: Checkpoint | None) -> None:
        """Sort the adapter's tensors into modules, replaced tensors and token rows, in place.

        `adapter.told` is what the user says of it, and `base` the model it goes into, where a verb
        knows one: its config tells what row orders depend on, its shapes decide how factors
        multiply. What cannot be merged becomes a notice with `refused` set, so that everything else
        can be shown. Raises AdapterError for what the user says and the file contradicts, and for a
        config with which nothing can be said of the tensors.
        """


class WritableDialect(Dialect):
    """A dialect that adapters can be written in, exactly."""

    @abstractmethod
    def factor_entries(self, outline: ModuleShape, rank: int) -> tuple[Entry, Entry]:
        """The keys and shapes of A and B of a module at this rank."""

    @abstractmethod
    def bias_key(self, path: str) -> str: ...

    @abstractmethod
    def magnitude_key(self, path: str) -> str: ...

    @abstractmethod
    def saved_key(self, name: str, key: str, adapted: Mapping[str, int]) -> str:
        """The key of a tensor `name` that replaces one of the base, and was called `key` before.

        `adapted` says of how many parameters of a module there are factors, by its path.
        """

    @abstractmethod
    def rows_key(self, key: str) -> str:
        """The key of token rows that were called `key` before."""

    @abstractmethod
    def config(self, recipe: Recipe) -> dict[str, Any]:
        """The config that goes beside the weights."""

    @abstractmethod
    def saved_unit(self, path: str) -> str:
        """What is saved where a module is saved whole: it, or the classifier that it is part of."""

    @abstractmethod
    def saved_modules(
        self, saved: Iterable[str], modules: Collection[str], adapted: Collection[str]
    ) -> list[str]:
        """The modules among those of the tensors `saved` that the config lists as saved whole."""

    @abstractmethod
    def registered(self, names: Collection[str]) -> Sequence[str] | None:
        """These parameters of one module, and perhaps more, in the order in which it registers
        them, which is that of their keys; None where no such module is known."""
