"""The parameters of a model as they are in memory, whatever its files call them and cut them into.

An adapter names what PEFT sees: the modules of a model in memory. So a parameter is a tensor that
is made of views of those in the files: one of them, rows of one, several together, or for a stack
of experts a matrix for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.assembly import assembled, view_of
from loratool.models.layouts.holding import Holdings
from loratool.models.layouts.names import is_legacy_buffer
from loratool.models.layouts.parameter import MisfitError
from loratool.models.layouts.place import Place
from loratool.models.layouts.table import Segment
from loratool.storage.composed import joined
from loratool.storage.tensors import TensorInfo

#: Modules whose weight is a stack: their parameter is called like that of a layer.
_PARALLEL = ("input_linear", "output_linear")


@dataclass(frozen=True)
class ModelParameter:
    """One parameter, by its `name` in memory.

    `members` are the matrices of a stack, and () where there is none. `trouble` says why the files
    cannot be read as this parameter; then there are no values.
    """

    name: str
    info: TensorInfo
    members: tuple[TensorInfo, ...] = ()
    trouble: str = ""


def is_bare(name: str) -> bool:
    """Whether a name is that of a parameter that a module of experts holds without a layer."""
    path, _, leaf = name.rpartition(".")
    experts = any(part.endswith("experts") for part in path.split("."))
    return experts and leaf not in ("weight", "bias")


def parameters_of(model: Checkpoint, holdings: Holdings) -> dict[str, ModelParameter]:
    """All parameters of a model by their names in memory, without old buffers."""
    stacks: dict[str, bool] = {}
    infos: dict[str, TensorInfo] = {}
    for name, info in model.tensors.items():
        if is_legacy_buffer(name, info.shape):
            continue
        for part in holdings.names.segments(name):
            stack = part.expert is not None or part.stacked or _is_stack(part.memory, info.shape)
            stacks[part.memory] = stacks.get(part.memory, False) or stack
            infos.setdefault(part.memory, info)
    return {name: _parameter(holdings, name, infos[name], stacks[name]) for name in stacks}


def _is_stack(name: str, shape: tuple[int, ...]) -> bool:
    if len(shape) != 3:
        return False
    path, _, leaf = name.rpartition(".")
    return is_bare(name) or (leaf == "weight" and path.rpartition(".")[2] in _PARALLEL)


def _parameter(holdings: Holdings, name: str, info: TensorInfo, stack: bool) -> ModelParameter:
    try:
        same = _same(holdings, name)
        if stack:
            members = _members(holdings, name, same)
            shape = (len(members), *members[0].shape)
            whole = same or joined(name, shape, members)
            return ModelParameter(name, whole, members)
        return ModelParameter(name, same or _made(holdings, name))
    except MisfitError as error:
        return ModelParameter(name, info, trouble=str(error))


def _same(holdings: Holdings, name: str) -> TensorInfo | None:
    """The tensor that is this parameter as it lies."""
    found = holdings.same(name)
    segments = holdings.names.segments(found.name) if found else ()
    plain = len(segments) == 1 and replace(segments[0], stacked=False) == Segment(name)
    return found if plain else None


def _made(holdings: Holdings, name: str) -> TensorInfo:
    """A parameter that is no one tensor of the files."""
    held = holdings.parameter(name, False).held[0]
    inner = (held.columns,) if held.transposed else held.info.shape[1:]
    return assembled(holdings, name, (held.size, *inner), holdings)[0]


def _members(holdings: Holdings, name: str, same: TensorInfo | None) -> tuple[TensorInfo, ...]:
    """The matrices of a stack, each as one tensor."""
    if same is not None:
        return tuple(
            next(view_of(same, Place(name, expert=number))) for number in range(same.shape[0])
        )
    whole = holdings.parameter(name, True)
    rows, columns = whole.rows, whole.columns
    parts: dict[int, list[tuple[int, TensorInfo]]] = {}
    for target in holdings.targets(name, (rows, columns), whole.experts):
        if isinstance(target.rows, tuple) or (target.rows and target.rows.step != 1):
            raise MisfitError(f"the rows of {target.place.tensor} alternate with others")
        first = target.rows[0] if target.rows else 0
        views = view_of(holdings.tensor(target.place.tensor), target.place)
        parts.setdefault(target.member or 0, []).extend((first, view) for view in views)
    members = []
    for number in sorted(parts):
        own = [view for _, view in sorted(parts[number], key=lambda part: part[0])]
        if len({view.dtype for view in own}) > 1:
            raise MisfitError(f"its parts have different dtypes, see {own[0].name}")
        shape = (rows, columns)[: len(own[0].shape)]
        members.append(own[0] if len(own) == 1 else joined(own[0].name, shape, own))
    return tuple(members)


def renamed(
    parameters: Mapping[str, ModelParameter], old: str, new: str
) -> dict[str, ModelParameter]:
    """The parameters, and under the name `new` the one called `old` too."""
    return {**parameters, new: replace(parameters[old], name=new)}
