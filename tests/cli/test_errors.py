"""A mistake is one clear error with its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cli import run_cli
from helpers.places import FIXTURES


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["merg"], 2, "Did you mean 'merge'"),
        (["merge", "{base}", "{adapter}"], 2, "-o OUT"),
        (["merge", "{base}", "-o", "x"], 2, "ADAPTER"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--dtype", "flaot16"], 2, "float16?"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--wieght", "1"], 2, "--weight"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--weight", "1", "--weight", "2"], 2,
         "2 weights were given for 1 adapter"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--weight", "nan"], 2, "finite"),
        (["merge", "{adapter}", "{base}", "-o", "{out}"], 1, "The model comes first"),
        (["merge", "{base}", "{base}/config.json", "-o", "{out}"], 1, "not a safetensors file"),
        (["merge", "{base}", "{adapter}", "-o", "{base}/out"], 1, "is in the input"),
        (["inspect", "{adapter}x"], 1, "Did you mean"),
        (["inspect", "{base}"], 1, "this is a base model"),
        (["inspect", "{base}/model-00001-of-00003.safetensors", "--base", "{base}"], 2,
         "nothing to compare"),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_error(
    arguments: list[str], code: int, words: str, tmp_path: Path, base: Path, adapter: Path
) -> None:
    """A mistake is answered in words with the documented exit code; as JSON when asked so."""
    places = {"base": str(base), "adapter": str(adapter), "out": str(tmp_path / "out")}
    filled = [a.format(**places) for a in arguments]
    done = run_cli(*filled)
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    as_json = run_cli(*filled, "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stderr).keys() == {"error", "message", "hint"}
    assert not (tmp_path / "out").exists()


def test_empty_paths_and_reversed_ranges_are_usage_errors(tmp_path: Path) -> None:
    """A shell variable that is empty does not mean the current directory."""
    base, adapter = str(FIXTURES / "base"), str(FIXTURES / "adapter")
    assert run_cli("merge", base, adapter, "-o", "").exit_code == 2
    assert run_cli("inspect", adapter, "--layer", "3-1").exit_code == 2
    assert run_cli("inspect", adapter, "--layer", "0-99999999999").exit_code == 2
