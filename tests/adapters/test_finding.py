"""Which adapter a folder stands for: its own, the only one below, or none without being asked."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import codes, lora, write_adapter
from helpers.cli import run_cli
from helpers.files import small_lora, small_state, write_base
from helpers.outcomes import assert_clear
from helpers.places import FIXTURES
from safetensors.numpy import save_file

import loratool
from loratool.errors import FileError

MODEL = {"model.embed_tokens.weight": np.ones((4, 4), np.float32),
         "model.norm.weight": np.ones(4, np.float32)}  # fmt: skip


def _refused(folder: Path, *parts: str) -> str:
    """The hint of the one clear error that inspecting a folder is, whose message has `parts`."""
    with pytest.raises(FileError) as caught:
        loratool.inspect(folder)
    assert_clear(caught.value, *parts)
    return caught.value.hint


@pytest.mark.parametrize("inner", ["checkpoint-500", "default", "out/run-1/checkpoint-7"])
def test_the_only_adapter_below_is_taken_and_that_is_said(inner: str, tmp_path: Path) -> None:
    """One notice names the folder of the adapter that was taken, however deep it lies."""
    lora(tmp_path / inner)
    (tmp_path / "README.md").write_text("x")
    report = loratool.inspect(tmp_path)
    assert codes(report) == ["adapter-below"]
    assert f"{inner} holds the only adapter" in report.warnings[0].message
    assert len(report.modules) == 1


def test_of_several_checkpoints_the_error_names_all_by_number(tmp_path: Path) -> None:
    """Candidates are sorted by their numbers, and the hint has the command for the last one."""
    for number in (1000, 200, 30):
        lora(tmp_path / f"checkpoint-{number}")
        torch.save({"state": {0: {"exp_avg": torch.ones(2)}}},
                   tmp_path / f"checkpoint-{number}" / "optimizer.pt")  # fmt: skip
    save_file(MODEL, tmp_path / "model.safetensors")
    listed = "\n  - checkpoint-30\n  - checkpoint-200\n  - checkpoint-1000"
    hint = _refused(tmp_path, f"3 adapters could be meant:{listed}")
    assert hint.endswith(f"The last: {tmp_path / 'checkpoint-1000'}")
    report = loratool.inspect(hint.rpartition(" ")[2])
    assert codes(report) == []
    call = ["merge", str(FIXTURES / "base"), str(tmp_path), "-o", "out", "--weight", "0.5"]
    said = run_cli(*call).stderr.splitlines()[-1]
    call[2] = str(tmp_path / "checkpoint-1000")
    assert said == f"hint: Name one of them. The last: {shlex.join(['loratool', *call])}"


def test_of_adapters_without_an_order_none_is_the_last(tmp_path: Path) -> None:
    """Where they are no numbered checkpoints the hint does not call one of them the last."""
    for name in ("task", "style"):
        lora(tmp_path / name)
    hint = _refused(tmp_path, "2 adapters could be meant:")
    assert hint == f"Name one of them, for instance: {tmp_path / 'style'}"


def test_files_that_are_no_adapters_are_no_candidates(tmp_path: Path) -> None:
    """Of a model, an optimizer's state and two adapters side by side only the adapters count."""
    for name in ("epoch2", "epoch10"):
        made = lora(tmp_path / "made" / name) / "adapter_model.safetensors"
        made.rename(tmp_path / f"{name}.safetensors")
    save_file(MODEL, tmp_path / "tuned.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.ones(2)}}}, tmp_path / "state.pt")
    hint = _refused(tmp_path, "2 adapters could be meant:\n  - epoch2.safetensors\n  - epoch10.s")
    assert hint.endswith("epoch10.safetensors")
    (tmp_path / "epoch2.safetensors").unlink()
    assert len(loratool.inspect(tmp_path).modules) == 1


def test_an_adapter_beside_a_whole_model_is_taken(tmp_path: Path) -> None:
    """Where one checkpoint is an adapter and another a model, the adapter is what is meant."""
    lora(tmp_path / "checkpoint-20")
    write_base(tmp_path / "checkpoint-30", small_state())
    assert codes(loratool.inspect(tmp_path)) == ["adapter-below"]


def test_its_own_adapter_comes_before_those_below(tmp_path: Path) -> None:
    """A folder with an adapter and checkpoints in it stands for its own adapter, without a word."""
    lora(tmp_path)
    lora(tmp_path / "checkpoint-10", rank=2)
    report = loratool.inspect(tmp_path)
    assert codes(report) == []
    assert report.modules[0].rank == 4


def test_adapters_at_different_depths_are_all_candidates(tmp_path: Path) -> None:
    """One above others is not taken for the only one; checkpoints in its own folder are its own."""
    lora(tmp_path / "final")
    lora(tmp_path / "final" / "checkpoint-9")
    assert codes(loratool.inspect(tmp_path)) == ["adapter-below"]
    lora(tmp_path / "runs" / "one" / "checkpoint-9")
    _refused(tmp_path, "2 adapters could be meant:\n  - final\n  - runs/one/checkpoint-9")


def test_what_is_there_instead_is_named(tmp_path: Path) -> None:
    """Whole models, a config alone, parts of a training run: each with what to do about it."""
    write_base(tmp_path / "tuned" / "checkpoint-9", small_state())
    write_base(tmp_path / "tuned" / "checkpoint-10", small_state())
    hint = _refused(tmp_path / "tuned", "checkpoint-9 and checkpoint-10 are whole models")
    assert "loratool extract" in hint
    config = write_adapter(tmp_path / "config", MODEL, {}) / "adapter_model.safetensors"
    config.unlink()
    assert "hf download" in _refused(tmp_path / "config", "the weights", "are not")
    for name, words, way_out in (
        ("pytorch_model_fsdp_0/__0_0.distcp", ".distcp", "accelerate merge-weights"),
        ("global_step9/zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed", "zero_to_fp32"),
    ):
        part = tmp_path / words / name
        part.parent.mkdir(parents=True)
        part.write_bytes(b"x")
        assert way_out in _refused(tmp_path / words, words)


def test_a_folder_with_an_archive_alone_says_how_to_unpack_it(tmp_path: Path) -> None:
    """What was downloaded as an archive is named, and the hint has the command."""
    made = lora(tmp_path / "made")
    (tmp_path / "got").mkdir()
    with zipfile.ZipFile(tmp_path / "got" / "lora.zip", "w") as archive:
        for file in made.iterdir():
            archive.write(file, file.name)
    got = tmp_path / "got"
    hint = _refused(got, "a zip archive with weights in")
    assert f"unzip {got}/lora.zip -d {got}/lora" in hint


@pytest.mark.parametrize(
    ("content", "words", "way_out"),
    [(b"", "is empty", "hf download"), (b"<html>Sign in</html>", "a web page", "hf auth login"),
     (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer", "git lfs pull"),
     (b'{"error": "Invalid username or password."}', "the error of a server", "hf auth login"),
     (b"<?xml version='1.0'?><Error/>", "a web page (XML)", "hf download")],
)  # fmt: skip
def test_a_config_that_did_not_come_is_called_so(
    content: bytes, words: str, way_out: str, tmp_path: Path
) -> None:
    """Pages, pointers and nothing in place of adapter_config.json are named, not "not JSON"."""
    config = lora(tmp_path) / "adapter_config.json"
    config.write_bytes(content)
    assert way_out in _refused(tmp_path, str(config), words)


def _cached(root: Path, *commits: str, main: str = "") -> Path:
    folder = root / "models--org--lora"
    for number, commit in enumerate(commits):
        lora(folder / "snapshots" / commit, seed=number)
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.mark.parametrize(
    ("commits", "main", "taken"),
    [(("aaa", "bbb"), "aaa", "aaa, the commit of main"), (("aaa",), "", "aaa, the only one"),
     (("aaa",), "gone", "aaa, the only one")],
)  # fmt: skip
@pytest.mark.parametrize("inner", ["", "snapshots"])
def test_a_folder_of_the_cache_leads_to_its_snapshot(
    commits: tuple[str, ...], main: str, taken: str, inner: str, tmp_path: Path
) -> None:
    """The commit of main is taken, else the only one; a notice says which."""
    report = loratool.inspect(_cached(tmp_path, *commits, main=main) / inner)
    assert codes(report) == ["cache-folder"]
    assert taken in report.warnings[0].message


def test_a_folder_of_the_cache_with_several_snapshots_asks(tmp_path: Path) -> None:
    """Without a main all are named, and a folder without any says how to fetch it."""
    hint = _refused(_cached(tmp_path, "aaa", "bbb"), "2 snapshots", "\n  - aaa\n  - bbb")
    assert "snapshots/bbb" in hint
    for left in ("snapshots", "refs", "blobs"):  # whatever a download left behind
        none = tmp_path / left / "models--org--none"
        (none / left).mkdir(parents=True)
        assert "hf download org/none" in _refused(none, "without a snapshot", "not finished")


def test_a_base_may_be_a_folder_of_the_cache_too(tmp_path: Path) -> None:
    """merge takes the snapshot of main and says so among its warnings."""
    folder = tmp_path / "models--org--base"
    write_base(folder / "snapshots" / "abc", small_state())
    adapter = small_lora(tmp_path / "adapter")
    report = loratool.merge(folder, adapter, tmp_path / "out")
    assert [n.code for n in report.warnings if "abc, the only one" in n.message] == ["base-note"]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_base_one_folder_below_is_named(tmp_path: Path) -> None:
    """A folder whose model lies in a folder of it is an error that leads there."""
    write_base(tmp_path / "download" / "model", small_state())
    with pytest.raises(FileError) as caught:
        loratool.merge(tmp_path / "download", small_lora(tmp_path / "a"), tmp_path / "out")
    assert str(tmp_path / "download" / "model") in caught.value.hint
