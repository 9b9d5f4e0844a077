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
from loratool.errors import shown
from loratool.notices import Notice
from loratool.storage.folder import Folder, origin_of
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding: row `indices[i]` becomes `rows[i]` (`[n, dim]`)."""

    path: str
    indices: tuple[int, ...]
    rows: TensorInfo


@dataclass
class Adapter:
    """Everything an adapter holds, read from `source` (a directory or a file).

    `format` is "peft" for what can be merged; other values name what the file is instead, and
    `description` says it in words. `modules` and `replaced` are keyed by module path and by tensor
    name, both without training-time prefixes. `inert` names tensors that have no effect at
    inference, `unknown` those nobody can place.
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
    def is_here(self) -> bool:
        """Whether the weights are on this disk; `fetch` sees to it."""
        return self.weights.is_file()

    def fetch(self) -> None:
        """See to it that the weights are on this disk."""
        self.folder.fetch([str(self.weights.relative_to(self.folder.path))])

    @property
    def peft_type(self) -> str | None:
        found = self.config.get("peft_type")
        return str(found) if found else ("LORA" if self.format == "peft" else None)

    @property
    def parameters(self) -> int:
        return sum(t.numel for t in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
