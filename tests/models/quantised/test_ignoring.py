"""Every method's own list of the modules that are plain."""

from __future__ import annotations

import re
from typing import Any

import pytest

from loratool.models.quantised.ignoring import (
    can_ignore,
    exported_with_ignored,
    with_ignored,
)
from loratool.models.quantised.module import Quantisation

PLAIN = ["model.embed_tokens", "model.layers.1.mlp.gate"]
PATHS = ["model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj"]

CASES: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    # method, table, key, what the list must be in the end
    "fp8-none": (
        "fp8", {"modules_to_not_convert": None}, "modules_to_not_convert",
        ["lm_head", *PLAIN, *PATHS],
    ),
    "fp8-some": (
        "fp8", {"modules_to_not_convert": ["lm_head"]}, "modules_to_not_convert",
        ["lm_head", *PATHS],
    ),
    "fp8-twice": (
        "fp8", {"modules_to_not_convert": [PATHS[0]]}, "modules_to_not_convert", PATHS,
    ),
    "mxfp4": ("mxfp4", {}, "modules_to_not_convert", ["lm_head", *PLAIN, *PATHS]),
    "ct": ("compressed-tensors", {"ignore": ["re:.*gate"]}, "ignore", ["re:.*gate", *PATHS]),
    "modelopt": ("modelopt", {"ignore": ["lm_head"]}, "ignore", ["lm_head", *PATHS]),
    "modelopt-old": (
        "modelopt", {"exclude_modules": ["lm_head"]}, "exclude_modules", ["lm_head", *PATHS],
    ),
    "bnb": ("bitsandbytes", {"llm_int8_skip_modules": None}, "llm_int8_skip_modules",
            ["lm_head", *PLAIN, *PATHS]),
    "bnb-some": ("bitsandbytes", {"llm_int8_skip_modules": ["embed"]}, "llm_int8_skip_modules",
                 ["embed", *PATHS]),
    "hqq": ("hqq", {"skip_modules": ["lm_head"]}, "skip_modules", ["lm_head", *PATHS]),
    "awq": (
        "awq", {"modules_to_not_convert": None}, "modules_to_not_convert",
        ["lm_head", *PLAIN, *PATHS],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_lists_by_method(case: str) -> None:
    """What was there stays, what is new is added once, and all else of the table is as it was. A
    list that is new names what was plain before too: transformers skips heads only without one."""
    method, table, key, expected = CASES[case]
    said = Quantisation(method, {**table, "other": 1}, "quantization_config")
    assert can_ignore(said)
    found = with_ignored(said, PATHS, PLAIN)
    assert found[key] == expected
    assert {k: v for k, v in found.items() if k != key} == {
        k: v for k, v in said.table.items() if k != key
    }
    assert said.table == {**table, "other": 1}


def test_both_lists_of_fp8_are_written_where_both_are_there() -> None:
    """vLLM reads `ignored_layers` first, transformers the other one."""
    said = Quantisation("fp8", {"ignored_layers": ["a"], "modules_to_not_convert": None}, "x")
    found = with_ignored(said, PATHS)
    assert found["ignored_layers"] == ["a", *PATHS]
    assert found["modules_to_not_convert"] == PATHS
    only = with_ignored(Quantisation("fp8", {"ignored_layers": ["a"]}, "x"), PATHS)
    assert only["ignored_layers"] == ["a", *PATHS]
    assert only["modules_to_not_convert"] == PATHS


def test_gptq_has_rules() -> None:
    """`dynamic` has regular expressions, `-:` for modules that are plain; the first that fits
    counts, and layer 1 is not layer 10."""
    rules = {"+:.*down.*": {"bits": 8}}
    found = with_ignored(Quantisation("gptq", {"bits": 4, "dynamic": rules}, "x"), PATHS[:1])
    first, *others = found["dynamic"].items()
    assert others == list(rules.items())
    pattern = first[0].removeprefix("-:")
    assert re.match(pattern, PATHS[0])
    assert not re.match(pattern, PATHS[1])
    assert with_ignored(Quantisation("gptq", {"dynamic": None}, "x"), PATHS)["dynamic"].keys()


def test_modelopts_second_file_says_the_same() -> None:
    """hf_quant_config.json has a list of its own; a file of another shape stays as it is."""
    document = {
        "producer": 1,
        "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]},
    }
    found = exported_with_ignored(document, PATHS)
    assert found["quantization"]["exclude_modules"] == ["lm_head", *PATHS]
    assert exported_with_ignored({"quantization": 3}, PATHS) == {"quantization": 3}


def test_what_has_no_list_is_known() -> None:
    """Of a method without a known list a mixed model cannot be written."""
    assert not can_ignore(Quantisation("something", {}, "x"))
