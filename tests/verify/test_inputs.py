"""Inputs that leave nothing to tell are errors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import run_cli
from helpers.files import lora_on, small_state, write_base
from helpers.outcomes import assert_clear
from helpers.places import FIXTURES
from helpers.verifying import all_of, bad, merged, written

import loratool
from loratool.errors import LoraToolError


def telling_fails(*arguments: Any, parts: Sequence[str] = (), **options: Any) -> LoraToolError:
    with pytest.raises(LoraToolError) as caught:
        loratool.verify(*arguments, **options)
    assert_clear(caught.value, *parts)
    assert caught.value.exit_code in (1, 2)
    return caught.value


@pytest.mark.parametrize("missing", ["merged", "base", "adapter"])
def test_missing_paths_are_named(missing: str, tmp_path: Path) -> None:
    """A path that is not there gives one error that names it, whichever it is."""
    paths = {"merged": FIXTURES / "tuned", "base": FIXTURES / "base"}
    paths["adapter"] = FIXTURES / "adapter"
    paths[missing] = tmp_path / "nowhere"
    telling_fails(*paths.values(), parts=[str(tmp_path / "nowhere")])


SWAPPED = {
    "adapter-as-model": ("adapter", "base", "base"),
    "adapter-as-base": ("tuned", "adapter", "base"),
    "model-as-adapter": ("base", "base", "tuned"),
    "adapter-as-both": ("adapter", "adapter", "adapter"),
    "adapter-for-merged": ("adapter", "base", "adapter"),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_arguments_in_each_others_place_are_refused(name: str) -> None:
    """Arguments in the wrong order are an error with the path that is at the wrong place."""
    paths = [FIXTURES / part for part in SWAPPED[name]]
    telling_fails(*paths)


def test_errors_on_the_command_line_are_one_message_each() -> None:
    """Arguments in the wrong order exit with 1 and say why on stderr, nothing on stdout."""
    adapter = str(FIXTURES / "adapter")
    said = run_cli("verify", adapter, "--base", str(FIXTURES / "base"), adapter)
    assert said.exit_code == 1
    assert said.stderr.startswith("error: ")
    assert said.stderr.count("error: ") == 1
    assert "Traceback" not in said.stderr
    assert said.stdout == ""


def test_base_and_merged_exchanged_is_no_merge(tmp_path: Path) -> None:
    """With MERGED and BASE exchanged, what is seen is the adapter taken away."""
    model = written(tmp_path / "m", merged(torch.float32))
    report = loratool.verify(FIXTURES / "base", model, FIXTURES / "adapter")
    assert report.verdict == "no"
    assert bad(report) == all_of("weight")
    assert report.summary == ["all 28 modules were merged with -1.00 times the weight"]


def test_adapter_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    """An adapter for another model leaves nothing to tell."""
    adapter = lora_on(tmp_path / "a", np.ones((5, 1)), np.ones((1, 7)))
    model = written(tmp_path / "m", merged())
    telling_fails(model, FIXTURES / "base", adapter)


def test_a_model_that_only_its_config_calls_quantised_is_compared(tmp_path: Path) -> None:
    """The tensors decide: a leftover entry says nothing about plain weights."""
    model = written(tmp_path / "m", merged())
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (model / "config.json").write_text(json.dumps(config))
    assert loratool.verify(FIXTURES / "base", model, FIXTURES / "adapter").verdict == "no"
    plainly = loratool.verify(
        written(tmp_path / "n", merged()), FIXTURES / "base", FIXTURES / "adapter"
    )
    again = loratool.verify(model, FIXTURES / "base", FIXTURES / "adapter")
    assert (again.verdict, again.equal) == (plainly.verdict, plainly.equal)


def test_wrong_weights_and_threads_are_usage_errors() -> None:
    """Weights that do not go with the adapters, and no threads, are refused before reading."""
    paths = (FIXTURES / "tuned", FIXTURES / "base", FIXTURES / "adapter")
    assert telling_fails(*paths, weights=[1.0, 2.0]).exit_code == 2
    assert telling_fails(*paths, weights=[math.nan]).exit_code == 2
    assert telling_fails(*paths, threads=0).exit_code == 2
    assert telling_fails(FIXTURES / "tuned", FIXTURES / "base", []).exit_code == 2


def test_adapter_with_nan_is_an_error(tmp_path: Path) -> None:
    """An adapter that holds NaN leaves nothing to tell."""
    base = write_base(tmp_path / "base", small_state(8))
    b = np.ones((8, 1))
    b[3] = np.nan
    adapter = lora_on(tmp_path / "a", b, np.ones((1, 8)))
    telling_fails(base, base, adapter, parts=["NaN"])


def test_an_adapter_in_place_of_the_model_is_named(tmp_path: Path) -> None:
    """Its loratool.json is one of loratool's, but of no merge."""
    small = tmp_path / "small"
    loratool.resize(FIXTURES / "adapter", small, rank=1)
    parts = [str(small / "loratool.json"), "not the record of a merge"]
    telling_fails(small, FIXTURES / "base", FIXTURES / "adapter", parts=parts)
