"""Tinker: PEFT's files with all experts in one tensor, and names of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.dialects import CASES, apart, cases
from safetensors.numpy import load_file, save_file

import loratool
from loratool.adapters.adapter import Adapter
from loratool.adapters.reading import read_adapter

Tensors = dict[str, np.ndarray]
PREFIX = "base_model.model."
LAYER = "model.layers.0"
RANK, ALPHA = 2, 8


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def pair(path: str, a: tuple[int, ...], b: tuple[int, ...], seed: int = 0) -> Tensors:
    key = f"{PREFIX}{path}.lora_"
    return {f"{key}A.weight": normal(*a, seed=seed), f"{key}B.weight": normal(*b, seed=seed + 1)}


def experts(leaf: str, count: int = 3, shared: int = 3, owner: str = "mlp") -> Tensors:
    path = f"{LAYER}.{owner}.experts.{leaf}"
    return pair(path, (shared, RANK, 6), (count, 5, RANK), seed=ord(leaf[1]))


def write(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return folder


def reasons(adapter: Adapter) -> dict[str, str]:
    return {n.code: n.message for n in adapter.notices if n.refused}


@pytest.mark.parametrize("case", cases("tinker", merges=True), ids=lambda case: case.name)
def test_what_is_merged_is_what_its_cookbook_adds(case: Any, tmp_path: Path) -> None:
    loratool.merge(case.base, case.adapter, tmp_path / "out", dtype="float32")
    merged, before = load_file(tmp_path / "out/model.safetensors"), case.base_tensors()
    found = {k: merged[k].astype(np.float64) - before[k].astype(np.float64) for k in before}
    assert apart(found, case.expected()) < 1e-6


@pytest.mark.parametrize("shared", [1, 3])
def test_each_expert_has_its_factors_and_the_shared_one(shared: int, tmp_path: Path) -> None:
    tensors = experts("w1", shared=shared) | experts("w2") | experts("w3")
    found = read_adapter(write(tmp_path / "in", tensors))
    assert (found.format, len(found.modules), reasons(found)) == ("tinker", 9, {})
    assert len(found.tensors) == 6
    key = f"{PREFIX}{LAYER}.mlp.experts.w1.lora_"
    for number in range(3):
        module = found.modules[f"{LAYER}.mlp.experts.{number}.gate_proj"]
        both = module.left_right()
        assert both is not None
        assert module.scale == ALPHA / RANK
        assert np.array_equal(both[0], tensors[f"{key}B.weight"][number])
        assert np.array_equal(both[1], tensors[f"{key}A.weight"][number if shared > 1 else 0])
    assert f"{LAYER}.mlp.experts.0.up_proj" in found.modules


def test_experts_without_a_gate_have_it_empty(tmp_path: Path) -> None:
    """Of Nemotron: w1 is up then; where only w3 is not there, nothing says so."""
    empty = pair(f"{LAYER}.mixer.experts.w3", (3, 0, 6), (3, 0, RANK))
    tensors = experts("w1", owner="mixer") | experts("w2", owner="mixer")
    found = read_adapter(write(tmp_path / "empty", tensors | empty))
    leaves = {path.rpartition(".")[2] for path in found.modules}
    assert (leaves, reasons(found)) == ({"up_proj", "down_proj"}, {})
    assert len(found.inert) == 2
    absent = read_adapter(write(tmp_path / "absent", tensors))
    assert {p.rpartition(".")[2] for p in absent.modules} == {"gate_proj", "down_proj"}


def test_parts_of_one_matrix_become_one_module(tmp_path: Path) -> None:
    """Qwen3.5's linear attention: q, k and v are rows of in_proj_qkv, each with factors."""
    sizes = {"q": 4, "k": 4, "v": 8}
    owner = f"{LAYER}.linear_attn.in_proj_"
    tensors: Tensors = experts("w1")
    for seed, (part, rows) in enumerate(sizes.items()):
        tensors |= pair(f"{owner}{part}", (RANK, 6), (rows, RANK), seed=10 * seed)
    found = read_adapter(write(tmp_path / "all", tensors))
    both = found.modules[f"{owner}qkv"].left_right()
    assert both is not None
    key = f"{PREFIX}{owner}"
    right = [tensors[f"{key}{p}.lora_B.weight"] @ tensors[f"{key}{p}.lora_A.weight"] for p in sizes]
    assert np.allclose(both[0] @ both[1], np.concatenate(right), atol=1e-6)
    assert found.modules[f"{owner}qkv"].scale == ALPHA / RANK
    assert f"{owner}q" not in found.modules
    for side in "AB":
        del tensors[f"{key}k.lora_{side}.weight"]
    assert f"{owner}q" in read_adapter(write(tmp_path / "some", tensors)).modules


@pytest.mark.parametrize("ties", [False, True])
def test_the_head_is_the_embedding_where_they_are_one(ties: bool, tmp_path: Path) -> None:
    case = CASES["mlx-lora"]
    base = tmp_path / "base"
    base.mkdir()
    tensors = case.base_tensors()
    vocabulary, dim = tensors["lm_head.weight"].shape
    name = "lm_head.weight"
    if ties:
        del tensors[name]
        name = "model.embed_tokens.weight"
    save_file(tensors, base / "model.safetensors")
    config = json.loads((case.base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": ties}))
    factors = pair("model.unembed_tokens", (RANK, dim), (vocabulary, RANK))
    loratool.merge(base, write(tmp_path / "in", factors), tmp_path / "out", dtype="float32")
    merged = load_file(tmp_path / "out/model.safetensors")
    a, b = factors.values()
    assert merged.keys() == tensors.keys()
    assert np.allclose(merged[name], tensors[name] + ALPHA / RANK * b @ a, atol=1e-5)
    assert all(np.array_equal(merged[k], tensors[k]) for k in tensors if k != name)


@pytest.mark.parametrize(
    ("a", "b"),
    [((3, RANK, 6), (4, 5, RANK)), ((1, RANK, 6), (1, 5, RANK)), ((RANK, 6), (5, RANK)),
     ((3, 3, 6), (3, 5, RANK)), ((3, 0, 6), (3, 5, 0))],
)  # fmt: skip
def test_what_is_no_pair_of_experts_is_refused(
    a: tuple[int, ...], b: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = pair(f"{LAYER}.mlp.experts.w1", a, b) | experts("w3")
    assert "pair-mismatch" in reasons(read_adapter(write(tmp_path / "in", tensors)))


def test_the_rest_is_as_peft_has_it(tmp_path: Path) -> None:
    """Half a pair, another rank than the config's, and options that PEFT has no merge for."""
    half = experts("w1")
    del half[f"{PREFIX}{LAYER}.mlp.experts.w1.lora_B.weight"]
    assert reasons(read_adapter(write(tmp_path / "half", half)))
    other = reasons(read_adapter(write(tmp_path / "rank", experts("w1"), r=4)))
    assert "rank-mismatch" in other
    twice = experts("w1") | {
        k.replace(PREFIX, ""): v + 1 for k, v in experts("w1").items() if "lora_A" in k
    }
    assert reasons(read_adapter(write(tmp_path / "twice", twice)))


def test_megatron_is_named(tmp_path: Path) -> None:
    layer = "decoder.layers.0.self_attention.linear_qkv.adapter"
    for names in ("linear_in", "linear_out"), ("adapter_q.linear_in", "adapter_q.linear_out"):
        folder = tmp_path / names[0]
        folder.mkdir()
        keys = [f"{layer}.{name}.weight" for name in names]
        save_file({keys[0]: normal(2, 6), keys[1]: normal(5, 2)}, folder / "a.safetensors")
        found = read_adapter(folder / "a.safetensors")
        assert (found.format, found.is_read) == ("megatron", False)
        assert "export it" in found.description
