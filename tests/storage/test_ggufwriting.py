"""GGUF files that are written: byte for byte those of llama.cpp's own package, and read back."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.outcomes import assert_clear
from helpers.places import FIXTURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import FileError
from loratool.storage.folder import Folder
from loratool.storage.ggufwriting import TypedValue, gguf_layout, write_gguf
from loratool.storage.outgoing import Outgoing
from loratool.storage.tensors import Bytes
from loratool.storage.values import read_float32, read_raw
from loratool.storage.weights import Contents, read_contents

on_files = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)

FORMS = {
    "F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"
}  # fmt: skip


def outgoing(values: np.ndarray, dtype: str, piece: int = 4) -> Outgoing:
    raw = np.frombuffer(values.tobytes(), np.uint8)

    def read() -> list[Bytes]:
        return [raw[low : low + piece] for low in range(0, len(raw), piece)]

    return Outgoing(dtype, values.shape, read)


def read_gguf(path: Path) -> Contents:
    return read_contents(Folder(path.parent), path.name)


def test_the_bytes_are_those_of_gguf_s_own_package(tmp_path: Path) -> None:
    """The file that gguf's writer made of these values, types and tensors is the same file."""
    numbers = np.arange(48, dtype=np.float32)
    values = {
        "general.architecture": TypedValue("string", "llama"),
        "general.type": TypedValue("string", "adapter"),
        "adapter.type": TypedValue("string", "lora"),
        "adapter.lora.alpha": TypedValue("float32", 16.0),
        "adapter.alora.invocation_tokens": TypedValue("int32[]", [1, 2, 300_000]),
        "general.quantization_version": TypedValue("uint32", 2),
    }
    tensors = {
        "blk.0.attn_q.weight.lora_a": outgoing(numbers[:6].reshape(2, 3), "F32"),
        "blk.0.attn_q.weight.lora_b": outgoing(
            numbers[:10].reshape(5, 2).astype(np.float16), "F16"
        ),
        "blk.0.ffn_up_exps.weight.lora_a": outgoing(numbers[:24].reshape(2, 4, 3), "F32"),
    }
    write_gguf(tmp_path / "x.gguf", values, tensors)
    wanted = (FIXTURES / "containers/adapter.gguf").read_bytes()
    assert (tmp_path / "x.gguf").read_bytes() == wanted
    assert gguf_layout(values, tensors).size == len(wanted)


#: Values that each type can hold.
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text(max_size=9), "bool": st.booleans(), "float64": st.floats(allow_nan=False),
    "float32": st.floats(allow_nan=False, width=32),
    **{f"uint{n}": st.integers(0, 2**n - 1) for n in (8, 16, 32, 64)},
    **{f"int{n}": st.integers(-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)},
}  # fmt: skip


@st.composite
def typed_values(draw: st.DrawFn) -> TypedValue:
    kind = draw(st.sampled_from(sorted(KINDS)))
    if draw(st.booleans()):
        return TypedValue(f"{kind}[]", draw(st.lists(KINDS[kind], max_size=4)))
    return TypedValue(kind, draw(KINDS[kind]))


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    dtype = draw(st.sampled_from(sorted(FORMS)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    count = int(np.prod(shape))
    return dtype, np.arange(count).astype(FORMS[dtype]).reshape(shape)


@settings(on_files, max_examples=60)
@given(
    values=st.dictionaries(
        st.text(max_size=8).filter(lambda key: key != "general.alignment"),
        typed_values(),
        max_size=4,
    ),
    tensors=st.dictionaries(st.text(max_size=8), arrays(), max_size=4),
    piece=st.integers(1, 99),
)
def test_any_file_reads_back(
    tmp_path: Path,
    values: dict[str, TypedValue],
    tensors: dict[str, tuple[str, np.ndarray]],
    piece: int,
) -> None:
    """Any values and tensors come back; the file has the size that was foretold."""
    path = tmp_path / "any.gguf"
    path.unlink(missing_ok=True)
    going = {name: outgoing(array, dtype, piece) for name, (dtype, array) in tensors.items()}
    write_gguf(path, values, going)
    found = read_gguf(path)
    assert found.values == {key: one.value for key, one in values.items()}
    assert list(found.tensors) == list(tensors)
    for name, (dtype, array) in tensors.items():
        info = found.tensors[name]
        assert (info.name, info.dtype, info.shape) == (name, dtype, array.shape)
        assert read_raw(info).tobytes() == array.tobytes()
    layout = gguf_layout(values, going)
    assert path.stat().st_size == layout.size
    assert layout.size % 32 == 0
    assert all(place % 32 == 0 for place in layout.offsets.values())


def test_gaps_are_zeros_in_the_file(tmp_path: Path) -> None:
    """What lies between and behind the tensors is written, so that the file is whole."""
    tensors = {name: outgoing(np.ones(3, np.float32), "F32") for name in "ab"}
    write_gguf(tmp_path / "x.gguf", {}, tensors)
    data = (tmp_path / "x.gguf").read_bytes()[-64:]
    assert data == (struct.pack("<3f", 1, 1, 1) + bytes(20)) * 2


def test_the_alignment_among_the_values_is_kept(tmp_path: Path) -> None:
    """A file that says 64 has its data at multiples of 64, and is read so."""
    values = {"general.alignment": TypedValue("uint32", 64)}
    tensors = {name: outgoing(np.ones(3, np.float32), "F32") for name in "ab"}
    write_gguf(tmp_path / "x.gguf", values, tensors)
    found = read_gguf(tmp_path / "x.gguf").tensors
    assert [info.start % 64 for info in found.values()] == [0, 0]
    assert all(read_float32(info).tolist() == [1, 1, 1] for info in found.values())
    assert (tmp_path / "x.gguf").stat().st_size == gguf_layout(values, tensors).size


REFUSED = {
    "dtype": ("w", outgoing(np.ones(3, np.uint8), "U8"), "U8"),
    "name": ("w" * 64, outgoing(np.ones(3, np.float32), "F32"), "63 bytes"),
    "axes": ("w", outgoing(np.ones((1,) * 5, np.float32), "F32"), "4 axes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ggml_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    """Before a byte is written, with the tensor's name."""
    name, tensor, words = REFUSED[case]
    with pytest.raises(FileError) as caught:
        write_gguf(tmp_path / "x.gguf", {}, {"good": REFUSED["name"][1], name: tensor})
    assert_clear(caught.value, name, words)
    assert not (tmp_path / "x.gguf").exists()


def test_a_tensor_of_another_length_is_noticed(tmp_path: Path) -> None:
    """Bytes that are not those of the shape would overwrite what lies behind."""
    wrong = Outgoing("F32", (3,), lambda: [np.zeros(16, np.uint8)])
    with pytest.raises(ValueError, match="16 bytes"):
        write_gguf(tmp_path / "x.gguf", {}, {"w": wrong})
