"""What makes an adapter impossible to merge in any dialect, as notices: shapes, halves, no scale.

Nothing is raised here, so that `inspect` can still show everything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loratool.adapters.adapter import Adapter
from loratool.errors import by_cause, listed
from loratool.notices import Notice
from loratool.words import counted

#: What is wrong with modules, to follow "1 module".
EMPTY = (
    "is empty: a placeholder, as DeepSpeed ZeRO-3 or FSDP leave it when shards were not gathered "
    "before saving; the weights are not in this file. Save again from the training run"
)
INTEGERS = (
    "holds integers or 8-bit floats, which loratool does not read as numbers; save the adapter in "
    "float16, bfloat16 or float32"
)

#: Why a pair of shapes makes no product, by code.
_OF_SHAPES = {
    "zero3-placeholder": EMPTY,
    "grouped-convolution": "has a grouped convolution, whose A mixes groups that the weight keeps "
    "apart, so no merged weight exists",
    "enable-lora": "is in the fused layout of PEFT 0.1–0.2 (enable_lora); load and save it with "
    "PEFT 0.2",
    "target-parameters": "adapts a bare parameter (a stack of experts), and which one is not known",
    "quantised-factors": INTEGERS,
    "pair-mismatch": "has factors of different ranks, so they make no product; fetch or save the "
    "adapter again",
}


def refuse_modules(adapter: Adapter, code: str, what: str, modules: Sequence[str]) -> None:
    """One notice for all modules with the same trouble; `what` begins with a verb. Each is a path,
    or with what is wrong with it behind a colon."""
    if modules:
        verb, _, rest = what.partition(" ")
        reasons = [(path, reason) for path, _, reason in (m.partition(": ") for m in modules)]
        text = f"{counted(len(modules), 'module', verb)} {rest}:\n{by_cause(reasons)}"
        adapter.notices.append(Notice(code, text, modules[0].partition(":")[0], refused=True))


def refuse_halves(adapter: Adapter, halves: Mapping[str, Sequence[str]], pair: str) -> None:
    """Refuse modules of which there is only a part, by path; `pair` are the names of both."""
    refuse_modules(
        adapter, "half-a-pair",
        f"has only one of {pair}, so nothing can be computed; fetch or save the adapter again",
        [f"{path}: only {', '.join(names)}" for path, names in halves.items()],
    )  # fmt: skip


def refuse_without_scale(adapter: Adapter, why: str = "") -> None:
    """One notice for all modules whose scale nobody says; `why` is what the dialect knows of it."""
    without = [path for path, module in adapter.modules.items() if module.scale is None]
    if without:
        whose = "its modules" if len(without) == len(adapter.modules) else listed(without[:1])[4:]
        why = why or "alpha/r is in the training script (lora_alpha)"
        text = f"Nothing here tells the scale of {whose}: {why}. Say --alpha A or --scale S."
        adapter.notices.append(Notice("no-alpha", text, str(adapter.weights), refused=True))


def refuse_unknown(adapter: Adapter) -> None:
    """Refuse the tensors that no part of the adapter is made of."""
    unknown = adapter.unknown
    if unknown:
        text = f"{counted(len(unknown), 'tensor', 'has')} no known meaning or no free place:\n"
        notice = Notice("unknown-tensors", text + listed(unknown), unknown[0], refused=True)
        adapter.notices.append(notice)


def refuse_empty(adapter: Adapter) -> None:
    """Refuse what is not a factor and holds no values: heads, embeddings, biases, magnitudes."""
    others = dict(adapter.replaced)
    others |= {path: rows.rows for path, rows in adapter.token_rows.items()}
    for module in adapter.modules.values():
        others |= {t.name: t for t in (module.magnitude, module.bias) if t is not None}
    empty = [name for name, info in others.items() if 0 in info.shape]
    if empty:
        text = (
            f"{counted(len(empty), 'tensor', 'is')} empty, a placeholder as DeepSpeed ZeRO-3 or "
            "FSDP leave it when shards were not gathered before saving; the values are not in this "
            f"file. Save again from the training run:\n{listed(empty)}"
        )
        adapter.notices.append(Notice("zero3-placeholder", text, empty[0], refused=True))


def refuse_shapes(adapter: Adapter, found: Mapping[str, Sequence[str]]) -> None:
    """Refuse pairs that do not make a product; name the reason where it is a known one.

    `found` are troubles that are known already, by code.
    """
    troubles = {code: [*found.get(code, ())] for code in _OF_SHAPES}
    for path, module in adapter.modules.items():
        a, b = (module.parts[name].shape for name in "AB")
        code = ""
        if module.kind == "experts":
            code = "" if all(t.is_float for t in module.tensors) else "quantised-factors"
        elif 0 in (*a, *b) or len(a) < 2 or len(b) < 2:
            code = "zero3-placeholder"
        elif len(a) > 2 and b[1] != a[0]:
            code = "grouped-convolution"
        elif len(b) > 2 and len(a) == 2:
            code = "enable-lora"
        elif not all(t.is_float for t in module.parts.values()):
            code = "quantised-factors"
        elif not module.is_sound or any(n != 1 for n in b[2:]):
            code = "pair-mismatch"
        if code:
            troubles[code].append(f"{path}: A {list(a)}, B {list(b)}")
    for code, places in troubles.items():
        refuse_modules(adapter, code, _OF_SHAPES[code], places)
