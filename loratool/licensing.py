"""The card of a folder as it goes to a repository, with the licence that the base's card names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from loratool.adapter import Notice
from loratool.cards.making import Licence, base_of, make_card
from loratool.checkpoint.address import Address
from loratool.checkpoint.answers import explained, progress_bars
from loratool.errors import FileError, HubError, PushError
from loratool.publishing import Repository, Upload

README = "README.md"

Fate = Literal["made", "completed", "kept"]


def card_of(folder: Path, text: str | None, repo_id: str | None) -> tuple[str, Fate, list[Notice]]:
    """The card of `folder`, what became of `text`, and what is to be said of it.

    `text` is the card that is there already. The licence is looked up on the Hub.
    """
    base = base_of(folder)
    licence, why = _licence_of(base) if base else (None, "it is not known where its base is")
    card = make_card(folder, text, repo_id=repo_id, licence=licence)
    fate: Fate = "made" if text is None else "kept" if card == text else "completed"
    notices = []
    if licence is None and not _names_licence(card):
        words = f"The card names no licence: {why}. Add `license:` to its first lines."
        notices.append(Notice("licence-unknown", words, README))
    return card, fate, notices


def card_upload(folder: Path, target: Repository) -> tuple[Upload, Fate, list[Notice]]:
    """README.md as it goes up: of the folder, else of the repository, completed; or a new one."""
    own = folder / README
    text = None
    if own.is_file():
        text = as_text(own.read_bytes())
    elif README in target.files:
        text = as_text(target.read(README))
    card, fate, notices = card_of(folder, text, target.repo)
    _refuse_paths(card)
    data = card.encode()
    return Upload(README, data, len(data)), fate, notices


def as_text(data: bytes) -> str:
    """A card as text. Raises FileError for what is not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{README} is not UTF-8 ({error}).", "Save it as UTF-8.") from None


def _licence_of(base: str) -> tuple[Licence | None, str]:
    """What the base's card on the Hub says, or why that is not known."""
    from huggingface_hub import ModelCard

    try:
        with explained(Address(base)), progress_bars(False):
            data: Any = ModelCard.load(base).data
    except HubError:
        return None, f"the card of {base} could not be read"
    except Exception:  # no card, or one that the library cannot read
        return None, f"{base} has no card that could be read"
    if not data.license:
        return None, f"the card of {base} names none"
    name, link = data.get("license_name"), data.get("license_link")
    return Licence(str(data.license), name, link), ""


def _refuse_paths(card: str) -> None:
    """Raise PushError where the card calls its base by a path, as PEFT's own cards may."""
    from huggingface_hub import ModelCard

    data: Any = ModelCard(card, ignore_metadata_errors=True).data
    for base in data.base_model if isinstance(data.base_model, list) else [data.base_model]:
        if isinstance(base, str) and not _ID.fullmatch(base):
            raise PushError(
                f"{README} names its base_model {base!r}, which is no model on the Hub.",
                "Write there the id that it has on the Hub, or remove the line.",
            )


#: What the Hub takes for the id of a model; the oldest have no owner.
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def _names_licence(card: str) -> bool:
    from huggingface_hub import ModelCard

    data: Any = ModelCard(card, ignore_metadata_errors=True).data
    return bool(data.license)
