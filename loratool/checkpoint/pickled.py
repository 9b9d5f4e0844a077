"""The tensors of a torch file (`.bin`, `.pt`), found without running any of its code.

A torch file is a pickle of names and shapes beside raw storages: a zip archive that holds the
storages uncompressed since torch 1.6, one after the other in the file before. The pickle is read by
an unpickler that knows only the handful of names that plain tensors need and refuses all others, so
a hostile file cannot run anything; and since the storages lie raw in the file, tensors are read by
byte range like those of safetensors, in flat memory and without torch.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from loratool.checkpoint.header import refuse_known_impostors
from loratool.checkpoint.tensors import TensorInfo
from loratool.errors import FileError

_REFETCH = "Fetch the file again, or ask for a safetensors version of it."

_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any) -> _Tensor:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    counts = (offset, *shape, *strides)
    if not all(type(n) is int and n >= 0 for n in counts) or len(shape) != len(strides):
        raise pickle.UnpicklingError(f"a tensor with the impossible layout {shape} {strides}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


def _from_type(build: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    if build is not _tensor:
        raise pickle.UnpicklingError("a tensor of a subclass")
    return _tensor(*arguments)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): "Tensor",
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Builds `_Tensor` descriptions; every global outside `_ALLOWED` is refused."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key = pid[:3]
        if kind != "storage" or dtype not in _STORAGES.values():
            raise pickle.UnpicklingError(f"it asks for {pid!r}")
        return _Storage(str(key), dtype)


def read_pickled(path: Path) -> tuple[dict[str, TensorInfo], str]:
    """Tensors by name, and what the top object is: "dict", "list" or "tensor".

    Nested tables are flattened with dots ("state.0.exp_avg"), the entries of a list are named by
    their position. Values that are not tensors are left out. Raises FileError for a file that is
    damaged, compressed, or needs code to be read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        refuse_known_impostors(path, stream.read(64), size)
        stream.seek(0)
        try:
            top, offset_of = _load(path, stream)
        except FileError:
            raise
        except pickle.UnpicklingError as error:
            raise FileError(
                f"{path}: not read, because {error}, which is more than plain tensors need.",
                "loratool never runs code from a file. Save the weights as safetensors.",
            ) from None
        except Exception as error:  # a damaged pickle can fail in any way at all
            raise FileError(f"{path}: a damaged torch file ({error}).", _REFETCH) from None
    found: dict[str, _Tensor] = {}
    _flatten(top, "", found)
    tensors = {name: _info(path, name, item, offset_of, size) for name, item in found.items()}
    kind = "tensor" if isinstance(top, _Tensor) else type(top).__name__
    return tensors, "dict" if kind == "OrderedDict" else kind


def _load(path: Path, stream: BinaryIO) -> tuple[Any, Callable[[str], int]]:
    """The top object and a function from storage key to byte offset in the file."""
    if zipfile.is_zipfile(path):
        return _load_zip(path, stream)
    if _Unpickler(stream).load() != _LEGACY_MAGIC:
        raise FileError(f"{path}: not a torch file.", "Check what the file really is.")
    _protocol, system = _Unpickler(stream).load(), _Unpickler(stream).load()
    if not system.get("little_endian", True):
        raise FileError(f"{path}: written big-endian.", "Save it again on another machine.")
    top = _Unpickler(stream).load()
    keys = _Unpickler(stream).load()
    dtypes = {item.storage.key: item.storage.dtype for item in _tensors_in(top)}
    offsets: dict[str, int] = {}
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        offsets[key] = stream.tell()
        width = TensorInfo("", dtypes.get(key, "F32"), (), path, 0).itemsize
        stream.seek(count * width, io.SEEK_CUR)
    return top, offsets.__getitem__


def _load_zip(path: Path, stream: BinaryIO) -> tuple[Any, Callable[[str], int]]:
    with zipfile.ZipFile(stream) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise FileError(f"{path}: a zip archive, but not a torch file.", "Check what it is.")
        folder = pickles[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in entries and archive.read(order) != b"little":
            raise FileError(f"{path}: written big-endian.", "Save it again on another machine.")
        top = _Unpickler(io.BytesIO(archive.read(pickles[0]))).load()

    def offset_of(key: str) -> int:
        entry = entries[f"{folder}data/{key}"]
        if entry.compress_type != zipfile.ZIP_STORED:
            raise FileError(f"{path}: a compressed torch file.", "Save it again with torch.save.")
        # The local header repeats the name and has an extra field of its own length.
        with path.open("rb") as again:
            again.seek(entry.header_offset + 26)
            lengths = again.read(4)
        name, extra = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
        return entry.header_offset + 30 + name + extra

    return top, offset_of


def _tensors_in(top: Any) -> list[_Tensor]:
    found: dict[str, _Tensor] = {}
    _flatten(top, "", found)
    return list(found.values())


def _flatten(value: Any, prefix: str, found: dict[str, _Tensor]) -> None:
    if isinstance(value, _Tensor):
        found[prefix or "tensor"] = value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _flatten(item, f"{prefix}.{key}" if prefix else str(key), found)


def _info(
    path: Path, name: str, tensor: _Tensor, offset_of: Callable[[str], int], size: int
) -> TensorInfo:
    row_major: list[int] = []
    step = 1
    for count in reversed(tensor.shape):
        row_major.insert(0, step)
        step *= count
    # The stride of an axis of length one, or of an empty tensor, says nothing.
    plain = step == 0 or all(
        n == 1 or have == want
        for n, have, want in zip(tensor.shape, tensor.strides, row_major, strict=True)
    )
    info = TensorInfo(
        name, tensor.storage.dtype, tensor.shape, path, 0, None if plain else tensor.strides
    )
    try:
        start = offset_of(tensor.storage.key) + tensor.offset * info.itemsize
    except KeyError:
        raise FileError(f"{path}: the data of tensor {name!r} is missing.", _REFETCH) from None
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True) if n)
    if step and start + (last + 1) * info.itemsize > size:
        raise FileError(f"{path}: truncated inside tensor {name!r}.", _REFETCH)
    return TensorInfo(name, info.dtype, info.shape, path, start, info.strides)
