"""Hub ids where paths are taken: the right bytes, from the right commit, and no more than needed.

The command line runs in processes of its own against the Hub of `hub.py`; the client is real.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from conftest import FIXTURES, pair, write_adapter
from hub import HubServer

TASKS = FIXTURES / "tasks"
Q = "model.layers.0.self_attn.q_proj"

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
    env, cwd = {**hub.environment(home, token), **settings}, cwd or home
    cwd.mkdir(parents=True, exist_ok=True)
    return _checked(Done(*forked.run(list(map(str, arguments)), env, cwd)), env, code)


def call(hub: HubServer, home: Path, snippet: str, *arguments: str) -> Any:
    """Run a snippet that has loratool; gives what it printed as JSON."""
    prelude = "import json, sys\nimport loratool\n"
    command = [sys.executable, "-c", prelude + snippet, *arguments]
    env = hub.environment(home)
    home.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=120)
    return _checked(Done(done.returncode, done.stdout, done.stderr), env, 0).json


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


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` and `adapter` with the clutter that repositories have, as folders on the disk."""
    place = tmp_path_factory.mktemp("places")
    for name in ("base", "adapter", "tuned"):
        shutil.copytree(FIXTURES / name, place / name)
    shutil.copytree(TASKS / "html", place / "html")
    shutil.copytree(TASKS / "tables", place / "tables")
    for name, data in (CLUTTER | SIDE).items():
        (place / "base" / name).parent.mkdir(exist_ok=True)
        (place / "base" / name).write_bytes(data)
    for name in ("README.md", "checkpoint-10/optimizer.pt", "onnx/model.onnx"):
        (place / "adapter" / name).parent.mkdir(exist_ok=True)
        (place / "adapter" / name).write_bytes(CLUTTER[name])
    (place / "adapter" / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    return place


@pytest.fixture(scope="module")
def stock(places: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A Hub that has all of them."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        for name in ("base", "adapter", "tuned", "html", "tables"):
            server.add(f"org/{name}", dict(paths(places / name)))
        yield server


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that may have downloaded anything before."""
    return tmp_path_factory.mktemp("warm") / "home"


# --- merging from the Hub -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(
    stock: HubServer, places: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str], int]:
    """A merge from paths, one from ids, the names that this downloaded, and all its bytes."""
    place = tmp_path_factory.mktemp("merged")
    local, remote, home = place / "local", place / "remote", place / "home"
    stock.clear()
    run(stock, home, "merge", places / "base", places / "adapter", "-o", local, "--reversible")
    assert stock.log == []
    done = run(stock, home, "merge", "org/base", "org/adapter", "-o", remote, "--reversible")
    assert done.err == ""
    return local, remote, downloads(stock), stock.sent()


def test_a_merge_from_ids_equals_one_from_paths(
    merged: tuple[Path, Path, list[str], int], stock: HubServer
) -> None:
    """Shards, index, tokenizer, side files and undo file; the record adds repository and commit."""
    local, remote, _, _ = merged
    record = assert_same_output(remote, local)
    for entry, name in ((record["base"], "base"), (record["adapters"][0], "adapter")):
        assert (entry["repo"], entry["revision"]) == (
            f"org/{name}", stock.branches(f"org/{name}")["main"],
        )  # fmt: skip
    files = contents(remote)
    assert files["chat_template.jinja"] == SIDE["chat_template.jinja"]
    assert files["extra/words.txt"] == SIDE["extra/words.txt"]
    assert "special_tokens_map.json" in files  # the adapter's
    assert not [name for name in files if "checkpoint" in name or name.endswith((".md", ".onnx"))]


def test_only_what_is_needed_is_downloaded(
    merged: tuple[Path, Path, list[str], int], places: Path
) -> None:
    """Every shard once; no other formats, no training runs, no model card."""
    _, remote, names, sent = merged
    shards = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    assert names == ["adapter_model.safetensors", *shards]
    cache = paths(remote.parent / "home")
    for name in ("README.md", "onnx", "checkpoint-10", "pytorch_model.bin", ".gitattributes"):
        assert not [path for path in cache if f"/{name}" in path.partition("snapshots")[2]]
    weights = sum((places / "base" / name).stat().st_size for name in shards)
    assert sent < weights + 293_800 + 4 * 101_000 + 60_000


def test_the_second_run_downloads_no_weights(
    merged: tuple[Path, Path, list[str], int], hub: HubServer, tmp_path: Path
) -> None:
    """The cache is found again, in the standard place and under the commit."""
    home = merged[1].parent / "home"
    run(hub, home, "merge", "org/base", "org/adapter", "-o", tmp_path / "o", "--reversible")
    assert contents(tmp_path / "o") == contents(merged[1])
    assert hub.requests("/cdn/") == []
    assert hub.sent() < 30_000
    snapshots = home / "hub" / "models--org--base" / "snapshots"
    assert (snapshots / hub.branches("org/base")["main"] / "config.json").is_file()


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "the Hub is down"])
def test_without_a_hub_a_filled_cache_gives_the_same_bytes(
    merged: tuple[Path, Path, list[str], int], hub: HubServer, tmp_path: Path, offline: str
) -> None:
    """What was merged once can be merged on a train, by the same command."""
    home, out = merged[1].parent / "home", tmp_path / "o"
    settings = {"HF_HUB_OFFLINE": "1"} if offline == "HF_HUB_OFFLINE" else {}
    down = {} if settings else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    command = ["merge", "org/base", "org/adapter", "-o", out, "--reversible"]
    run(hub, home, *command, **settings, **down)
    assert hub.log == []
    assert contents(out) == contents(merged[1])


def test_the_client_left_a_cache_that_is_used(hub: HubServer, home: Path) -> None:
    """What `hf download` fetched is not fetched again, and serves offline."""
    code = "from huggingface_hub import snapshot_download; snapshot_download('org/adapter')"
    env = hub.environment(home)
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    hub.clear()
    run(hub, home, "inspect", "org/adapter")
    assert hub.requests("/cdn/") == []
    run(hub, home, "inspect", "org/adapter", HF_HUB_OFFLINE="1")


def test_offline_by_branch_and_by_commit(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """A revision that was read online is known offline, by the name it was given then."""
    hub.add("org/offline", dict(paths(small(tmp_path / "a", alpha=8))))
    hub.add("org/offline", dict(paths(small(tmp_path / "b", alpha=24))), branch="dev")
    commit = hub.branches("org/offline")["dev"]
    for name in ("org/offline", "org/offline@dev"):
        run(hub, home, "inspect", name)
    for name, alpha in (("org/offline", 8), ("org/offline@dev", 24), (f"org/offline@{commit}", 24)):
        told = run(hub, home, "inspect", name, "--json", HF_HUB_OFFLINE="1").json
        assert told["modules"][0]["alpha"] == alpha, name
    found = refused(hub, home, "inspect", "org/offline@other", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in found["message"] + found["hint"]


def test_a_look_at_headers_leaves_what_is_complete_in_use(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    """A whole base is in the cache; a newer commit of it is looked at; offline the whole one is
    used."""
    hub.add("org/moving", {n: hub.files("org/base")[n] for n in hub.files("org/base")})
    command = ["merge", "org/moving", "org/adapter"]
    run(hub, home, *command, "-o", tmp_path / "one")
    hub.add("org/moving", {"config.json": hub.files("org/base")["config.json"] + b"\n"})
    run(hub, home, "inspect", "org/adapter", "--base", "org/moving")
    run(hub, home, *command, "-o", tmp_path / "two", HF_HUB_OFFLINE="1")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


_LET_GO = """
import os, shutil
from pathlib import Path
from loratool.storage.hub.folder import locate
folder, name = locate("org/base").folder, "model-00001-of-00003.safetensors"
path, blobs = folder.path / name, folder.path.parents[1] / "blobs"
folder.fetch([name]); blob = path.resolve()
seen = [blob.is_file()]
other = folder.path.with_name("0" * 40); other.mkdir()
(other / name).symlink_to(os.path.relpath(blob, other))
folder.let_go([name]); seen += [os.path.lexists(path), (other / name).is_file()]
shutil.rmtree(other)
second = locate("org/base").folder
second.fetch([name]); second.let_go([name]); seen.append(blob.is_file())
blob.unlink()
third = locate("org/base").folder
third.fetch([name]); third.let_go([name]); seen += [blob.is_file(), os.path.lexists(path)]
print(json.dumps(seen))
"""


def test_only_what_was_brought_is_given_back(hub: HubServer, home: Path) -> None:
    """A file that another commit links to stays, and one that was there before; what this run
    alone downloaded goes."""
    assert call(hub, home, _LET_GO) == [True, False, True, True, False, False]


def test_offline_without_a_cache_is_one_clear_error(hub: HubServer, home: Path) -> None:
    """It says that the cache has it not, and why nobody was asked."""
    found = refused(hub, home, "inspect", "org/adapter", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in found["message"]
    assert "org/adapter" in found["message"]
    assert hub.log == []


def test_offline_with_headers_alone_says_what_is_missing(hub: HubServer, home: Path) -> None:
    """Looking at a base from afar leaves its config in the cache, which is no base."""
    run(hub, home, "inspect", "org/adapter", "--base", "org/base")
    command = ["merge", "org/base", "org/adapter", "-o", home / "out"]
    found = refused(hub, home, *command, HF_HUB_OFFLINE="1")
    assert "org/base" in found["message"]
    assert "HF_HUB_OFFLINE" in found["message"] + found["hint"]
    assert not (home / "out").exists()


@pytest.mark.parametrize("options", [[], ["--reversible"]])
def test_a_dry_run_of_a_merge(hub: HubServer, home: Path, places: Path, options: list[str]) -> None:
    """It plans from headers; only to tell the size of the undo file it must read weights."""
    out = home / "out"
    command = ["-o", out, "--dry-run", "--json", *options]
    told = run(hub, home, "merge", "org/base", "org/adapter", *command).json
    expected = run(hub, home, "merge", places / "base", places / "adapter", *command).json
    if not options:
        assert downloads(hub, "org/base") == []
        assert hub.sent("/cdn/org/base") < 3 * 101_000
    assert (told["base"], told["adapters"]) == ("org/base", ["org/adapter"])
    gone = {"base", "adapters", "seconds", "bytes_free"}
    assert {k: v for k, v in told.items() if k not in gone} == {
        k: v for k, v in expected.items() if k not in gone
    }
    assert not out.exists()


@pytest.mark.parametrize("verb", ["merge", "verify", "compare"])
def test_what_does_not_fit_fails_before_the_base_is_downloaded(
    hub: HubServer, home: Path, tmp_path: Path, verb: str
) -> None:
    """Headers tell it; a base may be a hundred gigabytes."""
    hub.add("org/misfit", dict(paths(small(tmp_path / "misfit"))))
    command = {
        "merge": ["merge", "org/base", "org/misfit", "-o", home / "out"],
        "verify": ["verify", "org/tuned", "--base", "org/base", "org/misfit"],
        "compare": ["compare", "org/misfit", "org/misfit", "--base", "org/base"],
    }[verb]
    done = run(hub, home, *command, "--json", code=None)
    assert done.code == 1
    assert json.loads(done.err)["error"] == "no-match"
    assert downloads(hub, "org/(base|tuned)") == []
    assert not (home / "out").exists()


# --- headers by range requests ------------------------------------------------------------------


def test_inspecting_200_mb_moves_less_than_one(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """The header alone, by a range; and the report is the local one without norms."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
    file = sparse(
        tmp_path / "big" / "adapter_model.safetensors", factors(names, 200_000, 200_000, 64), "F16"
    )
    assert file.stat().st_size > 200_000_000
    (tmp_path / "big" / "adapter_config.json").write_text(config(r=64))
    hub.add("org/big", dict(paths(tmp_path / "big")))
    local = run(hub, home, "inspect", tmp_path / "big", "--json").json
    assert hub.log == []
    for name in ("org/big", "hf://org/big/adapter_model.safetensors"):
        hub.clear()
        done = run(hub, home, "inspect", name, "--json")
        assert 0 < hub.sent() < 1_000_000
        assert downloads(hub) == []
        assert done.err == ""
        _assert_same_facts(done.json, local)
    text = run(hub, home, "inspect", "org/big").out
    assert "--norms" in text
    assert "org/big" in text
    assert not list(home.rglob("*.safetensors"))


def _assert_same_facts(found: dict[str, Any], local: dict[str, Any]) -> None:
    """All that headers tell; norms are not there, and said not to be."""
    assert found["measured"] is False
    norms = ("delta_norm", "spectral_norm", "stable_rank")
    assert all(m[key] is None for m in found["modules"] for key in norms)
    for document in (found, local):
        for module in document["modules"]:
            for key in norms:
                module.pop(key, None)
        document["warnings"] = [w for w in document["warnings"] if w["code"] != "zero-delta"]
    gone = {"source", "measured"}
    assert {k: v for k, v in found.items() if k not in gone} == {
        k: v for k, v in local.items() if k not in gone
    }


def test_norms_are_downloaded_when_asked_for(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """Above 50 MB only with --norms or --spectrum, once, and without a bar in a pipe."""
    big = tmp_path / "big"
    sparse(big / "adapter_model.safetensors", factors([Q], 200_000, 200_000, 33), "F32")
    (big / "adapter_config.json").write_text(config(r=33))
    hub.add("org/above", dict(paths(big)))
    assert run(hub, home, "inspect", "org/above", "--json").json["measured"] is False
    assert downloads(hub) == []
    done = run(hub, home, "inspect", "org/above", "--norms", "--json")
    assert (done.json["measured"], done.err) == (True, "")
    assert done.json["modules"][0]["delta_norm"] == 0
    assert downloads(hub) == ["adapter_model.safetensors"]
    # Now that it is here, nothing more needs to be asked for.
    done = run(hub, home, "inspect", "org/above", "--spectrum", "--json")
    assert len(done.json["modules"][0]["singular_values"]) == 33
    assert run(hub, home, "inspect", "org/above", "--json").json["measured"] is True
    assert downloads(hub) == ["adapter_model.safetensors"]


def test_a_small_adapter_is_measured_unasked(hub: HubServer, home: Path, places: Path) -> None:
    """The whole report is the local one, norms to the last digit."""
    found = run(hub, home, "inspect", "org/adapter", "--json").json
    local = run(hub, home, "inspect", places / "adapter", "--json").json
    assert found.pop("source") == "org/adapter"
    assert local.pop("source") == str(places / "adapter")
    assert found == local
    assert "org/adapter/adapter_model.safetensors" in run(hub, home, "inspect", "org/adapter").out


def test_coverage_from_the_headers_of_a_large_base(
    hub: HubServer, home: Path, tmp_path: Path
) -> None:
    """Shards of several hundred megabytes give their headers and nothing else."""
    base, shards = tmp_path / "base", 4
    weight_map = {}
    for i in range(shards):
        names = [f"model.layers.{i}.self_attn.{p}.weight" for p in ("q_proj", "v_proj")]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        sparse(base / file, {name: [5_000, 5_000] for name in names}, "F16")
        weight_map |= dict.fromkeys(names, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    paths_ = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    sparse(tmp_path / "a" / "adapter_model.safetensors", factors(paths_, 5_000, 5_000, 4), "F16")
    (tmp_path / "a" / "adapter_config.json").write_text(config())
    hub.add("org/large", dict(paths(base)))
    local = run(hub, home, "inspect", tmp_path / "a", "--base", base, "--json").json
    done = run(hub, home, "inspect", tmp_path / "a", "--base", "org/large", "--json")
    assert sum(p.stat().st_size for p in base.iterdir()) > 390_000_000
    assert 0 < hub.sent() < 1_000_000
    assert downloads(hub) == []
    found = done.json
    assert (found["base"].pop("measured"), local["base"].pop("measured")) == (False, True)
    assert (found["base"].pop("source"), local["base"].pop("source")) == ("org/large", str(base))
    assert found["base"] == local["base"]
    assert [c["adapted"] for c in found["base"]["coverage"]] == [3, 0]
    assert "relative_norm" not in found["modules"][0]


def test_norms_of_a_base_fetch_the_shards_that_are_adapted(
    hub: HubServer, home: Path, tmp_path: Path, places: Path
) -> None:
    """--norms with --base downloads the shards of adapted weights alone, and says ‖ΔW‖/‖W‖."""
    where = {}
    index = json.loads((places / "base" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        where.setdefault(file, []).append(name)
    file, names = next((f, n) for f, n in where.items() if f"{Q}.weight" in n)
    adapter = write_adapter(tmp_path / "a", pair(Q, 128, 128), {})
    arguments = ["inspect", adapter, "--json", "--norms", "--base"]
    found = run(hub, home, *arguments, "org/base").json
    local = run(hub, home, *arguments, places / "base").json
    assert downloads(hub) == [file]
    assert found["base"]["measured"] is True
    assert found["modules"] == local["modules"]
    assert found["modules"][0]["relative_norm"] > 0
    assert names


_HEADERS = """
from loratool.adapters.reading import read_adapter
told = {}
for length in sys.argv[2:]:
    found = read_adapter(f"{sys.argv[1]}/h{length}")
    tensors = [(t.name, t.dtype, t.shape, t.start, t.nbytes) for t in found.tensors.values()]
    told[length] = [found.format, found.metadata, tensors]
print(json.dumps(told))
"""

#: Around one hundred thousand bytes, with and without the 8 of the length and the 64 read first.
_LENGTHS = [
    *(99_900, 99_928, 99_936, *range(99_988, 100_011), *range(100_054, 100_075)),
    *(100_200, 163_840, 199_990, 200_000, 200_010, 200_128, 300_000, 2_000_000),
]


@pytest.mark.parametrize("width", [6, 60_000])
def test_headers_around_the_first_guess(
    hub: HubServer, warm: Path, tmp_path: Path, width: int
) -> None:
    """However long a header is, short of the file's end or far from it, it is read right."""
    shapes = factors([Q], 5, width, 4)
    for length in _LENGTHS:
        folder = tmp_path / "headers" / f"h{length}"
        sparse(folder / "adapter_model.safetensors", shapes, "F32", length)
        (folder / "adapter_config.json").write_text(config())
    name = f"org/headers-{width}"
    hub.add(name, dict(paths(tmp_path / "headers")))
    lengths = list(map(str, _LENGTHS))
    found = call(hub, warm, _HEADERS, f"hf://{name}", *lengths)
    assert downloads(hub) == []
    assert found == call(hub, warm, _HEADERS, str(tmp_path / "headers"), *lengths)
    assert all(told[0] == "peft" for told in found.values())


@pytest.mark.parametrize("length", [100_100, 2_000_000])
def test_inspect_with_a_long_header(
    hub: HubServer, home: Path, tmp_path: Path, length: int
) -> None:
    """A header of many tensors, most of them beyond the first range."""
    folder = tmp_path / "long"
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(length // 400)]
    shapes = factors(names, 40, 40, 2)
    shapes |= factors(["model.layers.0.mlp.up_proj"], 3_000_000, 3_000_000, 3)
    sparse(folder / "adapter_model.safetensors", shapes, "F32")
    (folder / "adapter_config.json").write_text(config(r=2))
    hub.add(f"org/long-{length}", dict(paths(folder)))
    local = run(hub, home, "inspect", folder, "--json", "--include", "up_proj").json
    found = run(hub, home, "inspect", f"org/long-{length}", "--json", "--include", "up_proj").json
    assert downloads(hub) == []
    assert hub.sent() < 1_000_000 + length
    _assert_same_facts(found, local)


# --- addresses ----------------------------------------------------------------------------------

_ALPHAS = """
told = {}
for name in sys.argv[1:]:
    report = loratool.inspect(name)
    told[name] = [report.modules[0].alpha, report.source]
print(json.dumps(told))
"""


def test_revisions(hub: HubServer, warm: Path, tmp_path: Path) -> None:
    """A branch, a name like a tag's, a commit, a pull request; each gives its own content."""
    alphas = {"main": 1, "dev": 2, "v1.0": 3, "feature/x": 4}
    for branch, alpha in alphas.items():
        folder = small(tmp_path / f"a{alpha}", alpha)
        hub.add("org/revisions", dict(paths(folder)), branch=branch)
    main = hub.repos["org/revisions"].find("main")
    assert hub.repos["org/revisions"].open_discussion("Better", "someone", main) == 1
    hub.add("org/revisions", dict(paths(small(tmp_path / "a5", 5))), branch="refs/pr/1")
    dev = hub.branches("org/revisions")["dev"]
    expected = {
        "org/revisions": 1, "org/revisions@main": 1, "org/revisions@dev": 2,
        "org/revisions@v1.0": 3, "org/revisions@feature/x": 4, f"org/revisions@{dev}": 2,
        "org/revisions@refs/pr/1": 5, "hf://org/revisions": 1, "hf://org/revisions@v1.0": 3,
        "hf://org/revisions@refs/pr/1": 5,
        "hf://org/revisions@dev/adapter_model.safetensors": 2,
        "hf://org/revisions@refs/pr/1/adapter_model.safetensors": 5,
    }  # fmt: skip
    found = call(hub, warm, _ALPHAS, *expected)
    assert {name: alpha for name, (alpha, _) in found.items()} == expected
    assert found["org/revisions@dev"][1] == "org/revisions@dev"
    refusal = refused(hub, warm, "inspect", "org/revisions@nope")
    assert "'nope'" in refusal["message"]
    assert refusal["error"] == "hub"


def test_subfolders_and_single_files(hub: HubServer, warm: Path, tmp_path: Path) -> None:
    """Each adapter of a repository is read with the config that lies beside it, not another's."""
    one, two = small(tmp_path / "one", 6), small(tmp_path / "two", 7, seed=1)
    files = {f"{sub}/{n}": p for sub, f in (("a", one), ("b/c", two)) for n, p in paths(f).items()}
    hub.add("org/several", {**files, "b/c/README.md": "text", "adapter_config.json": config()})
    hub.add("org/nested", {f"adapter/{n}": p for n, p in paths(two).items()})
    expected = {
        "hf://org/several/a": 6, "hf://org/several/a/": 6, "hf://org/several/b/c": 7,
        "hf://org/several/b/c/adapter_model.safetensors": 7,
        "hf://org/several@main/a/adapter_model.safetensors": 6,
        "org/nested": 7, "hf://models/org/several/a": 6,
    }  # fmt: skip
    found = call(hub, warm, _ALPHAS, *expected)
    assert {name: alpha for name, (alpha, _) in found.items()} == expected
    assert found["hf://org/several/a"][1] == "hf://org/several/a"
    assert found["hf://org/several/b/c/adapter_model.safetensors"][1] == (
        "hf://org/several/b/c/adapter_model.safetensors"
    )
    for address, words in (
        ("hf://org/several/d", "no such file or folder"),
        ("hf://org/several/a/nope.safetensors", "no such file or folder"),
        ("hf://org/several/../a", "not an address"),
        ("hf://org/a/../b", "not an address"),
        ("hf://datasets/org/name", "models"),
        ("https://example.com/org/name", "not the page"),
    ):
        assert words in refused(hub, warm, "inspect", address)["message"], address


def test_the_record_says_where_in_a_repository(hub: HubServer, warm: Path, tmp_path: Path) -> None:
    """Of two adapters in one repository the provenance tells which it was."""
    commit = hub.add("org/shelf", {f"x/y/{n}": p for n, p in paths(TASKS / "html").items()})
    run(hub, warm, "resize", "hf://org/shelf/x/y", "--rank", "2", "-o", tmp_path / "out")
    text = (tmp_path / "out" / "loratool.json").read_text()
    entries = [e for e in json.loads(text)["adapters"] if e.get("repo") == "org/shelf"]
    assert [e["revision"] for e in entries] == [commit]
    assert "x/y" in entries[0]["path"]


def test_a_new_commit_is_seen(hub: HubServer, warm: Path, tmp_path: Path) -> None:
    """A repository that changes between two runs: the cache must not hide it."""
    old = hub.add("org/moving", dict(paths(small(tmp_path / "a", 3))))
    alpha = _alpha(hub, warm, "org/moving")
    hub.add("org/moving", dict(paths(small(tmp_path / "b", 5, seed=1))))
    assert (alpha, _alpha(hub, warm, "org/moving")) == (3, 5)
    assert _alpha(hub, warm, f"org/moving@{old}") == 3


def _alpha(hub: HubServer, home: Path, name: str) -> float:
    found: float = run(hub, home, "inspect", name, "--json").json["modules"][0]["alpha"]
    return found


def test_a_path_that_exists_wins(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """`org/adapter` here is read here, and hf:// still reaches the other one."""
    here = small(tmp_path / "work" / "org" / "adapter", 5)
    found = run(hub, home, "inspect", "org/adapter", "--json", cwd=tmp_path / "work").json
    assert found["modules"][0]["alpha"] == 5
    assert hub.log == []
    done = run(hub, home, "inspect", "hf://org/adapter", "--json", cwd=tmp_path / "work")
    assert len(done.json["modules"]) == 28
    (here / "adapter_model.safetensors").unlink()  # and an empty one is not passed over either
    hub.clear()
    refused(hub, home, "inspect", "org/adapter", cwd=tmp_path / "work")
    assert hub.log == []


def test_a_typing_mistake_gets_both_readings(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """It may be a path or an id; the error says what became of either, and what is near."""
    small(tmp_path / "work" / "org" / "name")
    found = refused(hub, home, "inspect", "org/nam", cwd=tmp_path / "work")
    assert "no such file or directory" in found["message"]
    assert "Hub" in found["message"]
    assert "org/name" in found["hint"]
    command = ["inspect", "org/name", "--base", "org/bsae"]
    found = refused(hub, home, *command, cwd=tmp_path / "work")
    assert "org/bsae: no such file or directory" in found["message"]
    assert "Hub" in found["message"]


@pytest.mark.parametrize(
    "path",
    ["out/model.safetensors", "out/adapter_model.bin", "./org/adapter", "/org/adapter",
     "org/adapter/sub", "adapter", "../org/adapter", "~/adapter", "org/with space", "out/x.PT"],
)  # fmt: skip
def test_what_can_only_be_a_path_is_not_asked_for(hub: HubServer, warm: Path, path: str) -> None:
    """A file that is not there is told without asking anybody."""
    found = refused(hub, warm, "inspect", path)
    assert (found["error"], hub.log) == ("bad-file", [])
    assert "no such file or directory" in found["message"]
    assert "Hub" not in found["message"]


# --- other shapes of models ---------------------------------------------------------------------


def test_one_safetensors_file_of_any_name(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """A base whose only weights are called otherwise, as a repository and as that file."""
    base = tmp_path / "odd"
    sparse(base / "weights-v2.safetensors", {f"{Q}.weight": [12, 10]}, "F32")
    (base / "config.json").write_text('{"model_type": "llama"}')
    hub.add("org/odd", {**paths(base), "onnx/model.onnx": b"x" * 20_000})
    adapter = small(tmp_path / "a")
    for name in ("org/odd", "hf://org/odd/weights-v2.safetensors"):
        found = run(hub, home, "inspect", adapter, "--base", name, "--json").json["base"]
        assert [c["adapted"] for c in found["coverage"]] == [1]
        assert found["model_type"] == "llama"
    assert downloads(hub) == []


def test_torch_files(hub: HubServer, home: Path, tmp_path: Path) -> None:
    """Sharded .bin bases and .bin adapters merge to the same bytes as from the disk."""
    import torch
    from safetensors.torch import load_file

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    weight_map = {}
    for i in (1, 2):
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({name: torch.full((128, 128), float(i))}, base / file)
        weight_map[name] = file
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "config.json").write_text('{"model_type": "llama"}')
    state = load_file(FIXTURES / "adapter" / "adapter_model.safetensors")
    state = {n: t for n, t in state.items() if "layers.1.self_attn.q_proj" in n}
    torch.save(state, adapter / "adapter_model.bin")
    shutil.copy(FIXTURES / "adapter" / "adapter_config.json", adapter)
    hub.add("org/torch-base", dict(paths(base)))
    hub.add("org/torch-adapter", dict(paths(adapter)))
    run(hub, home, "merge", base, adapter, "-o", tmp_path / "local" / "out")
    assert hub.log == []
    command = ["merge", "org/torch-base", "org/torch-adapter", "-o", tmp_path / "out"]
    run(hub, home, *command)
    found, local = contents(tmp_path / "out"), contents(tmp_path / "local" / "out")
    assert {n for n in found if found[n] != local[n]} == {"loratool.json"}
    assert len(downloads(hub)) == 3


# --- the other commands -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [["resize", "adapter", "--rank", "4"],
     ["combine", "html", "tables", "--weight", "0.7", "--weight", "0.4"],
     ["extract", "base", "tuned", "--rank", "4", "--base-name", "org/base"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_adapters_made_from_ids_equal_those_from_paths(
    hub: HubServer, warm: Path, places: Path, tmp_path: Path, command: list[str]
) -> None:
    """Adapter weights, config and tokenizer to the byte; the record adds where they come from."""
    verb, *rest = command
    names = [word for word in rest if (places / word).is_dir()]
    options = [word for word in rest if word not in names]
    at_hub = [f"org/{name}" for name in names]
    run(hub, warm, verb, *at_hub, *options, "-o", tmp_path / "out")
    run(hub, warm, verb, *(places / n for n in names), *options, "-o", tmp_path / "local" / "out")
    record = assert_same_output(tmp_path / "out", tmp_path / "local" / "out")
    text = json.dumps(record)
    for name in at_hub:
        assert f'"{name}"' in text
        assert hub.branches(name)["main"] in text


def test_an_extracted_adapter_names_its_base_by_id(
    hub: HubServer, warm: Path, tmp_path: Path
) -> None:
    """base_model_name_or_path is what others can load, not a folder of the cache."""
    run(hub, warm, "extract", "org/base", "org/tuned", "--rank", "2", "-o", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert told["base_model_name_or_path"] == "org/base"


def test_compare_with_ids(hub: HubServer, warm: Path, places: Path) -> None:
    """The numbers are those of the paths, with the base and without; torch is not needed."""
    gone = {"adapters", "base", "verdicts", "warnings"}
    for base in ([], ["--base"]):
        found = run(
            hub, warm, "compare", "org/html", "org/tables", *base, *(["org/base"] if base else []),
            "--json",
        ).json  # fmt: skip
        local = run(
            hub, warm, "compare", places / "html", places / "tables",
            *base, *([places / "base"] if base else []), "--json",
        ).json  # fmt: skip
        assert found["adapters"] == ["org/html", "org/tables"]
        assert {k: v for k, v in found.items() if k not in gone} == {
            k: v for k, v in local.items() if k not in gone
        }


def test_verify_and_unmerge_what_lies_on_the_hub(
    merged: tuple[Path, Path, list[str], int], hub: HubServer, home: Path, tmp_path: Path
) -> None:
    """A reversible merge was uploaded with its undo folder; the base comes back bit for bit."""
    files = {n: p for n, p in paths(merged[1]).items() if n != "README.md"}
    assert any(name.startswith("loratool/") for name in files)
    hub.add("org/merged", {**files, "onnx/model.onnx": b"x" * 20_000})
    done = run(hub, home, "verify", "org/merged", "--base", "org/base", "org/adapter", "--json")
    assert done.err == ""
    run(hub, home, "unmerge", "org/merged", "org/adapter", "-o", tmp_path / "out")
    found = contents(tmp_path / "out")
    for name, path in paths(FIXTURES / "base").items():
        assert found[name] == path.read_bytes(), name
    assert "model.onnx" not in downloads(hub)
    wrong = refused(hub, home, "unmerge", "org/merged", "org/html", "-o", tmp_path / "no")
    assert "org/merged" in wrong["message"] + wrong["hint"] or "html" in wrong["message"]
    assert not (tmp_path / "no").exists()
    # By subtraction the originals may lie on the Hub too.
    command = ["unmerge", "org/merged", "org/adapter", "--subtract", "--base", "org/base"]
    done = run(hub, home, *command, "-o", tmp_path / "back", "--json")
    assert done.json["exact"] is True
    assert (
        contents(tmp_path / "back")["model-00001-of-00003.safetensors"]
        == (FIXTURES / "base" / "model-00001-of-00003.safetensors").read_bytes()
    )
