"""Orders and filters."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import lora
from helpers.listing import entries, kohya, mlx, model

import loratool
from loratool.cataloguing.choosing import ORDERS
from loratool.cli.list import _ORDERS
from loratool.errors import UsageError


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    lora(tmp_path / "b", rank=8, base_model_name_or_path="meta-llama/Llama-3-8B")
    lora(tmp_path / "a", rank=4, base_model_name_or_path="Qwen/Qwen3")
    mlx(tmp_path / "c", rank=16)
    kohya(tmp_path / "d.safetensors", rank=32)
    model(tmp_path / "m")
    return tmp_path


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("name", ["a", "b", "c", "d.safetensors", "m"]),
        ("size", ["m", "a", "b", "c", "d.safetensors"]),
        ("rank", ["a", "b", "c", "d.safetensors", "m"]),
        ("base", ["m", "b", "a", "c", "d.safetensors"]),
        ("dialect", ["d.safetensors", "c", "a", "b", "m"]),
    ],
)
def test_orders(loras: Path, order: str, expected: list[str]) -> None:
    """Smallest first, by name where equal, last what is not known; `reverse` turns the known."""
    assert list(entries(loras, sort=order)) == expected
    turned = list(entries(loras, sort=order, reverse=True))
    known = [e.path for e in entries(loras).values() if ORDERS[order](e) is not None]
    assert set(turned[: len(known)]) == set(known)


def test_the_command_offers_the_orders_there_are() -> None:
    """The choice of --sort is that of the library."""
    assert tuple(ORDERS) == _ORDERS


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"base": "LLAMA"}, ["b", "m"]),
        ({"dialect": "mlx"}, ["c"]),
        ({"dialect": "kohya"}, ["d.safetensors"]),
        ({"rank": "4"}, ["a"]),
        ({"rank": 8}, ["b"]),
        ({"rank": "5-16"}, ["b", "c"]),
        ({"rank": "5-16", "dialect": "peft"}, ["b"]),
        ({"base": "nothing"}, []),
    ],
)
def test_filters(loras: Path, filters: dict[str, str], expected: list[str]) -> None:
    """All that are given must fit, and how many there are without them is known."""
    report = loratool.catalog(loras, **filters)  # type: ignore[arg-type]
    assert [entry.path for entry in report.entries] == expected
    assert report.found == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": "8-4"}, "no range"),
        ({"rank": "x"}, "no range"),
        ({"dialect": "pfet"}, "Unknown dialect"),
        ({"sort": "colour"}, "Unknown order"),
    ],
)
def test_what_cannot_be_meant_is_refused(loras: Path, options: dict[str, str], words: str) -> None:
    """With the nearest or with what can be written."""
    with pytest.raises(UsageError, match=words):
        loratool.catalog(loras, **options)  # type: ignore[arg-type]
