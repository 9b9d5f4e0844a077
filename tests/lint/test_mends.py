"""The commands that lint names: each exists, runs, and makes what lint says of it true."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.cli import run_cli
from helpers.dialects import CASES
from helpers.extracting import write
from helpers.linting import ADAPTERS, Q, V, on_two_layers, verdicts

import loratool

#: Of these not even a merge is possible.
NOT_MENDED = {"aLoRA", "LoRA-GA"}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A base that the small adapters fit."""
    names = {f"{path}.weight": (12, 10) for path in (*Q, *V)}
    names |= {f"{path}.bias": (12,) for path in (*Q, *V)}
    names |= {
        "model.embed_tokens.weight": (40, 10), "lm_head.weight": (40, 10),
        "model.layers.0.input_layernorm.weight": (10,), "score.weight": (2, 10),
        "model.layers.0.mlp.experts.gate_up_proj": (2, 8, 6),
        "model.layers.0.mlp.experts.down_proj": (2, 6, 4),
    }  # fmt: skip
    state = {name: torch.randn(shape) for name, shape in names.items()}
    config = {"model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False}
    return write(tmp_path / "base", state, **config)


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - {"plain", "layer_replication", "PiSSA"}))
def test_the_command_mends_it(name: str, tmp_path: Path, small: Path) -> None:
    """Each command runs as it is shown; the program loads what comes of it."""
    folder = ADAPTERS[name](tmp_path / "a")
    found = verdicts(folder, base=small)
    commands: dict[str, list[str]] = {}
    for verdict in found.values():
        if verdict.outcome != "loads":
            assert bool(verdict.mend) != (name in NOT_MENDED), (verdict.program, verdict.reasons)
            commands.setdefault(verdict.mend, []).append(verdict.program)
    commands.pop("", None)
    for command, programs in commands.items():
        program, *arguments = shlex.split(command)
        assert program == "loratool"
        done = run_cli(*arguments)
        assert done.exit_code == 0, f"{command}\n{done.stderr}"
        if arguments[0] == "merge":
            assert (Path(arguments[-1]) / "config.json").is_file()
        else:
            assert loratool.lint(arguments[-1], base=small, programs=programs).passes, command


def test_a_wrong_scale_is_mended_without_loss(tmp_path: Path) -> None:
    """resize to its own rank leaves the products as they were."""
    folder = ADAPTERS["rsLoRA"](tmp_path / "a")
    command = verdicts(folder)["llamacpp"].mend
    assert command.split()[1] == "resize"
    assert run_cli(*shlex.split(command)[1:]).exit_code == 0
    (pair,) = loratool.compare([folder, shlex.split(command)[-1]]).pairs
    assert np.isclose(pair.cosine, 1, atol=1e-6)


@pytest.mark.parametrize("case", ["mlx-steps", "gguf-f32", "torchtune-epoch", "litgpt-all"])
def test_other_dialects_are_converted(case: str, tmp_path: Path) -> None:
    """What is not PEFT's gets the convert command, which vLLM loads the result of."""
    one = CASES[case]
    (tmp_path / one.adapter.name).symlink_to(one.adapter)
    found = verdicts(tmp_path / one.adapter.name, base=one.base)["vllm"]
    assert found.mend.split()[1] == "convert"
    done = run_cli(*shlex.split(found.mend)[1:])
    assert done.exit_code == 0, done.stderr
    assert loratool.lint(shlex.split(found.mend)[-1], programs="vllm").passes


def test_another_dialect_is_cut_to_the_limit_too(tmp_path: Path) -> None:
    """What is neither PEFT's nor small enough gets one command for both."""
    one = CASES["mlx-steps"]
    (tmp_path / one.adapter.name).symlink_to(one.adapter)
    found = verdicts(tmp_path / one.adapter.name, base=one.base, max_rank=1)["vllm"]
    assert "--rank 1 " in found.mend
    assert run_cli(*shlex.split(found.mend)[1:]).exit_code == 0
    assert loratool.lint(shlex.split(found.mend)[-1], programs="vllm", max_rank=1).passes


def test_what_nobody_said_stands_in_capitals() -> None:
    """Without a base the command has BASE in its place, and A for an alpha that no file tells."""
    found = verdicts(CASES["gguf-f32"].adapter)
    assert "--base BASE" in found["vllm"].mend
    assert "--alpha A" in verdicts(CASES["loralib-linear"].adapter)["vllm"].mend


def test_names_with_spaces_and_dashes_are_quoted(tmp_path: Path) -> None:
    """The command is one that a shell takes as it is meant."""
    folder = on_two_layers(tmp_path / "my adapter; rm -rf x", use_rslora=True)
    command = shlex.split(verdicts(folder)["sglang"].mend)
    assert command[2] == str(folder)
    assert run_cli(*command[1:]).exit_code == 0


def test_layers_are_copied_by_the_command(tmp_path: Path) -> None:
    """What trained on copied layers is merged with the option that copies them."""
    folder = ADAPTERS["layer_replication"](tmp_path / "a")
    assert "--replicate-layers" in verdicts(folder)["vllm"].mend
