"""Which files of a folder are the model: those that transformers loads, in every format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.bases import NAMES, halves
from helpers.files import (
    ADAPTED,
    CODES,
    OTHER,
    State,
    load,
    raw_bytes,
    same,
    small_lora,
    small_state,
    write_base,
    write_index,
)
from helpers.outcomes import sha256s
from helpers.places import FIXTURES
from safetensors.torch import save_file

import loratool
from loratool.errors import FileError
from loratool.models.checkpoint import open_checkpoint
from loratool.storage.filenames import INDEX
from loratool.storage.values import read_raw


def holds(folder: Path, state: State) -> bool:
    """True if open_checkpoint finds exactly these tensors, with these bytes."""
    found = open_checkpoint(folder).tensors
    return found.keys() == state.keys() and all(
        (found[n].dtype, found[n].shape) == (CODES[t.dtype], t.shape)
        and read_raw(found[n]).tobytes() == raw_bytes(t)
        for n, t in state.items()
    )


def merged_like(base: Path, lora: Path, output: Path, state: State) -> bool:
    """True if the merge of `base` equals that of one file holding `state`."""
    plain = write_base(output.parent / "plain", state)
    loratool.merge(plain, lora, output.parent / "plain-merged", dtype="base")
    loratool.merge(base, lora, output, dtype="base")
    return same(load(output), load(output.parent / "plain-merged"))


def test_the_trained_fixture_opens() -> None:
    """A base that transformers wrote, three shards and their index, is read whole."""
    found = open_checkpoint(FIXTURES / "base")
    assert (found.parameters, found.nbytes) == (754_816, 1_509_632)
    assert len(found.shards) == 3
    assert found.model_type == "llama"
    assert {t.dtype for t in found.tensors.values()} == {"BF16"}
    assert found.notes == []


@pytest.mark.parametrize(
    "names",
    [
        ["model-00001-of-00004.safetensors", "model-00003-of-00004.safetensors"],
        ["weights.safetensors", "more_weights.safetensors"],
        ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"],
        ["model.00.safetensors", "модель.safetensors"],
    ],
    ids=["of-four-but-two", "other-names", "swapped-numbers", "other-scripts"],
)
def test_the_index_decides_not_the_names(tmp_path: Path, lora: Path, names: list[str]) -> None:
    """Shards may have any names and any count in them; the output keeps them."""
    base = write_base(tmp_path / "base", *halves(), names=names)
    state = {**halves()[0], **halves()[1]}
    assert holds(base, state)
    assert merged_like(base, lora, tmp_path / "out", state)
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == set(names)


def test_files_that_the_index_does_not_name_are_left_alone(two: Path) -> None:
    """A stray weights file beside the shards, whatever is in it, is not part of the model."""
    save_file({OTHER: torch.zeros(8, 8), "stray": torch.zeros(1)}, two / "stray.safetensors")
    (two / "model-00003-of-00003.safetensors").write_bytes(b"broken")
    assert holds(two, {**halves()[0], **halves()[1]})


def test_a_single_file_comes_before_an_index(two: Path) -> None:
    """Where index and model.safetensors are both there, the file is read, as by transformers, and
    that the shards hold something else is said."""
    save_file(small_state(seed=7), two / "model.safetensors")
    assert holds(two, small_state(seed=7))
    (note,) = open_checkpoint(two).notes
    assert "model.safetensors was taken" in note
    assert INDEX in note


def test_a_second_copy_of_the_same_weights_is_not_worth_a_word(two: Path) -> None:
    """One file, shards and a torch file of the same values: nobody need choose."""
    state = {**halves()[0], **halves()[1]}
    save_file(state, two / "model.safetensors")
    torch.save(state, two / "pytorch_model.bin")
    assert open_checkpoint(two).notes == []


def test_what_conversions_drop_is_no_difference(tmp_path: Path) -> None:
    """A .bin with the tied head once more, frequency tables and masks is the same model."""
    state = small_state()
    base = write_base(tmp_path / "base", state)
    more = {
        "lm_head.weight": state[OTHER].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4),
    }
    torch.save({**state, **more}, base / "pytorch_model.bin")
    assert open_checkpoint(base).notes == []


def test_an_index_that_forgets_a_shard_is_refused(two: Path) -> None:
    """The shard's own name says that it belongs to the set; a part of a model is not written."""
    write_index(two, dict.fromkeys(halves()[0], NAMES[0]))
    with pytest.raises(FileError, match="does not list 1 shard") as caught:
        open_checkpoint(two)
    assert NAMES[1] in caught.value.message


def test_an_index_of_two_sets_is_refused(two: Path) -> None:
    """Shards that count themselves differently are of two saves."""
    other = NAMES[1].replace("00002.s", "00003.s")
    (two / NAMES[1]).rename(two / other)
    first, second = halves()
    write_index(two, {**dict.fromkeys(first, NAMES[0]), **dict.fromkeys(second, other)})
    with pytest.raises(FileError, match="sets of 00002 and of 00003"):
        open_checkpoint(two)


@pytest.mark.parametrize("change", ["value", "dtype", "fewer", "more"])
def test_a_torch_file_that_differs_is_said(tmp_path: Path, change: str) -> None:
    """safetensors come before .bin; a .bin of other values, dtypes or tensors is named."""
    state = small_state()
    base = write_base(tmp_path / "base", state)
    if change == "value":
        state[OTHER] = state[OTHER] + 1
    elif change == "dtype":
        state[OTHER] = state[OTHER].half()
    elif change == "fewer":
        del state[OTHER]
    else:
        state["more.weight"] = torch.ones(1)
    torch.save(state, base / "pytorch_model.bin")
    (note,) = open_checkpoint(base).notes
    assert "pytorch_model.bin" in note
    assert ("more.weight" if change == "more" else OTHER) in note


def test_an_index_whose_shards_are_gone_is_not_worth_a_word(two: Path) -> None:
    """What an older save left of itself, an index without shards, is nothing to load."""
    save_file(small_state(), two / "model.safetensors")
    for name in NAMES:
        (two / name).unlink()
    assert open_checkpoint(two).notes == []


def test_a_single_file_that_is_a_shard_is_refused(two: Path) -> None:
    """transformers would load model.safetensors alone, though the index says it is a part."""
    (two / NAMES[0]).rename(two / "model.safetensors")
    first, second = halves()
    places = dict.fromkeys(first, "model.safetensors")
    write_index(two, {**places, **dict.fromkeys(second, NAMES[1])})
    with pytest.raises(FileError, match="one of 2 shards"):
        open_checkpoint(two)


def test_one_shard_of_several_is_a_part(two: Path) -> None:
    """A shard that is named alone, or lies there alone, is not taken for a model."""
    with pytest.raises(FileError, match="shard 1 of 2"):
        open_checkpoint(two / NAMES[0])
    (two / INDEX).unlink()
    (two / NAMES[0]).unlink()
    with pytest.raises(FileError, match="shard 2 of 2"):
        open_checkpoint(two)


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    """Where a model is there in both formats, the safe one is read."""
    base = write_base(tmp_path / "base", small_state())
    (base / "pytorch_model.bin").write_bytes(b"broken")
    assert holds(base, small_state())


def test_a_copy_in_a_shard_the_index_does_not_name_is_not_read(two: Path) -> None:
    """Of a tensor in two shards, the one in the shard that the index names counts."""
    first, second = halves()
    save_file({**first, OTHER: torch.zeros(8, 8)}, two / NAMES[0])
    assert holds(two, {**first, **second})


def test_unlisted_tensors_are_kept_and_noted(tmp_path: Path, two: Path, lora: Path) -> None:
    """A tensor that the index forgot is carried over, listed in the new index, and mentioned."""
    first, second = halves()
    save_file({**first, "extra.weight": torch.ones(3)}, two / NAMES[0])
    assert holds(two, {**first, **second, "extra.weight": torch.ones(3)})
    output = tmp_path / "out"
    report = loratool.merge(two, lora, output, dtype="base")
    assert torch.equal(load(output)["extra.weight"], torch.ones(3))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["extra.weight"] == NAMES[0]
    notes = [w.message for w in report.warnings if w.code == "base-note"]
    assert len(notes) == 1
    assert NAMES[0] in notes[0]


def test_one_file_of_any_name_is_a_base(tmp_path: Path, lora: Path) -> None:
    """A directory with one oddly named safetensors file, and that file itself, are read."""
    base = write_base(tmp_path / "base", small_state())
    path = (base / "model.safetensors").rename(base / "llama-f32.safetensors")
    for source in (base, path):
        assert holds(source, small_state())
    assert merged_like(path, lora, tmp_path / "out", small_state())
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("shards", [1, 2])
def test_torch_files_merge_like_safetensors(
    tmp_path: Path, lora: Path, shards: int, zipped: bool
) -> None:
    """A base in pytorch_model.bin files gives the same tensors, in safetensors files."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    parts = halves() if shards == 2 else [small_state()]
    names = [f"pytorch_model-{i + 1:05d}-of-00002.bin" for i in range(2)]
    names = names if shards == 2 else ["pytorch_model.bin"]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, base / name, _use_new_zipfile_serialization=zipped)
    if shards == 2:
        write_index(base, {t: n for n, part in zip(names, parts, strict=True) for t in part})
        (base / "model.safetensors.index.json").rename(base / "pytorch_model.bin.index.json")
    assert merged_like(base, lora, tmp_path / "out", small_state())
    wanted = set(NAMES) if shards == 2 else {"model.safetensors"}
    assert {p.name for p in (tmp_path / "out").glob("*.safetensors")} == wanted
    assert not list((tmp_path / "out").glob("*.bin*"))


def test_torch_files_with_views_merge_like_safetensors(tmp_path: Path, lora: Path) -> None:
    """Transposed and shared tensors of a torch base come out in row-major order."""
    state = {**small_state(), OTHER: small_state()[ADAPTED].T, ADAPTED: small_state()[OTHER].T}
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    torch.save(state, base / "pytorch_model.bin")
    plain = {name: value.contiguous() for name, value in state.items()}
    assert merged_like(base, lora, tmp_path / "out", plain)


def as_in_the_hub_cache(folder: Path, cache: Path) -> Path:
    """Move the files of `folder` to cache/blobs and link them from cache/snapshots/abc."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = f"{number:040x}"
        shutil.move(path, blobs / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    return snapshot


def test_links_as_in_the_hub_cache_work(tmp_path: Path) -> None:
    """Base and adapter of links to ../../blobs give the same bytes, as files of their own."""
    plain = write_base(tmp_path / "plain", *halves())
    plain_lora = small_lora(tmp_path / "plain-lora")
    (plain / "tokenizer.json").write_text("{}")
    loratool.merge(plain, plain_lora, tmp_path / "out-plain")
    base = as_in_the_hub_cache(plain, tmp_path / "models--b")
    lora = as_in_the_hub_cache(plain_lora, tmp_path / "models--l")
    before = sha256s(tmp_path / "models--b")
    loratool.merge(base, lora, tmp_path / "out")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_symlink()]
    one, other = sha256s(tmp_path / "out"), sha256s(tmp_path / "out-plain")
    for files in (one, other):
        files.pop("loratool.json")  # it holds the directory's name
    assert one == other
    assert sha256s(tmp_path / "models--b") == before


def test_the_base_s_name_is_that_of_its_directory(two: Path) -> None:
    """Provenance calls a base by its directory, whatever path led there."""
    assert open_checkpoint(two / ".." / "base").name == "base"
    assert open_checkpoint(two).identity() == open_checkpoint(two / ".." / "base").identity()
