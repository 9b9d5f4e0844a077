"""Do weights come back into their format: the codes, the scales, and what is said of both?"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.golden import NAMES, Golden, golden

from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import Dequantised, dequantised
from loratool.models.quantised.encoding.encoder import Encoder, LedEncoder
from loratool.models.quantised.encoding.encoders import encoder_of
from loratool.models.quantised.encoding.rounding import packed, powers_of, to_e2m1
from loratool.models.quantised.numbers import E2M1, unpacked
from loratool.models.quantised.scheme import Floats, QuantisedTensor
from loratool.storage.tensors import FilePool
from loratool.storage.values import read_float32

WRITTEN = [name for name in NAMES if not re.match("hqq|torchao", name)]
#: A value has the same code again, but for these: powers of two move between code and scale, zero
#: has two codes, and a scale that is the inverse of an inverse may be a unit beside it.
OTHER_BYTES = re.compile("bnb-fp4|ct-mxfp8|modelopt-mxfp8|fp8-block")


def opened(folder: Path) -> Dequantised:
    base = dequantised(open_checkpoint(folder))
    assert isinstance(base, Dequantised)
    return base


def encoded(
    weight: QuantisedTensor, values: Floats, before: Floats, files: FilePool
) -> tuple[dict[str, npt.NDArray[np.uint8]], Floats]:
    """All parts that change, made group by group, and the values that they are said to be."""
    encoder = encoder_of(weight.stored_as)
    assert encoder is not None
    encoder.open(files)
    rows, old = (some.reshape(-1, weight.shape[-1]) for some in (values, before))
    said, found = np.empty_like(rows), {}
    lead = encoder.lead if isinstance(encoder, LedEncoder) else None
    for role in sorted(encoder.sizes, key=lambda role: role != lead):
        out = said if weight.stored_as.parts[role] is weight.stored_as.main else None
        height = len(rows) if role == lead else encoder.strip
        strips = [
            _strip(encoder, role, rows, old, out, low, min(low + height, len(rows)))
            for low in range(0, len(rows), height)
        ]
        assert all(len(strip) == encoder.sizes[role] for strip in strips[:-1])
        found[role] = np.concatenate(strips)
        if isinstance(encoder, LedEncoder) and role == lead:
            encoder.follow(found[role])
    return found, said.reshape(values.shape)


def _strip(
    encoder: Encoder, role: str, rows: Floats, old: Floats, said: Floats | None, low: int, high: int
) -> npt.NDArray[np.uint8]:
    pieces = []
    for at in range(low, high, encoder.group):
        some = slice(at, min(at + encoder.group, high))
        out = None if said is None else said[some]
        pieces.append(encoder.encode(role, at, rows[some], old[some], out))
    return encoder.joined(role, pieces)


def again(
    case: Golden, folder: Path, change: Callable[[Floats], Floats]
) -> list[tuple[Floats, Floats, Floats, bool]]:
    """What comes of all weights when they are changed and encoded: the changed values, those that
    are said to be stored, those that are read, and whether all bytes are as they were."""
    base = opened(case.lay(folder / "before"))
    stored, known = dict(case.stored), {}
    with FilePool() as files:
        for name, weight in base.weights.items():
            before = read_float32(weight, files)
            values = change(before)
            parts, said = encoded(weight, values, before, files)
            same = True
            for role, raw in parts.items():
                own = weight.stored_as.parts[role].name
                old = case.stored[own]
                whole = torch.zeros(old.numel() * old.element_size(), dtype=torch.uint8)
                assert 0 <= len(whole) - len(raw) < old.element_size()
                whole[: len(raw)] = torch.from_numpy(raw)
                stored[own] = whole.view(old.dtype).reshape(old.shape)
                same = same and torch.equal(whole, old.reshape(-1).view(torch.uint8))
            known[name] = values, said, same
    after = opened(Golden(stored, {}, case.config, case.about).lay(folder / "after"))
    with FilePool() as files:
        return [
            (values, said, read_float32(after.weights[name], files), same)
            for name, (values, said, same) in known.items()
        ]


@pytest.mark.parametrize("name", WRITTEN)
def test_unchanged_values_stay(name: str, tmp_path: Path) -> None:
    """Weights of every format, made by its own library: what they stand for comes back, with the
    bytes that it had wherever a value has one code."""
    found = again(golden(name), tmp_path, lambda values: values)
    for values, said, read, same in found:
        assert np.array_equal(said, read)
        # A unit of the scale, where that is computed anew.
        assert np.allclose(read, values, rtol=2.0**-22 if OTHER_BYTES.match(name) else 0, atol=0)
        assert same or OTHER_BYTES.match(name)


@pytest.mark.parametrize("name", WRITTEN)
def test_changed_values_are_read_as_is_said(name: str, tmp_path: Path) -> None:
    """Changed weights are encoded and read again: as what the encoder says, and at most as far off
    as the format rounds."""
    generator = np.random.default_rng(7)

    def change(values: Floats) -> Floats:
        noise = generator.standard_normal(values.shape).astype(np.float32)
        return values + noise * np.float32(0.1 * np.abs(values).mean())

    for values, said, read, _ in again(golden(name), tmp_path, change):
        assert np.array_equal(said, read)
        assert np.linalg.norm(read - values) <= 0.12 * np.linalg.norm(values)


def test_a_calibrated_scale_stays(tmp_path: Path) -> None:
    """Where a scale is not made of the largest value of its block, values keep their codes; where
    they outgrow it, it is made anew."""
    case = golden("modelopt-fp8-blocks")
    base = opened(case.lay(tmp_path))
    name, weight = next((n, w) for n, w in base.weights.items() if len(w.shape) == 2)
    with FilePool() as files:
        before = read_float32(weight, files)
        scales = weight.stored_as.parts["scale"]
        wide = {"weight": case.stored[weight.stored_as.main.name].float() * 0.5}
        codes = wide["weight"].to(torch.float8_e4m3fn)
        case.stored[weight.stored_as.main.name] = codes  # no block has its largest code any more
        base = opened(case.lay(tmp_path / "wide"))
        weight, before = base.weights[name], before * np.float32(0.5)
        parts, _ = encoded(weight, before * np.float32(1.01), before, files)
        old = case.stored[scales.name].reshape(-1).view(torch.uint8).numpy()
        assert np.array_equal(parts["scale"], old)
        parts, said = encoded(weight, before * np.float32(3), before, files)
        assert not np.array_equal(parts["scale"], old)
        assert np.abs(said - 3 * before).max() <= 2.0**-4 * 3 * np.abs(before).max()


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_codes_are_unpacked(bits: int) -> None:
    """Codes of every width, in rows that end within a word."""
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, 37)).astype(np.uint8)
    words = -(-37 * bits // 32)
    octets = packed(codes, bits, 4 * words)
    assert octets.shape == (5, 4 * words)
    assert np.array_equal(unpacked(octets.view(np.int32), bits)[:, :37], codes)


def test_the_nearest_fp4_code() -> None:
    """Every value has the nearest code; half way between two it is the even one."""
    values = np.concatenate([np.linspace(-7, 7, 2801), [0.75, 1.75, 3.5, -5.0, 100]])
    codes = to_e2m1(values.astype(np.float32))
    distances = np.abs(values[:, None] - E2M1[None].astype(np.float64))
    assert np.allclose(distances[np.arange(len(values)), codes], distances.min(1), atol=1e-6)
    halves = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    assert np.array_equal(E2M1[to_e2m1(halves)], np.array([0, 1, 1, 2, 2, 4, 4], np.float32))
    assert np.array_equal(E2M1[to_e2m1(-halves)], -np.array([0, 1, 1, 2, 2, 4, 4], np.float32))


@pytest.mark.parametrize("below", [7, 464])
def test_the_smallest_power_of_two(below: float) -> None:
    """A power of two brings the largest value below a bound, and half of it does not."""
    values = np.ldexp(np.linspace(1, 2, 100, dtype=np.float32), np.arange(-50, 50))
    values[:3] = below / 2, below, below * 2
    powers = powers_of(values, np.ones_like(values), below)
    assert (values / powers < below).all()
    assert (values / (powers / 2) >= below).all()
    zero = powers_of(np.zeros(1, np.float32), np.full(1, 0.25, np.float32), below)
    assert zero.tolist() == [0.25]
