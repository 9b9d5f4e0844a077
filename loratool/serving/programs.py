"""All programs whose rules are known, and what each makes of an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loratool.adapters.adapter import Adapter
from loratool.errors import unknown
from loratool.serving.exllama import EXLLAMA
from loratool.serving.hotswap import HOTSWAP
from loratool.serving.llamacpp import LLAMACPP
from loratool.serving.lorax import LORAX
from loratool.serving.mlx import MLX
from loratool.serving.ollama import OLLAMA
from loratool.serving.sglang import SGLANG
from loratool.serving.tgi import TGI
from loratool.serving.traits import Traits
from loratool.serving.verdict import (
    CURES,
    Cure,
    Remark,
    ServingProgram,
    Setting,
    Verdict,
    verdict_of,
)
from loratool.serving.vllm import VLLM
from loratool.words import enumerated

#: By the names that the command line takes.
PROGRAMS = {
    program.name: program
    for program in (VLLM, SGLANG, LLAMACPP, LORAX, TGI, EXLLAMA, OLLAMA, HOTSWAP, MLX)
}

#: Formats of the dialects that programs read, for people.
_FORMATS = {"peft": "PEFT", "gguf": "GGUF", "mlx": "MLX"}
#: How a verdict is said in a line.
_SAID = {"refused": "refused", "differs": "another result", "unknown": "not known"}
#: What is wrong with an adapter in a dialect that a program does not read.
_OTHER = "other format"
#: Programs that a line names before it counts them.
_NAMED = 3


def chosen_programs(names: Iterable[str]) -> list[ServingProgram]:
    """The programs of these names, all of them if there is none. Raises UsageError."""
    given = list(dict.fromkeys(names))
    for name in given:
        if name not in PROGRAMS:
            raise unknown("program", name, PROGRAMS)
    return [PROGRAMS[name] for name in given or PROGRAMS]


def verdict_on(traits: Traits, program: ServingProgram, setting: Setting) -> Verdict:
    """What a program makes of an adapter, by its headers. The command that mends it is left out."""
    if traits.adapter.format not in program.reads:
        return verdict_of(program, [_other_format(traits, program, setting)])
    remarks = list(_of_file(traits, program))
    if traits.is_peft:
        remarks += _by_rules(traits, program, setting)
    return verdict_of(program, remarks)


def _by_rules(traits: Traits, program: ServingProgram, setting: Setting) -> list[Remark]:
    return [
        Remark(rule.outcome, rule.short, why, rule.cure, rule.source, rule.ran)
        for rule in program.rules
        if (why := rule.why(traits, setting))
    ]


def _other_format(traits: Traits, program: ServingProgram, setting: Setting) -> Remark:
    """The adapter is in a dialect that the program does not read. What it would make of the same
    adapter in its own decides what mends it."""
    needed: list[Cure] = ["convert"]
    found = _by_rules(traits, program, setting) + list(_of_file(traits, program))
    for remark in found:
        trouble = remark.outcome != "loads" and remark.short not in ("file", "damaged")
        if trouble and not (program.native == "gguf" and remark.cure == "resize"):
            needed.append(remark.cure)
    taken = " or ".join(_FORMATS[name] for name in program.reads)
    why = f"{traits.adapter.description} is not {taken}'s format"
    return Remark("refused", _OTHER, why, max(needed, key=CURES.index), program.source)


def _of_file(traits: Traits, program: ServingProgram) -> Iterable[Remark]:
    """What no program can use, or nobody tried, whatever its rules are."""
    notice = traits.damage
    if notice is not None:
        said = notice.message.partition("\n")[0].rstrip(":")
        yield Remark("unknown", "damaged", f"the file is not whole, or not understood: {said}")
    if traits.is_peft and traits.kind not in ("LORA", "TRAINABLE_TOKENS"):
        why = f"it is {enumerated(traits.algorithms or [traits.kind])}, and only LoRA is loaded"
        yield Remark("refused", "no LoRA", why, "convert", program.source)
    if program.entries and traits.is_peft and traits.entry not in program.entries:
        why = f"the weights are in {traits.entry}, and {program.entries[0]} is looked for"
        yield Remark("refused", "file", why, "resize", program.source)
    if traits.has_wrapped_names:
        if program.name == HOTSWAP.name:
            why = "PEFT knows none of the names in the file as they are, and loads nothing of it"
            yield Remark("differs", "names", why, "convert", program.source, ran=True)
        else:
            why = "its names hold what training puts around them; nobody tried that"
            yield Remark("unknown", "names", why, "convert", program.source)
    if traits.odd_kinds and program.name != HOTSWAP.name:
        why = f"nobody tried factors on layers of the kind {enumerated(traits.odd_kinds)}"
        yield Remark("unknown", "kind of layer", why, "merge", program.source)


def serving_words(adapter: Adapter) -> dict[str, str]:
    """How an adapter fares in each program, in a few words: "loads", "refused: DoRA"."""
    if not adapter.is_read:
        return {}
    found, traits, setting = {}, Traits(adapter), Setting()
    for name, program in PROGRAMS.items():
        verdict = verdict_on(traits, program, setting)
        troubles = verdict.troubles
        short = f": {troubles[0].short}" if troubles else ""
        found[name] = f"{verdict.outcome}{short}"
    return found


def serving_line(words: dict[str, str], everyone: bool = False) -> str:
    """The same in one line, for people: "vLLM, LoRAX: load; SGLang: refused (ranks differ)".

    Programs that read another format are not said anything of where some read this one, and of
    several that fare alike the first are named, if not `everyone`.
    """
    groups: dict[str, list[str]] = {}
    for name, said in words.items():
        groups.setdefault(said, []).append(PROGRAMS[name].title)
    others = groups.pop(f"refused: {_OTHER}", [])
    loading = groups.pop("loads", [])
    most = None if everyone else _NAMED
    parts = []
    if loading:
        parts.append(f"{_several(loading, most)}: load{'s' * (len(loading) == 1)}")
    for said, titles in groups.items():
        outcome, _, why = said.partition(": ")
        parts.append(f"{_several(titles, most)}: {_SAID[outcome]} ({why})")
    if not parts:
        parts.append(f"{_several(others, most)}: refused ({_OTHER})")
    return "; ".join(parts)


def _several(titles: Sequence[str], most: int | None) -> str:
    more = len(titles) - (most or len(titles))
    named = ", ".join(titles[: most if more > 1 else None])
    return f"{named} and {more} more" if more > 1 else named
