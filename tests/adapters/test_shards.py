"""An adapter in several files is read whole, or refused as a part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.adapters import K, Q, config_of, pair
from helpers.files import load, same, write_base
from helpers.outcomes import assert_clear, refused
from safetensors.torch import save_file

import loratool
from loratool.adapters.reading import read_adapter
from loratool.errors import AdapterError, FileError

STATE = {f"{path}.weight": torch.ones(12, 10) for path in (Q, K)}


def halves() -> list[dict[str, torch.Tensor]]:
    return [
        {name: torch.from_numpy(value) for name, value in pair(path, 12, 10, seed=n).items()}
        for n, path in enumerate((Q, K))
    ]


def write(folder: Path, form: str = "safetensors", index: bool = True) -> Path:
    """An adapter in two shards, as transformers' save_pretrained writes it."""
    folder.mkdir()
    names = [f"adapter_model-{n:05d}-of-00002.{form}" for n in (1, 2)]
    for name, part in zip(names, halves(), strict=True):
        save = save_file if form == "safetensors" else torch.save
        save(part, folder / name)
    if index:
        places = {t: n for n, part in zip(names, halves(), strict=True) for t in part}
        path = folder / f"adapter_model.{form}.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def whole(folder: Path) -> Path:
    """The same adapter in one file."""
    folder.mkdir()
    save_file({**halves()[0], **halves()[1]}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


FORMS = [("safetensors", True), ("safetensors", False), ("bin", True), ("bin", False)]


@pytest.mark.parametrize(("form", "index"), FORMS)
def test_shards_are_the_adapter_in_one_file(tmp_path: Path, form: str, index: bool) -> None:
    """With and without an index, in both formats: merge, verify, unmerge, inspect and resize."""
    base = write_base(tmp_path / "base", STATE)
    adapter, one = write(tmp_path / "shards", form, index), whole(tmp_path / "one")
    loratool.merge(base, one, tmp_path / "wanted", dtype="base")
    loratool.merge(base, adapter, tmp_path / "out", dtype="base", reversible=True)
    assert same(load(tmp_path / "out"), load(tmp_path / "wanted"))
    assert loratool.verify(tmp_path / "out", base, adapter).verdict == "yes"
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert same(load(tmp_path / "back"), STATE)
    assert {m.path for m in loratool.inspect(adapter).modules} == {Q, K}
    held = {path.name for path in read_adapter(adapter).files}
    assert held == {f"adapter_model-0000{n}-of-00002.{form}" for n in (1, 2)}
    loratool.resize(adapter, tmp_path / "small", rank=2)
    loratool.resize(one, tmp_path / "small-one", rank=2)
    assert same(load(tmp_path / "small"), load(tmp_path / "small-one"))
    assert config_of(tmp_path / "small")["r"] == 2


def test_the_record_holds_the_hash_of_every_shard(tmp_path: Path) -> None:
    """A changed second shard is another adapter, for unmerge too."""
    base = write_base(tmp_path / "base", STATE)
    adapter = write(tmp_path / "shards")
    loratool.merge(base, adapter, tmp_path / "out", reversible=True)
    files = json.loads((tmp_path / "out" / "loratool.json").read_text())["adapters"][0]["files"]
    assert len([name for name in files if "-of-00002" in name]) == 2
    path = adapter / "adapter_model-00002-of-00002.safetensors"
    save_file({name: value + 1 for name, value in halves()[1].items()}, path)
    with pytest.raises(loratool.LoraToolError, match="not among the adapters"):
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")


@pytest.mark.parametrize("number", [1, 2])
def test_one_shard_is_refused_as_a_part(tmp_path: Path, number: int) -> None:
    """A shard that is named alone is no adapter; inspect shows it and says so."""
    base = write_base(tmp_path / "base", STATE)
    file = write(tmp_path / "shards") / f"adapter_model-0000{number}-of-00002.safetensors"
    refused(AdapterError, base, file, tmp_path / "out", f"shard {number} of 2", str(file.parent))
    assert "one-shard" in {n.code for n in loratool.inspect(file).warnings if n.refused}


@pytest.mark.parametrize(("form", "index"), FORMS)
def test_a_missing_shard_is_named(tmp_path: Path, form: str, index: bool) -> None:
    """Half of a download is no adapter."""
    folder = write(tmp_path / "shards", form, index)
    (folder / f"adapter_model-00002-of-00002.{form}").unlink()
    with pytest.raises(FileError) as caught:
        read_adapter(folder)
    assert_clear(caught.value, str(folder), f"adapter_model-00002-of-00002.{form}")


def test_an_index_may_be_named(tmp_path: Path) -> None:
    """The index file stands for the adapter whose shards it lists."""
    folder = write(tmp_path / "shards")
    found = read_adapter(folder / "adapter_model.safetensors.index.json")
    assert set(found.modules) == {Q, K}
    assert {path.name for path in found.files} == {
        f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)
    }


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    """Without an index nothing says which of two values counts."""
    folder = write(tmp_path / "shards", index=False)
    both = {**halves()[0], **halves()[1]}
    save_file(both, folder / "adapter_model-00002-of-00002.safetensors")
    with pytest.raises(FileError, match="in another shard too"):
        read_adapter(folder)


def test_one_file_comes_before_shards(tmp_path: Path) -> None:
    """PEFT loads adapter_model.safetensors; shards beside it are named as not read."""
    folder = write(tmp_path / "shards")
    save_file(halves()[0], folder / "adapter_model.safetensors")
    found = read_adapter(folder)
    assert set(found.modules) == {Q}
    assert "weights-beside" in {n.code for n in found.notices}


def test_an_index_that_forgets_a_shard_is_refused(tmp_path: Path) -> None:
    """The shard's own name says that it belongs to the set; half of an adapter is not merged."""
    folder = write(tmp_path / "shards")
    first = "adapter_model-00001-of-00002.safetensors"
    index = {"weight_map": dict.fromkeys(halves()[0], first)}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="does not list 1 shard"):
        read_adapter(folder)


@pytest.mark.parametrize("index", [True, False])
def test_shards_in_a_folder_of_their_own(tmp_path: Path, index: bool) -> None:
    """The only adapter below a folder is found in shards too; its folder is that of its files."""
    (tmp_path / "run").mkdir()
    write(tmp_path / "run" / "checkpoint-100", index=index)
    found = read_adapter(tmp_path / "run")
    assert set(found.modules) == {Q, K}
    assert found.folder.path == tmp_path / "run" / "checkpoint-100"


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shards_that_are_called_like_a_models(tmp_path: Path, form: str, index: bool) -> None:
    """A trainer that saves "the model" writes an adapter's shards under a model's names."""
    folder = write(tmp_path / "shards", form, index)
    stem = "model" if form == "safetensors" else "pytorch_model"
    for path in list(folder.glob("adapter_model*")):
        path.rename(folder / path.name.replace("adapter_model", stem))
    if index:
        path = folder / f"{stem}.{form}.index.json"
        path.write_text(path.read_text().replace("adapter_model", stem))
    assert set(read_adapter(folder).modules) == {Q, K}


def test_safetensors_shards_come_first(tmp_path: Path) -> None:
    """Both formats without an index: one set is read."""
    folder = write(tmp_path / "shards", index=False)
    other = write(tmp_path / "other", "bin", index=False)
    for path in other.glob("*.bin"):
        path.rename(folder / path.name)
    found = read_adapter(folder)
    assert {path.suffix for path in found.files} == {".safetensors"}
