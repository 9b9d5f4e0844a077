"""What the benchmarks share: a Llama-shaped checkpoint made up here, and fair races.

The checkpoint is bfloat16 of the size asked for, the adapter a float32 LoRA on all seven linear
layers. Every contender is a process of its own; they take turns, each starting with its inputs in
the page cache and nothing left to flush. Peak memory is what the kernel reports for that process
(ru_maxrss).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

# This process imports nothing large: a child's ru_maxrss starts at the size of its parent.

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 2048, 8192, 32, 8
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = ("input_layernorm", "post_attention_layernorm")

Shapes = dict[str, tuple[int, ...]]


def bfloat16_bytes(shape: tuple[int, ...]) -> int:
    size = 2
    for n in shape:
        size *= n
    return size


def model_shapes(gigabytes: float) -> tuple[int, int, Shapes]:
    """Layers, vocabulary and tensors of the model nearest to this size in bfloat16."""
    vocabulary = 128_256 if gigabytes >= 1.5 else 8_016
    layer = sum(map(bfloat16_bytes, LINEARS.values()))
    layers = max(1, round((gigabytes * 1e9 - 4 * vocabulary * HIDDEN) / layer))
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, HIDDEN)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": (HIDDEN,) for name in NORMS}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LINEARS.items()}
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocabulary, HIDDEN)}
    return layers, vocabulary, shapes


def make_base(folder: Path, gigabytes: float, shards: int) -> None:
    """Write the checkpoint, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    layers, vocabulary, shapes = model_shapes(gigabytes)
    total, done = sum(map(bfloat16_bytes, shapes.values())), 0
    groups: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault(done * shards // total, []).append(name)
        done += bfloat16_bytes(shape)
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    folder.mkdir(parents=True)
    for number, names in enumerate(groups.values(), 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        data = {n: torch.empty(shapes[n], dtype=torch.bfloat16) for n in names}
        for tensor in data.values():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.02, generator=generator)
            else:
                tensor.fill_(1)
        save_file(data, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def make_adapter(folder: Path, gigabytes: float, rank: int, deviation: float = 0.01) -> None:
    """Write an adapter whose factors have this standard deviation; its scale is 2."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for i in range(model_shapes(gigabytes)[0]):
        for name, (rows, columns) in LINEARS.items():
            path = f"base_model.model.model.layers.{i}.{name}"
            for half, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                values = torch.randn(shape, generator=generator)
                tensors[f"{path}.{half}.weight"] = deviation * values
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": [name.rpartition(".")[2] for name in LINEARS], "bias": "none",
        "base_model_name_or_path": "base", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass
class Run:
    """Wall and processor seconds, and peak resident bytes, of one process."""

    seconds: float
    cpu: float
    peak: int


def run(command: list[str], own_clock: bool = False) -> Run:
    """Run a command; with `own_clock` the last line it prints is its time."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed ({process.returncode}):\n{text}")
    if own_clock:
        seconds = float(text.split()[-1])
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


@dataclass
class Contender:
    """`command` gets base, adapter and output appended by name: {base}, {adapter}, {output}."""

    label: str
    command: list[str]
    own_clock: bool = False
    runs: list[Run] = field(default_factory=list)
    moved: int = 0

    @property
    def median(self) -> float:
        return statistics.median(r.seconds for r in self.runs)


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def race(entries: list[Contender], places: dict[str, Path], runs: int) -> None:
    """Let the contenders take turns, after a copy that nobody times."""
    output = places["output"]
    shutil.rmtree(output, ignore_errors=True)
    subprocess.run(["cp", "-r", str(places["base"]), str(output)], check=True)
    for turn in range(runs):
        for entry in entries:
            shutil.rmtree(output, ignore_errors=True)
            read = [
                folder
                for name, folder in places.items()
                if name != "output" and f"{{{name}}}" in entry.command
            ]
            for folder in read:
                subprocess.run(["sh", "-c", 'cat "$0"/*.* > /dev/null', str(folder)], check=True)
            os.sync()
            command = [part.format_map(places) for part in entry.command]
            entry.runs.append(run(command, entry.own_clock))
            entry.moved = sum(map(size_of, [*read, output]))
            print(f"  {turn + 1}/{runs} {entry.label}: {entry.runs[-1]}", file=sys.stderr)
    shutil.rmtree(output, ignore_errors=True)


def print_table(entries: list[Contender], unit: str = "`cp`") -> None:
    """Print the runs; times are set against the first contender's, which is called `unit`."""
    print(f"| contender | median s | min–max s | × {unit} | CPU s | peak MB | GB/s |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for entry in entries:
        seconds = [r.seconds for r in entry.runs]
        cpu = statistics.median(r.cpu for r in entry.runs)
        print(
            f"| {entry.label} | {entry.median:.2f} | {min(seconds):.2f}–{max(seconds):.2f} "
            f"| {entry.median / entries[0].median:.2f} | {cpu:.1f} "
            f"| {max(r.peak for r in entry.runs) / 1e6:.0f} "
            f"| {entry.moved / entry.median / 1e9:.2f} |"
        )


def machine(work: Path) -> str:
    cpu, memory = platform.processor() or platform.machine(), 0
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((s.partition(":")[2].strip() for s in lines if s.startswith("model name")), cpu)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    columns = subprocess.run(["df", "-T", str(work)], capture_output=True, text=True).stdout
    kind = columns.splitlines()[1].split()[1] if columns else "unknown"
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB memory, {kind}; "
        f"Python {platform.python_version()}, torch {version('torch')}; {date.today()}"
    )
