"""What the user wants of which module: factors, the whole tensor, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from loratool.errors import UsageError
from loratool.extracting.kinds import FACTORED, Group
from loratool.models.layouts.names import HEAD
from loratool.paths import matches, path_hint

#: Groups that `save` asks for, and that are saved whole then: vLLM refuses adapters that have them,
#: llama.cpp drops norms without a word, and in most fine-tunes they hold next to nothing of the
#: change.
SAVED_ON_REQUEST = ("norms", "biases")

#: All groups that are in the adapter only on request. LoRAX, TGI and exllamav3 drop the factors of
#: embeddings without a word, and vLLM and SGLang refuse embeddings of positions, which are whole.
ON_REQUEST = (*SAVED_ON_REQUEST, "embeddings")

#: What becomes of a tensor. "unasked" is one of `ON_REQUEST` that nobody asked for, "left" what the
#: user does not want.
Fate = Literal["factors", "whole", "unasked", "left"]


@dataclass(frozen=True)
class Selection:
    """`include` and `exclude` are globs on module paths. `save` too, or a group of
    `SAVED_ON_REQUEST`. With `embeddings` these are wanted."""

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    skip: Sequence[str] = ()
    save: Sequence[str] = ()
    embeddings: bool = False

    @property
    def _globs(self) -> list[str]:
        return [entry for entry in self.save if entry not in SAVED_ON_REQUEST]

    def _asks_for(self, group: Group) -> bool:
        return self.embeddings if group == "embeddings" else group in self.save

    def fate(self, path: str, group: Group) -> Fate:
        """What the user wants for a module of this path and group."""
        chosen = (not self.include or matches(path, self.include)) and not matches(
            path, self.exclude
        )
        head = "heads" in self.skip and HEAD.search(path) is not None
        if not chosen or head or group in self.skip:
            return "left"
        if matches(path, self._globs):
            return "whole"
        if group in ON_REQUEST and not self._asks_for(group):
            return "unasked"
        return "factors" if group in FACTORED else "whole"

    def check(self, modules: Iterable[str]) -> None:
        """Raise UsageError for a glob that fits no module."""
        paths = sorted(modules)
        asked = {"include": self.include, "exclude": self.exclude, "save": self._globs}
        for option, globs in asked.items():
            for glob in globs:
                if any(matches(path, [glob]) for path in paths):
                    continue
                hint = path_hint(glob, paths)
                if option == "save" and glob == "embeddings":
                    hint = "--embeddings gives them factors; --save embed_tokens saves one whole."
                raise UsageError(f"--{option} {glob!r} matches no module.", hint)
