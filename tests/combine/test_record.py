"""Tokenizers, metadata and loratool.json of a combined adapter; the dry run that foretells it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import WEIGHTS, K, Q, codes, lora, pair, write_adapter
from helpers.combining import holding
from helpers.outcomes import sha256s
from safetensors.numpy import load_file, save_file

import loratool


def test_tokenizers(two: list[Path], tmp_path: Path, out: Path) -> None:
    """One tokenizer, or equal ones, come along; different ones are a warning, and none is there."""
    (two[0] / "tokenizer.json").write_text('{"a": 1}')
    (two[0] / "README.md").write_text("not of the result")
    loratool.combine(two, out)
    assert (out / "tokenizer.json").read_text() == '{"a": 1}'
    assert not (out / "README.md").exists()
    (two[1] / "tokenizer.json").write_text('{"a": 1}')
    assert codes(loratool.combine(two, tmp_path / "equal")) == []
    assert (tmp_path / "equal" / "tokenizer.json").is_file()
    (two[1] / "tokenizer.json").write_text('{"a": 2}')
    assert codes(loratool.combine(two, tmp_path / "other")) == ["tokenizers-differ"]
    assert not (tmp_path / "other" / "tokenizer.json").exists()
    assert codes(loratool.combine(two, tmp_path / "left", weights=[1, 0])) == ["zero-weight"]
    assert (tmp_path / "left" / "tokenizer.json").read_text() == '{"a": 1}'


def test_provenance(mixed: tuple[list[Path], Path]) -> None:
    """loratool.json has the options and the hashes of all inputs and outputs as on the disk."""
    document = json.loads((mixed[1] / "loratool.json").read_text())
    assert document["schema_version"] == 2
    assert document["command"] == "combine"
    assert document["options"]["method"] == "sum"
    assert [a["files"] for a in document["adapters"]] == [sha256s(s) for s in mixed[0]]
    hashes = sha256s(mixed[1])
    del hashes["loratool.json"]
    assert document["files"] == hashes
    assert document["result"]["rank"] == 7


@pytest.mark.parametrize("case", ["plain", "zero-weight", "same-adapter", "nothing-shared"])
def test_provenance_has_no_path_and_no_date(tmp_path: Path, case: str) -> None:
    """Equal inputs in other places, at other times, give equal files, also where there are
    warnings."""
    runs = []
    for place in ("here", "elsewhere"):
        folder = tmp_path / place
        sources = [
            lora(folder / "one", seed=1),
            lora(folder / "two", K if case == "nothing-shared" else Q, seed=1 + (case == "plain")),
        ]
        weights = [1, 0] if case == "zero-weight" else None
        loratool.combine(sources, folder / "out", weights=weights)
        runs.append(sha256s(folder / "out"))
        text = (folder / "out" / "loratool.json").read_text()
        assert [a["weight"] for a in json.loads(text)["adapters"]] == (weights or [1, 1])
        assert str(tmp_path) not in text
        assert time.strftime("%Y-") not in text
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 2}, {"energy": 0.5, "keep_patterns": True}, {"dtype": "float16"},
     {"saved": "mean"}, {"method": "ties", "density": 0.5}],
    ids=str,
)  # fmt: skip
def test_a_dry_run_predicts_and_writes_nothing(tmp_path: Path, options: dict[str, Any]) -> None:
    """A dry run reports the very bytes, ranks and losses of the run, and touches no disk."""
    sources = [
        holding(tmp_path / "a", np.ones((3, 10)), 1),
        holding(tmp_path / "b", np.ones((3, 10)), 2),
    ]
    write_adapter(sources[1], load_file(sources[1] / WEIGHTS) | pair(K, 12, 10), None)
    out = tmp_path / "new" / "out"
    planned = loratool.combine(sources, out, dry_run=True, **options)
    assert not (tmp_path / "new").exists()
    done = loratool.combine(sources, out, **options)
    for one, two in zip(planned.modules, done.modules, strict=True):
        assert (one.path, one.rank, one.kept, one.norm) == (two.path, two.rank, two.kept, two.norm)
    assert (planned.kept, planned.error, planned.rank) == (done.kept, done.error, done.rank)
    assert done.bytes_written == (out / WEIGHTS).stat().st_size
    assert planned.bytes_written == done.bytes_written


def test_metadata_and_tasks_are_not_lost(tmp_path: Path, out: Path) -> None:
    """What all the files say alike stays in the file; the rest is in loratool.json."""
    sources = []
    for name in ("one", "two"):
        folder = lora(tmp_path / name, seed=len(sources), task_type=name.upper())
        tensors = load_file(folder / WEIGHTS)
        save_file(tensors, folder / WEIGHTS, {"format": "pt", "licence": "mit", "run": name})
        sources.append(folder)
    report = loratool.combine(sources, out)
    assert codes(report) == ["tasks-differ"]
    assert loratool.inspect(out).metadata == {"format": "pt", "licence": "mit"}
    record = json.loads((out / "loratool.json").read_text())
    assert [a["metadata"]["run"] for a in record["adapters"]] == ["one", "two"]


def test_one_tokenizer_file_more_is_no_other_tokenizer(two: list[Path], out: Path) -> None:
    """Tokenizers clash where neither has all that the other has: a mixture would be nobody's."""
    for folder in two:
        (folder / "tokenizer.json").write_text("{}")
    (two[1] / "chat_template.jinja").write_text("x")
    assert codes(loratool.combine(two, out)) == []
    assert (out / "tokenizer.json").read_text() == "{}"
    assert (out / "chat_template.jinja").read_text() == "x"
    (two[0] / "added_tokens.json").write_text("{}")
    mixed = out.with_name("mixed")
    assert codes(loratool.combine(two, mixed)) == ["tokenizers-differ"]
    assert not (mixed / "tokenizer.json").exists()
