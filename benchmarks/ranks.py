"""How much of the fixtures' fine-tune an extracted adapter holds, by rank: error, loss and size.

Each adapter is extracted as a user would, and loaded by PEFT on the base. Prints Markdown.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import loratool

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "fixtures"))

from make import heldout_loss, load  # noqa: E402

FIXTURES = ROOT / "fixtures"
TEXT = (FIXTURES / "heldout.txt").read_text(encoding="utf-8")

#: What a table's line is called, and the options of `extract`.
WAYS: dict[str, dict[str, Any]] = {
    **{f"`--rank {rank}`": {"rank": rank} for rank in (1, 2, 4, 8, 16, 32, 64, 128)},
    "`--energy 0.5`": {"energy": 0.5},
    "`--energy 0.9`": {"energy": 0.9},
    "`--energy 0.9 --patterns`": {"energy": 0.9, "patterns": True},
    "`--budget 167kB`": {"budget": "167kB"},
    "`--budget 167kB --patterns`": {"budget": "167kB", "patterns": True},
    "`--budget 322kB --patterns`": {"budget": "322kB", "patterns": True},
    "`--rank 16 --save norms`": {"rank": 16, "save": ["norms"]},
    "`--rank 16 --embeddings`": {"rank": 16, "embeddings": True},
}


def main() -> None:
    torch.set_num_threads(2)
    base, tuned = (heldout_loss(load(FIXTURES / n), TEXT) for n in ("base", "tuned"))
    print("| | ranks | file | held | error | loss | way to tuned |\n|---|--:|--:|--:|--:|--:|--:|")
    print(f"| base | – | – | 0 % | 100 % | {base:.3f} | 0 % |")
    with tempfile.TemporaryDirectory() as temporary:
        for name, options in WAYS.items():
            out = Path(temporary) / "out"
            report = loratool.extract(
                FIXTURES / "base", FIXTURES / "tuned", out, overwrite=True, **options
            )
            model = PeftModel.from_pretrained(load(FIXTURES / "base"), out).eval()
            loss = heldout_loss(model, TEXT)
            ranks = sorted(module.rank or 0 for module in report.modules)
            span = f"{ranks[0]}–{ranks[-1]}" if ranks[0] < ranks[-1] else str(ranks[0])
            print(
                f"| {name} | {span} | {report.bytes_written / 1000:.0f} kB "
                f"| {report.held or 0:.1%} | {report.error or 0:.1%} | {loss:.3f} "
                f"| {(base - loss) / (base - tuned):.0%} |"
            )
    print(f"| tuned | – | {report.bytes_tuned / 1000:.0f} kB | 100 % | 0 % | {tuned:.3f} | 100 % |")


if __name__ == "__main__":
    main()
