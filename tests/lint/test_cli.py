"""lint on the command line: exit codes, JSON, mistakes, names, and the lines of other verbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.adapters import pair, write_adapter
from helpers.cli import run_cli
from helpers.linting import ADAPTERS, on_two_layers
from helpers.places import FIXTURES

import loratool
from loratool.cli.lint import lint_command
from loratool.publishing.manifest import pack
from loratool.serving.programs import PROGRAMS

ADAPTER, BASE = FIXTURES / "adapter", FIXTURES / "base"


@pytest.fixture
def rooted(tmp_path: Path) -> Path:
    return ADAPTERS["rsLoRA"](tmp_path / "rooted")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 0),
        (["--for", "vllm"], 0),
        (["--for", "vllm,lorax", "--for", "exllama"], 0),
        (["--for", "sglang"], 3),
        (["--for", "vllm, llamacpp"], 3),
        (["--base", str(BASE)], 3),  # it does not fit that base
    ],
)
def test_the_exit_code_is_3_where_what_was_asked_for_fails(
    rooted: Path, options: list[str], code: int
) -> None:
    """Only programs that are named count, and merge where a base is."""
    done = run_cli("lint", rooted, *options)
    assert (done.exit_code, done.stderr) == (code, "")
    assert "vLLM" in done.stdout or "sglang" in options


def test_a_merge_into_the_base_is_planned() -> None:
    """What merge would refuse is what lint says, and what it takes passes."""
    done = run_cli("lint", ADAPTER, "--base", BASE, "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document["adapters"][0]["merge"]["outcome"] == "loads"
    refused = run_cli("lint", FIXTURES / "adapter", "--base", FIXTURES / "dialects/bases/gpt2",
                      "--json")  # fmt: skip
    assert refused.exit_code == 3
    said = json.loads(refused.stdout)["adapters"][0]["merge"]
    assert "do not fit the base" in said["reasons"][0]["why"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([str(ADAPTER), "--for", "vlm"], 2, "Did you mean vllm"),
        ([str(ADAPTER), "--for", "vllm,llama.cpp"], 2, "Did you mean llamacpp"),
        ([str(ADAPTER), "--for", ""], 2, "Unknown program"),
        ([str(ADAPTER), "--max-rank", "0"], 2, "--max-rank"),
        ([str(ADAPTER), "--together"], 2, "several adapters"),
        ([f"{ADAPTER}x"], 1, "Did you mean"),
        ([str(BASE)], 1, "this is a base model"),
        ([], 2, "ADAPTER"),
    ],
)
def test_mistakes_get_one_clear_error(arguments: list[str], code: int, words: str) -> None:
    """A mistake is one error in words on stderr with its exit code."""
    done = run_cli("lint", *arguments)
    assert done.exit_code == code
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stderr.lower().count("error:") == 1


def test_of_several_the_others_are_judged(tmp_path: Path) -> None:
    """An adapter that cannot be read is one error, exit code 1, and the rest is shown."""
    done = run_cli("lint", ADAPTER, tmp_path / "nothing", "--for", "vllm")
    assert done.exit_code == 1
    assert done.stderr.lower().count("error:") == 1
    assert "vLLM" in done.stdout
    done = run_cli("lint", ADAPTER, tmp_path / "nothing", "--json")
    first, second = json.loads(done.stdout)["adapters"]
    assert first["programs"][0]["program"] == "vllm"
    assert second["error"] == "bad-file"
    assert second["source"] == str(tmp_path / "nothing")
    assert done.stderr == ""


def test_json_has_rules_with_their_sources(rooted: Path) -> None:
    """Each reason says where its rule is read, and whether it was seen in a run."""
    done = run_cli("lint", rooted, "--for", "llamacpp", "--json")
    document = json.loads(done.stdout)
    assert (document["schema_version"], document["passes"]) == (1, False)
    (verdict,) = document["adapters"][0]["programs"]
    assert verdict["outcome"] == "differs"
    assert verdict["mend"].startswith("loratool resize")
    (reason,) = verdict["reasons"]
    assert reason["source"].startswith("https://")
    assert reason["seen"] == "run"
    assert document == loratool.lint(rooted, programs="llamacpp").to_dict()


def test_every_rule_has_a_source() -> None:
    """No rule of any program stands without the place where it is read."""
    for program in PROGRAMS.values():
        assert program.source
        assert program.version
        assert all(rule.source and rule.short for rule in program.rules)


def test_help_and_document_name_every_program() -> None:
    """--for's help and docs/serving.md have exactly the programs that there are."""
    text = (FIXTURES.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    option = next(p for p in lint_command.params if p.name == "programs")
    said = str(getattr(option, "help", ""))
    for name, program in PROGRAMS.items():
        assert name in said
        assert f"| `{name}` |" in text
        assert program.version in text


def test_hostile_names_are_shown_printable(tmp_path: Path) -> None:
    """Names of modules and configs do nothing to a terminal, and forge no line."""
    evil = "q\x1b]0;pwned\x07[bold]\u202e"
    tensors = pair(f"model.layers.0.self_attn.{evil}", 12, 10)
    folder = write_adapter(
        tmp_path / "a\x1b[31m", tensors,
        {"use_rslora": True, "base_model_name_or_path": f"x/{evil}", "init_lora_weights": evil,
         "target_modules": [evil]},
    )  # fmt: skip
    done = run_cli("lint", folder, "--for", "vllm,sglang,lorax", COLUMNS="80")
    assert done.exit_code == 3
    assert "\x1b" not in done.stdout + done.stderr
    assert r"\x1b" in done.stdout
    assert "\u202e" not in done.stdout


def test_tables_fit_80_columns(tmp_path: Path) -> None:
    """No line of a table is wider than the terminal; commands, to be pasted, are one line."""
    folders = [ADAPTERS[name](tmp_path / name.replace(" ", "-")) for name in ("DoRA", "gap")]
    done = run_cli("lint", *folders, "--together", COLUMNS="80", cwd=tmp_path)
    lines = done.stdout.splitlines()
    commands = [line for line in lines if line.startswith("loratool ")]
    assert max(len(line) for line in lines if line not in commands) <= 80
    assert any(line.endswith("DoRA-merged") for line in commands)


def test_inspect_ends_with_a_line_of_it(rooted: Path) -> None:
    """inspect says which programs load it and which compute something else; --json has all."""
    done = run_cli("inspect", rooted, COLUMNS="200")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("serving")]
    assert "vLLM, LoRAX, TGI and 2 more: load" in line
    assert "SGLang, llama.cpp, Ollama: another result (wrong scale)" in line
    report = loratool.inspect(rooted)
    assert report.serving["llamacpp"] == "differs: wrong scale"
    assert report.to_dict()["serving"] == report.serving


def test_cards_have_a_line_of_it(tmp_path: Path) -> None:
    """A model card names the programs."""
    folder = on_two_layers(tmp_path / "a", use_rslora=True)
    text = loratool.card(folder, base="org/base", dry_run=True).text
    assert "vLLM, LoRAX, TGI, exllamav3, PEFT hotswap: load" in text
    assert "llama.cpp" in text


def test_push_has_a_line_of_it(tmp_path: Path) -> None:
    """What goes up is known by the programs that load it."""
    folder = on_two_layers(tmp_path / "a", use_rslora=True, base_model_name_or_path="org/base")
    serving = pack(folder).serving
    assert (serving["vllm"], serving["sglang"]) == ("loads", "differs: wrong scale")


def test_a_page_has_the_answer(tmp_path: Path, rooted: Path) -> None:
    """--html writes the same answer as a page, with the commands whole."""
    page = tmp_path / "page.html"
    assert run_cli("lint", ADAPTER, rooted, "--together", "--html", page).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "llama.cpp" in text
    assert "--rank 4" in text


def test_a_report_shows_itself(rooted: Path) -> None:
    """In Python the report says its first facts, and an adapter that is not there is an error."""
    assert "rooted" in repr(loratool.lint(rooted))
    report = loratool.lint([rooted, rooted / "nothing"], programs="vllm")
    assert len(report.unread) == 1
    assert not report.passes
    with pytest.raises(loratool.LoraToolError):
        loratool.lint(rooted / "nothing")
