"""Whose tokenizer a model gets, as a whole: vocabulary, added and special tokens, chat templates.

Its files lie in a folder of a base or of an adapter. Those of two folders are never mixed: a chat
template of the one would win over that of the other, and ids would mean other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratool.errors import FileError
from loratool.notices import Notice
from loratool.storage.fields import is_count
from loratool.storage.filenames import GENERATION, PROCESSOR, TOKENIZER, VOCABULARY
from loratool.storage.folder import Folder
from loratool.storage.hashing import file_sha256
from loratool.storage.jsonfile import read_any_json
from loratool.words import counted

#: What belongs to it, and goes along with it where its folder has some of its own: what a summary
#: says of each sort.
_SORTS = (("processor", PROCESSOR), ("generation config", GENERATION))

#: Longer files are no vocabulary.
_LONGEST = 200_000_000


def is_part_of_tokenizer(name: str) -> bool:
    """Whether a file by this relative path belongs to the tokenizer of the folder."""
    return TOKENIZER.match(name) is not None


def is_beside_tokenizer(name: str) -> bool:
    """Whether it says how the tokenizer's model is used: processors, how text is generated."""
    return any(pattern.match(name) for _, pattern in _SORTS)


def tokenizer_files(folder: Folder) -> dict[str, Path]:
    """The files of a tokenizer in a folder, by name, fetched; {} where it has no vocabulary."""
    names = [name for name in folder.names(depth=1) if is_part_of_tokenizer(name)]
    names = [name for name in names if folder.has(name)]
    if not any(VOCABULARY.fullmatch(name) for name in names):
        return {}
    folder.fetch(names)
    return {name: folder.path / name for name in names}


def files_beside(folder: Folder) -> dict[str, Path]:
    """Processor and generation configs of a folder, by name, fetched."""
    names = [n for n in folder.names(depth=0) if is_beside_tokenizer(n) and folder.has(n)]
    folder.fetch(names)
    return {name: folder.path / name for name in names}


def broken_parts(folder: Folder) -> list[str]:
    """Parts of a tokenizer that a folder lists and that are no files: broken links, pipes."""
    return [n for n in folder.names(depth=1) if is_part_of_tokenizer(n) and not folder.has(n)]


def stray_parts(folder: Folder) -> list[str]:
    """Files of a tokenizer, or beside one, in a folder that has no vocabulary."""
    names = [n for n in folder.names(depth=1) if is_part_of_tokenizer(n) or is_beside_tokenizer(n)]
    return [] if any(VOCABULARY.fullmatch(name) for name in names) else names


@dataclass
class Tokenizer:
    """The tokenizer that goes along: `files` by name, and `owner`, whose they are ("base", the name
    of an adapter, or "" where there is none). `beside` are its processor and generation configs.
    """

    owner: str = ""
    files: dict[str, Path] = field(default_factory=dict)
    beside: dict[str, Path] = field(default_factory=dict)

    def replaces(self, name: str) -> bool:
        """Whether a file of the base is of the sort that comes from an adapter instead."""
        sorts = [TOKENIZER, *(p for _, p in _SORTS if any(map(p.match, self.beside)))]
        return any(pattern.match(name) for pattern in sorts)

    def summary(self) -> str:
        """Whose is what, in a line; "" without a tokenizer."""
        if not self.owner:
            return ""
        own = [words for words, pattern in _SORTS if any(map(pattern.match, self.beside))]
        template = " with its chat template" if self.has_template else ""
        more = f", {' and '.join(own)} too" if own else ""
        return f"that of {self.owner}, all of it{template}{more}"

    @property
    def has_template(self) -> bool:
        if any("chat_template" in name for name in self.files):
            return True
        return bool(_object(self.files.get("tokenizer_config.json")).get("chat_template"))


def common_files(brought: Sequence[dict[str, Path]]) -> int | None:
    """Which of these sets of files has all files of the others, with the same bytes; None where
    they differ."""
    hashes = [{name: file_sha256(path) for name, path in files.items()} for files in brought]
    whole = [i for i, own in enumerate(hashes) if all(h.items() <= own.items() for h in hashes)]
    return whole[-1] if whole else None


def ids_of(files: dict[str, Path]) -> dict[int, str]:
    """The ids that a tokenizer gives, with their tokens, from its files.

    Files that are no JSON or no vocabulary of a known form are passed over.
    """
    found: dict[int, str] = {}
    for name, path in files.items():
        if path.stat().st_size <= _LONGEST:
            for token, number in _ids(name, path):
                if is_count(number):
                    found[number] = token if isinstance(token, str) else "?"
    return found


def note_ids_without_rows(files: dict[str, Path], embeddings: dict[str, int]) -> list[Notice]:
    """A warning for ids of a tokenizer that the largest of these embeddings (name, rows) has no row
    for; nothing where there is none."""
    if not embeddings:
        return []
    where = max(embeddings, key=lambda name: embeddings[name])
    rows = embeddings[where]
    over = {number: token for number, token in ids_of(files).items() if number >= rows}
    if not over:
        return []
    shown = [f"{over[number]} ({number})" for number in sorted(over)[:5]]
    more = f" and {len(over) - 5} more" if len(over) > 5 else ""
    text = (
        f"The tokenizer has {counted(len(over), 'id')} without a row in {where}, which has "
        f"{rows:,} rows: {', '.join(shown)}{more}. A text with such a token cannot be run."
    )
    if all("pad" in token.lower() for token in over.values()):
        text += " For padding that is mostly harmless, since it is masked."
    return [Notice("tokens-without-rows", text, where)]


def _ids(name: str, path: Path) -> Iterator[tuple[Any, Any]]:
    leaf = name.rpartition("/")[2]
    if leaf == "tokenizer.json":
        document = _object(path)
        vocabulary = _table(document.get("model")).get("vocab")
        if isinstance(vocabulary, dict):
            yield from vocabulary.items()
        elif isinstance(vocabulary, list):  # Unigram: pairs of a piece and its score
            pieces = (piece[0] for piece in vocabulary if isinstance(piece, list) and piece)
            yield from ((piece, number) for number, piece in enumerate(pieces))
        added = document.get("added_tokens")
        for entry in added if isinstance(added, list) else []:
            if isinstance(entry, dict):
                yield entry.get("content"), entry.get("id")
    elif leaf == "tokenizer_config.json":
        for number, entry in _table(_object(path).get("added_tokens_decoder")).items():
            yield _table(entry).get("content"), _whole(number)
    elif leaf in ("added_tokens.json", "vocab.json"):
        yield from _object(path).items()
    elif leaf == "vocab.txt":
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        yield from ((line, number) for number, line in enumerate(lines))
    elif leaf.endswith((".tiktoken", "tiktoken.model")):
        pairs = (line.split() for line in path.read_text("ascii", "replace").splitlines())
        yield from ((p[0], _whole(p[1])) for p in pairs if len(p) == 2)
    elif leaf == "tekken.json":
        size: Any = _table(_object(path).get("config")).get("default_vocab_size")
        if is_count(size):
            yield "the last one", size - 1
    elif leaf.endswith((".model", ".spm")) or ".model." in leaf:
        yield from ((piece, number) for number, piece in enumerate(_pieces(path.read_bytes())))


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _whole(text: str) -> int | None:
    """The number that a text is; None for anything else, and for what no tokenizer counts up to."""
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _pieces(data: bytes) -> Iterator[str]:
    """The pieces of a SentencePiece model: field 1 of its message, whose field 1 is the text.

    Ends where the data is no such message. Source: sentencepiece_model.proto, protobuf's encoding.
    """
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            texts = (v for n, v in _fields(value) if n == 1 and isinstance(v, bytes))
            yield next(texts, b"").decode("utf-8", "replace")


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protobuf message: numbers, and bytes or whatever their 32 or 64 bits are."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            return
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at
    return 0, len(data)


def _object(path: Path | None) -> dict[str, Any]:
    """The JSON object in a file, {} for anything else: a vocabulary is not what loratool is for."""
    try:
        found = read_any_json(path, _LONGEST) if path is not None else None
    except (FileError, OSError):
        return {}
    return _table(found)
