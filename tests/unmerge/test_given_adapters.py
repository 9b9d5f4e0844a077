"""Adapters in another order are put in order; the wrong ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.files import small_state, write_base
from helpers.outcomes import assert_clean, sha256s
from helpers.unmerging import comes_back, no_unmerge, right_or_refused

import loratool
from loratool.errors import LoraToolError, RestoreError, UsageError


def test_adapters_in_another_order_are_put_in_order(
    two: tuple[Path, list[Path], Path], tmp_path: Path
) -> None:
    """Each adapter gets the weight that it was merged with, whatever the order they are given in,
    and weights that are given are taken for the adapters beside them."""
    base, (style, task), out = two
    for i, options in enumerate([{}, {"weights": [-0.4, 0.7]}]):
        report = loratool.unmerge(out, [task, style], tmp_path / f"back-{i}", **options)
        assert sha256s(tmp_path / f"back-{i}") == sha256s(base)
        assert report.adapters == [str(style), str(task)]
        assert report.weights == [0.7, -0.4]


def test_one_adapter_twice_is_taken_back(tmp_path: Path, lora_dir: Path) -> None:
    """The same adapter merged twice with unlike weights is recognised twice."""
    base = write_base(tmp_path / "base", small_state())
    comes_back(base, [lora_dir, lora_dir], tmp_path, weights=[0.25, -1.5])
    out = tmp_path / "out"
    report = loratool.unmerge(
        out, [lora_dir, lora_dir], tmp_path / "b", weights=[-1.5, 0.25], dry_run=True
    )
    assert report.weights == [0.25, -1.5]
    no_unmerge(RestoreError, out, lora_dir, tmp_path / "no", "more than once")
    no_unmerge(RestoreError, out, [lora_dir] * 3, tmp_path / "no", "not among")


def test_the_wrong_adapters_are_refused(
    two: tuple[Path, list[Path], Path], tmp_path: Path, lora_dir: Path
) -> None:
    """Another adapter, one too many, one too few: refused with those that the model holds."""
    _, (style, task), out = two
    back = tmp_path / "back"
    known = ("style (weight 0.7", "task (weight -0.4")
    no_unmerge(RestoreError, out, lora_dir, back, str(lora_dir), "not among", *known)
    no_unmerge(RestoreError, out, [style, lora_dir], back, str(lora_dir), *known)
    no_unmerge(RestoreError, out, [style, task, lora_dir], back, str(lora_dir))
    no_unmerge(RestoreError, out, [style, style], back, str(style))
    no_unmerge(RestoreError, out, style, back, "Not given", "task (weight -0.4")


def test_wrong_weights_are_refused(two: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    """A weight that contradicts the record is an error, and so are too few weights."""
    _, adapters, out = two
    back = tmp_path / "back"
    no_unmerge(RestoreError, out, adapters, back, "weight 0.7", "not 0.8", weights=[0.8, -0.4])
    no_unmerge(RestoreError, out, adapters, back, "weight", weights=[-0.4, 0.7])
    with pytest.raises(UsageError):
        loratool.unmerge(out, adapters, back, weights=[0.7])
    assert_clean(back)


def test_a_changed_adapter_is_refused(two: tuple[Path, list[Path], Path], tmp_path: Path) -> None:
    """One other byte in its weights, or in its config, and it is not the adapter that was
    merged."""
    base, (style, task), out = two
    back = tmp_path / "back"
    path = style / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    no_unmerge(RestoreError, out, [style, task], back, str(style), "not among")
    path.write_bytes(content)
    config = style / "adapter_config.json"
    text = config.read_text()
    config.write_text(text + " ")
    no_unmerge(RestoreError, out, [style, task], back, str(style), "adapter_config.json")
    config.unlink()
    no_unmerge(LoraToolError, out, [style, task], back)
    config.write_text(text)
    assert right_or_refused(out, [style, task], back, base)
