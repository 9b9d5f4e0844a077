"""Time merges into quantised bases against the same merge from bfloat16. Prints Markdown.

The bases are one Llama-shaped model in four forms: bfloat16, NF4 (nested), FP8 in blocks of 128×128
and MXFP4, with random codes and scales; every merge gives a plain float16 model. `--peers` adds
what others do with the same files where they run on a CPU: bitsandbytes with PEFT's
`merge_and_unload`, and transformers' own dequantisation. `--experts` merges into a layer with 256
experts in FP8 instead, and weighs what is read and written against what must be.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import (
    LINEARS,
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

FORMS = ("bf16", "nf4", "fp8", "mxfp4")
NAMES = {"bf16": "bfloat16", "nf4": "NF4", "fp8": "FP8 blocks", "mxfp4": "MXFP4"}
EXPERTS, HIDDEN, INNER = 256, 2048, 768


def quantised_parts(name: str, shape: tuple[int, ...], form: str, generator: Any) -> dict[str, Any]:
    """The tensors that a weight of random values of about 0.02 is stored as."""
    import torch

    rows, columns = shape
    module = name.removesuffix(".weight")

    def octets(*size: int) -> Any:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)

    if form == "fp8":
        codes = torch.empty(shape).normal_(0, 100, generator=generator).clamp_(-448, 448)
        scales = torch.full((-(-rows // 128), -(-columns // 128)), 2e-4)
        return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    if form == "mxfp4":
        scales = torch.full((rows, columns // 32), 120, dtype=torch.uint8)
        packed = octets(rows, columns // 2)
        return {f"{module}.weight_packed": packed, f"{module}.weight_scale": scales}
    blocks = rows * columns // 64
    state = json.dumps({
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns],
        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05,
    }).encode()  # fmt: skip
    return {
        name: octets(rows * columns // 2, 1),
        f"{name}.absmax": octets(blocks),
        f"{name}.nested_absmax": torch.full((-(-blocks // 256),), 0.01),
        f"{name}.nested_quant_map": torch.linspace(-1, 1, 256),
        f"{name}.quant_map": torch.linspace(-1, 1, 16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
    },
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "float", "group_size": 32, "strategy": "group",
        }}},
    },
}  # fmt: skip


def make_quantised(folder: Path, gigabytes: float, shards: int, form: str) -> None:
    """Write the model of `make_base` with its linear layers in a form, one shard in memory."""
    import torch
    from safetensors.torch import save_file

    if form == "bf16":
        make_base(folder, gigabytes, shards)
        return
    _, _, shapes = model_shapes(gigabytes)
    names = list(shapes)
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        held: dict[str, torch.Tensor] = {}
        for name in names[number * len(names) // shards : (number + 1) * len(names) // shards]:
            if any(name.endswith(f"{linear}.weight") for linear in LINEARS):
                held |= quantised_parts(name, shapes[name], form, generator)
            else:
                value = torch.empty(shapes[name], dtype=torch.bfloat16)
                held[name] = value.normal_(0, 0.02, generator=generator)
        save_file(held, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    layers, vocabulary, _ = model_shapes(gigabytes)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocabulary,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "quantization_config": CONFIGS[form],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_experts(folder: Path) -> None:
    """Write a layer as DeepSeek's and Qwen's are: attention and 256 experts, all in FP8 blocks."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    shapes = {f"self_attn.{side}_proj": (HIDDEN, HIDDEN) for side in "qkvo"}
    for number in range(EXPERTS):
        shapes[f"mlp.experts.{number}.gate_proj"] = (INNER, HIDDEN)
        shapes[f"mlp.experts.{number}.up_proj"] = (INNER, HIDDEN)
        shapes[f"mlp.experts.{number}.down_proj"] = (HIDDEN, INNER)
    held: dict[str, torch.Tensor] = {}
    for path, shape in shapes.items():
        held |= quantised_parts(f"model.layers.0.{path}.weight", shape, "fp8", generator)
    folder.mkdir(parents=True)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "qwen3_moe", "dtype": "bfloat16", "hidden_size": HIDDEN,
              "quantization_config": CONFIGS["fp8"]}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def make_attention_adapter(folder: Path) -> None:
    """Write an adapter of rank 16 on q and v of that layer."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        f"base_model.model.model.layers.0.self_attn.{side}_proj.lora_{half}.weight": torch.randn(s)
        for side in "qv"
        for half, s in (("A", (16, HIDDEN)), ("B", (HIDDEN, 16)))
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def weigh(base: str, adapter: str, output: str) -> None:
    """Merge, and print what was read and written beside the least that this takes."""
    import loratool

    before = _moved()
    loratool.merge(base, adapter, output)
    read, written = (now - then for now, then in zip(_moved(), before, strict=True))
    stored, made = size_of(Path(base)) + size_of(Path(adapter)), size_of(Path(output))
    print(
        f"read {read / 1e9:.3f} GB, {read / stored:.3f} x of the inputs; written "
        f"{written / 1e9:.3f} GB, {written / made:.3f} x of the output, which is "
        f"{made / size_of(Path(base)):.3f} x of the base"
    )


def _moved() -> tuple[int, int]:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])


def merge_with_peft(base: str, adapter: str, output: str) -> None:
    """bitsandbytes' own way: loaded in 4 bit, merged and saved by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


def merge_dequantised(base: str, adapter: str, output: str) -> None:
    """What transformers dequantises while it loads or after, merged by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    method = json.loads((Path(base) / "config.json").read_text())["quantization_config"]
    fp8 = method["quant_method"] == "fp8"
    extra = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if fp8 else {}
    model = AutoModelForCausalLM.from_pretrained(
        base, device_map="cpu", dtype=torch.bfloat16, **extra
    )
    if not fp8:
        model = model.dequantize()
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)


def step(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--step", name, *arguments]


def contenders(peers: bool) -> Iterator[Contender]:
    for form in FORMS:
        command = [sys.executable, "-m", "loratool", "merge", f"{{{form}}}", "{adapter}"]
        options = ["--dtype", "float16", *([] if form == "bf16" else ["--quantised", "plain"])]
        yield Contender(f"from {NAMES[form]}", [*command, "-o", "{output}", *options])
    if peers:
        for form in ("nf4", "fp8"):
            files = [f"{{{form}}}", "{adapter}", "{output}"]
            label = f"transformers' dequantisation and PEFT, {NAMES[form]}"
            yield Contender(label, step("dequantised", *files))
        yield Contender(
            "bitsandbytes and PEFT, NF4 again", step("peft", "{nf4}", "{adapter}", "{output}")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=3.0, help="in GB of 16-bit values (3.0)")
    parser.add_argument("--shards", type=int, default=4, help="files of a base (4)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter (16)")
    parser.add_argument("--runs", type=int, default=3, help="of each contender (3)")
    parser.add_argument("--peers", action="store_true", help="with bitsandbytes and PEFT")
    parser.add_argument("--experts", action="store_true", help="a layer of 256 experts instead")
    parser.add_argument("--work", type=Path, help="keep the models here and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        print(machine(work))
        if args.experts:
            base, adapter = work / "experts", work / "experts-lora"
            for name, folder in (("experts", base), ("attention", adapter)):
                if not folder.exists():
                    run(step(name, str(folder)))
            with tempfile.TemporaryDirectory(dir=work) as output:
                weigh(str(base), str(adapter), f"{output}/merged")
            return
        places = {"adapter": work / f"adapter-r{args.rank}", "output": work / "output"}
        if not places["adapter"].exists():
            run(step("adapter", str(places["adapter"]), str(args.size), str(args.rank)))
        for form in FORMS:
            places[form] = work / f"{form}-{args.size:g}GB"
            if not places[form].exists():
                run(step("base", str(places[form]), str(args.size), str(args.shards), form))
        entries = list(contenders(args.peers))
        race(entries, {"base": places["bf16"], **places}, args.runs)
        sizes = ", ".join(f"{NAMES[f]} {size_of(places[f]) / 1e9:.2f} GB" for f in FORMS)
        print(f"\nBases: {sizes}. Rank {args.rank}, {args.runs} runs.\n")
        print_table(entries, "bfloat16")


STEPS = {
    "base": lambda folder, size, shards, form: make_quantised(
        Path(folder), float(size), int(shards), form
    ),
    "adapter": lambda folder, size, rank: make_adapter(Path(folder), float(size), int(rank)),
    "experts": lambda folder: make_experts(Path(folder)),
    "attention": lambda folder: make_attention_adapter(Path(folder)),
    "peft": merge_with_peft,
    "dequantised": merge_dequantised,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        STEPS[sys.argv[2]](*sys.argv[3:])
    else:
        main()
