"""Time `merge --reversible`, `verify` and `unmerge` against a plain merge; weigh the undo file.

The delta has 2 % of the weights' standard deviation. Prints Markdown.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import (
    Contender,
    machine,
    make_adapter,
    make_base,
    print_table,
    race,
    size_of,
)

LORATOOL = [sys.executable, "-m", "loratool"]

#: Weights have a standard deviation of 0.02 and the adapter's scale is 2, so for rank r factors of
#: this deviation, squared and summed r times, give a delta of 2 % of that.
DELTA = 0.02 * 0.02


def contenders() -> list[Contender]:
    merge = [*LORATOOL, "merge", "{base}", "{adapter}", "-o", "{output}", "--dtype"]
    unmerge, output = [*LORATOOL, "unmerge"], ["{adapter}", "-o", "{output}"]
    check = [*LORATOOL, "verify"]
    return [
        Contender("`merge --dtype float16`", [*merge, "float16"]),
        Contender("`merge --dtype float16 --reversible`", [*merge, "float16", "--reversible"]),
        Contender("`unmerge`, float16", [*unmerge, "{float16}", *output]),
        Contender("`verify`, float16", [*check, "{float16}", "--base", "{base}", "{adapter}"]),
        Contender("`merge --dtype base`", [*merge, "base"]),
        Contender("`merge --dtype base --reversible`", [*merge, "base", "--reversible"]),
        Contender("`unmerge`, base dtype", [*unmerge, "{bfloat16}", *output]),
        Contender("`verify`, base dtype", [*check, "{bfloat16}", "--base", "{base}", "{adapter}"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=3.0, help="of the base in GB (3.0)")
    parser.add_argument("--shards", type=int, default=4, help="files of the base (4)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (16)")
    parser.add_argument("--runs", type=int, default=3, help="of each contender (3)")
    parser.add_argument("--work", type=Path, help="keep the models here and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print(machine(work))
        base = work / f"base-{args.size:g}GB-{args.shards}"
        adapter = work / f"adapter-{args.size:g}GB-r{args.rank}-2percent"
        if not base.exists():
            make_base(base, args.size, args.shards)
        if not adapter.exists():
            make_adapter(adapter, args.size, args.rank, (DELTA / (2 * args.rank**0.5)) ** 0.5)
        places = {"base": base, "adapter": adapter, "output": work / "output"}
        for dtype, option in (("float16", "float16"), ("bfloat16", "base")):
            places[dtype] = work / f"merged-{dtype}"
            shutil.rmtree(places[dtype], ignore_errors=True)
            command = [*LORATOOL, "merge", base, adapter, "-o", places[dtype], "--reversible"]
            subprocess.run([*command, "--dtype", option], check=True, capture_output=True)
            undo, whole = size_of(places[dtype] / "loratool"), size_of(places[dtype])
            share = undo / (whole - undo)
            print(f"\nUndo file of {dtype}: {undo / 1e6:.1f} MB, {share:.2%} of the merged bytes.")
        entries = contenders()
        race(entries, places, args.runs)
        print(f"\nBase: {size_of(base) / 1e9:.2f} GB bfloat16. {args.runs} runs.\n")
        for four in (entries[:4], entries[4:]):
            print_table(four, "plain merge")
            print()


if __name__ == "__main__":
    main()
