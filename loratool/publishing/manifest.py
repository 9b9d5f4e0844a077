"""What of a folder goes to the Hub, and every reason why it should not."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Literal

from loratool.adapters.adapter import Adapter
from loratool.adapters.finite import refuse_not_finite
from loratool.adapters.told import ASKS, NOTHING_TOLD, Told
from loratool.errors import FileError, PushError, UsageError, listed, nearest
from loratool.models.carried import carried_files
from loratool.models.checkpoint import open_checkpoint
from loratool.models.layouts.names import is_token_embedding
from loratool.models.quantised.base import dequantised_if_read
from loratool.models.tokenizers import (
    is_part_of_tokenizer,
    note_ids_without_rows,
    tokenizer_files,
)
from loratool.notices import Notice
from loratool.publishing.contents import adapter_in
from loratool.publishing.secrets import why_secret
from loratool.serving.programs import serving_words
from loratool.storage.fields import check_fields
from loratool.storage.filenames import (
    ADAPTER_CONFIG,
    ADAPTER_ENTRIES,
    CONFIG,
    OF_A_RUN,
    PROVENANCE,
)
from loratool.storage.folder import Folder
from loratool.storage.hub.address import parse
from loratool.storage.hub.folder import not_there
from loratool.storage.links import leads_out
from loratool.storage.record import HASHES, SCHEMA, check_schema
from loratool.storage.tensors import TensorInfo
from loratool.words import agreeing, counted

#: Files that stay here: what tools, editors and systems leave behind.
_LITTER = re.compile(
    r"(^|/)\.[^/]*\.loratool-[^/]*(/|$)"
    r"|(^|/)(\.git|\.cache|\.ipynb_checkpoints|__pycache__|__MACOSX|\.venv|\.idea|\.vscode)/"
    r"|(^|/)(\.DS_Store|Thumbs\.db|desktop\.ini|.*\.(lock|tmp|swp|pyc)|.*~)$"
)
#: Folders of a training run.
_TRAINING = re.compile(
    r"(^|/)(checkpoint-\d+|global_step\d+|pytorch_model_fsdp_\d+|optimizer_\d+|wandb|runs)/"
)
_PICKLE = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle)$")
_UNFINISHED = re.compile(r"\..+\.loratool-(partial-|replaced-|work$)")


@dataclass
class Manifest:
    """`files` of the `folder` go up, by name; `left_out` stay here."""

    folder: Folder
    kind: Literal["adapter", "model"]
    files: list[str]
    left_out: list[str]
    #: Files without which it cannot be loaded.
    needed: set[str] = field(default_factory=set)
    notices: list[Notice] = field(default_factory=list)
    #: Of an adapter: how it fares in each program, in a few words.
    serving: dict[str, str] = field(default_factory=dict)

    @cached_property
    def recorded(self) -> dict[str, str]:
        """The digests of the weights by name, as loratool.json has them; {} without one."""
        if not self.folder.has(PROVENANCE):
            return {}
        record = self.folder.json(PROVENANCE)
        where = self.folder.path / PROVENANCE
        check_schema(record, where)
        check_fields(record, {"schema_version": SCHEMA, "shards": HASHES, "files": HASHES}, where)
        return dict(record.get("shards") or record.get("files") or {})


def pack(
    path: Path,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    told: Told = NOTHING_TOLD,
) -> Manifest:
    """Choose what of an adapter or a model in `path` goes up.

    `told` is what a user says of an adapter.
    `include` are globs of files that go up though they look as if they should not; `exclude` are
    globs of files that stay here.

    Raises PushError for an output that is incomplete or failed, for secrets and for files of a
    training run; FileError and AdapterError for weights that cannot be read.
    """
    folder = _open(path)
    adapter = adapter_in(path, told)
    files: list[str] = []
    left_out: list[str] = []
    out = []
    for name in folder.names():
        stays = _LITTER.search(name) or _matches(name, exclude)
        stays = name.endswith("/") or (stays and not _matches(name, include))
        (left_out if stays else files).append(name)
        if not stays and leads_out(path / name, name) and not _matches(name, include):
            out.append(name)
    for pattern in (*include, *exclude):
        if not any(_matches(name, [pattern]) for name in (*files, *left_out)):
            raise UsageError(f"{pattern!r} matches no file in {path}.", "Check the pattern.")
    manifest = Manifest(folder, "adapter" if adapter else "model", files, left_out)
    _refuse_broken(manifest)
    _refuse_incomplete(manifest, adapter)
    manifest.serving = serving_words(adapter) if adapter else {}
    _leave_links(manifest, out)
    _refuse_left_behind(manifest)
    asked = [name for name in files if not _matches(name, include)]
    _refuse_secrets(folder, asked)
    _refuse_strays(manifest, asked)
    return manifest


def _open(path: Path) -> Folder:
    if any(map(_UNFINISHED.match, Path(os.path.realpath(path)).parts)):
        raise PushError(
            f"{path}: what a run that was stopped left behind. It is not complete.",
            "Run the command again, and push its output.",
        )
    if path.is_file():
        raise PushError(f"{path}: a file.", f"Give its directory, {path.absolute().parent}.")
    if path.is_symlink() and not path.exists():
        raise not_there(path, path)
    if not path.is_dir():
        address = parse(str(path))
        if address is not None and not path.parent.is_dir():
            raise FileError(
                f"{path}: no such directory.",
                f"push takes a directory on this disk; {address} can be downloaded: "
                f"hf download {address.repo} --local-dir DIR.",
            )
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        raise FileError(
            f"{path}: no such directory.",
            f"Did you mean {path.with_name(near)}?" if near else "Check the path.",
        )
    return Folder(path)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a glob fits the whole path, its last part, or a folder that it lies in."""
    parts = name.split("/")
    ways = [name, parts[-1], *("/".join(parts[:i]) + "/" for i in range(1, len(parts)))]
    return any(fnmatchcase(way, p) or fnmatchcase(way, p + "/") for way in ways for p in patterns)


def _refuse_incomplete(manifest: Manifest, adapter: Adapter | None) -> None:
    """Raise where the weights are not all there, or not fit for use."""
    path = manifest.folder.path
    if adapter is not None:
        # What somebody can say to whoever loads it is no fault of the file.
        refused = [n.message for n in adapter.notices if n.refused and n.code not in ASKS]
        if adapter.is_read and refused:
            raise PushError(
                f"{path}: an adapter that cannot be loaded as it is:\n{listed(refused)}",
                "Repair it first; `loratool inspect` shows all of it.",
            )
        if adapter.is_read:
            refuse_not_finite(adapter)
        held = {str(file.relative_to(path)) for file in (adapter.weights, *adapter.files)}
        config = {ADAPTER_CONFIG} if manifest.folder.has(ADAPTER_CONFIG) else set()
        manifest.needed = {*held, *config, *carried_files(manifest.folder)}
        manifest.notices += note_ids_without_rows(
            tokenizer_files(manifest.folder), _embeddings(adapter.replaced)
        )
        manifest.notices += adapter.notices + _note_local_base(adapter)
    else:
        try:
            model = dequantised_if_read(open_checkpoint(path))
        except FileError as error:
            raise type(error)(error.message, f"{error.hint} Nothing was pushed.") from error
        indices = {name for name in manifest.files if name.endswith(".index.json")}
        manifest.needed = {*(file.name for file in model.files), CONFIG, *indices}
        manifest.needed |= carried_files(manifest.folder).keys()
        manifest.notices += model.notices
        manifest.notices += note_ids_without_rows(
            tokenizer_files(manifest.folder), _embeddings(model.tensors)
        )
    gone = [name for name in manifest.recorded if not manifest.folder.has(name)]
    if gone:
        raise PushError(
            f"{path}: {PROVENANCE} names {counted(len(gone), 'file')} that "
            f"{agreeing(len(gone), 'is')} not there:\n{listed(gone)}",
            "Make the output again.",
        )


def _embeddings(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Rows of the token embeddings among these, by name."""
    return {n: t.shape[0] for n, t in tensors.items() if is_token_embedding(n) and t.shape}


def _note_local_base(adapter: Adapter) -> list[Notice]:
    base = adapter.declared.base_name
    if not base or not re.match(r"[/\\~.]|[A-Za-z]:[/\\]", base):
        return []
    text = (
        f"{ADAPTER_CONFIG} names the base by a path, {base!r}: nobody else can load it. "
        "Write the id that it has on the Hub."
    )
    return [Notice("local-base", text, ADAPTER_CONFIG)]


def _refuse_broken(manifest: Manifest) -> None:
    """Raise for names without a file: broken links, and pipes, which would never end."""
    broken = [name for name in manifest.files if not manifest.folder.has(name)]
    if broken:
        raise PushError(
            f"{manifest.folder.path}: {counted(len(broken), 'name')} without a file (a broken "
            f"link, a pipe):\n{listed(broken)}",
            f"Remove them, or leave them out: {_options('--exclude', dict.fromkeys(broken, ''))}.",
        )


def _leave_links(manifest: Manifest, out: Sequence[str]) -> None:
    """Leave links out of the folder here. Raises PushError where it cannot be loaded without."""
    needed = manifest.needed | manifest.recorded.keys()
    needed |= {name for name in out if is_part_of_tokenizer(name)}
    lost = {name: f"to {os.path.realpath(manifest.folder.path / name)}" for name in out}
    lost = {name: where for name, where in lost.items() if name in needed}
    if lost:
        raise PushError(
            f"{manifest.folder.path}: {counted(len(lost), 'file')} that the {manifest.kind} needs "
            f"{agreeing(len(lost), 'is')} a link out of the folder:\n{_reasons(lost)}",
            f"To push what they lead to, name them: {_options('--include', lost)}.",
        )
    for name in out:
        manifest.files.remove(name)
        manifest.left_out.append(name)
        text = f"{name} is a link out of the folder and stays here; --include pushes it."
        manifest.notices.append(Notice("link-left-out", text, name))


def _refuse_left_behind(manifest: Manifest) -> None:
    """Raise where `exclude` took what the rest does not work without."""
    lost = sorted((manifest.needed | manifest.recorded.keys()) & set(manifest.left_out))
    if lost:
        raise UsageError(
            f"Without {lost[0]} the {manifest.kind} cannot be loaded.", "Do not exclude it."
        )


def _refuse_secrets(folder: Folder, names: Sequence[str]) -> None:
    reasons = {name: why_secret(folder.path / name, name) for name in names}
    found = {name: why for name, why in reasons.items() if why}
    if found:
        raise PushError(
            f"{folder.path}: {counted(len(found), 'file', 'looks')} like secrets:\n"
            + _reasons(found),
            f"Remove them, or leave them out: {_options('--exclude', found)}. "
            "What is no secret goes up with --include.",
        )


def _refuse_strays(manifest: Manifest, names: Sequence[str]) -> None:
    """Raise for files of a training run, and for pickles beside safetensors.

    What the adapter needs is neither; of other weights beside it somebody must say what they are.
    """
    files = manifest.files
    tops = {name.rpartition("/")[0] for name in files if name.endswith(".safetensors")}
    found, unknown = {}, {}
    for name in names:
        if name in manifest.needed:
            continue
        if _TRAINING.search(name) or OF_A_RUN.fullmatch(name.rpartition("/")[2]):
            found[name] = "of a training run"
        elif _PICKLE.search(name) and name.rpartition("/")[0] in tops:
            second = name in ADAPTER_ENTRIES or name.startswith("pytorch_model")
            if manifest.kind == "model" or second or "/" in name:
                found[name] = "a pickle beside safetensors"
            else:
                unknown[name] = "perhaps weights that were trained with the adapter"
    if found or unknown:
        every = found | unknown
        hint = f"Leave them out: {_options('--exclude', found)}. " if found else ""
        if unknown:
            hint += (
                f"Push what belongs to the adapter: {_options('--include', unknown)}; leave out "
                "what does not with --exclude."
            )
        else:
            hint += "To push them all the same, name them with --include."
        raise PushError(
            f"{manifest.folder.path}: {counted(len(every), 'file', 'does')} not belong to what is "
            f"pushed, or may not:\n{_reasons(every)}"
            if unknown
            else f"{manifest.folder.path}: {counted(len(every), 'file', 'does')} not belong to "
            f"what is pushed:\n{_reasons(every)}",
            hint,
        )


def _reasons(found: dict[str, str]) -> str:
    return listed(f"{name} ({reason})" for name, reason in found.items())


def _options(option: str, found: dict[str, str]) -> str:
    """The option for every file; for a folder where that is of a training run as a whole."""
    tops = {
        name.partition("/")[0] + "/" if _TRAINING.search(name) else name for name in found
    }  # fmt: skip
    return " ".join(f"{option} {shlex.quote(top)}" for top in sorted(tops))
