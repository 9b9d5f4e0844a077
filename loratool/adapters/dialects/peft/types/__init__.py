"""PEFT's types beside LoRA: what each stores for a module, and what that does to its weight."""

from __future__ import annotations

from loratool.adapters.dialects.peft.types import (
    adalora,
    banks,
    blocks,
    decomposed,
    lycoris,
    modulated,
    projections,
    rescaling,
    residual,
    rotations,
    sparse,
    spectral,
    whole_layers,
)
from loratool.adapters.dialects.peft.types.method import PeftMethod

#: By peft_type.
METHODS: dict[str, PeftMethod] = {
    method.code: method
    for method in (
        adalora.ADALORA, lycoris.LOHA, lycoris.LOKR, rescaling.IA3, rotations.OFT, rotations.BOFT,
        rotations.HRA, whole_layers.LN_TUNING, projections.VERA, projections.PVERA,
        sparse.SHIRA, sparse.SUPERTUNING, sparse.WAVEFT, spectral.FOURIERFT, spectral.C3A,
        blocks.MISS, blocks.BONE, blocks.GRALORA, blocks.DELORA, banks.VBLORA, banks.UNILORA,
        banks.TINYLORA, projections.RANDLORA, rescaling.ROAD, rescaling.BEFT,
        modulated.HIRA, modulated.GLORA, residual.DEFT, residual.PEANUT,
        decomposed.OSF, decomposed.PSOFT, decomposed.FROD,
    )
}  # fmt: skip
