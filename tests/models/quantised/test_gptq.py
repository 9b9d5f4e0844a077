"""GPTQ against its definition, value by value: widths, versions, groups in order and out of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import State
from helpers.laying import changed, lay, opened, refusal, same_bits, whole, words_of

from loratool.storage.tensors import FilePool
from loratool.storage.values import values_of

#: Subtracted from every word of zeros, borrows included, by those who write the first version.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def gptq(
    bits: int = 4,
    inputs: int = 40,
    outputs: int = 24,
    group: int = 16,
    order: str = "in-order",
    second: bool = False,
    path: str = "m",
    scales: torch.dtype = torch.float16,
) -> tuple[State, np.ndarray]:
    """The tensors of one module and what they stand for, float64 `[out, in]`."""
    rng = np.random.default_rng(bits * inputs + outputs)
    groups = 1 if group == -1 else -(-inputs // group)
    index = np.arange(inputs) // (inputs if group == -1 else group)
    if order == "act-order":
        rng.shuffle(index)
    codes = rng.integers(0, 1 << bits, (inputs, outputs))
    # In the first version, zeros of 0 borrow from their neighbours: there are some.
    zeros = rng.integers(0, 1 << bits, (groups, outputs))
    scale = torch.from_numpy(rng.standard_normal((groups, outputs))).to(scales)
    stored = zeros if second or bits in ONES else (zeros - 1) % (1 << bits)
    packed = words_of(stored, bits)
    if not second and bits in ONES:
        packed = (packed.numpy().view("<u4") - np.uint32(ONES[bits])).view("<i4")
        packed = torch.from_numpy(packed)
    tensors = {
        f"{path}.qweight": words_of(codes.T, bits).T, f"{path}.qzeros": packed,
        f"{path}.scales": scale,
    }  # fmt: skip
    if order != "no-index":
        tensors[f"{path}.g_idx"] = torch.from_numpy(index.astype(np.int32))
    expected = np.empty((outputs, inputs))
    real = scale.double().numpy()
    for row in range(outputs):
        for column in range(inputs):
            of = index[column]
            expected[row, column] = (codes[column, row] - zeros[of, row]) * real[of, row]
    return tensors, expected


def table(bits: int = 4, group: int = 16, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, **more,
    }  # fmt: skip


SIZES = {
    # bits, inputs, outputs, group; groups of which the last one is short, too
    "2-bit": (2, 48, 32, 16),
    "2-bit-ragged": (2, 80, 48, 32),
    "3-bit": (3, 64, 32, 32),
    "3-bit-ragged": (3, 96, 64, 64),
    "4-bit": (4, 40, 24, 8),
    "4-bit-ragged": (4, 40, 24, 16),
    "8-bit": (8, 12, 20, 4),
    "one-group": (4, 40, 24, -1),
    "one-each": (4, 16, 8, 1),
    "groups-of-several-words": (4, 192, 8, 96),
}


@pytest.mark.parametrize("second", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("order", ["in-order", "act-order", "no-index"])
@pytest.mark.parametrize("size", SIZES)
def test_values(size: str, order: str, second: bool, tmp_path: Path) -> None:
    """(code − zero)·scale with those of the group that g_idx names, or without it the place does;
    the product is exact in float32."""
    bits, inputs, outputs, group = SIZES[size]
    tensors, expected = gptq(bits, inputs, outputs, group, order, second)
    said = table(bits, group, checkpoint_format="gptq_v2" if second else "gptq")
    base = opened(lay(tmp_path / "base", tensors, said))
    assert base.title == f"GPTQ {bits} bit"
    assert list(base.tensors) == ["m.weight"]
    assert same_bits(whole(base, "m.weight"), expected)


def test_one_version_is_not_the_other(tmp_path: Path) -> None:
    """Without checkpoint_format it is the first version, as auto-gptq's files are."""
    tensors, expected = gptq()
    assert same_bits(whole(opened(lay(tmp_path / "a", tensors, table())), "m.weight"), expected)
    other = opened(lay(tmp_path / "b", tensors, table(checkpoint_format="gptq_v2")))
    assert not same_bits(whole(other, "m.weight"), expected)


def test_newer_names_of_fields(tmp_path: Path) -> None:
    """gptqmodel calls them `method` and `format` today; `backend` is what it is run with."""
    tensors, expected = gptq(second=True)
    said = {
        "method": "gptq", "format": "gptq_v2", "bits": 4, "group_size": 16, "backend": "marlin",
    }  # fmt: skip
    assert same_bits(whole(opened(lay(tmp_path / "base", tensors, said)), "m.weight"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Scales need not be float16; of float32 ones the product is rounded once."""
    tensors, expected = gptq(scales=dtype)
    found = whole(opened(lay(tmp_path / "base", tensors, table())), "m.weight")
    assert np.array_equal(found, expected.astype(np.float32))


@pytest.mark.parametrize(
    "size", ["3-bit-ragged", "4-bit-ragged", "8-bit", "one-group", "groups-of-several-words"]
)
def test_conv1d_is_turned(size: str, tmp_path: Path) -> None:
    """GPT-2's plain file has [in, out]: rows of it are inputs, which are in a few words of each
    column."""
    bits, inputs, outputs, group = SIZES[size]
    path = "transformer.h.0.attn.c_attn"
    tensors, expected = gptq(bits, inputs, outputs, group, path=path)
    base = opened(lay(tmp_path / "base", tensors, table(bits, group), model_type="gpt2"))
    assert base.tensors[f"{path}.weight"].shape == (inputs, outputs)
    assert same_bits(whole(base, f"{path}.weight"), expected.T)


def test_rules_for_modules_change_bits_and_groups(tmp_path: Path) -> None:
    """`dynamic` gives modules other bits than the config's; shapes say which."""
    tensors, expected = gptq(8, 12, 20, 4, "no-index")
    said = table(4, 128, dynamic={"+:m": {"bits": 8, "group_size": 4}})
    assert same_bits(whole(opened(lay(tmp_path / "base", tensors, said)), "m.weight"), expected)


def test_threads_read_the_packed_tensor_together(tmp_path: Path) -> None:
    """Blocks of several threads at once are what one reads alone."""
    tensors, expected = gptq(order="act-order")
    info = opened(lay(tmp_path / "base", tensors, table())).tensors["m.weight"]
    with FilePool() as files, ThreadPoolExecutor(4) as pool:
        values = values_of(info, files)
        rows = list(pool.map(lambda row: values.floats(row * 40, (row + 1) * 40), range(24)))
    assert same_bits(np.stack(rows), expected)


def test_a_file_beside_the_config_says_it(tmp_path: Path) -> None:
    """auto-gptq once wrote quantize_config.json alone."""
    tensors, expected = gptq()
    base = lay(tmp_path / "base", tensors)
    (base / "quantize_config.json").write_text('{"bits": 4, "group_size": 16, "desc_act": false}')
    assert same_bits(whole(opened(base), "m.weight"), expected)


I32 = torch.int32
MALFORMED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    # tensors in place of others, fields of the config, words
    "no-codes": ({"qweight": None}, {}, ("m, a quantised weight", "its qweight is missing")),
    "no-zeros": ({"qzeros": None}, {}, ("its qzeros is missing", "m.qweight")),
    "no-scales": ({"scales": None}, {}, ("its scales is missing",)),
    "wide-zeros": (
        {"qzeros": torch.zeros(3, 4, dtype=I32)}, {}, ("do not fit codes of 4 bits",),
    ),
    "long-zeros": (
        {"qzeros": torch.zeros(4, 3, dtype=I32)}, {}, ("m.qzeros is [4, 3], expected [3, 3]",),
    ),
    "short-scales": (
        {"scales": torch.ones(2, 24).half()}, {}, ("m.qzeros is [3, 3], expected [2, 3]",),
    ),
    "narrow-codes": (
        {"qweight": torch.zeros(5, 23, dtype=I32)}, {},
        ("m.qweight is [5, 23], expected [5, 24]",),
    ),
    "short-codes": (
        {"qweight": torch.zeros(4, 24, dtype=I32)}, {}, ("do not fit codes of 4 bits",),
    ),
    "flat-codes": ({"qweight": torch.zeros(5, dtype=I32)}, {}, ("is no matrix",)),
    "empty": ({"scales": torch.zeros(0, 24).half()}, {}, ("is no matrix",)),
    "small-words": (
        {"qweight": torch.zeros(5, 24, dtype=torch.int16)}, {}, ("is I16, expected I32",),
    ),
    "integer-scales": (
        {"scales": torch.ones(3, 24, dtype=I32)}, {}, ("m.scales is I32, expected F16",),
    ),
    "pack-dtype": ({}, {"pack_dtype": "int64"}, ('"int64"', "pack_dtype", "expected int32")),
    "bits": ({}, {"bits": 5}, ("5 bits", "expected 2, 3, 4 or 8")),
    "bits-no-number": ({}, {"bits": "4"}, ('do not fit codes of "4" bits',)),
    "other-bits": ({}, {"bits": 8}, ("do not fit codes of 8 bits",)),
    "huge-bits": ({}, {"bits": 10**400}, ("bits, expected 2, 3, 4 or 8",)),
    "planar": ({}, {"checkpoint_format": "gptq_p"}, ("packed for a kernel (gptq_p)",)),
    "marlin": ({}, {"checkpoint_format": "marlin"}, ("packed for a kernel (marlin)",)),
    "marlin-flag": ({}, {"is_marlin_format": True}, ("packed for a kernel (marlin)",)),
    "bitblas": ({}, {"format": "bitblas"}, ("packed for a kernel (bitblas)",)),
    "unknown-format": ({}, {"checkpoint_format": "gptq_v3"}, ("gptq_v3", "gptq or gptq_v2")),
    "two-formats": (
        {}, {"checkpoint_format": "gptq", "format": "gptq_v2"}, ("gptq and gptq_v2",),
    ),
    "rotated": ({}, {"rotation": "hadamard"}, ("rescaled for quantisation (rotation)",)),
    "order-unknown": (
        {"g_idx": None}, {"desc_act": True}, ("sorted into groups", "g_idx is missing"),
    ),
    "groups-unknown": (
        {"g_idx": None}, {"group_size": 8}, ("3 groups for 40 inputs", "group_size is 8"),
    ),
    "group-too-high": (
        {"g_idx": torch.full((40,), 3, dtype=I32)}, {}, ("m.g_idx", "it names group 3 of 3"),
    ),
    "group-below": (
        {"g_idx": torch.full((40,), -1, dtype=I32)}, {}, ("m.g_idx", "it names group -1 of 3"),
    ),
    "index-too-short": (
        {"g_idx": torch.zeros(31, dtype=I32)}, {}, ("do not fit codes of 4 bits",),
    ),
    "index-a-matrix": (
        {"g_idx": torch.zeros(1, 40, dtype=I32)}, {}, ("is no list of groups",),
    ),
    "nan": (
        {"scales": torch.full((3, 24), torch.nan).half()}, {}, ("m.scales", "it holds NaN"),
    ),
    "infinite": (
        {"scales": torch.full((3, 24), torch.inf).half()}, {}, ("m.scales", "it holds NaN"),
    ),
    "too-large": (
        {"scales": torch.full((3, 24), 3e38)}, {}, ("m.scales", "that float32 cannot hold"),
    ),
    "plain-too": (
        {"weight": torch.zeros(24, 40)}, {}, ("it has m.weight F32", "leave no meaning for"),
    ),
    "rescaled-inputs": (
        {"pre_quant_scale": torch.ones(40)}, {}, ("m.pre_quant_scale", "rescaled"),
    ),
    "other-method": (
        {}, {"quant_method": "fp8"}, ("packed as GPTQ packs them", "config.json says fp8"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    """What does not fit is refused, by the name of the tensor or the field."""
    changes, fields, parts = MALFORMED[case]
    tensors, _ = gptq()
    said = {**table(), **fields}
    refusal(lay(tmp_path / "base", changed(tensors, changes), said), *parts)


def test_no_config_is_not_enough(tmp_path: Path) -> None:
    """Which version it is, no tensor tells."""
    tensors, _ = gptq()
    error = refusal(lay(tmp_path / "base", tensors), "packed as GPTQ", "does not say so")
    assert "quantization_config" in error.hint
