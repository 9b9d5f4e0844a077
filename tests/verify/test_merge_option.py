"""merge --verify reads back what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cli import run_cli
from helpers.files import load
from helpers.outcomes import assert_clean, assert_clear
from helpers.places import FIXTURES
from helpers.verifying import bad

import loratool
from loratool.errors import VerifyError
from loratool.storage.shardfile import ShardWriter


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "base"])
def test_merge_verifies_what_it_wrote(dtype: str, reversible: bool, tmp_path: Path) -> None:
    """`merge(verify=True)` passes good output on, and gives the same bytes as without."""
    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    options: dict[str, Any] = {"dtype": dtype, "reversible": reversible}
    report = loratool.merge(base, adapter, tmp_path / "a", verify=True, **options)
    assert report.verified
    plain = loratool.merge(base, adapter, tmp_path / "b", **options)
    assert not plain.verified
    one, other = load(tmp_path / "a"), load(tmp_path / "b")
    assert all(torch.equal(one[n], other[n]) for n in one.keys() | other.keys())


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("bit", [0, 6])
def test_merge_leaves_nothing_if_a_byte_was_written_wrong(
    bit: int, reversible: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A bit that turns over on its way to the disk fails the merge, and nothing appears."""
    write, calls = ShardWriter.write, [0]

    def wrong(self: ShardWriter, offset: int, data: memoryview) -> None:
        calls[0] += 1
        if calls[0] == 20:
            broken = np.array(np.frombuffer(data, np.uint8))
            broken[len(broken) // 4 * 2] ^= 1 << bit
            data = broken.data
        write(self, offset, data)

    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", wrong)
        with pytest.raises(VerifyError) as caught:
            loratool.merge(base, adapter, tmp_path / "out", verify=True, reversible=reversible)
        assert calls[0] >= 20
    assert_clear(caught.value, "1 values")
    assert caught.value.exit_code == 3
    assert_clean(tmp_path / "out")


def test_merge_without_verify_does_not_notice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same bit passes without --verify, and `verify` finds it afterwards."""
    write, calls = ShardWriter.write, [0]

    def wrong(self: ShardWriter, offset: int, data: memoryview) -> None:
        calls[0] += 1
        if offset == 0:
            broken = np.array(np.frombuffer(data, np.uint8))
            broken[1] ^= 0x40
            data = broken.data
        write(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", wrong)
        loratool.merge(FIXTURES / "base", FIXTURES / "adapter", tmp_path / "out")
    report = loratool.verify(tmp_path / "out", FIXTURES / "base", FIXTURES / "adapter")
    assert report.verdict == "no"
    assert len(bad(report)) == 3  # the first tensor of each shard


def test_command_line_verifies_a_merge(tmp_path: Path) -> None:
    """`loratool merge --verify` exits with 0 and says that the output was verified."""
    base, adapter = FIXTURES / "base", FIXTURES / "adapter"
    said = run_cli("merge", str(base), str(adapter), "-o", str(tmp_path / "out"), "--verify")
    assert said.exit_code == 0
    assert "verified" in said.stdout
