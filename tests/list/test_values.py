"""What values tell: adapters that do nothing, and the same weights under two names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import Q, lora, pair, write_adapter
from helpers.listing import entries, kohya, mlx, model
from safetensors.numpy import load_file, save_file

from loratool.storage import tensors


def spoiled(folder: Path, **factors: float) -> Path:
    """An adapter on two modules, with a factor of each filled with this."""
    lora(folder, Q, "model.layers.1.self_attn.q_proj")
    file = folder / "adapter_model.safetensors"
    held = load_file(file)
    for name, value in held.items():
        for side, filling in factors.items():
            if f"lora_{side}" in name:
                value[:] = filling
    save_file(held, file)
    return folder


def test_an_adapter_with_zero_factors_does_nothing(tmp_path: Path) -> None:
    """All B, or all A, are zero; one module that does something is enough."""
    spoiled(tmp_path / "b", B=0)
    spoiled(tmp_path / "a", A=0)
    spoiled(tmp_path / "negative", B=-0.0)
    lora(tmp_path / "scale", lora_alpha=0)
    sound = spoiled(tmp_path / "sound", B=0) / "adapter_model.safetensors"
    held = load_file(sound)
    held["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][-1, -1] = 1e-30
    save_file(held, sound)
    found = entries(tmp_path)
    assert {name: entry.state for name, entry in found.items() if name != "scale"} == {
        "a": "does-nothing", "b": "does-nothing", "negative": "does-nothing", "sound": "",
    }  # fmt: skip
    assert found["scale"].state in ("does-nothing", "refused")


def test_more_than_factors_may_do_something(tmp_path: Path) -> None:
    """With zero B a trained head or a magnitude still changes the model: nothing is claimed."""
    b = f"base_model.model.{Q}.lora_B.weight"
    tensors = pair(Q, 12, 10)
    tensors[b][:] = 0
    head = {"base_model.model.score.weight": np.ones((2, 10), np.float32)}
    write_adapter(tmp_path / "head", tensors | head, {"modules_to_save": ["score"]})
    magnitude = {f"base_model.model.{Q}.lora_magnitude_vector.weight": np.ones(12, np.float32)}
    write_adapter(tmp_path / "dora", tensors | magnitude, {"use_dora": True})
    assert [entry.state for entry in entries(tmp_path).values()] == ["", ""]


def test_nan_is_seen_where_values_are_read(tmp_path: Path) -> None:
    """An adapter that begins with NaN is said to hold it."""
    spoiled(tmp_path / "x", B=np.nan)
    assert entries(tmp_path)["x"].state == "not-finite"


def test_copies_are_found_by_their_tensors(tmp_path: Path) -> None:
    """Other metadata and another name hide nothing; other values of one element do."""
    first = lora(tmp_path / "a")
    held = load_file(first / "adapter_model.safetensors")
    for name in ("b", "c"):
        shutil.copytree(first, tmp_path / name)
        save_file(held, tmp_path / name / "adapter_model.safetensors", {"another": "header"})
        next(iter(held.values()))[0, 0] += 1
    found = entries(tmp_path)
    assert [found[name].duplicate_of for name in "abc"] == [None, "a", None]


def test_the_same_tensors_with_another_scale_are_no_copies(tmp_path: Path) -> None:
    """They do something else."""
    lora(tmp_path / "a", lora_alpha=8)
    lora(tmp_path / "b", lora_alpha=16)
    assert entries(tmp_path)["b"].duplicate_of is None


def test_copies_of_models_and_of_single_files_are_found(tmp_path: Path) -> None:
    """By the same rule, also through a hard link."""
    model(tmp_path / "m1")
    shutil.copytree(tmp_path / "m1", tmp_path / "m2")
    os.link(kohya(tmp_path / "k1.safetensors"), tmp_path / "k2.safetensors")
    found = entries(tmp_path)
    assert found["m2"].duplicate_of == "m1"
    assert found["k2.safetensors"].duplicate_of == "k1.safetensors"


def test_checkpoints_of_one_run_are_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same shapes, other values: samples tell them apart, and most bytes stay unread."""
    for step in range(5):
        lora(tmp_path / f"checkpoint-{step}", rank=4096, seed=step)
    read = 0
    into = tensors.FilePool.read_into

    def counting(self: tensors.FilePool, *given: object) -> None:
        nonlocal read
        read += len(given[2])  # type: ignore[arg-type]
        into(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(tensors.FilePool, "read_into", counting)
    found = entries(tmp_path)
    assert all(entry.duplicate_of is None for entry in found.values())
    assert read < 0.2 * sum(entry.bytes or 0 for entry in found.values())


def test_equal_deltas_are_found_on_request(tmp_path: Path) -> None:
    """Another dialect, another dtype and another rank with the same delta are duplicates then."""
    lora(tmp_path / "a")
    mlx(tmp_path / "b-mlx")
    tensors = pair(Q, 12, 10)
    half = {name: value.astype(np.float16) for name, value in tensors.items()}
    write_adapter(tmp_path / "c-half", half, {})
    padded = {
        name: np.pad(value, ((0, 4), (0, 0)) if "lora_A" in name else ((0, 0), (0, 4)))
        for name, value in tensors.items()
    }
    write_adapter(tmp_path / "d-padded", padded, {"r": 8, "lora_alpha": 16})
    lora(tmp_path / "e-other", seed=3)
    mlx(tmp_path / "f-scaled", scale=3.0)
    assert all(entry.duplicate_of is None for entry in entries(tmp_path).values())
    found = entries(tmp_path, equal=True)
    assert {name: entry.duplicate_of for name, entry in found.items()} == {
        "a": None, "b-mlx": "a", "c-half": "a", "d-padded": "a", "e-other": None,
        "f-scaled": None,
    }  # fmt: skip
