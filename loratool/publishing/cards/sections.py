"""What a model card says, as a sheet: what this is, and the sections that other modules make."""

from __future__ import annotations

from loratool.adapters.adapter import Adapter
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import Dequantised
from loratool.models.quantised.refusals import is_plain
from loratool.publishing.cards.facts import (
    CardFacts,
    bases_named,
    dicts,
    dtype_names,
    hub_id,
    linked,
    linked_repo,
    part,
    sort_of,
    string,
    texts,
)
from loratool.publishing.cards.history import how_made
from loratool.publishing.cards.kept import what_was_kept
from loratool.publishing.cards.modules import modules_of, span
from loratool.publishing.cards.usage import how_to_use
from loratool.sheet import Heading, Piece, Sheet, Words, code, joined_words, listed_words, said
from loratool.words import agreeing, counted, format_bytes


def card_section(facts: CardFacts, place: str) -> Sheet:
    """Everything that loratool says in a card. `place` is where the code loads it from."""
    sections = {
        "What this is": _what(facts),
        "How it was made": how_made(facts),
        "Modules": modules_of(facts),
        "What was kept": what_was_kept(facts),
        "How to use": how_to_use(facts, place),
    }
    sheet = Sheet("card", subject=facts.name)
    for title, pieces in sections.items():
        if pieces:
            sheet.add(Heading(title), *pieces)
    return sheet


def _what(facts: CardFacts) -> list[Piece]:
    if facts.adapter is not None:
        return [said(*_first_of_adapter(facts, facts.adapter)), said(_adapter_size(facts.adapter))]
    assert facts.model is not None
    return [said(*_first_of_model(facts), *_model_has(facts.model))]


# ----------------------------------------------------------------------------------- an adapter


def _first_of_adapter(facts: CardFacts, adapter: Adapter) -> list[Words]:
    """The sentence that says what it is and what it is for."""
    base = linked_repo(facts.base) if facts.base else "a base model that is not recorded here"
    inputs = [linked(entry) for entry in dicts(facts.record.get("adapters"))]
    if not adapter.is_read:
        return [f"This is {adapter.description}, for ", base, "."]
    if facts.command == "extract":
        tuned, before = part(facts.record, "tuned"), part(facts.record, "base")
        named = linked_repo(facts.base) if facts.base else linked(before)
        cut = ": the difference between the two, cut to low rank."
        unknown = " The Hub id of the base is not recorded here." * (not facts.base)
        extracted = joined_words(", extracted from the fine-tuned model ", linked(tuned), cut)
        return ["A LoRA adapter for ", named, extracted, unknown]
    if facts.command == "combine" and inputs:
        method = code(str(part(facts.record, "options").get("method") or "sum"))
        combined = joined_words(", combined from ", listed_words(inputs), " by ", method, ".")
        return ["A LoRA adapter for ", base, combined]
    if facts.command == "resize" and inputs:
        return ["A LoRA adapter for ", base, ": ", inputs[0], f" resized{_old_ranks(facts)}."]
    return [f"{sort_of(adapter)} for ", base, "."]


def _old_ranks(facts: CardFacts) -> str:
    before = [
        float(rank)
        for entry in dicts(part(facts.record, "result").get("modules"))
        for rank in entry.get("ranks") or []
        if isinstance(rank, int)
    ]
    return f" from rank {span(before)}" if before else ""


def _adapter_size(adapter: Adapter) -> str:
    modules = adapter.modules.values()
    ranks = [float(m.rank) for m in modules]
    text = ""
    if ranks:
        word = "rank" if len(set(ranks)) == 1 else "ranks"
        text = f"It adapts {counted(len(ranks), 'module')} with {word} {span(ranks)}"
        if any(m.magnitude is not None for m in modules):
            text += " and DoRA"
        text += ". "
    if adapter.functions:
        text += f"{counted(len(adapter.functions), 'weight', 'is')} made anew of the base's own. "
    if adapter.replaced:
        text += f"{counted(len(adapter.replaced), 'tensor', 'is')} saved whole. "
    if adapter.token_rows:
        rows = sum(len(r.indices) for r in adapter.token_rows.values())
        text += f"{counted(rows, 'token')} of the vocabulary {agreeing(rows, 'has')} "
        text += "trained embeddings. "
    tensors = adapter.tensors.values()
    size = f"{counted(adapter.parameters, 'parameter')} in {dtype_names(tensors) or 'no tensors'}"
    return f"{text}It holds {size}, {format_bytes(adapter.nbytes)}."


# ------------------------------------------------------------------------------------- a model


def _first_of_model(facts: CardFacts) -> list[Words]:
    """How it came about, with a space behind it; nothing where nothing tells."""
    inputs = [linked(entry) for entry in dicts(facts.record.get("adapters"))]
    base = part(facts.record, "base")
    named = linked_repo(facts.base) if facts.base else linked(base)
    if facts.command == "merge" and inputs:
        what = "an adapter" if len(inputs) == 1 else f"{len(inputs)} adapters"
        merged = [named, f" with {what} merged into its weights: ", listed_words(inputs), ". "]
        return [*merged, _said_bases(facts), _said_treatment(facts)]
    if facts.command == "dequantise":
        form = string(base.get("quantised")) or "quantised"
        return [named, f", dequantised: the plain model that its {form} weights stand for. "]
    if facts.command == "unmerge":
        removed = listed_words([linked(entry) for entry in dicts(facts.record.get("removed"))])
        rounded = ", whose deltas were subtracted and the result rounded once: near the model "
        rounded += "they were merged into, not the same bit for bit. "
        return [linked(base), " without ", removed, rounded]
    return ["The base model is ", linked_repo(facts.base), ". "] if facts.base else []


def _model_has(model: Checkpoint) -> list[Words]:
    classes = texts(model.config.get("architectures"))
    kinds = [code(name) for name in [*classes[:1], model.model_type][:1] if name]
    tensors = counted(len(model.tensors), "tensor")
    size = f"{format_bytes(model.nbytes)} in {counted(len(model.files), 'file')}"
    has = f" has {tensors}, {_model_size(model)}, {size}."
    return ["The model", *((" (", kind, ")") for kind in kinds), has]


def _model_size(model: Checkpoint) -> str:
    """Its parameters and what they are stored in."""
    size = counted(model.parameters, "parameter")
    if isinstance(model, Dequantised):
        plain = [info for name, info in model.tensors.items() if name not in model.weights]
        rest = f", all else is {dtype_names(plain)}" if plain else ""
        count = counted(len(model.weights), "weight", "is")
        return f"{size} ({count} quantised as {model.title}{rest})"
    if not is_plain(model):  # in a form that is not read: parts of weights are no parameters
        return "of quantised weights"
    return f"{size} in {dtype_names(model.tensors.values())}"


def _said_treatment(facts: CardFacts) -> str:
    """What became of a base that was quantised."""
    form = string(part(facts.record, "base").get("quantised"))
    if not form:
        return ""
    become = {
        "plain": "all of it was dequantised",
        "keep": "what is adapted was dequantised, the rest is as it was",
        "requantise": "what is adapted was quantised again, which rounds the change",
    }
    how = part(facts.record, "options").get("quantised")
    known = become.get(how) if isinstance(how, str) else None
    return f"The base is quantised ({form}): {known or 'what is quantised of it is as it was'}. "


def _said_bases(facts: CardFacts) -> Words:
    """What the adapters call their base, where the base that was taken has no id."""
    if hub_id(part(facts.record, "base").get("repo")):
        return ""
    if facts.base:
        return "That this is the base is what the adapters say. "
    named = listed_words([linked_repo(base) for base in bases_named(facts.record)])
    unknown = "The Hub id of the base is not recorded; the adapters name "
    return joined_words(unknown, named, ". ") if bases_named(facts.record) else ""
