"""Which tensor of the base each part of an adapter belongs to, decided from headers alone.

`match` places every module, replaced tensor and token row, or lists it as unmatched with the
reason. It computes nothing and refuses nothing that is merely absent: `merge` refuses, `inspect
--base` reports.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.multiplicative import could_multiply
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import Factors
from loratool.merging.match import Delta, Match, no_such, outside_of
from loratool.merging.replacing import place_functions, place_replaced
from loratool.models.layouts.components import Hint, Wanted
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.naming import choose_naming
from loratool.models.layouts.overlap import Target
from loratool.models.layouts.parameter import MisfitError
from loratool.models.layouts.place import Place
from loratool.notices import Notice
from loratool.paths import matches
from loratool.storage.tensors import TensorInfo


def match(adapter: Adapter, layout: Layout) -> Match:
    """Place the parts of `adapter` in the base of `layout`."""
    wanted = [
        Wanted(m.weight_name, m.shape, experts=m.experts if isinstance(m, ExpertStack) else None)
        for m in adapter.modules.values()
    ]
    wanted += [
        Wanted(function.weight_name, function.shape)
        for function in adapter.functions.values()
        if function.shape is not None and not function.optional
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
    for one in wanted if layout.holdings.has_blocks else ():
        for segment in layout.holdings.names.segments(one.name) if one.shape else ():
            layout.holdings.known_rows[segment.memory] = one.shape[0]
    found = Match(adapter, choose_naming(layout, wanted, hints))
    place_replaced(found, layout)
    stacks = []
    for module in adapter.modules.values():
        if isinstance(module, ExpertStack):
            stacks.append(module)
        else:
            _match_module(found, layout, module)
    place_functions(found, layout)
    # The shapes of one stack may tell what those of a square one do not.
    ways: set[bool] = set()
    for stack in sorted(stacks, key=lambda stack: stack.shape[0] == stack.shape[1]):
        _match_stack(found, layout, stack, ways)
    for path, rows in adapter.token_rows.items():
        name = found.naming(f"{path}.weight")
        name = layout.name_of(name) or name
        target = _target(found, layout, name)
        if not layout.admits(name):
            found.unmatched.append((rows.rows.name, outside_of(name, layout)))
        elif target is None:
            found.unmatched.append((rows.rows.name, no_such(found, name, layout.base)))
        elif target.shape[1:] != rows.rows.shape[1:] or any(
            index >= target.shape[0] for index in rows.indices
        ):
            reason = f"rows {list(rows.rows.shape)} do not fit {name} {list(target.shape)}"
            found.unmatched.append((rows.rows.name, reason))
        else:
            found.rows.append((name, rows))
    if found.unmatched and not stacks:
        _perhaps_multiplicative(found, layout)
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
        found.unmatched.append((module.path, outside_of(name, layout)))
        return
    place = _place(found, layout, name, module)
    reason = _misfit(module, target, place)
    if not reason and module.bias is not None and f"{base_path}.bias" not in layout.base.tensors:
        reason = "it trains a bias (lora_bias), but the base layer has none to add it to"
    if reason:
        found.unmatched.append((module.path, reason))
        return
    found.deltas.append(Delta(place, module))
    if module.bias is not None:
        found.biases.append((f"{base_path}.bias", module))


def _place(found: Match, layout: Layout, name: str, module: Factors) -> Place:
    """The place of a module in the tensor `name` of the base."""
    flag = found.adapter.declared.transposes
    place = layout.place(name, module.kind, flag, module.shape)
    if matches(module.path, found.adapter.told.fan_in_fan_out):
        place = replace(place, transposed=True)
    return place


def _match_parts(found: Match, layout: Layout, module: Factors, name: str) -> None:
    """Place a module whose weight the base holds in parts, or as a part of another one."""
    if not layout.has(name):
        reason = no_such(found, name, layout.base)
    elif module.kind != "linear":
        reason = f"the base holds {name} otherwise, which is known for linear layers only"
    elif module.bias is not None:
        reason = "it trains a bias (lora_bias), which the base holds otherwise"
    elif module.magnitude is not None and module.magnitude.numel != module.shape[0]:
        reason = _wrong_magnitude(module)
    elif matches(module.path, found.adapter.told.fan_in_fan_out):
        reason = f"--fan-in-fan-out is for weights that are one tensor, and the base holds {name} "
        reason += "otherwise"
    else:
        try:
            targets = layout.targets(name, module.shape)
        except MisfitError as error:
            reason = str(error)
        else:
            _add_targets(found, layout, module.path, [(t, module) for t in targets])
            return
    found.unmatched.append((module.path, reason))


def _match_stack(found: Match, layout: Layout, stack: ExpertStack, ways: set[bool]) -> None:
    """Place factors of a parameter that has a matrix for each expert.

    Their product is added as it is or transposed, which the shapes tell, and for square matrices
    the version of PEFT that made the adapter, or else `ways`: those of the stacks before it.
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
        names = layout.holdings.names
        told = stack.orientation(names.transposed_experts) if names.is_known else None
        if told is None and len(ways) == 1:
            told = next(iter(ways))
        if told is None:
            reason = (
                f"its matrices are square, {list(stack.shape)}, and nothing tells whether they are "
                "added as they are or transposed: that takes peft_version in its config, and an "
                "architecture that is known"
            )
            fitting = {}
        else:
            swapped = told
    if not fitting:
        found.unmatched.append((stack.weight_name, reason))
        return
    if len(fitting) == 1:
        ways.add(swapped)
    pairs = [(t, stack.expert(t.member or 0, swapped)) for t in fitting[swapped]]
    _add_targets(found, layout, stack.weight_name, pairs)


def _note_usual(layout: Layout) -> None:
    """Say once that the rows of experts are those of the architectures that are known."""
    if all(notice.code != "usual-experts" for notice in layout.notices):
        kind = layout.base.model_type or "a base without a model_type"
        text = (
            f"{kind} is not an architecture that is known: gate_up_proj of its experts is taken "
            "for gate above up, as in all others that name experts so. `verify` holds a merge of "
            "another program against this one."
        )
        layout.notices.append(Notice("usual-experts", text, layout.base.label))


def _add_targets(
    found: Match, layout: Layout, what: str, targets: Sequence[tuple[Target, Factors]]
) -> None:
    outside = [t.place.tensor for t, _ in targets if not layout.admits(t.place.tensor)]
    if outside:
        found.unmatched.append((what, outside_of(outside[0], layout)))
        return
    found.deltas += [Delta(t.place, factors, rows=t.rows) for t, factors in targets]
    names = layout.holdings.names
    if not names.is_known and any(t.rows is not None or t.place.rows is not None
                                  for t, _ in targets):  # fmt: skip
        _note_usual(layout)


def _misfit(module: Factors, target: TensorInfo, place: Place) -> str:
    """Why the module's delta does not fit its place; "" where it does."""
    stored, outline = target.shape, module.outline
    if outline.flat and len(stored) > 2:
        wanted: tuple[int, ...] = module.shape
        fits = (stored[0], math.prod(stored[1:])) == wanted
    elif module.kind == "conv":
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
        return (
            f"its shapes do not fit: B·A gives {list(wanted)}, {target.name} is {list(stored)}"
            + _perhaps(module, place, stored)
        )
    if module.magnitude is not None and module.magnitude.numel != outline.out:
        return _wrong_magnitude(module)
    return ""


def _perhaps(module: Factors, place: Place, stored: Sequence[int]) -> str:
    """What factors could be that do not fit, and the option that says so."""
    if len(stored) != 2 or module.kind != "linear":
        return ""
    out, width = place.shape(stored)
    if module.shape == (width, out):
        return "; they fit the other way round: is it stored [in, out] (--fan-in-fan-out)?"
    return ""


def _perhaps_multiplicative(found: Match, layout: Layout) -> None:
    """Say of what does not fit that it could be multiplicative, where all of the adapter could."""
    shapes = {}
    for path, module in found.adapter.modules.items():
        name = found.naming(module.weight_name)
        target = _target(found, layout, name)
        name = layout.name_of(name) or name
        if target is None or len(target.shape) != 2 or not layout.admits(name):
            return
        place = _place(found, layout, name, module)
        shapes[path] = place.shape(target.shape)
    if could_multiply(found.adapter, shapes):
        found.unmatched = [
            (what, reason + _MULTIPLICATIVE if what in shapes else reason)
            for what, reason in found.unmatched
        ]


_MULTIPLICATIVE = "; A is as wide as the weight has rows, as in W + s·B·A·W (--kind multiplicative)"


def _wrong_magnitude(module: Factors) -> str:
    assert module.magnitude is not None
    count = module.magnitude.numel
    return f"its DoRA magnitude has {count} values for {module.outline.out} rows"


def _target(found: Match, layout: Layout, name: str) -> TensorInfo | None:
    """The tensor that a delta or token rows change, or None.

    A replacement from the same adapter comes first; what is tied is the tensor that it is.
    """
    name = layout.name_of(name) or name
    target = found.replaced.get(name) or layout.base.tensors.get(name)
    if target is None and name in layout.aliases:
        whole = layout.aliases[name]
        target = found.replaced.get(whole) or layout.base.tensors[whole]
    return target
