"""The card of a folder as it goes to a repository, with the licence that the base's card names."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.errors import FileError, LoraToolError, PushError, UsageError
from loratool.notices import Notice
from loratool.publishing.cards.document import Licence, base_of, make_card
from loratool.publishing.cards.facts import bases_named, doubt_of_base, hub_id, read_facts
from loratool.publishing.cards.metadata import read_metadata
from loratool.storage.hub.address import Address
from loratool.storage.hub.errors import explained, progress_bars
from loratool.storage.hub.patience import answered
from loratool.storage.hub.repository import Repository, Upload
from loratool.words import enumerated, format_bytes

README = "README.md"
#: More bytes than this are no card.
LONGEST_CARD = 20_000_000

Fate = Literal["made", "completed", "kept"]


def card_of(
    folder: Path,
    text: str | None,
    repo_id: str | None,
    base: str | None = None,
    patience: float | None = None,
    told: Told = NOTHING_TOLD,
) -> tuple[str, Fate, list[Notice]]:
    """The card of `folder`, what became of `text`, and what is to be said of it.

    `text` is the card that is there already, `base` the Hub id of the base where the folder does
    not tell, `told` what a user says of an adapter. The licence is looked up on the Hub, for
    `patience` seconds.
    """
    if base is not None and hub_id(base) is None:
        raise UsageError(f"{base!r} is not the id of a model on the Hub.", "Ids are org/name.")
    read_metadata(text or "")  # before the Hub is asked for anything: is it valid?
    known = base or base_of(folder, told)
    licence, why = _licence_within(known, patience) if known else (None, "")
    card = make_card(folder, text, repo_id=repo_id, base_model=base, licence=licence, told=told)
    fate: Fate = "made" if text is None else "kept" if card == text else "completed"
    notices = _note_base(folder) if known is None else []
    if licence is None and not _names_licence(card):
        words = f"The card names no licence{f': {why}' if why else ''}. Add `license:` to its YAML"
        words += " (`loratool card` writes it here)." if repo_id else "."
        notices.append(Notice("licence-unknown", words, README))
    return card, fate, notices


def card_upload(
    folder: Path,
    target: Repository,
    files: Sequence[str] = (),
    chosen: bool = False,
    base: str | None = None,
    told: Told = NOTHING_TOLD,
) -> tuple[Upload, Fate, list[Notice]]:
    """README.md as it goes up: of the folder or of the repository, completed; or a new one.

    `files` of the folder go up. Raises PushError where both have one and it was not the same
    words that were completed, but for `chosen`: then the folder's goes up.
    """
    own = as_text(_beginning(folder / README)) if README in files else None
    there = as_text(target.read(README)) if README in target.files else None
    text = there if own is None else own
    card, fate, notices = card_of(folder, text, target.repo, base, told=told)
    if own is not None and there is not None and not chosen:
        theirs, _, _ = card_of(folder, there, target.repo, base, told=told)
        if _lines(theirs) != _lines(card):
            raise PushError(
                f"{README} in {folder} says something else than the one in {target.repo}.",
                f"--include {README} sends the one here, --exclude {README} keeps the one there.",
            )
        card, fate = theirs, "kept" if theirs == there else "completed"
    _refuse_paths(card)
    data = card.encode()
    return Upload(README, data, len(data)), fate, notices


def _lines(text: str) -> list[str]:
    """What a card says, whatever the order of its YAML."""
    return sorted(line.rstrip() for line in text.splitlines())


def _beginning(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(LONGEST_CARD + 1)


def as_text(data: bytes) -> str:
    """A card as text. Raises FileError for what is not UTF-8, or too long."""
    if len(data) > LONGEST_CARD:
        raise FileError(
            f"{README} is longer than {format_bytes(LONGEST_CARD)}, which is no card.",
            "Move it away; a new one is made then.",
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{README} is not UTF-8 ({error}).", "Save it as UTF-8.") from None


def _note_base(folder: Path) -> list[Notice]:
    """Ask for the base of a merged model where the adapters name one that it need not be."""
    record = read_facts(folder).record
    named, doubt = bases_named(record), doubt_of_base(record)
    if not named or not doubt:
        return []
    text = (
        f"The card names no base: the adapters call it {enumerated(named)}, but {doubt}. "
        "Say which model it is: --base ID."
    )
    return [Notice("base-unknown", text, README)]


def _licence_within(base: str, patience: float | None) -> tuple[Licence | None, str]:
    """Like `_licence_of`; without a network the library tries for longer than anybody waits."""
    found: list[tuple[Licence | None, str]] = []
    failed: list[BaseException] = []

    def look_up() -> None:
        try:
            found.append(_licence_of(base))
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            failed.append(error)

    seeker = threading.Thread(target=look_up, daemon=True)
    seeker.start()
    seeker.join(patience)
    if failed:
        raise failed[0]
    late = f"the card of {base} could not be read in {patience:g} seconds" if patience else ""
    return found[0] if found else (None, late)


def _licence_of(base: str) -> tuple[Licence | None, str]:
    """What the base's card on the Hub says, or why that is not known."""
    from huggingface_hub import constants, hf_hub_download

    try:
        with explained(Address(base)), progress_bars(False):
            read = partial(hf_hub_download, base, README)
            path = answered(read, f"the card of {base}")
        data = read_metadata(as_text(_beginning(Path(path))))
    except (LoraToolError, OSError):
        return None, f"the card of {base} could not be read"
    words = {key: _line(data.get(key)) for key in ("license", "license_name", "license_link")}
    if words["license"] is None:
        return None, f"the card of {base} names none"
    link = words["license_link"]
    if link and not re.match(r"https?://", link):  # a file beside the base's card
        link = f"{constants.ENDPOINT}/{base}/blob/main/{link}"
    return Licence(words["license"], words["license_name"], link), ""


def _line(value: object) -> str | None:
    """A value of somebody else's card if it is one line of text, of a length that names have."""
    return value if isinstance(value, str) and len(value) < 500 and value.isprintable() else None


def _refuse_paths(card: str) -> None:
    """Raise PushError where the card calls its base by a path, as PEFT's own cards may."""
    named = read_metadata(card).get("base_model")
    for base in named if isinstance(named, list) else [named]:
        if isinstance(base, str) and not _ID.fullmatch(base):
            raise PushError(
                f"{README} names its base_model {base!r}, which is not a model on the Hub.",
                "Write there the id that it has on the Hub, or remove the line.",
            )


#: What the Hub takes for the id of a model; the oldest have no owner.
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def _names_licence(card: str) -> bool:
    return bool(read_metadata(card).get("license"))
