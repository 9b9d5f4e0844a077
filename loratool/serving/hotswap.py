"""What PEFT 0.21.2 swaps into a loaded model, by its source and by runs; and which pairs."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.serving.traits import Traits
from loratool.serving.verdict import ServingProgram, ServingRule, Setting
from loratool.words import counted, enumerated

_HOTSWAP = "https://github.com/huggingface/peft/blob/main/src/peft/utils/hotswap.py"

#: Fields in which the adapter that is there and the one that comes must agree, and their defaults.
_COMPARED = {"use_rslora": False, "lora_dropout": 0.0, "alpha_pattern": {}, "use_dora": False}


def _alpha_pattern(t: Traits, setting: Setting) -> str:
    if not t.has_alpha_pattern:
        return ""
    return "alpha_pattern must be that of the adapter which is loaded: others are incompatible"


def _ranks(t: Traits, setting: Setting) -> str:
    if t.has_alpha_pattern or not t.wrong_scales(lambda module: t.alpha / t.root_or_rank):
        return ""
    return "rank_pattern is not compared, and modules of other ranks get a wrong scale in silence"


def _not_swapped(t: Traits, setting: Setting) -> str:
    held = t.held("heads", "tokens", "norms", "biases", "others", "beside")
    found = [held] * bool(held) + ["trained token rows"] * bool(t.token_rows)
    return f"factors are swapped; nobody tried it with {', '.join(found)}" if found else ""


HOTSWAP = ServingProgram(
    "peft-hotswap", "PEFT hotswap", "0.21.2",
    (
        ServingRule("refused", "alpha_pattern", _alpha_pattern, "resize", _HOTSWAP, ran=True),
        ServingRule("differs", "ranks differ", _ranks, "resize", _HOTSWAP, ran=True),
        ServingRule("unknown", "saved whole", _not_swapped, "merge", _HOTSWAP),
    ),
    source=_HOTSWAP,
)  # fmt: skip


def unlike(adapters: Sequence[Traits]) -> list[str]:
    """Why these cannot be swapped one for the other, in sentences; [] where they can."""
    found = []
    for field, default in _COMPARED.items():
        values = [t.config.get(field) or default for t in adapters]
        other = next((t for t, v in zip(adapters, values, strict=True) if v != values[0]), None)
        if other is not None:
            found.append(f"{field} of {adapters[0].label} and of {other.label} differ")
    return found + _more_modules(adapters)


def _more_modules(adapters: Sequence[Traits]) -> list[str]:
    """Modules that come with one adapter and are in none that holds all: unexpected keys."""
    every = set().union(*(t.adapter.modules for t in adapters))
    if any(every == t.adapter.modules.keys() for t in adapters):
        return []
    first = adapters[0].adapter.modules.keys()
    more = sorted(every - first)
    does = counted(len(more), "module", "is")
    return [f"no adapter has the modules of all: {does} not in {adapters[0].label} "
            f"({enumerated(more, 2)})"]  # fmt: skip


def to_load_first(adapters: Sequence[Traits]) -> str:
    """What to begin with, so that the others fit into it."""
    every = set().union(*(t.adapter.modules for t in adapters))
    ranks = sorted({t.largest_rank for t in adapters})
    whole = [t.label for t in adapters if t.adapter.modules.keys() == every]
    said = [f"load {label} first" for label in whole[:1] if len(whole) < len(adapters)]
    if len(ranks) > 1:
        said.append(f"prepare_model_for_compiled_hotswap(model, target_rank={ranks[-1]})")
    return "; ".join(said)
