"""Values of an expert stack: one expert's factors, however the file holds them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.experts import expert_pairs
from safetensors.numpy import save_file

from loratool.adapters import expertvalues
from loratool.adapters.experts import ExpertStack, Packing
from loratool.errors import UsageError
from loratool.storage.header import read_header
from loratool.storage.tensors import FilePool

E, R, OUT, IN = 5, 3, 7, 4
PAIRS = expert_pairs(E, OUT, IN, R)
B, A = np.stack([b for b, _ in PAIRS]), np.stack([a for _, a in PAIRS])

#: A and B as files have them, and what is said of B.
FORMS: dict[str, tuple[np.ndarray, np.ndarray, Packing]] = {
    "PEFT": (A.reshape(E * R, IN), B.transpose(1, 2, 0).reshape(OUT, R * E), "rank-major"),
    "Megatron": (A, B.transpose(1, 2, 0), "rank-major"),
    "Unsloth": (A.reshape(E * R, IN), B.transpose(1, 0, 2).reshape(OUT, E * R), "grouped"),
    "stacked": (A, B, "stacked"),
}


def stored(folder: Path, a: np.ndarray, b: np.ndarray, packing: Packing) -> ExpertStack:
    """A stack of these factors in a file."""
    path = folder / "x.safetensors"
    save_file({"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}, path)
    infos, _ = read_header(path)
    return ExpertStack("m.experts", "down_proj", infos["a"], infos["b"], E, R, 6.0, 2.0, packing)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("form", FORMS)
def test_each_expert_has_its_own_factors(form: str, dtype: str, tmp_path: Path) -> None:
    """B and A of an expert are the same in whatever order a file has them."""
    a, b, packing = FORMS[form]
    stack = stored(tmp_path, a.astype(dtype), b.astype(dtype), packing)
    assert stack.is_sound
    assert (stack.shape, stack.rank, stack.shares) == ((OUT, IN), R, (False, False))
    with FilePool() as files:
        for index in range(E):
            left, right = stack.expert(index).left_right(files)
            assert np.array_equal(left, B[index].astype(dtype))
            assert np.array_equal(right, A[index].astype(dtype))
            part = stack.expert(index, swapped=True).part_of(files)
            delta = B[index].astype(dtype).astype("f4") @ A[index].astype(dtype).astype("f4")
            assert np.allclose(part(slice(1, 3), slice(2, 5)), delta.T[1:3, 2:5], atol=1e-5)


def test_batches_hold_every_expert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of some experts are all experts in their order."""
    monkeypatch.setattr("loratool.adapters.experts._BATCH", 2 * R * OUT)
    stack = stored(tmp_path, *FORMS["PEFT"])
    with FilePool() as files:
        found = list(stack.batches(files))
    assert [list(numbers) for numbers, _, _ in found] == [[0, 1], [2, 3], [4]]
    assert np.array_equal(np.concatenate([b for _, b, _ in found]), B)
    assert np.array_equal(np.concatenate([a for _, _, a in found]), A)


def test_a_factor_of_all_experts_is_each_experts(tmp_path: Path) -> None:
    """A that all experts share is that of each of them."""
    stack = stored(tmp_path, A[0], B, "stacked")
    assert stack.is_sound
    assert stack.shares == (True, False)
    left, right = stack.expert(3).left_right()
    assert np.array_equal(left, B[3])
    assert np.array_equal(right, A[0])


def test_one_reading_serves_all_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B is read and sorted once for all experts and threads, and again only if memory is short."""
    stack = stored(tmp_path, *FORMS["PEFT"])
    count = 0
    original = expertvalues._sorted

    def counting(*args: object) -> object:
        nonlocal count
        count += 1
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(expertvalues, "_sorted", counting)
    with FilePool() as files:
        threads = [
            threading.Thread(target=lambda n: stack.expert(n).left_right(files), args=(n,))
            for n in range(E)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert count == 1


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors that were asked for longest ago are let go."""
    stacks = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        stacks.append(stored(tmp_path / str(number), *FORMS["PEFT"]))
    monkeypatch.setattr(expertvalues, "_KEPT", 2 * stacks[0].b.nbytes)
    with FilePool() as files:
        for stack in (stacks[0], stacks[1], stacks[0], stacks[2]):
            stack.expert(0).left_right(files)
        assert list(expertvalues._kept_of(files)._entries) == [stacks[0].b, stacks[2].b]


#: By version of PEFT: whether the Δ of a square parameter is transposed, for most models and for
#: those whose class is_transposed.
VERSIONS: dict[str, tuple[bool | None, bool | None]] = {
    "0.17.0": (True, True),
    "0.18.1": (True, True),
    "0.18.2.dev0": (None, None),
    "0.19.0": (True, False),
    "0.19.1.dev0": (None, None),
    "0.19.1": (False, True),
    "0.21.2": (False, True),
    "0.22.0.dev0@abc": (False, True),
    "1.0.0": (False, True),
    "": (None, None),
    "latest": (None, None),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_says_how_square_experts_lie(version: str, tmp_path: Path) -> None:
    """Where shapes cannot tell, the version of PEFT does, or nothing."""
    stack = stored(tmp_path, *FORMS["PEFT"])
    stack = ExpertStack(
        stack.path, stack.parameter, stack.a, stack.b, E, R, 1.0, 1.0, peft_version=version
    )
    assert (stack.orientation(False), stack.orientation(True)) == VERSIONS[version]


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    """A layout that nobody knows is an error with the known ones."""
    import loratool

    with pytest.raises(UsageError, match="group") as caught:
        loratool.inspect(tmp_path, expert_b_layout="group")
    assert "grouped" in caught.value.hint
