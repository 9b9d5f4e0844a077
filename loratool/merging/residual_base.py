"""Is this the base as published, or what PiSSA or OLoRA left of it?

Both are saved, and look the same. But the factors hold what was taken, X = scale·B·A before
training, so in the directions of A, or in the first columns, the published base is X and the
residual one is (next to) nothing. Training moves the factors a little; the answer has to be clear
all the same, or there is none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loratool.adapters.adapter import Adapter
from loratool.adapters.factors import Matrix
from loratool.adapters.weighting import Weight
from loratool.errors import MatchError
from loratool.merging.initial import DERIVED, changing_adapter
from loratool.merging.match import Delta
from loratool.merging.plan import Plan
from loratool.merging.planning import build_plan
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.treatment import AS_USUAL, Quantised
from loratool.notices import Notice
from loratool.storage.tensors import FilePool
from loratool.storage.values import read_float32
from loratool.words import counted

#: Modules that are looked at.
_SAMPLED = 6
#: How near to one of the two the base must be, as a share of ‖X‖, and how much nearer than to the
#: other.
_NEAR, _NEARER = 0.6, 0.5
#: How near to a residual base that has a multiple of X, which factors may come near by chance.
_VERY_NEAR = 0.3
#: The energy, as a share of the usual one, up to which a base has next to nothing there.
_AVOIDED = 0.25


def plan_on(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float | str | Weight],
    dtype: str = "float16",
    allow_unmatched: bool = False,
    components: Sequence[str] = (),
    initial: Adapter | None = None,
    quantised: Quantised = AS_USUAL,
) -> Plan:
    """`build_plan` for whichever base this is: of a residual one nothing is taken off again.

    Where an adapter's initialisation changed its base, a few tensors are read to tell.
    """
    given = base, adapters, weights, dtype, allow_unmatched, components
    if not any(_tells(adapter) for adapter in adapters):
        return build_plan(*given, initial, quantised=quantised)
    plainly = build_plan(*given, as_it_is=True, quantised=quantised)
    is_residual = _is_residual(plainly)
    if is_residual:
        _refuse_leaving_out(base, adapters)
    if is_residual and initial is None:
        changing_adapter(adapters, plainly.weights, initial)
        plainly.notices.append(_note(base))
        return plainly
    if is_residual:
        raise MatchError(
            f"{base.label} is what the initialisation left of the base: what --initial says was "
            "taken off it is off already.",
            "Merge without --initial, or into the base as published.",
        )
    plan = build_plan(*given, initial, quantised=quantised)
    if is_residual is None and initial is None:
        raise MatchError(
            f"{base.label} is neither clearly the base that the adapter was made for, nor clearly "
            "what its initialisation left of that: in the directions of the factors it is like "
            "neither.",
            "Check that this is the base. If it is, give the adapter as it was before training: "
            "--initial ADAPTER. If it is what was left, set init_lora_weights to true in "
            "adapter_config.json.",
        )
    return plan


def _refuse_leaving_out(base: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Raise MatchError where modules would stay without what the initialisation took off them."""
    for adapter in adapters:
        if _tells(adapter) and adapter.left_out:
            raise MatchError(
                f"{base.label} is what the initialisation of {adapter.label} left of its base, so "
                f"without the adapter {counted(len(adapter.left_out), 'part')} would lack what was "
                "taken.",
                "Merge the whole adapter, or into the base as published.",
            )


def _tells(adapter: Adapter) -> bool:
    return adapter.declared.changed_base.startswith(DERIVED)


def _note(base: Checkpoint) -> Notice:
    text = (
        f"{base.label} is what the adapter's initialisation left of the published base, so the "
        "adapter was merged into it as it is."
    )
    return Notice("residual-base", text, base.label)


def _is_residual(plan: Plan) -> bool | None:
    """Whether what the initialisation took is off the base already; None where it is not clear."""
    changed = {
        id(module): adapter.declared.changed_base
        for adapter in plan.adapters
        if _tells(adapter)
        for module in adapter.modules.values()
    }
    tensors = plan.base.tensors
    deltas = [
        delta
        for job in plan.weight_jobs
        if job.source is tensors.get(job.name)
        for delta in job.deltas
        if id(delta.factors) in changed
        and delta.factors.kind == "linear"
        and delta.place.shape(job.source.shape) == delta.factors.shape
    ]
    sampled = deltas[:: max(1, math.ceil(len(deltas) / _SAMPLED))]
    plan.base.fetch({delta.tensor for delta in sampled})
    found = []
    with FilePool() as files:
        for delta in sampled:
            pair = delta.factors.left_right(files)
            info = tensors[delta.tensor]
            weight = delta.place.part(read_float32(info, files).reshape(info.shape))
            if pair is not None and np.isfinite(weight).all():
                measured = _measured(changed[id(delta.factors)], delta, weight, *pair)
                found += [measured] if measured is not None else []
    if not found:
        return False  # nothing was taken, and nothing is there to be told apart
    return _judged(found)


@dataclass(frozen=True)
class _Measured:
    """The weight where X is large: how far it is from what a `published` base is there, and from
    what a `residual` one is, as shares of ‖X‖.

    `share` is its energy there, as a multiple of that of as many directions taken at random; `left`
    what a residual base has there, as a multiple of X.
    """

    published: float
    residual: float
    share: float
    left: float


def _judged(found: Sequence[_Measured]) -> bool | None:
    published = math.sqrt(sum(m.published**2 for m in found) / len(found))
    residual = math.sqrt(sum(m.residual**2 for m in found) / len(found))
    near, far = sorted((published, residual))
    if near > _NEAR or near > _NEARER * far:
        return None
    if published < residual:
        return False
    # Factors that training led far away are near to nothing too; but they do not avoid the weight.
    if all(m.left == 0 for m in found):
        return True if max(m.share for m in found) < _AVOIDED else None
    return True if near < _VERY_NEAR else None


def _measured(how: str, delta: Delta, weight: Matrix, b: Matrix, a: Matrix) -> _Measured | None:
    """None where X is zero."""
    scale = delta.scale
    if how == "olora":
        # The first r columns, of the weight as it is stored, are all Q_r·R_r: a residual base has
        # 1 - scale times them.
        stored = weight.T if delta.place.transposed else weight
        here, held, left = stored[:, : b.shape[1]], b @ a[:, : b.shape[1]], 1 - scale
    else:
        directions = np.linalg.qr(a.T.astype(np.float64))[0].astype(np.float32)
        here, held, left = weight @ directions, scale * (b @ (a @ directions)), 0.0
    length = float(np.linalg.norm(held))
    if not length > 0 or here.shape != held.shape:
        return None
    usual = float(np.linalg.norm(weight)) ** 2 * here.shape[1] / weight.shape[1]
    return _Measured(
        float(np.linalg.norm(here - held)) / length,
        float(np.linalg.norm(here - left * held)) / length,
        float(np.linalg.norm(here)) ** 2 / usual if usual > 0 else 0.0,
        left,
    )
