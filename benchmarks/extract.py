"""Time extract on a 1B model and its fine-tune, and mergekit's extraction of the same.

Prints Markdown. The fine-tune is the base of the merge benchmark plus a difference whose singular
values fall as i^-0.7 over 64 directions, with noise below, rounded to bfloat16. mergekit comes by
the path of its `mergekit-extract-lora`, in an environment of its own:

    python -m venv mergekit && mergekit/bin/pip install mergekit
    python benchmarks/extract.py --mergekit mergekit/bin/mergekit-extract-lora
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Contender, machine, make_base, print_table, race

LORATOOL = [sys.executable, "-m", "loratool", "extract", "{base}", "{tuned}", "-o", "{output}",
            "--embeddings"]  # fmt: skip


def make_tuned(folder: Path, base: Path) -> None:
    """Write a fine-tune of the checkpoint in `base`, one shard in memory at a time."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    falling = torch.arange(1, 65) ** -0.7
    folder.mkdir(parents=True)
    for path in sorted(base.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
            continue
        data = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                weight = file.get_tensor(name)
                change = torch.empty(weight.shape)
                change.normal_(0, 3e-4 if weight.ndim == 2 else 0.01, generator=generator)
                if weight.ndim == 2:
                    left = torch.randn(weight.shape[0], 64, generator=generator) * falling
                    right = torch.randn(64, weight.shape[1], generator=generator)
                    change.addmm_(left, right, alpha=4e-4)
                data[name] = change.add_(weight).bfloat16()
        save_file(data, folder / path.name, {"format": "pt"})


def contenders(rank: int, mergekit: Path | None) -> list[Contender]:
    entries = [
        Contender(f"`extract --rank {rank}`", [*LORATOOL, "-q", "--rank", str(rank)]),
        Contender("`extract --energy 0.7 --max-rank 64 --patterns`",
                  [*LORATOOL, "-q", "--energy", "0.7", "--max-rank", "64", "--patterns"]),
        Contender("`extract --budget 50MB --patterns`",
                  [*LORATOOL, "-q", "--budget", "50MB", "--patterns"]),
        Contender("`extract --rank 16 --verify`", [*LORATOOL, "-q", "--rank", "16", "--verify"]),
        Contender("`extract --dry-run`", [*LORATOOL, "-q", "--dry-run"]),
    ]  # fmt: skip
    if mergekit is not None:
        command = [str(mergekit.absolute()), "--model", "{tuned}", "--base-model", "{base}",
                   "--out-path", "{output}", "--max-rank", str(rank), "--quiet"]  # fmt: skip
        entries = [entries[0], Contender("mergekit-extract-lora", command)]
    return entries


def stages(base: Path, tuned: Path, output: Path, rank: int) -> None:
    """Where the processor time of an extraction goes, by thread clocks."""
    import loratool.extracting.decomposition as extraction
    from loratool.extracting.difference import Difference
    from loratool.linalg import krylov
    from loratool.verbs.extract import extract

    spent: Counter[str] = Counter()

    def watch(owner: Any, name: str, stage: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent[stage] += time.thread_time() - started

        setattr(owner, name, watched)

    space = krylov.BlockKrylov
    watch(Difference, "measure", "read both sides, subtract, sum squares")
    watch(krylov, "through", "passes: D·V and Dᵀ·D·V (GEMM)")
    watch(space, "_orthogonalised", "orthogonalise blocks (projection and QR, float64)")
    watch(space, "_extended_gram", "Gram matrix of the images (float64)")
    watch(space, "step", "step")
    watch(space, "bound", "bound")
    watch(space, "factors", "factors from the basis")
    watch(extraction, "rounding_loss", "measure what rounding takes")
    watch(extraction.Extraction, "_decomposed", "all")
    started = time.perf_counter()
    extract(base, tuned, output, rank=rank, embeddings=True, overwrite=True)
    seconds = time.perf_counter() - started
    total = spent.pop("all")
    del spent["step"], spent["bound"]
    spent["the rest: small eigenproblems, the bound's algebra"] = total - sum(spent.values())
    print(f"\n{seconds:.1f} s, {total:.1f} CPU seconds in the threads.\n")
    print("| stage | CPU s | share |\n|---|--:|--:|")
    for stage, share in spent.most_common():
        print(f"| {stage} | {share:.2f} | {share / total:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=3.0, help="GB of the base (3)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3, help="of each contender (3)")
    parser.add_argument("--mergekit", type=Path, help="its mergekit-extract-lora")
    parser.add_argument("--stages", action="store_true", help="only where the time goes")
    parser.add_argument("--work", type=Path, help="keep the models here and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        places = {"base": work / "base", "tuned": work / "tuned", "output": work / "out"}
        made: list[tuple[Path, Callable[..., None], tuple[Any, ...]]] = [
            (places["base"], make_base, (places["base"], args.size, 4)),
            (places["tuned"], make_tuned, (places["tuned"], places["base"])),
        ]
        for folder, make, arguments in made:
            if not folder.exists():  # in a process of its own, so that this one stays small
                maker = multiprocessing.get_context("spawn").Process(target=make, args=arguments)
                maker.start()
                maker.join()
        print(machine(work))
        if args.stages:
            stages(places["base"], places["tuned"], places["output"], args.rank)
            return
        config = json.loads((places["base"] / "config.json").read_text())
        print(f"medians of {args.runs} runs; {config['num_hidden_layers']} layers\n")
        entries = contenders(args.rank, args.mergekit)
        race(entries, places, args.runs)
        print_table(entries, "`extract`")


if __name__ == "__main__":
    main()
