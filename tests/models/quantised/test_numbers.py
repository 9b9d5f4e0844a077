"""Codes of a few bits, taken apart and turned round."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratool.models.quantised.encoding.rounding import packed
from loratool.models.quantised.numbers import (
    E2M1,
    decode_columns,
    multiply_groups,
    thread_buffer,
    unpacked,
)


@given(
    st.integers(1, 8), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9),
    st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_words_are_one_long_number(bits: int, words: list[int], rows: int) -> None:
    """Codes of every width, also those that straddle words, in every row alike."""
    number = sum(word << 32 * place for place, word in enumerate(words))
    count = 32 * len(words) // bits
    expected = [number >> bits * place & (1 << bits) - 1 for place in range(count)]
    stacked = np.array([words] * rows, np.uint32).view(np.int32)
    assert unpacked(stacked, bits).tolist() == [expected] * rows


@pytest.mark.parametrize("straddling", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_go_into_words_and_come_back(bits: int, straddling: bool) -> None:
    """Without gaps, and by whole words: what is packed is what was unpacked."""
    rng = np.random.default_rng(bits)
    for count in (1, 31, 32, 33, 100):
        codes = rng.integers(0, 1 << bits, (3, count), dtype=np.uint8)
        words = -(-count * bits // 32) if straddling else -(-count // (32 // bits))
        octets = packed(codes, bits, 4 * words, straddling)
        assert octets.shape == (3, 4 * words)
        back = unpacked(np.ascontiguousarray(octets).view(np.int32), bits, straddling)
        assert np.array_equal(back[:, :count], codes)


def test_columns_of_codes_that_begin_anywhere() -> None:
    """Any range of columns, as rows: it may begin and end within a byte."""
    octets = np.random.default_rng(0).integers(0, 256, (3, 4), dtype=np.uint8)
    codes = np.stack([octets & 15, octets >> 4], -1).reshape(3, 8)
    for low, high in itertools.combinations(range(9), 2):
        out = np.full((high - low, 3), np.nan, np.float32)
        decode_columns(octets, low, high, out)
        expected = E2M1[codes[:, low:high]].T
        assert np.array_equal(out.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 100])
def test_groups_end_where_the_row_does(group: int) -> None:
    """The last group is short, or the only one is longer than the row."""
    values = np.arange(14, dtype=np.float32).reshape(2, 7)
    scales = np.arange(1, 2 * -(-7 // group) + 1, dtype=np.float32).reshape(2, -1)
    expected = values * np.repeat(scales, group, 1)[:, :7]
    multiply_groups(values, scales, group)
    assert np.array_equal(values, expected)


def test_threads_have_buffers_of_their_own() -> None:
    """What one thread keeps is not what another one writes."""
    own = thread_buffer("codes", 8)
    own[:] = 1

    def other() -> None:
        thread_buffer("codes", 8)[:] = 2

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert own.tolist() == [1] * 8
    assert thread_buffer("codes", 8) is not own
    assert thread_buffer("codes", 8).tolist() == [1] * 8
