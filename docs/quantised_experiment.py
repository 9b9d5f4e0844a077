"""Which base is right for a QLoRA adapter? One is trained with bitsandbytes and merged in all ways.

    python docs/quantised_experiment.py       # two minutes; prints the tables of docs/quantised.md

Needs the extras `test` and `quantised`. The base is `fixtures/base`, a small Llama that knows
English. It is quantised to NF4 with nested scales, and an adapter of rank 8 is trained by PEFT on
the NF4 model with Python code: once briefly, once for longer. Losses are on `fixtures/heldout.txt`,
other code; KL is from the trained model's next byte to the merged one's, the mean over these bytes.

Models are loaded anew for every measurement, and never leave training mode (there is no dropout):
on some processors bitsandbytes (0.50.2) packs the weights anew in the first forward pass outside of
it, and what is read of them afterwards is garbage.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers

import loratool

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
from make import (  # noqa: E402
    CODE_MODULES,
    CONTEXT,
    LINEAR_LAYERS,
    module_source,
    next_byte_loss,
    to_ids,
)

Model = torch.nn.Module
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def quantise(source: Path, folder: Path) -> Path:
    """A model quantised to NF4 as QLoRA does it, from the dtype it is stored in, and saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", quantization_config=transformers.BitsAndBytesConfig(**NF4)
    )
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> Model:
    """A stored model, whose arithmetic is in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():  # of a quantised one, transformers keeps the stored dtype
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model.train()


def adapted(base: Path, adapter: Path) -> Model:
    return peft.PeftModel.from_pretrained(load(base), adapter).train()


def train_adapter(base: Path, folder: Path, steps: int, rate: float) -> Path:
    """An adapter of rank 8 on all linear layers, trained on the NF4 model."""
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(load(base), config)
    ids = to_ids("\n".join(module_source(name) for name in CODE_MODULES))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        starts = torch.randint(len(ids) - CONTEXT, (4, 1))
        loss = next_byte_loss(model, ids[starts + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def predictions(model: Model) -> tuple[float, torch.Tensor]:
    """The loss on the held-out text in nats per byte, and log-probabilities of every next byte."""
    ids = to_ids((FIXTURES / "heldout.txt").read_text(encoding="utf-8"))[: 64 * CONTEXT + 1]
    windows = ids.unfold(0, CONTEXT + 1, CONTEXT)
    logits = [model(input_ids=part[:, :-1], use_cache=False).logits for part in windows.split(8)]
    found = torch.cat(logits).float().log_softmax(-1)
    loss = -found.gather(-1, windows[:, 1:, None]).mean()
    return loss.item(), found


@dataclass
class Way:
    """A way to deploy an adapter; `build` makes its model."""

    name: str
    build: Callable[[], Model]


def measure(ways: list[Way]) -> list[tuple[str, float, float]]:
    """Name, loss, and KL from the first one to each."""
    rows: list[tuple[str, float, float]] = []
    trained = None
    for way in ways:
        loss, found = predictions(way.build())
        trained = found if trained is None else trained
        kl = (trained.exp() * (trained - found)).sum(-1).mean().item()
        rows.append((way.name, loss, kl))
        gc.collect()
    return rows


def ways(plain: Path, nf4: Path, adapter: Path, room: Path) -> list[Way]:
    """What may become of an adapter that was trained on `nf4`, quantised from `plain`."""
    room.mkdir()
    onto_nf4, onto_plain = room / "onto_nf4", room / "onto_plain"
    loratool.merge(nf4, adapter, onto_nf4)
    loratool.merge(plain, adapter, onto_plain)
    return [
        Way("nothing: the adapter on NF4, as trained", lambda: adapted(nf4, adapter)),
        Way("dequantised NF4, float16", lambda: load(onto_nf4)),
        Way("16-bit original, float16", lambda: load(onto_plain)),
        Way("dequantised NF4, then NF4 again",
            lambda: load(quantise(onto_nf4, room / "onto_nf4_again"))),
        Way("16-bit original, then NF4", lambda: load(quantise(onto_plain, room / "plain_nf4"))),
        Way("NF4 by PEFT's `merge_and_unload`", lambda: adapted(nf4, adapter).merge_and_unload()),
        Way("no adapter: NF4", lambda: load(nf4)),
        Way("no adapter: 16-bit original", lambda: load(plain)),
    ]  # fmt: skip


def size(nf4: Path, adapter: Path) -> float:
    """‖Δ‖/‖W‖ over all adapted weights."""
    modules = loratool.inspect(adapter, base=nf4).to_dict()["modules"]
    delta = sum(module["delta_norm"] ** 2 for module in modules)
    whole = sum((module["delta_norm"] / module["relative_norm"]) ** 2 for module in modules)
    return (delta / whole) ** 0.5


def left_out(plain: Path, nf4: Path, room: Path) -> float:
    """‖W₁₆ − W₄‖/‖W₁₆‖ over all weights that were quantised."""
    loratool.dequantise(nf4, room / "dequantised", dtype="float32")
    original, opened = load(plain).state_dict(), load(room / "dequantised").state_dict()
    names = [name for name in opened if "_proj" in name]
    error = sum((original[name] - opened[name]).square().sum().item() for name in names)
    return (error / sum(original[name].square().sum().item() for name in names)) ** 0.5


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    plain = FIXTURES / "base"
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        nf4 = quantise(plain, room / "nf4")
        print(f"NF4 leaves out {left_out(plain, nf4, room):.1%} of the weights")
        for label, steps, rate in (("brief", 60, 3e-4), ("long", 150, 5e-3)):
            adapter = train_adapter(nf4, room / f"adapter_{label}", steps, rate)
            share = size(nf4, adapter)
            print(f"\n{label}: ‖Δ‖/‖W‖ = {share:.2f}\n\n| merged into | loss | KL |\n|---|---|---|")
            for name, loss, kl in measure(ways(plain, nf4, adapter, room / label)):
                print(f"| {name} | {loss:.4f} | {kl:.1e} |", flush=True)


if __name__ == "__main__":
    main()
