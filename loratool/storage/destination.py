"""Whether an output may be made where somebody wants it, and whether there is room for it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from loratool.errors import OutputError, listed
from loratool.storage.filenames import PROVENANCE, is_of_a_model
from loratool.storage.folder import Folder
from loratool.words import enumerated, format_bytes

#: Whether an output that exists is replaced: not; if nothing but a model would go; with all that
#: is in it.
Overwrite = bool | Literal["all"]


#: How files end that hold weights, and folders do not.
_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz")

#: What was refused in a block of `plan_first`; None outside of one.
_HELD: ContextVar[list[OutputError] | None] = ContextVar("held", default=None)


@contextmanager
def plan_first() -> Iterator[None]:
    """Hold back what is said against an output until the block has ended.

    For a dry run: its plan is shown first, and then the error that the real run would end with.
    """
    held: list[OutputError] = []
    token = _HELD.set(held)
    try:
        yield
    finally:
        _HELD.reset(token)
    if held:
        raise held[0]


def refuse(error: OutputError) -> None:
    """Raise what is said against an output; in a block of `plan_first`, at its end."""
    held = _HELD.get()
    if held is None:
        raise error
    held.append(error)


def check_output(output: Path, inputs: Iterable[Path], overwrite: Overwrite) -> None:
    """Refuse an output that exists (unless `overwrite`), that would touch an input, or that could
    not be put where it should be."""
    place = Path(os.path.realpath(output))  # Path.resolve raises RuntimeError for a loop
    for source in filter(os.path.lexists, inputs):  # the others are on the Hub, or errors soon
        there = Path(os.path.realpath(source))
        if place == there or place in there.parents or there in place.parents:
            relation = "is" if place == there else "contains" if place in there.parents else "is in"
            error = OutputError(
                f"The output {output} {relation} the input {source}.",
                "Inputs are never written to; choose another place for the output.",
            )
            return refuse(error)
    if output.suffix.lower() in _FILES and not output.is_dir():
        error = OutputError(
            f"{output} is the name of a file, and the output is a directory.",
            f"Name a directory: -o {output.with_suffix('')}",
        )
        return refuse(error)
    if (closed := _closed_parent(output)) is not None:
        return refuse(closed)
    if not os.path.lexists(output):
        return None
    if is_empty_folder(output):
        return _refuse_fixed(output, place)
    if not overwrite:
        return refuse(_not_replaceable(output) or _replaceable(output))
    if (never := _not_replaceable(output)) is not None:
        return refuse(never)
    return _refuse_fixed(output, place)


def _not_replaceable(output: Path) -> OutputError | None:
    """The error for what exists and is replaced in no case."""
    if not output.is_dir() or output.is_symlink():
        return OutputError(f"{output} exists, and is not a directory.", "Choose another name.")
    weights = [p for p in output.iterdir() if p.suffix in (".safetensors", ".bin", ".json")]
    if (output / PROVENANCE).exists() or {".json"} < {p.suffix for p in weights}:
        return None
    return OutputError(
        f"{output} exists and does not look like a model or an adapter, so it is not overwritten.",
        "Choose another name, or remove it yourself.",
    )


def _replaceable(output: Path) -> OutputError:
    """The error for an output of an earlier run, with the option that replaces it."""
    company = _company(output, ())
    hint = "Choose another name, or replace it: --overwrite."
    if company:
        hint = (
            "Choose another name, or replace it with all that is in it: --overwrite-all "
            f"(it also holds {enumerated(company, 3)}, which would be lost)."
        )
    return OutputError(f"{output} exists.", hint)


def _company(output: Path, coming: Collection[str]) -> list[str]:
    """What a folder holds beside the usual files of models and adapters, and those `coming`."""
    return [n for n in Folder(output).names() if n not in coming and not is_of_a_model(n)]


def is_empty_folder(path: Path) -> bool:
    """Whether this is a folder, and no link to one, with nothing in it."""
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def _closed_parent(output: Path) -> OutputError | None:
    """The error where the folder that the output will be in cannot take it."""
    parent = Path(os.path.realpath(output.absolute().parent))
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        return _no_folder(parent)
    effective = os.access in os.supports_effective_ids
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=effective):
        return _not_allowed(parent)
    return None


def _no_folder(place: Path) -> OutputError:
    return OutputError(f"{place}: not a folder.", "Choose another place for the output.")


def _not_allowed(place: Path) -> OutputError:
    return OutputError(f"{place}: not allowed to write there.", "Choose another place.")


def _refuse_fixed(output: Path, place: Path) -> None:
    """Refuse a folder that nothing can take the place of."""
    if os.path.ismount(output):
        error = OutputError(
            f"{output} is where a disk is mounted, so nothing can take its place.",
            "Choose a name in it.",
        )
        return refuse(error)
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return None
    if here == place or place in here.parents:
        error = OutputError(
            f"{output} is the current directory, or contains it.",
            "A new folder takes its place; change to another directory, or choose another name.",
        )
        return refuse(error)
    return None


def refuse_company(output: Path, coming: Collection[str], overwrite: Overwrite) -> None:
    """Refuse an output that would be replaced and holds what is no part of it.

    Parts are the usual files of models and adapters, and those that are `coming` in its place.
    """
    if overwrite is not True or not output.is_dir():
        return
    if company := _company(output, coming):
        error = OutputError(
            f"{output} holds what is no part of a model or an adapter, and would be lost:\n"
            + listed(company),
            "Move it elsewhere, or choose another name; --overwrite-all replaces "
            f"{output} with all that is in it."
            + (" A card can be made again: loratool card." if "README.md" in company else ""),
        )
        refuse(error)


def free_bytes(output: Path) -> int:
    """Bytes that can be written where `output` will be."""
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return shutil.disk_usage(parent).free


def refuse_full_disk(needed: int, target: Path) -> None:
    """Refuse an output of which `needed` bytes do not fit at `target`."""
    free = free_bytes(target)
    if needed > free:
        error = OutputError(
            f"The output needs {format_bytes(needed)}, but only "
            f"{format_bytes(free)} are free at {target.absolute().parent}.",
            "Free some space, or write to another disk.",
        )
        refuse(error)


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
        return _no_folder(place)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return _not_allowed(place)
    return OutputError(f"{output}: writing failed ({error.strerror}).", "Nothing was left behind.")
