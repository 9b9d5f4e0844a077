"""AWQ's GEMM against its definition, value by value; its weights are others than the original's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import State
from helpers.laying import changed, lay, opened, refusal, same_bits, whole, words_of

#: The column, of eight, whose code is in each place of a word.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def awq(
    inputs: int = 24, outputs: int = 40, group: int = 8, scales: torch.dtype = torch.float16
) -> tuple[State, np.ndarray]:
    """The tensors of one module and what they stand for, float64 `[out, in]`."""
    rng = np.random.default_rng(inputs)
    group = inputs if group == -1 else group
    groups = inputs // group
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
    scale = torch.from_numpy(rng.standard_normal((groups, outputs))).to(scales)
    real = scale.double().numpy()

    def packed(values: np.ndarray) -> torch.Tensor:
        return words_of(values.reshape(len(values), -1, 8)[..., ORDER].reshape(values.shape), 4)

    expected = np.array(
        [
            [(codes[i, o] - zeros[i // group, o]) * real[i // group, o] for i in range(inputs)]
            for o in range(outputs)
        ]
    )
    stored = {"m.qweight": packed(codes), "m.qzeros": packed(zeros), "m.scales": scale}
    return stored, expected


def table(group: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm",
        "zero_point": True, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "outputs", "group"), [(24, 40, 8), (30, 8, 5), (13, 24, -1), (7, 16, 1)]
)
def test_values(inputs: int, outputs: int, group: int, tmp_path: Path) -> None:
    """(code − zero)·scale, without the one that GPTQ takes off; rows begin within a word."""
    tensors, expected = awq(inputs, outputs, group)
    base = opened(lay(tmp_path / "base", tensors, table(group)))
    assert (base.title, list(base.tensors)) == ("AWQ 4 bit", ["m.weight"])
    assert same_bits(whole(base, "m.weight"), expected)


@pytest.mark.parametrize(
    "said",
    [
        None,
        {"quant_method": "awq", "w_bit": 4, "q_group_size": 8, "version": "GEMM"},
        {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": False},
        {"quant_method": "awq", "bits": 4, "group_size": 8, "version": None, "backend": "autoawq"},
    ],
)
def test_what_the_config_may_leave_out(said: dict[str, Any] | None, tmp_path: Path) -> None:
    """Shapes determine all of it; older files name fields otherwise."""
    tensors, expected = awq()
    base = opened(lay(tmp_path / "base", tensors, said))
    assert same_bits(whole(base, "m.weight"), expected)
    assert base.rescaled_by == "AWQ 4 bit"


I32 = torch.int32
MALFORMED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "no-codes": ({"qweight": None}, {}, ("its qweight is missing",)),
    "no-zeros": ({"qzeros": None}, {"zero_point": False}, ("its qzeros is missing",)),
    "no-scales": ({"scales": None}, {}, ("its scales is missing",)),
    "bits": ({}, {"bits": 8}, ("8 bits, expected 4",)),
    "gemv": ({}, {"version": "gemv"}, ("packed for a kernel (gemv)",)),
    "gemv-fast": ({}, {"version": "gemv_fast"}, ("packed for a kernel (gemv_fast)",)),
    "marlin": ({}, {"version": "Marlin"}, ("packed for a kernel (marlin)",)),
    "exllama": ({}, {"version": "exllama"}, ("packed for a kernel (exllama)",)),
    "llm-awq": ({}, {"backend": "llm-awq"}, ("packed for a kernel (llm-awq)",)),
    "unknown-version": ({}, {"version": "gemm2"}, ('its version is "gemm2", expected gemm',)),
    "unknown-format": ({}, {"format": 3}, ("its format is 3, expected gemm",)),
    "wide-scales": (
        {"scales": torch.ones(3, 41).half()}, {}, ("m.scales is [3, 41], expected [3, 40]",),
    ),
    "other-groups": ({}, {"group_size": 12}, ("m.scales is [3, 40], expected [2, 40]",)),
    "ragged": (
        {"scales": torch.ones(2, 40).half(), "qzeros": torch.zeros(2, 5, dtype=I32)},
        {"group_size": 20}, ("no whole number of groups",),
    ),
    "ragged-unsaid": (
        {"scales": torch.ones(5, 40).half(), "qzeros": torch.zeros(5, 5, dtype=I32)},
        {"group_size": None}, ("24 inputs are no whole number of groups (5)",),
    ),
    "narrow-zeros": (
        {"qzeros": torch.zeros(3, 4, dtype=I32)}, {}, ("m.qzeros is [3, 4], expected [3, 5]",),
    ),
    "small-words": (
        {"qweight": torch.zeros(24, 5, dtype=torch.int16)}, {}, ("is I16, expected I32",),
    ),
    "empty": ({"scales": torch.zeros(0, 40).half()}, {}, ("is no matrix",)),
    "index": ({"g_idx": torch.zeros(24, dtype=I32)}, {}, ("it has m.g_idx",)),
    "nan": ({"scales": torch.full((3, 40), torch.nan).half()}, {}, ("m.scales", "it holds NaN")),
    "too-large": (
        {"scales": torch.full((3, 40), -3e38)}, {}, ("m.scales", "float32 cannot hold"),
    ),
    "rescaled-inputs": (
        {"pre_quant_scale": torch.ones(24)}, {}, ("m.pre_quant_scale", "rescaled"),
    ),
    "activations-divided": (
        {"act.scales": torch.ones(24)}, {}, ("in a form that loratool cannot read", "act.scales"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    """Layouts of other kernels, and what does not fit, are refused by name."""
    changes, fields, parts = MALFORMED[case]
    tensors, _ = awq()
    refusal(lay(tmp_path / "base", changed(tensors, changes), {**table(), **fields}), *parts)


def test_gptq_and_awq_are_told_apart_by_their_shapes(tmp_path: Path) -> None:
    """A config that says GPTQ does not make AWQ's words GPTQ's."""
    tensors, _ = awq()
    said = {"quant_method": "gptq", "bits": 4, "group_size": 8}
    refusal(lay(tmp_path / "base", tensors, said), "m.qweight is [24, 5], expected [24, 40]")
