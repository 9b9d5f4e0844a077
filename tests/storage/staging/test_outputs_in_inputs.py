"""An output that would harm an input is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.outcomes import assert_clear, sha256s

import loratool
from loratool.errors import OutputError


@pytest.mark.parametrize("overwrite", [False, True], ids=["plain", "overwrite"])
@pytest.mark.parametrize("which", ["base", "lora"])
@pytest.mark.parametrize("where", ["same", "inside", "around", "dots", "linked"])
def test_an_output_in_the_place_of_an_input_is_refused(
    tmp_path: Path, base: Path, lora: Path, which: str, where: str, overwrite: bool
) -> None:
    """Equal to, inside of or around an input, by any path: refused, and the input stays."""
    source = base if which == "base" else lora
    (tmp_path / "link").symlink_to(source)
    output = {
        "same": source,
        "inside": source / "merged",
        "around": source.parent,
        "dots": source / ".." / source.name / "deep" / "merged",
        "linked": tmp_path / "link" / "merged",
    }[where]
    before = sha256s(tmp_path / "in")
    with pytest.raises(OutputError) as caught:
        loratool.merge(base, lora, output, overwrite=overwrite)
    assert_clear(caught.value, str(tmp_path / "in"))
    assert sha256s(tmp_path / "in") == before
    assert sorted(p.name for p in (tmp_path / "in").iterdir()) == ["base", "lora"]


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_input_given_as_a_file_is_not_overwritten(
    tmp_path: Path, base: Path, lora: Path, which: str
) -> None:
    """The directory around an input file cannot be the output, not even with --overwrite."""
    file = base / "model.safetensors" if which == "base" else lora / "adapter_model.safetensors"
    inputs = (file, lora) if which == "base" else (base, file)
    (lora / "config.json").write_text("{}")
    with pytest.raises(OutputError):
        loratool.merge(*inputs, file.parent, overwrite=True)
    assert file.is_file()


@pytest.mark.parametrize("which", ["base", "lora"])
def test_files_that_an_input_links_to_are_not_overwritten(
    tmp_path: Path, base: Path, lora: Path, which: str
) -> None:
    """A directory that holds the targets of an input's links is an input as well."""
    source = base if which == "base" else lora
    real = tmp_path / "real"
    real.mkdir()
    (real / "loratool.json").write_text("{}")  # a model directory for --overwrite
    for path in sorted(source.iterdir()):
        shutil.move(path, real / path.name)
        path.symlink_to(real / path.name)
    before = sha256s(real)
    with pytest.raises(OutputError):
        loratool.merge(base, lora, real, overwrite=True)
    assert sha256s(real) == before
