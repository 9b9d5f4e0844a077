"""What transformers makes of a model's names and tensors on the way to a file, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    revert_weight_conversion,
)

from helpers.tiny.reading_off import Origins, Piece, number

Shapes = dict[str, tuple[int, ...]]

#: Conversions that no table can say, of parameters that are no matrices: two in a new axis.
_UNSAID = {"Inkling2LoopMergeMessageQueries"}


@dataclass(frozen=True)
class Part:
    """A model inside a model, with a config of its own; the root has an empty path."""

    key: str
    path: str
    config: PretrainedConfig
    model: str

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)


@dataclass(frozen=True)
class Step:
    """What the conversions of one part do: tensors nearer the file, and what of those before each
    is made of."""

    part: Part
    before: Shapes
    after: Shapes
    pieces: Mapping[str, Sequence[Piece]]


def find_parts(model: PreTrainedModel) -> list[Part]:
    """The root and the parts of a model, in the order of its config."""
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel)
    ]
    found = [Part("", "", model.config, type(model).__name__)]
    classes = {name: type(module).__name__ for name, module in modules}
    for key, config in _sub_configs(model.config):
        paths = [name for name, module in modules if module.config is config]
        paths = paths or [
            name
            for name, module in modules
            if module.config.model_type == config.model_type != model.config.model_type
        ]
        outer = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
        found += [Part(key, path, config, classes[path]) for path in outer]
    return found


def _sub_configs(
    config: PretrainedConfig, path: str = ""
) -> Iterator[tuple[str, PretrainedConfig]]:
    for key, value in vars(config).items():
        if isinstance(value, PretrainedConfig) and value.model_type:
            yield path + key, value
            yield from _sub_configs(value, f"{path}{key}.")


def every(transform: Any) -> bool:
    return True


def unprefixed(transform: Any) -> bool:
    """Whether it is no prefix that transformers drops or adds while loading, if it is there."""
    return not isinstance(transform, PrefixChange)


def arranging(transform: Any) -> bool:
    """Whether it changes more than names: alone, as files of transformers 4.52 to 4.57 have it."""
    return isinstance(transform, WeightConverter)


def confined(transform: Any) -> bool:
    """Whether it means its own part of the model: backwards Kimi's `blocks` of the vision tower
    would reach the text's layers too."""
    return transform._original_source_patterns not in (["blocks"], [r"blocks"])


#: Which conversions make a spelling of files.
SPELLINGS = (every, unprefixed, arranging, confined)


class Reversal:
    """The conversions of one model, backwards: all, or only some."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.parts = find_parts(model)
        self.memory: Shapes = {
            name: tuple(value.shape) for name, value in model.state_dict().items() if value.numel()
        }
        modules = dict(model.named_modules())
        self._transforms = []
        removed_before: set[str] = set()
        for transform in get_model_conversion_mapping(model, add_legacy=False):
            operations = getattr(transform, "operations", ())
            if any(type(one).__name__ in _UNSAID for one in (transform, *operations)):
                continue
            scope = _path(transform, modules)
            # Backwards a prefix would come twice where a module above is called so, as CLIP's
            # vision_model, or where the root has the same one; no file has that.
            removed = getattr(transform, "prefix_to_remove", None)
            if removed is None or removed not in (*scope.split("."), *removed_before):
                removed_before |= {removed} if removed else set()
                owners = [p for p in self.parts if _is_under(scope, p.path)]
                self._transforms.append((max(owners, key=lambda p: len(p.path)), transform))

    def steps(self, wanted: Callable[[Any], bool]) -> list[Step]:
        """One step for each part that has such conversions, the inner ones first, the root last."""
        found = []
        shapes = self.memory
        for part in sorted(self.parts, key=lambda part: -len(part.path)):
            own = [
                transform
                for owner, transform in self._transforms
                if owner is part and wanted(transform)
            ]
            if own:
                found.append(self._step(part, shapes, own))
                shapes = found[-1].after
        return found

    def maybe_transposed(self) -> list[str]:
        """Parameters whose files may have them the other way round, which only the shape tells."""
        found = []
        for _, transform in self._transforms:
            if any(getattr(op, "check_dims", False) for op in getattr(transform, "operations", ())):
                (end,) = transform._original_target_patterns
                found += [name for name in self.memory if name.endswith(end)]
        return found

    def spellings(self) -> Iterator[Step]:
        """All names that this model's tensors may have, and what each tensor is in memory: the
        files' with and without prefixes, and those between, of memory but for the experts or for
        what is inside a part."""
        root = self.parts[0]
        inner = [transform for owner, transform in self._transforms if owner is not root]
        seen: list[list[Any]] = [[]]
        every_one = [transform for _, transform in self._transforms]
        for own in (*(list(filter(wanted, every_one)) for wanted in SPELLINGS), inner):
            if own not in seen:
                seen.append(own)
                yield self._step(root, self.memory, own)

    def _step(self, part: Part, shapes: Shapes, transforms: list[Any]) -> Step:
        origins = Origins(shapes)
        self.model._weight_conversions = transforms
        state: dict[str, torch.Tensor] = revert_weight_conversion(self.model, number(shapes))
        pieces = {}
        for name, tensor in state.items():
            try:
                pieces[name] = origins.pieces(tensor)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        after = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return Step(part, shapes, after, pieces)


def _path(transform: Any, modules: Mapping[str, Any]) -> str:
    """The path of the module that a conversion is for."""
    scope = transform.scope_prefix
    if scope is None:
        return ""
    full = ".".join(filter(None, (transform.base_model_prefix, scope)))
    return full if full in modules else scope


def _is_under(path: str, other: str) -> bool:
    return not other or path == other or path.startswith(f"{other}.")
