"""Quantised bases: told by their config and by their tensors, and refused."""

from __future__ import annotations

import re
from collections import Counter

from loratool.errors import BaseError
from loratool.models.checkpoint import Checkpoint
from loratool.storage.fields import value_text
from loratool.words import agreeing, counted

#: Tensors that only quantised checkpoints have, beside or instead of `….weight`.
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state\..+|nested_absmax|weight_packed|"
    r"weight_scale|weight_scale_inv|weight_scale_2|input_scale|weight_format|scales)$|_(blocks|scales)$"
)


def refuse_quantised(
    base: Checkpoint,
    role: str = "base",
    hint: str = "Merge into the unquantised base this one was made from, then quantise the result.",
) -> None:
    """Raise BaseError where the weights are stored quantised, by config or by their tensors."""
    method = base.config.get("quantization_config")
    if not method:
        nested = [v for v in base.config.values() if isinstance(v, dict)]
        found = [v.get("quantization_config") for v in nested]
        method = next((settings for settings in found if settings), {})
    if method:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise BaseError(
            f"{base.label}: a quantised {role} (quantization_config: "
            f"{name if isinstance(name, str) else value_text(method)}). "
            "Its packed weights cannot be computed with.",
            hint,
        )
    packed = [n for n in base.tensors if _QUANTISED.search(n)]
    packed += [n for n, t in base.tensors.items() if n.endswith(".weight") and not t.is_float]
    if packed:
        kinds = Counter(base.tensors[n].dtype for n in packed).most_common(1)[0][0]
        raise BaseError(
            f"{base.label}: a quantised {role}: {counted(len(packed), 'tensor')} such as "
            f"{packed[0]!r} "
            f"({kinds}) {agreeing(len(packed), 'holds')} packed weights or their scales.",
            hint,
        )
