"""Time `loratool merge` against `cp -r` and PEFT. Prints Markdown."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import (
    Contender,
    machine,
    make_adapter,
    make_base,
    model_shapes,
    print_table,
    race,
    run,
    size_of,
)


def merge_with_peft(base: str, adapter: str, output: str, dtype: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


def merge_warm(base: str, adapter: str, output: str, dtype: str) -> None:
    """The library call alone, everything imported; prints its seconds."""
    import loratool.merging.executor  # noqa: F401, with torch
    from loratool import merge

    print(merge(base, adapter, output, dtype=dtype).seconds)


def step(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--step", name, *arguments]


def contenders(peft: bool) -> Iterator[Contender]:
    files = ["{base}", "{adapter}", "{output}"]
    yield Contender("`cp -r`", ["cp", "-r", "{base}", "{output}"])
    copy_and_flush = 'cp -r "$0" "$1" && sync "$1"/*'
    yield Contender("`cp -r`, then `fsync`", ["sh", "-c", copy_and_flush, "{base}", "{output}"])
    for dtype in ("float16", "base"):
        command = [sys.executable, "-m", "loratool", "merge", "{base}", "{adapter}"]
        yield Contender(
            f"`loratool merge --dtype {dtype}`", [*command, "-o", "{output}", "--dtype", dtype]
        )
    yield Contender("`loratool.merge()`, float16, torch imported", step("warm", *files), True)
    if peft:
        for dtype in ("float16", "bfloat16"):
            yield Contender(f"PEFT `merge_and_unload`, {dtype}", step("peft", *files, dtype))


def print_small(adapter: Path, runs: int) -> None:
    """The commands that should feel instant, beside what any Python process costs."""
    loratool = [sys.executable, "-m", "loratool"]
    entries = [
        Contender("`python -c pass`", [sys.executable, "-c", "pass"]),
        Contender("`python -c 'import torch'`", [sys.executable, "-c", "import torch"]),
        Contender("`loratool --help`", [*loratool, "--help"]),
        Contender("`loratool inspect`", [*loratool, "inspect", str(adapter)]),
    ]
    print("\n| command | median s | min–max s | peak MB |\n|---|--:|--:|--:|")
    for entry in entries:
        entry.runs = [run(entry.command) for _ in range(runs)]
        seconds = [r.seconds for r in entry.runs]
        print(
            f"| {entry.label} | {entry.median:.2f} | {min(seconds):.2f}–{max(seconds):.2f} "
            f"| {max(r.peak for r in entry.runs) / 1e6:.0f} |"
        )


def benchmark(
    work: Path, gigabytes: float, entries: list[Contender], args: argparse.Namespace
) -> Path:
    """Make what is missing in `work`, race, print the table; returns the adapter."""
    base = work / f"base-{gigabytes:g}GB-{args.shards}"
    adapter = work / f"adapter-{gigabytes:g}GB-r{args.rank}"
    if not base.exists():
        run(step("base", str(base), str(gigabytes), str(args.shards)))
    if not adapter.exists():
        run(step("adapter", str(adapter), str(gigabytes), str(args.rank)))
    race(entries, {"base": base, "adapter": adapter, "output": work / "output"}, args.runs)
    layers, vocabulary, shapes = model_shapes(gigabytes)
    print(
        f"\nBase: {size_of(base) / 1e9:.2f} GB bfloat16, {layers} layers, {len(shapes)} tensors, "
        f"vocabulary {vocabulary}, {len(list(base.glob('*.safetensors')))} shards. "
        f"Adapter: rank {args.rank}, {size_of(adapter) / 1e6:.0f} MB. {args.runs} runs.\n"
    )
    print_table(entries)
    return adapter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=3.0, help="of the base in GB (3.0)")
    parser.add_argument("--shards", type=int, default=4, help="files of the base (4)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (16)")
    parser.add_argument("--runs", type=int, default=3, help="of each contender (3)")
    parser.add_argument("--double", action="store_true", help="a base twice as large, too")
    parser.add_argument("--no-peft", action="store_true", help="leave out PEFT")
    parser.add_argument("--work", type=Path, help="keep the models here and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print(machine(work))
        entries = list(contenders(not args.no_peft))
        adapter = benchmark(work, args.size, entries, args)
        if args.double:
            benchmark(work, 2 * args.size, list(contenders(peft=False)), args)
        print_small(adapter, 7)


STEPS = {
    "base": lambda folder, size, shards: make_base(Path(folder), float(size), int(shards)),
    "adapter": lambda folder, size, rank: make_adapter(Path(folder), float(size), int(rank)),
    "peft": merge_with_peft,
    "warm": lambda *files: merge_warm(*files, dtype="float16"),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        STEPS[sys.argv[2]](*sys.argv[3:])
    else:
        main()
