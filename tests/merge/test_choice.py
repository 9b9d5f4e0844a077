"""--include and --exclude: only some parts of an adapter are merged, and everybody knows which."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.choosing import (
    HEAD,
    PATHS,
    close,
    expected,
    layered_base,
    layered_lora,
    layered_state,
)
from helpers.cli import run_cli
from helpers.files import load, same
from helpers.outcomes import refused, sha256s

import loratool
from loratool.errors import MatchError, RestoreError, UsageError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return layered_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return layered_lora(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("include", "exclude", "count"),
    [
        (["self_attn.*"], [], 8),
        ([], ["mlp.*"], 8),
        (["layers.0.*", "layers.3.*"], ["v_proj"], 4),
        (["model.layers.2.self_attn.q_proj"], [], 1),
    ],
)
def test_only_what_is_chosen_is_merged(
    include: list[str], exclude: list[str], count: int, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """The chosen modules have their deltas, all else is the base's bit for bit; the report, the
    record, verify and unmerge say and know it."""
    out = tmp_path / "out"
    asked = {"include": include, "exclude": exclude}
    report = loratool.merge(base, adapter, out, dtype="base", reversible=True, **asked)
    (left,) = report.excluded
    kept = [path for path in PATHS if path not in left]
    assert (report.modules, len(left)) == (count, len(PATHS) - count)
    merged, state = load(out), layered_state()
    assert close(merged, expected((adapter, lambda path: float(path in kept))))
    assert {n for n in state if not torch.equal(state[n], merged[n])} == {
        f"{p}.weight" for p in kept
    }
    record = json.loads((out / "loratool.json").read_text())
    given = {option: globs for option, globs in asked.items() if globs}
    (entry,) = record["adapters"]
    assert given.items() <= record["options"].items()
    assert given.items() <= entry.items()
    assert entry["left_out"]
    assert sum(group["count"] for group in entry["modules"]) == count
    assert loratool.verify(out, base, adapter, **asked).verdict == "yes"
    whole = loratool.verify(out, base, adapter)
    assert whole.verdict == "no"
    assert "other-parts" in {notice.code for notice in whole.warnings}
    back = loratool.unmerge(out, adapter, tmp_path / "back")
    assert back.exact
    assert back.excluded == [left]
    assert sha256s(tmp_path / "back") == sha256s(base)
    loratool.unmerge(out, adapter, tmp_path / "near", subtract=True)
    assert close(load(tmp_path / "near"), {n: v.numpy() for n, v in state.items()})
    assert not same(load(tmp_path / "near"), merged)


def test_a_whole_tensor_goes_by_its_name_and_its_module(base: Path, tmp_path: Path) -> None:
    """A saved head is chosen like a module, and left out like one."""
    adapter = layered_lora(tmp_path / "adapter", saves_head=True)
    for number, glob in enumerate((HEAD, "lm_head")):
        out = tmp_path / f"out{number}"
        report = loratool.merge(base, adapter, out, dtype="base", exclude=glob)
        assert report.excluded == [[HEAD]]
        assert torch.equal(load(out)[HEAD], layered_state()[HEAD])
    only = tmp_path / "only"
    report = loratool.merge(base, adapter, only, dtype="base", include="lm_head")
    assert report.excluded == [sorted(PATHS)]
    assert (load(only)[HEAD] == 7).all()
    assert report.tensors["replace"] == 1


def test_a_glob_that_fits_nothing_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A typing error must not merge less than was meant."""
    error = refused(
        UsageError, base, adapter, tmp_path / "out", "--exclude 'v_prj'", exclude=["v_prj"]
    )
    assert "Did you mean v_proj?" in error.hint
    assert "The paths look like model.layers.0." in error.hint
    refused(UsageError, base, adapter, tmp_path / "out", "nothing", exclude="*")


def test_each_adapter_gives_what_it_has(base: Path, tmp_path: Path) -> None:
    """A glob need fit one of several adapters; weights are each adapter's."""
    one, two = layered_lora(tmp_path / "one", 1), layered_lora(tmp_path / "two", 2)
    out = tmp_path / "out"
    loratool.merge(base, [one, two], out, dtype="base", weights=[0.5, -1], include="q_proj")

    def weight(factor: float) -> object:
        return lambda path: factor if path.endswith("q_proj") else 0.0

    wanted = expected((one, weight(0.5)), (two, weight(-1)))  # type: ignore[arg-type]
    assert close(load(out), wanted)


def test_the_rest_can_be_merged_later(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A base that holds some parts of an adapter takes the others; the same ones it refuses."""
    first, second = tmp_path / "first", tmp_path / "second"
    loratool.merge(base, adapter, first, dtype="base", include="mlp.*")
    refused(MatchError, first, adapter, second, "holds", "--include mlp.*")
    refused(MatchError, first, adapter, second, "holds", include="layers.0.*")
    loratool.merge(first, adapter, second, dtype="base", exclude="mlp.*")
    assert close(load(second), expected((adapter, lambda _: 1.0)))
    # Which of the two is to be taken off, nobody said.
    with pytest.raises(RestoreError, match="with different parts"):
        loratool.unmerge(second, adapter, tmp_path / "back")
    loratool.unmerge(second, [adapter, adapter], tmp_path / "back")
    assert close(load(tmp_path / "back"), expected())


def test_what_is_left_out_may_be_broken(base: Path, adapter: Path, tmp_path: Path) -> None:
    """NaN in a module that nobody wants is no reason to refuse the others."""
    from safetensors.numpy import load_file, save_file

    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.{PATHS[0]}.lora_A.weight"][0, 0] = np.nan
    save_file(tensors, weights)
    loratool.merge(base, adapter, tmp_path / "out", dtype="base", exclude=PATHS[0])
    refused(loratool.LoraToolError, base, adapter, tmp_path / "no", "NaN", exclude=PATHS[1])


def test_workers_make_what_one_run_makes(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The order of the work holds the choice; another choice is another merge."""
    one, two = tmp_path / "one", tmp_path / "two"
    loratool.merge(base, adapter, one, include="q_proj")
    loratool.merge(base, adapter, two, include="q_proj", worker="1/2")
    with pytest.raises(loratool.LoraToolError, match="include"):
        loratool.merge(base, adapter, two, include="v_proj", worker="2/2")
    loratool.merge(base, adapter, two, include="q_proj", worker="2/2")
    assert sha256s(two) == sha256s(one)


def test_the_command_names_what_it_left_out(base: Path, adapter: Path, tmp_path: Path) -> None:
    """In the table with a count, folded; in --json by path."""
    arguments = ["merge", base, adapter, "-o", tmp_path / "out", "--exclude", "mlp.*"]
    done = run_cli(*arguments, "--dry-run")
    assert "4 parts: model.layers.{0-3}.mlp.up_proj" in " ".join(done.stdout.split())
    found = json.loads(run_cli(*arguments, "--dry-run", "--json").stdout)
    assert found["excluded"] == [[path for path in PATHS if "mlp" in path]]
