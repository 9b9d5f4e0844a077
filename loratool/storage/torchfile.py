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
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loratool.dtypes import DTYPE_BITS
from loratool.errors import FileError
from loratool.storage.header import refuse_known_impostors
from loratool.storage.stamps import Stamp, stamp_of
from loratool.storage.tensors import TensorInfo

_REFETCH = "Fetch the file again, or ask for a safetensors version of it."

_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip

#: What newer torch names by dtype over an untyped storage.
_DTYPES = {
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "uint16": "U16", "uint32": "U32", "uint64": "U64",
}  # fmt: skip

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

#: More entries than any state dict has; a small pickle can unfold into more than the memory holds.
_MAX_ENTRIES = 250_000
_MAX_DEPTH = 50


# Named tuples, because a pickle may set attributes of any object it holds, and these have none.


class _Storage(NamedTuple):
    key: str
    dtype: str
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Build(NamedTuple):
    """A function that a pickle may call."""

    run: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.run(*arguments)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = None, _hooks: Any = None,
    metadata: Any = None,
) -> _Tensor:  # fmt: skip
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("it has a tensor without a storage")
    return _checked(storage, storage.dtype, offset, shape, strides, metadata)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any,
    metadata: Any = None,
) -> _Tensor:  # fmt: skip
    if not isinstance(storage, _Storage) or dtype not in _DTYPES.values():
        raise pickle.UnpicklingError("it has a tensor of an unknown dtype")
    return _checked(storage, dtype, offset, shape, strides, metadata)


def _checked(
    storage: _Storage, dtype: str, offset: Any, shape: Any, strides: Any, metadata: Any
) -> _Tensor:
    counts = (offset, *shape, *strides)
    if not all(type(n) is int and n >= 0 for n in counts) or len(shape) != len(strides):
        raise pickle.UnpicklingError(f"it has a tensor of the impossible layout {shape} {strides}")
    if metadata:
        raise pickle.UnpicklingError(f"it has a tensor seen through {sorted(metadata)}")
    return _Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _span(tensor: _Tensor) -> int:
    """Elements from the first to the last of a tensor that is not empty."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


def _from_type(build: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    if not isinstance(build, _Build):
        raise pickle.UnpicklingError("it has a tensor of a subclass")
    return build(*arguments)


_V2 = _Build(_tensor)
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch", "Tensor"): "Tensor",
    ("torch.storage", "UntypedStorage"): "U8",
    ("torch", "UntypedStorage"): "U8",
    ("torch._utils", "_rebuild_tensor"): _V2,
    ("torch._utils", "_rebuild_tensor_v2"): _V2,
    ("torch._utils", "_rebuild_tensor_v3"): _Build(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Build(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Build(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): _Build(_from_type),
    **{("torch", name): dtype for name, dtype in (_STORAGES | _DTYPES).items()},
}


class _Unpickler(pickle.Unpickler):
    """Builds `_Tensor` descriptions; every global outside `_ALLOWED` is refused."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, numel = pid[:5]
        view = pid[5] if len(pid) > 5 else None
        if kind != "storage" or dtype not in _STORAGES.values() or type(numel) is not int or view:
            raise pickle.UnpicklingError(f"it asks for {pid!r}")
        storage = _Storage(str(key), dtype, numel)
        return self.storages.setdefault(storage.key, storage)


def read_pickled(path: Path) -> tuple[dict[str, TensorInfo], str]:
    """Tensors by name, and what the top object is: "dict", "list" or "tensor".

    Nested tables are flattened with dots ("state.0.exp_avg"), the entries of a list are named by
    their position. Values that are not tensors are left out. Raises FileError for a file that is
    damaged, compressed, or needs code to be read.
    """
    with path.open("rb") as stream:
        stamp = stamp_of(stream.fileno())
        refuse_known_impostors(path, stream.read(64), stamp.nbytes)
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
    found = _flatten(path, top)
    tensors = {name: _info(path, name, item, offset_of, stamp) for name, item in found.items()}
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
    unpickler = _Unpickler(stream)
    top = unpickler.load()
    keys = _Unpickler(stream).load()
    offsets: dict[str, int] = {}
    for key in keys:
        storage = unpickler.storages[key]
        count = int.from_bytes(stream.read(8), "little")
        if count != storage.numel:
            raise FileError(f"{path}: storage {key} has another length than announced.", _REFETCH)
        offsets[key] = stream.tell()
        stream.seek(count * DTYPE_BITS[storage.dtype] // 8, io.SEEK_CUR)
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


def _flatten(path: Path, top: Any) -> dict[str, _Tensor]:
    """The tensors in nested tables and lists, by dotted name; values of other kinds are skipped."""
    found: dict[str, _Tensor] = {}
    waiting: list[tuple[str, int, Any]] = [("", 0, top)]
    visited = 0
    while waiting:
        prefix, depth, value = waiting.pop()
        visited += 1
        if visited > _MAX_ENTRIES or depth > _MAX_DEPTH:
            raise FileError(f"{path}: its tables hold themselves, or have no end.", _REFETCH)
        if isinstance(value, _Tensor):
            name = prefix or "tensor"
            if name in found:
                raise FileError(f"{path}: two tensors are called {name!r}.", _REFETCH)
            found[name] = value
        elif isinstance(value, dict | list) or type(value) is tuple:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            start = f"{prefix}." if prefix else ""
            waiting += reversed([(f"{start}{key}", depth + 1, item) for key, item in items])
    return found


def _info(
    path: Path, name: str, tensor: _Tensor, offset_of: Callable[[str], int], stamp: Stamp
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
    info = TensorInfo(name, tensor.dtype, tensor.shape, path, 0, None if plain else tensor.strides)
    stored = tensor.storage.numel * DTYPE_BITS[tensor.storage.dtype] // 8
    if step and (tensor.offset + _span(tensor)) * info.itemsize > stored:
        raise FileError(f"{path}: tensor {name!r} reaches beyond its storage.", _REFETCH)
    try:
        start = offset_of(tensor.storage.key) + tensor.offset * info.itemsize
    except KeyError:
        raise FileError(f"{path}: the data of tensor {name!r} is missing.", _REFETCH) from None
    if step and start + _span(tensor) * info.itemsize > stamp.nbytes:
        raise FileError(f"{path}: truncated inside tensor {name!r}.", _REFETCH)
    return TensorInfo(name, info.dtype, info.shape, path, start, info.strides, stamp=stamp)
