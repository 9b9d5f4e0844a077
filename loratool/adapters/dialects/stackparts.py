"""What modules are called in the files of a base, and pairs of its experts out of PEFT's stacks.

PEFT adapts all experts of a layer as one parameter of the model in memory, gate and up of them as
one matrix. Dialects with the layers of files need gate, up and down of each expert.
"""

from __future__ import annotations

import re
from functools import cached_property

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.drafting import expert_pairs
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors, LowRank
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted
from loratool.models.layouts.layout import Layout, Naming
from loratool.models.layouts.naming import choose_naming
from loratool.models.layouts.parameter import MisfitError
from loratool.models.layouts.table import Segment
from loratool.storage.composed import row_range, transposed

#: The layers of an expert, by the names that files have for them.
_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_OWNER = re.compile(r"(?P<owner>.+\.experts)\.(\d+\.)?[^.]+(\.weight)?")


class StackParts:
    """Names and parts of an adapter's modules in the files of a base, where one is known."""

    def __init__(self, adapter: Adapter, base: Checkpoint | None) -> None:
        self._adapter = adapter
        self._layout = None if base is None else Layout(base)

    @cached_property
    def _naming(self) -> Naming:
        assert self._layout is not None
        wanted = [
            Wanted(
                m.weight_name, m.shape, experts=m.experts if isinstance(m, ExpertStack) else None
            )
            for m in self._adapter.modules.values()
        ]
        return choose_naming(self._layout, wanted)

    def hub_path(self, module: Factors) -> str | None:
        """The path of a layer in the files; the adapter's own without a base. None where the files
        hold its weight as a part of another, or in parts."""
        if self._layout is None:
            return module.path
        name = self._naming(module.weight_name)
        found = self._layout.name_of(name)
        segments = self._layout.holdings.names.segments(name)
        if found is None and any(segment.expert is not None for segment in segments):
            found = name  # of an expert, whose files have a stack
        if found is None:
            return None if self._layout.has(name) else module.path
        return found.removesuffix(".weight")

    def of_stack(self, path: str, stack: ExpertStack) -> dict[str, LowRank] | str:
        """Pairs by the paths of experts' layers in files, each called `path` itself; or why there
        are none."""
        layout = self._layout
        if layout is None:
            return "how a stack of experts is cut into layers depends on the base: say --base"
        name = self._naming(stack.weight_name)
        segments = layout.holdings.names.segments
        memory = segments(name)[0].memory
        swapped = self._orientation(name, stack)
        if isinstance(swapped, str):
            return swapped
        owner = self._owner(memory)
        leaves: dict[str, Segment] = {}
        for group in _LEAVES if owner else ():
            for leaf in group if not leaves else ():
                (first, *more) = segments(f"{owner}.0.{leaf}.weight")
                if first.memory == memory and first.expert == 0 and not more:
                    leaves[leaf] = first
        if not leaves:
            return f"which layers of the experts {name} holds is not known of this base"
        found = {}
        for number, pair in enumerate(expert_pairs(stack, swapped)):
            a, b = pair.a, pair.b
            if layout.holdings.names.transposed_experts:
                a, b = transposed(b), transposed(a)
            for leaf, segment in leaves.items():
                share = segment.columns or segment.rows
                rows = share.of(b.shape[0]) if share is not None else range(b.shape[0])
                if rows is None:
                    return f"{name} cannot be divided into layers of experts"
                own = b if share is None else row_range(b, rows)
                found[f"{owner}.{number}.{leaf}"] = LowRank(
                    path, "linear", a, own, stack.alpha, stack.scale, scale_from=stack.scale_from
                )
        return found

    def _owner(self, memory: str) -> str:
        """Where files have the experts of a parameter in memory; "" where that is not known."""
        assert self._layout is not None
        segments = self._layout.holdings.names.segments
        for name in self._layout.base.tensors:
            match = _OWNER.fullmatch(name)
            if match and any(segment.memory == memory for segment in segments(name)):
                return match["owner"]
        return ""

    def _orientation(self, name: str, stack: ExpertStack) -> bool | str:
        """Whether Δ is added transposed, by shapes and by who made it; or why nothing tells."""
        assert self._layout is not None
        fitting, reason = [], ""
        for swapped in (False, True):
            shape = stack.shape[::-1] if swapped else stack.shape
            try:
                self._layout.targets(name, shape, stack.experts)
            except MisfitError as error:
                reason = reason or str(error)
            else:
                fitting.append(swapped)
        if len(fitting) == 1:
            return fitting[0]
        names = self._layout.holdings.names
        told = stack.orientation(names.transposed_experts) if fitting and names.is_known else None
        if told is None:
            return reason or "its matrices are square, and nothing tells which way they are added"
        return told
