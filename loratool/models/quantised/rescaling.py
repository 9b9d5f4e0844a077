"""Quantised models whose weights were rescaled or turned before they were quantised.

Methods that do so make inputs of a layer smaller and its columns larger, or turn both, and put what
undoes it into the layer before. The model as a whole computes the same, but its weights are not the
original's, and an adapter that was trained on those does not belong on them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from loratool.errors import BaseError
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.module import UNQUANTISED, Quantisation
from loratool.models.quantised.scheme import Scheme

#: What llm-compressor was told to do. It is read as text, so far and no further.
_RECIPE = "recipe.yaml"
_LONGEST_RECIPE = 1 << 18
_MODIFIERS = re.compile(
    r"^[ \t]*(?:-[ \t]*)?(?:!|class:[ \t]*)?[\"']?((?:AWQ|(?:Auto)?SmoothQuant|SpinQuant|QuIP|"
    r"LogarithmicEqualization)Modifier)\b",
    re.MULTILINE,
)

#: Where a transform of compressed-tensors is not in the weights: modules apply it as they run.
_AS_IT_RUNS = ("input", "output")


def rescaled_by(base: Checkpoint, settings: Quantisation, schemes: Iterable[Scheme]) -> str:
    """What the weights of a quantised model were rescaled by, for people; "" for nothing.

    Raises BaseError where modules turn their inputs as they run: their weights by themselves are no
    weights of a plain model.
    """
    rescaled = next((scheme for scheme in schemes if scheme.rescaled), None)
    if rescaled is not None:
        return rescaled.title
    table = settings.table
    rotation = table.get("rotation")
    if rotation:
        _refuse_turning(base, "rotation")
    transforms = table.get("transform_config")
    if transforms:
        if _turns_as_it_runs(transforms):
            _refuse_turning(base, "transform_config")
        return "transform_config"
    algorithm = _algorithm(table)
    if "AWQ" in algorithm.upper():
        return algorithm
    return _told_by_recipe(base)


def _refuse_turning(base: Checkpoint, key: str) -> None:
    raise BaseError(
        f"{base.label}: its weights were rescaled for quantisation ({key}), and its modules turn "
        "their inputs as they run, so an adapter of the original model does not fit them, and they "
        "are no weights of a plain model.",
        UNQUANTISED,
    )


def _turns_as_it_runs(transforms: Any) -> bool:
    """Whether a transform of any group is applied to what goes into modules or comes out."""
    waiting = [transforms]
    for value in waiting:
        if isinstance(value, dict):
            if value.get("location") in _AS_IT_RUNS:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _algorithm(table: dict[str, Any]) -> str:
    """ModelOpt's name of what it did."""
    for place in (table, table.get("quantization")):
        said = place.get("quant_algo") if isinstance(place, dict) else None
        if isinstance(said, str):
            return said[:40]
    return ""


def _told_by_recipe(base: Checkpoint) -> str:
    if not base.folder.has(_RECIPE):
        return ""
    with base.folder.reading(_RECIPE) as (stream, _, _):
        text = stream.read(_LONGEST_RECIPE).decode("utf-8", "replace")
    found = _MODIFIERS.search(text)
    return f"{found[1]} in {_RECIPE}" if found else ""
