"""Runs of the command line, and of snippets, against the Hub of `helpers.hub`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers import forked
from helpers.adapters import Q, pair, write_adapter
from helpers.hub import HubServer
from helpers.places import FIXTURES

TASKS = FIXTURES / "tasks"

#: What lies in repositories beside what a merge needs.
CLUTTER = {
    "README.md": b"---\nlicense: mit\n---\nA model.\n",
    ".gitattributes": b"*.safetensors filter=lfs\n",
    "pytorch_model.bin": b"the same once more" * 20_000,
    "onnx/model.onnx": b"and once more" * 20_000,
    "checkpoint-10/model.safetensors": b"half way" * 20_000,
    "checkpoint-10/optimizer.pt": b"its optimizer" * 20_000,
}
SIDE = {"chat_template.jinja": b"{{ messages }}\n", "LICENSE": b"MIT\n", "extra/words.txt": b"a\n"}


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(
    hub: HubServer,
    home: Path,
    *arguments: object,
    token: str | None = "hf_writer",
    code: int | None = 0,
    cwd: Path | None = None,
    **settings: str,
) -> Done:
    """Run the command line against `hub`. Whatever happens there is no traceback, no token and no
    place of the cache in what it says."""
    # The client's pauses are its own matter; how long they are is in groundwork/.
    env, cwd = {**hub.environment(home, token), "HURRY": "10", **settings}, cwd or home
    cwd.mkdir(parents=True, exist_ok=True)
    return _checked(Done(*forked.run(list(map(str, arguments)), env, cwd)), env, code)


def call(hub: HubServer, home: Path, snippet: str, *arguments: str) -> Any:
    """Run a snippet that has loratool; gives what it printed as JSON."""
    prelude = "import json, sys\nimport loratool\n"
    env = hub.environment(home)
    home.mkdir(parents=True, exist_ok=True)
    done = forked.run_snippet(prelude + snippet, arguments, env, home)
    return _checked(Done(*done), env, 0).json


def _checked(done: Done, env: dict[str, str], code: int | None) -> Done:
    text = done.out + done.err
    assert code in (None, done.code), text
    for never in ("Traceback", env.get("HF_TOKEN", "Traceback"), "models--", "Signature="):
        assert never not in text, text
    return done


def refused(
    hub: HubServer, home: Path, *arguments: object, code: int = 1, **options: Any
) -> dict[str, str]:
    """Run the command line, which fails; gives the one JSON object it says on stderr."""
    done = run(hub, home, *arguments, "--json", code=code, **options)
    assert done.out == ""
    found: dict[str, str] = json.loads(done.err)
    assert found.keys() == {"error", "message", "hint"}
    assert found["hint"]
    return found


def paths(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in paths(folder).items()}


def assert_same_output(found: Path, expected: Path) -> dict[str, Any]:
    """Equal byte for byte, but for repositories and commits in loratool.json, which is returned."""
    one, other = contents(found), contents(expected)
    record = json.loads(one.pop("loratool.json"))
    assert _without_origin(record) == json.loads(other.pop("loratool.json"))
    assert one == other
    return record


def _without_origin(value: Any) -> Any:
    if isinstance(value, dict):
        gone = ("repo", "revision", "path") if "repo" in value else ()
        return {k: _without_origin(v) for k, v in value.items() if k not in gone}
    return [_without_origin(v) for v in value] if isinstance(value, list) else value


def downloads(hub: HubServer, match: str = "") -> list[str]:
    """The large files that were asked for as a whole, by name."""
    whole = [r for r in hub.requests(f"/cdn/{match}", "GET") if r.range is None]
    return sorted(r.path.partition("filename=")[2].partition("&")[0] for r in whole)


def sparse(path: Path, tensors: dict[str, list[int]], dtype: str, length: int = 0) -> Path:
    """A file of zeros that takes no room, with a header of `length` bytes or as long as it is."""
    header, position, bits = {}, 0, {"F16": 2, "F32": 4}[dtype]
    for name, shape in tensors.items():
        end = position + bits * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    assert not length or len(text) <= length
    text = text.ljust(length)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, len(text) + 8 + position)
    return path


def factors(names: Sequence[str], out: int, width: int, rank: int) -> dict[str, list[int]]:
    """Shapes of the factors of linear modules."""
    root = "base_model.model."
    found = {}
    for name in names:
        found[f"{root}{name}.lora_A.weight"] = [rank, width]
        found[f"{root}{name}.lora_B.weight"] = [out, rank]
    return found


def config(**settings: Any) -> str:
    return json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings})


def small(folder: Path, alpha: int = 8, seed: int = 0) -> Path:
    """An adapter for a base that is not there: 12×10."""
    return write_adapter(folder, pair(Q, 12, 10, 4, seed), {"lora_alpha": alpha})
