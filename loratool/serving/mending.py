"""The loratool command that mends what a program does not load, ready to be pasted."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratool.adapters.adapter import Adapter
from loratool.errors import shown_argument
from loratool.serving.sglang import SGLANG
from loratool.serving.traits import UNTOLD, WITHOUT_BASE, Traits
from loratool.serving.verdict import Cure, ServingProgram, Setting, Verdict
from loratool.serving.vllm import DEFAULT_RANK, VLLM
from loratool.storage.folder import origin_of

#: Dialects whose names, rows or products depend on the base, so that reading takes it.
_OF_A_BASE = ("gguf", "litgpt", "torchtune", "tinker", "hand", "loralib", "native")
#: Refusals of a merge that an option lifts.
_LIFTED = {"layer-replication": "--replicate-layers"}


def mend_of(
    adapter: Adapter,
    program: ServingProgram,
    verdict: Verdict,
    setting: Setting,
    conversions: Mapping[str, str],
) -> str:
    """The command after which the program loads the adapter, or the model that it is merged into;
    "" where it loads already, or where no command of loratool helps.

    `conversions` says what each target would make of the adapter (`converting.possible`).
    """
    cure = verdict.cure
    if verdict.outcome == "loads" or not cure:
        return ""
    remarks = verdict.troubles
    if cure == "resize" and program.native == "gguf" and any(r.cure == "convert" for r in remarks):
        cure = "convert"
    target = program.native
    refused = {notice.code for notice in adapter.notices if notice.refused}
    # What is not known yet, because alpha is not or because of too many modules, may be possible.
    unlikely = "no: " if adapter.functions or refused - UNTOLD - {"row-order"} else ""
    if cure == "convert" and conversions.get(target, unlikely).startswith("no: "):
        cure = "merge"
    if cure == "resize" and (adapter.functions or conversions.get("peft", "").startswith("no: ")):
        cure = "merge"
    return _command(Traits(adapter), cure, target, setting, _rank_limit(program, setting))


def _rank_limit(program: ServingProgram, setting: Setting) -> int | None:
    """The rank above which the program does not load; None where there is no limit."""
    if program.name == VLLM.name:
        return setting.max_rank or DEFAULT_RANK
    return setting.max_rank if program.name == SGLANG.name else None


def _command(t: Traits, cure: Cure, target: str, setting: Setting, limit: int | None) -> str:
    own, base = shown_argument(t.label), base_argument(t.adapter, setting)
    options: list[str] = []
    if any(n.code in UNTOLD for n in t.adapter.notices):
        options.append("--alpha A")
    if cure == "merge":
        refused = [n.code for n in t.adapter.notices if n.refused]
        if set(refused) - _LIFTED.keys() - UNTOLD - WITHOUT_BASE:
            return ""
        options += [_LIFTED[code] for code in refused if code in _LIFTED]
        return _joined("merge", base, own, *options, "-o", output_argument(t.adapter, "merged"))
    with_base = setting.base is not None or t.adapter.format in _OF_A_BASE
    if cure == "convert":
        if target == "gguf" or with_base:
            options.append(f"--base {base}")
        output = output_argument(t.adapter, target)
        return _joined("convert", own, f"--to {target}", *options, "-o", output)
    rank = min(max(t.ranks, default=1), limit or max(t.ranks, default=1))
    if with_base:
        options.append(f"--base {base}")
    output = output_argument(t.adapter, f"rank-{rank}")
    return _joined("resize", own, f"--rank {rank}", *options, "-o", output)


def _joined(*words: str) -> str:
    return " ".join(("loratool", *words))


def base_argument(adapter: Adapter, setting: Setting) -> str:
    """The base by the path or the id that is known, or BASE."""
    known = setting.base.label if setting.base else adapter.declared.base_name or ""
    # A bare name is that of a folder somewhere else.
    return shown_argument(known) if setting.base or "/" in known else "BASE"


def output_argument(adapter: Adapter, what: str) -> str:
    """A folder beside the adapter, of its name and what becomes of it."""
    label = re.sub(r"\.(safetensors|bin|pt|pth|gguf|npz|ckpt)$", "", adapter.label.rstrip("/"))
    # What is on the Hub, or only called "..", gets its place in the folder where one is.
    elsewhere = origin_of(adapter.source) is not None or not label.strip("./")
    return shown_argument(f"{adapter.name if elsewhere else label}-{what}")
