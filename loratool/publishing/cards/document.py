"""Model cards: README.md for the Hub, made or completed with what a folder itself tells.

What somebody wrote stays as it is, byte for byte. YAML keys that are missing are added, and what
loratool says stands between two markers, so that making a card twice gives the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.errors import FileError, explained_os_errors
from loratool.publishing.cards.facts import CardFacts, base_of, dicts, hub_id, read_facts
from loratool.publishing.cards.markdown import markdown_of, markdown_title
from loratool.publishing.cards.metadata import BLOCK, read_yaml
from loratool.publishing.cards.sections import card_section
from loratool.publishing.cards.usage import use_of

__all__ = ["Licence", "base_of", "make_card"]

BEGIN, END = "<!-- loratool:begin -->", "<!-- loratool:end -->"
#: The section with its markers, each on a line of its own, which ends where the first end is.
_SECTION = re.compile(
    rf"(?:(?<=[\r\n])|\A){BEGIN}[ \t]*(?=[\r\n])"
    rf"(?:(?!(?<=[\r\n]){BEGIN}[ \t]*[\r\n])[\s\S])*?"
    rf"[\r\n]{END}(?=[ \t]*(?:[\r\n]|\Z))"
)
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """What the base's card says."""

    license: str | None
    license_name: str | None = None
    license_link: str | None = None


def make_card(
    folder: Path,
    text: str | None,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    licence: Licence | None = None,
    told: Told = NOTHING_TOLD,
) -> str:
    """README.md for the adapter or the model in `folder`.

    Parameters
    ----------
    text: the card that is there already, None for none. What is in it stays.
    repo_id: where it will be on the Hub; the code in the card loads it from there.
    base_model: the Hub id of the base; by default what the folder tells, see `base_of`.
    licence: of the base, used where the card names none. told: what a user says of an adapter.

    Raises FileError for a card whose YAML is invalid and for damaged files, AdapterError and
    BaseError for a folder that holds neither an adapter nor a model.
    """
    folder = Path(folder)
    with explained_os_errors():
        facts = read_facts(folder, base_model, told)
    text = text or ""
    mark, text = ("\ufeff", text[1:]) if text.startswith("\ufeff") else ("", text)
    found = re.search(r"\r?\n", text)
    newline = found[0] if found else "\n"
    title = markdown_title(repo_id.rpartition("/")[2] if repo_id else facts.name)
    body = markdown_of(card_section(facts, repo_id or f"path/to/{facts.name}"))
    head, rest = _with_metadata(text, _metadata(facts, licence), newline)
    return mark + head + _with_section(rest, title, f"{BEGIN}\n\n{body}\n\n{END}", newline)


def _metadata(facts: CardFacts, licence: Licence | None) -> dict[str, Any]:
    """The YAML keys of the card."""
    found: dict[str, Any] = {}
    bases = [facts.base] if facts.base else []
    if facts.is_merged:
        repos = (hub_id(entry.get("repo")) for entry in dicts(facts.record.get("adapters")))
        bases += [repo for repo in dict.fromkeys(repos) if repo and repo not in bases]
    if bases:
        found["base_model"] = bases[0] if len(bases) == 1 else bases
    if facts.adapter is not None or facts.is_merged:
        found["base_model_relation"] = "adapter" if facts.adapter is not None else "merge"
    use = use_of(facts)
    tags = ["loratool"]
    if facts.adapter is not None:
        library = facts.adapter.declared.library
        tags = ["lora"] * (facts.adapter.peft_type == "LORA") + tags + [library] * bool(library)
        if library:
            found["library_name"] = library
    else:
        tags = ["lora", *tags, "merge"] if facts.is_merged else tags
        if use is not None:
            found["library_name"] = "transformers"
    if use is not None and use.certain and use.pipeline:
        found["pipeline_tag"] = use.pipeline
    if licence is not None and licence.license:
        named = {key: getattr(licence, key) for key in _LICENCE_KEYS}
        found |= {key: value for key, value in named.items() if value}
    return found | {"tags": tags}


def _with_section(body: str, title: str, own: str, newline: str) -> str:
    """The body with our section in its place: where the markers are, or at the end."""
    own = own.replace("\n", newline)
    there = _SECTION.search(body)
    if there:
        return body[: there.start()] + own + body[there.end() :]
    if not body.strip():
        return f"{body}{newline * (not body)}{title}{newline * 2}{own}{newline}"
    gap = newline * (1 if body.endswith(("\n", "\r")) else 2)
    return f"{body}{gap}{own}{newline}"


# -------------------------------------------------------------------------------------- YAML


def _with_metadata(text: str, wanted: dict[str, Any], newline: str) -> tuple[str, str]:
    """The YAML block with the keys that it lacks, and the rest of the card.

    The block is edited as text: comments, quotes and the order stay.
    """
    from huggingface_hub import ModelCardData

    match = BLOCK.search(text)
    if match is None:
        block = ModelCardData(**wanted).to_yaml(line_break=newline)
        return f"---{newline}{block}{newline}---{newline}", newline * bool(text.strip()) + text
    block, rest = match[2], text[match.end() :]
    old = _parsed(block)
    if any(key in old for key in _LICENCE_KEYS):
        # One licence's name with the link of another would be worse than none.
        wanted = {key: value for key, value in wanted.items() if key not in _LICENCE_KEYS}
    new = _completed(block, old, wanted, newline)
    head = text[: match.start(2)] + new + text[match.end(2) : match.end()]
    return head + ("" if head.endswith(("\n", "\r")) else newline), rest


def _parsed(block: str) -> dict[Any, Any]:
    """The values of a YAML block, which must be what the Hub's own library can read."""
    from huggingface_hub import ModelCardData

    values = read_yaml(block)
    try:
        # What somebody says of results is not ours to judge.
        ModelCardData(**values, ignore_metadata_errors=True)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise FileError(
            f"README.md: the YAML at its beginning is not valid ({error}).",
            "Repair it, or remove it; a new one is made then.",
        ) from None
    return values


def _completed(block: str, old: dict[Any, Any], wanted: dict[str, Any], newline: str) -> str:
    """The block with the missing keys and tags. Raises FileError where there is no safe place."""
    missing = {key: value for key, value in wanted.items() if key not in old}
    tags = old.get("tags")
    more = [tag for tag in wanted["tags"] if tag not in tags] if isinstance(tags, list) else []
    for longer in [*_with_tags(block, more, newline), block]:
        whole = old if longer == block else {**old, "tags": [*old["tags"], *more]}
        if longer != block and not _says(longer, whole):
            continue
        for text in _with_keys(longer, missing, newline):
            if _says(text, {**whole, **missing}):
                return text
    raise FileError(
        "README.md: nothing can be added to the YAML at its beginning without changing it.",
        f"Add these keys by hand: {', '.join(missing)}.",
    )


def _says(block: str, wanted: dict[Any, Any]) -> bool:
    """Whether this is YAML of these values, compared by their text: a NaN is no other NaN."""
    try:
        found = read_yaml(block)
    except FileError:
        return False
    return sorted(map(repr, found.items())) == sorted(map(repr, wanted.items()))


def _with_tags(block: str, tags: list[str], newline: str) -> Iterator[str]:
    """The block with more entries in its list of tags, written in the ways that may be right."""
    yaml = import_module("yaml")
    root = yaml.compose(block, Loader=yaml.SafeLoader) if tags else None
    for key, node in root.value if root is not None else []:
        if key.value != "tags" or not isinstance(node, yaml.SequenceNode):
            continue
        if node.flow_style:
            at = node.end_mark.index - 1
            for comma in (", " if node.value else "", ""):
                yield block[:at] + comma + ", ".join(tags) + block[at:]
        elif node.value:
            line = re.compile(r"[^\r\n]*").match(block, node.value[-1].end_mark.index)
            at = line.end() if line else len(block)
            indent = newline + " " * node.start_mark.column + "- "
            yield block[:at] + "".join(indent + tag for tag in tags) + block[at:]


def _with_keys(block: str, missing: dict[str, Any], newline: str) -> Iterator[str]:
    """The block with more keys: at the end, at the beginning, or within its braces."""
    from huggingface_hub import ModelCardData

    if not missing:
        yield block
        return
    lines = ModelCardData(**missing).to_yaml(line_break=newline)
    yield block + newline * bool(block) + lines
    yaml = import_module("yaml")
    root = yaml.compose(block, Loader=yaml.SafeLoader)
    if root is None:
        return
    start, end = root.start_mark.index, root.end_mark.index - 1
    if not root.flow_style:
        indent = newline + " " * root.start_mark.column
        yield block[:start] + lines.replace(newline, indent) + indent + block[start:]
        return
    pairs = ", ".join(f"{key}: {json.dumps(value)}" for key, value in missing.items())
    for comma in (", " if root.value else "", ""):
        yield block[:end] + comma + pairs + block[end:]
