"""Every form of a base comes back as it was: shards, index, torch files, any name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.files import (
    ADAPTED,
    NORM,
    OTHER,
    load,
    random_of,
    same,
    small_state,
    write_base,
    write_index,
)
from helpers.layer_cases import write_shards
from helpers.outcomes import sha256s
from helpers.unmerging import comes_back
from safetensors.torch import load_file, save_file

import loratool


def test_the_fixtures_come_back(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A base in three shards with its index, tokenizer and generation config, as the Hub has it."""
    report = comes_back(base, adapter, tmp_path)
    assert report.shards == sorted(p.name for p in base.glob("*.safetensors"))
    assert report.remaining == []


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_form_of_the_base_is_kept(
    count: int, suffix: str, tmp_path: Path, lora_dir: Path
) -> None:
    """Shards, index and single files of safetensors come back byte for byte; torch files as
    safetensors with the same tensors, in a directory that opens."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    state = {**small_state(), "a.weight": random_of(torch.float16, 3, 5)}
    write_shards(state, base, count, suffix)
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    loratool.unmerge(out, lora_dir, back)
    assert same(load(back), state)
    assert (back / "config.json").read_bytes() == (base / "config.json").read_bytes()
    if suffix == "safetensors":
        assert sha256s(back) == sha256s(base)
    else:
        assert len(list(back.glob("*.safetensors"))) == count
        assert not list(back.glob("*.bin*"))
        loratool.merge(back, lora_dir, tmp_path / "again", reversible=True)
        assert same(load(tmp_path / "again"), load(out))


def test_views_in_a_torch_file_come_back(tmp_path: Path, lora_dir: Path) -> None:
    """Transposed tensors and tensors that share their storage have the same values again."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    whole = random_of(torch.float32, 16, 8, seed=4)
    state = {ADAPTED: whole[:8].t(), OTHER: whole, "part": whole[3:9, 1:4], NORM: whole[:, 2]}
    torch.save(state, base / "pytorch_model.bin")
    for dtype in ("float16", "base"):
        out = tmp_path / f"out-{dtype}"
        loratool.merge(base, lora_dir, out, dtype=dtype, reversible=True)
        loratool.unmerge(out, lora_dir, tmp_path / f"back-{dtype}")
        wanted = {name: value.contiguous() for name, value in state.items()}
        assert same(load(tmp_path / f"back-{dtype}"), wanted)


def test_a_base_given_as_one_file_comes_back(tmp_path: Path, lora_dir: Path) -> None:
    """The file, under its own name, and the config beside it; its other neighbours are not its."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").rename(base / "weights.safetensors")
    (base / "notes.txt").write_text("not the model's")
    (base / "model-of-another.safetensors").write_bytes(b"")
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base / "weights.safetensors", lora_dir, out, reversible=True)
    loratool.unmerge(out, lora_dir, back)
    found = sha256s(back)
    assert found.keys() == {"weights.safetensors", "config.json"}
    assert found.items() <= sha256s(base).items()


def test_a_file_of_any_name_and_metadata_comes_back(tmp_path: Path, lora_dir: Path) -> None:
    """A header with other metadata, an odd order and padding of its own is kept as it is."""
    base = write_base(tmp_path / "base", small_state())
    path = base / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header = {"__metadata__": {"ünï": "cödé", "format": "pt"}, **dict(reversed(header.items()))}
    text = (json.dumps(header, indent=1) + " " * 13).encode()
    (base / "weights.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + content[end:]
    )
    path.unlink()
    comes_back(base, lora_dir, tmp_path)


def test_tensors_that_the_index_places_elsewhere_do_not_return(
    tmp_path: Path, lora_dir: Path
) -> None:
    """A stale copy in another shard is not the base's: each tensor comes back once, from where
    the index says."""
    state = small_state()
    stale = {ADAPTED: state[ADAPTED] + 1, NORM: state[NORM]}
    fresh = {ADAPTED: state[ADAPTED], OTHER: state[OTHER]}
    base = write_base(tmp_path / "base", stale, fresh)
    names = sorted(p.name for p in base.glob("*.safetensors"))
    write_index(base, {NORM: names[0], ADAPTED: names[1], OTHER: names[1]})
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    loratool.unmerge(out, lora_dir, back)
    assert load_file(back / names[0]).keys() == {NORM}
    assert same(load(back), state)
    found, wanted = sha256s(back), sha256s(base)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == [names[0]]


def test_tensors_that_the_index_does_not_know_return(tmp_path: Path, lora_dir: Path) -> None:
    """What lies in a shard but not in the index is part of the shard, and comes back in it."""
    state = small_state()
    base = write_base(tmp_path / "base", {ADAPTED: state[ADAPTED]}, {OTHER: state[OTHER]})
    write_index(base, {ADAPTED: "model-00001-of-00002.safetensors"} | {
        OTHER: "model-00002-of-00002.safetensors"})  # fmt: skip
    path = base / "model-00002-of-00002.safetensors"
    save_file({OTHER: state[OTHER], NORM: state[NORM]}, path, {"format": "pt"})
    comes_back(base, lora_dir, tmp_path)


def test_a_base_without_config_comes_back(tmp_path: Path, lora_dir: Path) -> None:
    """Weights alone, without any other file, are a base too."""
    base = write_base(tmp_path / "base", small_state())
    (base / "config.json").unlink()
    comes_back(base, lora_dir, tmp_path)


def test_the_adapter_may_be_a_file_or_a_torch_file(tmp_path: Path, lora_dir: Path) -> None:
    """An adapter is known by its content, whether directory or file is named."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "out", reversible=True)
    weights = lora_dir / "adapter_model.safetensors"
    loratool.unmerge(tmp_path / "out", weights, tmp_path / "back")
    assert sha256s(tmp_path / "back") == sha256s(base)
    torch.save(load_file(weights), lora_dir / "adapter_model.bin")
    weights.unlink()
    comes_back(base, lora_dir, tmp_path / "torch")
