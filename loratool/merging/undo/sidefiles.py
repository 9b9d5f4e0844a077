"""What lies beside the weights: kept by a reversible merge, put back by unmerge."""

from __future__ import annotations

from pathlib import Path

from loratool.storage.filenames import PROVENANCE, UNDO, UNDO_FOLDER
from loratool.storage.folder import Folder


def previous(folder: Folder) -> list[Path]:
    """What a reversible merge left in a model that is now a base: how it came about itself."""
    found = [folder.path / PROVENANCE] if folder.has(PROVENANCE) else []
    if folder.has(f"{UNDO_FOLDER}/{UNDO}"):
        fetch_undo(folder)
        found.append(folder.path / UNDO_FOLDER)
    return found


def fetch_undo(folder: Folder) -> None:
    """See to it that what a reversible merge left is on this disk."""
    folder.fetch(name for name in folder.names() if name.startswith(f"{UNDO_FOLDER}/"))
