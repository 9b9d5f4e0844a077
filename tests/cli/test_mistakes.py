"""Wrong calls: one style of error, and the command that was meant as the hint."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.cli import Result, run_cli
from helpers.places import FIXTURES

BASE, LORA = str(FIXTURES / "base"), str(FIXTURES / "adapter")


def hint_of(done: Result) -> str:
    """The hint of a wrong call, which is two lines on stderr and exit code 2."""
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert (done.exit_code, done.stdout) == (2, "")
    return hint.removeprefix("hint: ")


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        ("merge B A -o x --wieght 1", "Did you mean --weight W? See loratool merge --help."),
        ("merge B A --out x", "Did you mean --output OUT?"),
        ("merge B A --output-dir x", "Did you mean --output OUT?"),
        ("merge B A --output_dir x", "Did you mean --output OUT?"),
        ("merge B A -o x --force-it", "Did you mean --force?"),
        ("combine A A -o x --force", "Did you mean --overwrite?"),
        ("resize A --max_rank 8 -o x", "Did you mean --max-rank K?"),
        ("resize A -r 8 -o x", "Did you mean --rank K?"),
        ("convert A --format mlx -o x", "Did you mean --to DIALECT?"),
        ("compare A A --alpha-x 1", "Did you mean --alpha A?"),
        ("extract B B --alpha 16 -o x", "alpha = rank"),
        ("verify B A --base-model B", "Did you mean --base BASE?"),
        ("merge --base B A -o x",
         "BASE is given without an option: loratool merge BASE ADAPTER... -o OUT."),
        ("extract --base B B -o x",
         "BASE is given without an option: loratool extract BASE TUNED -o OUT."),
        ("merge B --adapter A -o x", "ADAPTER... is given without an option: loratool merge"),
        ("push A --repo org/a", "REPO_ID is given without an option: loratool push PATH REPO_ID."),
        ("inspect A --frobnicate-everything", "See loratool inspect --help."),
        ("inspect", "Usage: loratool inspect SOURCE... See loratool inspect --help."),
        ("verify B A", "Usage: loratool verify MERGED ADAPTER... --base BASE."),
        ("push A org/a more", "Usage: loratool push PATH REPO_ID."),
        ("resize A --rank many -o x", "See loratool resize --help."),
        ("merge B A -o x --quantised plane", "Did you mean plain? See loratool merge --help."),
        ("inspect A --kind addtive", "Did you mean additive?"),
        ("merg B A -o x", "Did you mean 'merge'?"),
        ("--versoin", "Did you mean --version?"),
        ("info A", "Did you mean 'inspect'?"),
        ("svd B B", "Did you mean 'extract'?"),
        ("merge B A --weight", "See loratool merge --help."),
        ("inspect A -o x", "It only answers: --html FILE keeps that as a page"),
        ("verify B A --base B --output x", "--json > FILE as data"),
        ("merge B A -o x --worker 3/2",
         "I goes from 1 to N: workers of 2 are --worker 1/2 to 2/2."),
        ("merge B A -o x --worker 0/2", "add 1: $((N + 1))/2."),
        ("merge B A -o x --include self_atn.*",
         "Did you mean self_attn.*? The paths look like model.layers.0."),
        ("merge B A -o x --exclude q_prj", "Did you mean q_proj?"),
        ("merge B A -o x --include layers.99.mlp.up_proj", "The paths look like model.layers.0."),
        ("inspect A --include self_atn.q_prj", "Did you mean self_attn.q_proj?"),
        ("", "See loratool --help."),
    ],
)  # fmt: skip
def test_a_wrong_call_is_told_what_was_meant(call: str, hint: str) -> None:
    """Misspelt options, those of other tools, and what stands without one, lead to the right call;
    as JSON the same texts."""
    words = [{"A": LORA, "B": BASE}.get(word, word) for word in call.split()]
    if not words:
        words = ["nothing-like-a-command"]
    done = run_cli(*words)
    assert hint in hint_of(done)
    as_json = json.loads(run_cli(*words, "--json").stderr)
    assert as_json["error"] == "usage"
    assert hint in as_json["hint"]


@pytest.mark.parametrize("dtype", ["float8", "float64", "int4"])
def test_another_dtype_is_no_misspelt_one(dtype: str) -> None:
    """Of other bits none is suggested; those that there are stand in the error."""
    done = run_cli("merge", BASE, LORA, "-o", "x", "--dtype", dtype)
    assert hint_of(done) == "See loratool merge --help."
    assert "float16, bfloat16, float32, base" in done.stderr


def test_an_error_of_a_call_is_one_line() -> None:
    """Choices that click lists one a line stand in one, without escapes."""
    done = run_cli("completion")
    hint_of(done)
    assert "\\n" not in done.stderr
    assert "\\t" not in done.stderr
    assert "Choose from: bash, zsh, fish." in done.stderr


@pytest.mark.parametrize(
    "call",
    ["merge B A OUT", "merge B A A OUT --weight 1 --weight 2", "resize A OUT --rank 4",
     "combine A A OUT", "dequantise B OUT", "convert A OUT --to mlx", "extract B B OUT --rank 2",
     "unmerge B A OUT"],
)  # fmt: skip
def test_an_output_that_is_taken_for_an_input_is_noticed(call: str, tmp_path: Path) -> None:
    """The last path of a call without -o that is not there, or an empty folder, leads to the same
    call with -o, to be pasted."""
    out = tmp_path / "out it is"
    for made in (False, True):
        if made:
            out.mkdir()
        words = [{"A": LORA, "B": BASE, "OUT": str(out)}.get(word, word) for word in call.split()]
        hint = hint_of(run_cli(*words))
        meant = shlex.split(hint.partition("meant as that: ")[2])
        left = [word for word in words if word != str(out)]
        assert meant == ["loratool", *left, "-o", str(out)]


def test_a_missing_output_is_asked_for() -> None:
    """Where no path can be the output, the hint is the same call with -o OUT."""
    for words in (["merge", BASE, LORA], ["merge", BASE, LORA, LORA], ["resize", LORA]):
        hint = hint_of(run_cli(*words, "--threads", "1"))
        assert (
            hint
            == f"Say where to write: {shlex.join(['loratool', *words, '--threads', '1'])} -o OUT"
        )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--weight", "0.5,0.3"], "--weight 0.5 --weight 0.3"),
        (["--weight=0.5, -0.3"], "--weight 0.5 --weight -0.3"),
        (["--weight", "0.5", "0.3"], "--weight 0.5 --weight 0.3"),
    ],
)
def test_weights_are_given_one_by_one(given: list[str], meant: str, tmp_path: Path) -> None:
    """A list of weights, by commas or by spaces, leads to one --weight for each."""
    done = run_cli("merge", BASE, LORA, LORA, "-o", tmp_path / "x", *given)
    assert hint_of(done) == f"Give --weight once per adapter, in their order: {meant}."
    assert done.stderr.splitlines()[0].count("--weight") <= 1


def test_alpha_as_the_strength_of_a_merge_leads_to_weight(tmp_path: Path) -> None:
    """Where --alpha contradicts the adapter, the option that was meant by it is named too."""
    done = run_cli("merge", BASE, LORA, "-o", tmp_path / "x", "--alpha", "0.5")
    assert done.exit_code == 1
    assert done.stderr.endswith("How much of an adapter goes in is --weight.\n")


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        ("merge A B -o OUT", "If B is meant as that: loratool merge B A -o OUT"),
        ("unmerge A B -o OUT", "If B is meant as that: loratool unmerge B A -o OUT"),
        ("merge A A -o OUT", "The model comes first: loratool merge BASE ADAPTER... -o OUT."),
        ("inspect A --base A", "--base takes the model, and A is an adapter."),
        ("verify B A --base=A", "--base takes the model, and A is an adapter."),
        ("extract B A --rank 2 -o OUT", "Give models: loratool extract BASE TUNED -o OUT."),
        ("dequantise A -o OUT", "Give models: loratool dequantise BASE -o OUT."),
    ],
)
def test_an_adapter_in_the_place_of_a_model_leads_to_the_right_call(
    call: str, hint: str, tmp_path: Path
) -> None:
    """Each command says where the model goes; of two that are exchanged it gives the call."""
    for short, path in (("A", LORA), ("B", BASE)):
        call = re.sub(rf"\b{short}\b", path, call)
        hint = re.sub(rf"\b{short}\b", path, hint)
    done = run_cli(*call.split(), cwd=tmp_path)
    assert done.exit_code == 1
    error, said = done.stderr.splitlines()
    assert error == f"error: {LORA}: this is an adapter, not a base model."
    assert said.endswith(hint)


def test_a_plain_model_needs_no_dequantising(tmp_path: Path) -> None:
    """What to do with it stands in the hint, with its path."""
    done = run_cli("dequantise", BASE, "-o", tmp_path / "x")
    assert f"loratool merge {BASE} ADAPTER -o OUT" in done.stderr


def test_arguments_in_an_error_are_shown_fit_for_a_terminal() -> None:
    """What was typed is repeated with escapes for what a terminal would obey."""
    done = run_cli("merge", BASE, LORA, "gone\x1b[31m")
    assert "\x1b" not in done.stderr
    assert r"gone\x1b[31m" in done.stderr
