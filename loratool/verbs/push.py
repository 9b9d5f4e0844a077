"""push: an adapter or a merged model to the Hub, with its card, in one commit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from loratool.adapters.told import NOTHING_TOLD, Told
from loratool.answers import Answer
from loratool.errors import HubError, PushError, UsageError, explained_os_errors, listed
from loratool.notices import Notice, document
from loratool.publishing.card_upload import README, card_upload
from loratool.publishing.manifest import Manifest, pack
from loratool.publishing.target import open_target, refuse_mixture
from loratool.storage.filenames import PROVENANCE
from loratool.storage.hub.repository import Committed, Repository, Upload
from loratool.streams.threads import few
from loratool.verbs.inputs import check_paths, told_of
from loratool.words import counted

#: More files than this go by the library's resumable upload, which may take several commits.
MANY = 250


@dataclass
class PushedFile:
    """A file, and what becomes of it: "new", "changed", or "there" already, by its hash."""

    name: str
    bytes: int
    state: Literal["new", "changed", "there"]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(repr=False)
class PushReport(Answer):
    """What a push did, or with `dry_run` would do. Sizes are bytes, times seconds."""

    ROWS = "files"

    source: str
    repo: str
    revision: str
    kind: str
    dry_run: bool
    private: bool
    created: bool
    files: list[PushedFile]
    left_out: list[str]
    card: str
    url: str
    commit: str = ""
    pull_request: str = ""
    #: Of an adapter: which programs load it, by their names as `lint` has them.
    serving: dict[str, str] = field(default_factory=dict)
    warnings: list[Notice] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bytes_to_upload(self) -> int:
        return sum(f.bytes for f in self.files if f.state != "there")

    @property
    def bytes_there(self) -> int:
        return sum(f.bytes for f in self.files if f.state == "there")

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        found = document(self, "files", "warnings")
        warnings = found.pop("warnings")
        sizes = {"bytes_to_upload": self.bytes_to_upload, "bytes_there": self.bytes_there}
        return {**found, **sizes, "warnings": warnings}


@explained_os_errors()
def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base: str | None = None,
    told: Told = NOTHING_TOLD,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dry_run: bool = False,
) -> PushReport:
    """Upload an adapter or a merged model to a repository on the Hub, in one commit.

    Parameters
    ----------
    path: directory of an adapter or a model.
    repo_id: "org/name"; it is created if it is not there.
    private: create it private.
    revision: branch to commit to; created if it is not there. "main" if not given.
    create_pr: open a pull request instead of committing to the branch.
    message: of the commit.
    base: the Hub id of the base model for the card, where the folder does not tell.
    told: what the user says of the adapter, because its file does not; see `merge`.
    include: globs of files to upload though they look like secrets or training files.
    exclude: globs of files to leave out.
    dry_run: compare with what is there, and write nothing.

    A model card is made, or completed without changing what somebody wrote, and uploaded as
    README.md; the folder itself is not changed. Files that the repository has already, by hash, are
    not uploaded; other files in it stay.

    Raises
    ------
    PushError: what should not be pushed as it is. FileError, AdapterError: weights that cannot be
    read. LoginError, HubError: what the Hub does not allow, or does not answer.
    """
    started = time.perf_counter()
    check_paths([path], [path], "loratool push PATH REPO_ID")
    if create_pr and revision not in (None, "main"):
        raise UsageError("--create-pr opens a pull request against main.", "Omit one of the two.")
    (own,) = told_of(told, [path])
    manifest = pack(Path(path), include, exclude, own)
    target = open_target(repo_id, private, dry_run, revision)
    there = target.files
    uploads = _hashed(manifest)
    card, made, said = card_upload(
        manifest.folder.path, target, manifest.files, README in include, base, own
    )
    uploads = [*(u for u in uploads if u.name != README), card]
    files = [PushedFile(u.name, u.nbytes, _state(u, there)) for u in uploads]
    report = PushReport(
        source=str(path),
        repo=target.repo,
        revision=target.revision,
        kind=manifest.kind,
        dry_run=dry_run,
        private=target.private if target.exists else private,
        created=not target.exists,
        files=files,
        left_out=manifest.left_out,
        serving=manifest.serving,
        card=made,
        url=target.url,
        warnings=[
            *manifest.notices,
            *_note_record(manifest, target),
            *said,
            *refuse_mixture([u.name for u in uploads], target),
        ],
    )
    if not dry_run:
        _send(target, manifest, uploads, files, report, message, create_pr)
    report.seconds = time.perf_counter() - started
    return report


def _send(
    target: Repository,
    manifest: Manifest,
    uploads: list[Upload],
    files: list[PushedFile],
    report: PushReport,
    message: str | None,
    create_pr: bool,
) -> None:
    wanted = [u for u, f in zip(uploads, files, strict=True) if f.state != "there"]
    target.create(report.private)
    words = message or f"Upload {manifest.kind} with loratool"
    if len(wanted) > MANY:
        done = _send_many(target, manifest, wanted, words, create_pr)
    elif wanted:
        done = target.commit(wanted, words, create_pr=create_pr)
    else:
        done = Committed(target.url, target.head)
    report.url, report.commit, report.pull_request = done.url, done.commit, done.pull_request
    report.private = target.private


def _send_many(
    target: Repository, manifest: Manifest, wanted: list[Upload], words: str, create_pr: bool
) -> Committed:
    """By way of a branch of their own, named after the files: so they arrive in one commit too."""
    files = {u.name: u.sha256 for u in wanted if u.path is not None}
    name = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:16]
    branch = Repository(target.repo, f"loratool-{name}")
    branch.look()
    branch.upload_many(manifest.folder.path, [u for u in wanted if u.path is not None], words)
    hashes = {name: branch.files[name] for name in files}
    rest = [u for u in wanted if u.path is None]
    done = target.commit(rest, words, create_pr=create_pr, copied=hashes, source=branch.head)
    with suppress(HubError):  # an old branch does no harm
        branch.drop()
    return done


def _note_record(manifest: Manifest, target: Repository) -> list[Notice]:
    """A warning where the repository keeps a record of weights that this push replaces."""
    if PROVENANCE not in target.files or PROVENANCE in manifest.files:
        return []
    text = f"The repository keeps a {PROVENANCE} that tells of other weights; delete it there."
    return [Notice("stale-record", text, PROVENANCE)]


def _hashed(manifest: Manifest) -> list[Upload]:
    """Every file with its hash. Raises PushError where loratool.json has another one."""
    recorded = manifest.recorded
    with ThreadPoolExecutor(few(None)) as pool:
        make = partial(_upload, manifest.folder.path, recorded)
        uploads = list(pool.map(make, manifest.files))
    changed = [u.name for u in uploads if recorded.get(u.name, u.digest) != u.digest]
    if changed:
        raise PushError(
            f"{manifest.folder.path}: {counted(len(changed), 'file', 'is')} not as {PROVENANCE} "
            f"says they were written:\n{listed(changed)}",
            f"Make the output again; or remove {PROVENANCE} if they were changed on purpose.",
        )
    return uploads


def _upload(folder: Path, recorded: Mapping[str, str], name: str) -> Upload:
    return Upload.of_file(name, folder / name, recorded.get(name, ""))


def _state(upload: Upload, there: dict[str, str]) -> Literal["new", "changed", "there"]:
    if upload.name not in there:
        return "new"
    return "there" if upload.is_as(there[upload.name]) else "changed"
