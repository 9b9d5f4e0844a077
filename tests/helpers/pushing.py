"""Pushes, what they say, and what is on the Hub after them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from helpers.adapters import pair, write_adapter
from helpers.hub import HubServer
from helpers.hub_runs import Done, run

LOGIN = "hf auth login"

WEIGHTS = "adapter_model.safetensors"
SHARD = "model-00002-of-00003.safetensors"


def lora(folder: Path, seed: int = 0) -> Path:
    """A small adapter that knows its base."""
    settings = {"base_model_name_or_path": "loratool-fixtures/base", "target_modules": ["q_proj"]}
    module = "model.layers.0.self_attn.q_proj"
    return write_adapter(folder, pair(module, 128, 64, seed=seed), settings)


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


def metadata(card: str) -> dict[str, Any]:
    """The YAML of a card, which the library must read and write back."""
    found: dict[str, Any] = ModelCard(card).data.to_dict()
    assert ModelCardData(**found).to_dict() == found
    return found


PERSON = (
    "---\n# mine\ntags: [mine]\nlicense: mit\n---\n\n# My adapter\r\n\nWords  of a person. \n\n"
)
