"""The undo file, whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.digests import blake3_of
from helpers.files import load, raw_bytes
from helpers.unmerging import UNDO

from loratool.merging.undo.file import read_undo
from loratool.merging.undo.residual import decompress
from loratool.merging.undo.writer import UndoWriter
from loratool.storage.header import read_header


def test_the_undo_file_is_a_safetensors_file(merged: tuple[Path, Path, Path]) -> None:
    """The reference library opens it, and the table of the base names every tensor with its
    dtype, shape and digest."""
    import safetensors

    base, _, out = merged
    with safetensors.safe_open(out / UNDO, "np") as opened:
        kinds = {key.partition(":")[0] for key in opened.keys()}  # noqa: SIM118
        table = json.loads(decompress(opened.get_tensor("base").tobytes(), 1 << 20))
    assert kinds == {"residual", "whole", "header", "file", "base"}
    for name, tensor in load(base).items():
        row = table["tensors"][name]
        assert row["shape"] == list(tensor.shape)
        assert row["digest"] == blake3_of(raw_bytes(tensor))
        assert row["whole"] == (name == "z.weight")
    assert [s["file"] for s in table["shards"]] == sorted(p.name for p in base.glob("*.safe*s"))


def test_programs_that_load_the_model_do_not_see_the_undo_file(
    merged: tuple[Path, Path, Path],
) -> None:
    """Beside the weights lies no other safetensors file; the undo file is in a folder."""
    base, _, out = merged
    weights = sorted(p.name for p in out.glob("*.safetensors"))
    assert weights == sorted(p.name for p in base.glob("*.safetensors"))
    assert (out / UNDO).is_file()


def test_what_the_undo_file_says_is_checked_before_it_is_read(tmp_path: Path) -> None:
    """Entries may be empty or grow in pieces, and the writer's room for names is used or padded."""
    path = tmp_path / "undo.safetensors"
    writer = UndoWriter(path, [f"residual:{i}" for i in range(50)])
    writer.append("residual:3", b"")
    writer.append("residual:7", b"ab")
    writer.append("residual:7", b"cd")
    row = {"dtype": "F16", "shape": [9], "whole": False, "digest": blake3_of(b""), "gains": []}
    tensors = {"3": {**row, "step": 0, "sizes": []}, "7": {**row, "step": 9, "sizes": [4]}}
    shards = [{"file": "model.safetensors", "tensors": ["3", "7"]}]
    table: dict[str, Any] = {
        "tensors": tensors, "shards": shards, "side_files": {}, "files": {}, "headers": {},
    }  # fmt: skip
    assert writer.finish(table) == path.stat().st_size
    entries, _ = read_header(path)
    assert list(entries) == ["residual:7", "base"]
    assert entries["residual:7"].nbytes == 4
    assert read_undo(path).tensors.keys() == {"3", "7"}
