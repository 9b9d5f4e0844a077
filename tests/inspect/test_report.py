"""What inspect reports: norms, coverage, selections, and the lines it prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import codes, pair, write_adapter
from helpers.cli import run_cli
from safetensors.numpy import load_file

import loratool
from loratool.errors import UsageError


def test_norms_equal_the_dense_product(adapter: Path) -> None:
    """Every module's norms and singular values are those of the dense scale·B·A."""
    report = loratool.inspect(adapter, spectrum=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(report.modules) == 28
    for module in report.modules:
        a = tensors[f"base_model.model.{module.path}.lora_A.weight"].astype(np.float64)
        b = tensors[f"base_model.model.{module.path}.lora_B.weight"].astype(np.float64)
        values = np.linalg.svd(2.0 * b @ a, compute_uv=False)[: module.rank]
        assert module.scale == 2.0
        assert np.allclose(module.singular_values, values, rtol=1e-6)
        assert module.spectral_norm == pytest.approx(values[0], rel=1e-6)
        assert module.delta_norm == pytest.approx(np.linalg.norm(2.0 * b @ a), rel=1e-6)
        assert module.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)


def test_json_holds_the_promised_fields(adapter: Path) -> None:
    """The JSON document has every field that programs are told to rely on, and no NaN."""
    document = loratool.inspect(adapter).to_dict()
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document
    assert document["schema_version"] == 1
    assert document["format"] == "peft"
    assert document["peft_type"] == "LORA"
    assert document["base_model"] == "loratool-fixtures/base"
    assert document["totals"] == {
        "modules": 28, "tensors": 56, "parameters": 71680, "bytes": 286720,
    }  # fmt: skip
    wanted = {"path", "kind", "rank", "alpha", "scale", "shapes", "dtype", "delta_norm",
              "spectral_norm"}  # fmt: skip
    assert wanted <= document["modules"][0].keys()
    assert document["modules"][0]["shapes"] == {"A": [8, 320], "B": [128, 8]}
    assert document["config"]["r"] == 8
    assert document["metadata"] == {"format": "pt"}
    assert document["warnings"] == []


def test_base_adds_coverage_and_relative_norms(adapter: Path, base: Path) -> None:
    """With a base: what is adapted of it, ‖ΔW‖/‖W‖ per module, and the trainable share."""
    report = loratool.inspect(adapter, base=base)
    assert report.base is not None
    coverage = {c.name: (c.adapted, c.total) for c in report.base.coverage}
    assert coverage["model.layers.*.mlp.down_proj.weight"] == (4, 4)
    assert coverage["lm_head.weight"] == (0, 1)
    assert report.base.trainable_share == pytest.approx(71680 / 754816)
    import torch
    from safetensors.torch import load_file as load_torch

    weights: dict[str, torch.Tensor] = {}
    for shard in base.glob("*.safetensors"):
        weights |= load_torch(shard)
    for module in report.modules:
        norm = weights[f"{module.path}.weight"].double().norm().item()
        assert module.delta_norm is not None
        assert module.relative_norm == pytest.approx(module.delta_norm / norm, rel=1e-5)


def test_a_base_that_does_not_fit_is_reported(tmp_path: Path, base: Path) -> None:
    """Modules the base lacks are counted as unmatched, with a warning that names them."""
    tensors = {**pair("model.layers.0.self_attn.q_proj", 128, 128), **pair("model.nowhere", 8, 8)}
    report = loratool.inspect(write_adapter(tmp_path / "a", tensors, {}), base=base)
    assert report.base is not None
    assert report.base.unmatched == ["model.nowhere"]
    assert "unmatched" in codes(report)


def test_filters_choose_modules(adapter: Path) -> None:
    """--layer and --include restrict the modules; the totals stay those of the file."""
    report = loratool.inspect(adapter, layers="1-2", include=["q_proj", "mlp.*"])
    assert {m.path.split(".")[2] for m in report.modules} == {"1", "2"}
    assert len(report.modules) == 8
    assert report.total_modules == 28
    with pytest.raises(UsageError, match="No module matches"):
        loratool.inspect(adapter, layers="17")
    with pytest.raises(UsageError, match="Not a range"):
        loratool.inspect(adapter, layers="one")


def test_torch_file_gives_the_same_report(tmp_path: Path, adapter: Path) -> None:
    """adapter_model.bin is read like the safetensors file of the same tensors."""
    import torch
    from safetensors.torch import load_file as load_torch

    folder = tmp_path / "binary"
    folder.mkdir()
    torch.save(load_torch(adapter / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    one, other = loratool.inspect(adapter), loratool.inspect(folder)
    assert one.modules == other.modules


def test_inspect_prints_folded_layers(adapter: Path) -> None:
    """Modules that repeat over layers are one line; --full gives each its own."""
    folded = run_cli("inspect", adapter)
    assert folded.exit_code == 0
    assert "model.layers.{0-3}" in folded.stdout
    assert folded.stdout.count("q_proj") == 2  # once in the targets, once in the table
    full = run_cli("inspect", adapter, "--full", "--tensors")
    assert "model.layers.3" in full.stdout
    assert "lora_A.weight" in full.stdout
    assert folded.stderr == ""
