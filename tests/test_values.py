"""Numbers that must not be written, numbers that rounding loses, and tensors kept as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from conftest import write_adapter
from files import (
    ADAPTED,
    LLAMA,
    NORM,
    OTHER,
    State,
    assert_clean,
    file_error,
    header_file,
    load,
    lora_on,
    random_of,
    raw_bytes,
    refused,
    same,
    small_lora,
    small_state,
    write_base,
)

import loratool
from loratool.errors import ValueRangeError
from loratool.storage.header import build_header
from loratool.storage.tensors import BLOCK_ELEMENTS
from loratool.verbs.merge import MergeReport

TORCH = {
    "float16": torch.float16, "bfloat16": torch.bfloat16,
    "float32": torch.float32, "float64": torch.float64,
}  # fmt: skip


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return small_lora(tmp_path / "lora")


def nothing(folder: Path, size: int = 8) -> Path:
    """An adapter whose product is exactly zero."""
    return lora_on(folder, np.zeros((size, 1)), np.zeros((1, size)))


def merge_state(
    tmp_path: Path, state: State, dtype: str, lora: Path | None = None
) -> tuple[State, MergeReport]:
    """Write `state` as a base, merge an adapter (by default one of zeros), read the result."""
    base = write_base(tmp_path / "base", state)
    lora = lora or nothing(tmp_path / "zero")
    report = loratool.merge(base, lora, tmp_path / "out", dtype=dtype)
    return load(tmp_path / "out"), report


def put(tensor: torch.Tensor, *values: float) -> torch.Tensor:
    """The tensor with its last elements set to `values`."""
    changed = tensor.clone()
    changed.view(-1)[-len(values) :] = torch.tensor(values, dtype=tensor.dtype)
    return changed


# --- NaN and infinity ----------------------------------------------------------------------------

BROKEN = {"nan": torch.nan, "inf": torch.inf, "minus-inf": -torch.inf}


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER, NORM], ids=["adapted", "untouched", "vector"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32"])
def test_nan_and_infinity_in_the_base_are_refused(
    tmp_path: Path, lora: Path, stored: str, dtype: str, tensor: str, value: str
) -> None:
    """Wherever they are, merged, cast or copied: the error names tensor, file and count."""
    state = small_state(dtype=TORCH[stored])
    state[tensor] = put(state[tensor], BROKEN[value], 1.0, BROKEN[value], BROKEN[value])
    base = write_base(tmp_path / "base", state)
    file = str(base / "model.safetensors")
    refused(ValueRangeError, base, lora, tmp_path / "out", tensor, file, " 3 values", dtype=dtype)


def test_nan_in_a_late_block_is_counted_once(tmp_path: Path) -> None:
    """A tensor of several blocks is checked to its last element, and counted as a whole."""
    rows = 3 * BLOCK_ELEMENTS // 4096
    big = put(torch.zeros(rows, 4096, dtype=torch.bfloat16), torch.nan)
    big[0, 0] = torch.inf
    base = write_base(tmp_path / "base", {ADAPTED: big})
    lora = lora_on(tmp_path / "lora", np.ones((rows, 1)), np.ones((1, 4096)))
    refused(ValueRangeError, base, lora, tmp_path / "out", ADAPTED, " 2 values", dtype="base")


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("side", ["A", "B"])
def test_nan_and_infinity_in_the_adapter_are_refused(tmp_path: Path, side: str, value: str) -> None:
    """A diverged adapter is refused with its file, tensor and count."""
    factors = {"A": np.ones((2, 8)), "B": np.ones((8, 2))}
    factors[side][1, 0] = factors[side][0, 1] = BROKEN[value]
    lora = lora_on(tmp_path / "lora", factors["B"], factors["A"])
    base = write_base(tmp_path / "base", small_state())
    words = (str(lora / "adapter_model.safetensors"), f"lora_{side}.weight: 2 of 16")
    refused(ValueRangeError, base, lora, tmp_path / "out", *words)


def test_a_weight_of_zero_does_not_hide_a_broken_adapter(tmp_path: Path) -> None:
    """Zero times infinity is not zero: the adapter is refused whatever its weight."""
    lora = lora_on(tmp_path / "lora", np.full((8, 1), np.inf), np.ones((1, 8)))
    base = write_base(tmp_path / "base", small_state())
    refused(ValueRangeError, base, lora, tmp_path / "out", "lora_B", weights=[0.0])


def test_a_product_that_overflows_float32_is_refused(tmp_path: Path) -> None:
    """Finite factors whose product is not finite are refused with the tensor's name."""
    lora = lora_on(tmp_path / "lora", np.full((8, 1), 1e30), np.full((1, 8), 1e30))
    base = write_base(tmp_path / "base", small_state())
    refused(ValueRangeError, base, lora, tmp_path / "out", ADAPTED, dtype="float32")


def test_a_weight_that_overflows_is_refused(tmp_path: Path, lora: Path) -> None:
    """A finite but enormous adapter weight gives an error, not infinities on the disk."""
    base = write_base(tmp_path / "base", small_state())
    refused(ValueRangeError, base, lora, tmp_path / "out", ADAPTED, weights=[1e300])


# --- overflow ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float64"])
def test_values_too_large_for_float16_are_refused(tmp_path: Path, tensor: str, stored: str) -> None:
    """Finite values beyond float16 are counted, and the hint names the dtypes that hold them."""
    state = small_state(dtype=TORCH[stored])
    state[tensor] = put(state[tensor], 70000.0, 1.0, -90000.0)
    base = write_base(tmp_path / "base", state)
    words = (tensor, " 2 values overflow", "65504")
    error = refused(ValueRangeError, base, nothing(tmp_path / "zero"), tmp_path / "out", *words)
    assert "bfloat16" in error.hint
    for dtype in ("bfloat16", "float32", "base"):
        loratool.merge(base, tmp_path / "zero", tmp_path / f"in-{dtype}", dtype=dtype)
        largest = load(tmp_path / f"in-{dtype}")[tensor].view(-1)[[-3, -1]].double()
        assert torch.allclose(largest, torch.tensor([70000.0, -90000.0]).double(), rtol=0.005)


@pytest.mark.parametrize("stored", ["float32", "float64"])
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
def test_values_that_round_to_the_largest_float16_are_fine(
    tmp_path: Path, tensor: str, stored: str
) -> None:
    """Everything below 65520, halfway to the next step, becomes 65504, as IEEE 754 says."""
    state = small_state(dtype=TORCH[stored])
    values = [65504.0, 65505.0, 65519.99, -65519.99]
    if stored == "float64":
        values += [65519.999999999, -65519.999999999]  # 65520 as float32
    state[tensor] = put(state[tensor], *values)
    merged, _ = merge_state(tmp_path, state, "float16")
    assert merged[tensor].view(-1)[-len(values) :].abs().tolist() == [65504.0] * len(values)


@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
@pytest.mark.parametrize("value", [65520.0, -65520.0, 65521.0])
def test_values_that_round_beyond_float16_are_refused(
    tmp_path: Path, tensor: str, value: float
) -> None:
    """From 65520 on, a value would become infinite; only such values are counted."""
    state = small_state()
    state[tensor] = put(state[tensor], 65519.99, value, 65504.0)
    base = write_base(tmp_path / "base", state)
    words = (tensor, " 1 values overflow")
    refused(ValueRangeError, base, nothing(tmp_path / "zero"), tmp_path / "out", *words)


def test_an_overflow_made_by_the_adapter_is_refused(tmp_path: Path) -> None:
    """Base and adapter are in range and their sum is not: tensor and count are named."""
    base = write_base(tmp_path / "base", {**small_state(), ADAPTED: torch.full((8, 8), 60000.0)})
    b = np.zeros((8, 1))
    b[2] = b[5] = 5519.0
    fits = lora_on(tmp_path / "fits", b, np.ones((1, 8)))
    loratool.merge(base, fits, tmp_path / "fine")
    assert float(load(tmp_path / "fine")[ADAPTED].max()) == 65504.0
    lora = lora_on(tmp_path / "lora", b + (b > 0), np.ones((1, 8)))
    refused(ValueRangeError, base, lora, tmp_path / "out", ADAPTED, " 16 values overflow")


def test_an_overflow_made_by_a_trained_bias_is_counted(tmp_path: Path) -> None:
    """A bias that the adapter (lora_bias) moves out of range is named and counted as well."""
    path = ADAPTED.removesuffix(".weight")
    factors = {
        "lora_A.weight": np.zeros((1, 8), np.float32),
        "lora_B.weight": np.zeros((8, 1), np.float32),
        "lora_B.bias": np.array([0, 600, 0, 600, 0, 0, 600, 500], np.float32),
    }
    tensors = {f"base_model.model.{path}.{leaf}": value for leaf, value in factors.items()}
    lora = write_adapter(tmp_path / "lora", tensors, {"r": 1, "lora_alpha": 1, "lora_bias": True})
    state = {**small_state(), f"{path}.bias": torch.full((8,), 65000.0)}
    base = write_base(tmp_path / "base", state)
    words = (f"{path}.bias", " 3 values overflow")
    refused(ValueRangeError, base, lora, tmp_path / "out", *words)


def test_an_adapter_may_bring_values_back_into_range(tmp_path: Path) -> None:
    """What counts is the sum: a base value out of range, lowered by the adapter, is fine."""
    state = {**small_state(), ADAPTED: torch.full((8, 8), 70000.0)}
    lora = lora_on(tmp_path / "lora", np.full((8, 1), -20000.0), np.ones((1, 8)))
    merged, _ = merge_state(tmp_path, state, "float16", lora)
    assert merged[ADAPTED].unique().tolist() == [49984.0]  # 50000 is a tie, and rounds to even


def test_values_too_large_for_bfloat16_or_float32_are_refused(tmp_path: Path) -> None:
    """The other dtypes have a range too: float64 values can leave it."""
    large = torch.tensor([1e39, 1.0], dtype=torch.float64)
    base = write_base(tmp_path / "base", {**small_state(), NORM: large})
    for dtype in ("bfloat16", "float32"):
        zero = nothing(tmp_path / dtype)
        words = (NORM, " 1 values overflow")
        refused(ValueRangeError, base, zero, tmp_path / "out", *words, dtype=dtype)


# --- rounding ------------------------------------------------------------------------------------


def small_numbers(count: int = 50_000) -> np.ndarray:
    """Values over the whole range where float16 runs out, with both signs and zeros."""
    rng = np.random.default_rng(3)
    values = 10.0 ** rng.uniform(-12, 1, count) * rng.choice([-1, 1], count)
    values[::17] = 0.0
    values[1::1000] = -0.0
    edges = [2.0**-14, 2.0**-14 - 2.0**-26, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-26]
    values[: len(edges)] = edges
    return values.astype(np.float32)


def lost(values: np.ndarray, rounded: np.ndarray, smallest: float) -> tuple[int, int]:
    """How many nonzero values became subnormal, and how many became zero."""
    sizes = np.abs(rounded.astype(np.float64))
    nonzero = values != 0
    subnormal = nonzero & (sizes > 0) & (sizes < smallest)
    return int(subnormal.sum()), int((nonzero & (sizes == 0)).sum())


def test_lost_small_values_of_untouched_tensors_are_counted(tmp_path: Path) -> None:
    """Subnormal and zeroed are exact for a tensor that is cast, zeros not counted."""
    values = small_numbers()
    rounded = values.astype(np.float16)
    state = {**small_state(), OTHER: torch.from_numpy(values), NORM: torch.ones(8)}
    state[ADAPTED] = torch.ones(8, 8)
    merged, report = merge_state(tmp_path, state, "float16")
    assert np.array_equal(merged[OTHER].numpy().view(np.uint16), rounded.view(np.uint16))
    wanted = lost(values, rounded, 2.0**-14)
    assert min(wanted) > 1000
    assert (report.subnormal, report.zeroed) == wanted


def test_lost_small_values_of_merged_tensors_are_counted(tmp_path: Path) -> None:
    """Subnormal and zeroed are exact for W + B·A, over several blocks."""
    columns = BLOCK_ELEMENTS // 8
    base = np.zeros((20, columns), np.float32)
    base[3:] = np.resize(small_numbers(), (17, columns))
    b = np.zeros((20, 1), np.float32)
    b[:3] = 1.0
    a = small_numbers(columns)[None]
    values = base + b * a  # exact: one of the two is zero
    rounded = values.astype(np.float16)
    lora = lora_on(tmp_path / "lora", b, a)
    merged, report = merge_state(tmp_path, {ADAPTED: torch.from_numpy(base)}, "float16", lora)
    assert np.array_equal(merged[ADAPTED].numpy(), rounded)
    assert (report.subnormal, report.zeroed) == lost(values, rounded, 2.0**-14)


def test_a_cast_that_loses_nothing_counts_nothing(tmp_path: Path) -> None:
    """Values that were as small before are not counted: float16 to float32, bfloat16 to float32,
    and copies."""
    state = {
        ADAPTED: torch.ones(8, 8),
        "half": torch.from_numpy(small_numbers()).half(),
        "brain": torch.tensor([1e-39, 1e-40, 0.0, 1.0]).bfloat16(),
        "single": torch.tensor([1e-40, 0.0, 1.0]),
    }
    _, report = merge_state(tmp_path, state, "float32")
    assert (report.subnormal, report.zeroed) == (0, 0)


def test_bfloat16_keeps_what_float16_loses(tmp_path: Path) -> None:
    """bfloat16 has float32's exponents: nothing of these values is lost in it."""
    state = {ADAPTED: torch.ones(8, 8), OTHER: torch.from_numpy(small_numbers())}
    merged, report = merge_state(tmp_path, state, "bfloat16")
    assert (report.subnormal, report.zeroed) == (0, 0)
    assert torch.equal(merged[OTHER], state[OTHER].bfloat16())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
def test_ties_round_to_even(tmp_path: Path, dtype: str, tensor: str) -> None:
    """Values halfway between two, a little above and below, round as IEEE 754 says."""
    bits = 11 if dtype == "float16" else 8
    steps = np.arange(64, dtype=np.float64)
    ties = 1 + (steps + 0.5) * 2.0 ** (1 - bits)
    values = np.concatenate([ties, ties + 2.0**-22, ties - 2.0**-22]).astype(np.float32)
    state = {ADAPTED: torch.ones(192, 192), OTHER: torch.ones(192)}
    state[tensor].view(-1)[:192] = torch.from_numpy(values)
    merged, _ = merge_state(tmp_path, state, dtype, nothing(tmp_path / "zero", 192))
    scaled = values.astype(np.float64) * 2.0 ** (bits - 1)
    wanted = np.rint(scaled) / 2.0 ** (bits - 1)  # rint rounds ties to even
    assert np.array_equal(merged[tensor].view(-1)[:192].double().numpy(), wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tensor", [ADAPTED, OTHER], ids=["adapted", "untouched"])
def test_float64_is_rounded_once(tmp_path: Path, dtype: str, tensor: str) -> None:
    """float64 goes to the output dtype in one step: over float32, ties would be made that are
    none, and rounded the wrong way."""
    bits = 11 if dtype == "float16" else 8
    steps = np.arange(32, dtype=np.float64)
    ties = 1 + (steps + 0.5) * 2.0 ** (1 - bits)
    values = np.concatenate([ties + 2.0**-40, ties - 2.0**-40])
    state = {ADAPTED: torch.ones(8, 8).double(), OTHER: torch.ones(64).double()}
    state[tensor].view(-1)[:] = torch.from_numpy(values)
    merged, _ = merge_state(tmp_path, state, dtype)
    wanted = np.rint(values * 2.0 ** (bits - 1)) / 2.0 ** (bits - 1)
    assert np.array_equal(merged[tensor].view(-1).double().numpy(), wanted)


def test_a_float64_base_is_computed_in_float64(tmp_path: Path) -> None:
    """W + B·A of float64 weights has float64's precision, and keeps the dtype with "base"."""
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((16, 12))
    b = rng.standard_normal((16, 4)).astype(np.float32)
    a = rng.standard_normal((4, 12)).astype(np.float32)
    lora = lora_on(tmp_path / "lora", b, a)
    state = {ADAPTED: torch.from_numpy(weight), OTHER: torch.from_numpy(weight) * 3}
    merged, _ = merge_state(tmp_path, state, "base", lora)
    assert merged[ADAPTED].dtype == torch.float64
    wanted = weight + b.astype(np.float64) @ a.astype(np.float64)
    assert np.abs(merged[ADAPTED].numpy() - wanted).max() < 1e-14
    assert torch.equal(merged[OTHER], state[OTHER])


# --- kept as they are ----------------------------------------------------------------------------


def legacy_buffers() -> State:
    """Constants that old checkpoints hold, as they hold them."""
    mask = torch.tril(torch.ones(4, 4)).view(1, 1, 4, 4)
    return {
        "h.0.attn.masked_bias": torch.tensor(-torch.inf),
        "h.1.attn.masked_bias": torch.tensor(-1e9),
        "h.0.attn.bias": mask,
        "h.1.attn.bias": torch.where(mask > 0, 0.0, -torch.inf),
        "h.0.attn.attention.bias": mask.bool(),
        "h.2.attn.bias": mask.to(torch.uint8),
        "layers.0.attention.bias": mask * 1e-30,
        "layers.0.attention.masked_bias": torch.tensor(-1e9).half(),
        "layers.0.attention.rotary_emb.inv_freq": 10000.0 ** -(torch.arange(8) / 8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([1e-30, 0.3, 1e30]),
    }


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "base"])
def test_legacy_buffers_are_carried_over_unchanged(tmp_path: Path, lora: Path, dtype: str) -> None:
    """Masks of -inf and frequency tables keep dtype and bits, and are neither refused nor
    counted as lost."""
    merged, report = merge_state(tmp_path, {**small_state(), **legacy_buffers()}, dtype, lora)
    assert same({n: merged[n] for n in legacy_buffers()}, legacy_buffers())
    assert report.zeroed == 0


def test_a_real_attention_bias_is_no_legacy_buffer(tmp_path: Path) -> None:
    """`attn.bias` of another shape than a mask is a bias: cast, checked, refused with NaN."""
    name = "h.0.attn.bias"
    merged, _ = merge_state(tmp_path, {**small_state(), name: torch.ones(8)}, "float16")
    assert merged[name].dtype == torch.float16
    base = write_base(tmp_path / "broken", {**small_state(), name: torch.full((8,), torch.nan)})
    refused(ValueRangeError, base, tmp_path / "zero", tmp_path / "never", name)


@pytest.mark.parametrize("dtype", ["float16", "base"])
def test_what_is_no_float_is_copied(tmp_path: Path, lora: Path, dtype: str) -> None:
    """Integers, bools and complex numbers keep dtype and bits, extremes included."""
    kinds = [
        torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
        torch.uint32, torch.uint64, torch.bool, torch.complex64,
    ]  # fmt: skip
    extra = {f"buffer.{kind}": random_of(kind, 5, 3) for kind in kinds}
    extra["buffer.extremes"] = torch.tensor([-(2**63), 2**63 - 1, 0])
    merged, _ = merge_state(tmp_path, {**small_state(), **extra}, dtype, lora)
    assert same({n: merged[n] for n in extra}, extra)


def test_packed_dtypes_are_copied_or_refused(tmp_path: Path, lora: Path) -> None:
    """Every dtype of the format, also of 4 and 6 bits, comes out as it went in: the output is as
    the reference library demands, with the same bytes."""
    table = [
        ("table.f4", "F4", (6, 4)), ("table.f6", "F6_E3M2", (8,)), ("table.f6b", "F6_E2M3", (4, 2)),
        ("table.f8", "F8_E4M3", (5,)), ("table.e8", "F8_E8M0", (3,)), ("table.c", "C64", (2,)),
        (ADAPTED, "F32", (8, 8)),
    ]  # fmt: skip
    sizes = [12, 6, 6, 5, 3, 16]
    data = bytes(range(1, sum(sizes) + 1)) + raw_bytes(small_state()[ADAPTED])
    base = write_base(tmp_path / "base", small_state())
    (base / "model.safetensors").write_bytes(build_header(table, {"format": "pt"}) + data)
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    found = dict(safetensors.deserialize(written))
    position = 0
    for (name, dtype, shape), size in zip(table, sizes, strict=False):
        assert (found[name]["dtype"], tuple(found[name]["shape"])) == (dtype, shape)
        assert found[name]["data"] == data[position : position + size], name
        position += size


def mixed() -> State:
    """A base that holds several dtypes, odd lengths, scalars and tensors without elements."""
    return {
        ADAPTED: random_of(torch.bfloat16, 8, 8),
        OTHER: random_of(torch.float16, 7, 3),
        NORM: random_of(torch.float32, 13),
        "model.double": random_of(torch.float64, 5, 1, 3),
        "model.scale": torch.tensor(0.7),
        "model.half-scale": torch.tensor(0.7).half(),
        "model.count": torch.tensor(7),
        "model.flag": torch.tensor([True, False, True]),
        "model.empty": torch.zeros(0, 4),
        "model.empty-half": torch.zeros(3, 0, 5).half(),
        "model.empty-ids": torch.zeros(0, dtype=torch.int64),
        "model.one": random_of(torch.bfloat16, 1),
        "model.bytes": random_of(torch.uint8, 3),
        "model.long": random_of(torch.float32, BLOCK_ELEMENTS * 2 + 1),
        "model.exact": random_of(torch.bfloat16, BLOCK_ELEMENTS),
    }


def test_dtype_base_keeps_every_tensor_s_own(tmp_path: Path, lora: Path) -> None:
    """With "base", untouched tensors keep all bits, and the adapted one its dtype."""
    merged, _ = merge_state(tmp_path, mixed(), "base", lora)
    adapted, wanted = merged.pop(ADAPTED), mixed()
    assert (adapted.dtype, adapted.shape) == (torch.bfloat16, (8, 8))
    assert not torch.equal(adapted, wanted.pop(ADAPTED))
    assert same(merged, wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_one_dtype_for_all_floats(tmp_path: Path, lora: Path, dtype: str) -> None:
    """Floats of every kind, length and shape are cast as by torch; the rest is left alone."""
    merged, report = merge_state(tmp_path, mixed(), dtype, lora)
    merged.pop(ADAPTED)
    wanted = {
        name: value.to(torch.float32).to(TORCH[dtype]) if value.is_floating_point() else value
        for name, value in mixed().items()
        if name != ADAPTED
    }
    assert same(merged, wanted)
    assert report.tensors["merge"] == 1
    assert sum(report.tensors.values()) == len(mixed())


def test_the_data_of_every_tensor_is_aligned(tmp_path: Path, lora: Path) -> None:
    """Tensors lie at multiples of their element size, so that readers can map them."""
    base = write_base(tmp_path / "base", mixed())
    loratool.merge(base, lora, tmp_path / "out", dtype="base")
    from loratool.storage.header import read_header

    tensors, _ = read_header(tmp_path / "out" / "model.safetensors")
    assert {t.start % t.itemsize for t in tensors.values()} == {0}


@pytest.mark.parametrize("width", [1, 2, 3, 5, 63, 65, 4095])
def test_odd_widths_are_merged(tmp_path: Path, width: int) -> None:
    """Rows of any length, and a last block that is not full, get their product."""
    rows = min(BLOCK_ELEMENTS // width + 7, 700)
    rng = np.random.default_rng(width)
    weight = rng.integers(-9, 9, (rows, width)).astype(np.float32)
    b = rng.integers(-3, 3, (rows, 2)).astype(np.float32)
    a = rng.integers(-3, 3, (2, width)).astype(np.float32)
    lora = lora_on(tmp_path / "lora", b, a)
    merged, _ = merge_state(tmp_path, {ADAPTED: torch.from_numpy(weight)}, "float16", lora)
    assert np.array_equal(merged[ADAPTED].numpy(), weight + b @ a)  # small integers: exact


def test_a_row_longer_than_a_block_is_merged(tmp_path: Path) -> None:
    """One row may have more elements than a block."""
    width = BLOCK_ELEMENTS + 3
    weight = torch.arange(2 * width).remainder(64).float().view(2, width)
    a = np.arange(width)[None] % 8
    lora = lora_on(tmp_path / "lora", np.array([[2.0], [-1.0]]), a)
    merged, _ = merge_state(tmp_path, {ADAPTED: weight}, "float16", lora)
    assert np.array_equal(merged[ADAPTED].numpy(), weight.numpy() + [[2.0], [-1.0]] * a)


def test_a_name_that_cannot_be_written_is_refused_first(tmp_path: Path, lora: Path) -> None:
    """A tensor name that is no text (a lone surrogate) does not surface as an encoding error."""
    base = tmp_path / "base"
    base.mkdir()
    text = build_header([(ADAPTED, "F32", (8, 8)), ("x", "U8", (1,))], {})[8:]
    data = raw_bytes(small_state()[ADAPTED]) + b"\x01"
    path = header_file(base / "model.safetensors", text.replace(b'"x"', b'"\\ud800"'), data)
    file_error(lambda _: loratool.merge(base, lora, tmp_path / "out"), path)
    assert_clean(tmp_path / "out")


def test_the_config_of_these_tests_is_a_llama() -> None:
    """These bases are of an architecture whose weights are not stored transposed."""
    assert LLAMA["model_type"] == "llama"
