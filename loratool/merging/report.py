"""What a merge did, or would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from loratool.answers import Answer
from loratool.merging.counts import KeptOfDelta
from loratool.merging.initial import Derivation
from loratool.merging.range_loss import RangeLoss
from loratool.notices import Notice, document
from loratool.streams.shares import SharedOut


@dataclass(repr=False)
class MergeReport(Answer):
    """What a merge did, or with `dry_run` would do. Sizes are bytes, times seconds.

    `lost` is how much of the delta rounding took, ‖realised − Δ‖/‖Δ‖, on a sample of the blocks.
    """

    base: str
    adapters: list[str]
    #: What each adapter says it was trained on; "" where it does not.
    trained_on: list[str]
    weights: list[float | str]
    output: str
    dtype: str
    dry_run: bool
    shards: list[str]
    modules: int
    tensors: dict[str, int]
    parameters: int
    bytes_to_read: int
    bytes_written: int
    bytes_needed: int
    bytes_free: int
    reversible: bool
    undo_bytes: int
    changes: dict[str, list[str]]
    config_changes: dict[str, Any]
    side_files: list[str]
    left_out: list[str]
    #: Whose tokenizer goes along, in words; "" if there is none.
    tokenizer: str
    #: What --include and --exclude left out of each adapter, in their order.
    excluded: list[list[str]] = field(default_factory=list)
    warnings: list[Notice] = field(default_factory=list)
    subnormal: int = 0
    zeroed: int = 0
    lost: float | None = None
    #: What quantising again left of the delta; in a dry run what it would leave, from a sample.
    kept_of_delta: KeptOfDelta | None = None
    #: In a dry run: what float16 would lose of the base's range, from a sample.
    range_loss: RangeLoss | None = None
    #: What it costs to derive what an initialisation took off the base.
    derivation: Derivation | None = None
    #: What the base is quantised as and what becomes of that, in words; "" for a plain base.
    quantised: str = ""
    verified: bool = False
    #: Where on the Hub the model is now, or would be; "" if it was not to be pushed.
    pushed: str = ""
    commit: str = ""
    created: bool = False
    private: bool = False
    #: Shards that an earlier run had uploaded.
    resumed: list[str] = field(default_factory=list)
    kept: bool = True
    #: How far the output is, where this run was one of several workers.
    share: SharedOut | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        found = document(self, "warnings")
        if self.range_loss is not None:
            found["range_loss"] = dict(self.range_loss.__dict__)
        if self.kept_of_delta is not None:
            found["kept_of_delta"] = self.kept_of_delta.to_dict()
        if self.share is not None:
            found["share"] = self.share.to_dict()
        if self.derivation is not None:
            found["derivation"] = dict(self.derivation.__dict__)
        return found
