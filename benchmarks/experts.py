"""Time a merge into experts against one into a dense model of the same matrices. Prints Markdown.

One layer with 128 experts of Qwen3-235B's or gpt-oss-120b's shape is made in three forms: a tensor
per expert, one stack of them all, and the same matrices as layers of a dense model, with an adapter
of the same rank and the same number of values for each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import Contender, machine, print_table, race, run, size_of

EXPERTS = 128


@dataclass(frozen=True)
class Shape:
    """A layer of experts: hidden size, intermediate size, and whether matrices are `[in, out]`."""

    model_type: str
    hidden: int
    inner: int
    transposed: bool


SHAPES = {
    "qwen3-235b": Shape("qwen3_moe", 4096, 1536, False),
    "gpt-oss-120b": Shape("gpt_oss", 2880, 2880, True),
}
FORMS = ("dense", "experts", "stack")


def base_shapes(shape: Shape, form: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a base in one of the forms."""
    hidden, inner = shape.hidden, shape.inner
    if form == "stack":
        both, down = (2 * inner, hidden), (hidden, inner)
        if shape.transposed:
            both, down = both[::-1], down[::-1]
        prefix = "model.layers.0.mlp.experts"
        return {
            f"{prefix}.gate_up_proj": (EXPERTS, *both),
            f"{prefix}.down_proj": (EXPERTS, *down),
        }
    tensors: dict[str, tuple[int, ...]] = {}
    for i in range(EXPERTS):
        path = f"model.layers.{i}.mlp" if form == "dense" else f"model.layers.0.mlp.experts.{i}"
        tensors[f"{path}.gate_proj.weight"] = (inner, hidden)
        tensors[f"{path}.up_proj.weight"] = (inner, hidden)
        tensors[f"{path}.down_proj.weight"] = (hidden, inner)
    return tensors


def adapter_shapes(shape: Shape, form: str, rank: int) -> dict[str, tuple[int, int]]:
    """The factors for it, as PEFT stores them."""
    if form == "dense":
        return {
            f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight": size
            for name, (out, width) in base_shapes(shape, form).items()  # type: ignore[misc]
            for side, size in (("A", (rank, width)), ("B", (out, rank)))
        }
    many = EXPERTS * rank
    prefix = "base_model.model.model.layers.0.mlp.experts"
    return {
        f"{prefix}.base_layer.lora_A.weight": (many, shape.hidden),
        f"{prefix}.base_layer.lora_B.weight": (2 * shape.inner, many),
        f"{prefix}.lora_A.weight": (many, shape.inner),
        f"{prefix}.lora_B.weight": (shape.hidden, many),
    }


def make_base(folder: Path, shape: Shape, form: str) -> None:
    """Write a base of random values, tensor by tensor."""
    import torch

    from loratool.storage.header import build_header

    tensors = base_shapes(shape, form)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(build_header([(n, "BF16", s) for n, s in tensors.items()], {"format": "pt"}))
        for size in tensors.values():
            for _ in range(size[0] if len(size) == 3 else 1):
                values = torch.empty(size[-2:], dtype=torch.bfloat16)
                values.normal_(0, 0.02, generator=generator)
                file.write(values.view(torch.uint8).numpy().tobytes())
    kind = "llama" if form == "dense" else shape.model_type
    config = {"model_type": kind, "hidden_size": shape.hidden, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, shape: Shape, form: str, rank: int) -> None:
    """Write an adapter whose factors have the standard deviation 0.01."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: (0.01 * torch.randn(size, generator=generator)).bfloat16()
        for name, size in adapter_shapes(shape, form, rank).items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "peft_version": "0.21.2",
        "target_modules": ["gate_proj", "up_proj", "down_proj"] if form == "dense" else [],
        "target_parameters": None if form == "dense" else parameters,
        "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (16)")
    parser.add_argument("--runs", type=int, default=3, help="of each contender (3)")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-235b", help="of the layer")
    parser.add_argument("--work", type=Path, help="keep the models here and use them again")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    # Experts of gpt-oss are published as stacks only.
    forms = [form for form in FORMS if form != "experts" or not shape.transposed]
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        entries, places = [], {"output": work / "output"}
        for form in forms:
            base, adapter = work / f"{args.shape}-{form}", work / f"{args.shape}-{form}-lora"
            script = [sys.executable, str(Path(__file__).resolve()), "--make"]
            if not base.exists():
                run([*script, "base", str(base), args.shape, form])
            if not adapter.exists():
                run([*script, "adapter", str(adapter), args.shape, form, str(args.rank)])
            places |= {f"{form}_base": base, f"{form}_lora": adapter}
            inputs = [f"{{{form}_base}}", f"{{{form}_lora}}"]
            command = [sys.executable, "-m", "loratool", "merge", *inputs]
            label = {"dense": "dense layers", "experts": "a tensor per expert", "stack": "stacks"}
            entries.append(
                Contender(label[form], [*command, "-o", "{output}", "--dtype", "bfloat16"])
            )
        print(machine(work))
        base = places[f"{forms[0]}_base"]
        race(entries, {"base": base, **places}, args.runs)
        print(
            f"\nOne layer of {args.shape}: {EXPERTS} experts, {size_of(base) / 1e9:.2f} GB, "
            f"rank {args.rank}. {args.runs} runs.\n"
        )
        print_table(entries, "dense")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        _, _, what, folder, name, form, *rank = sys.argv
        if what == "base":
            make_base(Path(folder), SHAPES[name], form)
        else:
            make_adapter(Path(folder), SHAPES[name], form, int(rank[0]))
    else:
        main()
