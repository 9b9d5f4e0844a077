"""Base models on disk: the index decides, and what is no whole model is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from files import (
    ADAPTED,
    CODES,
    LLAMA,
    NORM,
    OTHER,
    State,
    assert_clean,
    assert_clear,
    file_error,
    header_file,
    load,
    lora_on,
    raw_bytes,
    refused,
    same,
    sha256s,
    small_lora,
    small_state,
    write_base,
    write_index,
)
from safetensors.torch import save_file

import loratool
from loratool.errors import AdapterError, BaseError, FileError, LoraToolError, MatchError
from loratool.models.checkpoint import open_checkpoint
from loratool.storage.values import read_raw

NAMES = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def halves() -> tuple[State, State]:
    """A base in two shards."""
    state = small_state()
    return {ADAPTED: state[ADAPTED]}, {OTHER: state[OTHER], NORM: state[NORM]}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", *halves())


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "lora")


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


# --- what is read --------------------------------------------------------------------------------


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


def test_an_index_comes_before_a_single_file(two: Path) -> None:
    """Where index and model.safetensors are both there, the index decides, as in transformers."""
    save_file({"old": torch.zeros(1)}, two / "model.safetensors")
    assert holds(two, {**halves()[0], **halves()[1]})


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


# --- what is no whole model ----------------------------------------------------------------------


def test_a_missing_path_suggests_the_one_meant(tmp_path: Path, two: Path, lora: Path) -> None:
    """A mistyped path is answered with the neighbour that is most like it."""
    error = refused(FileError, tmp_path / "bsae", lora, tmp_path / "out", "bsae")
    assert str(two) in error.hint


def test_missing_shards_are_named(tmp_path: Path, two: Path, lora: Path) -> None:
    """An unfinished download names index and missing shard before anything is written."""
    (two / NAMES[1]).unlink()
    refused(FileError, two, lora, tmp_path / "out", "index.json", NAMES[1], "1 of 2")


def test_a_dangling_shard_is_missing(tmp_path: Path, two: Path, lora: Path) -> None:
    """A link whose blob was removed from the cache counts as missing."""
    (two / NAMES[1]).unlink()
    (two / NAMES[1]).symlink_to("../blobs/gone")
    refused(FileError, two, lora, tmp_path / "out", NAMES[1])


def test_a_damaged_shard_is_named(tmp_path: Path, two: Path, lora: Path) -> None:
    """A truncated shard names itself, not only the directory."""
    path = two / NAMES[1]
    path.write_bytes(path.read_bytes()[:-5])
    refused(FileError, two, lora, tmp_path / "out", str(path), "5 bytes missing")


OUTSIDE = [
    "../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "./model.safetensors", "..",
    ".", "", "a/../model.safetensors", 7, None, ["model.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_an_index_names_files_beside_itself_only(
    tmp_path: Path, two: Path, lora: Path, name: Any
) -> None:
    """An index cannot make loratool read files elsewhere, nor name what is no file."""
    save_file({OTHER: torch.ones(8, 8)}, tmp_path / "secret.safetensors")
    index = write_index(two, {ADAPTED: NAMES[0], OTHER: name})
    refused(FileError, two, lora, tmp_path / "out", str(index))


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "a\0b", "\ud800"], ids=ascii)
def test_an_impossible_file_name_is_refused(
    tmp_path: Path, two: Path, lora: Path, name: str
) -> None:
    """Names that no file can have are a FileError too, not an error of the system."""
    index = write_index(two, {ADAPTED: NAMES[0], OTHER: name})
    refused(FileError, two, lora, tmp_path / "out", str(index))


def test_a_tensor_that_is_not_in_its_shard_is_named(tmp_path: Path, two: Path, lora: Path) -> None:
    """Index and shards of different models are refused with tensor and shard."""
    weight_map = {ADAPTED: NAMES[0], OTHER: NAMES[1], NORM: NAMES[1], "gone.weight": NAMES[0]}
    index = write_index(two, weight_map)
    refused(FileError, two, lora, tmp_path / "out", str(index), "gone.weight", NAMES[0])


def test_a_tensor_in_another_shard_than_the_index_says_is_named(
    tmp_path: Path, two: Path, lora: Path
) -> None:
    """A tensor is not looked for where the index does not put it."""
    write_index(two, {ADAPTED: NAMES[0], OTHER: NAMES[0], NORM: NAMES[1]})
    refused(FileError, two, lora, tmp_path / "out", OTHER, NAMES[0])


def test_an_unlisted_tensor_in_two_shards_is_named(tmp_path: Path, two: Path, lora: Path) -> None:
    """Of two unlisted tensors with one name neither is chosen in silence."""
    first, second = halves()
    save_file({**first, "extra": torch.ones(1)}, two / NAMES[0])
    save_file({**second, "extra": torch.zeros(1)}, two / NAMES[1])
    refused(FileError, two, lora, tmp_path / "out", "'extra'")


def test_shards_whose_outputs_would_have_one_name_are_not_mixed_up(
    tmp_path: Path, two: Path, lora: Path
) -> None:
    """pytorch_model.bin and model.safetensors in one index: refused, or no tensor lost."""
    first, second = halves()
    torch.save(first, two / "pytorch_model.bin")
    save_file(second, two / "model.safetensors")
    places = dict.fromkeys(first, "pytorch_model.bin")
    write_index(two, {**places, **dict.fromkeys(second, "model.safetensors")})
    try:
        loratool.merge(two, lora, tmp_path / "out", dtype="base")
    except LoraToolError:
        return
    assert load(tmp_path / "out").keys() == first.keys() | second.keys()


INDEXES = {
    "invalid-json": '{"weight_map": {',
    "list": "[]",
    "no-weight-map": '{"metadata": {}}',
    "empty-weight-map": '{"weight_map": {}}',
    "weight-map-is-a-list": '{"weight_map": ["model.safetensors"]}',
    "empty": "",
    "html": "<!doctype html>",
    "deep": "[" * 100_000,
    "not-utf8": b'{"weight_map": {"\xff": "x"}}',
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_broken_index_is_refused(tmp_path: Path, two: Path, lora: Path, case: str) -> None:
    """Whatever is wrong with the index, the error names it."""
    content = INDEXES[case]
    index = two / "model.safetensors.index.json"
    index.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(FileError, two, lora, tmp_path / "out", str(index))


CONFIGS = ["{", "[]", "null", "", '"llama"', "[" * 100_000]


@pytest.mark.parametrize("content", CONFIGS, ids=lambda c: c[:9])
def test_a_broken_config_is_refused(tmp_path: Path, two: Path, lora: Path, content: str) -> None:
    """A damaged config.json is named, for it decides about orientation and tying."""
    (two / "config.json").write_text(content)
    refused(FileError, two, lora, tmp_path / "out", "config.json")


def test_several_files_without_an_index_are_refused(tmp_path: Path, two: Path, lora: Path) -> None:
    """Which of several files belong together is not guessed."""
    (two / "model.safetensors.index.json").unlink()
    refused(FileError, two, lora, tmp_path / "out", str(two), "2 safetensors files", "index.json")


def test_a_directory_without_weights_is_refused(tmp_path: Path, lora: Path) -> None:
    """A directory of side files alone names what is missing."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    refused(FileError, folder, lora, tmp_path / "out", str(folder), "no model weights")


def test_a_base_without_tensors_is_refused(tmp_path: Path, lora: Path) -> None:
    """An empty but well-formed file is no model."""
    base = write_base(tmp_path / "base", {})
    refused(BaseError, base, lora, tmp_path / "out", "no tensors")


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), 5], ids=["list", "tensor", "5"])
def test_a_torch_file_without_names_is_no_base(tmp_path: Path, lora: Path, value: Any) -> None:
    """A torch file that is no table of named tensors is refused."""
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").unlink()
    torch.save(value, base / "pytorch_model.bin")
    refused(BaseError, base, lora, tmp_path / "out", "pytorch_model.bin")


def test_a_dangling_link_among_the_side_files_is_survived_or_named(
    tmp_path: Path, two: Path, lora: Path
) -> None:
    """A tokenizer file whose blob is gone is left out or named, never a traceback."""
    (two / "tokenizer.json").symlink_to("../../blobs/gone")
    try:
        loratool.merge(two, lora, tmp_path / "out")
    except LoraToolError as error:
        assert_clear(error, "tokenizer.json")
        assert_clean(tmp_path / "out")
    else:
        assert not (tmp_path / "out" / "tokenizer.json").exists()


# --- the wrong thing in the base's place ---------------------------------------------------------


def test_an_adapter_as_base_is_named(tmp_path: Path, lora: Path) -> None:
    """An adapter directory in the base's place is called what it is."""
    error = refused(BaseError, lora, lora, tmp_path / "out", str(lora), "adapter")
    assert "BASE ADAPTER" in error.hint


def test_an_adapter_file_as_base_is_refused(tmp_path: Path, lora: Path) -> None:
    """An adapter's weights file in the base's place is refused as not a base."""
    path = lora / "adapter_model.safetensors"
    error = refused(BaseError, path, lora, tmp_path / "out", str(path), "adapter")
    assert "BASE ADAPTER" in error.hint


@pytest.mark.parametrize("shards", [1, 2])
def test_swapped_arguments_are_named(tmp_path: Path, lora: Path, shards: int) -> None:
    """merge ADAPTER BASE says that the base comes first."""
    base = write_base(tmp_path / "base", *(halves() if shards == 2 else [small_state()]))
    error = refused(BaseError, lora, base, tmp_path / "out", "adapter")
    assert "BASE ADAPTER" in error.hint


@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_in_the_adapter_s_place_is_refused(tmp_path: Path, two: Path, shards: int) -> None:
    """merge BASE BASE says that the second is no adapter."""
    other = write_base(tmp_path / "other", *(halves() if shards == 2 else [small_state()]))
    kind = AdapterError if shards == 1 else FileError
    refused(kind, two, other, tmp_path / "out", str(other))


def test_an_adapter_for_another_model_is_refused(tmp_path: Path, two: Path) -> None:
    """An adapter none of whose modules fit names the one it could not place."""
    lora = lora_on(tmp_path / "lora", np.ones((9, 1)), np.ones((1, 8)))
    refused(MatchError, two, lora, tmp_path / "out", "q_proj", "[9, 8]", "[8, 8]")


QUANTISED_CONFIGS = {
    "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "no-method": {"quantization_config": {"bits": 4}},
    "in-text-config": {"text_config": {"quantization_config": {"quant_method": "awq"}}},
    "in-second-config": {
        "vision_config": {"quantization_config": None},
        "text_config": {"quantization_config": {"quant_method": "awq"}},
    },
}


@pytest.mark.parametrize("case", QUANTISED_CONFIGS)
def test_a_quantised_config_is_refused(tmp_path: Path, lora: Path, case: str) -> None:
    """A config that says the weights are quantised is enough."""
    base = write_base(tmp_path / "base", small_state(), config=QUANTISED_CONFIGS[case])
    error = refused(BaseError, base, lora, tmp_path / "out", str(base), "quantised")
    assert "unquantised base" in error.hint


PACKED: dict[str, State] = {
    "gptq": {"x.q_proj.qweight": torch.ones(4, dtype=torch.int32)},
    "gptq-zeros": {"x.q_proj.qzeros": torch.ones(4, dtype=torch.int32)},
    "bitsandbytes-8bit": {"x.q_proj.SCB": torch.ones(4)},
    "bitsandbytes-4bit": {"x.q_proj.weight.quant_state.bitsandbytes__nf4": torch.ones(4)},
    "bitsandbytes-absmax": {"x.q_proj.weight.absmax": torch.ones(4)},
    "int8-weight": {"x.q_proj.weight": torch.ones(4, 4, dtype=torch.int8)},
    "packed-4bit": {"x.q_proj.weight": torch.ones(8, 1, dtype=torch.uint8)},
    "fp8-weight": {"x.q_proj.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)},
    "fp8-scale": {"x.q_proj.weight_scale": torch.ones(1)},
    "fp8-scale-inv": {"x.q_proj.weight_scale_inv": torch.ones(1)},
    "mxfp4": {"x.mlp.experts.gate_up_proj_blocks": torch.ones(4, dtype=torch.uint8)},
    "compressed-tensors": {"x.q_proj.weight_packed": torch.ones(4, dtype=torch.int32)},
}


@pytest.mark.parametrize("case", PACKED)
def test_quantised_tensors_are_refused(tmp_path: Path, lora: Path, case: str) -> None:
    """Packed weights are recognised by themselves, where no config says so."""
    base = write_base(tmp_path / "base", {**small_state(), **PACKED[case]})
    refused(BaseError, base, lora, tmp_path / "out", "quantised", next(iter(PACKED[case])))


def test_a_bare_quantization_entry_of_none_is_no_quantisation(tmp_path: Path, lora: Path) -> None:
    """`quantization_config: null`, which some tools write, does not stop a merge."""
    base = write_base(tmp_path / "base", small_state(), config={"quantization_config": None})
    loratool.merge(base, lora, tmp_path / "out")


def test_integer_buffers_are_no_quantisation(tmp_path: Path, lora: Path) -> None:
    """position_ids, counters and masks beside float weights do not stop a merge."""
    extra = {
        "embeddings.position_ids": torch.arange(9)[None],
        "bn.num_batches_tracked": torch.tensor(5),
        "attn.mask": torch.ones(3, dtype=torch.bool),
    }
    base = write_base(tmp_path / "base", {**small_state(), **extra})
    loratool.merge(base, lora, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert same({n: merged[n] for n in extra}, extra)


# --- small things --------------------------------------------------------------------------------


def test_a_header_error_reaches_the_caller_unchanged(tmp_path: Path) -> None:
    """open_checkpoint and merge report a broken single file the same way."""
    path = header_file(tmp_path / "model.safetensors", {"w": 5})
    file_error(open_checkpoint, path, "'w'")


def test_the_base_s_name_is_that_of_its_directory(two: Path) -> None:
    """Provenance calls a base by its directory, whatever path led there."""
    assert open_checkpoint(two / ".." / "base").name == "base"
    assert open_checkpoint(two).identity() == open_checkpoint(two / ".." / "base").identity()


def test_adapter_helpers_agree(tmp_path: Path) -> None:
    """The small adapter of these tests adds exactly B·A."""
    b, a = np.array([[2.0]] + [[0.0]] * 7), np.arange(8.0)[None]
    lora = lora_on(tmp_path / "lora", b, a)
    base = write_base(tmp_path / "base", {**small_state(), ADAPTED: torch.zeros(8, 8)})
    loratool.merge(base, lora, tmp_path / "out", dtype="float32")
    wanted = torch.zeros(8, 8)
    wanted[0] = 2 * torch.arange(8.0)
    assert torch.equal(load(tmp_path / "out")[ADAPTED], wanted)
