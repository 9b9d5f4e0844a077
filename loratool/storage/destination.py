"""Whether an output may be made where somebody wants it, and whether there is room for it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from loratool.errors import OutputError, listed
from loratool.storage.filenames import PROVENANCE, is_of_a_model
from loratool.storage.folder import Folder
from loratool.words import format_bytes

#: Whether an output that exists is replaced: not; if nothing but a model would go; with all that
#: is in it.
Overwrite = bool | Literal["all"]


def check_output(output: Path, inputs: Iterable[Path], overwrite: Overwrite) -> None:
    """Refuse an output that exists (unless `overwrite`) or that would touch an input."""
    place = Path(os.path.realpath(output))  # Path.resolve raises RuntimeError for a loop
    for source in filter(os.path.lexists, inputs):  # the others are on the Hub, or errors soon
        there = Path(os.path.realpath(source))
        if place == there or place in there.parents or there in place.parents:
            relation = "is" if place == there else "contains" if place in there.parents else "is in"
            raise OutputError(
                f"The output {output} {relation} the input {source}.",
                "Inputs are never written to; choose another place for the output.",
            )
    if not os.path.lexists(output):
        return
    if is_empty_folder(output):
        _refuse_fixed(output, place)
        return
    if not overwrite:
        raise OutputError(f"{output} exists.", "Choose another name, or replace it: --overwrite.")
    if not output.is_dir() or output.is_symlink():
        raise OutputError(f"{output} is not a directory.", "Choose another name.")
    weights = [p for p in output.iterdir() if p.suffix in (".safetensors", ".bin", ".json")]
    if not (output / PROVENANCE).exists() and not {".json"} < {p.suffix for p in weights}:
        raise OutputError(
            f"{output} does not look like a model or an adapter, so it is not overwritten.",
            "Remove it yourself, or choose another name.",
        )
    _refuse_fixed(output, place)


def is_empty_folder(path: Path) -> bool:
    """Whether this is a folder, and no link to one, with nothing in it."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _refuse_fixed(output: Path, place: Path) -> None:
    """Raise OutputError for a folder that nothing can take the place of."""
    if os.path.ismount(output):
        raise OutputError(
            f"{output} is where a disk is mounted, so nothing can take its place.",
            "Choose a name in it.",
        )
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return
    if here == place or place in here.parents:
        raise OutputError(
            f"{output} is the current directory, or contains it.",
            "A new folder takes its place; change to another directory, or choose another name.",
        )


def refuse_company(output: Path, coming: Collection[str], overwrite: Overwrite) -> None:
    """Raise OutputError where an output that would be replaced holds what is no part of it.

    Parts are the usual files of models and adapters, and those that are `coming` in its place.
    """
    if overwrite == "all" or not output.is_dir():
        return
    company = [n for n in Folder(output).names() if n not in coming and not is_of_a_model(n)]
    if company:
        raise OutputError(
            f"{output} holds what is no part of a model or an adapter, and would be lost:\n"
            + listed(company),
            "Move it elsewhere, or choose another name; --overwrite-all replaces "
            f"{output} with all that is in it."
            + (" A card can be made again: loratool card." if "README.md" in company else ""),
        )


def free_bytes(output: Path) -> int:
    """Bytes that can be written where `output` will be."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


def refuse_full_disk(needed: int, target: Path) -> None:
    """Raise OutputError where `needed` bytes do not fit at `target`."""
    free = free_bytes(target)
    if needed > free:
        raise OutputError(
            f"The output needs {format_bytes(needed)}, but only "
            f"{format_bytes(free)} are free at {target.absolute().parent}.",
            "Free some space, or write to another disk.",
        )


def explain(error: OSError, output: Path) -> OutputError:
    """The error for a write towards `output` that failed, in words."""
    place = output.absolute().parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"The disk is full: {format_bytes(free_bytes(output))} are left at {place}.",
            "Free some space, or write to another disk. Nothing was left behind.",
        )
    if error.errno == errno.EFBIG:
        return OutputError(
            f"{output}: one of its files would grow larger than this system allows.",
            "Raise the limit (ulimit -f), or write to another file system.",
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return OutputError(f"{place}: not a folder.", "Choose another place for the output.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"{place}: not allowed to write there.", "Choose another place.")
    return OutputError(f"{output}: writing failed ({error.strerror}).", "Nothing was left behind.")
