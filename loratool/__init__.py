"""LoRA adapter checkpoints: inspect, merge, verify, combine and more, without loading a model.

The public functions are imported when first used, so that `import loratool` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loratool.version import __version__

if TYPE_CHECKING:
    from loratool.combining import CombineReport, combine
    from loratool.comparing import CompareReport, compare
    from loratool.describing import CardReport, card
    from loratool.errors import LoraToolError
    from loratool.extracting import extract
    from loratool.extraction_report import ExtractReport
    from loratool.inspecting import InspectReport, inspect
    from loratool.merging import MergeReport, merge
    from loratool.pushing import PushReport, push
    from loratool.resizing import ResizeReport, resize
    from loratool.unmerging import UnmergeReport, unmerge
    from loratool.verifying import VerifyReport, verify

__all__ = [
    "CardReport",
    "CombineReport",
    "CompareReport",
    "ExtractReport",
    "InspectReport",
    "LoraToolError",
    "MergeReport",
    "PushReport",
    "ResizeReport",
    "UnmergeReport",
    "VerifyReport",
    "__version__",
    "card",
    "combine",
    "compare",
    "extract",
    "inspect",
    "merge",
    "push",
    "resize",
    "unmerge",
    "verify",
]

_HOMES = {
    "inspect": "inspecting",
    "InspectReport": "inspecting",
    "merge": "merging",
    "MergeReport": "merging",
    "unmerge": "unmerging",
    "UnmergeReport": "unmerging",
    "verify": "verifying",
    "VerifyReport": "verifying",
    "combine": "combining",
    "CombineReport": "combining",
    "resize": "resizing",
    "ResizeReport": "resizing",
    "compare": "comparing",
    "CompareReport": "comparing",
    "extract": "extracting",
    "ExtractReport": "extraction_report",
    "push": "pushing",
    "PushReport": "pushing",
    "card": "describing",
    "CardReport": "describing",
    "LoraToolError": "errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"loratool.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'loratool' has no attribute {name!r}")
