"""One line of a catalogue: an adapter or a model, and what its headers say."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

#: What something is; "other" for weights that are neither.
EntryKind = Literal["adapter", "model", "other"]

#: What is known to be wrong with it: "damaged" (its files end early), "unreadable" (they are
#: damaged otherwise, contradict themselves, or are of a kind that is not read: see the message),
#: "not-read" (nothing is known to be wrong: the Hub does not give it, or it would be downloaded),
#: "does-nothing" (a factor of every module is zero), "not-finite" (NaN or infinity were seen),
#: "refused" (no merge takes it as it is), "recognised" (its dialect is known by name and no verb
#: reads it, so nothing was checked); "" for nothing.
State = Literal[
    "", "damaged", "unreadable", "not-read", "does-nothing", "not-finite", "refused", "recognised"
]


@dataclass
class CatalogEntry:
    """An adapter or a model. What is not known is None or "".

    `path` is relative to the place that was listed, `label` what the verbs take. `dialect` names
    the way in which an adapter lies in its files, or what the file is instead. `base` is the name
    of the base that it declares, `family` the architecture: `model_type` of a model, or what an
    adapter says of its base. `ranks` and `scales` have each value once, smallest first; where a
    file is recognised but not read, `ranks` are those that it declares. `dtypes` counts tensors.
    `trained` is a time in ISO 8601, UTC; `trained_from` is "metadata" for when training ended, and
    "file" or "commit" for when the file or the repository changed last: training ended before.
    `triggers` are words that the file says to prompt with, `tags` the most frequent of its
    captions. `duplicate_of` is the `path` of the first entry with the same tensors and scales, or,
    where that was asked for, with equal deltas. `message` says what is wrong.
    """

    path: str
    label: str
    kind: EntryKind
    dialect: str = ""
    description: str = ""
    base: str = ""
    family: str = ""
    ranks: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    modules: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    quantised: str = ""
    state: State = ""
    message: str = ""
    refused: list[str] = field(default_factory=list)
    #: Whether values were looked at, so that "does-nothing" would have been seen.
    looked_at: bool = False
    duplicate_of: str | None = None
    trained: str | None = None
    trained_from: str = ""
    triggers: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    #: What two entries have in common that may be duplicates; "" where that cannot be told.
    likeness: str = field(default="", repr=False)
    #: What two adapters have in common whose deltas may be equal.
    outline: str = field(default="", repr=False)

    @property
    def dtype(self) -> str:
        """The dtype of most tensors, with a mark if there are others."""
        most = max(self.dtypes, key=lambda name: self.dtypes[name], default="")
        return f"{most}+" if len(self.dtypes) > 1 else most

    def to_dict(self) -> dict[str, Any]:
        own = ("likeness", "outline")
        return {name: value for name, value in self.__dict__.items() if name not in own}
