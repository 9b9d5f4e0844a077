"""Time conversions of a 200 MB adapter, and a look into it. Prints Markdown.

The adapter is a float32 LoRA on all linear layers of a Llama-shaped model. It goes to every dialect
that loratool writes, and from there back to PEFT; `inspect` reads it with norms. Every run is a
process of its own with its inputs in the page cache; a conversion reads its output again and hashes
both files.
"""

from __future__ import annotations

import argparse
import json
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
    model_shapes,
    print_table,
    race,
)

TARGETS = ("peft", "mlx", "gguf", "litgpt", "torchtune")
#: The size of the base that the adapter is for, from which its layers follow.
GIGABYTES, RANK = 2.4, 104


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="of each contender (5)")
    parser.add_argument("--work", type=Path, help="keep base and adapter here and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        places = {name: work / name for name in ("base", "adapter", "output")}
        if not places["adapter"].exists():
            make_adapter(places["adapter"], GIGABYTES, RANK)
        if not places["base"].exists():
            make_base(places["base"], GIGABYTES / 100, 1)  # only its config is read
            config = places["base"] / "config.json"
            said = json.loads(config.read_text())
            said["num_hidden_layers"] = model_shapes(GIGABYTES)[0]
            config.write_text(json.dumps(said))
        print(machine(work), file=sys.stdout)
        loratool = [sys.executable, "-m", "loratool"]
        entries = [
            Contender("`cp -r`", ["cp", "-r", "{adapter}", "{output}"]),
            Contender("inspect", [*loratool, "inspect", "{adapter}", "--json"]),
        ]
        label = [*loratool, "convert", "{adapter}", "--set-metadata", "a=b", "-o", "{output}", "-q"]
        entries.append(Contender("--set-metadata", label))
        for target in TARGETS:
            command = [*loratool, "convert", "{adapter}", "--to", target, "-o", "{output}", "-q"]
            if target == "peft":
                command += ["--dtype", "bfloat16"]
            if target in ("gguf", "torchtune", "litgpt"):
                command += ["--base", "{base}"]
            label = "to peft, bfloat16" if target == "peft" else f"to {target}"
            entries.append(Contender(label, command))
        for target in TARGETS[1:]:
            folder = work / target
            if not folder.exists():
                subprocess.run(
                    [*loratool, "convert", str(places["adapter"]), "--to", target, "--base",
                     str(places["base"]), "-o", str(folder), "-q"], check=True,
                )  # fmt: skip
            places[target] = folder
            entries.append(Contender(f"{target} to peft", [
                *loratool, "convert", f"{{{target}}}", "--to", "peft", "--base", "{base}",
                "-o", "{output}", "-q"]))  # fmt: skip
        race(entries, places, args.runs)
        print_table(entries)
        if args.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
