"""The repository that something is to be pushed to, and every reason why it should not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loratool.errors import LoginError, OutputError, PushError, UsageError, listed, shown
from loratool.merging.plan import Plan
from loratool.notices import Notice
from loratool.storage.destination import Overwrite
from loratool.storage.filenames import ADAPTER_CONFIG, CONFIG, INDEX, MODEL, needs_index
from loratool.storage.folder import origin_of
from loratool.storage.hub.address import parse
from loratool.storage.hub.errors import LOGIN, logged_in
from loratool.storage.hub.repository import Repository
from loratool.words import counted


def refuse_mixture(names: Iterable[str], target: Repository) -> list[Notice]:
    """Raise PushError where a model would lie beside files that programs load in its place.

    Returns a warning where the repository keeps other weights that do no harm.
    """
    own = set(names)
    others = [n for n in target.files if n not in own and n.endswith(_WEIGHTS)]
    first = [n for n in others if n in _LOADED_FIRST]
    if first and CONFIG in own:
        raise PushError(
            f"{target.repo} holds {first[0]}, which programs would load instead of this model.",
            "Delete it there first, or choose another repository.",
        )
    if not others:
        return []
    text = (
        f"The repository keeps {counted(len(others), 'other file')} of weights:\n{listed(others)}"
    )
    return [Notice("other-weights", text, others[0])]


_WEIGHTS = (".safetensors", ".bin", ".index.json", ADAPTER_CONFIG)
#: Files by which programs tell what to load; the first that is there wins.
_LOADED_FIRST = {ADAPTER_CONFIG, MODEL, INDEX}


def target_of(repo_id: str) -> str:
    """The repository that a user wants to write to. Raises UsageError for what is no id."""
    address = None if repo_id.startswith((".", "/", "~")) else parse(repo_id)
    if address is None or address.path or "/" not in address.repo:
        raise UsageError(f"{repo_id!r} is not a repository id.", "Ids are org/name.")
    if address.revision:
        raise UsageError(
            f"{repo_id!r} names a revision.",
            f"Write the id alone; `push --revision {address.revision}` writes to a branch.",
        )
    if Path(repo_id).is_dir():
        raise UsageError(
            f"{repo_id} is a directory here.",
            "Give the directory first and the id after it; or write the id as hf://org/name.",
        )
    return address.repo


def open_target(repo_id: str, private: bool, dry_run: bool, revision: str | None) -> Repository:
    """A repository to write to, looked at but not made yet.

    Raises UsageError for no id, LoginError without a login (but for `dry_run`).
    """
    target = Repository(target_of(repo_id), revision or "main")
    if not (logged_in() or dry_run):
        raise LoginError("Writing to the Hub takes a login, and there is none.", f"Run {LOGIN}.")
    try:
        target.look()
    except LoginError:
        if not dry_run or logged_in():
            raise  # else: without a login, what is not there looks like what is private
    if private and target.exists and not target.private:
        raise UsageError(
            f"{target.repo} is there already, and public.",
            "Choose another name, or make it private on its settings page.",
        )
    return target


def merge_target(
    plan: Plan, push: str, private: bool, overwrite: Overwrite, dry_run: bool
) -> Repository:
    """The repository for what a plan makes, looked at before anything is computed.

    Raises UsageError for one that is an input, or that would make a private input public,
    OutputError for one that holds a model (but for `overwrite`), PushError for one with files that
    would be loaded in place of the model.
    """
    sources = [plan.base.source, *(adapter.source for adapter in plan.adapters)]
    if target_of(push) in [origin.repo for source in sources if (origin := origin_of(source))]:
        raise UsageError(f"{push} is an input.", "Inputs are not written to; take another.")
    target = open_target(push, private, dry_run, None)
    weights = [name for name in target.files if name.endswith((".safetensors", ".bin"))]
    if weights and not overwrite:
        raise OutputError(
            f"{target.repo} holds weights already: {weights[0]}.",
            "Choose another repository, or replace what is there: --overwrite.",
        )
    index = [INDEX] if needs_index(plan.shards) else []
    refuse_mixture([*plan.shards, CONFIG, *index], target)
    hidden = [f.path for f in (plan.base.folder, *(a.folder for a in plan.adapters)) if f.private]
    if hidden and not (private or target.private):
        text = f"{shown(hidden[0])} is private, and {target.repo} "
        if not target.exists:
            raise UsageError(
                f"{text}would be public.",
                "Give --private; or create it first, if it is to be public.",
            )
        plan.notices.append(Notice("private-input", f"{text}is public.", target.repo))
    return target


def workplace(repo: str) -> Path:
    """Where shards are made that are not kept: beside the download cache, where there is room."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).parent / "loratool" / target_of(repo).replace("/", "--")
