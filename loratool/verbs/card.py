"""card: the model card of an adapter or a merged model, made or completed in its folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.answers import Answer
from loratool.errors import FileError, explained_os_errors
from loratool.notices import Notice, document
from loratool.publishing.card_upload import LONGEST_CARD, README, Fate, as_text, card_of
from loratool.publishing.target import target_of
from loratool.storage.destination import explain
from loratool.storage.hub.folder import not_there
from loratool.storage.links import open_own
from loratool.storage.stamps import changed_file
from loratool.verbs.inputs import check_paths, told_of

#: Seconds that the licence of the base is looked up for.
_PATIENCE = 3.0


@dataclass(repr=False)
class CardReport(Answer):
    """What became of the card at `path`; `text` is all of it."""

    path: str
    card: Fate
    dry_run: bool
    text: str
    warnings: list[Notice] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        return document(self, "warnings")


@explained_os_errors()
def card(
    path: str | Path,
    *,
    repo_id: str | None = None,
    base: str | None = None,
    told: Told = NOTHING_TOLD,
    dry_run: bool = False,
) -> CardReport:
    """Write README.md for the adapter or the merged model in `path`.

    Parameters
    ----------
    path: directory of an adapter or a model.
    repo_id: "org/name" under which it is or will be on the Hub; the card's code loads it from
        there.
    base: the Hub id of the base model, where the folder does not tell.
    told: what the user says of the adapter, because its file does not; see `merge`.
    dry_run: make the text, and write nothing.

    A card that is there is completed: YAML keys that are missing are added, and a section between
    two markers is added or renewed; what somebody wrote stays byte for byte. The licence is taken
    from the base's card on the Hub, where that can be read within 3 seconds.

    Raises FileError, AdapterError and BaseError for what is neither an adapter nor a model.
    """
    check_paths([path], [path], "loratool card PATH")
    (said,) = told_of(told, [path])
    folder = Path(path)
    if folder.is_symlink() and not folder.exists():
        raise not_there(path, folder)
    if not folder.is_dir():
        raise FileError(f"{path}: no such directory.", "Give an adapter's or a model's directory.")
    target = folder / README
    text = _card_there(target)
    repo = target_of(repo_id) if repo_id else None
    made, fate, notices = card_of(folder, text, repo, base, _PATIENCE, said)
    if not dry_run and fate != "kept":
        # Replaced in one step: a card that somebody wrote must not be lost half-way.
        draft = target.with_name(f".{README}.loratool-{os.getpid()}")
        try:
            draft.write_bytes(made.encode())
            if _card_there(target) != text:
                raise changed_file(target)
            os.replace(draft, target)
        except OSError as error:
            raise explain(error, target) from error
        finally:
            draft.unlink(missing_ok=True)
    return CardReport(str(target), fate, dry_run, made, notices)


def _card_there(target: Path) -> str | None:
    """The card that is there; raises FileError for one that is no file of this folder."""
    if not os.path.lexists(target):
        return None
    with open_own(target, README) as stream:
        return as_text(stream.read(LONGEST_CARD + 1))
