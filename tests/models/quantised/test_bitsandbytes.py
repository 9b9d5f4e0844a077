"""bitsandbytes against its definition, value by value: 4 bit in blocks that straddle rows, int8."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import State
from helpers.laying import changed, lay, opened, refusal, text, whole
from helpers.quantised import NF4

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STATE = "weight.quant_state.bitsandbytes__nf4"


def four_bit(
    rows: int,
    columns: int,
    block: int = 64,
    *,
    nested: int = 0,
    kind: str = "nf4",
    storage: torch.dtype = torch.uint8,
    dtype: str = "bfloat16",
    path: str = "m",
) -> tuple[State, np.ndarray]:
    """The tensors of one module and what they stand for, rounded to its dtype, float32."""
    rng = np.random.default_rng(rows * columns + block)
    count = rows * columns
    codes = rng.integers(0, 16, count + count % 2)
    blocks = -(-count // block)
    levels = NF4.numpy() if kind == "nf4" else np.sort(rng.standard_normal(16)).astype("f4")
    absmax = rng.random(blocks).astype(np.float32)
    said: dict[str, Any] = {
        "quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [rows, columns],
    }  # fmt: skip
    packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)
    packed = np.append(packed, np.zeros(-len(packed) % storage.itemsize, np.uint8))
    stored = {
        "weight": torch.from_numpy(packed).view(storage)[:, None],
        "weight.absmax": torch.from_numpy(absmax),
        "weight.quant_map": torch.from_numpy(levels.copy()),
    }
    if nested:
        steps = rng.standard_normal(256).astype(np.float32)
        scales = rng.random(-(-blocks // nested)).astype(np.float32)
        near = rng.integers(0, 256, blocks).astype(np.uint8)
        offset = 0.3333333432674408
        absmax = np.array(
            [steps[q] * scales[j // nested] + np.float32(offset) for j, q in enumerate(near)],
            np.float32,
        )
        said |= {"nested_blocksize": nested, "nested_offset": offset, "nested_dtype": "float32"}
        stored |= {
            "weight.absmax": torch.from_numpy(near),
            "weight.nested_absmax": torch.from_numpy(scales),
            "weight.nested_quant_map": torch.from_numpy(steps),
        }
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = text(json.dumps(said))
    values = np.array(
        [levels[codes[k]] * absmax[k // block] for k in range(count)], np.float32
    ).reshape(rows, columns)
    rounded = torch.from_numpy(values).to(DTYPES[dtype]).float().numpy()
    return {f"{path}.{role}": tensor for role, tensor in stored.items()}, rounded


CASES: dict[str, dict[str, Any]] = {
    "rows-of-blocks": {"rows": 6, "columns": 128},
    "straddling": {"rows": 9, "columns": 100},
    "odd-row": {"rows": 8, "columns": 75},
    "odd-count": {"rows": 7, "columns": 45},
    "less-than-a-block": {"rows": 3, "columns": 5},
    "one-value": {"rows": 1, "columns": 1},
    "nested": {"rows": 40, "columns": 65, "nested": 256, "block": 32},
    "nested-small": {"rows": 9, "columns": 77, "nested": 3},
    "block-32": {"rows": 5, "columns": 96, "block": 32},
    "block-128": {"rows": 5, "columns": 130, "block": 128},
    "block-4096": {"rows": 50, "columns": 99, "block": 4096},
    "fp4": {"rows": 5, "columns": 96, "kind": "fp4"},
    "fp4-nested": {"rows": 5, "columns": 97, "kind": "fp4", "nested": 256},
    "storage-bf16": {"rows": 5, "columns": 50, "storage": torch.bfloat16},
    "storage-fp16-rounded-up": {"rows": 5, "columns": 49, "storage": torch.float16},
    "storage-fp32-rounded-up": {"rows": 7, "columns": 45, "storage": torch.float32, "nested": 4},
    "of-float16": {"rows": 5, "columns": 70, "dtype": "float16"},
    "of-float32": {"rows": 5, "columns": 70, "dtype": "float32"},
}


@pytest.mark.parametrize("case", CASES)
def test_values_of_4_bit(case: str, tmp_path: Path) -> None:
    """quant_map[code]·absmax[block] over the flat matrix, high nibble first, rounded to the dtype
    that the model had."""
    tensors, expected = four_bit(**CASES[case])
    base = opened(lay(tmp_path / "base", tensors))
    assert base.title == CASES[case].get("kind", "nf4").upper()
    assert np.array_equal(whole(base, "m.weight"), expected)


@pytest.mark.parametrize("columns", [64, 100, 75])
def test_gpt2_in_4_bit(columns: int, tmp_path: Path) -> None:
    """Conv1D is quantised turned: its state says [out, in], and the plain file has [in, out]."""
    path = "transformer.h.0.mlp.c_fc"
    tensors, expected = four_bit(9, columns, path=path)
    base = opened(lay(tmp_path / "base", tensors, model_type="gpt2"))
    assert base.tensors[f"{path}.weight"].shape == (columns, 9)
    assert np.array_equal(whole(base, f"{path}.weight"), expected.T)


def test_stacks_of_experts(tmp_path: Path) -> None:
    """Parameters with a matrix for each expert are quantised as a whole, under their own name."""
    tensors, expected = four_bit(12, 35, nested=256)
    said = json.loads(bytes(tensors[f"m.{STATE}"].tolist()))
    tensors[f"m.{STATE}"] = text(json.dumps({**said, "shape": [3, 4, 35]}))
    named = {name.replace("m.weight", "experts.down_proj"): t for name, t in tensors.items()}
    base = opened(lay(tmp_path / "base", named))
    assert list(base.tensors) == ["experts.down_proj"]
    assert np.array_equal(whole(base, "experts.down_proj"), expected.reshape(3, 4, 35))


def int8(rows: int = 6, columns: int = 11, path: str = "m") -> tuple[State, np.ndarray]:
    rng = np.random.default_rng(rows)
    codes = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    scales = (rng.random(rows) * 3).astype(np.float32)
    one = np.float32(7.874015718698502e-3)
    expected = np.array(
        [
            [np.float32(q) * scale * one for q in row]
            for row, scale in zip(codes, scales, strict=True)
        ],
        np.float32,
    )
    stored = {
        f"{path}.weight": torch.from_numpy(codes), f"{path}.SCB": torch.from_numpy(scales),
        f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }  # fmt: skip
    return stored, expected


@pytest.mark.parametrize("format_said", [True, False])
def test_values_of_int8(format_said: bool, tmp_path: Path) -> None:
    """code·SCB·(1/127) in this order, each rounded; older files do not say the order of bytes."""
    tensors, expected = int8()
    if not format_said:
        del tensors["m.weight_format"]
    base = opened(lay(tmp_path / "base", tensors))
    assert (base.title, list(base.tensors)) == ("int8", ["m.weight"])
    assert np.array_equal(whole(base, "m.weight"), expected)


def test_gpt2_in_int8(tmp_path: Path) -> None:
    """Conv1D is turned in int8, too."""
    path = "h.3.attn.c_proj"
    tensors, expected = int8(6, 6, path)
    base = opened(lay(tmp_path / "base", tensors, model_type="gpt2"))
    assert np.array_equal(whole(base, f"{path}.weight"), expected.T)


def state(**changes: Any) -> torch.Tensor:
    """The state of `four_bit(9, 100, nested=256)` with other fields; None for none."""
    said = {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [9, 100],
        "nested_blocksize": 256, "nested_offset": 0.1, **changes,
    }  # fmt: skip
    return text(json.dumps({key: value for key, value in said.items() if value is not None}))


def states(**rows: tuple[dict[str, Any], str]) -> dict[str, tuple[dict[str, Any], str]]:
    return {name: ({STATE: state(**fields)}, words) for name, (fields, words) in rows.items()}


HUGE = 10**900
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    **states(
        shape_missing=({"shape": None}, "no shape of a matrix or a stack"),
        shape_text=({"shape": "../../etc/passwd"}, "no shape of a matrix or a stack"),
        shape_of_four=({"shape": [9, 10, 5, 2]}, "no shape of a matrix or a stack"),
        shape_negative=({"shape": [-9, -100]}, "no shape of a matrix or a stack"),
        shape_of_floats=({"shape": [9.0, 100.0]}, "no shape of a matrix or a stack"),
        shape_of_truths=({"shape": [True, 900]}, "no shape of a matrix or a stack"),
        shape_huge=({"shape": [HUGE, 2]}, "no shape of a matrix or a stack"),
        shape_large=({"shape": [2**31 - 1, 2**31 - 1]}, "holds 900 codes"),
        shape_other=({"shape": [9, 102]}, "holds 900 codes, and its shape is [9, 102]"),
        block_missing=({"blocksize": None}, "no blocksize (null)"),
        block_zero=({"blocksize": 0}, "no blocksize (0)"),
        block_odd=({"blocksize": 63}, "no blocksize (63)"),
        block_negative=({"blocksize": -64}, "no blocksize (-64)"),
        block_text=({"blocksize": "64"}, 'no blocksize ("64")'),
        block_huge=({"blocksize": HUGE}, "no blocksize"),
        block_other=({"blocksize": 128}, "m.weight.absmax is [15], expected [8]"),
        dtype_missing=({"dtype": None}, "has the dtype null"),
        dtype_text=({"dtype": "__import__('os')"}, "expected float16 or bfloat16 or float32"),
        dtype_list=({"dtype": ["float16"]}, "has the dtype"),
        nested_block_missing=({"nested_blocksize": None}, "no nested_blocksize"),
        nested_block_zero=({"nested_blocksize": 0}, "no nested_blocksize (0)"),
        nested_block_huge=({"nested_blocksize": HUGE}, "no nested_blocksize"),
        nested_block_other=({"nested_blocksize": 8}, "m.weight.nested_absmax is [1], expected [2]"),
        offset_missing=({"nested_offset": None}, "no nested_offset (null)"),
        offset_nan=({"nested_offset": float("nan")}, "no nested_offset (NaN)"),
        offset_infinite=({"nested_offset": float("-inf")}, "no nested_offset (-Infinity)"),
        offset_huge=({"nested_offset": HUGE}, "no nested_offset"),
        offset_too_large=({"nested_offset": 1e300}, "no nested_offset (1e+300)"),
        offset_text=({"nested_offset": "0.1"}, "no nested_offset"),
        offset_true=({"nested_offset": True}, "no nested_offset"),
    ),
    "state-missing": ({STATE: None}, "its quant_state is missing"),
    "state-no-object": ({STATE: text("[1]")}, "does not hold a JSON object"),
    "state-cut": ({STATE: state()[:-9]}, "does not hold a JSON object"),
    "state-deep": ({STATE: text("[" * 60_000)}, "does not hold a JSON object"),
    "state-deep-object": ({STATE: text('{"a":' * 10_000)}, "does not hold a JSON object"),
    "state-twice": ({STATE: text('{"blocksize":64,"blocksize":32}')}, "does not hold a JSON"),
    "state-no-text": ({STATE: torch.full((99,), 255, dtype=torch.uint8)}, "does not hold a JSON"),
    "state-empty": ({STATE: text("")}, "does not hold a JSON object"),
    "state-of-floats": ({STATE: torch.ones(9)}, "is F32, expected U8"),
    "state-long": ({STATE: text(" " * 70_000)}, "too large for a description"),
    "two-states": (
        {"weight.quant_state.bitsandbytes__fp4": state()}, "a quant_state for NF4 and one for FP4",
    ),
    "codes-missing": ({"weight": None}, "its weight is missing"),
    "codes-cut": ({"weight": torch.zeros(449, 1, dtype=torch.uint8)}, "holds 898 codes"),
    "codes-of-int32": ({"weight": torch.zeros(112, 1, dtype=torch.int32)}, "is I32, expected U8"),
    "absmax-missing": ({"weight.absmax": None}, "its absmax is missing"),
    "absmax-short": ({"weight.absmax": torch.ones(14)}, "is [14], expected [15]"),
    "absmax-nan": (
        {"weight.absmax": torch.full((15,), torch.nan), "weight.nested_absmax": None,
         "weight.nested_quant_map": None}, "m.weight.absmax",
    ),
    "absmax-plain-and-nested": ({"weight.absmax": torch.ones(15)}, "leave no meaning for"),
    "map-missing": ({"weight.quant_map": None}, "its quant_map is missing"),
    "map-short": ({"weight.quant_map": torch.ones(15)}, "is [15], expected [16]"),
    "map-half": ({"weight.quant_map": torch.ones(16).half()}, "is F16, expected F32"),
    "map-nan": ({"weight.quant_map": torch.full((16,), torch.nan)}, "m.weight.quant_map"),
    "nested-missing": ({"weight.nested_absmax": None}, "its nested_absmax is missing"),
    "nested-map-missing": ({"weight.nested_quant_map": None}, "its nested_quant_map is missing"),
    "nested-map-short": ({"weight.nested_quant_map": torch.ones(255)}, "expected [256]"),
    "nested-nan": ({"weight.nested_absmax": torch.tensor([torch.nan])}, "m.weight.nested_absmax"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_4_bit(case: str, tmp_path: Path) -> None:
    """Whatever the state says, and whichever part is missing, cut or no number: a clear error, at
    once."""
    changes, words = MALFORMED[case]
    tensors, _ = four_bit(9, 100, nested=256)
    folder = lay(tmp_path / "base", changed(tensors, changes))
    start = time.process_time()
    refusal(folder, "m", words)
    assert time.process_time() - start < 2


MALFORMED_INT8: dict[str, tuple[dict[str, Any], str]] = {
    "no-scales": ({"SCB": None}, "its SCB is missing"),
    "no-codes": ({"weight": None}, "its weight is missing"),
    "plain-codes": ({"weight": torch.ones(6, 11)}, "m.weight is F32, expected I8"),
    "flat-codes": ({"weight": torch.ones(66, dtype=torch.int8)}, "is no matrix"),
    "short-scales": ({"SCB": torch.ones(5)}, "m.SCB is [5], expected [6]"),
    "by-column": ({"SCB": torch.ones(11)}, "m.SCB is [11], expected [6]"),
    "nan": ({"SCB": torch.full((6,), torch.nan)}, "it holds NaN"),
    "too-large": ({"SCB": torch.full((6,), 3e38)}, "that float32 cannot hold"),
    "turing": (
        {"weight_format": torch.tensor(2, dtype=torch.uint8)},
        "packed for a kernel (col_turing, weight_format 2)",
    ),
    "unknown": ({"weight_format": torch.tensor(9, dtype=torch.uint8)}, "weight_format 9"),
    "no-format": ({"weight_format": torch.zeros(0, dtype=torch.uint8)}, "m.weight_format is [0]"),
    "format-text": ({"weight_format": text("row")}, "m.weight_format is [3]"),
    "other-format": ({"weight_format": torch.tensor(0)}, "is I64, expected U8"),
}


@pytest.mark.parametrize("case", MALFORMED_INT8)
def test_malformed_int8(case: str, tmp_path: Path) -> None:
    """Bytes in the order of a kernel, and scales that do not fit, are refused."""
    changes, words = MALFORMED_INT8[case]
    tensors, _ = int8()
    refusal(lay(tmp_path / "base", changed(tensors, changes)), "m", words)


def test_parts_without_a_weight(tmp_path: Path) -> None:
    """A part that belongs to no weight of the model is named; plain tensors go through."""
    tensors, expected = four_bit(9, 100)
    stray = {**tensors, "other.weight.absmax": torch.ones(15)}
    refusal(lay(tmp_path / "a", stray), "other.weight.absmax is there", "quant_state is missing")
    base = opened(lay(tmp_path / "b", {**tensors, "norm.weight": torch.ones(3)}))
    assert base.tensors.keys() == {"m.weight", "norm.weight"}
    assert np.array_equal(whole(base, "m.weight"), expected)
