"""JSON files with values of the wrong type, in every field: one error that names it, or no matter.

For each field of each file that loratool reads, and each value, every verb that reads the file
either answers as if the field were as it was before, or raises one error that names the file and
the field. No traceback, no NaN in JSON, no other answer.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.adapters import write_adapter
from helpers.files import ADAPTED, load, random_of, same, write_base
from torch import float32

import loratool
from loratool.errors import BaseError, FileError, LoraToolError
from loratool.merging.provenance import merged_into
from loratool.models.config import check_model_config
from loratool.publishing.cards.document import make_card
from loratool.publishing.manifest import pack
from loratool.storage.fields import COUNT, FINITE, FLAG, NUMBER, FieldType, value_text

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PATH = ADAPTED.removesuffix(".weight")
DEEP: Any = 1
for _ in range(50):
    DEEP = {"a": [DEEP]}

#: One of each type, and of each odd size; `random` picks of them in the quick run.
VALUES: list[Any] = [
    None, True, False, float("nan"), float("inf"), -1, 0, 1, 0.5, 8.0, 10**30, 10**400, "", "no",
    "false", "16", "\x1b[2J", [], [None], [1], ["a", 2], [[]], ["x"] * 100_000, {}, {"a": 1},
    {"": None}, {"a": []}, DEEP,
]  # fmt: skip

CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base",
    "revision": None, "auto_mapping": None, "r": 2, "lora_alpha": 4, "use_rslora": False,
    "use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "bias": "none",
    "target_modules": ["q_proj"], "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "init_lora_weights": True, "trainable_token_indices": None, "ensure_weight_tying": False,
    "use_bdlora": None, "exclude_modules": None, "layers_to_transform": None, "lora_dropout": 0.0,
    "inference_mode": True, "peft_version": "0.21.2", "target_parameters": None,
    "lora_B_layout": None,
}  # fmt: skip
MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
    "torch_dtype": "float32", "vocab_size": 12, "num_labels": 2, "id2label": None,
    "quantization_config": None, "_name_or_path": "", "text_config": None, "auto_map": None,
    "rope_scaling": None, "eos_token_id": 2, "dtype": "float32",
}  # fmt: skip
#: Further fields inside of those: files, the table they are in, and fields.
INSIDE = [
    ("a/adapter_config.json", ("auto_mapping",), ("base_model_class", "parent_library")),
    ("a/adapter_config.json", ("use_bdlora",), ("nblocks", "target_modules_bd_a")),
    ("a/adapter_config.json", ("rank_pattern",), ("x_proj",)),
    ("a/adapter_config.json", ("alpha_pattern",), ("x_proj",)),
    ("b/config.json", ("text_config",), ("model_type", "tie_word_embeddings", "vocab_size")),
    ("b/config.json", ("vision_config",), ("model_type",)),
    ("b/model.safetensors.index.json", (), ("weight_map", "metadata")),
    ("b/model.safetensors.index.json", ("metadata",), ("total_size",)),
    ("b/model.safetensors.index.json", ("weight_map",), (HEAD, "other")),
    ("b/modules.json", (0,), ("path", "type", "idx", "name")),
    ("b/tokenizer.json", (), ("model", "added_tokens", "version")),
    ("b/tokenizer.json", ("model",), ("vocab", "type")),
    ("b/tokenizer.json", ("model", "vocab"), ("tok",)),
    ("b/tokenizer.json", ("added_tokens", 0), ("id", "content")),
    ("b/tokenizer_config.json", (), ("added_tokens_decoder", "chat_template", "eos_token")),
    ("b/tokenizer_config.json", ("added_tokens_decoder",), ("3", "9" * 5000, "x")),
    ("b/tokenizer_config.json", ("added_tokens_decoder", "3"), ("content",)),
    ("b/added_tokens.json", (), ("tok",)),
    ("b/vocab.json", (), ("tok",)),
    ("b/tekken.json", (), ("config", "vocab")),
    ("b/tekken.json", ("config",), ("default_vocab_size",)),
    ("b/special_tokens_map.json", (), ("eos_token",)),
]  # fmt: skip
RECORD: list[tuple[tuple[str | int, ...], tuple[str, ...]]] = [
    ((), ("options", "base", "result", "adapters", "shards", "undo", "command", "versions")),
    (("options",), ("dtype", "components", "allow_unmatched")),
    (("base",), ("name", "repo", "revision", "dtypes", "adapters", "model_type", "path")),
    (("result",), ("tensors", "warnings", "subnormal")),
    (("result", "tensors"), ("add", "merge")),
    (("adapters", 0), ("name", "weight", "files", "modules", "base_model_name_or_path", "repo")),
    (("adapters", 0, "files"), ("adapter_config.json", "adapter_model.safetensors")),
    (("shards",), ("model.safetensors", "x")),
    (("undo",), ("file", "bytes")),
]


def fields() -> Iterator[tuple[str, tuple[str | int, ...], str]]:
    """Every field: the file, the table it is in, and its name."""
    for file, names in (("a/adapter_config.json", CONFIG), ("b/config.json", MODEL)):
        yield from ((file, (), name) for name in names)
    for file, table, named in INSIDE:
        yield from ((file, table, name) for name in named)
    for place, named in RECORD:
        yield from (("m/loratool.json", place, name) for name in named)


CASES = list(fields())
NAMES = [".".join((file, *map(str, table), field[:20])) for file, table, field in CASES]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter `a`, a base `b`, a fine-tune `t`, and `m`, that is `b` and `a`."""
    folder = tmp_path_factory.mktemp("whole")
    state = {
        EMBEDDING: random_of(float32, 12, 8, seed=3),
        ADAPTED: random_of(float32, 8, 8, seed=4),
        HEAD: random_of(float32, 12, 8, seed=5),
    }
    base = write_base(folder / "b", {k: state[k] for k in (EMBEDDING, ADAPTED)},
                      {HEAD: state[HEAD]}, config=MODEL)  # fmt: skip
    tuned = {**state, ADAPTED: state[ADAPTED] + 0.1 * random_of(float32, 8, 8, seed=6)}
    write_base(folder / "t", tuned, config=MODEL)
    files: dict[str, Any] = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "models.Transformer"}],
        "tokenizer.json": {
            "version": "1.0", "model": {"type": "BPE", "vocab": {"tok": 3}},
            "added_tokens": [{"id": 4, "content": "<s>"}]},
        "tokenizer_config.json": {
            "chat_template": None, "eos_token": "</s>",
            "added_tokens_decoder": {"3": {"content": "tok"}}},
        "added_tokens.json": {"tok": 3}, "vocab.json": {"tok": 3},
        "tekken.json": {"config": {"default_vocab_size": 5}, "vocab": []},
        "special_tokens_map.json": {"eos_token": "</s>"},
    }  # fmt: skip
    for name, document in files.items():
        (base / name).write_text(json.dumps(document))
    rng = np.random.default_rng(1)
    factors = {
        f"base_model.model.{PATH}.lora_A.weight": rng.standard_normal((2, 8)).astype(np.float32),
        f"base_model.model.{PATH}.lora_B.weight": rng.standard_normal((8, 2)).astype(np.float32),
    }
    write_adapter(folder / "a", factors, CONFIG)
    loratool.merge(base, folder / "a", folder / "m", dtype="base", reversible=True)
    return folder


def verbs(folder: Path, file: str) -> dict[str, Callable[[Path], Any]]:
    """What reads a file, by the verb; each gets the place for its output."""
    a, b, m = folder / "a", folder / "b", folder / "m"
    of_adapters: dict[str, Callable[[Path], Any]] = {
        "inspect": lambda out: loratool.inspect(a),
        "combine": lambda out: loratool.combine([a, a], out, weights=[0.5, 0.5]),
        "resize": lambda out: loratool.resize(a, out, rank=1),
        "compare": lambda out: loratool.compare([a, a]),
        "card": lambda out: make_card(a, None),
        "push": lambda out: pack(a).recorded,
    }
    of_both: dict[str, Callable[[Path], Any]] = {
        "inspect --base": lambda out: loratool.inspect(a, base=b),
        "merge --dry-run": lambda out: loratool.merge(b, a, out, dtype="float32", dry_run=True),
        "merge": lambda out: loratool.merge(b, a, out, dtype="float32"),
        "verify": lambda out: loratool.verify(m, b, a),
    }
    of_models: dict[str, Callable[[Path], Any]] = {
        "unmerge": lambda out: loratool.unmerge(m, a, out),
        "unmerge --subtract": lambda out: loratool.unmerge(m, a, out, subtract=True),
        "extract": lambda out: loratool.extract(b, folder / "t", out, rank=2),
        "card of a model": lambda out: make_card(m, None),
        "push of a model": lambda out: pack(m).recorded,
        "merge onto it": lambda out: loratool.merge(m, a, out, dtype="float32", again=True),
    }
    if file.startswith("a/"):
        return of_adapters | of_both
    if file.startswith("m/"):
        return of_models | {"verify": of_both["verify"]}
    return of_both | {name: of_models[name] for name in ("extract",)}


def change(path: Path, table: tuple[str | int, ...], field: str, value: Any) -> None:
    """Put a value into a field of a JSON file, in tables that are made where there are none."""
    document = json.loads(path.read_text())
    place = document
    for key in table:
        if isinstance(key, str) and not isinstance(place.get(key), dict | list):
            place[key] = {}
        place = place[key]
    place[field] = value
    path.write_text(json.dumps(document))


#: Fields whose values of the right type mean something else than what was there.
MEANT: dict[str, tuple[Any, ...]] = {
    "r": (1,), "lora_alpha": (-1, 0, 1, 0.5, 8.0, 10**30), "use_rslora": (True, 1),
    "tie_word_embeddings": (None, True), "weight": (-1, 0, 0.5, 8.0, 10**30),
    "dtype": ("float32",), "add": (1, 10**30), "components": (["x"] * 100_000,),
}  # fmt: skip


#: Fields in which any text may stand, and says something.
TEXTS = {"model_type", "peft_type", "adapter_config.json", "adapter_model.safetensors"}


def is_meant(field: str, value: Any) -> bool:
    if field in TEXTS and (value is None or isinstance(value, str)):
        return True
    return any(type(value) is type(one) and value == one for one in MEANT.get(field, ()))


def answer(folder: Path, verb: Callable[[Path], Any]) -> tuple[str, dict[str, Any]]:
    """What a verb says, "" for an answer without an error, and the tensors that it wrote."""
    out = folder / "out"
    try:
        report = verb(out)
        json.dumps(report.to_dict() if hasattr(report, "to_dict") else 0, allow_nan=False)
    except LoraToolError as error:
        assert not out.exists()
        return f"{error.message} ", {}
    made = load(out) if out.is_dir() else {}
    shutil.rmtree(out, ignore_errors=True)
    return "", made


@pytest.fixture(scope="module")
def references(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each verb writes of the files as they are, by its name."""
    folder = shutil.copytree(whole, tmp_path_factory.mktemp("as") / "is")
    found = {}
    for verb, run in (verbs(folder, "a/") | verbs(folder, "b/") | verbs(folder, "m/")).items():
        said, found[verb] = answer(folder, run)
        assert not said
    return found


def trouble(
    whole: Path,
    folder: Path,
    case: tuple[str, tuple[str | int, ...], str],
    value: Any,
    references: dict[str, Any],
    only: random.Random | None = None,
) -> list[str]:
    """What is wrong with the answers of all verbs, or of one, to a value in a field."""
    file, table, field = case
    shutil.copytree(whole, folder)
    change(folder / file, table, field, value)
    wrong = []
    asked = verbs(folder, file)
    for verb in [only.choice(sorted(asked))] if only else asked:
        said = f"{file} {table} {field[:20]}={str(value)[:40]}, {verb}: "
        try:
            message, made = answer(folder, asked[verb])
        except Exception as error:
            wrong.append(f"{said}{type(error).__name__}: {error}"[:400])
            shutil.rmtree(folder / "out", ignore_errors=True)
            continue
        unnamed = not {Path(file).name, field} & named(message) and not is_meant(field, value)
        if message and (len(message) > 2000 or unnamed):
            wrong.append(said + message[:300])
        elif made and not is_meant(field, value) and not same(made, references[verb]):
            wrong.append(said + "another result")
    shutil.rmtree(folder)
    return wrong


def named(message: str) -> set[str]:
    """The names of files and fields in a message."""
    return {part.rpartition("/")[2] for part in re.split(r"[\s:,;()'=\"]+", message)}


@pytest.mark.parametrize(
    "case", list(fields()), ids=lambda case: f"{case[0]}-{case[1]}-{case[2][:20]}"
)
def test_a_value_of_a_wrong_type(
    case: tuple[str, tuple[str | int, ...], str],
    whole: Path,
    references: dict[str, Any],
    tmp_path: Path,
) -> None:
    """One value for each field, and one verb."""
    chance = random.Random(str(case))
    assert not trouble(whole, tmp_path / "x", case, chance.choice(VALUES), references, chance)


@pytest.mark.hostile
@pytest.mark.parametrize(
    "case", list(fields()), ids=lambda case: f"{case[0]}-{case[1]}-{case[2][:20]}"
)
def test_every_value_of_a_wrong_type(
    case: tuple[str, tuple[str | int, ...], str],
    whole: Path,
    references: dict[str, Any],
    tmp_path: Path,
) -> None:
    """All values for each field, and all verbs."""
    wrong = []
    for value in VALUES:
        wrong += trouble(whole, tmp_path / "x", case, value, references)
    assert not wrong


#: A file, a field and a value that somebody may believe in, and what the error says it must be.
REFUSED: list[tuple[str, str, Any, str]] = [
    ("a/adapter_config.json", "lora_alpha", True, "a plain number"),
    ("a/adapter_config.json", "lora_alpha", float("nan"), "a plain number"),
    ("a/adapter_config.json", "r", None, "a plain number"),
    ("a/adapter_config.json", "use_rslora", "false", "true or false"),
    ("a/adapter_config.json", "use_dora", "no", "true or false"),
    ("a/adapter_config.json", "fan_in_fan_out", "1", "true or false"),
    ("a/adapter_config.json", "use_bdlora", True, "a table"),
    ("a/adapter_config.json", "bias", "some", "one of none, all, lora_only"),
    ("a/adapter_config.json", "peft_type", [], "a text"),
    ("a/adapter_config.json", "base_model_name_or_path", {}, "a text"),
    ("a/adapter_config.json", "target_modules", [None], "a list of names"),
    ("a/adapter_config.json", "modules_to_save", {}, "a list of names"),
    ("a/adapter_config.json", "rank_pattern", {"q": "8"}, "a table of numbers"),
    ("a/adapter_config.json", "trainable_token_indices", {"e": 3}, "a list of whole numbers"),
    ("b/config.json", "tie_word_embeddings", "false", "true or false"),
    ("b/config.json", "model_type", ["llama"], "a text"),
    ("b/config.json", "architectures", "LlamaForCausalLM", "a list of names"),
    ("b/config.json", "id2label", 3, "a table"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "field", "value", "wanted"), REFUSED, ids=str)
def test_values_that_mislead_are_refused(
    file: str, field: str, value: Any, wanted: str, whole: Path, tmp_path: Path
) -> None:
    """The error names the file, the field, what is there and what should be."""
    folder = shutil.copytree(whole, tmp_path / "x")
    change(folder / file, (), field, value)
    for verb in ("merge --dry-run", "merge", "verify", "inspect --base"):
        with pytest.raises(LoraToolError) as caught:
            verbs(folder, file)[verb](folder / "out")
        shown = json.dumps(value)
        assert f"{folder / file}: {field} is {shown}; it must be {wanted}" in caught.value.message


#: What a record of a merge says falsely, and a part of the error.
FALSE_RECORDS: list[tuple[tuple[str | int, ...], str, Any, str]] = [
    (("options",), "components", [3], "a list of names"),
    (("options",), "allow_unmatched", "false", "true or false"),
    (("options",), "dtype", "float8", "not the record of a merge"),
    (("base",), "repo", 3, "a text"), (("base",), "dtypes", "F32", "a list of names"),
    (("result", "tensors"), "add", True, "a whole number"),
    (("adapters", 0), "weight", float("nan"), "a finite number"),
    (("adapters", 0), "files", [], "a table of hashes"),
    (("adapters", 0), "files", {}, "its list of adapters is damaged"),
    ((), "shards", {"model.safetensors": 3}, "a table of hashes"), ((), "undo", True, "a table"),
    (("base",), "adapters", [{"name": 3}], "a text"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "field", "value", "words"), FALSE_RECORDS, ids=str)
def test_records_of_merges_that_mislead_are_refused(
    table: tuple[str | int, ...], field: str, value: Any, words: str, whole: Path, tmp_path: Path
) -> None:
    """By whoever reads the record, before any of it is believed."""
    shutil.copy(whole / "m" / "loratool.json", tmp_path)
    change(tmp_path / "loratool.json", table, field, value)
    with pytest.raises(FileError, match=words):
        merged_into(tmp_path)


@pytest.mark.parametrize("part", ["options", "base", "result", "adapters"])
def test_half_a_record_is_none(part: str, whole: Path, tmp_path: Path) -> None:
    """Without one of its parts it is not the record of a merge."""
    record = json.loads((whole / "m" / "loratool.json").read_text())
    del record[part]
    (tmp_path / "loratool.json").write_text(json.dumps(record))
    with pytest.raises(FileError, match="not the record of a merge"):
        merged_into(tmp_path)


@pytest.mark.parametrize("field", ["name", "weight", "files"])
def test_half_an_adapter_of_a_record_is_none(field: str, whole: Path, tmp_path: Path) -> None:
    """An entry says which adapter it was, and with which weight."""
    record = json.loads((whole / "m" / "loratool.json").read_text())
    del record["adapters"][0][field]
    (tmp_path / "loratool.json").write_text(json.dumps(record))
    with pytest.raises(FileError, match="its list of adapters is damaged"):
        merged_into(tmp_path)


@pytest.mark.parametrize(
    "config",
    [{"text_config": {"tie_word_embeddings": "false"}}, {"a": {"b": {"model_type": 3}}}],
    ids=["tied", "deep"],
)
def test_parts_of_a_model_are_looked_at_too(config: dict[str, Any]) -> None:
    """A model of text and images has a config within its config."""
    check_model_config({"text_config": {"tie_word_embeddings": False, "model_type": "x"}}, "x")
    with pytest.raises(BaseError, match="it must be"):
        check_model_config(config, "config.json")


TYPES: list[tuple[FieldType, list[Any], list[Any]]] = [
    (FLAG, [True, False, 0, 1], ["false", 2, 1.0, None]),
    (COUNT, [0, 2**63 - 1], [True, -1, 2**63, 1.0]),
    (NUMBER, [-1, 2.5], [True, float("nan"), float("inf"), 1e31, 10**400, "1"]),
    (FINITE, [1e31], [True, float("inf"), 10**400]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "good", "bad"), TYPES, ids=lambda value: getattr(value, "wanted", "")
)
def test_types_of_fields(kind: FieldType, good: list[Any], bad: list[Any]) -> None:
    """What Python takes for a number or a truth need not be one."""
    assert [value for value in good if not kind.fits(value)] == []
    assert [value for value in bad if kind.fits(value)] == []


def test_values_are_shown_in_short() -> None:
    """However long or deep they are."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert len(value_text("x" * 1000)) < 70
    assert value_text(deep) == "nested too deeply to be shown"


def test_values_that_can_mean_one_thing_only_are_read(whole: Path, tmp_path: Path) -> None:
    """8.0 is a rank, 1 is true, and null stands for what a field left out means."""
    folder = shutil.copytree(whole, tmp_path / "x")
    for field, value, as_if in (
        ("r", 2.0, {}), ("use_rslora", 1, {"use_rslora": True}), ("bias", None, {}),
        ("use_dora", 0, {}), ("rank_pattern", None, {}), ("peft_type", None, {}),
        ("modules_to_save", None, {}),
    ):  # fmt: skip
        made = []
        for config in ({**CONFIG, field: value}, {**CONFIG, **as_if}):
            (folder / "a" / "adapter_config.json").write_text(json.dumps(config))
            loratool.merge(folder / "b", folder / "a", folder / "out", overwrite=True)
            made.append(load(folder / "out"))
        assert same(*made), field


def test_a_deep_modules_json_is_one_error(whole: Path, tmp_path: Path) -> None:
    """What no parser unfolds is refused, not left out as if the model had no parts."""
    folder = shutil.copytree(whole, tmp_path / "x")
    for text in ("[" * 100_000 + "]" * 100_000, '[{"path": 3}]', "[3]", "{}", '[{"type": ""}]'):
        (folder / "b" / "modules.json").write_text(text)
        with pytest.raises(FileError, match=r"modules\.json"):
            loratool.merge(folder / "b", folder / "a", folder / "out", dry_run=True)


def test_infinity_in_fields_that_nobody_reads_is_kept(whole: Path, tmp_path: Path) -> None:
    """State-space models have it in their config.json; --json shows an adapter's as a text."""
    folder = shutil.copytree(whole, tmp_path / "x")
    change(folder / "b" / "config.json", (), "time_step_limit", [0.0, float("inf")])
    change(folder / "a" / "adapter_config.json", (), "lora_dropout", float("nan"))
    loratool.merge(folder / "b", folder / "a", folder / "out")
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["time_step_limit"] == [0.0, float("inf")]
    shown = loratool.inspect(folder / "a").to_dict()["config"]
    assert shown["lora_dropout"] == "nan"
    json.dumps(shown, allow_nan=False)
