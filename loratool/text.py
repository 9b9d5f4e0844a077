"""Text of files, made fit to be shown: names, paths, values of configs, answers of the Hub.

What comes from outside may hold characters that move the cursor, rename the window, turn the line
around, or cannot be seen. `printable` writes them as Python would (`\\x1b`, `\\u202e`), and cuts
what is too long to be read. Each way of showing such text (a terminal, JSON, Markdown) begins here.
"""

from __future__ import annotations

import codecs
import json
import re
from functools import lru_cache
from typing import Any

#: Characters that Python calls printable and that show nothing: joiners, fillers, selectors.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

#: A run without spaces, a line and a text that are longer are cut to so many characters.
_WORD, _LINE, _TEXT = 400, 2_000, 6_000
#: A line of code that is no longer stays whole.
_CODE = 20_000
_LONG_WORD = re.compile(rf"(?<!\S)(\S{{250}})\S{{{_WORD - 349},}}(\S{{100}})(?!\S)")
#: Of more characters than this only the ends are looked at.
_LOOKED_AT = 2_000_000


def printable(text: str) -> str:
    """`text` on one line, cut to a sensible length, every character of it to be seen.

    Backslashes stay single: a name that holds the four characters `\\x1b` looks like an escape.
    """
    if len(text) <= _WORD and is_printable(text):
        return text
    return _cut(escaped(_cut(text)))


def printable_message(text: str) -> str:
    """The same for a message that was made of such texts; it keeps the lines of its lists.

    Those are indented by two spaces. A line break in a name does not begin a line of ours.
    """
    if "\n  " not in text:
        return printable(text)
    first, *more = _cut(text).split("\n  ")
    return _cut("\n  ".join([escaped(first), *map(escaped, more)]))


def printable_code(line: str) -> str:
    """The same for a line that people copy, a command or a URL: it is cut only where it is longer
    than anybody's."""
    return escaped(line) if len(line) <= _CODE else printable(line)


def is_printable(text: str) -> bool:
    """Whether `text` shows all that it holds, and does nothing else."""
    return text.isprintable() and (text.isascii() or not _UNSEEN.search(text))


def escaped(text: str, keep: str = "") -> str:
    """`text` whole, with escapes for what cannot be seen, but for the characters in `keep`."""
    if is_printable(text):
        return text
    return text.translate(_Escapes(keep))


class _Escapes(dict[int, str]):
    """What stands for a character, found out when it is first met."""

    def __init__(self, keep: str) -> None:
        super().__init__({ord(character): character for character in keep})

    def __missing__(self, number: int) -> str:
        character = chr(number)
        self[number] = shown = character if is_printable(character) else _escape(character)
        return shown


def _escape(character: str) -> str:
    number = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _cut(text: str) -> str:
    """`text` without the middle of words, lines and all of it that are too long."""
    if len(text) <= _WORD:
        return text
    if len(text) > _LOOKED_AT:
        half = _LOOKED_AT // 2
        head, tail = _ends(_cut_words(text[:half]), _cut_words(text[-half:]), _TEXT)
        return _joined(head, len(text) - len(head) - len(tail), tail)
    lines = [_shortened(line, _LINE) for line in _cut_words(text).split("\n")]
    return _shortened("\n".join(lines), _TEXT)


def _cut_words(text: str) -> str:
    return _LONG_WORD.sub(r"\1…\2", text)


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head, tail = _ends(text, text, most)
    return _joined(head, len(text) - len(head) - len(tail), tail)


def _ends(start: str, end: str, most: int) -> tuple[str, str]:
    """What is shown of both: two thirds and one third of `most`, less what `_joined` says."""
    room = most - 60
    return start[: room * 2 // 3], end[-room // 3 :]


def _joined(head: str, left_out: int, tail: str) -> str:
    return f"{head}… ({left_out:,} characters left out) …{tail}"


#: What stands for our own signs where a terminal or a file has no letters but a few, ASCII above
#: all. Where it can be, it is as long as the sign, so that tables stay as narrow.
STAND_INS = {
    "‖": "|", "·": "*", "×": "x", "⊗": "x", "∘": "o", "–": "-", "−": "-", "…": "...", "•": "*",
    "→": "->", "≤": "<=", "≥": ">=", "±": "+-", "√": "sqrt ", "½": "1/2", "′": "'", "″": "''",
    "⟨": "<", "⟩": ">", "ᵀ": "^T", "ᵉ": "^e", "ᵐ": "^m", "⁺": "^+", "⁻": "^-",
    **dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True)),
    **dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ᵢⱼₖₙₚᵣ", "0123456789+-ijknpr", strict=True)),
    **{power: f"^{digit}" for digit, power in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    "Δ": "d", "δ": "d", "Σ": "sum ", "σ": "s", "α": "alpha", "γ": "gamma", "θ": "theta",
    "Λ": "Lambda", "λ": "lambda", "μ": "u", "π": "pi", "τ": "tau", "χ": "chi", "ᵩ": "phi",
}  # fmt: skip

#: The name of the way in which streams show what their encoding lacks; see `codecs`.
FITTING = "loratool-fitting"


def fitting(text: str, encoding: str, keep: str = "") -> str:
    """`text` in characters that an encoding has, or that are in `keep`: signs of ours get their
    stand-ins (ΔW: dW), all others escapes."""
    if text.isascii() or encoding.lower().startswith("utf"):
        return text
    return "".join(c if c in keep or _has(encoding, c) else _stand_in(c) for c in text)


@lru_cache(maxsize=4096)
def _has(encoding: str, character: str) -> bool:
    try:
        character.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _stand_in(character: str) -> str:
    return STAND_INS.get(character) or _escape(character)


def _fit(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(map(_stand_in, lacking)), error.end


codecs.register_error(FITTING, _fit)


def json_text(document: Any, *, indent: int | None = None, encoding: str = "utf-8") -> str:
    """`document` as strict JSON: exactly its data, in characters that a terminal shows.

    In an `encoding` that has not all of Unicode, all but ASCII is escaped.
    """
    # A NaN would break the reader's parser, so it must never get here.
    ascii_only = not encoding.lower().replace("-", "").startswith("utf")
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    lines = text.split("\n")  # only between values: within strings it is escaped already
    return "\n".join(line if is_printable(line) else _json_line(line) for line in lines)


#: What a spreadsheet takes a cell for a formula by, also the wide forms of East Asia.
_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]|[\t\r\n]")


def csv_cell(text: str) -> str:
    """`text` as a cell of CSV: as it is, but with an apostrophe before what a spreadsheet would
    take for a formula, and with escapes for bytes that are no characters."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
    return f"'{text}" if _FORMULA.match(text) else text


def _json_line(line: str) -> str:
    return "".join(c if is_printable(c) else json.dumps(c)[1:-1] for c in line)
