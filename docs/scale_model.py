"""What very large models take, as a model of measured stages.

    python docs/scale_model.py                    # prints the tables of docs/scale.md
    python docs/scale_model.py --write            # puts them there
    python docs/scale_model.py --measure FOLDER   # measures the rates again; takes 8 GB there

A run reads, computes and writes in its worker threads, and hashes what it writes in one more;
all of that goes on side by side, so it takes as long as its slowest stage. `RATES` are measured,
`DISKS` are assumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from loratool.streams.shares import share  # noqa: E402

#: Measured by `--measure`: what was done → bytes of the input that one core takes in a second, and
#: for the hash bytes of the output. Processor time, the best of the runs.
RATES = {"merge": 0.27e9, "dequantise": 0.086e9, "keep": 0.40e9, "hash": 2.2e9}
MEASURED = """
Measured on 2026-11-29 by `--measure` on an AMD EPYC with 2 cores and 25 GB memory, which was
shared with much other work; files in memory (tmpfs), Python 3.11.7, torch 2.13.0+cpu. Processor
time without the hash, bases of 1 GB less those of 0.25 GB, two threads, the better of 2 runs; with
one thread 2 to 20 % from that, and 3 to 21 % slower with more other work. Rates are in bytes of the
base, that of the hash in bytes written. On a quieter day the same stages of a merge took a third of
the time (4.0 CPU s for 3 GB without the hash, [performance.md](performance.md)), so "compute" is on
the safe side.
""".strip()

MARKS = ("<!-- model:begin -->", "<!-- model:end -->")


@dataclass(frozen=True)
class Disk:
    """Where base and output lie: bytes a second of one machine, and of all of them together."""

    name: str
    read: float
    write: float
    together: float = inf


LAPTOP = Disk("a laptop's NVMe", 2.5e9, 1.5e9)
SERVER = Disk("a server's NVMe", 6e9, 4e9)
NETWORK = Disk("a network file system", 1e9, 1e9, 10e9)


@dataclass(frozen=True)
class Work:
    """A base, and what is made of it. `rate` names the entry of RATES."""

    name: str
    rate: str
    read: float
    written: float
    shards: int


#: 70B and 405B are Llama 3's: 70.55 and 405.85 billion values of two bytes in 30 and 191 files.
#: 1T is Kimi K2's form: INT4 in groups of 32 with a bfloat16 scale each, 4.5 bits a value.
WORKS = (
    Work("70B, bfloat16: `merge`", "merge", 141.1e9, 141.1e9, 30),
    Work("405B, bfloat16: `merge`", "merge", 811.7e9, 811.7e9, 191),
    Work("1T, INT4: `merge`, kept", "keep", 600e9, 600e9, 60),
    Work("1T, INT4: `dequantise`", "dequantise", 600e9, 600e9 * 16 / 4.5, 60),
)


@dataclass(frozen=True)
class Place:
    """Machines, each with its cores and as many processes as there are `workers` on it."""

    name: str
    disk: Disk
    cores: int
    machines: int = 1
    workers: int = 1


PLACES = (
    Place("laptop, 2 cores", LAPTOP, 2),
    Place("server, 16 cores", SERVER, 16),
    Place("server, 64 cores", SERVER, 64),
    Place("the same, 8 workers", SERVER, 64, workers=8),
    Place("8 workers of 16 cores, network", NETWORK, 16, machines=8),
)


def stages(work: Work, place: Place) -> dict[str, float]:
    """Seconds of each stage by itself, where the machine with most to do is the one that counts."""
    count = place.machines * place.workers
    sizes = {f"{n:05}": 1 for n in range(work.shards)}
    loads = [len(share(sizes, number, count)) / work.shards for number in range(1, count + 1)]
    worker = max(loads)  # the part of all that the fullest worker has
    machine = max(sum(loads[first :: place.machines]) for first in range(place.machines))
    disk = place.disk
    processor = work.read / RATES[work.rate] + work.written / RATES["hash"]
    return {
        "read": machine * work.read / disk.read,
        "compute": machine * processor / place.cores,
        "hash": worker * work.written / RATES["hash"],
        "write": machine * work.written / disk.write,
        "file system": (work.read + work.written) / disk.together,
    }


def limit(times: dict[str, float]) -> str:
    """The stage that takes longest."""
    return max(times, key=lambda name: times[name])


def in_words(seconds: float) -> str:
    """A time with the precision that a model has."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def size(number: float) -> str:
    return f"{number / 1e12:.2f} TB" if number >= 1e12 else f"{number / 1e9:.0f} GB"


def tables() -> str:
    """The section of docs/scale.md, as Markdown."""
    lines = [
        "| | read | written | files | one file |", "|---|--:|--:|--:|--:|",
        *(
            f"| {w.name} | {size(w.read)} | {size(w.written)} | {w.shards} "
            f"| {size(w.written / w.shards)} |"
            for w in WORKS
        ),
        "",
        "| | " + " | ".join(place.name for place in PLACES) + " |",
        "|---|" + "--:|" * len(PLACES),
    ]  # fmt: skip
    for work in WORKS:
        cells = []
        for place in PLACES:
            times = stages(work, place)
            cells.append(f"{in_words(max(times.values()))}, {limit(times)}")
        lines.append(f"| {work.name} | " + " | ".join(cells) + " |")
    disks = {place.disk.name: place.disk for place in PLACES}.values()
    assumed = ";\n".join(
        f"{d.name} {d.read / 1e9:g} GB/s read and {d.write / 1e9:g} GB/s written"
        + (f" by one machine, {d.together / 1e9:g} GB/s by all" if isfinite(d.together) else "")
        for d in disks
    )
    rates = {
        "merge": "merge of bfloat16 to float16, rank 16 on all linear layers",
        "keep": "merge into INT4 that is kept, rank 16 on q and v",
        "dequantise": "dequantise INT4 in groups of 32",
        "hash": "BLAKE3, one thread",
    }
    lines += [
        "",
        "| measured, per core | |", "|---|--:|",
        *(f"| {text} | {RATES[name] / 1e9:.2f} GB/s |" for name, text in rates.items()),
        "",
        MEASURED,
        "",
        f"Assumed of the disks: {assumed}.",
    ]  # fmt: skip
    return "\n".join(lines)


def whole(text: str) -> str:
    """The text of docs/scale.md with these tables."""
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n{tables()}\n{MARKS[1]}{after}"


# ---------------------------------------------------------------------------- measuring

#: One call in a process that has imported everything; prints wall and processor seconds.
CALL = """
import sys, time
import loratool, loratool.merging.executor
verb, threads, *rest = sys.argv[1:]
options = {"threads": int(threads), "overwrite": True}
if verb == "keep":
    options["quantised"] = "keep"
call = loratool.dequantise if verb == "dequantise" else loratool.merge
dtype = "bfloat16" if verb == "dequantise" else "base" if verb == "keep" else "float16"
wall, cpu = time.perf_counter(), time.process_time()
call(*rest[:-1], output=rest[-1], dtype=dtype, **options)
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def measure(work: Path, gigabytes: float, runs: int) -> None:
    """Print the rates of this machine. The parts of a small base are taken off as what a run takes
    whatever its size."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import machine

    work.mkdir(parents=True, exist_ok=True)
    print(machine(work))
    small = gigabytes / 4
    for total in (small, gigabytes):
        for step in ("plain", "int4", "adapter", "qv"):
            if not (work / f"{step}-{total:g}").exists():
                subprocess.run(
                    [sys.executable, __file__, "--make", step, str(total), str(work)],
                    check=True,
                )
    best: dict[tuple[str, int, float], tuple[float, float]] = {}
    inputs = {"merge": ("plain", "adapter"), "keep": ("int4", "qv"), "dequantise": ("int4",)}
    for _ in range(runs):
        for verb, names in inputs.items():
            for threads in (1, 2):
                for total in (small, gigabytes):
                    paths = [str(work / f"{name}-{total:g}") for name in names]
                    done = subprocess.run(
                        [sys.executable, "-c", CALL, verb, str(threads), *paths, str(work / "out")],
                        capture_output=True, text=True, check=True, cwd=ROOT,
                    )  # fmt: skip
                    wall, cpu = map(float, done.stdout.split()[-2:])
                    key = (verb, threads, total)
                    before = best.get(key, (inf, inf))
                    best[key] = (min(before[0], wall), min(before[1], cpu))
    speed = hash_rate()
    print(f"hash: {speed / 1e9:.2f} GB/s")
    for (verb, threads, total), (wall, cpu) in best.items():
        print(f"{verb}, {threads} threads, {total:g} GB: {wall:.2f} s, {cpu:.2f} CPU s")
    for verb, names in inputs.items():
        read = [_bytes(work / f"{names[0]}-{total:g}") for total in (small, gigabytes)]
        for threads in (1, 2):
            cpu = best[verb, threads, gigabytes][1] - best[verb, threads, small][1]
            took = read[1] - read[0]
            wrote = took * (16 / 4.5 if verb == "dequantise" else 1)
            print(
                f"{verb}, {threads} threads: {took / cpu / 1e9:.3f} GB/s of processor time, "
                f"{took / (cpu - wrote / speed) / 1e9:.3f} GB/s without the hash"
            )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def hash_rate() -> float:
    """Bytes that one thread hashes in a second, in pieces as the writing gives them."""
    import numpy as np

    from loratool.storage.hashing import Hasher

    data = np.random.default_rng(0).integers(0, 256, 8 << 20, dtype=np.uint8)
    best = 0.0
    for _ in range(8):
        hasher, started = Hasher(), time.thread_time()
        for _ in range(16):
            hasher.update(data)
        best = max(best, 16 * len(data) / (time.thread_time() - started))
    return best


def make(step: str, gigabytes: float, work: Path) -> None:
    """One input of `measure`: a base of so many bytes, or the adapter for one."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from common import LINEARS, make_base, model_shapes

    folder, plain = work / f"{step}-{gigabytes:g}", model_shapes(gigabytes)[0]
    if step == "plain":
        make_base(folder, gigabytes, 2)
    elif step == "adapter":
        make_adapter(folder, plain, tuple(LINEARS))
    elif step == "int4":
        make_int4(folder, int4_layers(gigabytes))
    else:
        make_adapter(folder, int4_layers(gigabytes), ("self_attn.q_proj", "self_attn.v_proj"))


def make_adapter(folder: Path, layers: int, modules: tuple[str, ...], rank: int = 16) -> None:
    """An adapter like `make_adapter` of the benchmarks, on some modules."""
    import torch
    from common import LINEARS
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(1), {}
    for layer in range(layers):
        for name in modules:
            path = f"base_model.model.model.layers.{layer}.{name}"
            rows, columns = LINEARS[name]
            for half, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
                tensors[f"{path}.{half}.weight"] = 0.01 * torch.randn(shape, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": [name.rpartition(".")[2] for name in modules], "bias": "none",
        "base_model_name_or_path": "base", "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def int4_layers(gigabytes: float) -> int:
    """Layers of the INT4 model of so many bytes."""
    from common import LINEARS

    values = sum(rows * columns for rows, columns in LINEARS.values())
    return max(1, round(gigabytes * 1e9 / (values * 4.5 / 8)))


def make_int4(folder: Path, layers: int) -> None:
    """The model of `make_base`, of so many layers, with these in compressed-tensors' INT4 in groups
    of 32."""
    import torch
    from common import LINEARS, model_shapes
    from safetensors.torch import save_file

    _, vocabulary, one = model_shapes(0)
    shapes = {n: shape for n, shape in one.items() if ".layers." not in n}
    for layer in range(layers):
        shapes |= {
            n.replace(".layers.0.", f".layers.{layer}."): shape
            for n, shape in one.items()
            if ".layers." in n
        }
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    names, bounds = list(shapes), torch.iinfo(torch.int32)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        held, file = {}, f"model-{number:05}-of-00002.safetensors"
        for name in part:
            shape, module = shapes[name], name.removesuffix(".weight")
            if any(name.endswith(f"{linear}.weight") for linear in LINEARS):
                rows, columns = shape
                held[f"{module}.weight_packed"] = torch.randint(
                    bounds.min, bounds.max, (rows, columns // 8), dtype=torch.int32,
                    generator=generator,
                )  # fmt: skip
                held[f"{module}.weight_scale"] = torch.full((rows, columns // 32), 0.005).bfloat16()
                held[f"{module}.weight_shape"] = torch.tensor(shape)
            else:
                held[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    quantised = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "group_size": 32, "strategy": "group",
        }}},
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "quantization_config": quantised,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="measure the rates, there")
    parser.add_argument("--size", type=float, default=1.0, help="of the bases in GB (1)")
    parser.add_argument("--runs", type=int, default=3, help="of each kind (3)")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    document = Path(__file__).with_name("scale.md")
    if args.make:
        make(args.make[0], float(args.make[1]), Path(args.make[2]))
    elif args.measure:
        measure(args.measure, args.size, args.runs)
    elif args.write:
        document.write_text(whole(document.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
