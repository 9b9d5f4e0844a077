"""Sha256 of everything that runs over the fixtures write, to show that a change changed nothing.

    python benchmarks/outputs.py > before.json      # on the old code
    python benchmarks/outputs.py > after.json       # on the new code, on the same machine
    diff before.json after.json

Every verb is run over the fixtures, and over small models made here from a seed that use what the
fixtures do not: stored transposes, convolutions, embeddings, DoRA, biases, token rows, saved heads,
views in torch files, float64. Recorded are the exit code, both streams (times masked) and every
file. Hashes depend on the machine's BLAS, so they are compared, not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
DTYPES = ("float16", "bfloat16", "float32", "base")
METHODS = (
    "sum", "svd", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd", "ties_core",
    "dare_linear_core", "dare_ties_core", "tsv_m", "iso_c", "knots_ties",
)  # fmt: skip

State = dict[str, torch.Tensor]


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for name in ("base", "adapter", "tuned", "tasks"):
            shutil.copytree(FIXTURES / name, name)
        make_inputs()
        record = {name: run(name, arguments) for name, arguments in runs()}
        record["files"] = files_below(Path())
    print(json.dumps(record, indent=1, ensure_ascii=False))


def run(name: str, arguments: list[str]) -> dict[str, Any]:
    """One command in a forked process: exit code and both streams."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.environ["COLUMNS"] = "80"
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f".{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = 1
        try:
            from loratool.cli.main import main as entry

            entry(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [masked(Path(f".{stream}").read_text()) for stream in ("out", "err")]
    print(f"{code} {name}: {' '.join(arguments)}", file=sys.stderr)
    return {"code": code, "out": texts[0].splitlines(), "err": texts[1].splitlines()}


def masked(text: str) -> str:
    """Without what differs between two runs: times, rates, free space."""
    text = re.sub(r'("(?:seconds|bytes_free)": )[\d.]+', r"\1…", text)
    text = re.sub(r"\b[\d.]+ m?s\b(, [\d.]+ [kMG]?B/s)?", "… s", text)
    return re.sub(r"[\d.]+ [kMGT]?B( are| is)? free", "… free", text)


def files_below(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".out", ".err")
    }


# --- the runs -------------------------------------------------------------------------------------


def runs() -> list[tuple[str, list[str]]]:
    """Name and arguments of each run; each writes to a folder of its own name."""
    found: list[tuple[str, list[str]]] = []

    def add(name: str, *arguments: str) -> None:
        found.append((name, [*arguments, *(["-o", name] if name.startswith("out-") else [])]))

    two = ["tasks/html", "tasks/tables"]
    for dtype in DTYPES:
        add(f"out-merge-{dtype}", "merge", "base", "adapter", "--dtype", dtype)
        add(f"out-merge-json-{dtype}", "merge", "base", *two, "--weight", "0.7", "--weight", "-0.3",
            "--dtype", dtype, "--verify", "--json")  # fmt: skip
        add(f"out-reversible-{dtype}", "merge", "base", "adapter", "--dtype", dtype, "--reversible")
        add(f"out-back-{dtype}", "unmerge", f"out-reversible-{dtype}", "adapter")
        add(f"out-back-json-{dtype}", "unmerge", f"out-reversible-{dtype}", "adapter", "--json")
        add(f"verify-{dtype}", "verify", f"out-merge-{dtype}", "--base", "base", "adapter")
        add(f"verify-json-{dtype}", "verify", f"out-merge-json-{dtype}", "--base", "base", *two,
            "--weight", "0.7", "--weight", "-0.3", "--json")  # fmt: skip
    add("out-subtract", "unmerge", "out-merge-base", "adapter", "--subtract", "--dtype", "base")
    add("out-stacked", "merge", "out-reversible-base", "tasks/html", "--reversible", "--json")
    add("out-unstacked", "unmerge", "out-stacked", "tasks/html", "--json")
    add("verify-wrong-weight", "verify", "out-merge-base", "--base", "base", "adapter", "--weight",
        "0.5")  # fmt: skip
    add("verify-wrong-json", "verify", "out-merge-base", "--base", "base", "tasks/html", "--json")
    add("verify-tuned", "verify", "tuned", "--base", "base", "adapter", "--json")
    add("dry-run", "merge", "base", "adapter", "-o", "nothing", "--dry-run", "--reversible")

    for name in ("adapter", *two):
        add(f"inspect-{name}", "inspect", name)
        add(f"inspect-full-{name}", "inspect", name, "--full", "--tensors", "--spectrum", "--json")
        add(f"inspect-base-{name}", "inspect", name, "--base", "base", "--json")
        add(f"inspect-base-text-{name}", "inspect", name, "--base", "base", "--layer", "0-2")
    add("compare", "compare", "adapter", *two)
    add("compare-json", "compare", "adapter", *two, "--json", "--full")
    add("compare-base", "compare", "adapter", *two, "--base", "base", "--json")
    for method in METHODS:
        more = [] if method in ("sum", "svd", "cat", "linear", "tsv_m", "iso_c") else [
            "--density", "0.5"]  # fmt: skip
        add(f"out-combine-{method}", "combine", *two, "--method", method, *more, "--json",
            "--weight", "0.8", "--weight", "0.5")  # fmt: skip
    add("out-combine-rank", "combine", "adapter", *two, "--rank", "4")
    add("out-combine-energy", "combine", "adapter", *two, "--energy", "0.9", "--keep-patterns")
    for name, options in {
        "rank": ["--rank", "4"], "energy": ["--energy", "0.9"], "max": ["--energy", "0.99",
        "--max-rank", "6"], "patterns": ["--energy", "0.9", "--patterns"],
        "up": ["--rank", "16", "--dtype", "float32"],
    }.items():  # fmt: skip
        add(f"out-resize-{name}", "resize", "adapter", *options)
        add(f"out-resize-json-{name}", "resize", "tasks/tables", *options, "--json")
    for name, options in {
        "rank": ["--rank", "8"], "energy": ["--energy", "0.9", "--max-rank", "32"],
        "budget": ["--budget", "200kB"], "uniform": ["--energy", "0.8", "--uniform"],
        "patterns": ["--energy", "0.8", "--patterns", "--save", "norms", "--save", "biases",
                     "--embeddings"],
        "exact": ["--rank", "8", "--exact", "--verify"], "verify": ["--rank", "4", "--verify"],
        "save": ["--rank", "4", "--save", "lm_head", "--skip", "norms", "--dtype", "float32"],
    }.items():  # fmt: skip
        # With a name for the base, or its path, which is another one in every run, is written.
        options = [*options, "--base-name", "org/base"]
        add(f"out-extract-{name}", "extract", "base", "tuned", *options)
        add(f"out-extract-json-{name}", "extract", "base", "tuned", *options, "--json",
            "--spectrum")  # fmt: skip
    add("extract-dry", "extract", "base", "tuned", "--dry-run")
    for name in ("out-merge-base", "out-extract-rank", "out-combine-sum", "out-resize-rank",
                 "adapter", "out-reversible-base"):  # fmt: skip
        add(f"card-{name}", "card", name)
        add(f"card-json-{name}", "card", name, "--json")

    for kind in ("gpt2", "bert", "vit", "tied", "tied-head", "double", "views"):
        adapters = sorted(str(p) for p in Path(kind).glob("ad*"))
        for adapter in adapters:
            which = f"{kind}-{Path(adapter).name}"
            base = f"{kind}/base"
            add(f"inspect-{which}", "inspect", adapter, "--base", base, "--json")
            for dtype in ("float16", "base"):
                add(f"out-{which}-{dtype}", "merge", base, adapter, "--dtype", dtype,
                    "--reversible", "--verify", "--json")  # fmt: skip
                add(f"out-back-{which}-{dtype}", "unmerge", f"out-{which}-{dtype}", adapter,
                    "--json")  # fmt: skip
            add(f"out-sub-{which}", "unmerge", f"out-{which}-base", adapter, "--subtract",
                "--dtype", "base", "--json")  # fmt: skip
            add(f"verify-{which}", "verify", f"out-{which}-float16", "--base", base, adapter)
            add(f"out-resize-{which}", "resize", adapter, "--rank", "2", "--json")
            add(f"out-extract-{which}", "extract", base, f"out-{which}-base", "--rank", "2",
                "--embeddings", "--verify", "--json", "--base-name", "org/base")  # fmt: skip
            add(f"out-remerge-{which}", "merge", base, f"out-extract-{which}", "--json")
        add(f"out-{kind}-all", "merge", f"{kind}/base", *adapters, "--json")
        add(f"out-{kind}-combined", "combine", *adapters, "--json", "--saved", "first")
        add(f"compare-{kind}", "compare", *adapters, "--json")

    add("out-exists", "merge", "base", "adapter")
    add("out-exists", "merge", "base", "adapter")
    add("out-no-base", "merge", "bas", "adapter")
    add("out-no-adapter", "merge", "base", "adaptr")
    add("out-swapped", "merge", "adapter", "base")
    add("out-weights", "merge", "base", "adapter", "--weight", "1", "--weight", "2")
    add("out-unmatched", "merge", "gpt2/base", "adapter")
    add("out-unmatched-allowed", "merge", "bert/base", "vit/ad-conv", "--allow-unmatched")
    add("inspect-nothing", "inspect", "nothing", "--json")
    add("help", "--help")
    return found


# --- inputs that the fixtures lack ----------------------------------------------------------------


class Made:
    """Random tensors, the same at every run."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(self._random.standard_normal(shape) * 0.1).to(dtype)


def write_base(folder: Path, state: State, **config: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, state: State, **config: Any) -> None:
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    prefixed = {f"base_model.model.{name}": value for name, value in state.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def pair(made: Made, path: str, out: int, width: int, rank: int = 4, **more: Any) -> State:
    return {
        f"{path}.lora_A.weight": made(rank, width, **more),
        f"{path}.lora_B.weight": made(out, rank, **more),
    }


def make_inputs() -> None:
    make_gpt2()
    make_bert()
    make_vit()
    make_tied("tied")
    make_tied("tied-head")
    make_double()
    make_views()


def make_gpt2() -> None:
    """Stored transposes (one of them square), biases, DoRA on a transposed matrix."""
    made = Made(1)
    state, wide = {}, 24
    for i in range(2):
        h = f"h.{i}"
        state |= {f"{h}.attn.c_attn.weight": made(wide, 3 * wide, dtype=torch.float16),
                  f"{h}.attn.c_attn.bias": made(3 * wide), f"{h}.attn.c_proj.weight":
                  made(wide, wide), f"{h}.attn.c_proj.bias": made(wide)}  # fmt: skip
    state |= {"wte.weight": made(40, wide), "wpe.weight": made(8, wide), "ln_f.weight": made(wide)}
    write_base(Path("gpt2/base"), state, model_type="gpt2", architectures=["GPT2LMHeadModel"],
               vocab_size=40)  # fmt: skip
    plain, dora, bias = {}, {}, {}
    for i in range(2):
        h = f"transformer.h.{i}.attn"
        one = pair(made, f"{h}.c_attn", 3 * wide, wide) | pair(made, f"{h}.c_proj", wide, wide)
        plain |= one
        dora |= one | {f"{h}.c_attn.lora_magnitude_vector": made(3 * wide).abs() + 1,
                       f"{h}.c_proj.lora_magnitude_vector": made(wide).abs() + 1}  # fmt: skip
        bias |= one | {f"{h}.c_proj.lora_B.bias": made(wide),
                       f"{h}.c_attn.lora_B.bias": made(3 * wide)}  # fmt: skip
    both = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"],
            "fan_in_fan_out": True}  # fmt: skip
    write_adapter(Path("gpt2/ad-plain"), plain, **both)
    write_adapter(Path("gpt2/ad-dora"), dora, use_dora=True, **both)
    write_adapter(Path("gpt2/ad-bias"), bias, lora_bias=True, **both)


def make_bert() -> None:
    """A head that is saved, biases replaced, an embedding adapted, DoRA."""
    made = Made(2)
    state, wide = {}, 16
    for i in range(2):
        for name in ("query", "key", "value"):
            path = f"bert.encoder.layer.{i}.attention.self.{name}"
            state |= {f"{path}.weight": made(wide, wide), f"{path}.bias": made(wide)}
    state |= {"bert.embeddings.word_embeddings.weight": made(30, wide),
              "bert.pooler.dense.weight": made(wide, wide)}  # fmt: skip
    write_base(Path("bert/base"), state, model_type="bert", architectures=["BertModel"],
               vocab_size=30)  # fmt: skip
    lora, dora = {}, {}
    for i in range(2):
        for name in ("query", "value"):
            path = f"bert.encoder.layer.{i}.attention.self.{name}"
            lora |= pair(made, path, wide, wide)
            dora |= pair(made, path, wide, wide)
            dora[f"{path}.lora_magnitude_vector"] = made(wide).abs() + 1
            lora[f"{path}.base_layer.bias"] = made(wide)
    lora |= {"bert.embeddings.word_embeddings.lora_embedding_A": made(4, 30),
             "bert.embeddings.word_embeddings.lora_embedding_B": made(wide, 4)}  # fmt: skip
    head = {"classifier.weight": made(3, wide), "classifier.bias": made(3)}
    targets = ["query", "value", "word_embeddings"]
    write_adapter(Path("bert/ad-head"), lora | head, task_type="SEQ_CLS", target_modules=targets,
                  modules_to_save=["classifier"], bias="lora_only")  # fmt: skip
    write_adapter(Path("bert/ad-dora"), dora, target_modules=["query", "value"], use_dora=True,
                  use_rslora=True)  # fmt: skip


def make_vit() -> None:
    """Names in memory that differ from those on disk, a convolution."""
    made = Made(3)
    state, wide = {}, 12
    for i in range(2):
        path = f"vit.encoder.layer.{i}"
        for name in ("query", "key", "value"):
            state[f"{path}.attention.attention.{name}.weight"] = made(wide, wide)
        state[f"{path}.intermediate.dense.weight"] = made(2 * wide, wide)
    patch = "vit.embeddings.patch_embeddings.projection"
    state |= {f"{patch}.weight": made(wide, 3, 4, 4), f"{patch}.bias": made(wide)}
    write_base(Path("vit/base"), state, model_type="vit", architectures=["ViTModel"])
    lora = {}
    for i in range(2):
        lora |= pair(made, f"vit.layers.{i}.attention.q_proj", wide, wide)
        lora |= pair(made, f"vit.layers.{i}.mlp.fc1", 2 * wide, wide)
    lora |= {f"{patch}.lora_A.weight": made(4, 3, 4, 4), f"{patch}.lora_B.weight":
             made(wide, 4, 1, 1)}  # fmt: skip
    write_adapter(Path("vit/ad-conv"), lora, target_modules=["q_proj", "fc1", "projection"])


def make_tied(kind: str) -> None:
    """An embedding that is the head too: adapted, resized, with trained token rows."""
    made = Made(4)
    wide, rows = 16, 32
    state = {"model.embed_tokens.weight": made(rows, wide), "model.norm.weight": made(wide)}
    if kind == "tied-head":
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    for name in ("q_proj", "k_proj"):
        state[f"model.layers.0.self_attn.{name}.weight"] = made(wide, wide)
    write_base(Path(kind, "base"), state, model_type="llama", tie_word_embeddings=True,
               architectures=["LlamaForCausalLM"], vocab_size=rows)  # fmt: skip
    q = pair(made, "model.layers.0.self_attn.q_proj", wide, wide)
    task = {"task_type": "CAUSAL_LM"}
    embedding = {"model.embed_tokens.lora_embedding_A": made(4, rows),
                 "model.embed_tokens.lora_embedding_B": made(wide, 4)}  # fmt: skip
    write_adapter(Path(kind, "ad-embedding"), q | embedding, **task,
                  target_modules=["q_proj", "embed_tokens"])  # fmt: skip
    tokens = {"model.embed_tokens.token_adapter.trainable_tokens_delta": made(2, wide)}
    write_adapter(Path(kind, "ad-tokens"), q | tokens, **task, target_modules=["q_proj"],
                  trainable_token_indices={"embed_tokens": [3, 9]})  # fmt: skip
    saved = {"model.embed_tokens.weight": made(rows + 4, wide)}
    saved["lm_head.weight"] = saved["model.embed_tokens.weight"].clone()
    write_adapter(Path(kind, "ad-resized"), q | saved, **task, target_modules=["q_proj"],
                  modules_to_save=["embed_tokens", "lm_head"])  # fmt: skip


def make_double() -> None:
    """float64, integers, rank and alpha patterns, block-diagonal factors."""
    made = Made(5)
    wide = 16
    state = {f"model.layers.0.self_attn.{name}.weight": made(wide, wide, dtype=torch.float64)
             for name in ("q_proj", "k_proj", "v_proj")}  # fmt: skip
    state |= {"steps": torch.arange(7), "model.norm.weight": made(wide, dtype=torch.bfloat16)}
    write_base(Path("double/base"), state, model_type="llama", architectures=["LlamaForCausalLM"])
    lora = pair(made, "model.layers.0.self_attn.q_proj", wide, wide, 4, dtype=torch.float64)
    lora |= pair(made, "model.layers.0.self_attn.k_proj", wide, wide, 2)
    write_adapter(Path("double/ad-pattern"), lora, target_modules=["q_proj", "k_proj"],
                  rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 3})  # fmt: skip
    blocks = {"model.layers.0.self_attn.v_proj.lora_A.weight": made(4, wide // 2),
              "model.layers.0.self_attn.v_proj.lora_B.weight": made(wide, 4)}  # fmt: skip
    write_adapter(Path("double/ad-blocks"), blocks, target_modules=["v_proj"], use_bdlora={
        "target_modules_bd_a": ["v_proj"], "target_modules_bd_b": [], "nblocks": 2,
        "match_strict": True})  # fmt: skip


def make_views() -> None:
    """Torch files with tensors that are views: transposed, shared storage."""
    made = Made(6)
    wide = 16
    folder = Path("views/base")
    folder.mkdir(parents=True)
    block = made(2 * wide, wide)
    state = {"model.layers.0.self_attn.q_proj.weight": made(wide, wide).T,
             "model.layers.0.self_attn.k_proj.weight": block[:wide],
             "model.layers.0.self_attn.v_proj.weight": block[wide:].T}  # fmt: skip
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")
    lora = {}
    for name in ("q_proj", "v_proj"):
        lora |= pair(made, f"model.layers.0.self_attn.{name}", wide, wide)
    write_adapter(Path("views/ad-plain"), lora, target_modules=["q_proj", "v_proj"])
    dora = dict(lora)
    for name in ("q_proj", "v_proj"):
        path = f"model.layers.0.self_attn.{name}"
        dora[f"{path}.lora_magnitude_vector"] = made(wide).abs() + 1
    write_adapter(Path("views/ad-dora"), dora, target_modules=["q_proj", "v_proj"], use_dora=True)


if __name__ == "__main__":
    main()
