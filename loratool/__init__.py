"""LoRA adapter checkpoints: inspect, merge, verify, combine and more, without loading a model.

The public functions are imported when first used, so that `import loratool` costs nothing. What
`__all__` names is promised to stay; everything else may change with any version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loratool.answers import show_with
from loratool.version import __version__

if TYPE_CHECKING:
    from loratool.adapters.told import Told
    from loratool.adapters.weighting import Weight
    from loratool.errors import LoraToolError
    from loratool.extracting.report import ExtractReport
    from loratool.merging.report import MergeReport
    from loratool.verbs.card import CardReport, card
    from loratool.verbs.combine import CombineReport, combine
    from loratool.verbs.compare import CompareReport, compare
    from loratool.verbs.convert import ConvertReport, convert
    from loratool.verbs.dequantise import DequantiseReport, dequantise
    from loratool.verbs.extract import extract
    from loratool.verbs.finish import finish
    from loratool.verbs.inspect import InspectReport, inspect
    from loratool.verbs.merge import merge
    from loratool.verbs.push import PushReport, push
    from loratool.verbs.resize import ResizeReport, resize
    from loratool.verbs.unmerge import unmerge
    from loratool.verbs.unmerging import UnmergeReport
    from loratool.verbs.verify import VerifyReport, verify

#: Each is a function here, a module in `verbs/`, `cli/` and `rendering/`, and a command.
VERBS = (
    "inspect", "merge", "verify", "unmerge", "combine", "resize", "compare", "convert", "extract",
    "dequantise", "finish", "push", "card",
)  # fmt: skip

__all__ = [
    "CardReport",
    "CombineReport",
    "CompareReport",
    "ConvertReport",
    "DequantiseReport",
    "ExtractReport",
    "InspectReport",
    "LoraToolError",
    "MergeReport",
    "PushReport",
    "ResizeReport",
    "Told",
    "UnmergeReport",
    "VerifyReport",
    "Weight",
    "__version__",
    "card",
    "combine",
    "compare",
    "convert",
    "dequantise",
    "extract",
    "finish",
    "inspect",
    "merge",
    "push",
    "resize",
    "unmerge",
    "verify",
]


# How a report looks in a notebook is known above the verbs that make it.
show_with(lambda: import_module("loratool.rendering.notebook"))


def __getattr__(name: str) -> Any:
    verb = name.removesuffix("Report").lower()
    if name == "LoraToolError":
        home = "errors"
    elif name == "Told":
        home = "adapters.told"
    elif name == "Weight":
        home = "adapters.weighting"
    elif verb in VERBS and name in (verb, f"{verb.capitalize()}Report"):
        home = f"verbs.{verb}"
    else:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    return getattr(import_module(f"loratool.{home}"), name)
