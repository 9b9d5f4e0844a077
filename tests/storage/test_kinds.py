"""Files are what their content is: containers are read, all else is named with the way out."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.adapters import codes
from helpers.outcomes import assert_clear
from helpers.places import FIXTURES
from safetensors.numpy import load_file

import loratool
from loratool.errors import FileError
from loratool.storage.kinds import refuse_known_impostors

WEIGHTS = FIXTURES / "adapter" / "adapter_model.safetensors"
CONFIG = FIXTURES / "adapter" / "adapter_config.json"
#: Names that say other things than what is in the file.
NAMES = ("adapter_model.safetensors", "adapter_model.bin", "lora.npz", "lora.gguf", "lora.zip")


def _saved(kind: str) -> bytes:
    tensors = load_file(WEIGHTS)
    stream = io.BytesIO()
    if kind == "npz":
        np.savez(stream, **tensors)
    elif kind == "safetensors":
        return WEIGHTS.read_bytes()
    else:
        torch.save(
            {name: torch.from_numpy(value.copy()) for name, value in tensors.items()},
            stream,
            _use_new_zipfile_serialization=kind == "torch",
        )
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["safetensors", "torch", "old torch", "npz"])
@pytest.mark.parametrize("name", NAMES)
def test_a_container_is_read_whatever_its_name(kind: str, name: str, tmp_path: Path) -> None:
    """The same adapter comes of each container under each name, and a wrong name is said once."""
    (tmp_path / name).write_bytes(_saved(kind))
    report = loratool.inspect(tmp_path / name)
    assert len(report.modules) == len(loratool.inspect(FIXTURES / "adapter").modules)
    right = {"safetensors": ("safetensors",), "torch": ("bin",), "old torch": ("bin",),
             "npz": ("npz",)}  # fmt: skip
    named_so = name.endswith(right[kind]) or (kind == "safetensors" and name.endswith("zip"))
    assert codes(report).count("other-container") == (not named_so)


def test_a_wrong_name_changes_no_merge(tmp_path: Path) -> None:
    """A torch file called .safetensors merges to the same bytes, with one warning."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG.name).write_bytes(CONFIG.read_bytes())
    (folder / WEIGHTS.name).write_bytes(_saved("torch"))
    for adapter, out in ((folder, "one"), (FIXTURES / "adapter", "two")):
        report = loratool.merge(FIXTURES / "base", adapter, tmp_path / out)
        assert codes(report) == (["other-container"] if adapter == folder else [])
    for shard in (tmp_path / "one").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()


def _zip(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _tar(mode: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        archive.add(WEIGHTS, f"my-lora/{WEIGHTS.name}")
    return stream.getvalue()


LORA = {f"my-lora/{p.name}": p.read_bytes() for p in (WEIGHTS, CONFIG)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

#: What may lie where weights should: its content, what it is called, what the hint leads to.
OTHERS: dict[str, tuple[bytes, str, str]] = {
    "zip of a folder": (_zip(LORA), "a zip archive with weights in it",
                        ", and give the folder "),
    "zip of anything": (_zip({"a.txt": b"x"}), "a zip archive, but not a torch file. It holds a.",
                        "unzip"),
    "empty zip": (_zip({}), "an empty zip archive", "which file"),
    "tar": (_tar("w"), "a tar archive", "tar xf "),
    "tar.gz": (_tar("w:gz"), "a tar archive packed with gzip", "tar xf "),
    "gzip": (gzip.compress(WEIGHTS.read_bytes()), "packed with gzip", "gzip -dc "),
    "bzip2": (bz2.compress(b"x" * 99), "packed with bzip2", "bzip2 -dc"),
    "xz": (lzma.compress(b"x" * 99), "packed with xz", "xz -dc"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(99), "packed with zstd", "zstd -dc"),
    "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(99), "7-Zip", "7z x"),
    "RAR": (b"Rar!\x1a\x07\x01\0" + bytes(99), "RAR", "unrar"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "an HDF5 file", "h5py"),
    "npy": (b"\x93NUMPY\1\0" + bytes(99), "a single NumPy array", "safetensors"),
    "pickle": (pickle.dumps({"a": 1}), "a Python pickle, but not a torch file", "save_file"),
    "pickle of arrays": (pickle.dumps({"a": np.ones(3)}), "it asks for numpy", "save_file"),
    "ggla": (b"algg" + bytes(99), "llama.cpp's form before GGUF", "again"),
    "pointer": (POINTER, "a Git LFS pointer", "git lfs pull"),
    "login": (b"<!DOCTYPE html><title>Sign in</title>", "a web page", "hf download"),
    "part of a page": (b"\n<head><title>404</title></head>", "a web page", "hf download"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML", "hf download"),
    "server": (b'{"error":"Invalid username or password."}', "the error of a server", "hf auth"),
    "not found": (b"Entry not found", "the error of a server", "hf download"),
    "index": (b'{"metadata":{},"weight_map":{"a":"model-00001-of-00002.safetensors"}}',
              "the index of a model in shards", "folder"),
    "JSON": (json.dumps({"a": [1, 2]}).encode(), "a JSON text", "adapter_model.safetensors"),
    "text": (b"base_model: llama\nlora_r: 16\n", "a text", "adapter_model.safetensors"),
    "empty": (b"", "the file is empty", "hf download"),
    "zeros": (bytes(9999), "nothing but zeros", "hf download"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture", "adapter_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["best.safetensors", "best.bin", "lora"])
def test_what_is_no_weights_is_named_with_the_way_out(kind: str, name: str, tmp_path: Path) -> None:
    """One error calls the file what it is, whatever its name, and says what to do."""
    content, words, way_out = OTHERS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as caught:
        loratool.inspect(tmp_path / name)
    assert_clear(caught.value, str(tmp_path / name), words)
    assert way_out in caught.value.hint


@pytest.mark.parametrize(
    ("name", "kind", "commands", "given"),
    [
        ("a/my lora.zip", "zip of a folder", ["unzip 'a/my lora.zip' -d 'a/my lora'"],
         "'a/my lora/my-lora'"),
        ("a/my lora.tar.gz", "tar.gz",
         ["mkdir -p 'a/my lora'", "tar xf 'a/my lora.tar.gz' -C 'a/my lora'"], "'a/my lora'"),
        ("a/lora.tar", "tar", ["mkdir -p a/lora", "tar xf a/lora.tar -C a/lora"], "a/lora"),
        ("a/b.safetensors.gz", "gzip", ["gzip -dc a/b.safetensors.gz > a/b.safetensors"],
         "a/b.safetensors"),
        ("a/b.safetensors", "gzip", ["gzip -dc a/b.safetensors > a/unpacked-b.safetensors"],
         "a/unpacked-b.safetensors"),
    ],
)  # fmt: skip
def test_the_command_that_unpacks_can_be_pasted(
    name: str, kind: str, commands: list[str], given: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It has the path that was given, quoted, and so has what to give afterwards, which is read."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path(name).write_bytes(OTHERS[kind][0])
    with pytest.raises(FileError) as caught:
        loratool.inspect(name)
    pasted = " && ".join(commands)
    assert caught.value.hint.startswith(f"Unpack it: {pasted}, and give ")
    assert caught.value.hint.endswith(f"{given}.")
    if shutil.which(commands[-1].split()[0]):
        subprocess.run(pasted, shell=True, check=True, capture_output=True)
        assert loratool.inspect(*shlex.split(given)).modules


@pytest.mark.parametrize("content", [b'{"a": 1}', b"hello there\nnothing", b"%PDF-1.4 page"])
def test_what_has_the_name_of_weights_is_to_be_fetched_again(
    content: bytes, tmp_path: Path
) -> None:
    """A hint does not send to the very file that was given, and a line end is shown once."""
    (tmp_path / WEIGHTS.name).write_bytes(content)
    with pytest.raises(FileError) as caught:
        loratool.inspect(tmp_path)
    assert "Fetch it again" in caught.value.hint
    assert WEIGHTS.name not in caught.value.hint
    assert "\\\\" not in caught.value.message
    assert "hello" not in caught.value.message or r"there\nnothing" in caught.value.message


def test_a_config_is_taken_for_no_weights(tmp_path: Path) -> None:
    """Whoever points at adapter_config.json is sent to its folder."""
    with pytest.raises(FileError) as caught:
        loratool.inspect(CONFIG)
    assert "a config (JSON)" in caught.value.message
    assert str(CONFIG.parent) in caught.value.hint


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08\0", b"BZh\0", b"PK\3\4", b"PAR1", b"\x80\2\0\0"])
def test_a_length_that_looks_like_another_kind_is_a_length(start: bytes) -> None:
    """A safetensors header whose length has the bytes of gzip's or zip's mark is no such file."""
    refuse_known_impostors(Path("x"), start + b'\0\0\0\0{"a":{"dtype":"F32"}}', 1 << 30)


@pytest.mark.parametrize("name", ["lora.pt", "lora.safetensors", "lora.npz"])
def test_the_dialect_is_that_of_the_content_too(name: str, tmp_path: Path) -> None:
    """Bare lora_a and lora_b are a script's in a torch file, whatever its name; MLX writes none."""
    torch.save({"layers.0.q.lora_a": torch.ones(2, 6), "layers.0.q.lora_b": torch.ones(8, 2)},
               tmp_path / name)  # fmt: skip
    assert loratool.inspect(tmp_path / name).format == "hand"
