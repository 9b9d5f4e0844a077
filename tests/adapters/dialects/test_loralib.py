"""loralib: parts of fused weights, convolutions, embeddings, and weights that are stored turned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.dialects import CASES
from helpers.files import load, write_base
from torch import Tensor

import loratool
from loratool.adapters.reading import read_adapter
from loratool.adapters.told import Told
from loratool.errors import LoraToolError

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def merged(base: Path, state: State, tmp_path: Path, **said: Any) -> State:
    torch.save(state, tmp_path / "lora.pt")
    out = tmp_path / "merged"
    told = Told(**{"alpha": 6.0, **said})
    loratool.merge(base, tmp_path / "lora.pt", out, dtype="float32", told=told, overwrite=True)
    return load(out)


def merged_linear(a: Tensor, b: Tensor, enabled: list[bool]) -> Tensor:
    """loralib's own `merge_AB` and `zero_pad`."""
    delta = torch.nn.functional.conv1d(
        a.unsqueeze(0), b.unsqueeze(-1), groups=sum(enabled)
    ).squeeze(0)
    rows = torch.tensor(enabled).repeat_interleave(len(b) // sum(enabled))
    full = delta.new_zeros((len(rows), *delta.shape[1:]))
    full[rows] = delta
    return full


@pytest.mark.parametrize("enabled", [[1, 0, 1], [1, 1, 0], [1, 1, 1], [0, 1, 0]])
def test_parts_of_a_fused_weight(enabled: list[int], tmp_path: Path) -> None:
    flags = [bool(x) for x in enabled]
    weight = torch.randn(12, 8)
    base = write_base(tmp_path / "base", {"h.qkv.weight": weight}, config={"model_type": "x"})
    a, b = torch.randn(2 * sum(enabled), 8), torch.randn(4 * sum(enabled), 2)
    state = {"h.qkv.lora_A": a, "h.qkv.lora_B": b}
    expected = weight + 6 / 2 * merged_linear(a, b, flags)
    said: dict[str, Any] = {} if all(flags) else {"enable_lora": {"qkv": tuple(flags)}}
    found = merged(base, state, tmp_path, **said)
    assert torch.allclose(found["h.qkv.weight"], expected, atol=1e-5)
    if not all(flags):
        with pytest.raises(LoraToolError, match=r"parts-unknown[\s\S]*--enable-lora[\s\S]*h\.qkv"):
            merged(base, state, tmp_path)


@pytest.mark.parametrize(
    ("parts", "words"),
    [((True, False, False), "names 1 parts"), ((True, True, False, False), "makes a weight of")],
)
def test_flags_that_do_not_fit_are_refused(
    parts: tuple[bool, ...], words: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", {"qkv.weight": torch.randn(12, 8)})
    state = {"qkv.lora_A": torch.randn(4, 8), "qkv.lora_B": torch.randn(8, 2)}
    with pytest.raises(LoraToolError, match=words):
        merged(base, state, tmp_path, enable_lora={"qkv": parts})
    with pytest.raises(LoraToolError, match="no module of the adapter is called so"):
        merged(base, state, tmp_path, enable_lora={"kv": (True, True, False)})


def test_a_convolution(tmp_path: Path) -> None:
    weight = torch.randn(5, 3, 4, 4)
    base = write_base(tmp_path / "base", {"conv.weight": weight, "fc.weight": torch.randn(4, 6)})
    a, b = torch.randn(2 * 4, 3 * 4), torch.randn(5 * 4, 2 * 4)
    state = {"conv.lora_A": a, "conv.lora_B": b}
    expected = weight + 6 / 2 * (b @ a).view(weight.shape)
    found = merged(base, state, tmp_path)
    assert torch.allclose(found["conv.weight"], expected, atol=1e-5)
    # The rank tells the kernel where no base does.
    module = read_adapter(tmp_path / "lora.pt", Told(alpha=6, rank=2)).modules["conv"]
    assert (module.kind, module.outline.inner, module.rank) == ("conv", (3, 4, 4), 32)
    assert module.scale == 3


def test_the_identity_of_convolutions_is_exact(tmp_path: Path) -> None:
    a, b = torch.randn(6, 9, dtype=torch.float64), torch.randn(12, 6, dtype=torch.float64)
    torch.save({"conv.lora_A": a, "conv.lora_B": b}, tmp_path / "lora.pt")
    module = read_adapter(tmp_path / "lora.pt", Told(alpha=6, rank=2)).modules["conv"]
    pair = module.left_right()
    assert pair is not None
    left, right = (torch.from_numpy(x).double() for x in pair)
    expected = (b.float().double() @ a.float().double()).view(4, -1)
    assert (left @ right - expected).norm() <= 1e-12 * expected.norm()


def test_an_embedding_and_a_square_layer(tmp_path: Path) -> None:
    plain = {"emb.weight": torch.randn(20, 6), "sq.weight": torch.randn(6, 6)}
    base = write_base(tmp_path / "base", plain, config={"model_type": ""})
    state = {f"{path}.lora_{x}": torch.randn(*shape)
             for path, x, shape in (("emb", "A", (2, 20)), ("emb", "B", (6, 2)),
                                    ("sq", "A", (2, 6)), ("sq", "B", (6, 2)))}  # fmt: skip
    found = merged(base, state, tmp_path)
    expected = plain["emb.weight"] + 3 * (state["emb.lora_B"] @ state["emb.lora_A"]).T
    assert torch.allclose(found["emb.weight"], expected, atol=1e-5)
    expected = plain["sq.weight"] + 3 * state["sq.lora_B"] @ state["sq.lora_A"]
    assert torch.allclose(found["sq.weight"], expected, atol=1e-5)


def test_weights_that_are_stored_turned(tmp_path: Path) -> None:
    plain = {"fc.weight": torch.randn(6, 10), "sq.weight": torch.randn(6, 6)}
    base = write_base(tmp_path / "base", plain, config={"model_type": ""})
    state = {f"{path}.lora_{x}": torch.randn(*shape)
             for path, x, shape in (("fc", "A", (2, 6)), ("fc", "B", (10, 2)),
                                    ("sq", "A", (2, 6)), ("sq", "B", (6, 2)))}  # fmt: skip
    with pytest.raises(LoraToolError, match=r"fit the other way round.*--fan-in-fan-out"):
        merged(base, state, tmp_path)
    found = merged(base, state, tmp_path, fan_in_fan_out=("fc", "s*"))
    for path in ("fc", "sq"):
        delta = 3 * (state[f"{path}.lora_B"] @ state[f"{path}.lora_A"]).T
        assert torch.allclose(found[f"{path}.weight"], plain[f"{path}.weight"] + delta, atol=1e-5)
    with pytest.raises(LoraToolError, match="--fan-in-fan-out nothing: no module"):
        merged(base, state, tmp_path, fan_in_fan_out=("nothing",))


def test_what_is_made_of_turned_weights_says_so(tmp_path: Path) -> None:
    """PEFT's config can say it of all modules; nothing is written where only the base could."""
    plain = {"fc.weight": torch.randn(6, 10), "sq.weight": torch.randn(6, 6)}
    base, file = write_base(tmp_path / "base", plain, config={"model_type": ""}), tmp_path / "l.pt"
    pairs = {"fc": (10, 6), "sq": (6, 6)}
    for path, (out, width) in pairs.items():
        state = {f"{path}.lora_A": torch.randn(2, width), f"{path}.lora_B": torch.randn(out, 2)}
        torch.save(state, file)
        told = Told(alpha=6, fan_in_fan_out=("*",))
        made = {name: tmp_path / f"{path}-{name}" for name in ("converted", "combined", "resized")}
        loratool.convert(file, made["converted"], to="peft", told=told)
        loratool.combine([file], made["combined"], told=told)
        loratool.resize(file, made["resized"], rank=1, told=told)
        for folder in made.values():
            assert read_adapter(folder).declared.transposes
        if path == "sq":  # nothing could show a mistake
            with pytest.raises(LoraToolError, match="square and the adapter says fan_in_fan_out"):
                loratool.merge(base, made["converted"], tmp_path / "none")
        else:
            loratool.merge(base, made["converted"], tmp_path / "out", dtype="float32")
            delta = 3 * (state["fc.lora_B"] @ state["fc.lora_A"]).T
            found = load(tmp_path / "out")["fc.weight"]
            assert torch.allclose(found, plain["fc.weight"] + delta, atol=1e-5)
        with pytest.raises(LoraToolError, match=r"stored \[in, out\] .*files of mlx cannot say"):
            loratool.convert(file, tmp_path / "mlx", to="mlx", base=base, told=told)


def test_an_architecture_contradicts_turned_weights(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    base = write_base(tmp_path / "base", {f"{path}.weight": torch.randn(6, 6)})
    state = {f"{path}.lora_A": torch.randn(2, 6), f"{path}.lora_B": torch.randn(6, 2)}
    with pytest.raises(LoraToolError, match=r"in llama, the base's architecture"):
        merged(base, state, tmp_path, fan_in_fan_out=("q_proj",))


def test_trained_biases_are_replaced(tmp_path: Path) -> None:
    """`lora_state_dict(model, bias="all")`."""
    plain = {"fc.weight": torch.randn(4, 6), "fc.bias": torch.randn(4)}
    base = write_base(tmp_path / "base", plain)
    state = {
        "fc.lora_A": torch.randn(2, 6), "fc.lora_B": torch.randn(4, 2), "fc.bias": torch.ones(4),
    }  # fmt: skip
    assert merged(base, state, tmp_path)["fc.bias"].eq(1).all()


@pytest.mark.parametrize("order", ["rows first", "transposed"])
def test_tables_that_are_multiplied_as_they_are_stored(order: str, tmp_path: Path) -> None:
    """A `[tokens, r]` and B `[r, width]`, or the other way round: no library's, but scripts'."""
    weight = torch.randn(20, 6)
    base = write_base(tmp_path / "base", {"model.embed_tokens.weight": weight})
    a, b = torch.randn(20, 2), torch.randn(2, 6)
    if order == "transposed":
        a, b = torch.randn(6, 2), torch.randn(2, 20)
    path = "model.embed_tokens"
    found = merged(base, {f"{path}.lora_A": a, f"{path}.lora_B": b}, tmp_path)
    delta = a @ b if order == "rows first" else (a @ b).T
    assert torch.allclose(found[f"{path}.weight"], weight + 3 * delta, atol=1e-5)


def test_a_convolution_that_nothing_tells_the_kernel_of_is_refused(tmp_path: Path) -> None:
    """Without base and rank its scale is not known: neither converted nor combined, with exit 0."""
    case = CASES["loralib-convolution"]
    told = Told(alpha=case.options["alpha"])
    with pytest.raises(LoraToolError, match=r"kernel-unknown.*--base"):
        loratool.convert(case.adapter, tmp_path / "out", to="peft", told=told)
    assert not (tmp_path / "out").exists()
