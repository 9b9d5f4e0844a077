"""What is damaged, linked in circles or unreadable is a line, and stops nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.adapters import lora
from helpers.cli import run_cli
from helpers.listing import entries, kohya
from helpers.permissions import permissions_that_count

import loratool
from loratool.errors import FileError


def test_damaged_files_are_entries(tmp_path: Path) -> None:
    """A file that is cut off, empty, or something else is named with what is wrong."""
    kohya(tmp_path / "sound.safetensors")
    cut = kohya(tmp_path / "cut.safetensors")
    cut.write_bytes(cut.read_bytes()[:-5])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "page.safetensors").write_bytes(b"<!doctype html><html>")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    lora(tmp_path / "config").joinpath("adapter_config.json").write_text("{")
    found = entries(tmp_path)
    wrong = {name for name, entry in found.items() if entry.state in ("damaged", "unreadable")}
    assert wrong == {
        "cut.safetensors", "empty.safetensors", "page.safetensors", "cut.gguf", "config"
    }  # fmt: skip
    assert "truncated" in found["cut.safetensors"].message
    assert found["cut.safetensors"].state == "damaged"
    assert found["sound.safetensors"].state in ("", "recognised")


def test_other_files_are_only_counted(tmp_path: Path) -> None:
    """What merely ends like weights is no adapter, and thousands of files cost nothing."""
    (tmp_path / "firmware.bin").write_bytes(b"not of torch")
    for number in range(1000):
        (tmp_path / f"{number}.txt").touch()
    report = loratool.catalog(tmp_path)
    assert (report.entries, report.others) == ([], 1001)


def test_links_are_followed_to_files_only(tmp_path: Path) -> None:
    """A circle of folders ends, a link to a file is read, one to nothing is a line."""
    lora(tmp_path / "one")
    (tmp_path / "one" / "up").symlink_to(tmp_path)
    (tmp_path / "style.safetensors").symlink_to(kohya(tmp_path.parent / "style.safetensors"))
    (tmp_path / "nothing.safetensors").symlink_to("nowhere")
    (tmp_path / "itself.safetensors").symlink_to("itself.safetensors")
    report = loratool.catalog(tmp_path)
    states = {entry.path: entry.state for entry in report.entries}
    assert states.keys() == {
        "one", "style.safetensors", "nothing.safetensors", "itself.safetensors"
    }  # fmt: skip
    assert states["nothing.safetensors"] == states["itself.safetensors"] == "unreadable"
    assert [notice.code for notice in report.warnings] == ["link-not-entered"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """A named pipe that is called like weights is a line."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert entries(tmp_path)["pipe.safetensors"].state == "unreadable"


def test_unreadable_folders_and_files_are_named(tmp_path: Path) -> None:
    """Permissions of others do not stop the list, but for the folder itself."""
    lora(tmp_path / "sound")
    closed = lora(tmp_path / "closed")
    secret = kohya(tmp_path / "secret.safetensors")
    with permissions_that_count():
        closed.chmod(0)
        secret.chmod(0)
        try:
            report = loratool.catalog(tmp_path, threads=1)
            assert [notice.code for notice in report.warnings] == ["folder-not-read"]
            with pytest.raises(FileError, match="cannot be read"):
                loratool.catalog(closed)
        finally:
            closed.chmod(0o700)
            secret.chmod(0o600)
    assert [entry.path for entry in report.entries] == ["secret.safetensors", "sound"]


def test_a_place_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A missing path, an empty one and a file that is none end with words and their exit code."""
    done = run_cli("list", tmp_path / "none")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no such file or directory" in done.stderr
    assert run_cli("list", "").exit_code == 2


def test_hostile_names_are_shown_escaped_and_kept_in_json(tmp_path: Path) -> None:
    """Escape sequences, markup, line breaks and bytes that are no characters stay texts."""
    names = ["\x1b[31mred", "[bold]x", "two\nlines", "=cmd()", os.fsdecode(b"\xff")]
    for number, name in enumerate(names):
        kohya(tmp_path / f"{number}.safetensors", seed=number)
        (tmp_path / f"{number}.safetensors").rename(tmp_path / f"{name}.safetensors")
    report = loratool.catalog(tmp_path)
    assert {entry.path for entry in report.entries} == {f"{n}.safetensors" for n in names}
    for options in ([], ["--json"], ["--csv"]):
        done = run_cli("list", tmp_path, *options, COLUMNS="80")
        assert done.exit_code == 0, done.stderr
        assert "\x1b" not in done.stdout or options == ["--csv"]
    assert "[bold]x.safe" in run_cli("list", tmp_path, COLUMNS="80").stdout


def test_an_unforeseen_error_of_one_file_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw in one adapter does not lose the others."""
    from loratool.cataloguing import describing

    lora(tmp_path / "one")
    lora(tmp_path / "two", seed=1)
    read = describing.adapter_at

    def failing(place: object, source: Path) -> object:
        if source.name == "one":
            raise RecursionError
        return read(place, source)  # type: ignore[arg-type]

    monkeypatch.setattr(describing, "adapter_at", failing)
    found = entries(tmp_path)
    assert (found["one"].state, found["two"].state) == ("not-read", "")
