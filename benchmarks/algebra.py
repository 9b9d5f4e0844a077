"""Time combine, resize and compare on adapters of real models' shapes, and PEFT on one layer.

Prints Markdown. The adapters hold random float32 values. PEFT combines live layers only, so it gets
one block of the model, and loratool the same one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common import Contender, Run, machine, run

LORATOOL = [sys.executable, "-m", "loratool"]

Shapes = dict[str, tuple[int, int]]


def llama(hidden: int, keys: int, intermediate: int) -> Shapes:
    """`(out, in)` of the linear layers of one block."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


#: Llama 3.2 1B and Llama 3.1 8B: layers, and the shapes in one of them.
MODELS = {"1B": (16, llama(2048, 512, 8192)), "8B": (32, llama(4096, 1024, 14336))}


def make(folder: Path, model: str, rank: int, seed: int, layers: int | None = None) -> Path:
    """Write an adapter on all linear layers, once, in a process of its own.

    This one imports nothing large: a child's ru_maxrss starts at the size of its parent.
    """
    if not folder.exists():
        maker = multiprocessing.get_context("spawn").Process(
            target=write, args=(folder, model, rank, seed, layers)
        )
        maker.start()
        maker.join()
    return folder


def write(folder: Path, model: str, rank: int, seed: int, layers: int | None) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    count, shapes = MODELS[model]
    tensors = {}
    for i in range(layers or count):
        for name, (out, width) in shapes.items():
            path = f"base_model.model.model.layers.{i}.{name}"
            for half, shape in (("lora_A", (rank, width)), ("lora_B", (out, rank))):
                tensors[f"{path}.{half}.weight"] = 0.01 * torch.randn(shape, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": [name.rpartition(".")[2] for name in shapes],
        "base_model_name_or_path": f"llama-{model}",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def library(call: str) -> list[str]:
    """A call of the library timed inside a process that has imported everything."""
    code = (
        "import sys, time, loratool; loratool.combine, loratool.compare, loratool.resize\n"
        "from loratool.verbs import combine, compare, resize\n"
        f"start = time.perf_counter(); {call}; print(time.perf_counter() - start)"
    )
    return [sys.executable, "-c", code]


def contenders(a: Path, b: Path, big: Path, out: Path) -> list[Contender]:
    pair, output = [str(a), str(b)], ["-o", str(out), "-q"]
    combine = [*LORATOOL, "combine", *pair, *output]
    both = f"[{str(a)!r}, {str(b)!r}]"
    entries = [
        Contender("`combine A B`", combine),
        Contender(
            "`loratool.combine`, nothing written",
            library(f"loratool.combine({both}, {str(out)!r}, dry_run=True)"), own_clock=True,
        ),
        Contender("`combine --rank 16`", [*combine, "--rank", "16"]),
    ]  # fmt: skip
    for method in ("ties", "ties_core", "tsv_m", "iso_c", "knots_ties"):
        density = ["--density", "0.5"] if "ties" in method else []
        entries.append(Contender(f"`--method {method}`", [*combine, "--method", method, *density]))
    resize = [*LORATOOL, "resize", str(big), *output]
    return [
        *entries,
        Contender("`compare A B`", [*LORATOOL, "compare", *pair, "-q"]),
        Contender("`resize --rank 64`, r256 of an 8B", [*resize, "--rank", "64"]),
        Contender(
            "`resize --energy 0.9 --patterns`, r256 of an 8B",
            [*resize, "--energy", "0.9", "--patterns"],
        ),
    ]


def race(entries: list[Contender], out: Path, runs: int) -> None:
    for turn in range(runs):
        for entry in entries:
            shutil.rmtree(out, ignore_errors=True)
            entry.runs.append(run(entry.command, entry.own_clock))
            print(f"  {turn + 1}/{runs} {entry.label}: {entry.runs[-1]}", file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)


def print_runs(entries: list[Contender]) -> None:
    print("| contender | median s | min–max s | CPU s | peak MB |\n|---|--:|--:|--:|--:|")
    for entry in entries:
        seconds = [r.seconds for r in entry.runs]
        cpu = statistics.median(r.cpu for r in entry.runs)
        peak = max(r.peak for r in entry.runs) / 1e6
        print(
            f"| {entry.label} | {entry.median:.2f} | {min(seconds):.2f}–{max(seconds):.2f} "
            f"| {cpu:.1f} | {peak:.0f} |"
        )


def one_layer(work: Path, rank: int, runs: int) -> None:
    """PEFT's `svd` of two adapters of one block of the 1B, and loratool's, in turns."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    import loratool

    shapes = {name.rpartition(".")[2]: shape for name, shape in MODELS["1B"][1].items()}

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (out, width) in shapes.items():
                self.add_module(name, torch.nn.Linear(width, out, bias=False))

    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=list(shapes), init_lora_weights=False
        )
        folders.append(work / f"one-{seed}")
        get_peft_model(Block(), config).save_pretrained(folders[-1])
    times: dict[str, list[float]] = {"PEFT": [], "loratool": []}
    apart = 0.0
    for turn in range(runs):
        model = PeftModel.from_pretrained(Block(), folders[0], adapter_name="a")
        model.load_adapter(folders[1], adapter_name="b")
        started = time.perf_counter()
        model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", "svd", svd_rank=rank)
        times["PEFT"].append(time.perf_counter() - started)
        result = work / "one-both"
        started = time.perf_counter()
        loratool.combine(folders, result, weights=[0.7, 0.4], rank=rank, overwrite=True)
        times["loratool"].append(time.perf_counter() - started)
        model.load_adapter(result, adapter_name="ours")
        for name in shapes:
            layer = getattr(model.base_model.model, name)
            theirs, ours = (layer.get_delta_weight(which) for which in ("both", "ours"))
            apart = max(apart, float((theirs - ours).norm() / theirs.norm()))
        print(f"  {turn + 1}/{runs} one block: {times}", file=sys.stderr)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = medians["PEFT"] / medians["loratool"]
    if not apart < 1e-4:
        sys.exit(f"PEFT and loratool do not agree: {apart:.2g}")
    print(
        f"\nOne block (7 linear layers) of the 1B, two adapters of rank {rank}, `svd` to rank "
        f"{rank}, medians of {runs}: PEFT {medians['PEFT']:.1f} s, loratool "
        f"{medians['loratool'] * 1e3:.0f} ms from file to file, {ratio:,.0f} times less. The "
        f"results differ by {apart:.1g}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3, help="of each contender (3)")
    parser.add_argument("--only-peft", action="store_true", help="nothing but PEFT's block")
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT's block out")
    parser.add_argument("--work", type=Path, help="keep the adapters here and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print(machine(work))
        if args.only_peft:
            one_layer(work, 16, args.runs)
            return
        print(f"medians of {args.runs} runs; A and B: rank 16 on the 112 linear layers of a 1B\n")
        a, b = (make(work / f"1B-r16-{s}", "1B", 16, s) for s in (1, 2))
        big, out = make(work / "8B-r256", "8B", 256, 3), work / "out"
        entries = contenders(a, b, big, out)
        race(entries, out, args.runs)
        print_runs(entries)
        more = [make(work / f"1B-r16-{s}-64-layers", "1B", 16, s, layers=64) for s in (1, 2)]
        peaks: list[Run] = []
        for pair in ([a, b], more):
            shutil.rmtree(out, ignore_errors=True)
            command = [*LORATOOL, "combine", *map(str, pair), "-o", str(out), "-q"]
            peaks.append(run(command))
        print(
            f"\nMemory: {peaks[0].peak / 1e6:.0f} MB for 112 modules, {peaks[1].peak / 1e6:.0f} MB "
            "for 448."
        )
        if not args.no_peft:
            one_layer(work, 16, args.runs)


if __name__ == "__main__":
    main()
