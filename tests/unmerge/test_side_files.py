"""Files beside the weights come back, and changed ones are said."""

from __future__ import annotations

from pathlib import Path

from helpers.files import small_lora, small_state, write_base
from helpers.outcomes import sha256s
from helpers.unmerging import codes, comes_back

import loratool


def with_side_files(folder: Path) -> tuple[Path, Path]:
    """A base with files of all kinds beside its weights, and an adapter with a tokenizer."""
    base = write_base(folder / "base", small_state())
    (base / "config.json").write_text('{"model_type":"llama",   "note": "ö", "torch_dtype": null}')
    (base / "tokenizer.json").write_text('{"of": "base"}')
    (base / "merges.txt").write_bytes(b"a b\r\n")
    (base / "notes.txt").write_bytes(b"notes\r\n")
    (base / "generation_config.json").write_text("{}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("[]")
    lora_dir = small_lora(folder / "lora")
    (lora_dir / "tokenizer.json").write_text('{"of": "adapter"}')
    (lora_dir / "added_tokens.json").write_text("{}")
    return base, lora_dir


def test_files_beside_the_weights_come_back(tmp_path: Path) -> None:
    """The config as it was to the byte, the base's own tokenizer, no file of the adapter's."""
    base, lora_dir = with_side_files(tmp_path)
    report = comes_back(base, lora_dir, tmp_path)
    assert (tmp_path / "out" / "added_tokens.json").is_file()
    assert "side-file-changed" not in codes(report)
    assert set(report.side_files) == {
        "config.json", "tokenizer.json", "merges.txt", "notes.txt", "generation_config.json",
        str(Path("1_Pooling") / "config.json"),
    }  # fmt: skip


def test_a_side_file_changed_after_the_merge_is_kept_and_said(tmp_path: Path) -> None:
    """Files that the undo file does not hold come from the merged model, as they are now; those
    it holds are the base's whatever happened."""
    base, lora_dir = with_side_files(tmp_path)
    out, back = tmp_path / "out", tmp_path / "back"
    loratool.merge(base, lora_dir, out, reversible=True)
    for name in ("generation_config.json", "tokenizer.json", "config.json"):
        (out / name).write_text('{"changed": true}')
    (out / "notes.txt").unlink()
    (out / "new.txt").write_text("new")
    report = loratool.unmerge(out, lora_dir, back)
    (notice,) = [n for n in report.warnings if n.code == "side-file-changed"]
    assert "generation_config.json (changed)" in notice.message
    assert "notes.txt (missing)" in notice.message
    assert "tokenizer" not in notice.message
    found, wanted = sha256s(back), sha256s(base)
    assert wanted.keys() - found.keys() == {"notes.txt"}
    assert [n for n in found if found[n] != wanted[n]] == ["generation_config.json"]
    assert (back / "generation_config.json").read_text() == '{"changed": true}'
