"""Time `loratool list` on 500 small adapters of five kinds. Prints Markdown.

Each has factors on the seven linear layers of 16 layers (224 tensors), of rank 8 and of 64 wide
layers, so that their headers are those of real adapters and their data is small. One in twenty is a
copy of another, one in fifty has zero factors. Every run is a process of its own with the files in
the page cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import LINEARS, machine
from safetensors.numpy import save_file

RANK, WIDTH, LAYERS = 8, 64, 16
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "base_model_name_or_path": "org/base",
        "target_modules": [name.rpartition(".")[2] for name in LINEARS]}  # fmt: skip
MLX = {"fine_tune_type": "lora", "model": "org/base", "num_layers": LAYERS,
       "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0}}  # fmt: skip

Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def factors(number: int) -> Factors:
    """A and B of every module; some adapters are copies of others, and some do nothing."""
    rng = np.random.default_rng(number - 10 if number % 20 == 10 else number)
    found = {}
    for layer in range(LAYERS):
        for name in LINEARS:
            a = rng.standard_normal((RANK, WIDTH)).astype(np.float16)
            b = rng.standard_normal((WIDTH, RANK)).astype(np.float16)
            found[f"model.layers.{layer}.{name}"] = a, b * (number % 50 != 0)
    return found


def write_peft(folder: Path, pairs: Factors) -> None:
    tensors = _named(
        pairs, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"
    )
    _write(folder, "adapter_model.safetensors", tensors, PEFT)


def write_torch(folder: Path, pairs: Factors) -> None:
    import torch

    tensors = _named(
        pairs, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"
    )
    folder.mkdir(parents=True)
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT))


def write_mlx(folder: Path, pairs: Factors) -> None:
    turned = {name: (a.T.copy(), b.T.copy()) for name, (a, b) in pairs.items()}
    _write(folder, "adapters.safetensors", _named(turned, "{}.lora_a", "{}.lora_b"), MLX)


def write_hand(folder: Path, pairs: Factors) -> None:
    _write(folder, "lora.safetensors", _named(pairs, "{}.lora_A", "{}.lora_B"), None)


def write_kohya(folder: Path, pairs: Factors) -> None:
    flat = {f"lora_unet_{name.replace('.', '_')}": pair for name, pair in pairs.items()}
    tensors = _named(flat, "{}.lora_down.weight", "{}.lora_up.weight")
    tensors |= {f"{name}.alpha": np.array(RANK, np.float16) for name in flat}
    tags = {"10_x": {f"tag {number}": number for number in range(300)}}
    metadata = {"ss_network_dim": str(RANK), "ss_base_model_version": "sd_v1",
                "ss_tag_frequency": json.dumps(tags)}  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / f"{folder.name}.safetensors", metadata)


#: Of ten adapters four are PEFT's and three kohya's.
WRITERS: tuple[Callable[[Path, Factors], None], ...] = (
    write_peft, write_kohya, write_peft, write_mlx, write_kohya,
    write_peft, write_torch, write_peft, write_kohya, write_hand,
)  # fmt: skip


def _named(pairs: Factors, a_name: str, b_name: str) -> dict[str, np.ndarray]:
    return {
        template.format(path): value
        for path, pair in pairs.items()
        for template, value in zip((a_name, b_name), pair, strict=True)
    }


def _write(folder: Path, name: str, tensors: dict[str, np.ndarray], config: object) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / name, {"format": "pt"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))


def _used() -> float:
    """Seconds of processors that the runs so far took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=500, help="of adapters (500)")
    parser.add_argument("--runs", type=int, default=5, help="of each command (5)")
    parser.add_argument("--work", type=Path, help="keep the adapters here and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        loras = work / f"loras-{args.count}"
        if not loras.exists():
            for number in range(args.count):
                WRITERS[number % len(WRITERS)](loras / f"lora-{number}", factors(number))
        print(machine(work))
        print(f"\n| {args.count} adapters | median s | min–max s | CPU s |\n|---|--:|--:|--:|")
        for options in ([], ["--json"]):
            command = [sys.executable, "-m", "loratool", "list", str(loras), *options]
            seconds, used = [], _used()
            for _ in range(args.runs + 1):  # the first fills the page cache
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - start)
            warm = sorted(seconds[1:])
            name = " ".join(["list", *options])
            cpu = (_used() - used) / len(seconds)
            print(
                f"| `{name}` | {statistics.median(warm):.2f} | {warm[0]:.2f}–{warm[-1]:.2f} "
                f"| {cpu:.1f} |"
            )


if __name__ == "__main__":
    main()
