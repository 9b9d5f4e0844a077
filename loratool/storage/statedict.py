"""What a torch pickle describes: tensors over storages, in tables and lists, found and named.

`Descriptions` has the names that torch writes for plain tensors and what stands for each: functions
that check and note what a tensor is said to be. Every other name is refused by `pickles`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from loratool.dtypes import DTYPE_BITS
from loratool.storage.bounded import LONGEST_NAME, MOST_AXES, Malformed
from loratool.storage.fields import is_count
from loratool.storage.pickles import Call, Ordered, Refused, add_entry

#: Dtypes by the kind of storage that torch has for them.
STORAGES = {
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

#: More entries than any table of a training run has that is shorter than this in the pickle; and
#: more pairs than any OrderedDict of Python 2, which wrote its entries as a list.
_MOST_ENTRIES = 250_000
_MAX_DEPTH = 50

#: Where training scripts put a state dict that they save with other things. litgpt says "model".
_WRAPPERS = ("model", "state_dict", "model_state_dict", "lora_state_dict", "module")

_CONTAINERS = {dict, Ordered, list, tuple}

#: The least that a pickle spends on a tensor: its name, and a reference to one it has already.
_BYTES_PER_TENSOR = 16


class Storage(NamedTuple):
    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


class Tensor(NamedTuple):
    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last one; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


class _StorageKind(NamedTuple):
    dtype: str


class _Dtype(NamedTuple):
    dtype: str


_TENSOR_CLASS = object()


class Descriptions:
    """What a pickle may name, and the storages that it has described so far, by key."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self._pairs_left = _MOST_ENTRIES
        tensor = Call(self._tensor, 4, 7)
        untyped = _StorageKind("U8")
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): Call(self._ordered, 0, 1),
            ("torch", "Size"): Call(_size, 1, 1),
            ("torch", "Tensor"): _TENSOR_CLASS,
            ("torch.storage", "UntypedStorage"): untyped,
            ("torch", "UntypedStorage"): untyped,
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_tensor_v3"): Call(self._tensor_v3, 7, 8),
            ("torch._utils", "_rebuild_parameter"): Call(_parameter, 3, 3),
            ("torch._utils", "_rebuild_parameter_with_state"): Call(_parameter, 4, 4),
            ("torch._tensor", "_rebuild_from_type_v2"): Call(_from_type, 4, 4),
            **{("torch", name): _StorageKind(dtype) for name, dtype in STORAGES.items()},
            **{("torch", name): _Dtype(dtype) for name, dtype in _DTYPES.items()},
        }

    def persistent(self, pid: Any) -> Storage:
        """The storage that a persistent id names: ("storage", kind, key, device, numel, view)."""
        if type(pid) is not tuple or not 5 <= len(pid) <= 6 or pid[0] != "storage":
            raise Refused("it asks for something beside its storages")
        _, kind, key, _device, numel = pid[:5]
        if type(kind) is not _StorageKind:
            raise Refused("it asks for a storage of an unknown kind")
        if len(pid) > 5 and pid[5] is not None:
            raise Refused("it asks for a view of a storage")
        if type(key) is not str or not is_count(numel):
            raise Malformed("it has a storage of an impossible size")
        storage = Storage(key, kind.dtype, numel)
        if self.storages.setdefault(key, storage) != storage:
            raise Malformed(f"it describes the storage {key[:80]!r} in two ways")
        return storage

    def _tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = None,
        _hooks: Any = None, metadata: Any = None,
    ) -> Tensor:  # fmt: skip
        if type(storage) is not Storage:
            raise Refused("it has a tensor without a storage")
        return _checked(storage, storage.dtype, offset, shape, strides, metadata)

    def _tensor_v3(
        self, storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any,
        dtype: Any, metadata: Any = None,
    ) -> Tensor:  # fmt: skip
        if type(storage) is not Storage or type(dtype) is not _Dtype:
            raise Refused("it has a tensor of an unknown dtype")
        return _checked(storage, dtype.dtype, offset, shape, strides, metadata)

    def _ordered(self, pairs: Any = ()) -> Ordered:
        if type(pairs) not in (tuple, list) or len(pairs) > self._pairs_left:
            raise Malformed("it makes a table of what are no entries")
        # A short pickle can name one long list again and again.
        self._pairs_left -= len(pairs)
        table = Ordered()
        for pair in pairs:
            if type(pair) not in (tuple, list) or len(pair) != 2:
                raise Malformed("it makes a table of what are no entries")
            add_entry(table, *pair)
        return table


def _checked(
    storage: Storage, dtype: str, offset: Any, shape: Any, strides: Any, metadata: Any
) -> Tensor:
    if (
        type(shape) is not tuple
        or type(strides) is not tuple
        or len(shape) != len(strides)
        or len(shape) > MOST_AXES
        or not all(map(is_count, (offset, *shape, *strides)))
    ):
        raise Malformed("it has a tensor of an impossible layout")
    if metadata:
        raise Refused("it has a tensor that is to be negated or conjugated when it is read")
    return Tensor(storage, dtype, offset, shape, strides)


def _size(axes: Any) -> tuple[Any, ...]:
    if type(axes) is not tuple:
        raise Malformed("it has a size that is none")
    return axes


def _parameter(data: Any, *_rest: Any) -> Any:
    return data


def _from_type(build: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, which are not read."""
    if type(build) is not Call or kind is not _TENSOR_CLASS or type(arguments) is not tuple:
        raise Refused("it has a tensor of a subclass")
    if build.run == _from_type or not build.least <= len(arguments) <= build.most:
        raise Malformed("it has a tensor of an impossible layout")
    return build.run(*arguments)


def named_tensors(top: Any, length: int) -> dict[str, Tensor]:
    """The tensors in nested tables and lists by dotted name; values of other kinds are skipped.

    Where all of them are of one state dict in the outermost table, they have the names in that.
    `length` is how many bytes the pickle has that described them. What is named again and again can
    unfold into far more than it says; Malformed is raised for that, and for two tensors of a name.
    """
    found: dict[str, Tensor] = {}
    visits = max(_MOST_ENTRIES, length)
    names = 8 * length + 1_000_000  # characters
    for name, tensor in _walk(top, visits):
        if name in found:
            raise Malformed(f"two tensors are called {name!r}")
        names -= len(name)
        if names < 0 or len(found) > 1000 + length // _BYTES_PER_TENSOR:
            raise Malformed("it names the same tensors over and over")
        found[name] = tensor
    return _state_dict(top, len(found)) or found


def _state_dict(top: Any, count: int) -> dict[str, Tensor]:
    """The state dict in a table, by one of the usual names, if it has all of the `count` tensors
    that there are; else nothing. Its names have dots: other tables are parts of the names."""
    for wrapper in _WRAPPERS if isinstance(top, dict) else ():
        table = top.get(wrapper)
        if isinstance(table, dict) and any("." in str(name) for name in table):
            inner = {str(name): item for name, item in table.items() if type(item) is Tensor}
            if len(inner) == count:
                return inner
    return {}


def _walk(top: Any, visits: int) -> Iterator[tuple[str, Tensor]]:
    inside: list[tuple[str, Iterator[tuple[Any, Any]]]] = [("", iter([("", top)]))]
    while inside:
        prefix, items = inside[-1]
        for key, value in items:
            visits -= 1
            if visits < 0 or len(inside) > _MAX_DEPTH + 1:
                raise Malformed("its tables hold themselves, or have no end")
            kind = type(value)
            if kind is not Tensor and kind not in _CONTAINERS:
                continue
            name = f"{prefix}.{key}" if prefix else str(key)
            if len(name) > LONGEST_NAME:
                raise Malformed(f"it has a name of {len(name):,} characters")
            if kind is not Tensor:
                entries: Iterable[tuple[Any, Any]] = (
                    value.items() if isinstance(value, dict) else enumerate(value)
                )
                inside.append((name, iter(entries)))
                break
            yield name or "tensor", value
        else:
            inside.pop()
