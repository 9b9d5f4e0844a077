"""Show what `finish` completed, as the command shows it that made it; and how far workers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratool.extracting.report import ExtractReport
from loratool.merging.report import MergeReport
from loratool.rendering.dequantise import show_dequantise
from loratool.rendering.extract import show_extract
from loratool.rendering.merge import show_merge
from loratool.rendering.unmerge import show_unmerge
from loratool.verbs.dequantise import DequantiseReport
from loratool.verbs.unmerging import UnmergeReport

_SHOW: dict[type, Callable[[Any], None]] = {
    MergeReport: lambda report: show_merge(report, verbose=False),
    DequantiseReport: show_dequantise,
    UnmergeReport: show_unmerge,
    ExtractReport: lambda report: show_extract(report, False, False),
}


def show_finished(report: Any) -> None:
    _SHOW[type(report)](report)
