"""Takes the shards of a merge to the Hub as they are made, so that the disk need not hold them all.

Shards are committed one by one to a branch of their own, named after what makes them what they are:
inputs, weights, options, versions. A run that was stopped finds there what is done. At the end one
commit brings them all to the main branch, with config, tokenizer and card, and the branch is
dropped. So the main branch never holds half a model, and the Hub itself keeps the account.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from loratool.errors import FileError, HubError, explained_os_errors
from loratool.merging.counts import Counts
from loratool.merging.ingredients import fingerprint
from loratool.merging.plan import OutputShard, Plan
from loratool.merging.proof.pairing import check_written
from loratool.merging.written import Written
from loratool.notices import Notice
from loratool.publishing.card_upload import card_upload
from loratool.publishing.target import refuse_mixture
from loratool.storage.hashing import is_blake3
from loratool.storage.hub.repository import Committed, Repository, Upload
from loratool.storage.jsonfile import parse_json
from loratool.streams.run import Run

#: On the branch: what is known of the shards there.
JOURNAL = "loratool-progress.json"
#: Of a shard in it: the hash that the Hub knows it by, and the one that loratool.json gets.
_HASHES = ("sha256", "digest")

MESSAGE = "Merge with loratool"


class Shipment:
    """The courier of one merge. Use as a context manager, after which no upload begins."""

    def __init__(self, plan: Plan, folder: Path, target: Repository, keep: bool, run: Run) -> None:
        """`folder` is where shards are written; with `keep` they stay there.

        Without it the base's files are downloaded as they are needed, and given back.
        """
        self._plan, self._folder, self._keep, self._run = plan, folder, keep, run.silent()
        self._target = target
        self._branch = Repository(target.repo, f"loratool-{fingerprint(plan)[:16]}")
        self._journal: dict[str, Any] = {}
        self._staged: dict[str, str] = {}
        self._outputs = {shard.name: shard for shard in plan.outputs}
        self._inputs = {name: plan.files_for([shard]) for name, shard in self._outputs.items()}
        self._uploader = ThreadPoolExecutor(1)
        self._downloader = ThreadPoolExecutor(1)
        self._uploads: list[Future[None]] = []
        self._downloads: dict[str, Future[None]] = {}
        #: Shards that were on the Hub already, and were not uploaded again.
        self.resumed: list[str] = []

    def __enter__(self) -> Shipment:
        there = self._branch.look()
        if self._branch.new_branch:
            self._branch.create(self._target.private)
        elif JOURNAL in there:
            self._journal = _entries(self._branch.read(JOURNAL))
        self._staged = {
            name: there[name]
            for name, entry in self._journal.items()
            if name in self._plan.shards and there.get(name) == entry["sha256"]
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in (self._uploader, self._downloader):
            pool.shutdown(wait=error is None, cancel_futures=True)
        if not self._keep:
            self._plan.base.folder.let_go({n for names in self._inputs.values() for n in names})
            self._plan.base.folder.sweep()

    def fetch(self, shard: OutputShard) -> Written | None:
        name = shard.name
        if not self._keep and name in self._staged:
            # Its header stands in for it: the card is made from headers.
            _hollow(self._folder, shard)
            self.resumed.append(name)
            entry = dict(self._journal[name])
            del entry["sha256"]
            return Written({name: entry.pop("digest")}, Counts(**entry))
        self._download(name).result()
        todo = [other for other in self._inputs if self._keep or other not in self._staged]
        for later in todo[todo.index(name) + 1 :][:1]:
            self._download(later)
        return None

    def take(self, made: OutputShard, written: Written) -> None:
        shard = made.name
        check_written([made], self._folder, self._run)
        if not self._keep:
            wanted = {n for later in self._after(shard) for n in self._inputs[later]}
            self._plan.base.folder.let_go(set(self._inputs[shard]) - wanted)
        for done in self._uploads[-1:]:  # at most one waits, so that few shards lie on the disk
            done.result()
        self._uploads.append(self._uploader.submit(self._send, shard, written))

    def settle(self) -> None:
        """Wait until every shard is on the branch."""
        for done in self._uploads:
            done.result()

    def finish(self, folder: Path) -> tuple[Committed, list[Notice]]:
        """Bring the model in `folder` to the target in one commit, and drop the branch.

        To be called once `settle` was; `folder` may have another place by now.
        """
        shards = {name: self._staged[name] for name in self._plan.shards}
        there = self._branch.look()
        spoilt = [name for name, digest in shards.items() if there.get(name) != digest]
        if spoilt:
            raise HubError(
                f"{self._target.repo}: {spoilt[0]} on the branch {self._branch.revision} is not "
                "what was uploaded. Nothing was committed.",
                "Somebody else writes there; delete the branch, and run the command again.",
            )
        with explained_os_errors():
            uploads = _small_files(folder, shards)
            self._target.look()
            card, _, notices = card_upload(folder, self._target)
        uploads.append(card)
        notices += refuse_mixture([*shards, *(u.name for u in uploads)], self._target)
        committed = self._target.commit(uploads, MESSAGE, copied=shards, source=self._branch.head)
        with suppress(HubError):  # an old branch does no harm; the model is where it should be
            self._branch.drop()
        return committed, notices

    def _send(self, shard: str, written: Written) -> None:
        digest = written.shards[shard]
        upload = Upload.of_file(shard, self._folder / shard, digest)
        if upload.digest != digest:
            raise HubError(
                f"{shard} changed after it was written. Nothing was committed to the main branch.",
                "Let what writes there finish; then run the command again.",
            )
        if self._staged.get(shard) == upload.sha256:
            self.resumed.append(shard)
            self._done(shard)
            return
        entry = {"sha256": upload.sha256, "digest": digest, **written.counts.__dict__}
        self._journal[shard] = entry
        data = json.dumps(self._journal, indent=2, sort_keys=True).encode()
        journal = Upload(JOURNAL, data, len(data))
        self._branch.commit([upload, journal], f"Stage {upload.name}", quiet=True)
        self._staged[upload.name] = upload.sha256
        self._done(upload.name)

    def _done(self, shard: str) -> None:
        """What is on the Hub need not be here."""
        if not self._keep:
            _hollow(self._folder, self._outputs[shard])

    def _after(self, shard: str) -> list[str]:
        names = list(self._plan.shards)
        return [n for n in names[names.index(shard) + 1 :] if n not in self._staged]

    def _download(self, shard: str) -> Future[None]:
        if shard not in self._downloads:
            fetch: Callable[[Sequence[str]], None] = self._plan.base.folder.fetch
            self._downloads[shard] = self._downloader.submit(fetch, self._inputs[shard])
        return self._downloads[shard]


def _entries(data: bytes) -> dict[str, dict[str, Any]]:
    """The journal as it should be; what is not as this version writes it counts for nothing."""
    try:
        document = dict(parse_json(data, JOURNAL))
        if not all(is_blake3(entry["digest"]) for entry in document.values()):
            return {}
        return {
            name: {**Counts(**{k: v for k, v in entry.items() if k not in _HASHES}).__dict__,
                   **{k: str(entry[k]) for k in _HASHES}}
            for name, entry in document.items()
        }  # fmt: skip
    except (FileError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _hollow(folder: Path, shard: OutputShard) -> None:
    """Leave a file with its header and its size, and no data: it takes no space."""
    header = shard.header
    with (folder / shard.name).open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + shard.nbytes)


def space_needed(plan: Plan) -> int:
    """Bytes that a merge takes on this disk at most, when nothing is kept of it.

    Two shards, one being made and one on its way, and the base's files for two more.
    """
    folder = plan.base.folder
    inputs = [sum(folder.missing(plan.files_for([shard])).values()) for shard in plan.outputs]
    return 2 * max(shard.nbytes for shard in plan.outputs) + sum(sorted(inputs)[-2:])


def _small_files(folder: Path, shards: Iterable[str]) -> list[Upload]:
    """Everything in the folder of a merge but its shards and its card, with hashes."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    names = {str(p.relative_to(folder)): p for p in paths}
    return [Upload.of_file(n, p) for n, p in names.items() if n not in shards and n != "README.md"]
