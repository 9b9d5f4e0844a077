"""Outputs whose loratool.json has schema version 1: all verbs take them as they take their own.

`fixtures/schema1` has them and what they were made from; what is made of the same inputs in a test
has version 2, and differs by digests alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.digests import blake3s
from helpers.files import load, same
from helpers.outcomes import assert_clean, assert_clear, sha256s
from helpers.places import FIXTURES
from helpers.unmerging import UNDO, codes, no_unmerge

import loratool
from loratool.errors import LoraToolError, MatchError, RestoreError
from loratool.merging.undo.file import read_undo
from loratool.publishing.cards.document import make_card
from loratool.publishing.manifest import pack
from loratool.storage.hashing import is_blake3, is_sha256

OLD = FIXTURES / "schema1"
BASE, FP8, ONE, TWO = (OLD / name for name in ("base", "fp8", "one", "two"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same outputs, made here."""
    out = tmp_path_factory.mktemp("schema2")
    loratool.merge(BASE, ONE, out / "plain")
    loratool.merge(BASE, ONE, out / "reversible", reversible=True)
    loratool.merge(out / "reversible", TWO, out / "stacked", dtype="base", reversible=True)
    loratool.merge(BASE, [ONE, TWO], out / "both", weights=[1, 0.5], reversible=True)
    loratool.merge(BASE, ONE, out / "taken", initial=TWO, reversible=True)
    loratool.merge(FP8, ONE, out / "unpacked", reversible=True)
    loratool.dequantise(FP8, out / "dequantised")
    loratool.unmerge(out / "both", TWO, out / "subtracted", subtract=True)
    loratool.combine([ONE, TWO], out / "combined")
    return out


MERGED = ["plain", "reversible", "stacked", "both", "taken", "unpacked"]
MODELS = [*MERGED, "dequantised", "subtracted"]
#: How a reversible output is taken back: the adapters, and what comes out.
REVERSIBLE: dict[str, tuple[list[Path], Path]] = {
    "reversible": ([ONE], BASE), "stacked": ([TWO], OLD / "reversible"), "both": ([ONE, TWO], BASE),
    "taken": ([ONE], BASE), "unpacked": ([ONE], FP8),
}  # fmt: skip


def record_of(folder: Path) -> Any:
    return json.loads((folder / "loratool.json").read_text())


@pytest.mark.parametrize("name", [*MODELS, "combined"])
def test_records_differ_by_version_and_digests_of_shards(name: str, made: Path) -> None:
    """All else stays as it was; what is compared with inputs is a sha256 in both."""
    old, new = record_of(OLD / name), record_of(made / name)
    assert (old.pop("schema_version"), new.pop("schema_version")) == (1, 2)
    assert new.pop("shards", {}) == (blake3s(made / name) if name in MODELS else {})
    hashes = old.pop("shards", {})
    assert hashes == ({n: sha256s(OLD / name)[n] for n in hashes} if name in MODELS else {})
    for record in (old, new):
        del record["versions"]
        for part in ("warnings", "config_changes"):  # they name paths
            record.get("result", {}).pop(part, None)
        record.get("undo", {}).pop("bytes", None)
    assert old == new
    assert same(load(OLD / name), load(made / name))


@pytest.mark.parametrize("name", REVERSIBLE)
def test_undo_files_say_the_same(name: str, made: Path) -> None:
    """But for the kind of their digests."""
    old, new = (read_undo(folder / name / UNDO) for folder in (OLD, made))
    assert all(is_sha256(t.digest) for t in old.tensors.values())
    assert all(is_blake3(t.digest) for t in new.tensors.values())
    assert all(map(is_sha256, old.side_files.values()))
    assert all(map(is_blake3, new.side_files.values()))
    assert old.tensors.keys() == new.tensors.keys()
    assert old.side_files.keys() == new.side_files.keys()
    assert [s.header for s in old.shards] == [s.header for s in new.shards]


@pytest.mark.parametrize("name", REVERSIBLE)
def test_the_base_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    adapters, base = REVERSIBLE[name]
    report = loratool.unmerge(OLD / name, adapters, tmp_path / "back")
    assert report.exact
    assert report.warnings == []
    assert sha256s(tmp_path / "back") == sha256s(base)


def test_stacked_merges_are_taken_off_one_by_one(tmp_path: Path) -> None:
    """What the first step gives back, of version 1 too, knows how to go on."""
    loratool.unmerge(OLD / "stacked", TWO, tmp_path / "first")
    loratool.unmerge(tmp_path / "first", ONE, tmp_path / "second")
    assert sha256s(tmp_path / "second") == sha256s(BASE)


def test_a_merge_on_top_is_taken_off_and_leaves_what_was(tmp_path: Path) -> None:
    """Version 2 over version 1: each is undone by its own file."""
    out, first, second = (tmp_path / name for name in ("out", "first", "second"))
    loratool.merge(OLD / "reversible", TWO, out, dtype="base", reversible=True)
    assert record_of(out)["schema_version"] == 2
    loratool.unmerge(out, TWO, first)
    assert sha256s(first) == sha256s(OLD / "reversible")
    loratool.unmerge(first, ONE, second)
    assert sha256s(second) == sha256s(BASE)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_a_changed_bit_is_noticed(name: str, tmp_path: Path) -> None:
    """By the sha256 that the base had, and nothing is written."""
    adapters, _ = REVERSIBLE[name]
    out = shutil.copytree(OLD / name, tmp_path / "out")
    file = out / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    no_unmerge(RestoreError, out, adapters, tmp_path / "back", "sha256")


def test_a_changed_side_file_is_noticed(tmp_path: Path) -> None:
    out = shutil.copytree(OLD / "reversible", tmp_path / "out")
    (out / "generation_config.json").write_text("{}")
    report = loratool.unmerge(out, ONE, tmp_path / "back", dry_run=True)
    assert "side-file-changed" in codes(report)


@pytest.mark.parametrize("name", ["plain", "stacked", "both"])
def test_subtraction_gives_the_same(name: str, made: Path, tmp_path: Path) -> None:
    """Weights and dtypes are known from either record."""
    adapters = {"plain": [ONE], "stacked": [TWO, ONE], "both": [TWO]}[name]
    for folder, back in ((OLD, "old"), (made, "new")):
        loratool.unmerge(folder / name, adapters, tmp_path / back, subtract=True)
    assert same(load(tmp_path / "old"), load(tmp_path / "new"))
    old, new = record_of(tmp_path / "old"), record_of(tmp_path / "new")
    for key in ("schema_version", "options", "removed", "adapters", "shards"):
        assert old[key] == new[key], key


def test_an_adapter_that_was_not_merged_is_refused(tmp_path: Path) -> None:
    no_unmerge(RestoreError, OLD / "plain", TWO, tmp_path / "back", "not among the adapters")


@pytest.mark.parametrize("name", MERGED)
def test_verify_finds_the_same(name: str, made: Path) -> None:
    adapters = [ONE, TWO] if name == "both" else [TWO] if name == "stacked" else [ONE]
    options: dict[str, Any] = {"weights": [1, 0.5]} if name == "both" else {}
    if name == "taken":
        options["initial"] = TWO
    bases = {"unpacked": (FP8, FP8), "stacked": (OLD / "reversible", made / "reversible")}
    found = [
        loratool.verify(folder / name, base, adapters, **options)
        for folder, base in zip((OLD, made), bases.get(name, (BASE, BASE)), strict=True)
    ]
    assert [report.verdict for report in found] == ["yes", "yes"]


def test_what_is_held_is_not_merged_again(made: Path, tmp_path: Path) -> None:
    """A base of version 1 says which adapters it holds, also below others."""
    for folder in (OLD, made):
        for name, held in (("plain", ONE), ("stacked", ONE), ("both", TWO)):
            with pytest.raises(MatchError, match="already, by its"):
                loratool.merge(folder / name, held, tmp_path / "out")
            assert_clean(tmp_path / "out")
    loratool.merge(OLD / "plain", ONE, tmp_path / "old", again=True)
    loratool.merge(made / "plain", ONE, tmp_path / "new", again=True)
    assert same(load(tmp_path / "old"), load(tmp_path / "new"))
    assert record_of(tmp_path / "old")["base"] == record_of(tmp_path / "new")["base"]


@pytest.mark.parametrize("name", [*MODELS, "combined"])
def test_cards_are_the_same(name: str, made: Path) -> None:
    assert make_card(OLD / name, None) == make_card(made / name, None)


@pytest.mark.parametrize("name", [*MODELS, "combined"])
def test_the_same_goes_to_the_hub(name: str, made: Path) -> None:
    """The files, and every weight with the digest that its record has."""
    old, new = pack(OLD / name), pack(made / name)
    assert old.files == new.files
    assert old.recorded.keys() == new.recorded.keys()
    assert all(map(is_sha256, old.recorded.values()))


@pytest.mark.parametrize("name", ["plain", "unpacked"])
def test_what_is_taken_apart_is_the_same(name: str, made: Path, tmp_path: Path) -> None:
    """extract, dequantise and inspect read either as a model."""
    base = FP8 if name == "unpacked" else BASE
    for folder, out in ((OLD, "old"), (made, "new")):
        loratool.extract(base, folder / name, tmp_path / out, rank=2)
    found = [load(tmp_path / out) for out in ("old", "new")]
    assert same(*found)
    reports = [loratool.inspect(ONE, base=folder / name) for folder in (OLD, made)]
    assert reports[0].to_dict().keys() == reports[1].to_dict().keys()


#: What reads the record of a model or of an adapter.
READERS: dict[str, Any] = {
    "merge": lambda m, out: loratool.merge(m, TWO, out),
    "merge-again": lambda m, out: loratool.merge(m, TWO, out, again=True),
    "verify": lambda m, out: loratool.verify(m, BASE, ONE),
    "unmerge": lambda m, out: loratool.unmerge(m, ONE, out),
    "subtract": lambda m, out: loratool.unmerge(m, ONE, out, subtract=True),
    "card": lambda m, out: make_card(m, None),
    "push": lambda m, out: pack(m).recorded,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_later_version_is_refused(reader: str, tmp_path: Path) -> None:
    """One clear error, which names the file and says to update; nothing is written."""
    model = shutil.copytree(OLD / "reversible", tmp_path / "model")
    record = record_of(model)
    (model / "loratool.json").write_text(json.dumps({**record, "schema_version": 3}))
    with pytest.raises(LoraToolError) as caught:
        READERS[reader](model, tmp_path / "out")
    where = str(model / "loratool.json")
    assert_clear(caught.value, where, "a later loratool wrote it (schema version 3")
    assert caught.value.hint.startswith("Update loratool.")
    assert_clean(tmp_path / "out")


@pytest.mark.parametrize("digest", ["md5:" + "0" * 32, "blake3:" + "0" * 63, "0" * 40, ""])
@pytest.mark.parametrize("reader", sorted(READERS.keys() - {"card"}))
def test_a_digest_of_no_known_kind_is_refused(reader: str, digest: str, tmp_path: Path) -> None:
    model = shutil.copytree(OLD / "reversible", tmp_path / "model")
    record = record_of(model)
    record["shards"] = dict.fromkeys(record["shards"], digest)
    (model / "loratool.json").write_text(json.dumps(record))
    with pytest.raises(LoraToolError, match="must be a table of hashes"):
        READERS[reader](model, tmp_path / "out")
    assert_clean(tmp_path / "out")
