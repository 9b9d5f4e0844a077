"""When an adapter was trained, on what, and which words call it: what metadata tell of training.

kohya's sd-scripts write `ss_…`, Stability's standard is `modelspec.…`, and others use words of
their own; all values are texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from loratool.errors import FileError
from loratool.storage.jsonfile import parse_json

#: What names words to prompt with, the most telling first.
_TRIGGERS = ("modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trigger_word",
             "ss_trigger_words", "activation_text", "instance_prompt")  # fmt: skip
_FAMILIES = ("ss_base_model_version", "modelspec.architecture", "base_model_version")
_BASES = ("ss_sd_model_name", "base_model", "base_model_name_or_path", "ss_base_model_name")
_ENDED = ("ss_training_finished_at", "ss_training_started_at")

#: The most frequent tags that are shown of captions.
_TAGS = 5
#: Texts that are longer are no words of a prompt; tables of tags may have megabytes.
_LONGEST, _LONGEST_TABLE = 1_000, 20_000_000
#: Nobody trained a LoRA before (June 2021), and times after 2100 are in other units.
_FIRST, _LAST = 1_622_505_600, 4_102_444_800


def iso_time(seconds: float) -> str | None:
    """A time since 1970 as text in UTC; None for what is no time of a training."""
    if not math.isfinite(seconds) or not 0 < seconds < _LAST:
        return None
    moment = datetime.fromtimestamp(int(seconds), timezone.utc)
    return moment.isoformat().replace("+00:00", "Z")


def training_end(metadata: Mapping[str, str]) -> str | None:
    """When training ended, as far as the metadata say."""
    for key in _ENDED:
        with suppress(ValueError):
            seconds = float(metadata.get(key, ""))
            if seconds > _FIRST and (text := iso_time(seconds)):
                return text
    text = metadata.get("modelspec.date", "")[:40].replace("Z", "+00:00")
    with suppress(ValueError, OverflowError):
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return iso_time(moment.timestamp())
    return None


def declared_family(metadata: Mapping[str, str]) -> str:
    """The architecture that it was trained for, as the metadata call it."""
    return _first(metadata, _FAMILIES).removesuffix("/lora")


def declared_base(metadata: Mapping[str, str]) -> str:
    return _first(metadata, _BASES)


def declared_rank(metadata: Mapping[str, str]) -> int | None:
    """The rank of an adapter whose modules are not read."""
    text = metadata.get("ss_network_dim", "")
    return int(text) if text.isdecimal() and text.isascii() and 0 < len(text) < 7 else None


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """What the file itself says to prompt with."""
    text = _first(metadata, _TRIGGERS)
    return [text] if text else []


def frequent_tags(metadata: Mapping[str, str]) -> list[str]:
    """The most frequent tags of the captions that it was trained on."""
    text = metadata.get("ss_tag_frequency", "")
    if not text or len(text) > _LONGEST_TABLE:
        return []
    try:
        table = parse_json(text.encode("utf-8", "replace"), "ss_tag_frequency")
    except FileError:
        return []
    counts: Counter[str] = Counter()
    for tags in table.values() if isinstance(table, dict) else ():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if tag.strip() and type(count) is int and len(tag) < _LONGEST:
                counts[tag.strip()] += count
    return [tag for tag, _ in counts.most_common(_TAGS)]


def _first(metadata: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    found = (str(metadata.get(key) or "").strip() for key in keys)
    return next((text for text in found if text and text != "None" and len(text) < _LONGEST), "")
