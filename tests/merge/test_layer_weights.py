"""--weight for ranges of layers: each module gets its factor, and verify and unmerge know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.choosing import PATHS, close, expected, layered_base, layered_lora, layered_state
from helpers.cli import run_cli
from helpers.files import load
from helpers.outcomes import refused, sha256s

import loratool
from loratool.adapters.weighting import LayerRange, Weight, parse_weight
from loratool.errors import FileError, LoraToolError, RestoreError, UsageError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return layered_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return layered_lora(tmp_path / "adapter")


def layer(path: str) -> int:
    return int(path.split(".")[2])


@pytest.mark.parametrize(
    ("text", "by_layer"),
    [
        ("0.7@layers.0-1,0.3@layers.2-", [0.7, 0.7, 0.3, 0.3]),
        ("1,0.5@layers.0-1", [0.5, 0.5, 1, 1]),
        ("-0.25@model.layers.3", [1, 1, 1, -0.25]),
        ("0.1@layers.1-2,2", [2, 0.1, 0.1, 2]),
    ],
)
def test_each_layer_has_its_weight(
    text: str, by_layer: list[float], base: Path, adapter: Path, tmp_path: Path
) -> None:
    """The values are those of float64; verify proves them and no others, unmerge gives the base."""
    out = tmp_path / "out"
    report = loratool.merge(base, adapter, out, weights=[text], dtype="base", reversible=True)
    assert close(load(out), expected((adapter, lambda path: by_layer[layer(path)])))
    record = json.loads((out / "loratool.json").read_text())
    said = str(parse_weight(text))
    assert report.weights == record["options"]["weights"] == [said]
    assert record["adapters"][0]["weight"] == said
    assert loratool.verify(out, base, adapter, weights=[text]).verdict == "yes"
    assert loratool.verify(out, base, adapter).verdict == "no"
    assert loratool.unmerge(out, adapter, tmp_path / "back").exact
    assert sha256s(tmp_path / "back") == sha256s(base)
    near = loratool.unmerge(out, adapter, tmp_path / "near", subtract=True, weights=[text])
    assert near.weights == [said]
    assert close(load(tmp_path / "near"), expected())
    with pytest.raises(RestoreError, match="was merged with weight"):
        loratool.unmerge(out, adapter, tmp_path / "no", weights=[0.5])


def test_several_adapters_have_one_weight_each(base: Path, tmp_path: Path) -> None:
    """In their order; numbers and texts side by side. A layer may be without one of them."""
    one, two = layered_lora(tmp_path / "one", 1), layered_lora(tmp_path / "two", 2)
    weights = [0.5, Weight(1.0, (LayerRange("layers", 0, 1, 0.0),))]
    loratool.merge(base, [one, two], tmp_path / "out", weights=weights, dtype="base")
    wanted = expected((one, lambda _: 0.5), (two, lambda path: float(layer(path) > 1)))
    assert close(load(tmp_path / "out"), wanted)
    report = loratool.verify(tmp_path / "out", base, [one, two], weights=weights)
    assert report.verdict == "yes"


def test_a_weight_of_zero_leaves_layers_as_they_were(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Bit for bit, and verify says yes to that, and no to a merge of them."""
    loratool.merge(base, adapter, tmp_path / "out", weights=["0@layers.0-2"], dtype="base")
    merged, state = load(tmp_path / "out"), layered_state()
    changed = {name for name in state if not torch.equal(state[name], merged[name])}
    assert changed == {f"{path}.weight" for path in PATHS if layer(path) == 3}
    check = loratool.verify(tmp_path / "out", base, adapter, weights=["1,0@layers.0-2"])
    assert check.verdict == "yes"
    loratool.merge(base, adapter, tmp_path / "all", dtype="base")
    check = loratool.verify(tmp_path / "all", base, adapter, weights=["1,0@layers.0-2"])
    assert check.verdict == "no"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.7@layers.4-", "meets no module"),
        ("0.7@h.0-3", "meets no module"),
        ("1@layers.0-2,2@layers.2-3", "two factors"),
        ("1@layers.0-1,2@model.layers.1", "two factors"),
        ("0.7@layers.3-1", "ends before it begins"),
        ("0.7@layers", "no range of layers"),
        ("1,2,3@layers.0", "two numbers without layers"),
        ("x@layers.0", "no number"),
        ("", "no number"),
        ("nan@layers.0", "not finite"),
    ],
)
def test_what_is_no_weight_is_refused(
    text: str, said: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """A slip must not merge something else than was meant."""
    refused(UsageError, base, adapter, tmp_path / "out", said, weights=[text])


def test_ranges_of_one_adapter_go_into_one_option(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """A second --weight is another adapter's; the error says how it is written."""
    weights = ["0.7@layers.0-1", "0.3@layers.2-3"]
    error = refused(UsageError, base, adapter, tmp_path / "out", "2 weights", weights=weights)
    assert "commas" in error.hint


def test_the_order_of_ranges_makes_no_difference(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Same inputs, same bytes; and a stopped run is taken up under the same weight only."""
    one, two = tmp_path / "one", tmp_path / "two"
    loratool.merge(base, adapter, one, weights=["1,0.5@layers.0,0.2@layers.2-"])
    for number in (1, 2):
        if number == 2:
            with pytest.raises(LoraToolError, match="weight"):
                loratool.merge(base, adapter, two, weights=["0.2@layers.2-"], worker="2/2")
        given = "0.2@layers.2-,0.5@layers.0-0,1"
        loratool.merge(base, adapter, two, weights=[given], worker=f"{number}/2")
    assert sha256s(two) == sha256s(one)


def test_text_and_value_are_each_other() -> None:
    """What is recorded is read as it was."""
    for text in ("1,0.7@layers.0-11,0.3@layers.12-", "-0.5,1e-05@model.layers.3", "0.1"):
        weight = parse_weight(text)
        assert str(weight) == text
        assert parse_weight(weight.document) == weight
        opposite = -weight
        assert parse_weight(str(opposite)) == opposite
        assert -opposite == weight
    assert [parse_weight("2,0@experts.1-2").at(f"a.experts.{n}.w") for n in range(4)] == [
        2,
        0,
        0,
        2,
    ]
    assert parse_weight("2,0@layers.1").at("model.layers.11.q") == 2
    assert parse_weight("2,0@ayers.1").at("model.layers.1.q") == 2


def test_the_command_and_the_card_write_it_as_it_was_typed(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """In the table, in --json, and in the line that makes the model again."""
    out = tmp_path / "out"
    text = "1,0.5@layers.0-1"
    done = run_cli("merge", base, adapter, "-o", out, "--weight", text)
    assert done.exit_code == 0, done.stderr
    assert f"× {text}" in done.stdout
    assert run_cli("card", out).exit_code == 0
    assert f"--weight {text}" in (out / "README.md").read_text()
    wrong = run_cli("merge", base, adapter, "-o", tmp_path / "no", "--weight", "0.5@layer")
    assert wrong.exit_code == 2
    assert "no range of layers" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [("weight", "x@layers.0"), ("weight", [1]), ("include", "q"), ("exclude", 3)],
)
def test_a_record_with_another_weight_or_choice_is_refused(
    field: str, value: object, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """What somebody wrote into loratool.json is one error in words."""
    out = tmp_path / "out"
    loratool.merge(base, adapter, out, dtype="base")
    record = json.loads((out / "loratool.json").read_text())
    record["adapters"][0][field] = value
    (out / "loratool.json").write_text(json.dumps(record))
    with pytest.raises(FileError, match=r"loratool\.json"):
        loratool.unmerge(out, adapter, tmp_path / "back")


def test_a_value_made_by_hand_is_checked() -> None:
    """loratool.Weight in Python has no other values than texts have."""
    with pytest.raises(UsageError, match="not finite"):
        Weight(float("nan"))
    many = tuple(LayerRange("layers", n, n, 0.5) for n in range(1001))
    with pytest.raises(UsageError, match="1001 ranges"):
        Weight(1.0, many)
    turned = Weight(1.0, (LayerRange("layers", 2, 2, 0.1), LayerRange("layers", 0, 1, 0.2)))
    assert turned == parse_weight("0.2@layers.0-1,0.1@layers.2")
