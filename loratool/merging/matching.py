"""Which tensor of the base each part of an adapter belongs to, decided from headers alone.

`match` places every module, replaced tensor and token row, or lists it as unmatched with the
reason. It computes nothing and refuses nothing that is merely absent: `merge` refuses, `inspect
--base` reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loratool.adapters.adapter import Adapter, TokenRows
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors
from loratool.errors import AdapterError, nearest
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Hint, Wanted
from loratool.models.layouts.holding import MisfitError, Rows, Target
from loratool.models.layouts.layout import Layout, Naming
from loratool.models.layouts.names import is_value_head, is_vocabulary, is_vocabulary_bias
from loratool.models.layouts.naming import choose_naming
from loratool.models.layouts.place import Place
from loratool.models.tasks import CLASSIFYING
from loratool.storage.tensors import TensorInfo


@dataclass(frozen=True)
class Delta:
    """Factors and the place in the base where they go: `W += weight·scale·Δ` there.

    `weight` is what the user gave the adapter; negative to take it out. Where a base cuts weights
    otherwise than the adapter, each place gets some `rows` of Δ.
    """

    place: Place
    factors: Factors
    weight: float = 1.0
    #: Rows of Δ that go there; all of them where it is None.
    rows: Rows | None = None

    @property
    def tensor(self) -> str:
        return self.place.tensor

    @property
    def scale(self) -> float:
        """The factor of Δ. Raises AdapterError where the adapter has no alpha."""
        if self.factors.scale is None:
            raise AdapterError(
                f"{self.factors.path}: alpha is unknown, because the adapter has no config.",
                "Put adapter_config.json beside the weights.",
            )
        return self.weight * self.factors.scale


@dataclass
class Match:
    """Where the parts of one adapter go, by name of the base tensor.

    `replaced` holds tensors that take the place of one in the base, `added` those it lacks.
    `unmatched` says for each part that found no place why: `(what, reason)`.
    """

    adapter: Adapter
    naming: Naming
    deltas: list[Delta] = field(default_factory=list)
    biases: list[tuple[str, Factors]] = field(default_factory=list)
    rows: list[tuple[str, TokenRows]] = field(default_factory=list)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    added: dict[str, TensorInfo] = field(default_factory=dict)
    unmatched: list[tuple[str, str]] = field(default_factory=list)


def match(adapter: Adapter, layout: Layout) -> Match:
    """Place the parts of `adapter` in the base of `layout`."""
    wanted = [
        Wanted(m.weight_name, m.shape, experts=m.experts if isinstance(m, ExpertStack) else None)
        for m in adapter.modules.values()
    ]
    wanted += [
        Wanted(f"{path}.weight", rows.rows.shape, whole=True)
        for path, rows in adapter.token_rows.items()
    ]
    wanted += [Wanted(name, info.shape, whole=True) for name, info in adapter.replaced.items()]
    declared = adapter.declared
    hints = [
        Hint(field, value)
        for field, value in (
            ("base_model_class", declared.model_class),
            ("task_type", declared.task),
            ("base_model_name_or_path", declared.base_name),
        )
        if value
    ]
    found = Match(adapter, choose_naming(layout, wanted, hints))
    _match_replaced(found, layout)
    for module in adapter.modules.values():
        if isinstance(module, ExpertStack):
            _match_stack(found, layout, module)
        else:
            _match_module(found, layout, module)
    for path, rows in adapter.token_rows.items():
        name = found.naming(f"{path}.weight")
        name = layout.name_of(name) or name
        target = _target(found, layout, name)
        if not layout.admits(name):
            found.unmatched.append((rows.rows.name, _outside(name, layout)))
        elif target is None:
            found.unmatched.append((rows.rows.name, _not_there(found, name, layout.base)))
        elif target.shape[1:] != rows.rows.shape[1:] or any(
            index >= target.shape[0] for index in rows.indices
        ):
            reason = f"rows {list(rows.rows.shape)} do not fit {name} {list(target.shape)}"
            found.unmatched.append((rows.rows.name, reason))
        else:
            found.rows.append((name, rows))
    return found


def _match_module(found: Match, layout: Layout, module: Factors) -> None:
    name = found.naming(module.weight_name)
    target = _target(found, layout, name)
    if target is None:
        _match_parts(found, layout, module, name)
        return
    name = layout.name_of(name) or name
    base_path = name.rpartition(".")[0]
    if not layout.admits(name):
        found.unmatched.append((module.path, _outside(name, layout)))
        return
    flag = found.adapter.declared.transposes
    place = layout.place(name, module.kind, flag, module.shape)
    reason = _misfit(module, target, place)
    if not reason and module.bias is not None and f"{base_path}.bias" not in layout.base.tensors:
        reason = "it trains a bias (lora_bias), but the base layer has none to add it to"
    if reason:
        found.unmatched.append((module.path, reason))
        return
    found.deltas.append(Delta(place, module))
    if module.bias is not None:
        found.biases.append((f"{base_path}.bias", module))


def _match_parts(found: Match, layout: Layout, module: Factors, name: str) -> None:
    """Place a module whose weight the base holds in parts, or as a part of another one."""
    if not layout.has(name):
        reason = _not_there(found, name, layout.base)
    elif module.kind != "linear":
        reason = f"the base holds {name} otherwise, which is known for linear layers only"
    elif module.bias is not None:
        reason = "it trains a bias (lora_bias), which the base holds otherwise"
    else:
        try:
            targets = layout.targets(name, module.shape)
        except MisfitError as error:
            reason = str(error)
        else:
            _add_targets(found, layout, module.path, [(t, module) for t in targets])
            return
    found.unmatched.append((module.path, reason))


def _match_stack(found: Match, layout: Layout, stack: ExpertStack) -> None:
    """Place factors of a parameter that has a matrix for each expert.

    Their product is added as it is or transposed, which the shapes tell, and for square matrices
    the version of PEFT that made the adapter.
    """
    name = found.naming(stack.weight_name)
    single = (
        stack.experts == 1
        and (info := layout.tensor_of(name)) is not None
        and (len(info.shape) == 2)
    )
    fitting = {}
    reason = ""
    for swapped in (False, True):
        shape = stack.shape[::-1] if swapped else stack.shape
        try:
            fitting[swapped] = layout.targets(name, shape, None if single else stack.experts)
        except MisfitError as error:
            reason = reason or str(error)
    swapped = next(iter(fitting), False)
    if len(fitting) == 2:
        told = stack.orientation(layout.holdings.names.entry.transposed_experts)
        if told is None:
            reason = (
                f"its matrices are square, {list(stack.shape)}, and peft_version is not in its "
                "config, so nothing tells which way round they are"
            )
            fitting = {}
        else:
            swapped = told
    if not fitting:
        found.unmatched.append((stack.weight_name, reason))
        return
    pairs = [(t, stack.expert(t.member or 0, swapped)) for t in fitting[swapped]]
    _add_targets(found, layout, stack.weight_name, pairs)


def _add_targets(
    found: Match, layout: Layout, what: str, targets: Sequence[tuple[Target, Factors]]
) -> None:
    outside = [t.place.tensor for t, _ in targets if not layout.admits(t.place.tensor)]
    if outside:
        found.unmatched.append((what, _outside(outside[0], layout)))
        return
    found.deltas += [Delta(t.place, factors, rows=t.rows) for t, factors in targets]


def _misfit(module: Factors, target: TensorInfo, place: Place) -> str:
    """Why the module's delta does not fit its place; "" where it does."""
    stored, outline = target.shape, module.outline
    if module.kind == "conv":
        wanted = (outline.out, *outline.inner)
        if len(stored) == len(wanted) and stored[1] != wanted[1]:
            factor = [module.rank, *outline.inner]
            return (
                f"a grouped convolution: the base is {list(stored)}, lora_A {factor} "
                "reads all channels, so no merged weight exists"
            )
        fits = stored == wanted
    else:
        wanted = module.shape[::-1] if place.transposed else module.shape
        fits = len(stored) == 2 and place.shape(stored) == module.shape
    if not fits:
        return f"its shapes do not fit: B·A gives {list(wanted)}, {target.name} is {list(stored)}"
    if module.magnitude is not None and module.magnitude.numel != outline.out:
        return f"its DoRA magnitude has {module.magnitude.numel} values for {outline.out} rows"
    return ""


def _match_replaced(found: Match, layout: Layout) -> None:
    base = layout.base
    for name, info in found.adapter.replaced.items():
        target_name = found.naming(name)
        target_name = layout.name_of(target_name) or layout.name_of(name) or target_name
        target = base.tensors.get(target_name)
        tied_head = layout.tied is not None and target_name == layout.tied.head
        if target is None and tied_head and layout.tied is not None:
            target = base.tensors[layout.tied.embedding].renamed(target_name)
        if target is None and (_is_saved_head(found.adapter, name) or is_value_head(name)):
            found.added[name] = info
        elif not layout.admits(target_name):
            found.unmatched.append((info.name, _outside(target_name, layout)))
        elif target is None:
            found.unmatched.append((info.name, _not_there(found, target_name, base)))
        elif reason := _replacement_misfit(found.adapter, name, info, target):
            found.unmatched.append((info.name, reason))
        else:
            found.replaced[target.name] = info


def _replacement_misfit(adapter: Adapter, name: str, info: TensorInfo, target: TensorInfo) -> str:
    """Why `info` cannot take the place of `target`; "" where it can.

    A trained head may have another number of classes. An embedding may have grown, or lost the
    padding of its vocabulary (less than a tenth), but fewer rows than that are not an embedding.
    """
    if info.is_float != target.is_float:
        return f"it is {info.dtype}, {target.name} is {target.dtype}"
    if info.shape == target.shape:
        return ""
    same_width = len(info.shape) == len(target.shape) and info.shape[1:] == target.shape[1:]
    if not same_width:
        return f"it is {list(info.shape)}, {target.name} is {list(target.shape)}"
    if is_vocabulary(name) or is_vocabulary_bias(name):
        if info.shape[0] * 10 >= target.shape[0] * 9:
            return ""
        if _is_saved_head(adapter, name) and adapter.declared.task in CLASSIFYING:
            return ""  # a classifier that is called like a language model's head
        return (
            f"it has {info.shape[0]} rows, {target.name} has {target.shape[0]}: perhaps only the "
            "added tokens were saved. Save the whole embedding (modules_to_save)"
        )
    if _is_saved_head(adapter, name):
        return ""
    return f"it is {list(info.shape)}, {target.name} is {list(target.shape)}"


def _is_saved_head(adapter: Adapter, name: str) -> bool:
    # The names are endings: "classifier" saves "pre_classifier" too.
    parts = name.split(".")
    parents = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(parent.endswith(module) for parent in parents for module in adapter.declared.heads)


def _target(found: Match, layout: Layout, name: str) -> TensorInfo | None:
    """The tensor that a delta or token rows change, or None.

    A replacement from the same adapter comes first; a tied head is its embedding.
    """
    name = layout.name_of(name) or name
    target = found.replaced.get(name) or layout.base.tensors.get(name)
    if target is None and layout.tied is not None and name == layout.tied.head:
        embedding = layout.tied.embedding
        target = found.replaced.get(embedding) or layout.base.tensors[embedding]
    return target


def _outside(name: str, layout: Layout) -> str:
    return f"{name} is outside of what --components chose ({', '.join(layout.components)})"


def _not_there(found: Match, name: str, base: Checkpoint) -> str:
    # The nearest name costs a comparison with every tensor of the base, and five are shown.
    near = nearest(name, base.tensors) if len(found.unmatched) < 5 else None
    return f"the base has no {name}" + (f" (nearest: {near})" if near else "")
