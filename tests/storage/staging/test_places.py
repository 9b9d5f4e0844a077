"""Where an output may be is known before any work, also while another run makes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.merging import ADAPTER, BASE
from helpers.outcomes import assert_clear
from helpers.permissions import permissions_that_count

import loratool
from loratool.errors import OutputError
from loratool.storage.system import lock_folder
from loratool.storage.worksites import work_of

#: Inputs that are not there: who says nothing of them has not looked at them.
GONE = Path("/gone/model")

#: Every verb that makes an output, given inputs that are not there.
VERBS: dict[str, Callable[[Path], object]] = {
    "merge": lambda out: loratool.merge(GONE, [GONE], out),
    "unmerge": lambda out: loratool.unmerge(GONE, [GONE], out),
    "dequantise": lambda out: loratool.dequantise(GONE, out),
    "extract": lambda out: loratool.extract(GONE, GONE, out, rank=1),
    "convert": lambda out: loratool.convert(GONE, out, to="mlx"),
    "resize": lambda out: loratool.resize(GONE, out, rank=1),
    "combine": lambda out: loratool.combine([GONE, GONE], out),
}


@pytest.fixture(params=VERBS)
def verb(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return VERBS[request.param]


def refusal(verb: Callable[[Path], object], output: Path) -> OutputError:
    """What a verb says against an output before it looks for its inputs."""
    with pytest.raises(OutputError) as caught:
        verb(output)
    return caught.value


def test_an_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    """A folder that was made for the output is taken."""
    (tmp_path / "out").mkdir()
    loratool.merge(BASE, ADAPTER, tmp_path / "out")
    assert (tmp_path / "out" / "loratool.json").exists()


def test_a_folder_that_may_not_be_written_to(
    verb: Callable[[Path], object], tmp_path: Path
) -> None:
    """The nearest folder that is there must take the output; it is named."""
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    with permissions_that_count():
        for output in (closed / "out", closed / "deep" / "er" / "out"):
            assert_clear(refusal(verb, output), f"{closed}: not allowed to write there.")
    closed.chmod(0o755)


def test_a_file_where_a_folder_should_be(verb: Callable[[Path], object], tmp_path: Path) -> None:
    """An output below a file is refused as the system would refuse it."""
    (tmp_path / "file").write_text("mine")
    error = refusal(verb, tmp_path / "file" / "out")
    assert_clear(error, f"{tmp_path / 'file'}: not a folder.")


@pytest.mark.parametrize("empty", [True, False])
def test_a_mount_point(
    verb: Callable[[Path], object], empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk's own folder cannot be replaced, and the hint is to go into it."""
    output = tmp_path / "disk"
    output.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    error = refusal(verb, output)
    assert_clear(error, str(output), "mounted")
    assert error.hint == "Choose a name in it."


@pytest.mark.parametrize("name", ["out.safetensors", "model.BIN", "lora.gguf", "x.pt", "x.npz"])
def test_the_name_of_a_file(verb: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    """An output is a directory; a name that ends like a file's leads to one without that."""
    error = refusal(verb, tmp_path / name)
    assert_clear(error, f"{tmp_path / name} is the name of a file")
    assert error.hint.endswith(f"-o {tmp_path / name.partition('.')[0]}")


@pytest.fixture(params=["work", "partial"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An output that another run makes, in either kind of folder."""
    output = tmp_path / "out"
    folder = work_of(output)
    if request.param == "partial":
        folder = output.with_name(".out.loratool-partial-x")
    folder.mkdir()
    lock = lock_folder(folder)
    assert lock is not None
    yield output
    os.close(lock)


def test_an_output_that_another_run_makes(verb: Callable[[Path], object], running: Path) -> None:
    """A second run for one output says so at its start, and leaves the first one's folder."""
    before = sorted(running.parent.iterdir())
    assert_clear(refusal(verb, running), f"Another run is writing {running}.")
    assert sorted(running.parent.iterdir()) == before


def test_a_look_for_another_run_leaves_no_lock(tmp_path: Path) -> None:
    """What a killed run left is no other run, and is taken up as ever."""
    output = tmp_path / "out"
    work_of(output).mkdir()
    loratool.merge(BASE, ADAPTER, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("where", ["full", "closed"])
def test_a_dry_run_ends_as_the_run_would(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too little space, and where nothing may be written, a dry run raises what the run
    raises."""
    if where == "full":
        from loratool.storage import destination

        monkeypatch.setattr(destination, "free_bytes", lambda _: 10)
    else:
        tmp_path.chmod(0o555)
    said = []
    with permissions_that_count():
        for dry_run in (True, False):
            for call in (
                lambda dry: loratool.merge(BASE, ADAPTER, tmp_path / "out", dry_run=dry),
                lambda dry: loratool.resize(ADAPTER, tmp_path / "out", rank=2, dry_run=dry),
                lambda dry: loratool.combine([ADAPTER], tmp_path / "out", dry_run=dry),
                lambda dry: loratool.convert(ADAPTER, tmp_path / "out", to="mlx", dry_run=dry),
            ):
                with pytest.raises(OutputError) as caught:
                    call(dry_run)
                said.append(caught.value.message)
    tmp_path.chmod(0o755)
    assert said[:4] == said[4:]
    assert list(tmp_path.iterdir()) == []
