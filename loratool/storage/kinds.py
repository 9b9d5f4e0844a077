"""What a file is by its first bytes, whatever its name says, and the way out of what is no weights.

Files are renamed, unpacked half, saved by a browser that was asked to log in. Containers of weights
are read by their content (`container_of`); everything else that is usual is called by its name,
with the way out (`refuse_known_impostors`).
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import NamedTuple

from loratool.errors import FileError, shown_argument
from loratool.storage.filenames import GGUF_SUFFIX, NPZ_SUFFIX, TORCH_SUFFIXES, is_of_a_model

#: As many bytes of a file as are looked at; a tar archive says what it is in the last of them.
LOOKED_AT = 512

ZIP = b"PK\x03\x04"
GGUF_MAGIC = b"GGUF"
#: How a pickle begins since Python 2.3; torch files that are no archives are pickles.
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
#: A torch file of the oldest pickle protocol begins like a text, with the number it is known by.
_TEXT_PICKLE = b"L119547037146038801333356L"

#: Containers of weights by what they are called in messages.
CONTAINERS = {
    "safetensors": "a safetensors file", "torch": "a torch file", "npz": "an .npz file",
    "gguf": "a GGUF file",
}  # fmt: skip


class _Kind(NamedTuple):
    """Files that begin with `magic`: what they are, and what to do. In a hint FILE is the path,
    DIR the folder and OUT the file that it is unpacked to."""

    magic: bytes
    words: str
    hint: str


_AGAIN = (
    "Fetch it again: hf download ORG/NAME --local-dir DIR (after hf auth login where one is "
    "needed), or give ORG/NAME itself."
)
_UNPACK = "Unpack it"
_GIVE_DIR = ", and give DIR."
_GIVE_OUT = ", and give OUT."
_NO_WEIGHTS = "Check which file you mean; the weights of an adapter are adapter_model.safetensors."
_NOT_AS_NAMED = (
    "A file of this name holds weights, so its download or its copy went wrong: what was saved may "
    f"be the message of an error. {_AGAIN}"
)
_SAVE_AGAIN = (
    "Read it with the program that wrote it, and save the tensors by name with safetensors "
    "(save_file of safetensors.numpy)."
)
_OLD_LLAMA = (
    "Convert the adapter that it was made from again, or give that adapter itself; nothing reads "
    "this form today."
)

_KINDS = [
    _Kind(b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive, not weights",
          f"{_UNPACK}: 7z x FILE -oDIR{_GIVE_DIR}"),
    _Kind(b"Rar!\x1a\x07", "a RAR archive, not weights",
          f"{_UNPACK}: unrar x FILE DIR/{_GIVE_DIR}"),
    _Kind(b"\x28\xb5\x2f\xfd", "packed with zstd, not weights",
          f"{_UNPACK}: zstd -dc FILE > OUT{_GIVE_OUT}"),
    _Kind(b"\xfd7zXZ\x00", "packed with xz, not weights",
          f"{_UNPACK}: xz -dc FILE > OUT{_GIVE_OUT}"),
    _Kind(b"BZh", "packed with bzip2, not weights", f"{_UNPACK}: bzip2 -dc FILE > OUT{_GIVE_OUT}"),
    _Kind(b"PK\x05\x06", "an empty zip archive", "Check which file you mean."),
    _Kind(b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, or TensorFlow), which is not read",
          "Read it with h5py, and save the tensors by name with safetensors (save_file of "
          "safetensors.numpy)."),
    _Kind(b"\x93NUMPY", "a single NumPy array (.npy), without a name", _SAVE_AGAIN),
    _Kind(b"algg", "an adapter in llama.cpp's form before GGUF (ggla)", _OLD_LLAMA),
    _Kind(b"lmgg", "a model in llama.cpp's form before GGUF (ggml)", _OLD_LLAMA),
    _Kind(b"tjgg", "a model in llama.cpp's form before GGUF (ggjt)", _OLD_LLAMA),
    _Kind(b"fmgg", "a model in llama.cpp's form before GGUF (ggmf)", _OLD_LLAMA),
    _Kind(b"PAR1", "a Parquet file: a table of data, not weights", _NO_WEIGHTS),
    _Kind(b"\x89PNG", "a picture (PNG), not weights", _NO_WEIGHTS),
    _Kind(b"\xff\xd8\xff", "a picture (JPEG), not weights", _NO_WEIGHTS),
    _Kind(b"%PDF", "a PDF document, not weights", _NO_WEIGHTS),
]  # fmt: skip

#: What files are called that are tar archives under what packs them.
_TAR_NAME = re.compile(r"\.(tar\.\w+|t[gx]z|tbz2?|tzst)$", re.IGNORECASE)
_UNTAR = f"{_UNPACK}: mkdir -p DIR && tar xf FILE -C DIR{_GIVE_DIR}"

_WEB = re.compile(rb"<(!doctype|html|head|body|!--)", re.IGNORECASE)
_BLANKS = b"\xef\xbb\xbf \r\n\t"


def container_of(start: bytes) -> str:
    """Which container of weights a file is, by its first bytes; "" where these do not tell.

    A zip archive may be a torch file; what it is stands at its end.
    """
    if _is_safetensors(start):  # first: a length may begin like anything
        return "safetensors"
    if start.startswith(GGUF_MAGIC):
        return "gguf"
    return "torch" if start.startswith(ZIP) or _PICKLE.match(start) else ""


def container_by_name(name: str) -> str:
    """Which container a file should be by the ending of its name; safetensors without one."""
    suffix = Path(name).suffix
    if suffix in TORCH_SUFFIXES:
        return "torch"
    return {NPZ_SUFFIX: "npz", GGUF_SUFFIX: "gguf"}.get(suffix, "safetensors")


def _is_safetensors(start: bytes) -> bool:
    """Whether there is the length of a header, below 4 GB, and the table that a header is."""
    return start[4:9] == b"\0\0\0\0{"


def refuse_known_impostors(path: Path, start: bytes, size: int) -> None:
    """Raise FileError for what is no container of weights and usual, by its name.

    `start` are the first bytes, LOOKED_AT of them where there are so many.
    """
    if _is_safetensors(start):
        return
    refuse_failed_download(path, start, size, "the weights themselves")
    for kind in _KINDS:
        if start.startswith(kind.magic):
            raise FileError(f"{path}: {kind.words}.", _hint(kind.hint, path))
    if start.startswith(b"\x1f\x8b"):
        raise _packed_with_gzip(path, start)
    if _is_tar(start):
        raise FileError(f"{path}: a tar archive, not weights.", _hint(_UNTAR, path))
    if size > 8 and not start.strip(b"\0"):
        raise FileError(
            f"{path}: nothing but zeros where it should begin: space was made for it, and the "
            "download or the copy never filled it.",
            _AGAIN,
        )
    if _is_text(start):
        raise _text_instead(path, start.lstrip(_BLANKS))


def refuse_failed_download(path: Path, start: bytes, size: int, wanted: str) -> None:
    """Raise FileError for what is left of downloads that failed, in place of what was `wanted`:
    nothing, a pointer to a file, a page to log in."""
    if size == 0:
        raise FileError(f"{path}: the file is empty.", _AGAIN)
    if start.startswith(b"version http"):
        raise FileError(
            f"{path}: a Git LFS pointer, not {wanted}.",
            "Run `git lfs pull` in that repository, or fetch the file: hf download ORG/NAME "
            "--local-dir DIR.",
        )
    text = start.lstrip(_BLANKS)
    if _WEB.match(text):
        raise FileError(
            f"{path}: a web page, not {wanted}; a page to log in, or of an error, was saved in "
            "its place.",
            _AGAIN,
        )
    if text[:5].lower() == b"<?xml":
        raise FileError(
            f"{path}: a web page (XML), not {wanted}; mostly the error of a server.", _AGAIN
        )


def _packed_with_gzip(path: Path, start: bytes) -> FileError:
    try:
        inside = zlib.decompressobj(31).decompress(start, LOOKED_AT)
    except zlib.error:
        inside = b""
    if _is_tar(inside) or _TAR_NAME.search(path.name):
        return FileError(
            f"{path}: a tar archive packed with gzip, not weights.", _hint(_UNTAR, path)
        )
    return FileError(
        f"{path}: packed with gzip, not weights.",
        _hint(f"{_UNPACK}: gzip -dc FILE > OUT{_GIVE_OUT}", path),
    )


def unpacked_to(path: Path) -> Path:
    """Where an archive, or a packed file, is unpacked to: beside it, by its name."""
    plain = re.sub(r"(\.tar)?\.\w+$", "", path.name)
    return path.with_name(plain if plain not in ("", path.name) else f"{path.name}-unpacked")


def _hint(hint: str, path: Path) -> str:
    """A hint of `_Kind` for a file."""
    if hint is _NO_WEIGHTS and is_of_a_model(path.name):
        return _NOT_AS_NAMED
    if hint.endswith(_GIVE_OUT) and _TAR_NAME.search(path.name):
        hint = _UNTAR
    packed = path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst")
    out = path.with_suffix("") if packed else path.with_name(f"unpacked-{path.name}")
    words = {"FILE": path, "DIR": unpacked_to(path), "OUT": out}
    return re.sub("FILE|DIR|OUT", lambda found: shown_argument(words[found[0]]), hint)


def _is_tar(start: bytes) -> bool:
    return start[257:262] == b"ustar"


def _is_text(start: bytes) -> bool:
    """Whether bytes are nothing but readable characters."""
    if start.startswith(_TEXT_PICKLE):
        return False
    try:
        text = start.decode("utf-8", "strict" if len(start) < LOOKED_AT else "ignore")
    except UnicodeDecodeError:
        return False
    return len(text) >= 8 and all(c.isprintable() or c in "\r\n\t" for c in text)


def _text_instead(path: Path, text: bytes) -> FileError:
    """The error for a text, by what it is about."""
    wanted = CONTAINERS[container_by_name(path.name)]
    first = text[:60].decode("utf-8", "ignore").strip()
    what, hint = f"a text, not {wanted}; it begins with {first!r}", _hint(_NO_WEIGHTS, path)
    if text.startswith((b"{", b"[")):
        what = f"a JSON text, not {wanted}; it begins with {first!r}"
        if b'"weight_map"' in text:
            what = f"the index of a model in shards (JSON), not {wanted}"
            hint = f"Give its folder, with all shards in it: {path.parent}."
        elif path.name.endswith("config.json"):
            what = f"a config (JSON), not {wanted}: it says how weights are used and holds none"
            hint = f"Give its folder, with the weights in it: {path.parent}."
        elif b'"error' in text.lower():
            what, hint = f"the error of a server (JSON), not {wanted}: {first!r}", _AGAIN
    elif text.lower().startswith((b"entry not found", b"repository not found", b"invalid user",
                                  b"access to model", b"not found", b"unauthorized")):  # fmt: skip
        what, hint = f"the error of a server, not {wanted}: {first!r}", _AGAIN
    return FileError(f"{path}: {what}.", hint)
