"""What a model card can say: what the headers and loratool.json of a folder tell, and no more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter, Declared
from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.dtypes import dtype_name
from loratool.merging.identity import is_quantised_name, plain_name
from loratool.models.checkpoint import Checkpoint, open_checkpoint
from loratool.models.quantised.base import dequantised_if_read
from loratool.models.tokenizers import tokenizer_files
from loratool.publishing.contents import adapter_in
from loratool.sheet import Toned, Words, code, joined_words
from loratool.storage.fields import is_finite
from loratool.storage.filenames import PROVENANCE
from loratool.storage.folder import Folder
from loratool.storage.hashing import file_sha256
from loratool.storage.jsonfile import read_json
from loratool.storage.record import check_schema
from loratool.storage.tensors import TensorInfo
from loratool.words import enumerated

_HUB = "https://huggingface.co"

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
#: The Hub's first models have ids without an owner; any other single word is a folder's name.
_OLD_ID = re.compile(
    r"(distil)?gpt2(-medium|-large|-xl)?|openai-gpt|(albert|xlnet|camembert|(xlm-)?roberta)-"
    r"(base|large|xlarge|xxlarge)(-v[12]|-cased)?|(distil)?(bert|roberta)-(base|large)(-\w+)*"
    r"(-(un)?cased)?|t5-(small|base|large|3b|11b)"
)
_NO_ID = re.compile(
    r"(models?|checkpoints?|ckpts?|outputs?|out|results?|runs|tmp|weights|saved_models)/.*"
    r"|.*(--|\.\.).*|.*[.-](/.*)?|.*/checkpoint-\d+"
    r"|.*\.(safetensors|bin|pt|pth|ckpt|json|gguf|zip|git)",
    re.IGNORECASE,
)
#: Characters of a path that Linux takes.
_LONGEST = 4096
_CACHED = re.compile(r"(?:^|[/\\])models--([\w.-]+?)--([\w.-]+)(?:[/\\]|$)", re.ASCII)


@dataclass(frozen=True)
class CardFacts:
    """What is known of the adapter or the model in a folder; one of `adapter` and `model` is set.

    `base` is the Hub id of the base model, `revision` the one of it that was used, and `subfolder`
    where in it. `record` is loratool.json, {} without one. It is `stale`, and {} too, where it
    describes other weights.
    """

    name: str
    base: str | None
    revision: str | None
    subfolder: str
    record: dict[str, Any]
    stale: bool
    tokenizer: bool
    undo: bool
    adapter: Adapter | None = None
    model: Checkpoint | None = None

    @property
    def command(self) -> str:
        """The loratool command that made it, "" if that is not known."""
        return str(self.record.get("command") or "")

    @property
    def is_merged(self) -> bool:
        return self.model is not None and bool(dicts(self.record.get("adapters")))


def read_facts(folder: Path, base_model: str | None = None, told: Told = NOTHING_TOLD) -> CardFacts:
    """Read the headers in `folder`, and its record.

    `base_model` is the Hub id of the base where somebody knows it, and `told` what a user says of
    an adapter. Raises FileError, AdapterError
    and BaseError for what cannot be read.
    """
    adapter, model = _opened(folder, told)
    record = _record(folder)
    stale = bool(record) and not _fits(record, adapter, model)
    if stale:
        record = {}
    declared = adapter.declared if adapter else Declared()
    base = hub_id(base_model) if base_model is not None else _base(declared, record)
    used = part(record, "base")
    if not base or base != hub_id(used.get("repo")):
        named = base is not None and base == hub_id(declared.base_name)
        used = {"revision": declared.base_revision} if named else {}
    undo = part(record, "undo").get("file")
    return CardFacts(
        name=folder.resolve().name.strip() or "model",
        base=base,
        revision=string(used.get("revision")) or None,
        subfolder=re.sub(r"/?[^/]*\.(safetensors|bin|pt|pth)$", "", string(used.get("path"))),
        record=record,
        stale=stale,
        tokenizer=bool(tokenizer_files(Folder(folder))),
        undo=isinstance(undo, str) and (folder / undo).is_file(),
        adapter=adapter,
        model=model,
    )


def base_of(folder: Path, told: Told = NOTHING_TOLD) -> str | None:
    """The Hub id of the base model, if the folder records it; None for a local path.

    Raises FileError for a config or a record that is no JSON.
    """
    adapter = adapter_in(folder, told)
    return _base(adapter.declared if adapter else Declared(), _record(folder))


def _base(declared: Declared, record: dict[str, Any]) -> str | None:
    used = part(record, "base")
    known = hub_id(declared.base_name) or hub_id(used.get("repo"))
    named = bases_named(record)
    return known or (named[0] if len(named) == 1 and not doubt_of_base(record) else None)


def doubt_of_base(record: dict[str, Any]) -> str:
    """Why the base that the adapters of a record name need not be the one that was merged; "" if
    nothing speaks against it."""
    used, named = part(record, "base"), bases_named(record)
    if used.get("adapters"):
        return "it held adapters already"
    if len(named) > 1:
        return "they name several"
    quantised = [name for name in named if is_quantised_name(name)]
    if quantised:
        return f"{quantised[0]} is a quantised copy"
    warned = {string(w.get("code")) for w in dicts(part(record, "result").get("warnings"))}
    own = plain_name(string(used.get("name")))
    if "base-differs" in warned or any(own and plain_name(n) not in ("", own) for n in named):
        return "the one that was merged has another name"
    return ""


def bases_named(record: dict[str, Any]) -> list[str]:
    """The Hub ids by which the adapters of a record call their base."""
    found = [entry.get("base_model_name_or_path") for entry in dicts(record.get("adapters"))]
    return list(dict.fromkeys(filter(None, map(hub_id, found))))


def hub_id(name: object) -> str | None:
    """`name` if it can only be an id on the Hub, or a path that has one: of the download cache."""
    if not isinstance(name, str):
        return None
    cached = _CACHED.search(name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if _OLD_ID.fullmatch(name):
        return name
    return name if _ID.fullmatch(name) and not _NO_ID.fullmatch(name) else None


def _opened(folder: Path, told: Told) -> tuple[Adapter | None, Checkpoint | None]:
    adapter = adapter_in(folder, told)
    return adapter, None if adapter else dequantised_if_read(open_checkpoint(folder))


def _record(folder: Path) -> dict[str, Any]:
    path = folder / PROVENANCE
    record = read_json(path) if path.is_file() else {}
    check_schema(record, path)
    return record


def _fits(record: dict[str, Any], adapter: Adapter | None, model: Checkpoint | None) -> bool:
    """Whether the record is of these weights.

    A model's are not hashed, which would take as long as reading it all.
    """
    if adapter is not None:
        noted = part(record, "files").get(adapter.weights.name)
        return noted is not None and noted == file_sha256(adapter.weights)
    shards = part(record, "shards")
    return model is not None and shards.keys() == {path.name for path in model.files}


def part(document: object, key: str) -> dict[str, Any]:
    """The object under `key`, {} for anything else."""
    found = document.get(key) if isinstance(document, dict) else None
    return found if isinstance(found, dict) else {}


def dicts(value: object) -> list[dict[str, Any]]:
    """The objects in a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def texts(value: object) -> list[str]:
    """The strings in a list."""
    return [entry for entry in value if isinstance(entry, str)] if isinstance(value, list) else []


def number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and is_finite(value) else None


def string(value: object) -> str:
    """A text that can be a name or a path, "" for anything else: none is longer than _LONGEST."""
    return value if isinstance(value, str) and len(value) <= _LONGEST else ""


def reference(entry: dict[str, Any]) -> str:
    """What an input is called in a command: `org/name@revision`, or its name."""
    repo, revision = hub_id(entry.get("repo")), string(entry.get("revision"))
    if repo is None:
        return re.split(r"[/\\]", string(entry.get("name")))[-1] or "INPUT"
    return address(repo, revision, string(entry.get("path")))


def address(repo: str, revision: str | None, path: str = "") -> str:
    """A place on the Hub as the command line takes it."""
    place = f"{repo}@{revision}" if revision else repo
    return f"hf://{place}/{path}" if path else place


def short_revision(revision: str) -> str:
    """12 digits of a commit; the whole name of a branch or a tag."""
    return revision[:12] if re.fullmatch("[0-9a-f]{40}", revision) else revision


def linked_repo(repo: str) -> Toned:
    return code(repo, f"{_HUB}/{repo}")


def linked(entry: dict[str, Any]) -> Words:
    """An input by its name, with links to it and to its revision where it is on the Hub."""
    repo, revision = hub_id(entry.get("repo")), string(entry.get("revision"))
    if repo is None:
        return code(reference(entry))
    path = string(entry.get("path"))
    named = joined_words(linked_repo(repo), (", ", code(path)) if path else ())
    if not re.fullmatch(r"[\w./-]+", revision, re.ASCII):
        return named
    at = code(short_revision(revision), f"{_HUB}/{repo}/tree/{revision}")
    return joined_words(named, " at ", at)


def dtype_names(tensors: Iterable[TensorInfo]) -> str:
    """The dtypes of these tensors, the most frequent one first; beside floats none is counted."""
    every = list(tensors)
    floats = [info.dtype for info in every if info.is_float] or [info.dtype for info in every]
    found = Counter(floats).most_common()
    return enumerated([dtype_name(dtype) for dtype, _ in found])


def sort_of(adapter: Adapter) -> str:
    """What it is, by the algorithms of its modules: "A LoRA adapter", "An adapter (OFT)"."""
    found = {m.algorithm for m in adapter.modules.values()}
    found |= {function.algorithm for function in adapter.functions.values()}
    others = sorted(found - {"LoRA", "DoRA"})
    return f"An adapter ({enumerated(others)})" if others else "A LoRA adapter"
