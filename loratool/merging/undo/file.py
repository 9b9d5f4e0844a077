"""The undo file of a reversible merge: all that is needed to get the base back, bit for bit.

`OUT/loratool/undo.safetensors`, in a folder of its own because programs that load a model take
every safetensors file beside it for weights. Its entries:

* `residual:NAME`   what the subtraction misses in tensor NAME: chunks, see `residual`; of codes,
                    what the nearest ones to the result of it miss
* `whole:NAME`      all elements of a tensor that is not in the output, in compressed pieces: it was
                    replaced, or is a part of a quantised weight that became plain
* `gain:NAME:k`     the k-th factor that DoRA multiplied NAME's rows or columns with
* `taken:NAME:k`    what an initialisation took off NAME before training: two matrices, float32
* `header:FILE`     the first bytes of a base shard, compressed
* `file:PATH`       a file of the base that is not in the output as it was, compressed
* `base`            compressed JSON: every tensor with dtype, shape, digest and the sizes of its
                    chunks; the shards; digests of the files beside them; the metadata of a
                    quantised base

Tensors are those that the base's files hold: of a quantised base the packed ones.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loratool.adapters.factors import Matrix
from loratool.errors import FileError
from loratool.merging.undo.residual import (
    DamagedChunk,
    Distances,
    Positions,
    decode,
    decode_whole,
    decompress,
)
from loratool.merging.undo.writer import VERSIONS
from loratool.models.config import check_model_config
from loratool.storage.filenames import CONFIG
from loratool.storage.hashing import digest_of, is_blake3, is_sha256
from loratool.storage.header import described, read_header
from loratool.storage.jsonfile import parse_json
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import read_raw

#: Refuse to unpack more than this for a header, a side file or the table of tensors.
_MAX_UNPACKED = 1 << 30


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of the base as the undo file knows it.

    `step` elements are coded to a chunk, and `sizes` are the bytes of the chunks; both are 0 and
    empty where the subtraction misses nothing. `whole` marks a tensor that is stored itself.
    `gains` counts the factors of each delta, 0 for plain ones. `taken` has four numbers for each
    that was taken off: the delta in whose place, and out, k, in of `[out, k]`·`[k, in]`.
    """

    info: TensorInfo
    digest: str
    whole: bool
    step: int
    sizes: tuple[int, ...]
    gains: tuple[int, ...]
    taken: tuple[tuple[int, int, int, int], ...] = ()


@dataclass(frozen=True)
class BaseShard:
    """A file of the base: its tensors in the order of their data, and its first bytes.

    `header` is empty where the base was no safetensors file, or held more than its index said.
    """

    file: str
    tensors: tuple[str, ...]
    header: bytes


@dataclass
class Undo:
    """An undo file, open for reading. Data is read when asked for."""

    path: Path
    tensors: dict[str, BaseTensor]
    shards: list[BaseShard]
    #: Files of the base that the output holds otherwise or not at all.
    files: dict[str, bytes]
    #: Digests of all files beside the base's weights that a merge carries over.
    side_files: dict[str, str]
    #: Whether tensors are those of a quantised base, and what its files said of themselves.
    is_quantised: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    _entries: dict[str, TensorInfo] = field(default_factory=dict)
    _places: dict[str, list[int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.path.stat().st_size

    def json(self, name: str) -> Any:
        """What a file of the base says that is kept here. Raises FileError for no JSON."""
        return parse_json(self.files[name], f"{self.path}: the base's {name} in it")

    def residual(self, name: str, low: int, files: FilePool) -> tuple[Positions, Distances]:
        """What is missing in the elements from `low` on, a multiple of `step`; positions count
        from `low`."""
        tensor = self.tensors[name]
        elements = min(tensor.step, tensor.info.numel - low)
        with self._damage(f"residual:{name}"):
            return decode(self._chunk("residual", name, low, files), elements, tensor.info.itemsize)

    def whole(self, name: str, low: int, files: FilePool) -> npt.NDArray[np.uint8]:
        """The bytes of the elements from `low` on, a multiple of `step`, of a replaced tensor."""
        tensor = self.tensors[name]
        elements = min(tensor.step, tensor.info.numel - low)
        with self._damage(f"whole:{name}"):
            chunk = self._chunk("whole", name, low, files)
            return decode_whole(chunk, elements, tensor.info.itemsize)

    def gain(self, name: str, index: int, dtype: str, files: FilePool) -> npt.NDArray[Any] | None:
        """The factor of the `index`-th delta of a tensor; None where it has none."""
        entry = self._entries.get(f"gain:{name}:{index}")
        return None if entry is None else read_raw(entry, files).view(dtype)

    def taken(self, name: str, index: int, files: FilePool) -> tuple[Matrix, Matrix]:
        """The two matrices whose product was taken off a tensor before the deltas were added."""
        _, out, rank, width = self.tensors[name].taken[index]
        if not rank:
            return np.zeros((out, 0), np.float32), np.zeros((0, width), np.float32)
        values = read_raw(self._entries[f"taken:{name}:{index}"], files).view("f4")
        return values[: out * rank].reshape(out, rank), values[out * rank :].reshape(rank, width)

    def _chunk(self, kind: str, name: str, low: int, files: FilePool) -> bytes:
        entry = self._entries.get(f"{kind}:{name}")
        if entry is None:
            return b""
        places = self._places[name]
        index = low // self.tensors[name].step
        buffer = bytearray(places[index + 1] - places[index])
        files.read_into(entry, places[index], memoryview(buffer))
        return bytes(buffer)

    def _damage(self, entry: str) -> _Damage:
        return _Damage(self.path, entry)


#: What a damaged or contradictory undo file leads to.
_DAMAGE = (
    DamagedChunk, KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError,
    RecursionError,
)  # fmt: skip


class _Damage:
    """Turns a damaged chunk into an error that names file and entry."""

    def __init__(self, path: Path, entry: str) -> None:
        self._where = path, entry

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, _DAMAGE):
            path, entry = self._where
            raise FileError(
                f"{path}: the undo file is damaged at {entry} ({error}).",
                "Fetch it again. `loratool unmerge --subtract` does without it, but not exactly.",
            ) from None


def read_undo(path: Path) -> Undo:
    """Open an undo file. Raises FileError for one that is damaged or of a later version."""
    entries, metadata = read_header(path)
    if metadata.get("format") != "loratool-undo" or "base" not in entries:
        raise FileError(f"{path}: not an undo file of loratool.", "Check the path.")
    with FilePool() as files, _Damage(path, "base"):
        table = parse_json(_unpack(entries["base"], files), f"{path}: its table")
        if table["version"] not in VERSIONS:
            raise FileError(
                f"{path}: it was written by a later loratool (undo version {table['version']}).",
                "Use that version.",
            )
        _check_digests(table)
        kept = _unpack_all("file", table["files"], entries, files)
        headers = _unpack_all("header", table["headers"], entries, files)
        tensors = dict(_tensors(table["tensors"]))
        shards = [
            BaseShard(s["file"], tuple(s["tensors"]), headers.get(s["file"], b""))
            for s in table["shards"]
        ]
        quantised, metadata = table.get("quantised", False), table.get("metadata", {})
        if type(quantised) is not bool:
            raise ValueError("it does not say whether the base is quantised")
        undo = Undo(path, tensors, shards, kept, table["side_files"], quantised, metadata, entries)
        for name, tensor in tensors.items():
            undo._places[name] = [0, *np.cumsum(tensor.sizes, dtype=np.int64).tolist()]
        _check(undo)
    return undo


def _check_digests(table: dict[str, Any]) -> None:
    """Raise ValueError unless every digest is of the kind that the version of the file has."""
    in_row, of_kind = ("digest", is_blake3) if table["version"] > 3 else ("sha256", is_sha256)
    digests = [row[in_row] for row in table["tensors"].values()]
    for part in ("files", "headers", "side_files"):
        digests += table[part].values()
    wrong = [digest for digest in digests if not of_kind(digest)]
    if wrong:
        raise ValueError(f"{wrong[0]!r:.80} is no digest of the kind that it has")


def _unpack(info: TensorInfo, files: FilePool) -> bytes:
    return decompress(read_raw(info, files).tobytes(), _MAX_UNPACKED)


def _unpack_all(
    kind: str, hashes: dict[str, str], entries: dict[str, TensorInfo], files: FilePool
) -> dict[str, bytes]:
    """The contents of `kind:NAME` for every name that has a hash, checked by it."""
    found = {name: _unpack(entries[f"{kind}:{name}"], files) for name in hashes}
    for name, content in found.items():
        if digest_of(content, hashes[name]) != hashes[name]:
            raise ValueError(f"{kind}:{name} does not have its digest")
    return found


def _tensors(table: dict[str, Any]) -> Iterator[tuple[str, BaseTensor]]:
    place = 0
    for name, t in table.items():
        # No file is there; the place only tells tensors apart.
        shape = tuple(operator.index(n) for n in t["shape"])
        info = TensorInfo(name, t["dtype"], shape, Path("base"), place)
        place += info.nbytes
        if not min(shape, default=0) >= 0 <= t["step"]:
            raise ValueError(f"{name} is not described")
        yield (
            name,
            BaseTensor(
                info,
                t["digest"] if "digest" in t else t["sha256"],
                t["whole"],
                t["step"],
                tuple(t["sizes"]),
                tuple(t["gains"]),
                tuple(map(_four, t.get("taken", ()))),
            ),
        )


def _four(numbers: list[int]) -> tuple[int, int, int, int]:
    place, out, rank, width = map(operator.index, numbers)
    return place, out, rank, width


def _check(undo: Undo) -> None:
    """Raise ValueError where the table and the entries of the file contradict each other."""
    expected = {"base"}
    expected |= {f"file:{name}" for name in undo.files}
    expected |= {f"header:{shard.file}" for shard in undo.shards if shard.header}
    for name, tensor in undo.tensors.items():
        kind = "whole" if tensor.whole else "residual"
        entry = undo._entries.get(f"{kind}:{name}")
        chunks = -(-tensor.info.numel // tensor.step) if tensor.step else 0
        if len(tensor.sizes) not in (0, chunks) or min(tensor.sizes, default=0) < 0:
            raise ValueError(f"{name} has {len(tensor.sizes)} chunks instead of {chunks}")
        if sum(tensor.sizes) != (entry.nbytes if entry else 0):
            raise ValueError(f"the chunks of {name} do not fill their entry")
        if entry is not None:
            expected.add(entry.name)
        size = 8 if tensor.info.dtype == "F64" else 4
        for index, count in enumerate(tensor.gains):
            gain = f"gain:{name}:{index}"
            if count and undo._entries[gain].nbytes != count * size:
                raise ValueError(f"{gain} does not hold {count} factors")
            expected |= {gain} if count else set()
        for index, (place, out, rank, width) in enumerate(tensor.taken):
            entry_name = f"taken:{name}:{index}"
            size = 4 * rank * (out + width)
            if not 0 <= place < len(tensor.gains) or min(out, rank, width) < 0:
                raise ValueError(f"{entry_name} has no place")
            if size and undo._entries[entry_name].nbytes != size:
                raise ValueError(f"{entry_name} does not hold its two matrices")
            expected |= {entry_name} if size else set()
    if undo._entries.keys() != expected:
        raise ValueError("its entries are not those of its table")
    named = [name for shard in undo.shards for name in shard.tensors]
    if sorted(named) != sorted(undo.tensors):
        raise ValueError("its shards and its tensors differ")
    for shard in undo.shards:
        infos = [undo.tensors[name].info for name in shard.tensors]
        if not infos or (shard.header and not _describes(shard.header, infos)):
            raise ValueError(f"the header of {shard.file} is not of its tensors")
    _check_names(undo)


def _describes(header: bytes, infos: list[TensorInfo]) -> bool:
    found = [(i.name, i.dtype, i.shape) for i in described(Path("header"), header)]
    return found == [(i.name, i.dtype, i.shape) for i in infos]


def _check_names(undo: Undo) -> None:
    """Every file has a place of its own, inside the model."""
    shards = [shard.file for shard in undo.shards]
    beside = undo.files.keys() | undo.side_files.keys()
    if len(set(shards)) < len(shards) or beside & set(shards):
        raise ValueError("two files have one name")
    for name in [*beside, *shards]:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name:
            raise ValueError(f"{name!r} is no place inside the model")
    if any(Path(name).suffix != ".safetensors" for name in shards):
        raise ValueError("a shard is not called .safetensors")
    if not all(isinstance(text, str) for pair in undo.metadata.items() for text in pair):
        raise ValueError("its metadata are no texts")
    if CONFIG in undo.files:
        config = undo.json(CONFIG)
        if not isinstance(config, dict):
            raise ValueError("config.json is no JSON object")
        check_model_config(config, undo.path)
