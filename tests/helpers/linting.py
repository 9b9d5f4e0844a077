"""Small adapters that servers fare differently with, and what lint says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import loratool
from helpers.adapters import HEAD, PREFIX, Tensors, lora, pair, write_adapter
from helpers.experts import expert_pairs, stacks
from loratool.serving.verdict import Verdict
from loratool.verbs.lint import AdapterLint

#: Two layers, with the same modules in each.
Q, V = ([f"model.layers.{n}.self_attn.{leaf}" for n in range(2)] for leaf in ("q_proj", "v_proj"))
TARGETS = ["q_proj", "v_proj"]
NORM = f"{PREFIX}model.layers.0.input_layernorm.weight"
TABLE = f"{PREFIX}model.embed_tokens"


def on_two_layers(folder: Path, extra: Tensors | None = None, **config: Any) -> Path:
    """Factors on q_proj and v_proj of both layers."""
    settings = {"target_modules": TARGETS, **config}
    return lora(folder, *Q, *V, extra=extra, **settings)


def of_ranks(folder: Path, by_leaf: dict[str, int], **config: Any) -> Path:
    """Factors of a rank for each kind of module, by rank_pattern."""
    tensors: Tensors = {}
    for seed, path in enumerate((*Q, *V)):
        tensors |= pair(path, 12, 10, by_leaf[path.rpartition(".")[2]], seed)
    largest = max(by_leaf.values())
    patterns = {leaf: rank for leaf, rank in by_leaf.items() if rank != largest}
    return write_adapter(
        folder, tensors,
        {"r": largest, "rank_pattern": patterns, "target_modules": TARGETS, **config},
    )  # fmt: skip


def _whole(name: str, *shape: int) -> Tensors:
    return {name: np.ones(shape, np.float32)}


def _magnitudes() -> Tensors:
    names = [f"{PREFIX}{path}.lora_magnitude_vector" for path in (*Q, *V)]
    return {name: np.ones(12, np.float32) for name in names}


def _lookup() -> Tensors:
    rng = np.random.default_rng(5)
    return {
        f"{TABLE}.lora_embedding_A": rng.standard_normal((4, 40)).astype(np.float32),
        f"{TABLE}.lora_embedding_B": rng.standard_normal((10, 4)).astype(np.float32),
    }


def _of_experts(folder: Path) -> Path:
    return stacks(folder, expert_pairs(2, 8, 6, 2), expert_pairs(2, 6, 4, 2), r=2, lora_alpha=4)


#: By what they have: how they are made.
ADAPTERS: dict[str, Callable[[Path], Path]] = {
    "plain": on_two_layers,
    "rank 32": lambda f: on_two_layers(f, rank=32),
    "rank_pattern": lambda f: of_ranks(f, {"q_proj": 2, "v_proj": 4}),
    "both patterns": lambda f: of_ranks(
        f, {"q_proj": 2, "v_proj": 4}, alpha_pattern={"q_proj": 4}
    ),
    "alpha_pattern": lambda f: on_two_layers(f, alpha_pattern={"q_proj": 16}),
    "rsLoRA": lambda f: on_two_layers(f, use_rslora=True),
    "DoRA": lambda f: on_two_layers(f, _magnitudes(), use_dora=True),
    "lora_bias": lambda f: on_two_layers(
        f, {f"{PREFIX}{p}.lora_B.bias": np.ones(12, np.float32) for p in (*Q, *V)}, lora_bias=True
    ),
    "bias": lambda f: on_two_layers(f, _whole(f"{PREFIX}{Q[0]}.bias", 12), bias="lora_only"),
    "score": lambda f: on_two_layers(
        f, _whole(HEAD, 2, 10), modules_to_save=["score"], task_type="SEQ_CLS"
    ),
    "saved embedding": lambda f: on_two_layers(
        f, _whole(f"{TABLE}.weight", 40, 10), modules_to_save=["embed_tokens"]
    ),
    "norms": lambda f: on_two_layers(f, _whole(NORM, 10), modules_to_save=["input_layernorm"]),
    "embedding factors": lambda f: on_two_layers(
        f, _lookup(), target_modules=[*TARGETS, "embed_tokens"]
    ),
    "head factors": lambda f: on_two_layers(
        f, pair("lm_head", 40, 10, seed=9), target_modules=[*TARGETS, "lm_head"]
    ),
    "token rows": lambda f: on_two_layers(
        f, _whole(f"{TABLE}.token_adapter.trainable_tokens_delta", 2, 10),
        trainable_token_indices={"embed_tokens": [3, 5]},
    ),
    "regular expression": lambda f: on_two_layers(f, target_modules=r".*\.(q|v)_proj"),
    "gap": lambda f: lora(f, *Q, V[0], target_modules=TARGETS),
    "aLoRA": lambda f: on_two_layers(f, alora_invocation_tokens=[1, 2]),
    "layer_replication": lambda f: on_two_layers(f, layer_replication=[[0, 1], [0, 1]]),
    "PiSSA": lambda f: on_two_layers(f, init_lora_weights="pissa"),
    "LoRA-GA": lambda f: on_two_layers(f, init_lora_weights="lora_ga"),
    "fan_in_fan_out": lambda f: on_two_layers(f, fan_in_fan_out=True),
    "alpha no integer": lambda f: on_two_layers(f, lora_alpha=8.5),
    "experts": _of_experts,
}  # fmt: skip


def linted(folder: Path, **options: Any) -> AdapterLint:
    """What lint says of one adapter."""
    (found,) = loratool.lint(folder, **options).adapters
    assert isinstance(found, AdapterLint)
    return found


def verdicts(folder: Path, **options: Any) -> dict[str, Verdict]:
    return {verdict.program: verdict for verdict in linted(folder, **options).verdicts}
