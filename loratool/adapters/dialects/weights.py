"""The weights that an adapter without a config is for, and what their shapes allow."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from loratool.adapters.told import Told
from loratool.errors import AdapterError, MatchError
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.names import CONV1D, is_lookup
from loratool.models.layouts.naming import choose_naming
from loratool.models.layouts.parameter import MisfitError
from loratool.paths import matches
from loratool.storage.tensors import TensorInfo

#: Layers that some architecture stores `[in, out]`.
_MAYBE_TURNED = re.compile("|".join(sorted(set(CONV1D.values()))))


def is_table(path: str) -> bool:
    """Whether the module at a path looks rows up; scripts also call theirs `emb`."""
    leaf = path.rpartition(".")[2].lower()
    return is_lookup(path) or "emb" in leaf.split("_")


class AdaptedWeights:
    """Where an adapter's weights are in the base; without one, those that the file itself holds.

    `wanted` are the weights by their names and possible shapes, `own` the tensors of the model that
    lie in the file.
    """

    def __init__(
        self,
        base: Checkpoint | None,
        wanted: Iterable[Wanted],
        own: Mapping[str, TensorInfo],
        told: Told,
    ) -> None:
        self._own = own
        self._told = told
        self.layout = Layout(base) if base is not None else None
        self._naming = None
        if self.layout is not None:
            try:
                self._naming = choose_naming(self.layout, list(wanted))
            except MatchError:
                # Several parts of the base take it: which one a merge is told, or it is refused.
                self.layout = None

    def tensor(self, name: str) -> TensorInfo | None:
        """The tensor of the base that the adapter calls `name`."""
        if self.layout is None or self._naming is None:
            return None
        return self.layout.tensor_of(self._naming(name))

    def has(self, name: str) -> bool:
        """Whether the base holds a parameter of this name, in whatever form."""
        return (
            self.layout is not None
            and self._naming is not None
            and self.layout.has(self._naming(name))
        )

    def is_turned(self, path: str, shape: tuple[int, int]) -> bool:
        """Whether the base stores the weight at `path` `[in, out]`. Raises AdapterError where the
        user says so and the base's architecture does not."""
        info = self.tensor(f"{path}.weight")
        assert self.layout is not None
        assert info is not None
        kind = "embedding" if is_table(path) else "linear"
        said = matches(path, self._told.fan_in_fan_out)
        turned = self.layout.place(info.name, kind, False, shape).transposed
        model_type = self.layout.base.model_type
        if said and not turned and model_type and not self._told.override:
            raise AdapterError(
                f"{path}: --fan-in-fan-out says that its weight is stored [in, out], but in "
                f"{model_type}, the base's architecture, {info.name} is stored [out, in].",
                "Omit the option for this module, or add --override if the base is otherwise.",
            )
        return said or turned

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The shape `[out, in, …]` of the weight at `path`; None where no single tensor is known to
        be it."""
        name = f"{path}.weight"
        if self.layout is None:
            held = self._own.get(name)
            if held is None or (len(held.shape) == 2 and _MAYBE_TURNED.search(path)):
                return None
            return held.shape[::-1] if len(held.shape) == 2 and is_table(path) else held.shape
        info = self.tensor(name)
        if info is None:
            return None
        if len(info.shape) != 2:
            return info.shape
        return info.shape[::-1] if self.is_turned(path, info.shape) else info.shape

    def fits(self, path: str, shape: tuple[int, int]) -> bool | None:
        """Whether a delta of this `(out, in)` fits the weight at `path`; None where no weight is
        known."""
        stored = self.shape(path)
        if stored is not None:
            return bool(stored) and (stored[0], math.prod(stored[1:])) == shape
        name = f"{path}.weight"
        if self.layout is None or self._naming is None or not self.has(name):
            return None
        try:
            return bool(self.layout.targets(self._naming(name), shape))
        except MisfitError:
            return False
