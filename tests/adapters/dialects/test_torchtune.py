"""Adapters of torchtune: its names, the order of rows, alpha, and its export for PEFT beside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.dialects import CASES, DialectCase, added_to, apart, cases

import loratool
from loratool.adapters.reading import read_adapter
from loratool.adapters.told import Told
from loratool.errors import LoraToolError
from loratool.models.checkpoint import open_checkpoint

LORA, DORA_EPOCH = CASES["torchtune-lora"], CASES["torchtune-dora-epoch"]
TOLD = Told(alpha=7.0)
State = dict[str, torch.Tensor]


def saved(folder: Path, change: Any = None) -> Path:
    """The adapter of a case with another state."""
    state: State = torch.load(LORA.adapter)
    if change is not None:
        change(state)
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "adapter_0.pt")
    return folder


def base_of(folder: Path, **config: Any) -> Path:
    """The base of the cases with other fields in its config.json."""
    shutil.copytree(LORA.base, folder)
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))
    return folder


def codes_of(adapter: Path, base: Path | None = None, told: Told = TOLD) -> set[str]:
    found = read_adapter(adapter, told, base and open_checkpoint(base))
    return {notice.code for notice in found.notices}


@pytest.mark.parametrize("case", cases("torchtune", merges=True), ids=lambda case: case.name)
def test_a_merge_adds_what_torchtune_does(case: DialectCase, tmp_path: Path) -> None:
    """Of files alone and of folders of an epoch, whose .pt is right where the export is not."""
    told = Told.from_dict(case.options)
    loratool.merge(case.base, case.adapter, tmp_path / "out", dtype="float32", told=told)
    assert apart(added_to(case, tmp_path / "out"), case.expected()) < 1e-6


@pytest.mark.parametrize("case", cases("torchtune", merges=False), ids=lambda case: case.name)
def test_what_a_file_cannot_tell_is_asked_for(case: DialectCase, tmp_path: Path) -> None:
    """Without alpha nothing is merged, and the message names the options."""
    with pytest.raises(LoraToolError, match=r"--alpha A or --scale S"):
        loratool.merge(case.base, case.adapter, tmp_path / "out")


@pytest.mark.parametrize(("kind", "turns"), [("llama", True), ("gemma2", True), ("qwen2", False)])
def test_rows_are_turned_where_torchtune_turned_them(
    kind: str, turns: bool, tmp_path: Path
) -> None:
    """The converter of Qwen2 leaves the order of Hugging Face; those of most families do not."""
    base = open_checkpoint(base_of(tmp_path / "base", model_type=kind))
    adapter = read_adapter(saved(tmp_path / "a"), TOLD, base)
    assert not adapter.notices
    state: State = torch.load(LORA.adapter)
    for name, heads in (("q_proj", 4), ("k_proj", 2)):
        stored = state[f"layers.0.attn.{name}.lora_b.weight"]
        wanted = stored.view(heads, 3, 2, -1).transpose(1, 2).reshape(stored.shape)
        pair = adapter.modules[f"model.layers.0.self_attn.{name}"].left_right()
        assert pair is not None
        assert np.array_equal(pair[0], wanted if turns else stored)


def test_the_order_of_rows_needs_the_base(tmp_path: Path) -> None:
    """Without a base, or with one of other heads or of an unknown kind, q and k are refused."""
    adapter = saved(tmp_path / "a")
    assert codes_of(adapter) == {"row-order"}
    for config in (
        {"num_attention_heads": 3, "head_dim": 6},
        {"model_type": "starcoder2"},
        {"num_attention_heads": None},
        {"num_key_value_heads": "2"},
        {"head_dim": 3, "num_attention_heads": 8},
        {"model_type": None},
    ):
        base = base_of(tmp_path / f"base{len(list(tmp_path.iterdir()))}", **config)
        assert codes_of(adapter, base) == {"row-order"}, config


def test_the_config_of_the_base_beside_the_adapter_will_do(tmp_path: Path) -> None:
    """torchtune copies it there."""
    adapter = saved(tmp_path / "a")
    shutil.copy(LORA.base / "config.json", adapter)
    assert codes_of(adapter) == set()
    report = loratool.inspect(adapter, told=TOLD)
    assert report.format == "torchtune"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda s: s.pop("layers.0.attn.v_proj.lora_b.weight"), "half-a-pair"),
        (lambda s: s.update({"layers.0.mlp.w9.lora_a.weight": torch.ones(2, 2)}),
         "unknown-tensors"),
        (lambda s: s.update({"decoder.layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 2)}),
         "unknown-tensors"),
        (lambda s: s.update({"layers.0.attn.v_proj.lora_a.weight": torch.ones(2, 24)}),
         "pair-mismatch"),
        (lambda s: s.update({"layers.0.attn.v_proj.lora_a.weight": torch.ones(0, 24)}),
         "zero3-placeholder"),
        (lambda s: s.update({"layers.0.attn.q_proj.lora_b.weight": torch.ones(22, 3)}),
         "row-order"),
        (lambda s: s.update({"layers.0.attn.q_proj.magnitude": torch.ones(12)}), "row-order"),
        (lambda s: s.update({"layers.0.attn.q_proj.lora_b.weight": torch.ones(24)}),
         "zero3-placeholder"),
        (lambda s: s.update({"layers.0.attn.v_proj.lora_b.weight": torch.ones(12, 3).int()}),
         "quantised-factors"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(change: Any, code: str, tmp_path: Path) -> None:
    """A missing half, a name that is not torchtune's, wrong shapes."""
    adapter = saved(tmp_path / "a", change)
    assert code in codes_of(adapter, LORA.base)
    with pytest.raises(LoraToolError):
        loratool.merge(LORA.base, adapter, tmp_path / "out", told=TOLD)


def test_alpha_is_that_of_the_config_beside(tmp_path: Path) -> None:
    """adapter_config.json has r and lora_alpha; what contradicts it is an error."""
    adapter = saved(tmp_path / "a")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({"r": 3, "lora_alpha": 6.0, "peft_type": "LORA"}))
    found = read_adapter(adapter, base=open_checkpoint(LORA.base))
    assert {module.scale for module in found.modules.values()} == {2.0}
    assert not found.notices
    with pytest.raises(LoraToolError, match=r"--alpha 7 makes its scale"):
        read_adapter(adapter, TOLD)
    overridden = read_adapter(adapter, Told(alpha=9.0, override=True))
    assert {module.scale for module in overridden.modules.values()} == {3.0}
    with pytest.raises(LoraToolError, match="--adapter-rank 4"):
        read_adapter(adapter, Told(rank=4))
    config.write_text(json.dumps({"r": 4, "lora_alpha": 6.0}))
    assert "rank-mismatch" in codes_of(adapter, LORA.base, Told())
    config.write_text(json.dumps({"r": 3, "lora_alpha": 6.0, "use_rslora": True}))
    assert "unknown-config-field" in codes_of(adapter, LORA.base, Told())
    for wrong in ({"lora_alpha": float("nan")}, {"r": "3"}, {"r": -1}):
        config.write_text(json.dumps({"r": 3, "lora_alpha": 6.0, **wrong}))
        with pytest.raises(LoraToolError, match=next(iter(wrong))):
            read_adapter(adapter)


def test_a_file_of_another_run_is_not_taken_for_the_export(tmp_path: Path) -> None:
    """Only the .pt that holds the same A as the export for PEFT goes before it."""
    folder = tmp_path / "epoch"
    shutil.copytree(DORA_EPOCH.adapter, folder)
    assert read_adapter(folder).format == "torchtune"
    state: State = torch.load(folder / "adapter_model.pt")
    torch.save({name: value + 1 for name, value in state.items()}, folder / "adapter_model.pt")
    other = read_adapter(folder)
    assert other.format == "peft"
    assert {notice.code for notice in other.notices} == {"weights-beside", "magnitude-undeclared"}
    (folder / "adapter_model.pt").write_bytes(b"PK\x03\x04 damaged")
    assert read_adapter(folder).format == "peft"


def test_a_dora_export_alone_is_refused(tmp_path: Path) -> None:
    """Its magnitudes of q and k are in the wrong order, and nothing can be merged rightly."""
    folder = tmp_path / "epoch"
    shutil.copytree(DORA_EPOCH.adapter, folder)
    (folder / "adapter_model.pt").unlink()
    with pytest.raises(LoraToolError, match="magnitude-undeclared"):
        loratool.merge(DORA_EPOCH.base, folder, tmp_path / "out")


def test_other_verbs_read_it(tmp_path: Path) -> None:
    """combine, resize and compare take it with the base's config beside it."""
    adapter = saved(tmp_path / "a")
    shutil.copy(LORA.base / "config.json", adapter)
    loratool.combine([adapter], tmp_path / "peft", told=TOLD)
    loratool.merge(LORA.base, tmp_path / "peft", tmp_path / "out", dtype="float32")
    assert apart(added_to(LORA, tmp_path / "out"), LORA.expected()) < 1e-6
    loratool.resize(adapter, tmp_path / "small", rank=2, told=TOLD)
    report = loratool.compare([adapter, tmp_path / "peft"], told=[TOLD, Told()])
    assert report.pairs[0].cosine == pytest.approx(1, abs=1e-6)
