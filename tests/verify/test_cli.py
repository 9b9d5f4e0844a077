"""verify on the command line: exit codes, JSON, widths and words."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import run_cli
from helpers.files import ADAPTED, lora_on, small_lora, small_state, write_base
from helpers.places import FIXTURES
from helpers.verifying import UNTOUCHED, K, Q, flipped, merged, only, said_by, written

import loratool


def test_exit_codes_say_yes_and_no(tmp_path: Path) -> None:
    """Exit 0 for yes and 3 for no; each time the last line says it."""
    yes = written(tmp_path / "yes", merged())
    no = written(tmp_path / "no", merged(added=only(lambda n: n == K, 0.0)))
    adapter = FIXTURES / "adapter"
    said = said_by(yes)
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.stdout.splitlines()[-1] == "yes: the merged model is base + adapters"
    said = run_cli("verify", str(no), "--base", str(FIXTURES / "base"), str(adapter))
    assert said.exit_code == 3
    assert said.stdout.splitlines()[-3:] == [
        "1 of 28 modules was never merged: model.layers.1.self_attn.k_proj.",
        "27 of 28 modules are the once-rounded result.",
        "no: the merged model is not base + adapters",
    ]


@pytest.mark.parametrize("fault", [False, True])
def test_json_is_strict(fault: bool, tmp_path: Path) -> None:
    """`--json` prints one strict JSON document, with every finding, also for NaN in the model."""
    state = merged()
    if fault:
        state[Q] = torch.full_like(state[Q], math.nan)
        state[UNTOUCHED] = torch.full_like(state[UNTOUCHED], math.inf)
    model = written(tmp_path / "m", state)
    said = said_by(model, "--json")
    assert said.exit_code == (3 if fault else 0)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(said.stdout, parse_constant=refuse)
    assert document["schema_version"] == 1
    assert document["verdict"] == ("no" if fault else "yes")
    assert len(document["findings"]) == 28 + fault
    assert {"tensor", "code", "ulps", "applied", "unexplained", "lost"} <= set(
        document["findings"][0]
    )


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_output_fits_the_terminal(columns: int, tmp_path: Path) -> None:
    """No line of facts or table is wider than the terminal; sentences wrap by themselves."""
    state = merged(added=only(lambda n: "q_proj" in n and ".0." not in n, 0.0))
    state[Q] = flipped(state[Q], 14, 3)
    model = written(tmp_path / "m", state)
    extra = ["--full"] if columns == 80 else []
    said = said_by(model, *extra, columns=columns)
    assert said.exit_code == 3
    for line in said.stdout.split("no: ")[0].splitlines():
        sentence = line.endswith(".") and line[0].isdigit()
        assert len(line) <= columns or sentence, line
    assert "self_attn.q_proj" in said.stdout


def test_one_module_alone_is_said_in_good_english(tmp_path: Path) -> None:
    """A model with one adapted module needs no counting: "1 of 1 modules" is never said."""
    base = write_base(tmp_path / "base", small_state(32))
    adapter = small_lora(tmp_path / "a", 32)
    loratool.merge(base, adapter, tmp_path / "out")
    for model in (tmp_path / "out", base):
        report = loratool.verify(model, base, adapter)
        assert len(report.summary) == 1
        assert "1 modules" not in report.summary[0]
        assert " are " not in report.summary[0]
        assert " were " not in report.summary[0]


def test_infinities_and_several_adapters_make_strict_json(tmp_path: Path) -> None:
    """Rows of infinity leave nothing to tell two weights apart by, and no NaN in the JSON."""
    base = write_base(tmp_path / "base", small_state(64))
    one = lora_on(tmp_path / "one", np.ones((64, 1)), np.ones((1, 64)))
    two = lora_on(tmp_path / "two", np.eye(64, 2), np.ones((2, 64)))
    state = small_state(64)
    state[ADAPTED][:40] = torch.inf
    merged = write_base(tmp_path / "m", state)
    done = run_cli("verify", str(merged), "--base", str(base), str(one), str(two), "--json")
    assert done.exit_code == 3
    document = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert document["verdict"] == "no"
