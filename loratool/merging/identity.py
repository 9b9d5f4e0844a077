"""Is this the base that an adapter was trained on, and does it hold the adapter already?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from loratool.adapters.adapter import Adapter
from loratool.adapters.effect import idle_modules
from loratool.adapters.picking import share_parts
from loratool.adapters.weighting import Weight
from loratool.errors import MatchError, listed
from loratool.merging.provenance import Merged, merged_into, read_record, weights_sha256
from loratool.merging.replication import original
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import Dequantised
from loratool.notices import Notice
from loratool.storage.filenames import PROVENANCE
from loratool.storage.folder import origin_of
from loratool.words import counted

#: What repackaging adds to the name of a model: formats, widths and pieces of copies.
_REPACKED = re.compile(
    r"[-_.]+(unsloth|dynamic|sharded|quantized|unquantized|bnb|qat|hf|sym|kv|ov|mlx|marlin|smash\w*|"
    r"(bf|fp|f|float|bfloat|int|nf|mxfp|nvfp|q)\d+([-_]?\d)?([-_][a-z])*|\d+(\.\d+)?[-_]?(bits?|bpw)|"
    r"gptq|awq|gguf|hqq|exl[23]|eetq|aqlm|w\d+a\d+(kv\d+)?|\d+x\d+|\d+gb?)$"
)
_QUANTISED = re.compile(
    r"(^|[-_.])(bnb|(nf|fp|int|nvfp|mxfp)[48]|[2-8]-?bits?|gptq|awq|gguf|hqq|exl[23]|eetq|aqlm|qat|"
    r"w\d+a\d+|q\d_\w+|\d\.\d+bpw)($|[-_.])"
)
#: Names of folders that say nothing about what is in them.
_NO_NAME = re.compile(
    r"(base|tuned|adapter|lora|model|merged|output|out|result|weight|checkpoint|ckpt|final|best|last|"
    r"tmp|temp|snapshot|hf|main|test|untitled|default|version|transformers)s?([-_]?(model|\d+))*|"
    r"[0-9a-f]{7,}|\W*|\d+|(step|epoch)s?[-_]?\d*"
)
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOCAL = re.compile(r"[/\\~.]|[A-Za-z]:[/\\]")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def note_other_base(base: Checkpoint, adapters: Sequence[Adapter]) -> list[Notice]:
    """A warning for each adapter that names another base than what is known of this one's name."""
    known = [(name, where) for name, where in _names_of(base) if plain_name(name)]
    own = {plain_name(name) for name, _ in known} | {plain_name(base.name)}
    notices = []
    for adapter in adapters:
        name = adapter.declared.base_name
        # A path of another machine may confirm, as a folder's name here may: it is no name.
        if not name or not plain_name(name) or _LOCAL.match(name):
            continue
        if known and not any(_alike(plain_name(name), other) for other in own):
            given, where = known[0]
            notices.append(_differs(base, adapter, name, f"this one is {given} by {where}"))
        else:
            notices += _other_revision(base, adapter, name) + _other_quantisation(base, adapter)
    return notices


def _other_quantisation(base: Checkpoint, adapter: Adapter) -> list[Notice]:
    """A warning where one of the adapter's base and this one is quantised, or both are otherwise:
    what was trained is the sum with the one, and the result is the sum with the other."""
    named = str(adapter.declared.base_name)
    names = [name for name, _ in _names_of(base)] or [base.name]
    if any(_last(name) == _last(named) for name in names):
        return []
    here, given = original(base), names[0]
    if not isinstance(here, Dequantised):
        if not is_quantised_name(named):
            return []
        text = (
            f"{adapter.name} was trained on {named}, a quantised copy, and {given} is not "
            f"quantised: the result is another model than was trained, often as good. {named} as "
            "the base gives the trained one."
        )
    elif is_quantised_name(named):
        text = (
            f"{adapter.name} was trained on {named}, and {given} is quantised otherwise "
            f"({here.title}): the result is another model than was trained."
        )
    elif any(map(is_quantised_name, names)) or _is_quantised_on_load(here):
        text = (
            f"{adapter.name} names {named} as its base, and {given} is quantised ({here.title}). "
            "If training loaded its base quantised in the same way, the result is the trained "
            f"model; otherwise {named} gives that."
        )
    else:
        return []  # a model that is published so, under a name that does not say it
    return [Notice("other-quantisation", text, base.label)]


def _is_quantised_on_load(base: Dequantised) -> bool:
    return all(weight.stored_as.on_load for weight in base.weights.values())


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.partition("@")[0].rstrip("/\\"))[-1].lower()


def _alike(one: str, other: str) -> bool:
    """Whether two plain names are of one model; a copy may have lost the version (v0.1)."""
    bare = [re.sub(r"-v\d+(\.\d+)*$", "", name) for name in (one, other)]
    one_is_bare = (one == bare[0]) != (other == bare[1])
    return one == other or (one_is_bare and bare[0] == bare[1])


def _differs(base: Checkpoint, adapter: Adapter, name: str, instead: str) -> Notice:
    text = (
        f"{adapter.name} was trained on {name}, and {instead}. Equal shapes do not make it the "
        "same model: check that this is the base."
    )
    return Notice("base-differs", text, base.label)


def _other_revision(base: Checkpoint, adapter: Adapter, name: str) -> list[Notice]:
    origin, revision = origin_of(base.source), adapter.declared.base_revision
    commits = [str(r) for r in (origin and origin.revision, revision) if r]
    if origin is None or origin.repo.lower() != name.lower():
        return []
    if len(commits) < 2 or not all(map(_COMMIT.fullmatch, commits)) or commits[0] == commits[1]:
        return []
    named = f"{name} at revision {commits[1][:12]}"
    return [_differs(base, adapter, named, f"this is revision {commits[0][:12]}")]


def _names_of(base: Checkpoint) -> list[tuple[str, str]]:
    """What a base is called, and by what; the Hub alone where it is from there."""
    origin = origin_of(base.source)
    if origin is not None:
        return [(origin.repo, "its place on the Hub")]
    found = []
    record = read_record(base.directory) if base.folder.has(PROVENANCE) else None
    if record is not None:
        model = record["base"]
        found += [(model[k], PROVENANCE) for k in ("repo", "name") if model.get(k)]
    name = base.config.get("_name_or_path")
    if name:
        found.append((name, "_name_or_path of its config.json"))
    return found


def is_quantised_name(name: str) -> bool:
    """Whether the name of a model says that it is a quantised copy of another."""
    return _QUANTISED.search(name.rpartition("/")[2].lower()) is not None


def plain_name(name: str) -> str:
    """The name of a model without owner, folder, and what repackaging adds to it; "" for that of a
    folder that says nothing."""
    cached = re.search(r"models--[^/]*--([^/]+)", name)
    path = name.partition("@")[0].rstrip("/\\")
    last = (cached[1] if cached else re.split(r"[/\\]", path)[-1]).lower().replace("___", ".")
    while _REPACKED.search(last):
        last = _REPACKED.sub("", last)
    last = re.sub(r"^meta-", "", last)
    owner = path.partition("/")[0].lower()
    is_id = _ID.fullmatch(path) and not _LOCAL.match(path) and not _NO_NAME.fullmatch(owner)
    return last if is_id or not _NO_NAME.fullmatch(last) else ""


def refuse_held(base: Checkpoint, adapters: Sequence[Adapter]) -> None:
    """Raise MatchError where the record of the base says that it holds one of these already."""
    held = held_by(base)
    for adapter in adapters:
        digest = weights_sha256(adapter) if held else ""
        for entry in held:
            if entry.weights_sha256 != digest or not share_parts(adapter, entry.choice):
                continue
            raise MatchError(
                f"{base.label} holds {adapter.label} already, by its {PROVENANCE}: {entry}.",
                "--again merges it all the same; `loratool unmerge` takes it out.",
            )


def held_by(base: Checkpoint) -> list[Merged]:
    """What a base was merged from, by the record beside it, the oldest first."""
    if not base.folder.has(PROVENANCE):
        return []
    base.folder.fetch([PROVENANCE])
    record = read_record(base.directory)
    shards = record.get("shards") if record else None
    if not shards or not {p.name for p in base.files} <= shards.keys():
        return []  # of other weights
    return [*merged_into(base.directory, of_base=True), *merged_into(base.directory)]


def note_doing_nothing(adapters: Sequence[Adapter], weights: Sequence[Weight]) -> list[Notice]:
    """Adapters that change nothing, in whole or in part: a weight of 0, alpha or a factor zero."""
    notices = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if not weight:
            text = f"{adapter.label} has weight 0: its delta is not added."
            notices.append(Notice("zero-weight", text, adapter.label))
        notices += _note_idle(adapter)
    return notices


def _note_idle(adapter: Adapter) -> list[Notice]:
    idle = idle_modules(adapter)
    if not idle:
        return []
    if len(idle) == len(adapter.modules) and not (adapter.replaced or adapter.token_rows):
        text = (
            f"{adapter.label} does nothing: alpha or a factor is zero, as before training, in "
            f"{'its only module' if len(idle) == 1 else f'all its {len(idle)} modules'}."
        )
    else:
        text = (
            f"{counted(len(idle), 'module')} of {adapter.label} "
            f"{'has' if len(idle) == 1 else 'have'} no effect: alpha or a factor is zero:\n"
            + listed(idle)
        )
    return [Notice("zero-delta", text, adapter.label)]
