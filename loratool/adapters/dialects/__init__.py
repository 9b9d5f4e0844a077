"""The ways in which adapters lie in files: a list of dialects, one of which claims a file."""

from __future__ import annotations

from typing import Any

from loratool.adapters.dialects.dialect import Dialect, WritableDialect
from loratool.adapters.dialects.peft import Peft
from loratool.errors import AdapterError
from loratool.storage.tensors import TensorInfo

#: The dialect that combine, resize and extract write.
WRITTEN: WritableDialect = Peft()

DIALECTS: tuple[Dialect, ...] = (WRITTEN,)


def claimed_by(
    tensors: dict[str, TensorInfo], config: dict[str, Any], top: str
) -> tuple[Dialect, str] | None:
    """The dialect of a file and what it is in words; None where no dialect claims it.

    Raises AdapterError where several do: which formula holds must not be a matter of their order.
    """
    claims = [(d, words) for d in DIALECTS if (words := d.claims(tensors, config, top)) is not None]
    if len(claims) > 1:
        raise AdapterError(
            f"The file could be {' or '.join(words for _, words in claims)}.",
            "Save it again with the program that made it, or report this.",
        )
    return claims[0] if claims else None
