"""Links among the files beside the weights: what lies outside a folder does not come along."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import Q, pair, write_adapter
from helpers.bases import small_base
from helpers.outcomes import assert_clean, assert_clear

import loratool
from loratool.errors import FileError, LoraToolError
from loratool.storage.folder import Folder
from loratool.storage.links import copy_own, leads_out

SECRET = "what is nobody's business"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.txt"
    path.write_text(SECRET)
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", pair(Q, 6, 5), {})


def assert_nothing_of_it(output: Path) -> None:
    held = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    assert not [data for data in held if SECRET.encode() in data]


@pytest.mark.parametrize("name", ["notes.md", "LICENSE", "modeling_x.py", "sub/deeper/words.txt"])
@pytest.mark.parametrize("reversible", [False, True])
def test_links_out_are_left_out_and_named(
    tmp_path: Path, base: Path, adapter: Path, outside: Path, name: str, reversible: bool
) -> None:
    """Neither in the output nor in its undo file."""
    (base / name).parent.mkdir(parents=True, exist_ok=True)
    (base / name).symlink_to(outside)
    report = loratool.merge(base, adapter, tmp_path / "out", reversible=reversible)
    assert report.left_out == [f"{name} (a link out of the folder)"]
    assert [n.code for n in report.warnings if name in n.message] == ["link-left-out"]
    assert not (tmp_path / "out" / name).exists()
    assert_nothing_of_it(tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config_sentence_transformers.json",
        "1_Pooling/weights.json",
    ],
)
def test_what_the_model_needs_is_refused(
    tmp_path: Path, base: Path, adapter: Path, name: str
) -> None:
    """With a hint that works: the copy merges."""
    (base / "modules.json").write_text('[{"path": "1_Pooling", "type": "Pooling"}]')
    place = base / name
    place.parent.mkdir(exist_ok=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(place.read_bytes() if place.exists() else b"{}")
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / name)
    with pytest.raises(FileError, match=name) as caught:
        loratool.merge(base, adapter, tmp_path / "out")
    assert_clean(tmp_path / "out")
    assert f"cp -rL {base} COPY" in caught.value.hint
    assert os.system(f"cp -rL '{base}' '{tmp_path / 'copy'}'") == 0
    loratool.merge(tmp_path / "copy", adapter, tmp_path / "out")
    assert (tmp_path / "out" / name).is_file()


VERBS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": loratool.merge,
    "combine": lambda base, adapter, out: loratool.combine([adapter, adapter], out),
    "resize": lambda base, adapter, out: loratool.resize(adapter, out, rank=1),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["tokenizer.json", "v_head.bin"])
def test_what_an_adapter_brings_is_refused(
    tmp_path: Path, base: Path, adapter: Path, outside: Path, verb: str, name: str
) -> None:
    """A tokenizer and a value head go along as files, so they must lie in the folder."""
    (adapter / name).symlink_to(outside)
    with pytest.raises(LoraToolError, match="link out of its folder"):
        VERBS[verb](base, adapter, tmp_path / "out")
    assert_clean(tmp_path / "out")


def test_a_tokenizer_that_stays_behind_harms_nothing(
    tmp_path: Path, base: Path, adapter: Path, outside: Path
) -> None:
    """Only what would go along is refused."""
    (base / "tokenizer.json").write_text("{}")
    (adapter / "tokenizer.json").symlink_to(outside)
    loratool.merge(base, adapter, tmp_path / "out", tokenizer="base")
    assert_nothing_of_it(tmp_path / "out")


def test_links_within_a_folder_are_followed(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Relative, absolute and by way of others; also in a folder that is given through a link."""
    (base / "sub").mkdir()
    (base / "words.txt").write_text("words")
    (base / "sub" / "up.txt").symlink_to("../words.txt")
    (base / "absolute.txt").symlink_to(base / "sub" / "up.txt")
    (tmp_path / "alias").symlink_to("base")
    report = loratool.merge(tmp_path / "alias", adapter, tmp_path / "out")
    assert report.left_out == []
    for name in ("sub/up.txt", "absolute.txt"):
        assert (tmp_path / "out" / name).read_text() == "words"
        assert not (tmp_path / "out" / name).is_symlink()


def test_weights_may_lie_anywhere(tmp_path: Path, base: Path, adapter: Path) -> None:
    """People assemble bases of links; of weights only tensors are read."""
    loratool.merge(base, adapter, tmp_path / "plain")
    (base / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (base / "model.safetensors").symlink_to("../weights.safetensors")
    loratool.merge(base, adapter, tmp_path / "out")
    names = ("plain", "out")
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in names)
    assert one == other


def test_the_stores_of_the_download_cache(tmp_path: Path) -> None:
    """A snapshot has its content in the repository's store or the shared one, and nowhere else."""
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    shared = tmp_path / "hub" / "blobs" / "ab" / ("ab" * 32)
    odd = shared.with_name("notes.txt")
    places = (repo / "blobs" / "x1", shared, odd, repo / "refs/main", repo / "blobs/d/x")
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    snapshot.mkdir(parents=True)
    (repo / "blobs" / "x2").symlink_to(shared)
    targets = {
        "own": "../../blobs/x1", "shared": "../../blobs/x2", "refs": "../../refs/main",
        "deeper": "../../blobs/d/x", "out": "/etc/hostname", "odd": "../../../blobs/ab/notes.txt",
    }  # fmt: skip
    for name, target in targets.items():
        (snapshot / name).symlink_to(target)
    out = {name for name in targets if leads_out(snapshot / name, name)}
    assert out == {"refs", "deeper", "out", "odd"}
    (snapshot / "sub").mkdir()
    (snapshot / "sub" / "f").symlink_to("../../../blobs/x1")
    assert not leads_out(snapshot / "sub" / "f", "f")
    assert not leads_out(snapshot / "sub" / "f", "sub/f")


def test_pipes_are_not_opened(tmp_path: Path, base: Path, adapter: Path) -> None:
    """They would never end; they are named instead, the adapter's too."""
    os.mkfifo(base / "notes.md")
    os.mkfifo(adapter / "tokenizer.json")
    done: list[list[str]] = []
    work = threading.Thread(
        target=lambda: done.append(loratool.merge(base, adapter, tmp_path / "out").left_out),
        daemon=True,
    )
    work.start()
    work.join(30)
    assert done == [["notes.md (not a file)", "tokenizer.json of adapter (not a file)"]]


@pytest.mark.parametrize("read", [loratool.inspect, lambda path: loratool.merge(path, path, "out")])
def test_a_pipe_in_place_of_weights_is_named(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    """It exists, so it is not called missing; nor is a link to it called broken."""
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "link.safetensors").symlink_to("model.safetensors")
    for name in ("model.safetensors", "link.safetensors"):
        with pytest.raises(FileError) as raised:
            read(tmp_path / name)
        assert_clear(raised.value, name, "a pipe")


def test_a_link_that_changes_after_the_look_is_not_followed(
    tmp_path: Path, base: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was looked at is what is copied: a file that becomes a link in between is refused."""
    path = base / "notes.md"
    path.write_text("words")
    opened = os.open

    def swap(*arguments: int, **options: int) -> int:
        if not path.is_symlink():
            path.unlink()
            path.symlink_to(outside)
            descriptor = opened(*arguments, **options)
            path.unlink()
            path.write_text("words")  # and back again
            return descriptor
        return opened(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", swap)
        with pytest.raises(FileError, match=r"notes\.md"):
            copy_own(path, "notes.md", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("place", ["base", "adapter", "output", "config.json", "shard"])
def test_loops_are_broken_links(tmp_path: Path, base: Path, adapter: Path, place: str) -> None:
    """One error that names the link, wherever it stands."""
    loop = {"config.json": base / "config.json", "shard": base / "model.safetensors"}.get(
        place, tmp_path / "loop"
    )
    loop.unlink(missing_ok=True)
    loop.symlink_to(loop.name)
    given = {"base": base, "adapter": adapter, "output": tmp_path / "out"}
    if place in given:
        given[place] = loop
    with pytest.raises(LoraToolError, match=loop.name):
        loratool.merge(given["base"], given["adapter"], given["output"])


def test_a_loop_beside_the_weights_is_left_out(tmp_path: Path, base: Path, adapter: Path) -> None:
    """It is a broken link as others are, and no reason to refuse the rest."""
    (base / "notes.md").symlink_to("notes.md")
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert report.left_out == ["notes.md (a broken link)"]


def test_a_file_is_missing_only_where_the_disk_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that lead nowhere, or can lead nowhere, name no file; a fault of the disk is one."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    folder = Folder(tmp_path)
    for name in ("none", "loop", "file/none", "x" * 300, "a\0b", "\udfff"):
        assert not folder.has(name)
    assert folder.has("file")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            folder.has("file")


def test_a_part_of_the_undo_folder_that_leads_out(
    tmp_path: Path, base: Path, adapter: Path, outside: Path
) -> None:
    """A base that was merged itself brings its undo file along, and nothing else."""
    loratool.merge(base, adapter, tmp_path / "first", reversible=True)
    (tmp_path / "first" / "loratool" / "more.txt").symlink_to(outside)
    other = write_adapter(tmp_path / "other", pair(Q, 6, 5, seed=1), {})
    with pytest.raises(FileError, match=r"more\.txt"):
        loratool.merge(tmp_path / "first", other, tmp_path / "out", reversible=True)
    assert_clean(tmp_path / "out")


def test_unmerge_does_not_follow_links_either(
    tmp_path: Path, base: Path, adapter: Path, outside: Path
) -> None:
    """A side file of the output that became a link."""
    (base / "notes.md").write_text("words")
    loratool.merge(base, adapter, tmp_path / "out", reversible=True)
    (tmp_path / "out" / "notes.md").unlink()
    (tmp_path / "out" / "notes.md").symlink_to(outside)
    with pytest.raises(FileError, match=r"notes\.md"):
        loratool.unmerge(tmp_path / "out", adapter, tmp_path / "again")
    assert_clean(tmp_path / "again")
