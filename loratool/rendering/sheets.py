"""The sheet of every report, found by its type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratool.extracting.report import ExtractReport
from loratool.merging.report import MergeReport
from loratool.rendering.card import card_sheet
from loratool.rendering.combine import combine_sheet
from loratool.rendering.compare import compare_sheet
from loratool.rendering.convert import convert_sheet
from loratool.rendering.dequantise import dequantise_sheet
from loratool.rendering.extract import extract_sheet
from loratool.rendering.finish import finish_sheet
from loratool.rendering.inspect import inspect_sheet
from loratool.rendering.lint import lint_sheet
from loratool.rendering.list import list_sheet
from loratool.rendering.merge import merge_sheet
from loratool.rendering.push import push_sheet
from loratool.rendering.resize import resize_sheet
from loratool.rendering.unmerge import unmerge_sheet
from loratool.rendering.verify import verify_sheet
from loratool.sheet import Facts, Sheet, plain_text
from loratool.verbs.card import CardReport
from loratool.verbs.combine import CombineReport
from loratool.verbs.compare import CompareReport
from loratool.verbs.convert import ConvertReport
from loratool.verbs.dequantise import DequantiseReport
from loratool.verbs.finish import FinishReport
from loratool.verbs.inspect import InspectReport
from loratool.verbs.lint import LintReport
from loratool.verbs.list import CatalogReport
from loratool.verbs.push import PushReport
from loratool.verbs.resize import ResizeReport
from loratool.verbs.unmerging import UnmergeReport
from loratool.verbs.verify import VerifyReport

_SHEETS: dict[type, Callable[[Any], Sheet]] = {
    CardReport: card_sheet,
    CatalogReport: list_sheet,
    CombineReport: combine_sheet,
    CompareReport: compare_sheet,
    ConvertReport: convert_sheet,
    DequantiseReport: dequantise_sheet,
    ExtractReport: extract_sheet,
    FinishReport: finish_sheet,
    InspectReport: inspect_sheet,
    LintReport: lint_sheet,
    MergeReport: merge_sheet,
    PushReport: push_sheet,
    ResizeReport: resize_sheet,
    UnmergeReport: unmerge_sheet,
    VerifyReport: verify_sheet,
}

#: Facts that the plain form of a report has.
_LINES = 12


def sheet_for(report: Any) -> Sheet:
    return _SHEETS[type(report)](report)


def facts_of(sheet: Sheet) -> list[tuple[str, str]]:
    """The first facts of a sheet as plain texts, for a few lines about it."""
    facts = next((piece for piece in sheet.pieces if isinstance(piece, Facts)), Facts())
    return [(what, plain_text(words)) for what, words in facts.rows[:_LINES]]
