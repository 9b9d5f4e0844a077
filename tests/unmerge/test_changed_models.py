"""A merged model or a record that has changed gives the base or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import ADAPTED, NORM, OTHER, load, small_state, write_base
from helpers.layer_cases import write_shards
from helpers.models import read_json, write_json
from helpers.outcomes import assert_clean, assert_clear
from helpers.unmerging import no_unmerge, right_or_refused
from safetensors.torch import save_file

import loratool
from loratool.errors import FileError, LoraToolError, RestoreError
from loratool.storage.header import read_header


@pytest.mark.parametrize("dtype", ["float16", "base"])
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER, NORM])
def test_one_flipped_bit_in_the_merged_model_is_noticed(
    tensor: str, dtype: str, tmp_path: Path, lora_dir: Path
) -> None:
    """In an adapted tensor, a cast one or a copied one: the hash of the base does not come
    out, the tensor is named, and nothing is written."""
    base = write_base(tmp_path / "base", small_state(dtype=torch.bfloat16))
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, dtype=dtype, reversible=True)
    path = out / "model.safetensors"
    content = path.read_bytes()
    info = read_header(path)[0][tensor]
    for place in (info.start + 1, info.start + info.nbytes - 1):
        for bit in (6, 7):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            no_unmerge(RestoreError, out, lora_dir, tmp_path / "back", tensor, "blake3")
    path.write_bytes(content)
    assert right_or_refused(out, lora_dir, tmp_path / "back", base)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_flipped_bit_gives_the_base_or_an_error(
    dtype: str, tmp_path: Path, lora_dir: Path
) -> None:
    """Wherever the merged weights are damaged, there is no wrong base."""
    base = write_base(tmp_path / "base", small_state())
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, dtype=dtype, reversible=True)
    path = out / "model.safetensors"
    content = path.read_bytes()
    for place in range(3, len(content), 17):
        path.write_bytes(
            content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :]
        )
        right_or_refused(out, lora_dir, tmp_path / "back", base)
    path.write_bytes(content[:-5])
    assert not right_or_refused(out, lora_dir, tmp_path / "back", base)


def test_a_merged_model_saved_in_another_dtype_is_refused(tmp_path: Path, lora_dir: Path) -> None:
    """The undo file fits what the merge wrote; a copy in another dtype, or with other shapes or
    missing tensors, is refused before anything is computed."""
    base = write_base(tmp_path / "base", small_state())
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    path = out / "model.safetensors"
    state = load(out)
    save_file({name: value.bfloat16() for name, value in state.items()}, path)
    no_unmerge(RestoreError, out, lora_dir, back, ADAPTED, "BF16", "F16")
    save_file({**state, OTHER: state[OTHER].reshape(4, 16)}, path)
    no_unmerge(RestoreError, out, lora_dir, back, OTHER, "[4, 16]")
    save_file({ADAPTED: state[ADAPTED], OTHER: state[OTHER]}, path)
    no_unmerge(RestoreError, out, lora_dir, back, f"{NORM} is missing")


def test_a_merged_model_saved_in_other_shards_is_fine(tmp_path: Path, lora_dir: Path) -> None:
    """The same tensors in other files give the base back as it was, and tensors that were added
    since do not matter."""
    base = write_base(tmp_path / "base", small_state())
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, reversible=True)
    state = {**load(out), "more.weight": torch.ones(3)}
    (out / "model.safetensors").unlink()
    write_shards(state, out, 2, "safetensors")
    assert right_or_refused(out, lora_dir, tmp_path / "back", base)


Record = dict[str, Any]

#: What may have happened to loratool.json.
RECORDS: dict[str, Callable[[Record], Any]] = {
    "a-list": lambda r: [r],
    "empty": lambda r: {},
    "no-options": lambda r: r.pop("options") and None,
    "options-are-empty": lambda r: r.update(options={}),
    "options-are-a-list": lambda r: r.update(options=[]),
    "no-dtype": lambda r: r["options"].pop("dtype") and None,
    "unknown-dtype": lambda r: r["options"].update(dtype="float12"),
    "dtype-is-null": lambda r: r["options"].update(dtype=None),
    "dtype-is-a-list": lambda r: r["options"].update(dtype=["float16"]),
    "other-dtype": lambda r: r["options"].update(dtype="bfloat16"),
    "no-allow-unmatched": lambda r: r["options"].pop("allow_unmatched") or r,
    "no-base": lambda r: r.pop("base") and None,
    "base-is-a-list": lambda r: r.update(base=[]),
    "base-is-null": lambda r: r.update(base=None),
    "base-dtypes-are-a-number": lambda r: r["base"].update(dtypes=3),
    "base-dtypes-of-lists": lambda r: r["base"].update(dtypes=[["F32"]]),
    "base-adapters-are-text": lambda r: r["base"].update(adapters="none"),
    "no-result": lambda r: r.pop("result") and None,
    "result-is-a-list": lambda r: r.update(result=[]),
    "result-tensors-are-a-list": lambda r: r["result"].update(tensors=[]),
    "result-adds-text": lambda r: r["result"]["tensors"].update(add="none"),
    "no-adapters": lambda r: r.update(adapters=[]),
    "adapters-are-a-table": lambda r: r.update(adapters={}),
    "adapter-is-text": lambda r: r.update(adapters=["lora"]),
    "adapter-without-files": lambda r: r["adapters"][0].pop("files") and None,
    "adapter-of-no-file": lambda r: r["adapters"][0].update(files={}),
    "adapter-files-are-text": lambda r: r["adapters"][0].update(files="abc"),
    "adapter-without-weight": lambda r: r["adapters"][0].pop("weight") and None,
    "weight-is-text": lambda r: r["adapters"][0].update(weight="one"),
    "weight-is-nan": lambda r: r["adapters"][0].update(weight=float("nan")),
    "weight-is-infinite": lambda r: r["adapters"][0].update(weight=float("inf")),
    "weight-is-another": lambda r: r["adapters"][0].update(weight=1.5),
    "weight-is-enormous": lambda r: r["adapters"][0].update(weight=1e308),
}


@pytest.mark.parametrize("subtract", [False, True], ids=["undo", "subtract"])
@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_is_refused_or_harmless(
    name: str, subtract: bool, tmp_path: Path, lora_dir: Path
) -> None:
    """Whatever stands in loratool.json, there is no traceback, and no wrong base."""
    base = write_base(tmp_path / "base", small_state())
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    record = read_json(out / "loratool.json")
    changed = RECORDS[name](record)
    write_json(out / "loratool.json", record if changed is None else changed)
    if not subtract:
        right_or_refused(out, lora_dir, back, base)
        return
    try:
        loratool.unmerge(out, lora_dir, back, subtract=True)
    except LoraToolError as error:
        assert_clear(error)
        assert_clean(back)
    else:
        assert all(bool(torch.isfinite(t).all()) for t in load(back).values())


@pytest.mark.parametrize("text", ["", "{", "null", "\x00", '{"adapters": ' + "[" * 9000])
def test_a_record_that_is_no_json_is_refused(text: str, tmp_path: Path, lora_dir: Path) -> None:
    """A truncated or overwritten loratool.json is named."""
    base = write_base(tmp_path / "base", small_state())
    out = tmp_path / "out"
    loratool.merge(base, lora_dir, out, reversible=True)
    (out / "loratool.json").write_text(text)
    no_unmerge(FileError, out, lora_dir, tmp_path / "back", "loratool.json")


def test_what_holds_no_adapter_is_refused(tmp_path: Path, lora_dir: Path) -> None:
    """What was unmerged by subtraction is not unmerged once more."""
    base = write_base(tmp_path / "base", small_state())
    loratool.merge(base, lora_dir, tmp_path / "out")
    loratool.unmerge(tmp_path / "out", lora_dir, tmp_path / "back")
    no_unmerge(RestoreError, tmp_path / "back", lora_dir, tmp_path / "no", "no adapter is merged")
