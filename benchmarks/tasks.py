"""How methods of combining do on three trained adapters: losses on held-out texts of their tasks.

The adapters are those of fixtures/ (see fixtures/tasks.py): Python code, HTML, character tables.
Each method is called as a user would, its result loaded by PEFT. Prints Markdown.
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
ADAPTERS = [FIXTURES / "adapter", FIXTURES / "tasks" / "html", FIXTURES / "tasks" / "tables"]
TEXTS = [FIXTURES / "heldout.txt", *(FIXTURES / "tasks" / f"{n}.txt" for n in ("html", "tables"))]

#: What a table's line is called, and the options of `combine`.
HALF = {"weights": [0.5] * 3}
PRUNED = {"density": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "`sum`": {},
    "`sum`, weights 0.5": HALF,
    "`sum --rank 8`, weights 0.5": {"rank": 8, **HALF},
    "`sum --rank 4`, weights 0.5": {"rank": 4, **HALF},
    "`linear`": {"method": "linear"},
    "`linear`, weights 0.5": {"method": "linear", **HALF},
    "`ties`": {"method": "ties", **PRUNED},
    "`ties_svd`": {"method": "ties_svd", **PRUNED},
    "`dare_linear_svd`, weights 0.5": {"method": "dare_linear_svd", **PRUNED, **HALF},
    "`ties_core`": {"method": "ties_core", **PRUNED},
    "`ties_core`, weights 0.5": {"method": "ties_core", **PRUNED, **HALF},
    "`dare_linear_core`, weights 0.5": {"method": "dare_linear_core", **PRUNED, **HALF},
    "`knots_ties`": {"method": "knots_ties", **PRUNED},
    "`knots_ties`, weights 0.5": {"method": "knots_ties", **PRUNED, **HALF},
    "`tsv_m`": {"method": "tsv_m"},
    "`tsv_m`, weights 0.5": {"method": "tsv_m", **HALF},
    "`iso_c`": {"method": "iso_c"},
    "`iso_c`, weights 0.5": {"method": "iso_c", **HALF},
}


def losses(adapter: Path | None) -> list[float]:
    model: torch.nn.Module = load(FIXTURES / "base")
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return [heldout_loss(model, text.read_text(encoding="utf-8")) for text in TEXTS]


def show(name: str, rank: str, found: list[float]) -> None:
    mean = sum(found) / len(found)
    print(f"| {name} | {rank} | " + " | ".join(f"{x:.3f}" for x in [*found, mean]) + " |")


def main() -> None:
    torch.set_num_threads(2)
    print("| adapter | rank | code | html | tables | mean |\n|---|--:|--:|--:|--:|--:|")
    show("none (base)", "–", losses(None))
    for name, adapter in zip(("code", "html", "tables"), ADAPTERS, strict=True):
        ranks = {m.rank for m in loratool.inspect(adapter).modules}
        show(f"{name} alone", str(max(ranks)), losses(adapter))
    with tempfile.TemporaryDirectory() as temporary:
        for name, options in WAYS.items():
            out = Path(temporary) / "out"
            report = loratool.combine(ADAPTERS, out, overwrite=True, **options)
            show(name, str(report.rank), losses(out))


if __name__ == "__main__":
    main()
