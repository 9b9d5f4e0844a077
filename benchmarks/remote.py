"""What it costs to ask the Hub, and to merge from Hub to Hub through a small disk.

The Hub is the one of the tests, on loopback: times are those of requests and of computing, not of a
network. Coverage of a 70B base is read from files that hold nothing but their headers.

    python benchmarks/remote.py
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.hub import HubServer  # noqa: E402

HIDDEN, INTERMEDIATE, NARROW, VOCABULARY, LAYERS, SHARDS = 8192, 28672, 1024, 128256, 80, 30


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of bfloat16 with a header and no data; returns its size."""
    from loratool.storage.header import build_header

    header = build_header([(name, "BF16", shape) for name, shape in shapes.items()], {})
    size = len(header) + sum(2 * math.prod(shape) for shape in shapes.values())
    with path.open("wb") as stream:
        stream.write(header)
        stream.truncate(size)
    return size


def make_70b(base: Path, adapter: Path) -> tuple[int, int]:
    """A Llama 70B in 30 shards and a LoRA of rank 64 on q and v; returns their bytes."""
    linears = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (NARROW, HIDDEN),
        "self_attn.v_proj": (NARROW, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    factors: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS):
        place = f"model.layers.{layer}."
        shapes |= {f"{place}{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{place}{n}.weight": (HIDDEN,) for n in ("input_layernorm", "norm")}
        for name in ("self_attn.q_proj", "self_attn.v_proj"):
            rows, columns = linears[name]
            path = f"base_model.model.{place}{name}"
            factors |= {f"{path}.lora_A.weight": (64, columns), f"{path}.lora_B.weight": (rows, 64)}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    base.mkdir()
    adapter.mkdir()
    names, total, weight_map = list(shapes), 0, {}
    for number in range(SHARDS):
        own = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        total += write_hollow(base / file, {name: shapes[name] for name in own})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "config.json").write_text('{"model_type": "llama"}')
    config = {
        "peft_type": "LORA",
        "r": 64,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return total, write_hollow(adapter / "adapter_model.safetensors", factors)


def held(folder: Path) -> int:
    """Bytes on the disk below a folder."""
    found = 0
    for path in folder.rglob("*"):
        try:
            found += 0 if path.is_symlink() else path.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return found


def run(hub: HubServer, home: Path, *arguments: str) -> tuple[float, int, int]:
    """Seconds, peak bytes of memory and of the disk below `home`."""
    home.mkdir(parents=True)
    peak = [0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            peak[0] = max(peak[0], held(home))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "loratool", *arguments], env=hub.environment(home), cwd=home,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    assert status == 0, arguments
    return seconds, usage.ru_maxrss * 1024, peak[0]


def files(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir()}


def main() -> None:
    with tempfile.TemporaryDirectory() as place, HubServer(tmp=Path(place)) as hub:
        work = Path(place)
        sizes = make_70b(work / "base70", work / "adapter70")
        hub.add("org/base70", files(work / "base70"))
        hub.add("org/adapter70", files(work / "adapter70"))
        print(
            f"70B: base {sizes[0] / 1e9:.0f} GB in {SHARDS} shards, adapter {sizes[1] / 1e6:.0f} MB"
        )
        for turn in range(5):
            hub.clear()
            home = work / f"ask{turn}"
            taken = run(hub, home, "inspect", "org/adapter70", "--base", "org/base70")
            print(f"  inspect --base: {taken[0]:.2f} s, {hub.sent() / 1e6:.1f} MB, "
                  f"{len(hub.log)} requests")  # fmt: skip
        # In a process of its own: a child's peak of memory starts at the size of its parent.
        code = (
            "import sys; from pathlib import Path; from common import make_adapter, make_base; "
            "make_base(Path(sys.argv[1]), 3.0, 12); make_adapter(Path(sys.argv[2]), 3.0, 16)"
        )
        places = [str(work / "base"), str(work / "adapter")]
        subprocess.run([sys.executable, "-c", code, *places], cwd=ROOT / "benchmarks", check=True)
        hub.add("org/base", files(work / "base"))
        hub.add("org/adapter", files(work / "adapter"))
        total = sum(path.stat().st_size for path in (work / "base").iterdir())
        print(f"Hub to Hub: base {total / 1e9:.2f} GB in 12 shards")
        command = ["merge", "org/base", "org/adapter", "--push", "org/merged", "--no-keep"]
        seconds, memory, disk = run(hub, work / "through", *command)
        print(f"  --no-keep: {seconds:.1f} s, {memory / 1e6:.0f} MB of memory, "
              f"{disk / 1e6:.0f} MB of disk")  # fmt: skip


if __name__ == "__main__":
    main()
