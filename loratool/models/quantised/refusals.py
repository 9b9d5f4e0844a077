"""What of quantised models is not read, and in which words that is said."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from loratool.errors import BaseError
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.module import Quantisation
from loratool.words import agreeing, counted

_HINT = "Merge into the unquantised model it was made from, then quantise the result."

#: How `quant_method` is called for people, of the methods that are not read.
_UNREAD = {
    "aqlm": "AQLM", "vptq": "VPTQ", "quip": "QuIP#", "spqr": "SpQR", "higgs": "HIGGS",
    "fp-quant": "FP-Quant", "bitnet": "BitNet", "quark": "Quark", "eetq": "EETQ",
    "quanto": "Quanto", "sinq": "SINQ", "exl2": "EXL2", "exl3": "EXL3", "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
}  # fmt: skip

#: Tensors that only quantised checkpoints have, beside or instead of `….weight`.
_PACKED = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|absmax|quant_map|quant_state\..+|nested_absmax|weight_packed|"
    r"weight_scale|weight_scale_inv|weight_scale_2|input_scale|weight_format|scales|W_q|"
    r"_weight_qdata|codes|codebooks|indices|weight_scales|qscale_weight|pre_quant_scale|"
    r"weight_global_scale|had_[KUL])$|_(blocks|scales|scale_inv)$"
)


def refuse_method(base: Checkpoint, settings: Quantisation) -> None:
    """Raise BaseError for a model that is quantised by a method that is known and not read."""
    name = _UNREAD.get(settings.method)
    if name is not None:
        raise BaseError(
            f"{base.label} is quantised with {name}, which loratool cannot read.", _HINT
        )


def unread(base: Checkpoint, names: Collection[str]) -> list[str]:
    """Those of the names whose tensors look like parts of quantised weights."""
    packed = [n for n in names if _PACKED.search(n)]
    return packed + [n for n in names if n.endswith(".weight") and not base.tensors[n].is_float]


def refuse_unread(base: Checkpoint, settings: Quantisation, names: Collection[str]) -> None:
    """Raise BaseError where tensors that are in no quantised weight look like parts of one."""
    packed = unread(base, names)
    if packed:
        said = f" with {settings.method}" if settings.method else ""
        kinds = Counter(base.tensors[n].dtype for n in packed).most_common(1)[0][0]
        raise BaseError(
            f"{base.label} is quantised{said}, in a form that loratool cannot read: "
            f"{counted(len(packed), 'tensor')} such as {packed[0]!r} ({kinds}) "
            f"{agreeing(len(packed), 'holds')} packed weights or their scales.",
            _HINT,
        )
