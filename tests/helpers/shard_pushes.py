"""Merges from Hub to Hub, and the traffic and files that they cause."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.hub import HubServer
from helpers.hub_runs import Done, call, run

COUNT = 7
SHARDS = [f"model-{i + 1:05}-of-{COUNT:05}.safetensors" for i in range(COUNT)]
#: Less than the smallest shard, more than any other file of a model or an adapter.
LARGE = 120_000

FETCH = """
from huggingface_hub import snapshot_download
from huggingface_hub.utils import disable_progress_bars
disable_progress_bars()
snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:])
print("null")
"""


def split(source: Path, folder: Path) -> Path:
    """The base of the fixtures in seven shards of about one size."""
    from safetensors.torch import load_file, save_file

    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors.update(load_file(path))
    folder.mkdir(parents=True)
    parts: list[dict[str, Any]] = [{} for _ in SHARDS]
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        min(parts, key=lambda part: sum(t.nbytes for t in part.values()))[name] = tensor
    index: dict[str, str] = {}
    for shard, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The base\n")
    assert min((folder / shard).stat().st_size for shard in SHARDS) > LARGE
    return folder


INPUTS = ("merge", "org/base", "org/adapter")


def through(hub: HubServer, home: Path, repo: str, *options: object, **more: Any) -> Done:
    """Merge from Hub to Hub."""
    # `python -m` looks for modules in its directory, which must not be HF_HOME.
    more.setdefault("cwd", home.parent)
    return run(hub, home, *INPUTS, "--push", repo, "--no-keep", *options, **more)


def cached(hub: HubServer, home: Path, name: str, *patterns: str) -> Path:
    """Have files of a repository in the cache; gives their folder there."""
    call(hub, home, FETCH, name, *patterns)
    folder = f"models--{name.replace('/', '--')}"
    return home / "hub" / folder / "snapshots" / hub.commits(name)[0].id


def own_commits(hub: HubServer, repo: str) -> list[Any]:
    """The commits on main but the one that made the repository."""
    return hub.commits(repo)[:-1]


def staging(hub: HubServer, repo: str) -> list[str]:
    return [name for name in hub.branches(repo) if name != "main"]


def puts(hub: HubServer) -> int:
    """Uploads of shards."""
    return len([r for r in hub.requests("^/upload/", "PUT") if r.received > LARGE])


def fetched(hub: HubServer) -> list[str]:
    """Shards of the base that were downloaded as a whole."""
    whole = [r for r in hub.requests("/cdn/org/base", "GET") if r.sent > LARGE]
    return sorted(r.path.partition("filename=")[2].partition("&")[0] for r in whole)


def heavy(folder: Path) -> list[Path]:
    """Files that hold the data of a shard: not links, not holes."""
    found = []
    for path in folder.rglob("*"):
        try:
            state = path.lstat()
        except FileNotFoundError:  # it went while we looked
            continue
        if path.is_file() and not path.is_symlink() and state.st_blocks * 512 > LARGE:
            found.append(path)
    return found


def weights_in(home: Path) -> list[str]:
    """What is left of base and result; the adapter stays in the cache as ever."""
    return sorted(p.name for p in heavy(home) if "models--org--adapter" not in str(p))


def assert_pushed(hub: HubServer, repo: str, local: dict[str, bytes]) -> None:
    """The whole model, with a card, in one commit; and no branch but main."""
    files = hub.files(repo)
    assert files.keys() == local.keys() | {"README.md", ".gitattributes"}
    assert [name for name in local if files[name] != local[name]] == []
    (commit,) = own_commits(hub, repo)
    assert set(commit.changed) == local.keys() | {"README.md"}
    assert staging(hub, repo) == []
