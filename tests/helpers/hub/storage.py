"""The storage of LFS objects."""

from __future__ import annotations

import hashlib

from helpers.hub.repositories import Content
from helpers.hub.traffic import Refusal
from helpers.hub.wire import Handler


class StorageHandler(Handler):
    """The storage of LFS objects: signed links only."""

    routes = (
        ("GET", r"/cdn/(?P<repo>.+)/(?P<oid>[0-9a-f]{64})", "download"),
        ("PUT", r"/upload/(?P<repo>.+)/(?P<oid>\w{64})/(?P<size>\d+)(?:/(?P<part>\d+))?", "store"),
    )

    def dispatch(self) -> None:
        if self.record.token:  # as S3 has it: one way to say who you are, not two
            raise Refusal(400, "Only one auth mechanism allowed")
        self.hub.check_signature(self.path)
        super().dispatch()

    def download(self, repo: str, oid: str) -> None:
        found = self.hub.repos.get(repo)
        if not found or oid not in found.objects:
            raise Refusal(404, "NoSuchKey")
        name = self.query["filename"].rsplit("/", 1)[-1]
        disposition = {"Content-Disposition": f'inline; filename="{name}";'}
        self.send_content(found.objects[oid], disposition)

    def store(self, repo: str, oid: str, size: str, part: str = "") -> None:
        sha256, md5, path = hashlib.sha256(), hashlib.md5(), self.hub.new_file()
        try:
            with path.open("wb") as file:
                for piece in self.body:
                    sha256.update(piece)
                    md5.update(piece)
                    file.write(piece)
            if self.record.received != int(size):
                raise Refusal(400, f"IncompleteBody: {self.record.received} bytes, not {size}")
            if not part and sha256.hexdigest() != oid:
                raise Refusal(400, f"BadDigest: the body's sha256 is not {oid}")
        except BaseException:
            path.unlink()
            raise
        with self.hub.lock:
            if part:
                stored = self.hub.parts.setdefault((repo, oid), {})
                stored[int(part)] = (md5.hexdigest(), path)
            else:
                self.hub.repos[repo].objects[oid] = Content(path, True, oid)
        self.reply(200, [], 0, {"ETag": f'"{md5.hexdigest()}"'})
