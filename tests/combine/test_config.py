"""The config that combine writes: ranks, alphas, patterns and targets that PEFT reads as meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import (
    PREFIX,
    WEIGHTS,
    K,
    Q,
    Tensors,
    codes,
    config_of,
    deltas,
    lora,
    pair,
    write_adapter,
)
from helpers.cli import run_cli
from helpers.combining import assert_near, total
from safetensors.numpy import load_file

import loratool


def test_the_config_is_plain(mixed: tuple[list[Path], Path]) -> None:
    """alpha is r, no rsLoRA, no patterns, no dropout, leaf names as targets: all can read it."""
    config = config_of(mixed[1])
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert config["target_modules"] == ["k_proj", "q_proj"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    assert config["peft_type"] == "LORA"


def test_ranks_are_uniform_and_filled_with_zeros(mixed: tuple[list[Path], Path]) -> None:
    """Every module has the largest rank; what a module lacks is exactly zero, in A and in B."""
    tensors = load_file(mixed[1] / WEIGHTS)
    assert tensors[f"{PREFIX}{K}.lora_A.weight"].shape == (7, 10)
    assert tensors[f"{PREFIX}{K}.lora_B.weight"].shape == (12, 7)
    assert not tensors[f"{PREFIX}{K}.lora_A.weight"][2:].any()
    assert not tensors[f"{PREFIX}{K}.lora_B.weight"][:, 2:].any()
    assert tensors[f"{PREFIX}{K}.lora_A.weight"][:2].any(1).all()
    assert tensors[f"{PREFIX}{Q}.lora_A.weight"].any(1).all()
    assert_near(deltas(mixed[1]), total(mixed[0], [1, 1]), 100)


def test_peft_loads_the_result(mixed: tuple[list[Path], Path]) -> None:
    """PEFT's own model computes the sum of the deltas with the adapter that was written."""
    import torch
    from peft import PeftModel

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(10, 12, bias=False)
            self.k_proj = torch.nn.Linear(10, 12, bias=False)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = Attention()

    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer()])

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Inner()

    model = Outer()
    before = {n: p.detach().clone().double() for n, p in model.named_parameters()}
    merged = PeftModel.from_pretrained(model, str(mixed[1])).merge_and_unload()
    wanted = total(mixed[0], [1, 1])
    for name, weight in merged.named_parameters():
        change = weight.detach().double() - before[name]
        assert np.linalg.norm(change.numpy() - wanted[name.removesuffix(".weight")]) < 1e-3


def test_patterns_are_kept_when_asked(mixed: tuple[list[Path], Path], tmp_path: Path) -> None:
    """--keep-patterns writes each module with its own rank, and an alpha equal to it."""
    loratool.combine(mixed[0], tmp_path / "out", keep_patterns=True)
    config = config_of(tmp_path / "out")
    assert config["r"] == 7
    assert config["rank_pattern"] == config["alpha_pattern"] == {K: 2}
    assert load_file(tmp_path / "out" / WEIGHTS)[f"{PREFIX}{K}.lora_A.weight"].shape == (2, 10)
    report = loratool.compare([tmp_path / "out", mixed[1]], tolerance=1e-5)
    assert report.equal, report.differing


@pytest.mark.parametrize("flag", ["--patterns", "--keep-patterns"])
def test_patterns_have_two_spellings(
    mixed: tuple[list[Path], Path], tmp_path: Path, flag: str
) -> None:
    """--patterns, as resize and extract have it, is --keep-patterns."""
    done = run_cli("combine", *map(str, mixed[0]), "-o", str(tmp_path / "out"), flag)
    assert done.exit_code == 0, done.stderr
    assert "[ranks-differ]" in done.stderr
    assert config_of(tmp_path / "out")["rank_pattern"] == {K: 2}


@pytest.mark.parametrize("ranks", [(2, 3, 4), (4, 3, 2), (3, 4, 2), (2, 4, 3), (4, 2, 3)])
def test_patterns_of_paths_that_end_alike(
    tmp_path: Path, out: Path, ranks: tuple[int, int, int]
) -> None:
    """Where one path is the end of another, each still has its own rank, and can be read."""
    paths = ("q", "inner.q", "model.inner.q")
    sources = [
        write_adapter(tmp_path / str(n), pair(path, 12, 10, rank, n), {"r": rank})
        for n, (path, rank) in enumerate(zip(paths, ranks, strict=True))
    ]
    # In one adapter, so that they are no prefixes of each other's names.
    tensors: Tensors = {}
    for source in sources:
        tensors |= load_file(source / WEIGHTS)
    config = {"r": 1, "lora_alpha": 1, "rank_pattern": {}}
    longest_first = sorted(zip(paths, ranks, strict=True), key=lambda item: -len(item[0]))
    config["rank_pattern"] = dict(longest_first)
    source = write_adapter(tmp_path / "all", tensors, config)
    loratool.combine(source, out, keep_patterns=True)
    again = loratool.inspect(out)
    assert {m.path: m.rank for m in again.modules} == dict(zip(paths, ranks, strict=True))
    assert [w.message for w in again.warnings if w.refused] == []


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1"]},
        {},
    ],
    ids=["regex", "layers", "excluded", "none"],
)
def test_targets_are_full_paths_where_names_would_not_do(
    tmp_path: Path, out: Path, how: dict[str, Any]
) -> None:
    """A source made by a regex or for some layers makes full paths of the targets, which select
    the same modules in any model."""
    plain = lora(tmp_path / "plain", Q, target_modules=["q_proj"], seed=1)
    narrow = lora(tmp_path / "narrow", Q, K, seed=2, **how)
    loratool.combine([plain, narrow], out)
    config = config_of(out)
    assert config["target_modules"] == sorted([Q, K])
    assert not config.get("layers_to_transform")
    assert not config.get("exclude_modules")


@pytest.mark.parametrize(
    ("top", "listed"), [("lm_head", True), ("score", True), ("proj", False), ("scores", False)]
)
def test_a_head_among_full_paths_is_in_a_list(
    tmp_path: Path, out: Path, top: str, listed: bool
) -> None:
    """A name without a dot would mean all modules that end so, hence an expression; but for heads,
    because no other module is called like one, and SGLang takes lists only."""
    narrow = lora(tmp_path / "narrow", Q, top, target_modules=r".*q_proj|" + top)
    loratool.combine([narrow], out)
    targets = config_of(out)["target_modules"]
    assert targets == (sorted([Q, top]) if listed else "|".join(map(re.escape, sorted([Q, top]))))


def test_targets_name_nothing_that_is_absent(tmp_path: Path, out: Path) -> None:
    """A target that no module answers to is not carried over."""
    source = lora(tmp_path / "one", Q, target_modules=["q_proj", "v_proj"])
    report = loratool.combine(source, out)
    assert codes(report) == ["target-absent"]
    assert config_of(out)["target_modules"] == ["q_proj"]
    assert loratool.inspect(out).warnings == []
