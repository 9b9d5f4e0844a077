"""How a card says where a model comes from: the command, the inputs, what was lost."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers.cards import (
    ADAPTER,
    BASE,
    HTML,
    ID,
    TUNED,
    blocks,
    changed_record,
    data,
    logits,
    run_code,
)

import loratool
from loratool.cli.options import CONTEXT
from loratool.errors import FileError
from loratool.publishing.cards.document import base_of, make_card
from loratool.words import percent

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("merged", "loratool merge base adapter --dtype float32 -o OUT"),
        ("two", "loratool merge base adapter html --weight 0.7 --weight -0.4 --dtype bfloat16 "
                "--reversible -o OUT"),
        ("combined", "loratool combine adapter html --weight 0.7 --weight 0.5 --rank 8 "
                     "--dtype float32 -o OUT"),
        ("resized", "loratool resize adapter --energy 0.95 --patterns --dtype float32 -o OUT"),
        ("extracted", "loratool extract base tuned --rank 8 --save norms --embeddings "
                      "--dtype float32 -o OUT"),
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
    command = getattr(import_module(f"loratool.cli.{name}"), f"{name}_command")
    line = shlex.split(blocks(make_card(made[kind], None), "sh")[0])
    assert line[:2] == ["loratool", name]
    taken = command.make_context(name, line[2:], **CONTEXT).params
    assert taken["output"] == "OUT"
    for key, value in record["options"].items():
        if key == "weights" and name != "resize":
            given = [-w for w in value] if name == "unmerge" else value
            typed = [weight.document for weight in taken[key]]
            assert typed == given or (not typed and set(given) == {1.0})
        elif (name, key) != ("unmerge", "allow_unmatched"):
            found = taken[key]
            assert (list(found) if isinstance(found, tuple) else found) == value


def test_every_option_of_extract_is_repeated(tmp_path: Path) -> None:
    """Lists, flags and sizes too."""
    loratool.extract(
        BASE, TUNED, tmp_path / "ex", budget="90kB", max_rank=6, uniform=True, seed=3,
        exclude=["mlp.*", "lm_head"], skip=["norms"], save=["embed_tokens"],
        embeddings=True,
    )  # fmt: skip
    assert blocks(make_card(tmp_path / "ex", None), "sh")[0] == (
        "loratool extract base tuned --budget 90000 --max-rank 6 --uniform --exclude 'mlp.*' "
        "--exclude lm_head --skip norms --save embed_tokens --embeddings --seed 3 -o OUT\n"
    )


def test_a_merge_of_a_merge(made: dict[str, Path], tmp_path: Path) -> None:
    """What the base held already is in the table of inputs."""
    loratool.merge(made["two"], HTML, tmp_path / "three", weights=[0.1], again=True)
    text = make_card(tmp_path / "three", None)
    assert "`two` with an adapter merged into its weights: `html`" in text
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
    assert "with 2 adapters merged into its weights: `adapter` and `html`" in two
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
    loratool.extract(BASE, TUNED, tmp_path / "some", rank=4)
    text = make_card(tmp_path / "some", None)
    assert "left out of the adapter: 10, `model.embed_tokens.weight`, " in text
    assert "`model.layers.{0-3}.input_layernorm.weight`" in text
    more = {"result": {"held": 0.75, "error": 0.5, "verified": 0.501}}
    text = make_card(changed_record(made["extracted"], tmp_path / "more", more), None)
    assert "keeps 75% of ‖tuned − base‖², a relative error of 50%" in text
    assert "Read back and measured: 50.1%." in text


def test_nothing_cut(tmp_path: Path) -> None:
    """Where nothing was lost the card says so, and names no module that lost most."""
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
    """The record names the base where the config has none that others can load."""
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
        for key in record.keys() - {"files", "schema_version"}:
            (folder / "loratool.json").write_text(json.dumps({**record, key: odd}))
            text = make_card(folder, None)
            assert make_card(folder, text) == text
    (folder / "loratool.json").write_text("{")
    with pytest.raises(FileError, match=r"loratool\.json"):
        make_card(folder, None)
