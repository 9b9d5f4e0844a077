"""What lies beside the weights: kept by a reversible merge, put back by unmerge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.errors import RestoreError
from loratool.merging.plan import Plan
from loratool.merging.undo.file import Undo, read_undo
from loratool.models.checkpoint import Checkpoint
from loratool.models.sidefiles import SideFiles, side_files_of
from loratool.notices import Notice
from loratool.storage.filenames import BEFORE, CONFIG, INDEX, PROVENANCE, UNDO, UNDO_FOLDER
from loratool.storage.folder import Folder
from loratool.storage.hashing import file_digest
from loratool.storage.links import copy_own, open_own, refuse_leading_out
from loratool.words import format_bytes


@dataclass(frozen=True)
class Kept:
    """What goes into the undo file at `path` beside the weights.

    `hashes` are the digests of all files beside the base's weights that a merge carries over,
    `files` the content of those that the output will not hold as they are.
    """

    path: Path
    hashes: dict[str, str]
    files: dict[str, bytes]


def keep_base(plan: Plan, output: Path, written: SideFiles) -> Kept:
    """Make the folder of the undo file in `output`, with the one that the base had itself.

    `written` are the side files that the output gets.
    """
    base, rewriting = plan.base, plan.rewriting
    changed = {CONFIG, *(rewriting.others if rewriting is not None else ())}
    own = side_files_of(base)
    own.fetch()
    files = {
        name: _content(path, name)
        for name, path in own.copied.items()
        if name in changed or written.copied.get(name) != path
    }
    if base.is_directory and (base.directory / INDEX).is_file():
        files[INDEX] = _content(base.directory / INDEX, INDEX)
    (output / UNDO_FOLDER).mkdir()
    for path in previous(base):
        _copy(base.folder, path.name, output / UNDO_FOLDER / BEFORE)
    hashes = {name: file_digest(path) for name, path in own.copied.items()}
    return Kept(output / UNDO_FOLDER / UNDO, hashes, files)


def _content(path: Path, name: str) -> bytes:
    with open_own(path, name) as stream:
        return stream.read()


def _copy(folder: Folder, top: str, target: Path) -> None:
    """Copy the file `top` of a folder, or all that lies in its folder `top`, into `target`."""
    for name in folder.names():
        if name == top or (name.startswith(f"{top}/") and not name.endswith("/")):
            copy_own(folder.path / name, name, target / name)


def previous(base: Checkpoint) -> list[Path]:
    """What a reversible merge left in a model that is now a base: how it came about itself."""
    folder = base.folder
    if not base.is_directory:
        return []
    own = {name: folder.path / name for name in (PROVENANCE, f"{UNDO_FOLDER}/{UNDO}")}
    found = [own[PROVENANCE]] if folder.has(PROVENANCE) else []
    refuse_leading_out({name: path for name, path in own.items() if folder.has(name)})
    if folder.has(f"{UNDO_FOLDER}/{UNDO}"):
        fetch_undo(folder)
        found.append(folder.path / UNDO_FOLDER)
    return found


def fetch_undo(folder: Folder) -> None:
    """See to it that what a reversible merge left is on this disk."""
    folder.fetch(name for name in folder.names() if name.startswith(f"{UNDO_FOLDER}/"))


def open_undo(merged: Checkpoint, record: dict[str, Any] | None) -> Undo | None:
    """The undo file of a model, if it has one. Raises RestoreError where half of it is missing."""
    if not merged.is_directory:
        return None
    path = merged.directory / UNDO_FOLDER / UNDO
    if path.is_file():
        if record is None:
            raise RestoreError(
                f"{merged.label}: its {PROVENANCE} is missing, which says what the undo file "
                "undoes.",
                "Put it back. `--subtract` does without both, but not exactly.",
            )
        return read_undo(path)
    if record is not None and record.get("undo"):
        raise RestoreError(
            f"{merged.label}: {UNDO_FOLDER}/{UNDO} is missing, which the reversible merge wrote.",
            "Put it back. `--subtract` does without it, but not exactly.",
        )
    return None


def put_back(undo: Undo, merged: Path, folder: Path) -> None:
    """Write the base's files beside its weights into `folder`, and what it was merged from."""
    for name in undo.side_files.keys() | undo.files.keys():
        target = folder / name
        if name in undo.files:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(undo.files[name])
        elif (merged / name).is_file():
            copy_own(merged / name, name, target)
    before = Folder(merged / UNDO_FOLDER / BEFORE)
    for name in before.names() if before.is_there() else ():
        if not name.endswith("/"):
            copy_own(before.path / name, name, folder / name)


def changed_since(merged: Folder, undo: Undo) -> list[Notice]:
    """A warning where files of the output are no longer those of the base.

    Raises FileError for one that is a link out of the output now.
    """
    changed = []
    merged.note(undo.side_files)
    kept = undo.side_files.keys() - undo.files.keys()
    refuse_leading_out({name: merged.path / name for name in sorted(kept)})
    for name, digest in undo.side_files.items():
        path = merged.path / name
        if name not in undo.files and not (path.is_file() and file_digest(path, digest) == digest):
            changed.append(f"{name} ({'changed' if path.is_file() else 'missing'})")
    if not changed:
        return []
    text = f"Files beside the weights are not as in the base and stay so: {', '.join(changed)}."
    return [Notice("side-file-changed", text)]


def note_large(nbytes: int, plan: Plan) -> list[Notice]:
    """A warning for an undo file that is not worth its size."""
    if nbytes <= 5_000 + plan.base.nbytes // 4:  # of which some thousand are there anyway
        return []
    text = (
        f"The undo file takes {format_bytes(nbytes)}, the base itself "
        f"{format_bytes(plan.base.nbytes)}: {plan.dtype} keeps so little of it that keeping the "
        "base is simpler, and takes less work."
    )
    return [Notice("undo-large", text)]
