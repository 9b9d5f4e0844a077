"""Files that are exchanged or rewritten while a run reads them: one error, and nothing written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.files import ADAPTED, OTHER, State, random_of, small_lora, small_state, write_base
from helpers.merging import large_base, large_lora
from helpers.outcomes import assert_clean, assert_clear, sha256s
from safetensors.torch import save_file

import loratool
from loratool.errors import FileError
from loratool.storage.folder import Folder

SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    made = large_base(tmp_path / "base", 8)
    (made / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    return made


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return large_lora(tmp_path / "lora")


def replace_folder(folder: Path) -> None:
    """Another folder of the same files, with other values, takes its place."""
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    for path in other.glob("*.safetensors"):
        rewrite(path)
    folder.rename(folder.with_name("gone"))
    other.rename(folder)


def rewrite(path: Path) -> None:
    """The same number of bytes, the last of them others."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as stream:
        stream.write(data)


def swap(path: Path) -> None:
    """Another file of the same size and time takes its place."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    rewrite(other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def once(change: Callable[[], None]) -> Callable[..., None]:
    """A progress function that makes a change when it is called first."""
    made: list[bool] = []

    def progress(*_: Any) -> None:
        if not made:
            made.append(True)
            change()

    return progress


#: What happens to the inputs of a merge when a part of its output is written.
CHANGES: dict[str, Callable[[Path, Path], None]] = {
    "base-replaced": lambda base, lora: replace_folder(base),
    "shard-rewritten": lambda base, lora: rewrite(base / SECOND),
    "shard-swapped": lambda base, lora: swap(base / SECOND),
    "config-rewritten": lambda base, lora: rewrite(base / "config.json"),
    "tokenizer-swapped": lambda base, lora: swap(base / "tokenizer.json"),
    "index-rewritten": lambda base, lora: rewrite(base / "model.safetensors.index.json"),
    "adapter-rewritten": lambda base, lora: rewrite(lora / "adapter_model.safetensors"),
    "adapter-config": lambda base, lora: rewrite(lora / "adapter_config.json"),
    "adapter-removed": lambda base, lora: shutil.rmtree(lora),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reversible", [False, True], ids=["plain", "reversible"])
def test_a_merge_of_inputs_that_change_is_refused(
    tmp_path: Path, base: Path, lora: Path, change: str, reversible: bool
) -> None:
    """Whatever of the base or the adapter changes in mid-run: an error, and no output."""
    progress = once(lambda: CHANGES[change](base, lora))
    with pytest.raises(FileError) as caught:
        loratool.merge(
            base, lora, tmp_path / "out", progress=progress, threads=1, reversible=reversible
        )
    assert_clear(caught.value, str(tmp_path))
    assert_clean(tmp_path / "out")


def test_what_only_lies_beside_may_change(tmp_path: Path, base: Path, lora: Path) -> None:
    """A file that the run does not read may come, change and go; reading changes nothing itself."""
    (base / "model.gguf").write_bytes(b"x")
    progress = once(lambda: (base / "model.gguf").write_bytes(b"y") and None)
    loratool.merge(base, lora, tmp_path / "out", progress=progress, threads=1)
    assert sha256s(tmp_path / "out")


def models(folder: Path) -> tuple[Path, Path, Path]:
    """A base, an adapter, and what a reversible merge makes of them."""
    base, lora = write_base(folder / "base", _state(1)), small_lora(folder / "lora")
    loratool.merge(base, lora, folder / "merged", dtype="float32", reversible=True)
    return base, lora, folder / "merged"


def _state(seed: int) -> State:
    return small_state(seed=seed) | {
        f"model.layers.{i}.mlp.up_proj.weight": random_of(torch.float32, 64, 64, seed=seed + i)
        for i in range(1, 5)
    }


@pytest.mark.parametrize(
    ("name", "subtract"),
    [("model.safetensors", False), ("loratool/undo.safetensors", False),
     ("model.safetensors", True)],
)  # fmt: skip
@pytest.mark.parametrize("change", [rewrite, swap])
def test_an_unmerge_of_a_model_that_changes_is_refused(
    tmp_path: Path, name: str, change: Callable[[Path], None], subtract: bool
) -> None:
    """The merged model and its undo file are held against what they were at first."""
    _, lora, merged = models(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(FileError) as caught:
        loratool.unmerge(
            merged, lora, out, subtract=subtract, threads=1,
            progress=once(lambda: change(merged / name)),
        )  # fmt: skip
    assert_clear(caught.value, str(merged / name))
    assert_clean(out)


@pytest.mark.parametrize("side", ["base", "merged", "config", "lora"])
def test_a_verify_of_files_that_change_is_refused(tmp_path: Path, side: str) -> None:
    """No verdict is given of a mixture."""
    base, lora, merged = models(tmp_path)
    path = {"base": base / "model.safetensors", "merged": merged / "model.safetensors",
            "config": merged / "config.json",
            "lora": lora / "adapter_config.json"}[side]  # fmt: skip
    with pytest.raises(FileError, match="changed"):
        loratool.verify(merged, base, lora, progress=once(lambda: rewrite(path)), threads=1)


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_an_extract_of_models_that_change_is_refused(tmp_path: Path, side: str) -> None:
    """Both models are held against what they were at first, tensors and configs."""
    state = _state(1)
    base = write_base(tmp_path / "base", state)
    tuned = write_base(
        tmp_path / "tuned", {k: v + 0.1 * random_of(v.dtype, *v.shape) for k, v in state.items()}
    )
    path = {"base": base / "config.json", "tuned": tuned / "model.safetensors"}[side]
    with pytest.raises(FileError, match="changed"):
        loratool.extract(
            base, tuned, tmp_path / "out", rank=2, progress=once(lambda: rewrite(path)), threads=1
        )
    assert_clean(tmp_path / "out")


#: What reads adapters alone.
VERBS: dict[str, Callable[..., Any]] = {
    "combine": lambda one, two, out, **run: loratool.combine([one, two], out, **run),
    "resize": lambda one, two, out, **run: loratool.resize(one, out, rank=1, **run),
    "compare": lambda one, two, out, **run: loratool.compare([one, two], **run),
}


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("verb", VERBS)
def test_adapters_that_change_are_refused(tmp_path: Path, verb: str, name: str) -> None:
    """Combine, resize and compare hold adapters against what they were at first."""
    one, two = small_lora(tmp_path / "one"), small_lora(tmp_path / "two")
    out = tmp_path / "out"
    progress = once(lambda: rewrite(one / name))
    with pytest.raises(FileError, match="changed"):
        VERBS[verb](one, two, out, progress=progress, threads=1)
    assert_clean(out)


def test_a_file_that_is_met_twice_is_one_file(tmp_path: Path) -> None:
    """Whoever asks for a file again, by whichever folder, gets what was there at first, or none."""
    path = tmp_path / "sub" / "config.json"
    path.parent.mkdir()
    path.write_text("{} ")
    folder = Folder(tmp_path)
    folder.inside("sub").note(["config.json"])
    path.write_text("{}  ")
    assert folder.nbytes_of([path]) == 3
    for ask in (folder.refuse_changed, lambda: folder.note(["sub/config.json"])):
        with pytest.raises(FileError, match="changed"):
            ask()
    with pytest.raises(FileError, match="changed"), folder.reading("sub/config.json"):
        pass


def test_an_inspected_adapter_that_changes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is reported is of one config and of the weights beside it."""
    lora = small_lora(tmp_path / "lora")
    module = import_module("loratool.verbs.inspect")
    real = module.note_scales

    def change_first(adapter: Any) -> Any:
        rewrite(lora / "adapter_config.json")
        return real(adapter)

    monkeypatch.setattr(module, "note_scales", change_first)
    with pytest.raises(FileError, match="changed"):
        loratool.inspect(lora)


def test_a_tensor_is_read_of_the_file_whose_header_was_read(tmp_path: Path) -> None:
    """A file that changed between its header and its data is refused by whoever reads it."""
    from loratool.storage.header import read_header
    from loratool.storage.values import read_float32

    path = tmp_path / "x.safetensors"
    save_file({ADAPTED: torch.ones(4), OTHER: torch.ones(4)}, path)
    info = read_header(path)[0][ADAPTED]
    assert read_float32(info).tolist() == [1, 1, 1, 1]
    save_file({ADAPTED: torch.zeros(4), OTHER: torch.ones(4)}, path)
    with pytest.raises(FileError, match="changed"):
        read_float32(info)
