"""inspect: what is reported, warned of, and called by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, pair, write_adapter
from safetensors.numpy import load_file, save_file

import loratool
from loratool.errors import FileError, UsageError
from loratool.verbs.inspect import InspectReport


def codes(report: InspectReport) -> list[str]:
    return [w.code for w in report.warnings]


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


LINEAR = pair("model.layers.0.self_attn.q_proj", 6, 5)


def altered(change: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**LINEAR, **change}


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
ODD: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], str]] = {
    "B all zero": (
        altered({f"{KEY}B.weight": np.zeros((6, 4), np.float32)}), {}, "zero-delta"),
    "NaN in a factor": (
        altered({f"{KEY}A.weight": np.full((4, 5), np.nan, np.float32)}), {}, "not-finite"),
    "infinity in a saved head": (
        altered({"base_model.model.score.weight": np.full((2, 5), np.inf, np.float32)}),
        {"modules_to_save": ["score"]}, "not-finite"),
    "config rank is not the tensors'": (LINEAR, {"r": 8}, "rank-mismatch"),
    "target without tensors": (LINEAR, {"target_modules": ["q_proj", "v_proj"]}, "target-absent"),
    "saved module without tensors": (
        LINEAR, {"modules_to_save": ["lm_head"]}, "saved-module-absent"),
    "bias mode without biases": (LINEAR, {"bias": "lora_only"}, "bias-absent"),
    "DoRA without magnitudes": (LINEAR, {"use_dora": True}, "magnitude-absent"),
    "square Conv1D": (
        pair("transformer.h.0.attn.c_proj", 6, 6), {"fan_in_fan_out": True}, "square-conv1d"),
    "a few rows of an embedding": (
        altered({"base_model.model.model.embed_tokens.weight": np.ones((5, 5), np.float32)}), {},
        "partial-embedding-rows"),
    "ZeRO-3 placeholder": (
        altered({f"{KEY}A.weight": np.zeros(0, np.float32)}), {}, "zero3-placeholder"),
    "unknown config field": (LINEAR, {"use_magic": True}, "unknown-config-field"),
    "half a pair": ({f"{KEY}A.weight": LINEAR[f"{KEY}A.weight"]}, {}, "half-a-pair"),
    "ranks of A and B differ": (
        altered({f"{KEY}B.weight": np.ones((6, 3), np.float32)}), {}, "pair-mismatch"),
    "unknown lora tensor": (
        altered({"base_model.model.x.lora_secret": np.ones(3, np.float32)}), {},
        "unknown-tensors"),
    "two tensors for one place": (
        altered({f"module.{KEY}A.weight": LINEAR[f"{KEY}A.weight"] + 1}), {}, "unknown-tensors"),
    "several adapters in one file": (
        {k.replace(".weight", f".{n}.weight"): v for k, v in LINEAR.items() for n in "xy"}, {},
        "several-adapters"),
    "no config": (LINEAR, None, "no-config"),  # type: ignore[dict-item]
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_has_a_code(name: str, tmp_path: Path) -> None:
    """Every oddity is reported under its stable code, and nothing sound is."""
    tensors, config, code = ODD[name]
    report = loratool.inspect(write_adapter(tmp_path / "odd", tensors, config))
    assert code in codes(report)
    json.dumps(report.to_dict(), allow_nan=False)
    sound = loratool.inspect(write_adapter(tmp_path / "sound", LINEAR, {}))
    assert codes(sound) == []


OTHERS: dict[str, tuple[list[str], str]] = {
    "kohya": (["lora_unet_down_0.lora_down.weight", "lora_unet_down_0.lora_up.weight",
               "lora_unet_down_0.alpha"], "kohya"),
    "kohya text encoder": (["lora_te1_text_model_q.lora_down.weight"], "kohya"),
    "diffusers": (["unet.down.attn1.to_q.lora_A.weight", "unet.down.attn1.to_q.lora_B.weight"],
                  "diffusers"),
    "old diffusers": (["unet.mid.attn1.processor.to_q_lora.down.weight"], "diffusers"),
    "mlx": (["model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b"],
            "mlx"),
    "prompt tuning": (["prompt_embeddings"], "prompt-tuning"),
    "ia3": (["base_model.model.h.0.attn.ia3_l"], "ia3"),
    "AdaLoRA": (["base_model.model.q.lora_A", "base_model.model.q.lora_E"], "adalora"),
    "LoKr": (["lora.q.lokr_w1", "lora.q.lokr_w2"], "lycoris"),
    "optimizer": (["q.lora_A.default.weight.exp_avg", "q.lora_A.default.weight.step"],
                  "optimizer-state"),
    "base": (["model.embed_tokens.weight", "model.norm.weight"], "base-checkpoint"),
    "unknown": (["alpha", "beta", "gamma"], "unknown"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_called_by_their_name(name: str, tmp_path: Path) -> None:
    """A file that is no PEFT LoRA is named as what it is, and merge refuses it by that name."""
    keys, code = OTHERS[name]
    path = tmp_path / "x.safetensors"
    save_file({key: np.ones((2, 2), np.float32) for key in keys}, path)
    report = loratool.inspect(path)
    assert report.format == code
    assert report.modules == []
    with pytest.raises(loratool.LoraToolError) as error:
        loratool.merge(FIXTURES / "base", path, tmp_path / "out")
    assert report.description in error.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("peft_type", "words"),
    [("IA3", "(IA)³"), ("ADALORA", "AdaLoRA"), ("PROMPT_TUNING", "prompt tuning"),
     ("PREFIX_TUNING", "prefix tuning"), ("LOHA", "LoHa"), ("NEWTYPE", "NEWTYPE")],
)  # fmt: skip
def test_other_peft_types_are_named(peft_type: str, words: str, tmp_path: Path) -> None:
    """The config's peft_type decides, whatever the tensors are called."""
    folder = write_adapter(tmp_path / "a", LINEAR, {"peft_type": peft_type})
    report = loratool.inspect(folder)
    assert words in report.description
    assert report.peft_type == peft_type


def test_find_the_weights_of_a_directory(tmp_path: Path, adapter: Path) -> None:
    """A directory without adapter_model.* is an error that names what is there instead."""
    with pytest.raises(FileError, match="no such file"):
        loratool.inspect(tmp_path / "gone")
    with pytest.raises(FileError, match="no adapter weights"):
        loratool.inspect(tmp_path)
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(
            (adapter / "adapter_model.safetensors").read_bytes()
        )
    with pytest.raises(FileError) as error:
        loratool.inspect(tmp_path)
    assert "one.safetensors" in error.value.hint


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
