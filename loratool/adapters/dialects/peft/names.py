"""The keys of a PEFT file: from paths and kinds of modules to names of tensors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from loratool.adapters.dialects.prefixes import unwrapped, without_peft, wrappers_in
from loratool.adapters.factors import ModuleShape
from loratool.models.layouts.names import HEAD
from loratool.notices import Notice
from loratool.words import counted, enumerated

_PREFIX = "base_model.model."

#: What Tinker calls experts and head in files that are otherwise PEFT's.
_OF_TINKER = re.compile(r".*\.(experts\.w[123]|unembed_tokens)\.lora_[AB](\.[^.]+)?\.weight")


def is_of_tinker(keys: Iterable[str]) -> bool:
    """Whether keys look like PEFT's and are of Tinker, whose names mean something else."""
    return any(map(_OF_TINKER.fullmatch, keys))


def says_where(path: str) -> bool:
    """Whether a path in target_modules means one module: PEFT takes it for the end of longer ones.

    A name without a dot easily is such an end, but not that of a head, which is the only module
    called so. With it the list can stay a list: SGLang refuses an expression in its place.
    """
    return "." in path or HEAD.search(path) is not None


def factor_shapes(
    outline: ModuleShape, rank: int
) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """The keys and shapes of lora_A and lora_B of a module at this rank."""
    path = _PREFIX + _stored_path(outline)
    if outline.kind == "experts":
        rows = outline.experts * rank
        return (f"{path}.lora_A.weight", (rows, *outline.inner)), (
            f"{path}.lora_B.weight", (outline.out, rows),
        )  # fmt: skip
    if outline.kind == "embedding":
        return (f"{path}.lora_embedding_A", (rank, *outline.inner)), (
            f"{path}.lora_embedding_B", (outline.out, rank),
        )  # fmt: skip
    ones = (1,) * (len(outline.inner) - 1)
    return (f"{path}.lora_A.weight", (rank, *outline.inner)), (
        f"{path}.lora_B.weight", (outline.out, rank, *ones),
    )  # fmt: skip


def _stored_path(outline: ModuleShape) -> str:
    if outline.kind == "attention-out":
        return f"{outline.path.removesuffix('.out_proj')}.base_layer.out_proj"
    # The wrapper of the parameter that was registered first is the innermost one.
    return outline.owner + ".base_layer" * outline.above


def bias_key(path: str) -> str:
    return f"{_PREFIX}{path}.lora_B.bias"


def magnitude_key(path: str) -> str:
    return f"{_PREFIX}{path}.lora_magnitude_vector"


def saved_key(name: str, key: str, adapted: Mapping[str, int]) -> str:
    """The key of a tensor `name` that replaces one of the base, and was called `key` in its file.

    The original of an adapted module is called `base_layer`, once for each of its `adapted`
    parameters; there it is the one to replace.
    """
    owner, _, leaf = name.rpartition(".")
    if owner in adapted:
        return f"{_PREFIX}{owner}{'.base_layer' * adapted[owner]}.{leaf}"
    plain = plain_path(key)
    kept = ".token_adapter.base_layer." in plain
    return _PREFIX + (plain if kept else name)


def rows_key(key: str) -> str:
    return _PREFIX + plain_path(key).removesuffix(".default")


def plain_path(key: str) -> str:
    """A key without the prefixes of PEFT, of training frameworks and of scripts."""
    return unwrapped(without_peft(unwrapped(key)))


def proper_keys(keys: Iterable[str]) -> dict[str, str]:
    """The keys that PEFT writes in place of those that hold something else, by these."""
    return {key: _PREFIX + plain_path(key) for key in keys if wrappers_in(key)}


def note_wrappers(keys: Iterable[str]) -> list[Notice]:
    """One notice of what was taken off the keys; none where they are as PEFT writes them."""
    counts: Counter[str] = Counter(wrapper for key in keys for wrapper in wrappers_in(key))
    if not counts:
        return []
    text = (
        f"{counted(max(counts.values()), 'name', 'holds')} {enumerated(list(counts))}, which "
        "training puts around a model; it was taken off."
    )
    return [Notice("names-unwrapped", text)]
