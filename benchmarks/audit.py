"""Time `inspect --audit` beside plain `inspect`, on an adapter of 180 MB: 32 layers, rank 64.

Prints Markdown. The factors are random float16 values with 24 stronger directions, so that every
finding about ranks is made. The adapter is in the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from pathlib import Path

from common import LINEARS, Contender, machine, run

LAYERS, RANK = 32, 64


def write(folder: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    strength = np.where(np.arange(RANK) < 24, 8.0, 1.0).astype(np.float32)
    tensors = {}
    for layer in range(LAYERS):
        for name, (out, width) in LINEARS.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            a = 0.01 * rng.standard_normal((RANK, width), np.float32)
            b = 0.01 * rng.standard_normal((out, RANK), np.float32) * strength
            tensors[f"{path}.lora_A.weight"] = a.astype(np.float16)
            tensors[f"{path}.lora_B.weight"] = b.astype(np.float16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each contender (5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapter"
        maker = multiprocessing.get_context("spawn").Process(target=write, args=(folder,))
        maker.start()
        maker.join()
        inspect = [sys.executable, "-m", "loratool", "inspect", str(folder)]
        entries = [
            Contender("`inspect`", inspect),
            Contender("`inspect --audit`", [*inspect, "--audit"]),
            Contender("`inspect --audit --json`", [*inspect, "--audit", "--json"]),
        ]
        for _ in range(args.runs):
            for entry in entries:
                entry.runs.append(run(entry.command, entry.own_clock))
        print(machine(Path(temporary)))
    print("| command | median s | min–max s | CPU s | peak MB |\n|---|--:|--:|--:|--:|")
    for entry in entries:
        seconds = [r.seconds for r in entry.runs]
        print(
            f"| {entry.label} | {entry.median:.2f} | {min(seconds):.2f}–{max(seconds):.2f} "
            f"| {statistics.median(r.cpu for r in entry.runs):.1f} "
            f"| {max(r.peak for r in entry.runs) / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
