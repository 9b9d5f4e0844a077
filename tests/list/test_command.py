"""What `loratool list` prints: a table, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

from helpers.adapters import lora
from helpers.cli import run_cli
from helpers.listing import kohya, model

from loratool.rendering.list import CSV_COLUMNS, list_sheet
from loratool.sheet import Bars
from loratool.text import csv_cell
from loratool.verbs.list import catalog


def folder(place: Path) -> Path:
    long = "a-name-that-goes-on-for-longer-than-anybody-would-read"
    lora(place / long / "checkpoint-100", rank=8, base_model_name_or_path=f"org/{long}")
    lora(place / long / "checkpoint-200", rank=8, base_model_name_or_path=f"org/{long}")
    kohya(place / "style.safetensors", **{"modelspec.trigger_phrase": "sks dog"})
    cut = kohya(place / "cut.safetensors", seed=2)
    cut.write_bytes(cut.read_bytes()[:-1])
    model(place / "model")
    return place


def test_the_table_fits_80_columns(tmp_path: Path) -> None:
    """Columns drop until it does; name, kind and state stay, and the cut file is explained."""
    done = run_cli("list", folder(tmp_path), COLUMNS="80")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "checkpoint-200" in done.stdout
    assert "= a-na" in done.stdout
    assert "damaged" in done.stdout
    assert "cut.safetensors: truncated" in done.stdout
    assert any("3 adapters, 1 model, 1 other file" in line for line in lines)
    wide = run_cli("list", tmp_path, COLUMNS="200").stdout
    assert "sks dog" in wide


def test_nothing_found_is_said(tmp_path: Path) -> None:
    """An empty folder and a filter that fits nothing end with 0 and a sentence."""
    done = run_cli("list", cwd=tmp_path)
    assert (done.exit_code, "No adapter and no model" in done.stdout) == (0, True)
    lora(tmp_path / "one")
    done = run_cli("list", tmp_path, "--rank", "99")
    assert (done.exit_code, "None of 1 entry" in done.stdout) == (0, True)


def test_json_is_what_the_library_says(tmp_path: Path) -> None:
    """One document with all entries."""
    found = json.loads(run_cli("list", folder(tmp_path), "--json").stdout)
    assert found == catalog(tmp_path).to_dict()
    assert found["totals"]["adapter"] == 3
    assert [e["state"] for e in found["entries"] if e["path"] == "cut.safetensors"] == ["damaged"]


def test_csv_has_a_row_for_each_entry(tmp_path: Path) -> None:
    """Names whole, numbers as numbers, and no cell that a spreadsheet computes."""
    folder(tmp_path)
    kohya(tmp_path / "=1+1,'x'.safetensors", **{"modelspec.trigger_phrase": "@sum(a)"})
    done = run_cli("list", tmp_path, "--csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert len(rows) == 6
    formula = next(row for row in rows if "1+1" in row["path"])
    assert formula["path"] == "'=1+1,'x'.safetensors"
    assert formula["triggers"] == "'@sum(a)"
    checkpoint = next(row for row in rows if row["path"].endswith("checkpoint-100"))
    assert (checkpoint["ranks"], checkpoint["scales"], checkpoint["bytes"]) == ("8", "1.0", "704")


def test_cells_of_csv_are_safe() -> None:
    """Whatever begins like a formula gets an apostrophe; all else is as it was."""
    for text in ("=a", "+1", "-1", "@a", " =a", "\t=a", "\ta", "\r", "＝a"):
        assert csv_cell(text) == f"'{text}"
    for text in ("", "a=b", "a-b", "1+1", "[x]", "two\nlines"):
        assert csv_cell(text) == text
    assert csv_cell(os.fsdecode(b"a\xff")) == r"a\udcff"


def test_csv_and_json_together_are_refused(tmp_path: Path) -> None:
    """One answer has one form."""
    assert run_cli("list", tmp_path, "--csv", "--json").exit_code == 2


def test_the_sheet_has_the_sizes_as_bars(tmp_path: Path) -> None:
    """A page can show where the bytes are."""
    (chart,) = list_sheet(catalog(folder(tmp_path))).charts
    assert isinstance(chart, Bars)
    assert set(chart.labels) == {"peft", "kohya", "model", "other"}
