"""The ways in which adapters lie in files: a list of dialects, one of which claims a file."""

from __future__ import annotations

from loratool.adapters.dialects.dialect import Dialect, Evidence, WritableDialect
from loratool.adapters.dialects.gguf import Gguf
from loratool.adapters.dialects.hand import Hand
from loratool.adapters.dialects.litgpt import Litgpt
from loratool.adapters.dialects.loralib import Loralib
from loratool.adapters.dialects.mlx import Mlx
from loratool.adapters.dialects.native import Native
from loratool.adapters.dialects.peft import Peft
from loratool.adapters.dialects.tinker import Tinker
from loratool.adapters.dialects.torchtune import Torchtune
from loratool.adapters.dialects.writing import Writer
from loratool.errors import AdapterError, unknown

#: The dialect that combine, resize and extract write.
WRITTEN: WritableDialect = Peft()

DIALECTS: tuple[Dialect, ...] = (
    WRITTEN,
    Mlx(),
    Litgpt(),
    Torchtune(),
    Tinker(),
    Gguf(),
    Hand(),
    Loralib(),
    Native(),
)

#: What adapters can be converted to, by name.
TARGETS: dict[str, Writer] = {d.name: d for d in DIALECTS if isinstance(d, Writer)}


def claimed_by(
    evidence: Evidence, told: str | None = None, override: bool = False
) -> tuple[Dialect, str] | None:
    """The dialect of a file and what it is in words; None where no dialect claims it.

    A dialect that the user named (`told`) reads the file whatever it looks like, unless another one
    claims it and that one does not accept it: that takes `override`. Raises AdapterError where
    several do: which formula holds must not be a matter of their order.
    """
    claims = [(d, words) for d in DIALECTS if (words := d.claims(evidence)) is not None]
    if told is not None:
        named = next((d for d in DIALECTS if d.name == told), None)
        if named is None:
            raise unknown("dialect", told, [d.name for d in DIALECTS])
        words = next((words for d, words in claims if d is named), f"of {told}, as was said")
        if claims and not named.accepts(evidence) and not override:
            raise AdapterError(
                f"--from {told}: the file is {claims[0][1]}.", "Omit --from, or add --override."
            )
        return named, words
    if len(claims) > 1:
        raise AdapterError(
            f"The file could be {' or '.join(words for _, words in claims)}.",
            f"Say which it is: --from {' or --from '.join(d.name for d, _ in claims)}.",
        )
    return claims[0] if claims else None
