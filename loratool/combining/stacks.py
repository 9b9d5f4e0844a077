"""Stacks of experts side by side: each expert of each adapter is a module of its own."""

from __future__ import annotations

from collections.abc import Iterator

from loratool.adapters.adapter import Adapter
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors
from loratool.errors import AdapterError, MatchError, listed
from loratool.words import counted


def refuse_stacks(adapter: Adapter, verb: str) -> None:
    """Raise AdapterError for an adapter with stacks of experts, where one would be written."""
    stacks = [path for path, m in adapter.modules.items() if isinstance(m, ExpertStack)]
    if stacks:
        raise AdapterError(
            f"{adapter.label}: stacks of experts (target_parameters) cannot be {verb} yet:\n"
            + listed(stacks),
            "`loratool merge` merges adapters with stacks, also several, with weights; `loratool "
            "extract` makes an adapter of any rank of what comes out.",
        )


class Unstacked:
    """Takes stacks of several adapters apart, so that the same expert meets in all of them.

    The first stack of a parameter says how its deltas lie; PEFT's versions have them differently,
    so the others are turned to it.
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[Adapter, ExpertStack]] = {}

    def modules(self, adapter: Adapter) -> Iterator[tuple[str, Factors]]:
        """An adapter's modules by path, those of a stack one by one.

        Raises MatchError for stacks that are not of one model, or may lie differently.
        """
        for path, module in adapter.modules.items():
            if not isinstance(module, ExpertStack):
                yield path, module
                continue
            other, first = self._first.setdefault(path, (adapter, module))
            if module.experts != first.experts:
                raise MatchError(
                    f"{path} has {counted(module.experts, 'expert')} in {adapter.label} and "
                    f"{first.experts} in {other.label}, so these adapters are for different base "
                    "models.",
                    "Combine and compare adapters of one base model.",
                )
            if not _lie_alike(module, first):
                raise MatchError(
                    f"{path}: its experts are square, and {adapter.label} (PEFT "
                    f"{module.peft_version or 'unknown'}) may have them transposed to those of "
                    f"{other.label} (PEFT {first.peft_version or 'unknown'}).",
                    "Load and save both with the same version of PEFT.",
                )
            swapped = module.shape != first.shape == module.shape[::-1]
            for index in range(module.experts):
                pair = module.expert(index, swapped)
                yield pair.path, pair


def _lie_alike(one: ExpertStack, other: ExpertStack) -> bool:
    """Whether shapes or versions say how the deltas of one lie to those of the other."""
    square = one.shape[0] == one.shape[1] and one.experts > 1
    if not square or one.peft_version == other.peft_version:
        return True
    known = [[stack.orientation(kind) for kind in (False, True)] for stack in (one, other)]
    return known[0] == known[1] and None not in known[0]
