"""`loratool.json`: how an output came about, and what was merged into it.

It holds no date and no path, so that equal inputs give equal files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.factors import Factors
from loratool.adapters.weighting import PLAIN, Weight, parse_weight
from loratool.dtypes import MODEL_DTYPES
from loratool.errors import FileError, UsageError
from loratool.merging.plan import Plan
from loratool.merging.replication import Replicated, original
from loratool.models.checkpoint import Checkpoint
from loratool.models.quantised.base import Dequantised, as_stored
from loratool.models.quantised.treatment import TREATMENTS
from loratool.paths import EVERYTHING, Choice, grouped, ranged, ranged_names
from loratool.storage.fields import (
    ABSENT,
    COUNT,
    FINITE,
    FLAG,
    NAMES,
    TABLE,
    TEXT,
    check_fields,
    list_of,
)
from loratool.storage.filenames import ADAPTER_CONFIG, PROVENANCE
from loratool.storage.folder import origin_of
from loratool.storage.hashing import known_sha256
from loratool.storage.jsonfile import read_json
from loratool.storage.record import HASHES, SCHEMA, SCHEMA_VERSION, check_schema
from loratool.version import __version__


def describe(
    plan: Plan,
    command: str,
    shards: dict[str, str],
    result: dict[str, Any],
    held: Sequence[Merged] = (),
) -> Any:
    """The document for an output made by `plan`. `shards` maps file names to their digests,
    `held` are the adapters that the base held already."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "versions": versions("torch", "numpy"),
        "options": describe_options(plan),
        "base": {
            **describe_model(original(plan.base)),
            "adapters": [entry.document for entry in held],
        },
        "adapters": [
            {**describe_adapter(adapter, weight), **_taken_before(adapter, plan)}
            for adapter, weight in zip(plan.adapters, plan.weights, strict=True)
        ],
        "result": {
            "modules": plan.modules,
            "tensors": plan.counts(),
            "config_changes": plan.config_changes,
            "warnings": [n.to_dict() for n in plan.notices],
            **result,
        },
        "shards": shards,
    }


def describe_options(plan: Plan) -> dict[str, Any]:
    """What a merge was told beside base, adapters and output."""
    options: dict[str, Any] = {
        "dtype": plan.dtype, "weights": [weight.document for weight in plan.weights],
        "allow_unmatched": plan.allow_unmatched,
    }  # fmt: skip
    if plan.components:
        options["components"] = list(plan.components)
    options |= plan.choice.to_dict()
    layout = next(filter(None, (a.told.expert_b_layout for a in plan.adapters)), None)
    if layout is not None:
        options["expert_b_layout"] = layout
    if plan.treatment is not None and plan.treatment.how in TREATMENTS:
        options["quantised"] = plan.treatment.how
        options["trained_here"] = plan.treatment.trained_here
    if plan.initial is not None:
        options["initial"] = describe_adapter(plan.initial)
    if isinstance(plan.base, Replicated):
        options["replicate_layers"] = True
    if plan.max_shard_size is not None:
        options["max_shard_size"] = plan.max_shard_size
    return options


def _taken_before(adapter: Adapter, plan: Plan) -> dict[str, str]:
    """Where an adapter's initialisation changed the base: how it was taken off before the merge,
    "" where the base was the changed one already."""
    changed = bool(adapter.declared.changed_base)
    if not changed and (plan.initial is None or len(plan.adapters) > 1):
        return {}
    return {"taken": next((taken.how for job in plan.weight_jobs for taken in job.taken), "")}


def describe_model(base: Checkpoint) -> dict[str, Any]:
    model = as_stored(base)
    return {
        "name": model.name,
        **_published(model.source),
        "model_type": model.model_type,
        "architectures": model.config.get("architectures"),
        "tensors": len(model.tensors),
        "bytes": model.nbytes,
        "dtypes": sorted({t.dtype for t in model.tensors.values() if t.is_float}),
        "header_sha256": model.identity(),
        **({"quantised": base.title} if isinstance(base, Dequantised) else {}),
    }


def _published(source: Path) -> dict[str, str]:
    """Where on the Hub something comes from, if it does: repository, commit, place inside."""
    origin = origin_of(source)
    if origin is None:
        return {}
    place = {"path": origin.path} if origin.path else {}
    return {"repo": origin.repo, "revision": origin.revision, **place}


def versions(*libraries: str) -> dict[str, str]:
    """The versions of loratool and of what computed."""
    return {"loratool": __version__, **{name: _version(name) for name in libraries}}


@cache  # each is read from a file of many lines, and who makes many adapters asks for each
def _version(library: str) -> str:
    return version(library)


def describe_adapter(adapter: Adapter, weight: Weight = PLAIN) -> dict[str, Any]:
    return {
        "name": adapter.name,
        **_published(adapter.source),
        "base_model_name_or_path": adapter.declared.base_name,
        "weight": weight.document,
        **({"told": said} if (said := adapter.told.to_dict()) else {}),
        **adapter.choice.to_dict(),
        **({"left_out": ranged_names(adapter.left_out)} if adapter.left_out else {}),
        "modules": _modules_of(adapter),
        "files": adapter_files(adapter),
    }


def _modules_of(adapter: Adapter) -> list[dict[str, Any]]:
    """What it adapts, modules that are alike but for the numbers in their paths taken together."""
    said = [(path, _said_of(module)) for path, module in adapter.modules.items()]
    said += [(path, {"kind": one.algorithm}) for path, one in adapter.functions.items()]
    return [
        {"path": ranged([path for path, _ in group]), "count": len(group), **group[0][1]}
        for group in grouped(said, lambda one: one[0], lambda one: tuple(one[1].items()))
    ]


def _said_of(module: Factors) -> dict[str, Any]:
    dora = {"dora": True} if module.magnitude is not None else {}
    return {"kind": module.kind, "rank": module.rank, "alpha": module.alpha,
            "scale": module.scale, **dora}  # fmt: skip


def adapter_files(adapter: Adapter) -> dict[str, str]:
    """sha256 of the files that hold the adapter and of its config, by file name."""
    config = adapter.weights.with_name(ADAPTER_CONFIG)
    paths = [*adapter.files, *([config] if config.is_file() else [])]
    return {path.name: known_sha256(path) for path in paths}


def weights_sha256(adapter: Adapter) -> str:
    """One hash for all files that hold the weights of an adapter."""
    return adapter_hashes(adapter)[0]


def adapter_hashes(adapter: Adapter) -> tuple[str, str]:
    """sha256 of an adapter's weights and of its config ("" without one)."""
    return _split(adapter_files(adapter))


def _split(files: dict[str, str]) -> tuple[str, str]:
    """The hashes in `files`: one for all that hold the weights, and that of the config."""
    config = files.get(ADAPTER_CONFIG, "")
    weights = sorted((name, digest) for name, digest in files.items() if name != ADAPTER_CONFIG)
    if len(weights) == 1:
        return weights[0][1], config
    if not weights:
        raise ValueError("an adapter without weights")
    lines = "\n".join(f"{digest} {name}" for name, digest in weights)
    return hashlib.sha256(lines.encode()).hexdigest(), config


@dataclass(frozen=True)
class Merged:
    """An adapter that a model holds, by its record."""

    name: str
    weight: Weight
    #: sha256 of the weights and of adapter_config.json ("" if there was none).
    weights_sha256: str
    config_sha256: str
    document: dict[str, Any]
    #: Which of its parts were merged.
    choice: Choice = EVERYTHING

    def __str__(self) -> str:
        given = self.choice.to_dict().items()
        said = "".join(f", --{option} {glob}" for option, globs in given for glob in globs)
        return f"{self.name} (weight {self.weight}{said}, sha256 {self.weights_sha256[:12]}…)"


def read_record(directory: Path) -> dict[str, Any] | None:
    """The record of a model directory; None if it has none. Raises FileError if it is damaged."""
    path = directory / PROVENANCE
    if not path.is_file():
        return None
    record = read_json(path)
    check_schema(record, path)
    _check(record, path)
    whole = all(part in record for part in ("options", "base", "result", "adapters"))
    options = record.get("options", {})
    known = options.get("quantised") in (None, *TREATMENTS)
    if not whole or not known or options.get("dtype") not in MODEL_DTYPES:
        raise FileError(
            f"{path}: not the record of a merge.",
            "Check that this is a merged model; if so, fetch the file again, or remove it.",
        )
    return record


_TEXT = TEXT | ABSENT
_TABLES = list_of(TABLE, "a list of tables")
_PLACE = {"name": TEXT, "repo": _TEXT, "revision": _TEXT, "path": _TEXT}
_ADAPTER = {
    **_PLACE, "base_model_name_or_path": _TEXT, "weight": FINITE | TEXT, "files": HASHES,
    "taken": _TEXT, "modules": _TABLES, "told": TABLE | ABSENT, "include": NAMES | ABSENT,
    "exclude": NAMES | ABSENT,
}  # fmt: skip
#: What is read of a record, by the part of it that it is in ("" for the record itself).
_RECORD = {
    "": {
        "options": TABLE, "base": TABLE, "result": TABLE, "adapters": _TABLES, "shards": HASHES,
        "schema_version": SCHEMA, "undo": TABLE | ABSENT,
    },
    "options": {
        "dtype": TEXT, "components": NAMES | ABSENT, "include": NAMES | ABSENT,
        "exclude": NAMES | ABSENT, "expert_b_layout": _TEXT,
        "allow_unmatched": FLAG | ABSENT, "replicate_layers": FLAG | ABSENT, "quantised": _TEXT,
    },
    "base": {**_PLACE, "dtypes": NAMES, "adapters": _TABLES},
    "result": {"tensors": TABLE},
}  # fmt: skip


def _check(record: dict[str, Any], where: object) -> None:
    """Raise FileError for a field of a record that is read and has a wrong type."""
    for part, types in _RECORD.items():
        inside = record.get(part, {}) if part else record
        check_fields(inside, types, f"{where}, {part}" if part else where)
    added = record.get("result", {}).get("tensors", {})
    check_fields(added, {"add": COUNT}, f"{where}, result.tensors")
    for entry in [*record.get("adapters", []), *record.get("base", {}).get("adapters", [])]:
        check_fields(entry, _ADAPTER, f"{where}, adapters")


def merged_into(directory: Path, of_base: bool = False) -> list[Merged]:
    """The adapters that the model in `directory` holds by its record, in the order of merging.

    With `of_base` those that its base held already.
    """
    record = read_record(directory)
    if record is None:
        return []
    try:
        entries = record["base"].get("adapters", []) if of_base else record["adapters"]
        return [_merged(entry) for entry in entries]
    except (KeyError, ValueError, UsageError) as error:
        raise FileError(
            f"{directory / PROVENANCE}: its list of adapters is damaged ({error!r}).",
            "Fetch it again, or remove it.",
        ) from None


def _merged(entry: dict[str, Any]) -> Merged:
    weights, config = _split(entry["files"])
    choice = Choice(tuple(entry.get("include", ())), tuple(entry.get("exclude", ())))
    return Merged(entry["name"], parse_weight(entry["weight"]), weights, config, entry, choice)
