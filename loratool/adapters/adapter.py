"""The values an adapter is made of. No I/O policy and no file format knowledge here.

An adapter changes a model in three ways: it *adds* a low-rank product to a weight (`LowRank`), it
*replaces* a whole tensor (a trained head, a bias, a resized embedding), or it replaces some *rows*
of an embedding (`TokenRows`). Everything is lazy: a value holds `TensorInfo`s, and data is read
when somebody asks for numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.factors import Factors
from loratool.adapters.functions import Function
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.errors import shown
from loratool.notices import Notice
from loratool.paths import EVERYTHING, Choice
from loratool.storage.folder import Folder, origin_of
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding: row `indices[i]` becomes `rows[i]` (`[n, dim]`)."""

    path: str
    indices: tuple[int, ...]
    rows: TensorInfo


@dataclass(frozen=True)
class Declared:
    """What the config beside an adapter declares, in the words of the house.

    A dialect fills it in; nobody else reads the config. `peft_type` is PEFT's name for the kind of
    adapter. `base_name` and `base_revision` are those
    of the base it was trained on, `task` is a task type (see `models.tasks`), `model_class` the
    class in memory and `model_library` where that is from. `saved_modules` are the ends of the
    names of modules that were trained whole, `heads` those and the heads that belong to the task.
    `transposes` says that the weights of the linear layers are stored `[in, out]`, `ties_head` that
    embedding and head were changed alike. `changed_base` names the initialisation that also took
    something off the base's weights, in small letters ("" where none did), `layer_ranges` the
    layers of the base, as ranges [start, end), that the model in training was made of (() where
    they were its own). `library` is what loads the adapter as it is ("" for nothing), and
    `settings` are lines for people: what, and its value.
    """

    peft_type: str | None = None
    base_name: str | None = None
    base_revision: str | None = None
    task: str | None = None
    model_class: str = ""
    model_library: str = ""
    saved_modules: tuple[str, ...] = ()
    heads: frozenset[str] = frozenset()
    transposes: bool = False
    ties_head: bool = False
    changed_base: str = ""
    layer_ranges: tuple[tuple[int, int], ...] = ()
    library: str = ""
    settings: tuple[tuple[str, str], ...] = ()


@dataclass
class Adapter:
    """Everything an adapter holds, read from `source` (a directory or a file).

    `format` names the dialect, or what the file is instead, and `description` says it in words;
    `is_read` tells the two apart: only where a dialect claims the file are there modules. `modules`
    and `replaced` are keyed by module path and by tensor name, both without training-time prefixes.
    `weights` is the file people know it by. `inert` names tensors that have no effect at inference,
    `unknown` those nobody can place.
    """

    source: Path
    weights: Path
    folder: Folder
    format: str
    description: str
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    modules: dict[str, Factors] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    inert: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    declared: Declared = Declared()
    is_read: bool = False
    #: What is not added to a weight but makes another one of it, by module path.
    functions: dict[str, Function] = field(default_factory=dict)
    #: Weights of the base that lie in the file too, by the names they have in the base.
    frozen: dict[str, TensorInfo] = field(default_factory=dict)
    #: The typed key-values of a GGUF file.
    values: dict[str, Any] = field(default_factory=dict)
    #: What the user says of it.
    told: Told = NOTHING_TOLD
    #: What its dialect calls tensors whose keys hold what training put around the model.
    proper_keys: dict[str, str] = field(default_factory=dict)
    #: The program that made it, where that is known.
    producer: str = ""
    #: All shards, where there are several; `weights` is then their index, or the first.
    shards: tuple[Path, ...] = ()
    #: Which of its parts the user wants, and the names of those that are not here for it.
    choice: Choice = EVERYTHING
    left_out: tuple[str, ...] = ()
    #: Files beside the factors whose tensors are parts of the adapter.
    companions: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        """What people gave: a path, or a Hub id."""
        return shown(self.source)

    @property
    def name(self) -> str:
        """The last part of the path or of the Hub id: what people call it."""
        origin = origin_of(self.source)
        return origin.name if origin else self.source.resolve().name

    @property
    def owner(self) -> str:
        """Whose the files beside it are: its name, or that of the folder of a file."""
        return self.folder.path.name if self.source.is_file() else self.name

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that hold its tensors."""
        return (*(self.shards or (self.weights,)), *self.companions)

    @property
    def wanted_companions(self) -> list[Path]:
        """The companions, but for those of which nothing is wanted."""
        held = {info.file for info in self.tensors.values()}
        return [path for path in self.companions if not self.choice or path in held]

    @property
    def is_here(self) -> bool:
        """Whether the weights are on this disk; `fetch` sees to it."""
        return all(path.is_file() for path in self.files)

    def fetch(self) -> None:
        """See to it that the weights are on this disk."""
        self.folder.fetch(str(path.relative_to(self.folder.path)) for path in self.files)

    @property
    def peft_type(self) -> str | None:
        """PEFT's name for the kind of adapter, where its config has one or is understood so."""
        return self.declared.peft_type or ("LORA" if self.is_read else None)

    @property
    def is_plain(self) -> bool:
        """Whether all it has are LoRA's own pairs and whole tensors."""
        return self.peft_type in ("LORA", "TRAINABLE_TOKENS") and not self.functions

    @property
    def stores_turned(self) -> bool:
        """Whether some of its weights are stored `[in, out]`, as the file or the user says."""
        return self.declared.transposes or bool(self.told.fan_in_fan_out)

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self._own)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self._own)

    @property
    def _own(self) -> list[TensorInfo]:
        """The tensors that are not the base's."""
        frozen = {info.name for info in self.frozen.values()}
        return [info for info in self.tensors.values() if info.name not in frozen]
