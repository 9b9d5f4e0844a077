"""LoRA adapter checkpoints: inspect, merge, verify, combine and more, without loading a model.

The public functions are imported when first used, so that `import loratool` costs nothing. What
`__all__` names is promised to stay; everything else may change with any version.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    from loratool.verbs.lint import LintReport, lint
    from loratool.verbs.list import CatalogReport, catalog
    from loratool.verbs.merge import merge
    from loratool.verbs.push import PushReport, push
    from loratool.verbs.resize import ResizeReport, resize
    from loratool.verbs.unmerge import unmerge
    from loratool.verbs.unmerging import UnmergeReport
    from loratool.verbs.verify import VerifyReport, verify

#: Each is a function here, a module in `verbs/`, `cli/` and `rendering/`, and a command.
VERBS = (
    "inspect", "list", "merge", "verify", "unmerge", "combine", "resize", "compare", "convert",
    "extract", "dequantise", "lint", "finish", "push", "card",
)  # fmt: skip

#: Verbs whose function is called otherwise, because Python itself has a function of their name.
NAMED_OTHERWISE = {"list": "catalog"}

__all__ = [
    "CardReport",
    "CatalogReport",
    "CombineReport",
    "CompareReport",
    "ConvertReport",
    "DequantiseReport",
    "ExtractReport",
    "InspectReport",
    "LintReport",
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
    "catalog",
    "combine",
    "compare",
    "convert",
    "dequantise",
    "extract",
    "finish",
    "inspect",
    "lint",
    "merge",
    "push",
    "resize",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> Any:
    function = name.removesuffix("Report").lower()
    verb = next((v for v in VERBS if NAMED_OTHERWISE.get(v, v) == function), "")
    if name == "LoraToolError":
        home = "errors"
    elif name == "Told":
        home = "adapters.told"
    elif name == "Weight":
        home = "adapters.weighting"
    elif verb and name in (function, f"{function.capitalize()}Report"):
        home = f"verbs.{verb}"
    else:
        raise AttributeError(f"module 'loratool' has no attribute {name!r}")
    # How a report looks in a notebook is known above the verbs that make it.
    answers = import_module("loratool.answers")
    answers.show_with(lambda: import_module("loratool.rendering.notebook"))
    return getattr(import_module(f"loratool.{home}"), name)
