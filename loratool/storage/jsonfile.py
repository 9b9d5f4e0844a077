"""JSON files beside the weights: config.json, adapter_config.json, the index.

They come with the weights, from strangers. A file's size is held against the longest of its kind
before it is read; a name that stands twice with two values is refused, for two programs would read
two configs. NaN and Infinity are read: Python writes them, so some real configs have them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from loratool.errors import FileError
from loratool.storage.bounded import LONGEST_LIST, open_regular
from loratool.storage.kinds import LOOKED_AT, refuse_failed_download
from loratool.words import format_bytes

#: Longest config. The longest that a model of today leads to has patterns of ranks and alphas for
#: every expert of a Kimi K2, 11 MB; usual ones have some kilobytes.
_LONGEST_CONFIG = 44_000_000

#: Digits of the longest number, which take quadratic time.
_LONGEST_NUMBER = 1000

_REPAIR = "Repair or fetch it again."

#: All that the answer of a server has that was saved in place of a file.
_OF_AN_ERROR = {"error", "error_type", "message", "status", "statusCode"}

#: How half a surrogate pair is spelled, which no file that is written in UTF-8 can hold.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; FileError for anything else."""
    value = read_any_json(path)
    if not isinstance(value, dict):
        raise FileError(f"{path}: not a JSON object.", _REPAIR)
    if "error" in value and value.keys() <= _OF_AN_ERROR:
        what = f"{path}: the error of a server, not the file itself: {str(value['error'])[:200]!r}."
        raise FileError(what, "Fetch it again, after hf auth login where a login is needed.")
    return value


def read_any_json(path: Path, longest: int | None = None) -> Any:
    """The JSON value in `path`, which has at most `longest` bytes; FileError for anything else."""
    if longest is None:
        longest = LONGEST_LIST if path.name.endswith(".index.json") else _LONGEST_CONFIG
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > longest:
            raise FileError(
                f"{path}: {format_bytes(size)} of JSON; the longest file of its kind that is read "
                f"has {format_bytes(longest)}.",
                "Check what the file really is.",
            )
        raw = stream.read(size)
    try:
        return parse_json(raw, path)
    except FileError:
        refuse_failed_download(path, raw[:LOOKED_AT], size, "the file itself")
        raise


def parse_json(raw: bytes, name: object) -> Any:
    """The value of a JSON text; FileError, which calls it `name`, for anything else."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
        if _SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise FileError(f"{name}: not valid JSON (nested without end).", _REPAIR) from None
    except ValueError as error:
        raise FileError(f"{name}: not valid JSON ({error}).", _REPAIR) from None
    return value


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    # Names of files may have bytes that are no characters, which JSON cannot hold.
    path.write_text(text, encoding="utf-8", errors="replace")


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] is not value and found[name] != value:
                raise ValueError(f"{name[:80]!a} stands in it twice, with two values")
    return found


def _number(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unambiguous, parse_int=_number)
