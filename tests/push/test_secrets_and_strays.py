"""Secrets, strays of a training run and litter do not go up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers.hub import HubServer
from helpers.hub_runs import refused
from helpers.pushing import SHARD, WEIGHTS, add, as_json, assert_read_only, push, states, text_of

TOKEN = "hf_" + "aBcDeFgHiJ" * 4

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


def test_links_out_of_the_folder_stay_here(
    hub: HubServer, home: Path, adapter: Path, repo: str, tmp_path: Path
) -> None:
    """Left out and named; what the adapter needs is refused, and --include pushes it."""
    (tmp_path / "outside.txt").write_text("words from elsewhere")
    for name in ("notes.md", "README.md"):
        os.symlink("../outside.txt", adapter / name)
    report = as_json(hub, home, adapter, repo)
    assert report["left_out"] == ["README.md", "notes.md"]
    assert [w["code"] for w in report["warnings"]][:2] == ["link-left-out"] * 2
    assert not [data for data in hub.files(repo).values() if b"elsewhere" in data]
    os.symlink("../outside.txt", adapter / "tokenizer.json")
    found = refused(hub, home, "push", adapter, repo)
    assert "tokenizer.json" in found["message"]
    as_json(hub, home, adapter, repo, "--include", "tokenizer.json")
    assert hub.files(repo)["tokenizer.json"] == b"words from elsewhere"
