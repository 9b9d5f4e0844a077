"""push and card: what goes up, once and whole; what must not; and what a broken line does to it.

The command line runs in processes of its own against the Hub of `hub.py`; the client is real.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, pair, write_adapter
from hub import HubServer, User
from huggingface_hub import ModelCard, ModelCardData
from test_hub_read import Done, call, contents, refused, run

LOGIN = "hf auth login"
BEGIN, END = "<!-- loratool:begin -->", "<!-- loratool:end -->"
WEIGHTS = "adapter_model.safetensors"
SHARD = "model-00002-of-00003.safetensors"
TOKEN = "hf_" + "aBcDeFgHiJ" * 4

PULL = """
from huggingface_hub import snapshot_download
print(json.dumps(snapshot_download(sys.argv[1], local_dir=sys.argv[2], revision=sys.argv[3])))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        card = b"---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n"
        server.add("loratool-fixtures/base", {"README.md": card})
        server.users["hf_member"] = User("member", ("org",), writes=False)
        yield server


@pytest.fixture(scope="module")
def output(stock: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged model of three shards, as loratool wrote it."""
    place = tmp_path_factory.mktemp("output")
    command = ["merge", FIXTURES / "base", FIXTURES / "adapter", "-o", place / "merged"]
    run(stock, place / "home", *command)
    return place / "merged"


@pytest.fixture
def merged(output: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(output, tmp_path / "merged"))


def lora(folder: Path, seed: int = 0) -> Path:
    """A small adapter that knows its base."""
    settings = {"base_model_name_or_path": "loratool-fixtures/base", "target_modules": ["q_proj"]}
    module = "model.layers.0.self_attn.q_proj"
    return write_adapter(folder, pair(module, 128, 64, seed=seed), settings)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return lora(tmp_path / "adapter")


def add(folder: Path, name: str, data: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def push(hub: HubServer, home: Path, path: Path, repo: str, *options: object, **more: Any) -> Done:
    return run(hub, home, "push", path, repo, *options, **more)


def as_json(hub: HubServer, home: Path, path: Path, repo: str, *options: object) -> Any:
    return push(hub, home, path, repo, "--json", *options).json


def text_of(error: dict[str, str]) -> str:
    return " ".join(f"{error['message']} {error['hint']}".split())


def states(report: Any) -> dict[str, str]:
    return {f["name"]: f["state"] for f in report["files"]}


def own_commits(hub: HubServer, repo: str, revision: str = "main") -> list[Any]:
    """The commits on a branch but the one that made the repository."""
    return hub.commits(repo, revision)[:-1]


def assert_read_only(hub: HubServer) -> None:
    """Nothing but questions were sent."""
    assert {r.method for r in hub.log} <= {"GET", "HEAD"}


def assert_no_commit(hub: HubServer, repo: str) -> None:
    assert not hub.exists(repo) or own_commits(hub, repo) == []


def outside(card: str) -> str:
    """A card without the section that loratool writes."""
    return re.sub(f"{BEGIN}.*{END}", "", card, flags=re.DOTALL)


def metadata(card: str) -> dict[str, Any]:
    """The YAML of a card, which the library must read and write back."""
    found: dict[str, Any] = ModelCard(card).data.to_dict()
    assert ModelCardData(**found).to_dict() == found
    return found


# --- what goes up -------------------------------------------------------------------------------


def test_an_adapter_comes_back_as_it_was(
    hub: HubServer, home: Path, adapter: Path, repo: str, tmp_path: Path
) -> None:
    """All files, nested ones and those of odd names too, in one commit; the folder is untouched."""
    add(adapter, "tokenizer.json", '{"model": {"vocab": {"a": 0}}}')
    add(adapter, "samples/deep/er/one.txt", "a\r\nb\n")
    add(adapter, "samples/empty.txt", "")
    add(adapter, "samples/[1] what? 100% *.txt", "odd")
    add(adapter, "samples/ümlaut ★.md", "more")
    add(adapter, "samples/weights.npz", os.urandom(50_000))
    before = contents(adapter)
    done = push(hub, home, adapter, repo)
    assert contents(adapter) == before
    assert done.out.splitlines()[-1].strip() == f"{hub.url}/{repo}"
    (commit,) = own_commits(hub, repo)
    assert set(commit.changed) == before.keys() | {"README.md"}
    assert commit.id in done.out
    call(hub, tmp_path / "other", PULL, repo, str(tmp_path / "pulled"), "main")
    pulled = contents(tmp_path / "pulled")
    pulled = {n: data for n, data in pulled.items() if not n.startswith(".cache/")}
    assert pulled.keys() == before.keys() | {"README.md", ".gitattributes"}
    assert {name: pulled[name] for name in before} == before


def test_a_merged_model_comes_back_and_is_not_sent_twice(
    hub: HubServer, home: Path, merged: Path, repo: str, tmp_path: Path
) -> None:
    """Three shards, index, tokenizer, record: the same bytes. Again: no upload and no commit."""
    add(merged, "1_Pooling/config.json", "{}")
    report = as_json(hub, home, merged, repo)
    assert report["kind"] == "model"
    before = contents(merged)
    call(hub, tmp_path / "other", PULL, repo, str(tmp_path / "pulled"), report["commit"])
    pulled = contents(tmp_path / "pulled")
    assert {name: pulled[name] for name in before} == before
    assert len(own_commits(hub, repo)) == 1
    hub.clear()
    again = as_json(hub, home, merged, repo)
    assert_read_only(hub)
    assert len(own_commits(hub, repo)) == 1
    assert set(states(again).values()) == {"there"}
    assert again["bytes_to_upload"] == 0
    assert again["commit"] == report["commit"] == hub.commits(repo)[0].id
    assert (again["created"], again["card"], again["url"]) == (False, "kept", f"{hub.url}/{repo}")
    said = push(hub, home, merged, repo).out
    assert "none" in said
    assert f"{hub.url}/{repo}" in said


def test_only_what_changed_goes_up(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """One file's bytes; other files here and there stay out of it."""
    large = add(adapter, "large.npz", os.urandom(300_000))
    add(adapter, "notes.txt", "one")
    push(hub, home, adapter, repo)
    hub.add(repo, {"theirs.txt": "of somebody else"})
    hub.clear()
    (adapter / "notes.txt").write_text("two")
    lora(adapter, seed=1)
    report = as_json(hub, home, adapter, repo)
    size = (adapter / WEIGHTS).stat().st_size
    assert states(report)[WEIGHTS] == states(report)["notes.txt"] == "changed"
    assert states(report)["large.npz"] == states(report)["README.md"] == "there"
    assert report["bytes_to_upload"] == size + 3
    assert hub.received("/upload/") == size
    assert hub.received() < size + 10_000
    commit = hub.commits(repo)[0]
    assert commit.changed == (WEIGHTS, "notes.txt")
    assert hub.files(repo)["theirs.txt"] == b"of somebody else"
    assert hub.files(repo)["large.npz"] == large.read_bytes()


def test_renamed_content_is_not_sent_again(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """The Hub knows content by its hash, under whatever name."""
    add(adapter, "a.npz", os.urandom(50_000))
    push(hub, home, adapter, repo)
    hub.clear()
    (adapter / "a.npz").rename(adapter / "b.npz")
    push(hub, home, adapter, repo)
    assert hub.requests("/upload/") == []
    assert hub.files(repo)["b.npz"] == (adapter / "b.npz").read_bytes()


def test_a_file_in_parts(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A large file goes up in parts; a part that broke off and one that met a 500 go up again."""
    data = add(adapter, "large.npz", os.urandom(250_000)).read_bytes()
    hub.chunk_size = 100_000
    try:
        hub.cut("/upload/.*/2[?]", after=60_000)
        hub.fail("/upload/.*/3[?]", 500)
        push(hub, home, adapter, repo)
    finally:
        hub.chunk_size = 1 << 24
    assert hub.files(repo)["large.npz"] == data
    assert len(own_commits(hub, repo)) == 1


# --- dry runs -----------------------------------------------------------------------------------


def test_dry_run_tells_new_changed_and_there(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """By hash, with the right sums, without writing; also for a reader without a login."""
    add(adapter, "same.txt", "same")
    add(adapter, "other.txt", "here")
    hub.add(
        repo,
        {"same.txt": "same", "other.txt": "there", WEIGHTS: (adapter / WEIGHTS).read_bytes()},
    )
    head = hub.commits(repo)[0].id
    report = as_json(hub, home, adapter, repo, "--dry-run")
    card = next(f for f in report["files"] if f["name"] == "README.md")
    assert states(report) == {
        "adapter_config.json": "new", "README.md": "new", "other.txt": "changed",
        "same.txt": "there", WEIGHTS: "there",
    }  # fmt: skip
    config = (adapter / "adapter_config.json").stat().st_size
    assert report["bytes_to_upload"] == config + 4 + card["bytes"]
    assert report["bytes_there"] == 4 + (adapter / WEIGHTS).stat().st_size
    assert report["dry_run"] is True
    assert report["commit"] == ""
    shown = push(hub, home, adapter, repo, "--dry-run", token=None).out
    assert "nothing was uploaded" in shown
    for name, word in (("other.txt", "another version"), ("same.txt", "the same")):
        assert re.search(rf"^\s*{name}.*{word}", shown, re.MULTILINE)
    assert_read_only(hub)
    assert hub.commits(repo)[0].id == head
    assert not (adapter / "README.md").exists()


def test_dry_run_of_a_repository_that_is_not_there(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """Everything is new, and the repository is not made. Without a login the Hub does not tell."""
    report = as_json(hub, home, adapter, repo, "--dry-run", "--private")
    assert set(states(report).values()) == {"new"}
    assert report["created"] is report["private"] is True
    assert report["bytes_there"] == 0
    shown = push(hub, home, adapter, repo, "--dry-run").out
    assert "to be created" in shown
    done = push(hub, home, adapter, repo, "--dry-run", token=None, code=None)
    assert done.code == 0 or (done.code == 4 and LOGIN in done.err)
    assert_read_only(hub)
    assert not hub.exists(repo)


def test_dry_run_of_a_new_branch_knows_what_main_has(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """A new branch starts from main, so main's files are there."""
    push(hub, home, adapter, repo)
    hub.clear()
    report = as_json(hub, home, adapter, repo, "--revision", "next", "--dry-run")
    assert_read_only(hub)
    assert set(states(report).values()) == {"there"}
    assert report["bytes_to_upload"] == 0


# --- options ------------------------------------------------------------------------------------


def test_private(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """Created private and staying so; never taken for private where it is public."""
    report = as_json(hub, home, adapter, repo, "--private")
    assert hub.is_private(repo)
    assert report["private"] is report["created"] is True
    assert as_json(hub, home, adapter, repo)["private"] is True
    assert "private" in push(hub, home, adapter, repo, "--private").out
    hub.add(f"{repo}-open", {"a.txt": "a"})
    for options in ([], ["--dry-run"]):
        hub.clear()
        found = refused(hub, home, "push", adapter, f"{repo}-open", "--private", *options, code=2)
        assert "public" in found["message"]
        assert_read_only(hub)


def test_branches(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A new branch and one that is there take the commit; main stays."""
    hub.add(repo, {"a.txt": "a"})
    main = hub.branches(repo)["main"]
    for branch in ("next", "a/b"):
        done = push(hub, home, adapter, repo, "--revision", branch)
        assert hub.branches(repo)["main"] == main
        assert hub.files(repo, branch)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
        assert hub.files(repo, branch)["a.txt"] == b"a"
        assert done.out.splitlines()[-1].strip().startswith(f"{hub.url}/{repo}/tree/")
    add(adapter, "b.txt", "b")
    report = as_json(hub, home, adapter, repo, "--revision", "next")
    assert hub.commits(repo, "next")[0].changed == ("b.txt",)
    assert report["revision"] == "next"
    assert report["commit"] == hub.branches(repo)["next"]
    assert set(hub.branches(repo)) == {"main", "next", "a/b"}


def test_a_pull_request(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """main is untouched, the URL is that of the request, and whoever can read can open one."""
    hub.add(repo, {"a.txt": "a", "README.md": "Words of a person.\n"})
    main = hub.branches(repo)["main"]
    for number, token in ((1, "hf_writer"), (2, "hf_reader")):
        done = push(hub, home, adapter, repo, "--create-pr", "--json", token=token).json
        url = f"{hub.url}/{repo}/discussions/{number}"
        assert done["url"] == done["pull_request"] == url
        assert hub.branches(repo)["main"] == main
        files = hub.files(repo, f"refs/pr/{number}")
        assert files[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
        assert b"Words of a person.\n" in files["README.md"]
        assert len(hub.commits(repo, f"refs/pr/{number}")) == 2
    add(adapter, "b.txt", "b")
    push(hub, home, adapter, repo, "--revision", "refs/pr/1")
    assert hub.commits(repo, "refs/pr/1")[0].changed == ("b.txt",)
    assert hub.branches(repo)["main"] == main
    found = refused(hub, home, "push", adapter, repo, "--create-pr", "--revision", "x", code=2)
    assert "--create-pr" in found["message"]
    assert "x" not in hub.branches(repo)


def test_a_pull_request_to_a_new_repository(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """The repository is made, main holds nothing of ours, the request all of it."""
    done = push(hub, home, adapter, repo, "--create-pr")
    assert own_commits(hub, repo) == []
    assert f"{hub.url}/{repo}/discussions/1" in done.out
    assert WEIGHTS in hub.files(repo, "refs/pr/1")


def test_messages(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """As given, or one that names the tool."""
    push(hub, home, adapter, repo, "-m", "Första ★ utkastet")
    add(adapter, "b.txt", "b")
    push(hub, home, adapter, repo)
    new, old = own_commits(hub, repo)
    assert old.message == "Första ★ utkastet"
    assert "loratool" in new.message


def test_the_document(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """--json is one document, alone on stdout, with all that scripts need."""
    add(adapter, ".DS_Store", "x")
    done = push(hub, home, adapter, repo, "--json")
    assert done.err == ""
    report = done.json
    assert report["schema_version"] == 1
    wanted = {
        "source": str(adapter), "repo": repo, "revision": "main", "kind": "adapter",
        "dry_run": False, "private": False, "created": True, "card": "made",
        "left_out": [".DS_Store"], "url": f"{hub.url}/{repo}", "pull_request": "",
        "commit": hub.commits(repo)[0].id, "warnings": [],
    }  # fmt: skip
    assert {key: report[key] for key in wanted} == wanted
    sizes = {name: len(data) for name, data in hub.files(repo).items()}
    assert all(f["bytes"] == sizes[f["name"]] for f in report["files"])
    assert push(hub, home, adapter, repo, "-q").err == ""


def test_a_mixture_of_models_is_refused(
    hub: HubServer, home: Path, merged: Path, repo: str
) -> None:
    """A model.safetensors of before would be loaded in place of the shards."""
    hub.add(repo, {"model.safetensors": b"old weights"})
    found = refused(hub, home, "push", merged, repo)
    assert "model.safetensors" in found["message"]
    assert len(hub.commits(repo)) == 1


def test_a_record_of_what_was_there_before_is_told(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """loratool.json of the weights that this push replaces would be a lie about these."""
    hub.add(repo, {"loratool.json": "{}"})
    report = as_json(hub, home, adapter, repo)
    assert "stale-record" in [w["code"] for w in report["warnings"]]


def test_weights_that_stay_there_are_told(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """They do no harm, but somebody should know."""
    hub.add(repo, {"other.safetensors": b"old weights"})
    report = as_json(hub, home, adapter, repo)
    assert "other-weights" in [w["code"] for w in report["warnings"]]
    assert hub.files(repo)["other.safetensors"] == b"old weights"


# --- logins -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "token", "options", "words"),
    [
        ("new", None, [], [LOGIN]),
        ("new", "hf_wrong", [], ["token", LOGIN]),
        ("new", "hf_wrong", ["--dry-run"], ["token", LOGIN]),
        ("new", "hf_member", [], ["write", LOGIN]),
        ("open", "hf_member", [], ["write token", LOGIN]),
        ("open", "hf_reader", [], ["write", LOGIN]),
    ],
)
def test_logins_that_do_not_do(
    hub: HubServer, home: Path, adapter: Path, repo: str, place: str, token: str | None,
    options: list[str], words: list[str],
) -> None:  # fmt: skip
    """None, not known, or not for writing: exit 4, what to run, and nothing there has changed."""
    if place == "open":
        hub.add(repo, {"a.txt": "a"})
    before = hub.branches(repo) if hub.exists(repo) else None
    found = refused(hub, home, "push", adapter, repo, *options, token=token, code=4)
    assert found["error"] == "hub-login"
    for word in words:
        assert word in text_of(found)
    assert hub.requests("/upload/") == []
    assert (hub.branches(repo) if hub.exists(repo) else None) == before


def test_other_peoples_repositories(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A private one is as if it were not there; of a gated one it is said that it is gated."""
    hub.add(repo, {"a.txt": "a", "README.md": "Mine.\n"}, private=True)
    refused(hub, home, "push", adapter, repo, token="hf_reader", code=4)
    assert len(hub.commits(repo)) == 1
    gated = f"{repo}-gated"
    hub.add(gated, {"a.txt": "a", "README.md": "Mine.\n"}, gated=True)
    done = push(hub, home, adapter, gated, "--create-pr", token="hf_reader", code=None)
    assert done.code in (1, 4)
    assert "gated" in done.err
    assert gated in done.err
    push(hub, home, adapter, gated)  # who may read it may complete its card


def test_the_stored_login_is_used(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """What `hf auth login` wrote does; storage and other hosts never see it."""
    home.mkdir()
    (home / "token").write_text("hf_writer\n")
    done = push(hub, home, adapter, repo, token=None)
    assert "hf_writer" not in done.out + done.err
    assert len(own_commits(hub, repo)) == 1
    assert {r.token for r in hub.requests("^/upload/")} == {None}


# --- what must not go up ------------------------------------------------------------------------

SECRETS = {
    "by-name": {
        ".env": "A=1\n",
        "conf/.env.production": "A=1\n",
        "id_rsa": "x",
        "keys/id_ed25519": "x",
        "server.pem": "x",
    },
    "by-name-too": {
        "tls.key": "x",
        ".netrc": "machine x",
        "token": "abc",
        "hf_token.txt": "abc",
        "credentials.json": "{}",
    },
    "by-content": {
        "settings.json": json.dumps({"hub_token": TOKEN}),
        "train.py": f"login('{TOKEN}')\n",
        "run.ipynb": json.dumps({"cells": [f"hf auth login --token {TOKEN}"]}),
        "notes.md": "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n",
        "tokenizer_config.json": json.dumps({"auth_token": TOKEN}),
    },
    "of-others": {
        "env.yaml": "key: AKIA" + "ABCDEFGH12345678" + "\n",
        "wandb.txt": "ghp_" + "a1B2" * 9 + "\n",
    },
    "conf": {"train.conf": f"token = {TOKEN}\n", "hparams.properties": f"hub={TOKEN}\n"},
    "api-key": {"api_key.txt": "abc"},
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_refused(
    hub: HubServer, home: Path, adapter: Path, repo: str, kind: str
) -> None:
    """By their names and by what is in them; the key itself is not shown."""
    for name, data in SECRETS[kind].items():
        add(adapter, name, data)
    found = refused(hub, home, "push", adapter, repo)
    assert found["error"] == "not-pushed"
    assert [name for name in SECRETS[kind] if f"- {name} " not in found["message"]] == []
    assert "--exclude" in found["hint"]
    assert "--include" in found["hint"]
    assert TOKEN[:12] not in text_of(found)
    assert_read_only(hub)
    assert not hub.exists(repo)


def test_secrets_can_be_named(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """Each is left out or taken by name or glob; a name that fits nothing is a mistake."""
    add(adapter, "conf/.env", "A=1\n")
    add(adapter, "cert.pem", "public")
    refused(hub, home, "push", adapter, repo, "--include", "*.pem")
    refused(hub, home, "push", adapter, repo, "--exclude", "*.pem")
    found = refused(hub, home, "push", adapter, repo, "--exclude", "*.pme", code=2)
    assert "*.pme" in found["message"]
    assert not hub.exists(repo)
    report = as_json(hub, home, adapter, repo, "--include", "*.pem", "--exclude", ".env")
    assert report["left_out"] == ["conf/.env"]
    assert hub.files(repo)["cert.pem"] == b"public"
    assert not [name for name in hub.files(repo) if name.endswith(".env")]


def test_no_false_alarms(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """What tokenizers, trainers and authors leave beside adapters goes up."""
    words = {f"hf_{'tok' * 12}{i}": i for i in range(3)}
    keys = {"AKIA" + "ABCDEFGH12345678": 7, "sk-" + "a" * 40: 8}
    names = {
        "tokenizer.json": json.dumps({"model": {"vocab": words | keys}}),
        "vocab.json": json.dumps(words | keys),
        "merges.txt": "\n".join(words),
        "vocab.txt": "token\nsecret\n",
        "added_tokens.json": json.dumps({"<|token|>": 1}),
        "special_tokens_map.json": json.dumps({"eos_token": "</s>"}),
        "tokenizer_config.json": json.dumps({"add_bos_token": True, "token": "<s>"}),
        "tokenizer.model": os.urandom(20_000),
        "trainer_state.json": json.dumps({"num_input_tokens_seen": 1, "log_history": []}),
        "tokens.md": "Use your HF_TOKEN, or hf_xxx, or sk-...\n",
        "chat_template.jinja": "{{ bos_token }}",
        "LICENSE": "MIT\n",
        "keyboard.json": "{}",
        "environment.yml": "name: x\n",
        "pem_results.csv": "a,b\n",
    }
    for name, data in names.items():
        add(adapter, name, data)
    report = as_json(hub, home, adapter, repo, "--dry-run")
    assert names.keys() <= states(report).keys()
    assert report["left_out"] == []


STRAYS = {
    "states": ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"],
    "folders": [
        "checkpoint-500/adapter_config.json",
        f"checkpoint-500/{WEIGHTS}",
        "global_step500/mp_rank_00_model_states.pt",
    ],
    "pickles": ["adapter_model.bin", "old.pth"],
    "model": ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"],
}


@pytest.mark.parametrize("kind", STRAYS)
def test_strays_are_refused(
    hub: HubServer, home: Path, adapter: Path, merged: Path, repo: str, kind: str
) -> None:
    """States of a training run, its checkpoints, and pickles beside safetensors."""
    folder = merged if kind == "model" else adapter
    for name in STRAYS[kind]:
        add(folder, name, b"\x80\x02stray")
    found = refused(hub, home, "push", folder, repo)
    assert found["error"] == "not-pushed"
    assert [name for name in STRAYS[kind] if f"- {name} " not in found["message"]] == []
    assert "--exclude" in found["hint"]
    assert_read_only(hub)


def test_strays_can_be_named(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """What the hint says works: left out by folder or glob, or pushed all the same."""
    for name in ("checkpoint-5/optimizer.pt", f"checkpoint-5/{WEIGHTS}", "training_args.bin"):
        add(adapter, name, "x")
    found = refused(hub, home, "push", adapter, repo)
    assert found["message"].count("\n") >= 3
    options = ["--exclude", "checkpoint-*", "--include", "training_args.bin"]
    report = as_json(hub, home, adapter, repo, *options)
    assert len(report["left_out"]) == 2
    assert hub.files(repo)["training_args.bin"] == b"x"
    assert not [n for n in hub.files(repo) if n.startswith("checkpoint")]


def test_litter_stays_here(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """What tools and systems leave behind is not worth a question."""
    litter = [
        ".git/config", ".git/objects/ab/cd", ".cache/huggingface/x.lock", "__pycache__/a.pyc",
        ".DS_Store", "sub/.DS_Store", ".ipynb_checkpoints/a.ipynb", "notes.md~", ".notes.md.swp",
        f".README.md.loratool-{os.getpid()}",
    ]  # fmt: skip
    for name in litter:
        add(adapter, name, f"[remote] {TOKEN}")
    add(adapter, f".merged.loratool-partial-x/{SHARD}", "half a shard of a run that was killed")
    os.symlink(adapter.parent, adapter / "loop")
    push(hub, home, adapter, repo)
    ours = {WEIGHTS, "adapter_config.json", "README.md", ".gitattributes"}
    assert hub.files(repo).keys() == ours


def test_a_broken_link_is_an_error(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A file that cannot be read is named; nothing is left out in silence."""
    os.symlink(adapter / "gone", adapter / "notes.txt")
    found = refused(hub, home, "push", adapter, repo)
    assert "notes.txt" in found["message"]
    assert not hub.exists(repo)


def _truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 10)


def _flip(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[-100] ^= 1
    (folder / SHARD).write_bytes(data)


def _index_names_more(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.self_attn.q_proj.weight"] = SHARD
    path.write_text(json.dumps(index))


INCOMPLETE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, SHARD),
    "empty": (lambda f: os.truncate(f / SHARD, 0), SHARD),
    "missing": (lambda f: (f / SHARD).unlink(), SHARD),
    "no-index": (lambda f: (f / "model.safetensors.index.json").unlink(), "index"),
    "flipped": (_flip, SHARD),
    "index": (_index_names_more, "layers.9"),
    "record": (lambda f: add(f, "loratool.json", '{"half'), "loratool.json"),
}


@pytest.mark.parametrize("kind", INCOMPLETE)
def test_incomplete_models_are_refused(
    hub: HubServer, home: Path, merged: Path, repo: str, kind: str
) -> None:
    """Whatever is missing, short or not what was written: named, before anything is sent."""
    damage, word = INCOMPLETE[kind]
    damage(merged)
    found = refused(hub, home, "push", merged, repo)
    assert word in found["message"]
    assert_read_only(hub)
    assert not hub.exists(repo)


def test_what_a_killed_run_left_is_refused(
    hub: HubServer, home: Path, merged: Path, repo: str
) -> None:
    """A staging directory may look whole; it is not. Also from within and with a slash."""
    partial = merged.rename(merged.with_name(".merged.loratool-partial-ab12"))
    found = refused(hub, home, "push", f"{partial}/", repo)
    assert found["error"] == "not-pushed"
    refused(hub, home, "push", ".", repo, cwd=partial)
    refused(hub, home, "push", merged.with_name(partial.name), repo, "--dry-run")
    assert not hub.exists(repo)


def _nan(folder: Path) -> None:
    tensors = pair("model.layers.0.self_attn.q_proj", 128, 64)
    next(iter(tensors.values()))[1, 2] = np.nan
    config = json.loads((folder / "adapter_config.json").read_text())
    write_adapter(folder, tensors, config)


def _no_b(folder: Path) -> None:
    tensors = pair("model.layers.0.self_attn.q_proj", 128, 64)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_adapter(folder, {n: t for n, t in tensors.items() if "lora_A" in n}, config)


def _wrong_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))


BAD_ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (_nan, "NaN"),
    "no-b": (_no_b, "lora_A"),
    "rank": (_wrong_rank, ""),
    "no-config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
    "no-weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 5000), WEIGHTS),
}


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_adapters_that_cannot_be_used_are_refused(
    hub: HubServer, home: Path, adapter: Path, repo: str, kind: str
) -> None:
    """What inspect says cannot be merged, and what no one could load, is not published."""
    damage, word = BAD_ADAPTERS[kind]
    damage(adapter)
    found = refused(hub, home, "push", adapter, repo)
    assert word in text_of(found)
    assert_read_only(hub)
    assert not hub.exists(repo)


def test_a_record_of_other_weights(hub: HubServer, home: Path, repo: str, tmp_path: Path) -> None:
    """An adapter that loratool made and somebody changed is not what its record says."""
    lora(tmp_path / "one")
    run(hub, home, "resize", tmp_path / "one", "--rank", "2", "-o", tmp_path / "two")
    data = bytearray((tmp_path / "two" / WEIGHTS).read_bytes())
    data[-4] ^= 1
    (tmp_path / "two" / WEIGHTS).write_bytes(data)
    found = refused(hub, home, "push", tmp_path / "two", repo)
    assert WEIGHTS in found["message"]
    assert "loratool.json" in found["message"]
    assert not hub.exists(repo)


def test_what_is_needed_cannot_be_left_out(
    hub: HubServer, home: Path, merged: Path, adapter: Path, repo: str
) -> None:
    """--exclude does not make half a model."""
    for folder, pattern in (
        (merged, "model-00001*"),
        (merged, "*.json"),
        (adapter, "adapter_config.json"),
        (adapter, "*.safetensors"),
    ):
        refused(hub, home, "push", folder, repo, "--exclude", pattern, code=2)
    assert not hub.exists(repo)


@pytest.mark.parametrize(
    ("path", "place", "code", "word"),
    [
        ("{parent}/adaptr", "org/x", 1, "Did you mean"),
        ("{parent}/nowhere/at/all", "org/x", 1, "no such directory"),
        ("{adapter}/adapter_model.safetensors", "org/x", 1, "{adapter}"),
        ("{parent}/empty", "org/x", 1, "empty"),
        ("", "org/x", 2, "empty"),
        ("{adapter}", "", 2, "org/name"),
        ("{adapter}", "name", 2, "org/name"),
        ("{adapter}", "org/", 2, "org/name"),
        ("{adapter}", "org/a/b", 2, "org/name"),
        ("{adapter}", "https://example.com/org/name", 1, "org/name"),
        ("{adapter}", "../name", 2, "org/name"),
        ("{adapter}", "org/a b", 2, "org/name"),
        ("{adapter}", "org/x@next", 2, "--revision next"),
        ("{adapter}", "org/a--b", None, "org/"),
        ("{adapter}", "org/" + "a" * 120, None, "org/"),
    ],
)
def test_mistakes(
    hub: HubServer, home: Path, adapter: Path, path: str, place: str, code: int | None, word: str
) -> None:
    """One clear error, nothing sent, nothing made."""
    (adapter.parent / "empty").mkdir()
    places = {"adapter": adapter, "parent": adapter.parent}
    given = path.format(**places)
    done = run(hub, home, "push", given, place, "--json", code=code, cwd=adapter)
    assert done.code in (1, 2)
    found = json.loads(done.err)
    assert word.format(**places) in text_of(found)
    assert found["hint"]
    assert_read_only(hub)
    assert not hub.exists(place)


# --- model cards --------------------------------------------------------------------------------

PERSON = (
    "---\n# mine\ntags: [mine]\nlicense: mit\n---\n\n# My adapter\r\n\nWords  of a person. \n\n"
)


def test_a_card_is_made(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """With the base, its licence, and the name under which it can be loaded."""
    push(hub, home, adapter, repo)
    text = hub.files(repo)["README.md"].decode()
    found = metadata(text)
    assert found["base_model"] == "loratool-fixtures/base"
    assert found["base_model_relation"] == "adapter"
    assert found["license"] == "llama3.1"
    # The base's file is not in this repository: the link leads to it.
    assert found["license_link"] == f"{hub.url}/loratool-fixtures/base/blob/main/LICENSE"
    assert found["library_name"] == "peft"
    assert f'"{repo}"' in text
    assert str(adapter.parent) not in text


@pytest.mark.parametrize("where", ["here", "there", "branch", "pull-request"])
def test_what_a_person_wrote_stays(
    hub: HubServer, home: Path, adapter: Path, repo: str, where: str
) -> None:
    """Here or on the Hub: byte for byte outside of the section between the markers."""
    if where == "here":
        add(adapter, "README.md", PERSON.encode())
    else:
        hub.add(repo, {"README.md": PERSON.encode()})
    options = {"branch": ["--revision", "next"], "pull-request": ["--create-pr"]}.get(where, [])
    report = as_json(hub, home, adapter, repo, *options)
    assert report["card"] == "completed"
    revision = {"branch": "next", "pull-request": "refs/pr/1"}.get(where, "main")
    card = hub.files(repo, revision)["README.md"].decode()
    body = PERSON.partition("license: mit\n")[2].partition("---\n")[2]
    assert body.rstrip("\n") in card
    assert card.startswith("---\n# mine\n")
    assert "license: mit\n" in card
    assert set(metadata(card)["tags"]) == {"mine", "lora", "loratool", "peft"}
    assert card.count(BEGIN) == 1
    if where == "here":
        assert (adapter / "README.md").read_bytes() == PERSON.encode()


def test_a_card_that_names_a_place_on_this_machine(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """As PEFT writes it for a base that was loaded from a folder: told before anything goes up."""
    add(adapter, "README.md", b"---\nbase_model: /home/me/llama\n---\nWords.\n")
    found = refused(hub, home, "push", adapter, repo)
    assert "'/home/me/llama'" in found["message"]
    assert not hub.exists(repo)


def test_a_config_that_names_a_place_on_this_machine(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """It goes up, because PEFT can be given a base; --base puts its id into the card."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": "/home/me/llama"}))
    done = push(hub, home, adapter, repo, "--base", "org/llama")
    assert "local-base" in done.err
    assert metadata(hub.files(repo)["README.md"].decode())["base_model"] == "org/llama"
    assert refused(hub, home, "push", adapter, repo, "--base", "/home/me/llama", code=2)


def test_two_cards_are_not_chosen_between(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """Edited on the Hub, and another one here (as PEFT writes): neither is lost unasked."""
    add(adapter, "README.md", PERSON.encode())
    push(hub, home, adapter, repo)
    first = hub.files(repo)["README.md"]
    assert as_json(hub, home, adapter, repo)["card"] == "kept"  # the same words, completed
    hub.add(repo, {"README.md": first + b"\nWritten on the website.\n"})
    for options in ([], ["--dry-run"]):
        found = refused(hub, home, "push", adapter, repo, *options)
        assert "--include README.md" in found["hint"]
        assert "--exclude README.md" in found["hint"]
    push(hub, home, adapter, repo, "--exclude", "README.md")
    assert b"Written on the website." in hub.files(repo)["README.md"]
    push(hub, home, adapter, repo, "--include", "README.md")
    assert hub.files(repo)["README.md"] == first


def test_a_section_is_renewed_and_no_more(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """After an edit on the Hub the next push changes what is between the markers alone."""
    push(hub, home, adapter, repo)
    made = hub.files(repo)["README.md"].decode()
    edited = made.replace("---\n\n", "---\nWritten on the Hub.\n\n", 1) + "\nAnd below.\n"
    hub.add(repo, {"README.md": edited})
    lora(adapter, seed=2)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    push(hub, home, adapter, repo)
    card = hub.files(repo)["README.md"].decode()
    assert outside(card) == outside(edited)
    assert "Written on the Hub." in card


@pytest.mark.parametrize("where", ["here", "there"])
@pytest.mark.parametrize("kind", ["yaml", "latin-1"])
def test_cards_that_cannot_be_read(
    hub: HubServer, home: Path, adapter: Path, repo: str, where: str, kind: str
) -> None:
    """Invalid YAML and other encodings are one clear error, not a loss and not a traceback."""
    data = b"---\na: [\n---\nWords.\n" if kind == "yaml" else "Adaptér\n".encode("latin-1")
    if where == "here":
        add(adapter, "README.md", data)
    else:
        hub.add(repo, {"README.md": data})
    found = refused(hub, home, "push", adapter, repo)
    assert "README.md" in found["message"]
    assert hub.requests("/upload/|/commit/") == []


def test_the_card_command(hub: HubServer, home: Path, adapter: Path) -> None:
    """Printed with --dry-run, then written, then the same; and it validates."""
    shown = run(hub, home, "card", adapter, "--dry-run").out
    assert not (adapter / "README.md").exists()
    report = run(hub, home, "card", adapter, "--json").json
    text = (adapter / "README.md").read_text(encoding="utf-8")
    assert report["text"] == text
    assert report["schema_version"] == 1
    assert report["card"] == "made"
    assert shown.strip() == text.strip()
    assert metadata(text)["license"] == "llama3.1"
    stamp = (adapter / "README.md").stat().st_mtime_ns
    again = run(hub, home, "card", adapter)
    assert "complete as it was" in again.out
    assert (adapter / "README.md").read_text(encoding="utf-8") == text
    assert (adapter / "README.md").stat().st_mtime_ns == stamp
    assert sorted(contents(adapter)) == ["README.md", "adapter_config.json", WEIGHTS]
    assert_read_only(hub)


def test_the_card_command_keeps_words(hub: HubServer, home: Path, adapter: Path) -> None:
    """A person's card is completed in its own line breaks; a broken one is left alone."""
    readme = add(adapter, "README.md", PERSON.encode())
    run(hub, home, "card", adapter, "--repo", "org/name")
    card = readme.read_bytes().decode()
    assert "# My adapter\r\n\nWords  of a person. \n" in card
    assert '"org/name"' in card
    for data in (b"---\na: [\n---\nWords.\n", "Adaptér\n".encode("latin-1")):
        readme.write_bytes(data)
        found = refused(hub, home, "card", adapter)
        assert "README.md" in found["message"]
        assert readme.read_bytes() == data
    assert sorted(contents(adapter)) == ["README.md", "adapter_config.json", WEIGHTS]


@pytest.mark.parametrize(
    ("path", "options", "code"),
    [
        ("{adapter}x", [], 1),
        ("{adapter}/adapter_config.json", [], 1),
        ("{empty}", [], 1),
        ("", [], 2),
        ("{adapter}", ["--repo", "name"], 2),
    ],
)
def test_card_mistakes(
    hub: HubServer, home: Path, adapter: Path, path: str, options: list[str], code: int
) -> None:
    """One clear error; no README.md where there is no model."""
    empty = adapter.parent / "empty"
    empty.mkdir()
    given = path.format(adapter=adapter, empty=empty)
    refused(hub, home, "card", given, *options, code=code, cwd=adapter)
    assert not list(adapter.parent.rglob("README.md"))


def test_a_licence_that_is_not_known_is_told(
    hub: HubServer, home: Path, tmp_path: Path, repo: str
) -> None:
    """A card without a licence is a warning, not a guess."""
    folder = lora(tmp_path / "a")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/not-there"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    done = push(hub, home, folder, repo)
    assert "licence-unknown" in done.err
    assert "license" not in metadata(hub.files(repo)["README.md"].decode())


# --- faults -------------------------------------------------------------------------------------

_WAIT = {"Retry-After": "1"}
ONCE: dict[str, Callable[[HubServer], None]] = {
    "cut": lambda hub: hub.cut("/upload/", after=1_000),
    "cut-reset": lambda hub: hub.cut("/upload/", after=2_000, reset=True),
    "cut-answer": lambda hub: hub.cut("/upload/", after=0, method="PUT", side="response"),
    "500-put": lambda hub: hub.fail("/upload/", 500),
    "500-batch": lambda hub: hub.fail("/objects/batch", 500),
    "503-preupload": lambda hub: hub.fail("/preupload/", 503),
    "429": lambda hub: [
        hub.fail(where, 429, headers=_WAIT) for where in ("/preupload/", "/upload/")
    ] and None,
}  # fmt: skip


@pytest.mark.parametrize("fault", ONCE)
def test_a_fault_that_passes(
    hub: HubServer, home: Path, adapter: Path, repo: str, fault: str
) -> None:
    """Retried in silence: the right bytes, one commit, nothing said of it."""
    ONCE[fault](hub)
    done = push(hub, home, adapter, repo, "-q")
    assert done.err == ""
    assert hub.files(repo)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    assert len(own_commits(hub, repo)) == 1


def test_an_upload_that_never_comes_through(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """One clear error after the retries, and no commit."""
    hub.cut("/upload/", after=1_000, times=99)
    done = push(hub, home, adapter, repo, code=1)
    assert done.out == ""
    assert done.err.count("error") == 1
    assert len(done.err.splitlines()) <= 6
    assert_no_commit(hub, repo)


def test_a_commit_that_fails(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """No half commit; what went up is not sent again by the next run."""
    hub.fail("/commit/", 500)
    found = refused(hub, home, "push", adapter, repo)
    assert found["error"] == "hub"
    assert "500" in found["message"]
    assert_no_commit(hub, repo)
    assert len(hub.requests("/upload/", "PUT")) == 1
    hub.clear()
    push(hub, home, adapter, repo)
    assert hub.requests("/upload/", "PUT") == []
    assert hub.files(repo)[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    assert len(own_commits(hub, repo)) == 1


def test_a_commit_asked_to_wait(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """429 with Retry-After is waited for or told: there is a whole commit, or none."""
    hub.fail("/commit/", 429, headers=_WAIT)
    done = push(hub, home, adapter, repo, code=None)
    if done.code == 0:
        assert len(own_commits(hub, repo)) == 1
    else:
        assert "429" in done.err
        assert_no_commit(hub, repo)


@pytest.mark.parametrize("there", ["new", "branch"])
def test_an_answer_that_is_lost(
    hub: HubServer, home: Path, adapter: Path, repo: str, there: str
) -> None:
    """The commit was made and only its answer got lost: that is success, and no second commit."""
    hub.cut("/commit/", after=0, method="POST", side="response")
    options = ["--revision", "next"] if there == "branch" else []
    report = as_json(hub, home, adapter, repo, *options)
    branch = "next" if there == "branch" else "main"
    assert len(own_commits(hub, repo, branch)) == 1
    assert report["commit"] == hub.branches(repo)[branch]


def test_no_answer_after_the_commit(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """What is done is done: a question that fails after the commit does not make it a failure."""
    hub.on(
        "/commit/",
        lambda: hub.fail("/api/models/[^/]*/[^/]*(/revision.*)?$", 500, times=2, method="GET"),
    )
    push(hub, home, adapter, repo)
    assert len(own_commits(hub, repo)) == 1


def test_a_fault_of_the_first_question(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """Asked again, or one clear error; nothing is taken for missing that is not."""
    hub.add(repo, {"README.md": "Words of a person.\n"})
    for where in (f"{repo}$", "/revision/main"):
        hub.fail(where, 500)
        done = push(hub, home, adapter, repo, "--json", code=None)
        assert done.code == 0 or json.loads(done.err)["error"] == "hub"
    push(hub, home, adapter, repo)
    assert b"Words of a person.\n" in hub.files(repo)["README.md"]


def test_a_lost_answer_of_nothing(hub: HubServer, home: Path, adapter: Path, repo: str) -> None:
    """A connection that broke before the commit was read is not taken for success."""
    hub.cut("/commit/", after=10, method="POST")
    found = refused(hub, home, "push", adapter, repo)
    assert found["error"] == "hub"
    assert_no_commit(hub, repo)


def test_nobody_answers(hub: HubServer, home: Path, adapter: Path) -> None:
    """A Hub that is down, and HF_HUB_OFFLINE: one clear error."""
    found = refused(hub, home, "push", adapter, "org/x", HF_ENDPOINT="http://127.0.0.1:9")
    assert "127.0.0.1:9" in found["message"]
    found = refused(hub, home, "push", adapter, "org/x", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in text_of(found)


@pytest.mark.parametrize(
    ("name", "moment", "how"),
    [
        (WEIGHTS, "/upload/", "rewritten"),
        ("notes.txt", "/upload/", "rewritten"),
        ("notes.txt", "/upload/", "removed"),
        ("notes.txt", "/api/repos/create", "rewritten"),
    ],
)
def test_a_file_that_changes_meanwhile(
    hub: HubServer, home: Path, adapter: Path, repo: str, name: str, moment: str, how: str
) -> None:
    """Refused, whenever it happens: no commit of a mixture."""
    path = adapter / name
    if not path.exists():
        add(adapter, name, "before")

    def change() -> None:
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[::-1])

    hub.on(moment, change)
    found = refused(hub, home, "push", adapter, repo)
    assert name in found["message"]
    assert_no_commit(hub, repo)


def test_a_file_that_changes_too_late_to_be_seen(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """What is committed is what was looked at, and searched for secrets."""
    path = adapter / "notes.txt"
    add(adapter, "notes.txt", "before")
    hub.on("/api/validate-yaml", lambda: path.write_text("after!"))
    push(hub, home, adapter, repo)
    assert hub.files(repo)["notes.txt"] == b"before"


@pytest.mark.parametrize("moment", ["/upload/", "/commit/"])
def test_somebody_else_commits_meanwhile(
    hub: HubServer, home: Path, adapter: Path, repo: str, moment: str
) -> None:
    """Their commit stays, ours is refused; run again, both are there."""
    hub.add(repo, {"README.md": "First.\n"})
    hub.on(moment, lambda: hub.add(repo, {"README.md": "Second.\n", "theirs.txt": "theirs"}))
    refused(hub, home, "push", adapter, repo)
    assert hub.commits(repo)[0].changed == ("README.md", "theirs.txt")
    assert len(hub.commits(repo)) == 2
    push(hub, home, adapter, repo)
    files = hub.files(repo)
    assert files["theirs.txt"] == b"theirs"
    assert b"Second.\n" in files["README.md"]
    assert WEIGHTS in files


def test_the_repository_is_made_by_somebody_else_meanwhile(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """Looked at before it was there, and public by now: nothing private is put into it."""
    hub.on("/api/repos/create", lambda: hub.add(repo, {"README.md": "Words of a person.\n"}))
    done = push(hub, home, adapter, repo, "--private", code=None)
    assert done.code != 0
    assert hub.files(repo) == {"README.md": b"Words of a person.\n"}


def test_a_card_that_appears_meanwhile_is_kept(
    hub: HubServer, home: Path, adapter: Path, repo: str
) -> None:
    """The same without --private: a card that was not there when it was looked for."""
    hub.on("/api/repos/create", lambda: hub.add(repo, {"README.md": "Words of a person.\n"}))
    push(hub, home, adapter, repo, code=None)
    assert b"Words of a person.\n" in hub.files(repo)["README.md"]


# --- very many files ----------------------------------------------------------------------------


@pytest.fixture
def many(adapter: Path) -> Path:
    for i in range(260):
        add(adapter, f"samples/{i // 100}/{i:03}.txt", f"sample {i}")
    return adapter


def test_very_many_files(hub: HubServer, home: Path, many: Path, repo: str) -> None:
    """More than the Hub takes in one commit: all of them arrive, and none twice."""
    add(many, ".DS_Store", "x")
    report = as_json(hub, home, many, repo)
    found = hub.files(repo)
    local = contents(many)
    assert local.pop(".DS_Store")
    assert {name: found[name] for name in local} == local
    assert found.keys() == local.keys() | {"README.md", ".gitattributes"}
    assert report["commit"] == hub.commits(repo)[0].id
    hub.clear()
    assert as_json(hub, home, many, repo)["bytes_to_upload"] == 0
    assert_read_only(hub)


def test_very_many_files_in_a_pull_request(
    hub: HubServer, home: Path, many: Path, repo: str
) -> None:
    """One request holds them all, with the card, and its URL is told."""
    hub.add(repo, {"a.txt": "a"})
    report = as_json(hub, home, many, repo, "--create-pr")
    assert len(hub.commits(repo)) == 1
    assert set(hub.branches(repo)) == {"main", "refs/pr/1"}
    assert contents(many).keys() | {"README.md"} <= hub.files(repo, "refs/pr/1").keys()
    assert report["pull_request"] == report["url"] == f"{hub.url}/{repo}/discussions/1"


def test_one_of_very_many_files_changes_meanwhile(
    hub: HubServer, home: Path, many: Path, repo: str
) -> None:
    """What is said of commits is true."""
    path = many / WEIGHTS
    before = path.read_bytes()
    hub.on("/upload/", lambda: path.write_bytes(before[::-1]))
    done = push(hub, home, many, repo, code=None)
    if done.code == 0:  # it was read before it changed
        assert hub.files(repo)[WEIGHTS] == before
    else:
        assert_no_commit(hub, repo)
