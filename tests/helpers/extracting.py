"""A tiny llama and its fine-tunes on disk, and what their difference is in float64."""

from __future__ import annotations

import math
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratool
from helpers.adapters import WEIGHTS, config_of
from helpers.files import State, write_base
from helpers.outcomes import assert_clean, assert_clear, sha256s
from loratool.errors import LoraToolError

AT = "model.layers.{}."
Q0 = "model.layers.0.self_attn.q_proj"
UP1 = "model.layers.1.mlp.up_proj"
PREFIX = "base_model.model."


#: What extract saves only on request.
SAVED = ["norms", "biases"]
#: The options with which all that changed is in the adapter.
EVERYTHING: dict[str, Any] = {"save": SAVED, "embeddings": True}


def random_for(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(shape, generator=made, dtype=torch.float64)


def model(size: int = 16, layers: int = 2, vocabulary: int = 40) -> State:
    """The tensors of a tiny llama with biases on k_proj, in float32."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, size)}
    for number in range(layers):
        at = AT.format(number)
        shapes |= {
            at + "self_attn.q_proj.weight": (size, size),
            at + "self_attn.k_proj.weight": (size // 2, size),
            at + "self_attn.k_proj.bias": (size // 2,),
            at + "mlp.up_proj.weight": (2 * size, size),
            at + "mlp.down_proj.weight": (size, 2 * size),
            at + "input_layernorm.weight": (size,),
        }
    shapes |= {"model.norm.weight": (size,), "lm_head.weight": (vocabulary, size)}
    return {name: (0.1 * random_for(name, *shape)).float() for name, shape in shapes.items()}


def moved(state: State, *ends: str, decay: float = 0.7, rank: int | None = None) -> State:
    """A copy in which the tensors whose names end so (all if none is given) have changed:
    matrices with the singular values 0.05, 0.05·decay, …, as many as `rank`."""
    found = {}
    for name, value in state.items():
        found[name] = value.clone()
        if not value.is_floating_point() or (ends and not name.endswith(ends)):
            continue
        noise = random_for(name, *value.shape, seed=1)
        if value.ndim >= 2:
            u, _, v = torch.linalg.svd(noise.reshape(len(value), -1), full_matrices=False)
            sizes = 0.05 * decay ** torch.arange(u.shape[1], dtype=torch.float64)
            sizes[len(sizes) if rank is None else rank :] = 0
            noise = ((u * sizes) @ v).reshape(value.shape)
        else:
            noise *= 0.01
        found[name] = (value.double() + noise).to(value.dtype)
    return found


def cast(state: State, dtype: torch.dtype) -> State:
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}


def write(folder: Path, state: State, kind: str = "single", **config: Any) -> Path:
    """A checkpoint of this kind: one file, several shards with their index, torch, or bare."""
    if kind.startswith("shards"):
        names = sorted(state) if kind == "shards-sorted" else list(state)
        parts = [{n: state[n] for n in names[i::3]} for i in range(3)]
        return write_base(folder, *parts, config=config)
    if kind == "bare":
        folder.mkdir(parents=True)
        save_file(state, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    write_base(folder, state, config=config)
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        # Stored transposed, as a view: strides count.
        views = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}
        torch.save(views, folder / "pytorch_model.bin")
    return folder


def moves(base: State, tuned: State) -> State:
    """tuned - base in float64 of all tensors that both have in one shape and that differ."""
    return {
        name: tuned[name].double() - value.double()
        for name, value in base.items()
        if name in tuned
        and tuned[name].shape == value.shape
        and not torch.equal(tuned[name].double(), value.double())
    }


def products(folder: Path) -> State:
    """scale·B·A by weight name, as the weight is shaped in the file; checks rank and scale too."""
    config, tensors = config_of(folder), load_file(folder / WEIGHTS)
    found = {}
    for name, a in tensors.items():
        if ".lora_A." not in name and "lora_embedding_A" not in name:
            continue
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        path = re.split(r"\.lora_(?:embedding_)?A", name.removeprefix(PREFIX))[0]
        rank = of_pattern(config["rank_pattern"], path, config["r"])
        alpha = of_pattern(config["alpha_pattern"], path, config["lora_alpha"])
        assert alpha == rank, path
        if a.shape[0] != rank:
            found[_stack_of(config, path)] = torch.einsum(
                "ore,eri->eoi", b.double().reshape(len(b), rank, -1),
                a.double().reshape(-1, rank, a.shape[1]),
            )  # fmt: skip
            continue
        assert (a.shape[0], b.shape[1]) == (rank, rank), path
        delta = b.double().reshape(len(b), -1) @ a.double().reshape(len(a), -1)
        if "embedding" in name:
            delta = delta.T
        found[f"{path}.weight"] = delta.reshape(len(delta), *a.shape[1:]) if a.ndim > 2 else delta
    return found


def _stack_of(config: dict[str, Any], path: str) -> str:
    """The one parameter of a module that target_parameters means."""
    ends = [entry.rpartition(".") for entry in config["target_parameters"]]
    (leaf,) = {leaf for end, _, leaf in ends if f".{path}".endswith(f".{end}")}
    return f"{path}.{leaf}"


def of_pattern(patterns: dict[str, int], path: str, default: int) -> int:
    """PEFT's rule (get_pattern_key): the first key that is the path or a dotted end of it."""
    keys = (key for key in patterns if re.match(rf"(.*\.)?({key})$", path))
    return patterns.get(next(keys, ""), default)


def saved(folder: Path) -> State:
    """The tensors of an adapter that are no factors, by the name in the model."""
    return {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): value
        for name, value in load_file(folder / WEIGHTS).items()
        if "lora_" not in name
    }


def singular(delta: torch.Tensor) -> torch.Tensor:
    values: torch.Tensor = torch.linalg.svdvals(delta.reshape(len(delta), -1))
    return values


def square(tensors: Any) -> float:
    return math.fsum(float(t.double().square().sum()) for t in tensors)


def distance(base: State, tuned: State, folder: Path) -> float:
    """‖base + adapter - tuned‖/‖tuned - base‖ in float64."""
    goal, have = moves(base, tuned), products(folder)
    whole = saved(folder)
    off = [
        (whole[n].double() - tuned[n].double()) if n in whole else have.get(n, 0.0) - delta
        for n, delta in goal.items()
    ]
    return math.sqrt(square(off) / square(goal.values()))


def selects(config: dict[str, Any], path: str) -> bool:
    """PEFT's rule of target_modules, exclude_modules and modules_to_save."""

    def fits(wanted: list[str] | str | None) -> bool:
        if isinstance(wanted, str):
            return re.fullmatch(wanted, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in wanted or [])

    saved = config["modules_to_save"] or []
    if any(re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", path) for name in saved):
        return False
    return fits(config["target_modules"]) and not fits(config["exclude_modules"])


class Pair:
    """A base and a fine-tune on disk, and their tensors."""

    def __init__(self, folder: Path, base: State, tuned: State, **config: Any) -> None:
        self.out = folder / "out"
        self.before, self.after = base, tuned
        self.base = write(folder / "in" / "base", base, **config)
        self.tuned = write(folder / "in" / "fine", tuned, **config)

    def extract(self, **options: Any) -> loratool.ExtractReport:
        shutil.rmtree(self.out, ignore_errors=True)
        return loratool.extract(self.base, self.tuned, self.out, **{"dtype": "float32", **options})

    def fails(self, kind: type[LoraToolError], *parts: str, **options: Any) -> LoraToolError:
        """Extract, expecting this clear error with `parts` in it, and nothing on the disk."""
        before = sha256s(self.out.parent / "in")
        arguments = {"base": self.base, "tuned": self.tuned, "output": self.out, "rank": 2}
        with pytest.raises(LoraToolError) as caught:
            loratool.extract(**{**arguments, **options})
        assert isinstance(caught.value, kind), caught.value
        assert_clear(caught.value, *parts)
        assert_clean(self.out)
        assert sha256s(self.out.parent / "in") == before
        return caught.value


def ranks_of(report: loratool.ExtractReport) -> dict[str, int | None]:
    return {m.path: m.rank for m in report.modules}


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def assert_selected(folder: Path, state: State) -> None:
    """By PEFT's rules the config means exactly the modules with factors, and those saved."""
    config = config_of(folder)
    modules = {name.rpartition(".")[0] for name in state}
    parameters = config.get("target_parameters") or []
    names = products(folder).keys()
    bare = {n for n in names if any(f".{n}".endswith(f".{entry}") for entry in parameters)}
    assert {n for n in state if any(f".{n}".endswith(f".{entry}") for entry in parameters)} == bare
    adapted = {name.removesuffix(".weight") for name in names - bare}
    assert {m for m in modules if selects(config, m)} == adapted
    wanted = config["modules_to_save"] or []
    whole = {m for m in modules if any(m.endswith(name) for name in wanted)}
    names = saved(folder).keys()
    assert {n for n in names if n.rpartition(".")[0] in whole} == {
        n for n in state if n.rpartition(".")[0] in whole
    }


def odd_model() -> State:
    """A model with one of everything."""
    at = "model.layers.0."
    return model() | {
        "model.vision.conv.weight": random_for("c", 8, 3, 2, 2).float(),
        "model.vision.conv.bias": random_for("cb", 8).float(),
        "model.audio.conv1.weight": random_for("c1", 6, 4, 3).float(),
        "model.vision.depthwise.weight": random_for("dw", 8, 1, 3, 3).float(),
        "model.scale": random_for("s", 5).float(),
        "model.temperature": random_for("t", 1).float().reshape(()),
        at + "mlp.experts.gate_up_proj": random_for("e", 3, 8, 6).float(),
        at + "mlp.gate.weight": random_for("r", 3, 16).float(),
        at + "post_norm.weight": random_for("pw", 16).float(),
        at + "post_norm.bias": random_for("pb", 16).float(),
        "model.position_ids": torch.arange(12),
        "model.embed_positions.weight": random_for("p", 12, 16).float(),
        "classifier.dense.weight": random_for("h1", 16, 16).float(),
        "classifier.dense.bias": random_for("h2", 16).float(),
        "score.weight": random_for("h3", 3, 16).float(),
    }


def assert_accounted(report: loratool.ExtractReport, base: State, tuned: State) -> None:
    """Every tensor that differs is in modules, saved or left, once; all others are counted."""
    names = [m.path if m.kind == "experts" else f"{m.path}.weight" for m in report.modules]
    names += [t.name for t in (*report.saved, *report.left)]
    assert len(set(names)) == len(names)
    differ = {
        n for n, t in tuned.items()
        if n not in base or t.shape != base[n].shape or not torch.equal(t, base[n])
    }  # fmt: skip
    assert differ <= set(names)
    assert len(names) + report.unchanged == len(tuned)
