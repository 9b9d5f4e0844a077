"""Torch files: read as torch reads them, without torch, and without running anything in them."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.files import CODES, random_of, raw_bytes, read_pickled
from helpers.outcomes import assert_clear, file_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import FileError
from loratool.storage.values import read_float32, read_raw

both_layouts = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])

on_files = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def save(path: Path, value: Any, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def flattened(value: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of what torch.load returned, under the names that read_pickled gives them."""
    if isinstance(value, torch.Tensor):
        return {prefix or "tensor": value}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    found = {}
    for key, item in items:
        found.update(flattened(item, f"{prefix}.{key}" if prefix else str(key)))
    return found


def check_like_torch(path: Path, weights_only: bool = True) -> None:
    """read_pickled finds the names, dtypes, shapes and bytes that torch.load finds."""
    wanted = flattened(torch.load(path, weights_only=weights_only))
    found, _ = read_pickled(path)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        info = found[name]
        assert (info.name, info.dtype, info.shape) == (name, CODES[tensor.dtype], tensor.shape)
        assert read_raw(info).tobytes() == raw_bytes(tensor), name


OLD_DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip
#: Dtypes for which torch writes another kind of entry, in zip files only.
NEW_DTYPES = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


@both_layouts
def test_every_dtype_reads_like_torch(tmp_path: Path, zipped: bool) -> None:
    """All plain dtypes, in several shapes, have torch's dtype, shape and bytes."""
    value = {f"{d}.{s}": random_of(d, *s) for d in OLD_DTYPES for s in [(3, 5), (7,), (), (0, 4)]}
    check_like_torch(save(tmp_path / "x.bin", value, zipped))


@pytest.mark.parametrize("dtype", NEW_DTYPES, ids=str)
def test_new_dtypes_read_like_torch(tmp_path: Path, dtype: torch.dtype) -> None:
    """Dtypes that torch stores without a storage type of their own are read too."""
    value = {"plain": random_of(dtype, 3, 5), "view": random_of(dtype, 6, 5)[2:4]}
    check_like_torch(save(tmp_path / "x.bin", value))


def views() -> dict[str, torch.Tensor]:
    whole = random_of(torch.float32, 6, 8)
    half = random_of(torch.bfloat16, 4, 5, 6)
    return {
        "whole": whole,
        "again": whole,
        "transposed": whole.T,
        "rows": whole[2:5],
        "columns": whole[:, 3:7],
        "every-other": whole[1::2, ::3],
        "one-row": whole[4],
        "one-column": whole[:, 2],
        "element": whole[3, 4],
        "row-of-one": whole[5:6, :],
        "column-of-one": whole[:, 5:6],
        "diagonal": whole.diagonal(),
        "none": whole[3:3, :],
        "permuted": half.permute(2, 0, 1),
        "inner": half[1:3, :, 2:5],
        "reshaped": half.reshape(10, 12)[3:, :],
        "expanded": random_of(torch.float16, 1, 7).expand(5, 7),
        "expanded-scalar": torch.tensor(3.25).expand(4, 2),
    }


@both_layouts
@pytest.mark.parametrize("alone", [True, False], ids=["each-alone", "all-in-one"])
def test_views_read_like_torch(tmp_path: Path, zipped: bool, alone: bool) -> None:
    """Slices, transposes, and tensors sharing one storage come out as their own elements."""
    if alone:
        for number, (name, view) in enumerate(views().items()):
            check_like_torch(save(tmp_path / f"{number}.bin", {name: view}, zipped))
    else:
        check_like_torch(save(tmp_path / "x.bin", views(), zipped))


@both_layouts
def test_float32_of_a_view_has_the_view_s_shape(tmp_path: Path, zipped: bool) -> None:
    """Values of strided tensors are read in the order of their shape, not of the storage."""
    path = save(tmp_path / "x.bin", views(), zipped)
    found, _ = read_pickled(path)
    for name, view in views().items():
        assert np.array_equal(read_float32(found[name]), view.float().numpy())


def state_of_a_module() -> OrderedDict[str, torch.Tensor]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    return model.state_dict()  # it carries _metadata, which is pickled along


def parameter_with_a_note() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    parameter.tagged = True  # type: ignore[attr-defined]
    return parameter


CONTAINERS: dict[str, tuple[Any, str]] = {
    "nested": ({"state": {"0": {"exp_avg": torch.ones(2)}}, "step": 5, "name": "x"}, "dict"),
    "ordered": (OrderedDict(b=torch.ones(2), a=torch.zeros(3)), "dict"),
    "state-dict": (state_of_a_module(), "dict"),
    "parameters": ({"w": torch.nn.Parameter(torch.ones(2, 3))}, "dict"),
    "noted-parameter": ({"w": parameter_with_a_note()}, "dict"),
    "requires-grad": ({"w": torch.ones(2, requires_grad=True)}, "dict"),
    "list": ([torch.ones(2), torch.zeros(3)], "list"),
    "tuple": ((torch.ones(2), {"a": torch.zeros(3)}), "tuple"),
    "tensor": (torch.arange(6.0).reshape(2, 3), "tensor"),
    "number-keys": ({0: torch.ones(1), 1: {2: torch.zeros(2)}}, "dict"),
    "other-values": ({"w": torch.ones(2), "f": 1.5, "n": None, "s": torch.Size([1])}, "dict"),
    "no-tensors": ({"epoch": 3}, "dict"),
    "empty": ({}, "dict"),
}


@both_layouts
@pytest.mark.parametrize("case", CONTAINERS)
def test_containers_are_flattened(tmp_path: Path, case: str, zipped: bool) -> None:
    """Tables, lists, parameters and state dicts give torch's tensors under dotted names."""
    value, kind = CONTAINERS[case]
    path = save(tmp_path / "x.bin", value, zipped)
    check_like_torch(path)
    assert read_pickled(path)[1] == kind


STATE = {"layers.0.lora_A": torch.ones(2, 3), "head": torch.zeros(2)}
WRAPPED: dict[str, tuple[Any, set[str]]] = {
    "model": ({"model": STATE, "step": 5, "alpha": 16.0}, set(STATE)),
    "state_dict": ({"epoch": 1, "state_dict": OrderedDict(STATE)}, set(STATE)),
    "beside-an-optimizer": (
        {"model": STATE, "optimizer": {"state": {0: torch.ones(1)}}},
        {"model.layers.0.lora_A", "model.head", "optimizer.state.0"},
    ),
    "nested-names": ({"model": {"layers": {"w": torch.ones(2)}}}, {"model.layers.w"}),
    "no-dots": ({"model": {"w": torch.ones(2)}}, {"model.w"}),
    "another-name": ({"encoder": STATE}, {"encoder.layers.0.lora_A", "encoder.head"}),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_a_state_dict_beside_other_things_keeps_its_names(tmp_path: Path, case: str) -> None:
    """The usual names of a table with the one state dict are no part of its tensors' names."""
    value, names = WRAPPED[case]
    found, kind = read_pickled(save(tmp_path / "x.pth", value))
    assert set(found) == names
    assert {info.name for info in found.values()} == names
    assert kind == "dict"


@pytest.mark.parametrize("protocol", range(2, 6))
@both_layouts
def test_every_pickle_protocol_reads(tmp_path: Path, zipped: bool, protocol: int) -> None:
    """The protocol of the pickle inside is its writer's choice."""
    path = tmp_path / "x.bin"
    value = {"w": torch.ones(2), "t": views()["transposed"]}
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    check_like_torch(path, weights_only=protocol < 4)  # torch's own safe reader stops at 3


def test_many_storages_read_like_torch(tmp_path: Path) -> None:
    """Storages of different widths, one after the other, are each found where they lie."""
    value = {f"{i}": random_of(OLD_DTYPES[i % len(OLD_DTYPES)], i % 7, 3) for i in range(60)}
    for zipped in (True, False):
        check_like_torch(save(tmp_path / f"{zipped}.bin", value, zipped))


@both_layouts
def test_a_storage_saved_bare_does_not_shift_the_others(tmp_path: Path, zipped: bool) -> None:
    """A storage without a tensor takes its own width in the file; tensors behind it stay right."""
    value = {
        "a": random_of(torch.float16, 5), "bare": torch.ones(3, dtype=torch.float16).storage(),
        "b": random_of(torch.float32, 7), "c": random_of(torch.int64, 2),
    }  # fmt: skip
    for number in range(4):
        # Storages lie in the order of their keys, which are addresses: try several.
        value["bare"] = torch.ones(3 + number, dtype=torch.float16).storage()
        check_like_torch(save(tmp_path / f"{number}.bin", value, zipped))


@both_layouts
def test_two_tensors_of_one_flat_name_are_refused(tmp_path: Path, zipped: bool) -> None:
    """{"a.b": x} and {"a": {"b": y}} meet under one name; neither is dropped in silence."""
    value = {"a.b": torch.ones(2, dtype=torch.float16), "a": {"b": torch.zeros(3)}}
    file_error(read_pickled, save(tmp_path / "x.bin", value, zipped), "a.b")


@both_layouts
def test_a_negated_view_is_not_read_with_the_wrong_sign(tmp_path: Path, zipped: bool) -> None:
    """Torch may leave a sign or conjugation to be applied on reading: apply it or refuse."""
    lazy = torch.tensor([1 + 2j, 3 - 4j]).conj()
    for name, tensor in (("imag", lazy.imag), ("conj", lazy)):
        path = save(tmp_path / f"{name}.bin", {name: tensor}, zipped)
        assert torch.equal(torch.load(path, weights_only=True)[name], tensor)
        try:
            found, _ = read_pickled(path)
        except FileError as error:
            assert_clear(error, str(path))
        else:
            assert read_raw(found[name]).tobytes() == raw_bytes(tensor)


class Command:
    """Runs a shell command when a careless reader unpickles it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class Call:
    """Calls any function when a careless reader unpickles it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@both_layouts
def test_a_command_in_a_file_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    """os.system beside good tensors stops the reading, and nothing of it happens."""
    marker = tmp_path / "marker"
    value = {"w": torch.ones(2), "x": Command(marker)}
    path = save(tmp_path / "x.bin", value, zipped)
    torch.load(path, weights_only=False)
    assert marker.exists()  # it does run in a careless reader
    marker.unlink()
    error = file_error(read_pickled, path, "system")
    assert "safetensors" in error.hint
    assert not marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        Call(eval, "1/0"), Call(exec, "1/0"), Call(getattr, "x", "upper"), Call(__import__, "os"),
        Call(np.load, "x"), Call(torch.load, "x"), Call(open, "x"), Call(io.BytesIO, b"x"),
        Call(bytearray, 5),
    ],
    ids=lambda c: c.function.__name__,
)  # fmt: skip
def test_any_other_call_is_refused(tmp_path: Path, call: Call) -> None:
    """Functions off the short list of what tensors need are refused, harmless ones too."""
    file_error(read_pickled, save(tmp_path / "x.bin", {"x": call}), call.function.__name__)


def zip_with(path: Path, pickle_bytes: bytes, **data: bytes) -> Path:
    """A torch zip file with this pickle and these storages."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle_bytes)
        for key, content in data.items():
            archive.writestr(f"x/data/{key.removeprefix('k')}", content)
    return path


def global_(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor_pickle(
    shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, numel: int = 6
) -> bytes:
    """The opcodes that rebuild one float32 tensor from storage "0"."""

    def put(value: Any) -> bytes:
        return pickle.dumps(value, protocol=2)[2:-1]

    storage = b"(" + put("storage") + global_("torch", "FloatStorage") + put("0") + put("cpu")
    storage += put(numel) + b"tQ"
    arguments = b"(" + storage + put(offset) + put(shape) + put(strides)
    return global_("torch._utils", "_rebuild_tensor_v2") + arguments + put(False) + put({}) + b"tR"


def as_dict(item: bytes) -> bytes:
    """A whole pickle: {"w": item}."""
    return b"\x80\x02}U\x01w" + item + b"s."


def test_a_tensor_made_by_hand_reads(tmp_path: Path) -> None:
    """The opcodes of the cases below are right where nothing is broken in them."""
    data = np.arange(6, dtype=np.float32)
    path = zip_with(tmp_path / "x.bin", as_dict(tensor_pickle((2, 3), (3, 1))), k0=data.tobytes())
    found, _ = read_pickled(path)
    assert np.array_equal(read_float32(found["w"]), data.reshape(2, 3))


BEYOND = {
    "shape": tensor_pickle((3, 3), (3, 1)),
    "offset": tensor_pickle((2, 3), (3, 1), offset=1),
    "strides": tensor_pickle((2, 3), (4, 1)),
    "far": tensor_pickle((2, 3), (1 << 40, 1)),
    "huge-offset": tensor_pickle((2, 3), (3, 1), offset=1 << 62),
    "huge-shape": tensor_pickle((1 << 62, 1 << 62), (0, 1)),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path, case: str) -> None:
    """A tensor never reads what belongs to another one, even where the file goes on."""
    path = tmp_path / "x.bin"
    zip_with(path, as_dict(BEYOND[case]), k0=bytes(24), k1=b"\x01" * 1000)
    file_error(read_pickled, path, "'w'")


IMPOSSIBLE = {
    "negative-shape": tensor_pickle((-2, -3), (3, 1)),
    "negative-strides": tensor_pickle((2, 3), (-3, -1)),
    "negative-offset": tensor_pickle((2, 3), (3, 1), offset=-1),
    "float-shape": tensor_pickle((2.0, 3), (3, 1)),  # type: ignore[arg-type]
    "bool-shape": tensor_pickle((True, 3), (3, 1)),
    "shape-is-a-number": tensor_pickle(6, (1,)),  # type: ignore[arg-type]
    "fewer-strides": tensor_pickle((2, 3), (1,)),
    # A value is validated when it is made; BUILD changes it afterwards.
    "shape-changed-later": tensor_pickle((2, 3), (3, 1)) + b"}U\x05shapeU\x03abcsb",
    "shape-negative-later": tensor_pickle((2, 3), (3, 1)) + b"}U\x05shapeJ\xff\xff\xff\xff\x85sb",
    "storage-changed-later": tensor_pickle((2, 3), (3, 1)) + b"}U\x07storageNsb",
    "field-taken-away": tensor_pickle((2, 3), (3, 1)) + b"}U\x06offsetNsb",
    "storage-is-a-string": tensor_pickle((2, 3), (3, 1)).replace(b"tQ", b"t0U\x01s", 1),
    "unknown-storage-key": tensor_pickle((2, 3), (3, 1)).replace(b"\x00\x00\x000q", b"\0\0\0009q"),
    "calls-a-string": global_("torch", "FloatStorage") + b"(tR",
    "calls-a-size": global_("torch", "Size") + b"K\x05\x85R",
    "memo-missing": b"h\x77",
    "stack-empty": b"0000",
    "extension": b"\x82\x01",
}  # fmt: skip


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_an_impossible_pickle_is_refused(tmp_path: Path, case: str) -> None:
    """However a pickle contradicts itself, it is a FileError, now and not when data is read."""
    path = zip_with(tmp_path / "x.bin", as_dict(IMPOSSIBLE[case]), k0=bytes(24))
    file_error(read_pickled, path)


def test_a_file_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD on a function that the reader lends is refused."""
    build = global_("torch._utils", "_rebuild_tensor_v2") + b"}U\x08poisonedK\x01sb"
    file_error(read_pickled, zip_with(tmp_path / "x.bin", as_dict(build)), "changes a value")


def test_a_table_that_holds_itself_is_refused(tmp_path: Path) -> None:
    """Flattening a table that contains itself ends, in a FileError."""
    value: dict[str, Any] = {"w": torch.ones(2)}
    value["self"] = value
    file_error(read_pickled, save(tmp_path / "x.bin", value))


def test_a_table_nested_without_end_is_refused(tmp_path: Path) -> None:
    """Nesting deeper than any program would write is a FileError, not a stack overflow."""
    path = zip_with(tmp_path / "x.bin", b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".")
    file_error(read_pickled, path)


@pytest.mark.process
def test_lists_that_double_do_not_take_for_ever(tmp_path: Path) -> None:
    """Forty lists, each holding the one before twice, stand for 10¹² entries: refused or quick."""
    pickle_bytes = (
        b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b"."
    )
    path = zip_with(tmp_path / "x.bin", pickle_bytes)
    code = (
        "import sys, pathlib\n"
        "from loratool.errors import FileError\n"
        "from loratool.storage.folder import Folder\n"
        "from loratool.storage.weights import read_contents\n"
        "try: print(read_contents(Folder(pathlib.Path(sys.argv[1])), 'x.bin'))\n"
        "except FileError: pass\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path.parent)], check=True, timeout=30)


@both_layouts
def test_every_truncation_is_refused(tmp_path: Path, zipped: bool) -> None:
    """A file cut at any byte is a FileError that names it."""
    path = save(tmp_path / "x.bin", {"w": torch.ones(3, 2), "t": torch.ones(4, 5).T}, zipped)
    whole = path.read_bytes()
    step = 7 if zipped else 3
    for length in [*range(0, len(whole), step), len(whole) - 1]:
        path.write_bytes(whole[:length])
        file_error(read_pickled, path)


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    """A zip that was repacked with compression cannot be read by range, and is refused so."""
    plain = save(tmp_path / "plain.bin", {"w": torch.ones(500)})
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for item in source.infolist():
            out.writestr(item.filename, source.read(item))
    file_error(read_pickled, path, "compressed")


def test_a_big_endian_file_is_refused(tmp_path: Path) -> None:
    """Bytes in the other order are refused, not read as wild numbers."""
    path = tmp_path / "x.bin"
    zip_with(path, as_dict(tensor_pickle((2, 3), (3, 1))), k0=bytes(24))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/byteorder", "big")
    file_error(read_pickled, path, "big-endian")


def test_a_missing_storage_is_named(tmp_path: Path) -> None:
    """An archive without the data of a tensor is refused with the tensor's name."""
    path = zip_with(tmp_path / "x.bin", as_dict(tensor_pickle((2, 3), (3, 1))))
    file_error(read_pickled, path, "'w'")


def test_a_storage_of_another_size_is_refused(tmp_path: Path) -> None:
    """As torch.load does: behind a short storage is another one, and a long one is not its."""
    for length in (20, 23, 25, 28, 0):
        path = zip_with(
            tmp_path / "x.bin", as_dict(tensor_pickle((2, 2), (2, 1))), k0=bytes(length), k1=b"1234"
        )
        with pytest.raises(RuntimeError):
            torch.load(path, weights_only=True)
        file_error(read_pickled, path, "should have 24")


def test_a_storage_that_no_tensor_is_in_has_its_data_too(tmp_path: Path) -> None:
    """A bare storage whose data is missing is refused, as torch.load does."""
    bare = tensor_pickle((2, 3), (3, 1)).split(b"(", 1)[1].split(b"tQ")[0] + b"tQ"
    assert read_pickled(zip_with(tmp_path / "x.bin", as_dict(bare), k0=bytes(24)))[0] == {}
    file_error(read_pickled, zip_with(tmp_path / "x.bin", as_dict(bare)), "'0' is missing")


def test_one_storage_described_in_two_ways_is_refused(tmp_path: Path) -> None:
    """Torch would take the first description for both tensors."""
    two = as_dict(tensor_pickle((2, 3), (3, 1)))[:-1]
    two += b"U\x01v" + tensor_pickle((2, 3), (3, 1), numel=7) + b"s."
    file_error(read_pickled, zip_with(tmp_path / "x.bin", two, k0=bytes(24)), "'0' in two ways")


@pytest.mark.parametrize("repacked", ["data.pkl", "byteorder"])
def test_a_compressed_pickle_is_refused(tmp_path: Path, repacked: str) -> None:
    """What is unpacked is what lies in the file: there is nothing that could unfold."""
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (("data.pkl", as_dict(b"N")), ("byteorder", b"little")):
            method = zipfile.ZIP_DEFLATED if name == repacked else zipfile.ZIP_STORED
            archive.writestr(f"x/{name}", content, method)
    file_error(read_pickled, path, "compressed")


def test_a_pickle_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    """The size in the archive decides before anything is read: these are zeros."""
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive, archive.open("x/data.pkl", "w") as entry:
        for _ in range(85):
            entry.write(bytes(1_000_000))
    file_error(read_pickled, path, "none is so long")


def test_a_checksum_is_compared_where_there_is_one(tmp_path: Path) -> None:
    """A flipped bit in the pickle is found; torch can be told to leave checksums out."""
    path = save(tmp_path / "x.bin", {"wanted": torch.ones(2)})
    path.write_bytes(path.read_bytes().replace(b"wanted", b"wanter"))
    file_error(read_pickled, path, "checksum")
    torch.serialization.set_crc32_options(False)
    try:
        check_like_torch(save(tmp_path / "y.bin", {"w": torch.ones(2)}))
    finally:
        torch.serialization.set_crc32_options(True)


def legacy(
    tmp_path: Path, pickled: bytes, keys: Any, data: bytes, protocol: Any = 1001, system: Any = None
) -> Path:
    """A torch file from before 1.6, made by hand."""
    parts = [
        0x1950A86A20F9469CFC6C,
        protocol,
        {"little_endian": True} if system is None else system,
    ]
    path = tmp_path / "x.bin"
    start = b"".join(pickle.dumps(part, 2) for part in parts)
    path.write_bytes(start + pickled + pickle.dumps(keys, 2) + data)
    return path


def test_a_legacy_file_made_by_hand_reads(tmp_path: Path) -> None:
    """The bytes of the cases below are right where nothing is broken in them."""
    pickled, data = as_dict(tensor_pickle((2, 3), (3, 1))), np.arange(6, dtype=np.float32)
    path = legacy(tmp_path, pickled, ["0"], (6).to_bytes(8, "little") + data.tobytes())
    found, _ = read_pickled(path)
    assert np.array_equal(read_float32(found["w"]), data.reshape(2, 3))


SIX, DATA = (6).to_bytes(8, "little"), bytes(24)
LEGACY: dict[str, tuple[dict[str, Any], str]] = {
    "count-too-small": ({"data": (5).to_bytes(8, "little") + DATA}, "another length"),
    "count-negative": ({"data": b"\xff" * 8 + DATA}, "another length"),
    "data-cut": ({"data": SIX + DATA[:-1]}, "24 bytes where 23"),
    "count-cut": ({"data": SIX[:-1]}, "8 bytes where 7"),
    "key-unknown": ({"keys": ["x"], "data": SIX + DATA}, "no tensor is in"),
    "key-twice": ({"keys": ["0", "0"], "data": (SIX + DATA) * 2}, "'0' twice"),
    "key-missing": ({"keys": [], "data": SIX + DATA}, "'w'"),
    "key-list": ({"keys": [["0"]], "data": SIX + DATA}, "no tensor is in"),
    "keys-are-a-table": ({"keys": {"0": 1}, "data": SIX + DATA}, "no tensor is in"),
    "protocol": ({"protocol": 1002}, "version"),
    "system": ({"system": []}, "version"),
    "big-endian": ({"system": {"little_endian": False}}, "big-endian"),
    "count-huge": ({"pickled": as_dict(tensor_pickle((2, 3), (3, 1), numel=1 << 61)),
                    "data": (1 << 61).to_bytes(8, "little") + DATA}, "where 24 are left"),
    "count-negative-in-the-pickle": (
        {"pickled": as_dict(tensor_pickle((2, 3), (3, 1), numel=-6))}, "impossible size"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGACY)
def test_a_legacy_file_that_contradicts_itself_is_refused(tmp_path: Path, case: str) -> None:
    """Announced counts are held against each other and against the bytes that are left."""
    changes, words = LEGACY[case]
    parts = {"pickled": as_dict(tensor_pickle((2, 3), (3, 1))), "keys": ["0"], "data": SIX + DATA}
    file_error(read_pickled, legacy(tmp_path, **{**parts, **changes}), words)


def test_a_file_that_describes_far_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    """One element repeated to gigabytes is named, with both sizes; repeats in reason are read."""
    save(tmp_path / "x.bin", {"small": torch.ones(2), "w": torch.ones(1).expand(30_000, 30_000)})
    file_error(read_pickled, tmp_path / "x.bin", "3.6 GB", "kB", "w F32 [30000, 30000]")
    one = torch.ones(1000, 1000)
    check_like_torch(save(tmp_path / "x.bin", {str(i): one for i in range(9)}))
    file_error(read_pickled, save(tmp_path / "x.bin", {str(i): one for i in range(20)}), "80 MB")


def test_views_that_lie_far_apart_are_read_in_reason(tmp_path: Path) -> None:
    """Each view is read from its first to its last element; thousands of them are refused."""
    storage = torch.zeros(100_000)
    corners = [storage.as_strided((2, 2), (99_980, 9), i % 5) for i in range(600)]
    check_like_torch(save(tmp_path / "x.bin", corners[:200]))
    file_error(read_pickled, save(tmp_path / "x.bin", corners), "so far apart", "240 MB")


def test_a_tensor_named_over_and_over_is_refused(tmp_path: Path) -> None:
    """Lists that name one tensor again and again unfold into far more than the pickle says."""
    again = b"\x80\x02](" + tensor_pickle((2, 3), (3, 1)) + b"q\x63" + b"h\x63" * 5000 + b"e."
    path = zip_with(tmp_path / "x.bin", again, k0=bytes(24))
    file_error(read_pickled, path, "over and over")
    long = b"}X\x00\x0f\0\0" + b"a" * 3840
    again = b"\x80\x02" + long + again[2:-1].replace(b"h\x63" * 4000, b"") + b"s."
    file_error(read_pickled, zip_with(tmp_path / "x.bin", again, k0=bytes(24)), "over and over")


def test_a_name_longer_than_any_is_refused(tmp_path: Path) -> None:
    """Names are put together of the keys of tables inside each other; there is a limit for all."""
    value = {"a" * 4000: {"b" * 95: torch.ones(2)}}
    assert len(read_pickled(save(tmp_path / "x.bin", value))[0]) == 1
    file_error(
        read_pickled, save(tmp_path / "x.bin", {"a" * 4000: {"b" * 96: torch.ones(1)}}), "4,097"
    )


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """A pipe by the name of a weights file does not wait for a writer."""
    os.mkfifo(tmp_path / "x.bin")
    file_error(read_pickled, tmp_path / "x.bin", "a pipe")


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, w=np.ones(3))


def write_zip_of_text(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


NOT_TORCH = {
    "empty": lambda p: p.write_bytes(b""),
    "lfs-pointer": lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"),
    "html": lambda p: p.write_bytes(b"<!doctype html>\n<html></html>"),
    "text": lambda p: p.write_bytes(b"Entry not found"),
    "noise": lambda p: p.write_bytes(bytes(range(256)) * 4),
    "zeros": lambda p: p.write_bytes(bytes(100)),
    "plain-pickle": lambda p: p.write_bytes(pickle.dumps({"w": [1, 2]})),
    "pickled-number": lambda p: p.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C)),
    "numpy-pickle": lambda p: p.write_bytes(pickle.dumps({"w": np.ones(3)})),
    "npz": write_npz,
    "other-zip": write_zip_of_text,
    "safetensors": lambda p: p.write_bytes(b"\x02\0\0\0\0\0\0\0{}"),
}


@pytest.mark.parametrize("case", NOT_TORCH)
def test_what_is_no_torch_file_is_refused(tmp_path: Path, case: str) -> None:
    """Other files by the name of .bin are each a FileError that names the file."""
    path = tmp_path / "pytorch_model.bin"
    NOT_TORCH[case](path)
    file_error(read_pickled, path)


@pytest.mark.parametrize("kind", ["sparse", "quantised", "meta", "module"])
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, kind: str) -> None:
    """Sparse, quantised and data-less tensors and whole modules have no plain bytes to read."""
    values = {
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "module": torch.nn.Linear(2, 2),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    }
    file_error(read_pickled, save(tmp_path / "x.bin", {"w": values[kind]}))


def samples(folder: Path) -> list[bytes]:
    value = {"w": torch.arange(6.0).reshape(2, 3), "t": random_of(torch.float16, 3, 2).T}
    return [save(folder / "s.bin", value, zipped).read_bytes() for zipped in (True, False)]


@settings(on_files, max_examples=400)
@given(zipped=st.booleans(), where=st.floats(0, 1, exclude_max=True), new=st.binary(max_size=4),
       gone=st.integers(0, 4))  # fmt: skip
def test_any_damage_is_refused_or_harmless(
    tmp_path: Path, zipped: bool, where: float, new: bytes, gone: int
) -> None:
    """However a file is damaged, it is FileError, or its tensors lie inside the file."""
    content = samples(tmp_path)[not zipped]
    at = int(where * len(content))
    path = tmp_path / "x.bin"
    path.write_bytes(content[:at] + new + content[at + gone :])
    try:
        found, _ = read_pickled(path)
    except FileError as error:
        assert_clear(error, str(path))
        return
    for info in found.values():
        assert 0 <= info.start <= path.stat().st_size
        if info.numel < 1000:
            assert len(read_raw(info)) == info.nbytes


@settings(on_files, max_examples=400)
@given(where=st.floats(0, 1, exclude_max=True), new=st.binary(max_size=3), gone=st.integers(0, 3))
def test_a_damaged_pickle_is_read_as_torch_reads_it_or_not_at_all(
    tmp_path: Path, where: float, new: bytes, gone: int
) -> None:
    """Where both readers take a pickle with changed bytes, they find the same tensors in it."""
    value = {"w": torch.arange(6.0), "n": {"t": random_of(torch.float16, 3, 2).T, "k": [1, "a"]}}
    with zipfile.ZipFile(save(tmp_path / "s.bin", value)) as archive:
        entries = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    pickled = entries["data.pkl"]
    at = int(where * len(pickled))
    entries["data.pkl"] = pickled[:at] + new + pickled[at + gone :]
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"x/{name}", content)
    try:
        found, _ = read_pickled(path)
    except FileError as error:
        assert_clear(error, str(path))
        return
    try:
        wanted = flattened(torch.load(path, weights_only=True))
    except Exception:  # torch's safe reader knows fewer opcodes, and fails in any way at all
        return
    assert {name: read_raw(info).tobytes() for name, info in found.items()} == {
        name: raw_bytes(tensor) for name, tensor in wanted.items()
    }
