"""The files of a quantised base come back bit for bit, whatever became of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import State, load, raw_bytes
from helpers.golden import NAMES, golden
from helpers.outcomes import sha256s
from helpers.quantised import adapter_on, llama_state, write_fp8_base, write_nf4_base
from helpers.undoing import flipped
from helpers.unmerging import UNDO, codes, comes_back, no_unmerge, right_or_refused

import loratool
from loratool.errors import FileError, RestoreError, UsageError
from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import dequantised

Q = "model.layers.0.self_attn.q_proj.weight"
K = "model.layers.0.self_attn.k_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"

BASES: dict[str, Callable[..., State]] = {
    "nf4": write_nf4_base,
    "nf4-plain": lambda *a, **k: write_nf4_base(*a, nested=False, **k),
    "nf4-float16-in-bfloat16": lambda *a, **k: write_nf4_base(
        *a, dtype=torch.float16, storage=torch.bfloat16, **k
    ),
    "fp8": write_fp8_base,
    "fp8-small-blocks": lambda *a, **k: write_fp8_base(*a, block=(24, 40), **k),
}
TREATMENTS: dict[str, dict[str, Any]] = {
    "plain": {"quantised": "plain"},
    "plain-in-own-dtype": {"quantised": "plain", "dtype": "base"},
    "keep": {"quantised": "keep"},
    "requantise": {"quantised": "requantise", "force": True},
}


def apart(name: str) -> int:
    """Scales in another shard than codes, and one shard of scales alone."""
    return 2 * ("layers.1" in name) + ("absmax" in name or "scale" in name)


def written(folder: Path, kind: str, *adapted: str, width: int = 64, **options: Any) -> Path:
    """A base with files that describe its quantisation, and an adapter on weights of it."""
    state = llama_state(width, layers=2)
    BASES[kind](folder / "base", state, **options)
    (folder / "base" / "recipe.yaml").write_text("default_stage: {}\n")
    export = {"quantization": {"exclude_modules": ["lm_head"]}}
    (folder / "base" / "hf_quant_config.json").write_text(json.dumps(export))
    return adapter_on(folder / "adapter", {name: tuple(state[name].shape) for name in adapted})


@pytest.mark.parametrize("how", TREATMENTS)
@pytest.mark.parametrize("kind", BASES)
def test_packed_tensors_and_files_come_back(kind: str, how: str, tmp_path: Path) -> None:
    """Codes, scales, descriptions, shards, config, and files that the output does not have."""
    adapter = written(tmp_path, kind, Q, DOWN, shard_of=apart)
    comes_back(tmp_path / "base", adapter, tmp_path, **TREATMENTS[how])


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_a_base_that_was_not_touched_comes_back(kind: str, tmp_path: Path) -> None:
    """The packed tensors are those of the output, and what is kept is next to nothing."""
    adapter = written(tmp_path, kind, HEAD, width=128)
    report = comes_back(tmp_path / "base", adapter, tmp_path)
    assert report.undo_bytes < 0.1 * (tmp_path / "base" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", NAMES)
def test_every_format_comes_back(name: str, tmp_path: Path) -> None:
    """What the libraries wrote: the weight that became plain, and those that were copied."""
    case = golden(name)
    base = case.lay(tmp_path / "base")
    weights = {n: info.shape for n, info in dequantised(open_checkpoint(base)).weights.items()}
    weight = min(weights, key=lambda name: len(weights[name]))
    shape = weights[weight][::-1] if ".c_" in weight else weights[weight]
    adapter = adapter_on(tmp_path / "adapter", {weight: shape})
    comes_back(base, adapter, tmp_path, quantised="keep", trained_here=True)


@pytest.mark.parametrize(("kind", "share"), [("nf4", 0.1), ("fp8", 0.05)])
def test_what_is_kept_of_codes_is_small(kind: str, share: float, tmp_path: Path) -> None:
    """Codes are found again from the plain weight and the scales: scales are what is kept, which
    for NF4 are one byte for 32; and the dry run foretells it."""
    adapter = written(tmp_path, kind, Q, DOWN, width=320)
    options = {"quantised": "plain", "reversible": True}
    foretold = loratool.merge(tmp_path / "base", adapter, tmp_path / "out", dry_run=True, **options)
    report = comes_back(tmp_path / "base", adapter, tmp_path, quantised="plain")
    assert report.undo_bytes < share * (tmp_path / "base" / "model.safetensors").stat().st_size
    assert 0.5 < foretold.undo_bytes / report.undo_bytes < 2
    assert "undo-large" not in codes(foretold)


def test_weights_that_became_plain_and_were_rescaled_come_back(tmp_path: Path) -> None:
    """DoRA's gains are kept for codes as for other tensors."""
    adapter = written(tmp_path, "nf4", Q)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    path = f"base_model.model.{Q.removesuffix('.weight')}.lora_magnitude_vector.weight"
    save_file({**load_file(file), path: torch.rand(64) + 0.5}, file)
    comes_back(tmp_path / "base", adapter, tmp_path)


def test_a_changed_bit_is_seen(tmp_path: Path) -> None:
    """In the output or in the undo file: nothing is written that is not the base."""
    adapter = written(tmp_path, "nf4", Q)
    base, out = tmp_path / "base", tmp_path / "out"
    loratool.merge(base, adapter, out, reversible=True)
    for file in (out / "model.safetensors", out / UNDO):
        good = file.read_bytes()
        for place in range(200, len(good), len(good) // 13):
            file.write_bytes(flipped(good, place, 6))
            right_or_refused(out, adapter, tmp_path / "back", base)
        file.write_bytes(good)
    assert right_or_refused(out, adapter, tmp_path / "back", base)


def test_another_treatment_in_the_record_is_refused(tmp_path: Path) -> None:
    """It says which tensors the output has; one that does not exist is no record of a merge."""
    adapter = written(tmp_path, "fp8", Q)
    out = tmp_path / "out"
    loratool.merge(tmp_path / "base", adapter, out, reversible=True)
    record = json.loads((out / "loratool.json").read_text())
    for how, kind in (("plain", RestoreError), ("packed", FileError)):
        record["options"]["quantised"] = how
        (out / "loratool.json").write_text(json.dumps(record))
        no_unmerge(kind, out, adapter, tmp_path / "back", str(out))


def stored_of(folder: Path, names: list[str]) -> dict[str, bytes]:
    state = load(folder)
    return {name: raw_bytes(state[name]) for name in names}


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_subtraction_leaves_what_is_packed(kind: str, tmp_path: Path) -> None:
    """Without an undo file what is plain loses the adapter and stays plain, as config.json says;
    packed tensors are copied."""
    adapter = written(tmp_path, kind, Q)
    base, out, back = (tmp_path / name for name in ("base", "out", "back"))
    plain = BASES[kind](tmp_path / "again", llama_state(64, layers=2))
    loratool.merge(base, adapter, out, quantised="keep")
    report = loratool.unmerge(out, adapter, back)
    assert not report.exact
    before, after, merged = load(base), load(back), load(out)
    assert after.keys() == merged.keys()
    packed = [name for name in before if name in after and before[name].dtype == after[name].dtype]
    assert stored_of(back, packed) == stored_of(base, packed)
    assert after[Q].dtype == torch.bfloat16
    assert torch.allclose(after[Q].float(), plain[Q], rtol=2.0**-7, atol=2.0**-9)
    assert (out / "config.json").read_bytes() == (back / "config.json").read_bytes()
    assert (out / "recipe.yaml").read_bytes() == (back / "recipe.yaml").read_bytes()
    assert not codes(report)
    no_unmerge(UsageError, out, adapter, tmp_path / "no", "--dtype float16", dtype="float16")


def test_subtraction_from_packed_weights_makes_them_plain(tmp_path: Path) -> None:
    """A model that others quantised again: what is subtracted may not be in it, which is said."""
    adapter = written(tmp_path, "nf4", Q)
    plain = write_nf4_base(tmp_path / "again", llama_state(64, layers=2))
    report = loratool.unmerge(tmp_path / "base", adapter, tmp_path / "back")
    assert codes(report) == {"no-provenance", "quantised-base"}
    after = load(tmp_path / "back")
    assert after.keys() == plain.keys()
    assert all(torch.equal(after[name].float(), plain[name]) for name in plain if name != Q)
    assert "quantization_config" not in (tmp_path / "back" / "config.json").read_text()
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        "config.json", "loratool.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "how"), [("nf4", "plain"), ("nf4", "keep"), ("fp8", "plain")])
def test_originals_that_are_quantised_are_copied(kind: str, how: str, tmp_path: Path) -> None:
    """Of one shard of the base, what is whole in it comes in the place of what is subtracted: as
    the plain weight that it stands for. It is no base whose weights are plain."""
    adapter = written(tmp_path, kind, Q, DOWN, shard_of=lambda name: int("layers.1" in name))
    base, out, back = (tmp_path / name for name in ("base", "out", "back"))
    plain = BASES[kind](tmp_path / "again", llama_state(64, layers=2))
    loratool.merge(base, adapter, out, quantised=how)
    dtype = load(out)[Q].dtype
    shard = base / "model-00002-of-00002.safetensors"
    report = loratool.unmerge(out, adapter, back, base=shard)
    after = load(back)
    assert torch.equal(after[DOWN], plain[DOWN].to(dtype))
    assert not torch.equal(after[Q], plain[Q].to(dtype))
    assert not report.exact
    report = loratool.unmerge(out, adapter, back, base=base, overwrite=True)
    assert torch.equal(load(back)[Q], plain[Q].to(dtype))
    assert not report.exact


def test_originals_whose_scales_are_elsewhere_are_subtracted(tmp_path: Path) -> None:
    """A shard with codes and without their scales says nothing of these weights."""
    adapter = written(tmp_path, "nf4", Q, shard_of=apart)
    base, out, back = (tmp_path / name for name in ("base", "out", "back"))
    loratool.merge(base, adapter, out)
    shard = base / "model-00001-of-00004.safetensors"
    report = loratool.unmerge(out, adapter, back, base=shard)
    assert 0 < report.copied_from_base < report.tensors
    assert sha256s(back).keys() == sha256s(out).keys()
