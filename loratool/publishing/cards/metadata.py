"""The YAML at the beginning of a card: found, and read within bounds."""

from __future__ import annotations

import re
from typing import Any

from loratool.errors import FileError
from loratool.storage.yamltext import load_yaml

#: Where the block is; group 2 is the YAML. As huggingface_hub has it, but with no other line breaks
#: than these, in linear time.
BLOCK = re.compile(r"\A(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|\Z))")


def read_metadata(text: str) -> dict[Any, Any]:
    """The values of a card's YAML, {} without any. Raises FileError for YAML out of bounds."""
    found = BLOCK.search(text.removeprefix("\ufeff"))
    return read_yaml(found[2]) if found else {}


def read_yaml(block: str) -> dict[Any, Any]:
    """The values of a YAML block. Raises FileError for what is out of bounds, or no mapping."""
    try:
        return load_yaml(block)
    except ValueError as error:
        raise FileError(
            f"README.md: the YAML at its beginning is not valid ({error}).",
            "Repair it, or remove it; a new one is made then.",
        ) from None
