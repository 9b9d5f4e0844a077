"""Model cards: what a person wrote stays, what is said is known, and the code in them runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import FIXTURES, ROOT, pair, write_adapter
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import loratool
from loratool.cli.options import CONTEXT
from loratool.errors import FileError, LoraToolError
from loratool.publishing.cards.document import BEGIN, END, Licence, base_of, make_card
from loratool.publishing.cards.facts import code, hub_id, percent, span

BASE, ADAPTER = FIXTURES / "base", FIXTURES / "adapter"
HTML, TUNED = FIXTURES / "tasks" / "html", FIXTURES / "tuned"
ID = "loratool-fixtures/base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

#: Folders that loratool made, by how; "plain" and "base" it did not.
KINDS = ("merged", "two", "combined", "resized", "extracted", "unmerged", "plain", "base")
ADAPTERS = ("combined", "resized", "extracted", "plain")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    found = {kind: folder / kind for kind in KINDS}
    loratool.merge(BASE, ADAPTER, found["merged"], dtype="float32")
    both = [ADAPTER, HTML]
    loratool.merge(BASE, both, found["two"], weights=[0.7, -0.4], dtype="bfloat16", reversible=True)
    loratool.combine(both, found["combined"], weights=[0.7, 0.5], rank=8)
    loratool.resize(ADAPTER, found["resized"], energy=0.95)
    loratool.extract(BASE, TUNED, found["extracted"], rank=8, base_name=ID, dtype="float32")
    loratool.unmerge(found["two"], both, found["unmerged"], subtract=True)
    shutil.copytree(ADAPTER, found["plain"])
    shutil.copytree(BASE, found["base"])
    return found


def data(text: str) -> dict[str, Any]:
    """The YAML of a card, as the Hub's library reads it."""
    found: dict[str, Any] = ModelCard(text).data.to_dict()
    assert ModelCardData(**found).to_dict() == found
    return found


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_code(text: str, places: dict[str, Path]) -> dict[str, Any]:
    """Run the card's Python with these folders in place of the names in it."""
    (source,) = blocks(text, "python")
    for name, place in places.items():
        source = source.replace(json.dumps(name), json.dumps(str(place)))
    found: dict[str, Any] = {}
    exec(source, found)
    return found


def logits(found: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        tokens = found["tokenizer"]("def add(a, b):\n    return", return_tensors="pt").input_ids
        values: torch.Tensor = found["model"].float().eval()(tokens).logits
    assert torch.isfinite(values).all()
    return values


def changed_record(source: Path, folder: Path, change: dict[str, dict[str, Any]]) -> Path:
    """A copy with these entries in objects of its loratool.json; `adapters.0` is one of a list."""
    shutil.copytree(source, folder)
    path = folder / "loratool.json"
    record = json.loads(path.read_text())
    for place, entries in change.items():
        part = record
        for key in place.split("."):
            part = part[int(key) if key.isdigit() else key]
        part.update(entries)
    path.write_text(json.dumps(record))
    return folder


# --- what a card holds ---------------------------------------------------------------------------

METADATA = {
    "merged": ("transformers", "merge", ["lora", "loratool", "merge"]),
    "two": ("transformers", "merge", ["lora", "loratool", "merge"]),
    "combined": ("peft", "adapter", ["lora", "loratool", "peft"]),
    "resized": ("peft", "adapter", ["lora", "loratool", "peft"]),
    "extracted": ("peft", "adapter", ["lora", "loratool", "peft"]),
    "plain": ("peft", "adapter", ["lora", "loratool", "peft"]),
    "unmerged": ("transformers", None, ["loratool"]),
    "base": ("transformers", None, ["loratool"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_metadata(made: dict[str, Path], kind: str) -> None:
    """Every kind has its library, relation and tags; a base only where its Hub id is known."""
    library, relation, tags = METADATA[kind]
    wanted = {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    if relation:
        wanted["base_model_relation"] = relation
    if kind in ADAPTERS or relation == "merge":
        wanted["base_model"] = ID
    text = make_card(made[kind], None)
    assert data(text) == wanted
    if kind in ("merged", "two"):
        assert data(make_card(made[kind], None, base_model="me/b"))["base_model"] == "me/b"


@pytest.mark.parametrize("kind", KINDS)
def test_a_card_made_twice_is_the_same(made: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """It holds no path and no date; a title and one section, and the same again from itself."""
    text = make_card(made[kind], None, repo_id="me/mine")
    assert make_card(made[kind], text, repo_id="me/mine") == text
    copied = shutil.copytree(made[kind], tmp_path / kind)
    assert make_card(copied, None, repo_id="me/mine") == text
    assert text.count(BEGIN) == text.count(END) == 1
    assert "\n# mine\n" in text
    assert str(made[kind].parent) not in text
    assert str(FIXTURES) not in text
    assert not re.search(r"\b20\d\d-\d\d", text)
    assert "None" not in text
    assert "  \n" not in text


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("merged", "loratool merge base adapter --dtype float32 -o OUT"),
        ("two", "loratool merge base adapter html --weight 0.7 --weight -0.4 --dtype bfloat16 "
                "--reversible -o OUT"),
        ("combined", "loratool combine adapter html --weight 0.7 --weight 0.5 --rank 8 "
                     "--dtype float32 -o OUT"),
        ("resized", "loratool resize adapter --energy 0.95 --dtype float32 -o OUT"),
        ("extracted", "loratool extract base tuned --rank 8 --dtype float32 -o OUT"),
        ("unmerged", "loratool unmerge two adapter html --weight 0.7 --weight -0.4 "
                     "--dtype bfloat16 --subtract -o OUT"),
    ],
)  # fmt: skip
def test_the_command_is_rebuilt(made: dict[str, Path], kind: str, line: str) -> None:
    """From the record."""
    assert blocks(make_card(made[kind], None), "sh")[0] == line + "\n"


@pytest.mark.parametrize("kind", ["merged", "two", "combined", "resized", "extracted", "unmerged"])
def test_the_command_line_takes_it(made: dict[str, Path], kind: str) -> None:
    """Every option in it is there, and what is left out is what the command has by itself."""
    record = json.loads((made[kind] / "loratool.json").read_text())
    name = record["command"]
    command = getattr(import_module(f"loratool.commands.{name}"), f"{name}_command")
    line = shlex.split(blocks(make_card(made[kind], None), "sh")[0])
    assert line[:2] == ["loratool", name]
    taken = command.make_context(name, line[2:], **CONTEXT).params
    assert taken["output"] == "OUT"
    for key, value in record["options"].items():
        if key == "weights" and name != "resize":
            given = [-w for w in value] if name == "unmerge" else value
            assert list(taken[key]) == given or (not taken[key] and set(given) == {1.0})
        elif (name, key) != ("unmerge", "allow_unmatched"):
            found = taken[key]
            assert (list(found) if isinstance(found, tuple) else found) == value


def test_every_option_of_extract_is_repeated(tmp_path: Path) -> None:
    """Lists, flags and sizes too."""
    loratool.extract(
        BASE, TUNED, tmp_path / "ex", budget="90kB", max_rank=6, uniform=True, seed=3,
        exclude=["mlp.*", "lm_head"], skip=["norms"], save=["embed_tokens"],
    )  # fmt: skip
    assert blocks(make_card(tmp_path / "ex", None), "sh")[0] == (
        "loratool extract base tuned --budget 90000 --max-rank 6 --uniform --exclude 'mlp.*' "
        "--exclude lm_head --skip norms --save embed_tokens --seed 3 -o OUT\n"
    )


def test_a_merge_of_a_merge(made: dict[str, Path], tmp_path: Path) -> None:
    """What the base held already is in the table of inputs."""
    loratool.merge(made["two"], HTML, tmp_path / "three", weights=[0.1])
    text = make_card(tmp_path / "three", None)
    assert "`two` with a LoRA adapter merged into its weights: `html`" in text
    assert re.search(r"\| `adapter` \| in the base before \| 0\.7 \|", text)
    assert re.search(r"\| `html` \| in the base before \| -0\.4 \|", text)
    assert re.search(r"\| `html` \| adapter \| 0\.1 \|", text)


def test_no_history_is_invented(made: dict[str, Path]) -> None:
    """Without loratool.json there is none."""
    for kind in ("plain", "base"):
        text = make_card(made[kind], None)
        assert "How it was made" not in text
        assert "What was kept" not in text
    assert "merged" not in make_card(made["base"], None).replace("-o merged", "")


def test_a_record_of_other_weights_says_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    """Weights that were trained further, or replaced, did not come about as the record says."""
    folder = shutil.copytree(made["resized"], tmp_path / "stale")
    shutil.copyfile(made["combined"] / "adapter_model.safetensors",
                    folder / "adapter_model.safetensors")  # fmt: skip
    shutil.copyfile(made["combined"] / "adapter_config.json", folder / "adapter_config.json")
    text = make_card(folder, None)
    assert "`loratool.json` describes other weights" in text
    assert "resize" not in text
    assert "What was kept" not in text
    model = shutil.copytree(made["base"], tmp_path / "model")
    shutil.copyfile(made["merged"] / "loratool.json", model / "loratool.json")
    assert "merged into" in make_card(model, None)  # the same shards: nothing tells
    index = json.loads((model / "model.safetensors.index.json").read_text())
    gone = "model-00003-of-00003.safetensors"
    keep = {k: v for k, v in index["weight_map"].items() if v != gone}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": keep}))
    (model / gone).unlink()
    text = make_card(model, None)
    assert "merged into" not in text
    assert data(text)["tags"] == ["loratool"]


def test_what_is_said(made: dict[str, Path]) -> None:
    """The inputs with their hashes, the modules folded over layers, and what was lost."""
    record = json.loads((made["two"] / "loratool.json").read_text())
    two = make_card(made["two"], None)
    assert "with 2 LoRA adapters merged into its weights: `adapter` and `html`" in two
    assert f"[`{ID}`]" in two
    assert "That this is the base is what the adapters say." in two
    for entry in record["adapters"]:
        digest = entry["files"]["adapter_model.safetensors"]
        row = f"| {entry['weight']} | `adapter_model.safetensors` | `{digest[:16]}…` |"
        assert f"| `{entry['name']}` | adapter {row}" in two
    assert record["base"]["header_sha256"][:16] in two
    assert "44 modules of the adapters were merged into 28 tensors" in two
    assert "gives the base back bit for bit" in two
    assert "gives the base back" not in make_card(made["merged"], None)

    combined = make_card(made["combined"], None)
    assert "combined from `adapter` and `html` by `sum`" in combined
    assert "| `model.layers.{0-3}.mlp.up_proj` | linear | 4 | 320×128 | 8 | 8 | 1 |" in combined
    kept = json.loads((made["combined"] / "loratool.json").read_text())["result"]["kept"]
    assert f"keeps {percent(kept)} of ‖ΔW‖², a relative error of" in combined
    assert combined.count("self_attn") == 4 + 5  # the folded ones, and the worst five

    resized = make_card(made["resized"], None)
    assert "`adapter` resized from rank 8" in resized
    assert "28 modules with ranks 5–7" in resized

    extracted = make_card(made["extracted"], None)
    assert "extracted from the fine-tuned model `tuned`" in extracted
    assert "Saved whole: `model.layers.{0-3}.input_layernorm.weight`" in extracted
    assert "‖tuned − base‖²" in extracted
    worst = re.search(r"The modules that lost most:(.*?)\n## ", extracted, re.DOTALL)
    assert worst
    assert len(worst[1].strip().splitlines()) == 2 + 5

    plain = make_card(made["plain"], None)
    assert f"A LoRA adapter for [`{ID}`](https://huggingface.co/{ID})." in plain
    assert "28 modules with rank 8" in plain
    assert "71,680 parameters in float32, 287 kB" in plain


def test_what_extract_left_out_and_overall_errors(made: dict[str, Path], tmp_path: Path) -> None:
    """Left-out tensors are named; an overall error is given where the record has one."""
    loratool.extract(BASE, TUNED, tmp_path / "some", rank=4, skip=["norms", "embeddings"])
    text = make_card(tmp_path / "some", None)
    assert "left out of the adapter: 10, `model.embed_tokens.weight`, " in text
    assert "`model.layers.{0-3}.input_layernorm.weight`" in text
    more = {"result": {"held": 0.75, "error": 0.5, "verified": 0.501}}
    text = make_card(changed_record(made["extracted"], tmp_path / "more", more), None)
    assert "keeps 75% of ‖tuned − base‖², a relative error of 50%" in text
    assert "Read back and measured: 50.1%." in text


def test_nothing_cut(tmp_path: Path) -> None:
    loratool.combine([ADAPTER, HTML], tmp_path / "exact")
    text = make_card(tmp_path / "exact", None)
    assert "Nothing of ‖ΔW‖² was cut." in text
    assert "lost most" not in text


def test_hub_inputs(made: dict[str, Path], tmp_path: Path) -> None:
    """Repositories and their commits: in the command, as links, as bases, in the code."""
    change = {
        "base": {"repo": "org/base", "revision": COMMIT},
        "adapters.0": {"repo": "org/style", "revision": COMMIT},
        "adapters.1": {"repo": "org/task", "revision": "v1"},
    }
    folder = changed_record(made["two"], tmp_path / "hub", change)
    text = make_card(folder, None, repo_id="me/merged")
    assert blocks(text, "sh")[0].startswith(
        f"loratool merge org/base@{COMMIT} org/style@{COMMIT} org/task@v1 --weight"
    )
    assert base_of(folder) == "org/base"
    assert data(text)["base_model"] == ["org/base", "org/style", "org/task"]
    style = "https://huggingface.co/org/style"
    assert f"| [`org/style`]({style}) at [`{COMMIT[:12]}`]({style}/tree/{COMMIT}) |" in text
    assert 'name = "me/merged"' in text
    extracted = changed_record(
        made["extracted"], tmp_path / "ex", {"base": {"repo": ID, "revision": COMMIT}}
    )
    text = make_card(extracted, None)
    assert f'from_pretrained(base, revision="{COMMIT}")' in text
    assert f"merge {ID}@{COMMIT} path/to/ex -o merged" in text
    logits(run_code(text, {ID: BASE, "path/to/ex": extracted}))


def test_folders_in_repositories(made: dict[str, Path], tmp_path: Path) -> None:
    """A place inside a repository is in the command and in the code."""
    where = {"repo": "org/base", "revision": "main", "path": "a/b"}
    change = {"base": where, "tuned": {**where, "path": "c/model.safetensors"}}
    folder = changed_record(made["extracted"], tmp_path / "ex", change)
    text = make_card(folder, None, base_model="org/base")
    line, merge = blocks(text, "sh")
    assert " hf://org/base@main/a/b hf://org/base@main/c/model.safetensors " in line
    assert "loratool merge hf://org/base@main/a/b path/to/ex" in merge
    assert 'from_pretrained(base, revision="main", subfolder="a/b")' in text
    assert "[`org/base`](https://huggingface.co/org/base), `a/b` at [`main`]" in text
    change["base"] = {**where, "path": "a/model-00001-of-00002.safetensors"}
    folder = changed_record(made["extracted"], tmp_path / "file", change)
    assert 'subfolder="a")' in make_card(folder, None, base_model="org/base")


def test_a_base_known_from_the_record_only(made: dict[str, Path], tmp_path: Path) -> None:
    folder = changed_record(made["extracted"], tmp_path / "ex", {"base": {"repo": "org/base"}})
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, wanted in [("base", "org/base"), ("/home/me/base", "org/base"), (ID, ID)]:
        config["base_model_name_or_path"] = name
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert base_of(folder) == wanted
        assert data(make_card(folder, None))["base_model"] == wanted


def test_damaged_records(made: dict[str, Path], tmp_path: Path) -> None:
    """What has the wrong type is not used; what is no JSON is an error."""
    folder = shutil.copytree(made["combined"], tmp_path / "odd")
    record = json.loads((folder / "loratool.json").read_text())
    odd: Any
    for odd in (None, 3, "x", [], [None, 3], {"a": [1]}):
        for key in record.keys() - {"files"}:
            (folder / "loratool.json").write_text(json.dumps({**record, key: odd}))
            text = make_card(folder, None)
            assert make_card(folder, text) == text
    (folder / "loratool.json").write_text("{")
    with pytest.raises(FileError, match=r"loratool\.json"):
        make_card(folder, None)


# --- bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("org/name", "org/name"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("gpt2", "gpt2"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("roberta-large", "roberta-large"),
        ("t5-small", "t5-small"),
        ("/cache/hub/models--org--my-name/snapshots/0123", "org/my-name"),
        ("base", None),
        ("", None),
        (None, None),
        (7, None),
        ("/data/llama", None),
        ("~/llama", None),
        ("./llama", None),
        ("../models/llama", None),
        ("models/llama", None),
        ("a/b/c", None),
        ("C:\\models\\llama", None),
        ("out/checkpoint-500", None),
        ("org/name.safetensors", None),
        ("org/name\n", None),
        ("org/na me", None),
        ("-org/name", None),
        ("org/a--b", None),
    ],
)
def test_hub_ids(name: object, wanted: str | None) -> None:
    assert hub_id(name) == wanted


@pytest.mark.parametrize("name", ["/home/someone/llama", "./llama", "", None, "C:\\llama"])
def test_local_bases_are_left_out(tmp_path: Path, name: str | None) -> None:
    """The base is said to be unknown, and the code asks for it."""
    folder = shutil.copytree(ADAPTER, tmp_path / "local")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    (folder / "adapter_config.json").write_text(json.dumps(config))
    text = make_card(folder, None)
    assert base_of(folder) is None
    assert "base_model" not in data(text)
    assert "base model that is not recorded here" in text
    assert "llama" not in text
    assert "# Which base model this is for is not recorded" in text
    logits(run_code(text, {"path/to/base": BASE, "path/to/local": folder}))
    named = make_card(folder, None, base_model="org/base")
    assert data(named)["base_model"] == "org/base"
    assert "base_model" not in data(make_card(folder, None, base_model="/home/someone/llama"))


# --- the code runs -------------------------------------------------------------------------------


def places(made: dict[str, Path], kind: str) -> dict[str, Path]:
    return {ID: BASE, f"path/to/{kind}": made[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_code_runs(made: dict[str, Path], kind: str) -> None:
    """There is one block of Python, and it loads a model that computes."""
    found = run_code(make_card(made[kind], None), places(made, kind))
    assert logits(found).shape[-1] == 256
    with_id = make_card(made[kind], None, repo_id="me/mine")
    logits(run_code(with_id, {ID: BASE, "me/mine": made[kind]}))


def test_merged_and_adapter_agree(made: dict[str, Path]) -> None:
    """What the merged model's card loads computes what the adapter's card loads."""
    one = logits(run_code(make_card(made["plain"], None), places(made, "plain")))
    other = logits(run_code(make_card(made["merged"], None), places(made, "merged")))
    base = logits(run_code(make_card(made["base"], None), places(made, "base")))
    moved = (one - base).norm()
    assert moved > 1
    assert (one - other).norm() < 0.01 * moved


def test_the_merge_line_runs(made: dict[str, Path], tmp_path: Path) -> None:
    """The command in an adapter's card gives the model that the Python gives."""
    text = make_card(made["extracted"], None)
    line = blocks(text, "sh")[-1].split()
    assert line == ["loratool", "merge", ID, "path/to/extracted", "-o", "merged"]
    loratool.merge(BASE, made["extracted"], tmp_path / "merged", dtype="float32")
    one = logits(run_code(text, places(made, "extracted")))
    merged = make_card(tmp_path / "merged", None)
    other = logits(run_code(merged, {"path/to/merged": tmp_path / "merged"}))
    assert (one - other).norm() < 0.01 * one.norm()


def test_a_longer_vocabulary(tmp_path: Path) -> None:
    """An adapter with an embedding of its own makes the code resize the base."""
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.resize_token_embeddings(260)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].base_model_name_or_path = ID
    tuned.save_pretrained(tmp_path / "longer")
    template = (tmp_path / "longer" / "README.md").read_text(encoding="utf-8")
    text = make_card(tmp_path / "longer", template)
    assert "model.resize_token_embeddings(260)" in text
    # PEFT's template has a block of Python too, or none: ours is between the markers.
    own = text.split(BEGIN)[1]
    found = run_code(own, {ID: BASE, "path/to/longer": tmp_path / "longer"})
    assert logits(found).shape[-1] == 260
    assert "[More Information Needed]" in text
    assert text.startswith("---\n")
    assert template.partition("\n---\n")[2] in text
    assert data(text)["tags"][: len(data(template)["tags"])] == data(template)["tags"]


def test_classes_by_task(tmp_path: Path) -> None:
    """The class is the task's, a head's size is taken over, and what is not certain is not said."""

    def card(name: str, extra: dict[str, Any], **config: Any) -> str:
        tensors = pair("model.layers.0.self_attn.q_proj", 12, 10)
        config = {"base_model_name_or_path": "org/base", **config}
        return make_card(write_adapter(tmp_path / name, tensors | extra, config), None)

    import numpy as np

    score = {"base_model.model.score.weight": np.zeros((5, 12), np.float32)}
    text = card("labels", score, task_type="SEQ_CLS", modules_to_save=["score"])
    assert "AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)" in text
    assert data(text)["pipeline_tag"] == "text-classification"
    text = card("t5", {}, task_type="SEQ_2_SEQ_LM")
    assert "AutoModelForSeq2SeqLM" in text
    assert "pipeline_tag" not in data(text)
    text = card("none", {})
    assert "AutoModelForCausalLM" in text
    assert "# No task is recorded" in text
    assert "pipeline_tag" not in data(text)
    mapping = {"base_model_class": "BertForTokenClassification",
               "parent_library": "transformers.models.bert.modeling_bert"}  # fmt: skip
    assert "AutoModelForTokenClassification" in card("bert", {}, auto_mapping=mapping)
    other = {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models"}
    text = card("unet", {}, auto_mapping=other)
    assert "```python" not in text
    assert "`UNet2DConditionModel`" in text
    assert data(text)["library_name"] == "peft"


def test_models_without_a_config(made: dict[str, Path], tmp_path: Path) -> None:
    """No library and no code where nothing says how to build the model."""
    folder = shutil.copytree(made["merged"], tmp_path / "bare")
    (folder / "config.json").unlink()
    text = make_card(folder, None)
    assert "library_name" not in data(text)
    assert "```python" not in text
    assert "no `config.json`" in text
    (folder / "config.json").write_text(
        '{"architectures": ["OddForCausalLM"], "auto_map": {"a": "b"}}'
    )
    (folder / "tokenizer.json").unlink()
    text = make_card(folder, None)
    assert data(text)["library_name"] == "transformers"
    assert "AutoTokenizer" not in text
    assert "read that code first" in text


def test_other_adapters(tmp_path: Path) -> None:
    """What PEFT cannot load, and what is no LoRA, is called what it is."""
    bare = write_adapter(tmp_path / "bare", pair("model.layers.0.q", 12, 10), None)
    text = make_card(bare, None)
    assert "PEFT cannot load this" in text
    assert "library_name" not in data(text)
    assert "| unknown | unknown |" in text
    assert "loratool merge" not in text
    ia3 = write_adapter(tmp_path / "ia3", pair("a.q", 12, 10), {"peft_type": "IA3"})
    text = make_card(ia3, None)
    assert "lora" not in data(text)["tags"]
    assert "(IA)³" in text
    with pytest.raises(LoraToolError):
        make_card(tmp_path, None)


# --- what a person wrote -------------------------------------------------------------------------

PROSE = "# My model\n\nI trained it on *my* texts.  \n\n| a | b |\n|---|---|\n| 1 | 2 |\n"


def test_a_persons_text_stays(made: dict[str, Path]) -> None:
    """The section is appended once, replaced later, and moves nowhere."""
    text = make_card(made["plain"], PROSE)
    assert text.partition("---\n\n")[2].startswith(PROSE + f"\n{BEGIN}\n")
    assert data(text)["base_model"] == ID
    more = text.replace(f"{END}\n", f"{END}\n\nThe end.") + " Or not"
    again = make_card(made["plain"], more)
    assert again == more
    other = make_card(made["combined"], more)
    assert other.split(BEGIN)[0] == more.split(BEGIN)[0]
    assert other.split(END)[1] == more.split(END)[1]
    assert "combined from" in other
    assert other.count(BEGIN) == 1


def test_markers(made: dict[str, Path]) -> None:
    """Only whole lines are markers, and one without the other takes nothing along."""
    inline = f"Between `{BEGIN}` and `{END}` is what loratool says.\n"
    text = make_card(made["plain"], inline)
    assert inline in text
    assert make_card(made["plain"], text) == text
    for lone in (f"a\n{BEGIN}\nb\n", f"a\n{END}\nb\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\nx"):
        text = make_card(made["plain"], lone)
        assert lone in text
        again = make_card(made["combined"], text)
        assert lone in again
        assert "combined from" in again
        assert make_card(made["plain"], again) == text
    old = f"a\n\n{BEGIN}\nstale words\n{END}  \n\nb"
    text = make_card(made["plain"], old)
    assert "stale words" not in text
    assert text.endswith(f"{END}  \n\nb")
    empty = make_card(made["plain"], f"{BEGIN}\n{END}")
    assert empty.endswith(END)
    assert empty.count(BEGIN) == 1


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_breaks(made: dict[str, Path], newline: str, mark: str) -> None:
    """The section has the line breaks of the card; a byte order mark stays first."""
    text = mark + f"---\nlicense: mit # mine\n---\n\n{PROSE}".replace("\n", newline)
    made_card = make_card(made["plain"], text)
    assert made_card.startswith(f"{mark}---{newline}license: mit # mine{newline}base_model")
    assert PROSE.replace("\n", newline) in made_card
    if newline == "\r\n":
        assert not re.search(r"(?<!\r)\n", made_card)
    assert make_card(made["plain"], made_card) == made_card
    assert data(made_card.removeprefix(mark))["license"] == "mit"


@pytest.mark.parametrize(
    "block",
    [
        "license: mit",
        "license: mit  # a comment\n# another\n",
        "tags:\n- mine\n- peft",
        "tags:\n  - mine # why\n  - peft\nlicense: mit",
        "license: mit\ntags: [mine, peft]",
        "tags: [mine, ]",
        "tags: []",
        "tags:\n  - mine\n  - >-\n    two\n    lines",
        "tags:",
        "tags: mine",
        "  license: mit\n  tags:\n    - mine",
        "{license: mit, tags: [mine]}",
        "{}",
        "",
        "# nothing",
        "description: |\n  two\n  lines",
        "description: |+\n  two\n  lines\n",
        "date: 2024-05-01\nvalue: .nan\n'a b': \"c: d\"\n",
        "library_name: diffusers\nbase_model: [a/b, c/d]\npipeline_tag: fill-mask",
        "tags: &t\n- mine\nother: *t",
        "model-index:\n- name: x\n  results: []",
        "model-index: nonsense",
    ],
)
def test_yaml_of_a_person(made: dict[str, Path], block: str) -> None:
    """Keys, their values and their comments stay; lists of tags grow at their end."""
    text = f"---\n{block}\n---\n\n{PROSE}"
    card = make_card(made["plain"], text, licence=Licence("apache-2.0"))
    assert card.partition("\n---\n")[2].startswith("\n" + PROSE)
    assert make_card(made["plain"], card, licence=Licence("apache-2.0")) == card
    old = yaml.safe_load(block + "\n") or {}
    new = yaml.safe_load(card[4:].partition("\n---\n")[0] + "\n")
    for key, value in old.items():
        if key == "tags" and isinstance(value, list) and "&t" not in block:
            assert new[key][: len(value)] == value
            assert set(new[key]) == {*value, "lora", "loratool", "peft"}
            assert len(new[key]) == len({*new[key]})
        else:
            assert repr(new[key]) == repr(value)
    assert {"base_model", "library_name", "pipeline_tag", "tags", "license"} <= new.keys()
    for line in block.splitlines():
        if "[" not in line and "{" not in line:
            assert line in card.splitlines()


@pytest.mark.parametrize(
    "block",
    ["a: [", "a: b: c", "- a\n- b", "just words", "1: 2", "a: !!python/object:os.system x",
     "license: mit\n\ttags: x", "ignore_metadata_errors: 1"],
)  # fmt: skip
def test_broken_yaml(made: dict[str, Path], block: str) -> None:
    """A clear error that names the file and the reason, and not a card that hides it."""
    with pytest.raises(FileError, match=r"README\.md: .* not valid \(.+\)") as caught:
        make_card(made["plain"], f"---\n{block}\n---\n\n{PROSE}")
    assert "\n" not in caught.value.message


def test_a_card_of_yaml_only_gets_a_title(made: dict[str, Path]) -> None:
    """As the Hub makes it with a new repository."""
    for end in ("", "\n", "\n\n"):
        text = make_card(made["plain"], f"---\nlicense: mit\n---{end}", repo_id="me/mine")
        assert "\n# mine\n" in text
        assert data(text)["license"] == "mit"
        assert make_card(made["plain"], text, repo_id="me/mine") == text
    for nothing in ("", "\n", " \n\n"):
        assert "\n# mine\n" in make_card(made["plain"], nothing, repo_id="me/mine")


def test_licences(made: dict[str, Path]) -> None:
    """The base's licence goes where the card has none, whole or not at all."""
    own = Licence("other", "llama3.1", "https://example.org/licence")
    wanted = {"license": "other", "license_name": "llama3.1",
              "license_link": "https://example.org/licence"}  # fmt: skip
    assert data(make_card(made["plain"], None, licence=own)).items() >= wanted.items()
    kept = data(make_card(made["plain"], "---\nlicense: mit\n---\n", licence=own))
    assert kept["license"] == "mit"
    assert not kept.keys() & {"license_name", "license_link"}
    assert "license" not in data(make_card(made["plain"], None, licence=Licence(None)))
    assert "license" not in data(make_card(made["plain"], None))


KEYS = st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True).filter(
    lambda key: key not in ("ignore_metadata_errors", "self", "model_index", "eval_results")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    keys=st.none()
    | st.dictionaries(KEYS | st.sampled_from(["tags", "license"]), VALUES, max_size=4),
    body=st.text(max_size=60),
    flow=st.sampled_from([True, False, None]),
)
def test_whatever_a_person_wrote_stays(
    adapter: Path, keys: dict[str, Any] | None, body: str, flow: bool | None
) -> None:
    """Any keys and any text: all of it is there again, and again the same the second time."""
    block = yaml.safe_dump(keys, default_flow_style=flow, allow_unicode=True) if keys else ""
    text = f"---\n{block}---\n\n{body}" if keys else body
    try:
        card = make_card(adapter, text, licence=Licence("mit"))
    except FileError:
        # Only a text that looks like broken YAML itself, or a list of tags that is none.
        assert keys is None or not isinstance(keys.get("tags"), list | None)
        return
    assert make_card(adapter, card, licence=Licence("mit")) == card
    assert body in card or not body.strip()
    own = yaml.safe_load(re.split(r"(?m)^---\s*$", card, maxsplit=2)[1])
    # Not the values that were generated: PyYAML does not give each of them back.
    for key, value in (yaml.safe_load(block) or {}).items():
        if key == "tags" and isinstance(value, list):
            assert own[key][: len(value)] == value
        else:
            assert own[key] == value


# --- odd names -----------------------------------------------------------------------------------


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize(
    "name", ["a|b", "`tick`", "two\nlines", "``` ", "<b>", "_x_", "# x", "a'b\"c", f"{END}", "é ☃"]
)
def test_odd_names(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Names stay in their cells and on their lines, and the code is still Python."""
    change = {"adapters.0": {"name": name}, "options": {name: name}, "versions": {name: name}}
    source = changed_record(made["combined"], tmp_path / "changed", change)
    text = make_card(source, None)
    assert make_card(source, text) == text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for found in tables:
        assert len({cells(line) for line in found.splitlines()}) == 1
    assert len(blocks(text, "python")) == 1
    if "/" not in name:
        folder = shutil.copytree(made["plain"], tmp_path / name)
        text = make_card(folder, None)
        assert make_card(folder, text) == text
        (found,) = blocks(text, "python")
        compile(found, "card", "exec")
        assert text.count("\n# ") == 1 + found.count("\n# ")


def test_odd_modules(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "odd", pair("model.a|b.0.q`x", 12, 10), {})
    text = make_card(folder, None)
    (row,) = [line for line in text.splitlines() if "linear" in line]
    assert row.startswith("| ``model.a\\|b.0.q`x`` |")
    assert cells(row) == 7


def test_words() -> None:
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"
    assert [percent(x) for x in (1, 0.9999, 0.986, 0.5, 0.01234, 0)] == [
        "100%", "<100%", "98.6%", "50%", "1.2%", "0%"]  # fmt: skip
    assert [span(x) for x in ([], [8.0], [8, 4, 6], [None, 2])] == ["unknown", "8", "4–8", "2"]


def test_a_card_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; "
         "import loratool.publishing.cards.document as c; "
         "assert 'huggingface_hub' not in sys.modules; "
         "c.make_card(Path('fixtures/adapter'), None); "
         "print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
