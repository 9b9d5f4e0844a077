"""What users say of adapters on the command line: one value for all, or one for each in order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import Q, pair, write_adapter
from helpers.cli import run_cli
from helpers.stacked import write_base
from safetensors.numpy import load_file

OUT = "model.safetensors"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A base and two adapters whose files do not tell alpha."""
    rng = np.random.default_rng(0)
    base = write_base(tmp_path / "base", {f"{Q}.weight": rng.standard_normal((12, 10))})
    one = write_adapter(tmp_path / "one", pair(Q, 12, 10, seed=1), None)
    two = write_adapter(tmp_path / "two", pair(Q, 12, 10, seed=2), None)
    return {"base": base, "one": one, "two": two, "out": tmp_path / "out"}


def _delta(files: dict[str, Path]) -> np.ndarray:
    merged = load_file(files["out"] / OUT)[f"{Q}.weight"].astype(np.float64)
    return merged - load_file(files["base"] / OUT)[f"{Q}.weight"]


def _product(folder: Path) -> np.ndarray:
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{Q}"
    return tensors[f"{prefix}.lora_B.weight"].astype(float) @ tensors[f"{prefix}.lora_A.weight"]


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        (["--alpha", "8"], (2, 2)),
        (["--alpha", "8", "--alpha", "4"], (2, 1)),
        (["--scale", "0.5", "--scale", "3"], (0.5, 3)),
        (["--alpha", "8", "--alpha", "-", "--scale", "-", "--scale", "3"], (2, 3)),
    ],
)
def test_values_go_to_adapters_in_their_order(
    options: list[str], scales: tuple[float, float], files: dict[str, Path]
) -> None:
    """One value is for all adapters, several are one each; - leaves an adapter out."""
    done = run_cli(
        "merge", files["base"], files["one"], files["two"], "-o", files["out"], "--dtype",
        "float32",
        *options,
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    right = scales[0] * _product(files["one"]) + scales[1] * _product(files["two"])
    assert np.allclose(_delta(files), right, atol=1e-5)


def test_what_was_said_is_recorded_and_need_not_be_said_again(files: dict[str, Path]) -> None:
    """verify takes it from loratool.json, by the adapters' names."""
    merge = ["merge", files["base"], files["one"], files["two"], "-o", files["out"]]
    said = ["--alpha", "8", "--alpha", "4", "--dtype", "float32"]
    assert run_cli(*merge, *said).exit_code == 0
    record = json.loads((files["out"] / "loratool.json").read_text())
    assert [entry["told"] for entry in record["adapters"]] == [{"alpha": 8.0}, {"alpha": 4.0}]
    again = ["verify", files["out"], "--base", files["base"]]
    assert run_cli(*again, files["two"], files["one"]).exit_code == 0
    assert run_cli(*again, files["two"], files["one"], "--alpha", "8").exit_code == 3


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--alpha", "8", "--scale", "2"], 2, "--alpha and --scale"),
        (["--alpha", "0"], 2, "--alpha 0"),
        (["--alpha", "nan"], 2, "--alpha nan"),
        (["--alpha", "1", "--alpha", "2", "--alpha", "3"], 2, "3 times for 2 adapters"),
        (["--adapter-rank", "0"], 2, "--adapter-rank"),
        (["--product", "BAB"], 2, "BAB"),
        (["--from", "mxl"], 2, "Did you mean mlx"),
        (["--enable-lora", "qkv"], 2, "MODULE=1,0,1"),
        (["--enable-lora", "qkv=0,0"], 2, "MODULE=1,0,1"),
        ([], 1, "--alpha"),
    ],
)
def test_mistakes_get_one_clear_error(
    options: list[str], code: int, words: str, files: dict[str, Path]
) -> None:
    done = run_cli(
        "merge", files["base"], files["one"], files["two"], "-o", files["out"], *options
    )  # fmt: skip
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not files["out"].exists()


def test_a_file_that_says_otherwise_is_an_error_unless_overridden(
    files: dict[str, Path], tmp_path: Path
) -> None:
    """The config's alpha stands; --override is for those who know better."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    told = write_adapter(tmp_path / "told", pair(Q, 12, 10, seed=1), config)
    merge = ["merge", files["base"], told, "-o", files["out"], "--dtype", "float32", "--alpha"]
    done = run_cli(*merge, "16")
    assert done.exit_code == 1
    assert "--override" in done.stderr
    assert run_cli(*merge, "8").exit_code == 0
    assert np.allclose(_delta(files), 2 * _product(told), atol=1e-5)
    assert run_cli(*merge, "16", "--override", "--overwrite").exit_code == 0
    assert np.allclose(_delta(files), 4 * _product(told), atol=1e-5)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"alpha": "8"}, "alpha"),
        ({"gamma": 3}, "'gamma' is not known"),
        ({"enable_lora": {"q": "1"}}, "enable_lora"),
        ({"product": "BAB"}, "BAB"),
    ],
)
def test_a_record_that_says_nonsense_is_an_error(
    told: dict[str, object], words: str, files: dict[str, Path]
) -> None:
    """loratool.json comes from strangers too."""
    merge = ["merge", files["base"], files["one"], "-o", files["out"], "--alpha", "8"]
    assert run_cli(*merge).exit_code == 0
    path = files["out"] / "loratool.json"
    record = json.loads(path.read_text())
    record["adapters"][0]["told"] = told
    path.write_text(json.dumps(record))
    done = run_cli("verify", files["out"], "--base", files["base"], files["one"])
    assert done.exit_code in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
