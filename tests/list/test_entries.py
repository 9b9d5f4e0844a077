"""What is one entry, and what its line says."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.adapters import Q, lora, pair
from helpers.listing import entries, kohya, mlx, model
from helpers.places import FIXTURES
from safetensors.numpy import save_file

import loratool
from loratool.errors import FileError


def test_a_directory_of_peft_is_one_entry(tmp_path: Path) -> None:
    """Its weights are not listed again, and what its config says is in the line."""
    lora(tmp_path / "one", rank=8, lora_alpha=16, base_model_name_or_path="org/base")
    found = entries(tmp_path)
    assert list(found) == ["one"]
    one = found["one"]
    assert (one.kind, one.dialect, one.base, one.ranks, one.scales) == (
        "adapter", "peft", "org/base", [8], [2.0]
    )  # fmt: skip
    assert (one.modules, one.parameters, one.bytes) == (1, 8 * 22, 4 * 8 * 22)
    assert one.dtype == "F32"
    assert one.state == ""


def test_a_model_in_shards_is_one_entry(tmp_path: Path) -> None:
    """Config, shards and index are one line, with the architecture and all parameters."""
    shutil.copytree(FIXTURES / "base", tmp_path / "base")
    found = entries(tmp_path)
    assert list(found) == ["base"]
    assert (found["base"].kind, found["base"].family) == ("model", "llama")
    assert found["base"].parameters == loratool.inspect(
        FIXTURES / "adapter", base=FIXTURES / "base"
    ).to_dict()["base"].get("parameters", found["base"].parameters)


def test_files_in_one_folder_are_entries_each(tmp_path: Path) -> None:
    """A folder of kohya's files has a line for each, also where one is called lora.safetensors."""
    for name in ("a", "b", "lora"):
        kohya(tmp_path / f"{name}.safetensors", seed=ord(name[0]))
    found = entries(tmp_path)
    assert list(found) == ["a.safetensors", "b.safetensors", "lora.safetensors"]
    assert {entry.dialect for entry in found.values()} == {"kohya"}


def test_checkpoints_come_in_the_order_of_training(tmp_path: Path) -> None:
    """checkpoint-200 stands before checkpoint-1000, and optimizers are no entries."""
    for step in (1000, 200, 50):
        lora(tmp_path / "run" / f"checkpoint-{step}", seed=step)
        (tmp_path / "run" / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"\x80nothing")
    assert list(entries(tmp_path)) == [f"run/checkpoint-{step}" for step in (50, 200, 1000)]


def test_an_adapter_in_shards_is_one_entry(tmp_path: Path) -> None:
    """Numbered shards beside a config are read together."""
    lora(tmp_path / "one", Q, "model.layers.1.self_attn.q_proj")
    whole = tmp_path / "one" / "adapter_model.safetensors"
    whole.unlink()
    for number, layer in ((1, 0), (2, 1)):
        path = f"model.layers.{layer}.self_attn.q_proj"
        save_file(pair(path, 12, 10), whole.with_name(f"model-0000{number}-of-00002.safetensors"))
    found = entries(tmp_path)
    assert list(found) == ["one"]
    assert found["one"].modules == 2


def test_an_adapter_beside_a_merged_model_is_an_entry_of_its_own(tmp_path: Path) -> None:
    """A folder that holds both has a line for each."""
    lora(tmp_path / "both")
    model(tmp_path / "both")
    kinds = [entry.kind for entry in loratool.catalog(tmp_path).entries]
    assert sorted(kinds) == ["adapter", "model"]


def test_an_adapter_called_like_a_model_is_an_adapter(tmp_path: Path) -> None:
    """What model.safetensors holds decides, with and without a config of a model."""
    for name, config in (("bare", False), ("named", True)):
        model(tmp_path / name)
        save_file(pair(Q, 12, 10), tmp_path / name / "model.safetensors")
        if not config:
            (tmp_path / name / "config.json").unlink()
    assert {e.kind for e in entries(tmp_path).values()} == {"adapter"}


def test_dialects_are_named(tmp_path: Path) -> None:
    """MLX and GGUF are read by their headers, kohya is known by name only, and that is said."""
    mlx(tmp_path / "mlx")
    kohya(tmp_path / "style.safetensors", ss_network_dim="4", ss_base_model_version="sd_v1")
    shutil.copy(FIXTURES / "containers" / "adapter.gguf", tmp_path)
    found = entries(tmp_path)
    assert [found[n].dialect for n in ("mlx", "style.safetensors", "adapter.gguf")] == [
        "mlx", "kohya", "gguf"
    ]  # fmt: skip
    assert found["adapter.gguf"].family == "llama"
    style = found["style.safetensors"]
    if style.state == "recognised":
        assert style.modules is None
    assert (style.ranks, style.family) == ([4], "sd_v1")


def test_a_quantised_model_says_how(tmp_path: Path) -> None:
    """The method of its config is named, and parts of weights are not counted as parameters."""
    model(tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4})
    save_file({"a.qweight": np.zeros((4, 8), np.int32)}, tmp_path / "q" / "model.safetensors")
    found = entries(tmp_path)["q"]
    assert (found.quantised, found.parameters) == ("gptq", None)


def test_a_single_file_can_be_listed(tmp_path: Path) -> None:
    """A path of a file is a list of one."""
    file = kohya(tmp_path / "x.safetensors")
    assert list(entries(file)) == ["x.safetensors"]


def test_an_undo_file_is_no_model(tmp_path: Path) -> None:
    """What a reversible merge keeps in its output is not listed."""
    loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "merged", reversible=True)
    assert list(entries(tmp_path)) == ["merged"]


def test_a_misspelt_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is nearly called so is named at once, without the network."""
    (tmp_path / "loras").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError) as refused:
        loratool.catalog("lora")
    assert "loras" in refused.value.hint
