"""Uploads through LFS, commits, pull requests, and what the Hub says of model cards."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

from helpers.hub.access import Access
from helpers.hub.repositories import Content, Repo
from helpers.hub.traffic import Refusal

MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


class Uploads(Access):
    """What goes up, in parts and in commits."""

    def may_upload(self, repo_id: str, proposal: bool) -> Repo:
        """Whoever can read a repository may propose a change; pushing needs the right to write."""
        if proposal:
            self.needs_user()
        return self.access(repo_id, write=not proposal)

    def preupload(self, repo: str, rev: str) -> None:
        proposal = self.flag("create_pr") or rev.startswith("refs/pr/")
        files = self.may_upload(repo, proposal).find(rev).files
        answer = []
        for asked in self.read_json()["files"]:
            path, there = asked["path"], files.get(asked["path"])
            mode = "lfs" if self.hub.goes_to_lfs(path, asked["size"]) else "regular"
            told = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            answer.append({**told, "oid": there.etag} if there else told)
        self.json({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        asked = self.read_json()
        ref = asked.get("ref", {}).get("name")  # none given when it is for a pull request
        found = self.may_upload(repo, ref is None or ref.startswith("refs/pr/"))
        multipart = "multipart" in asked.get("transfers", [])
        objects = []
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": size, "authenticated": True})
            if oid not in found.objects:
                verify = f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"
                upload = self.upload_action(repo, oid, size, multipart)
                objects[-1]["actions"] = {"upload": upload, "verify": {"href": verify}}
        self.json({"transfer": "basic", "objects": objects})

    def upload_action(self, repo: str, oid: str, size: int, multipart: bool) -> dict[str, Any]:
        link, chunk = f"/upload/{repo}/{oid}", self.hub.chunk_size
        if not multipart or size <= chunk:
            return {"href": self.hub.sign(self.hub.storage_url, f"{link}/{size}")}
        header = {"chunk_size": str(chunk)}
        for part, start in enumerate(range(0, size, chunk), 1):
            path = f"{link}/{min(chunk, size - start)}/{part}"
            header[str(part)] = self.hub.sign(self.hub.storage_url, path)
        # Completed at the Hub, but without a token, so that link is signed too.
        href = self.hub.sign(self.hub.url, "/api/complete_multipart", repo=repo, oid=oid)
        return {"href": href, "header": header}

    def complete_parts(self) -> None:
        self.hub.check_signature(self.path)
        repo, oid = self.query["repo"], self.query["oid"]
        stored = self.hub.parts.get((repo, oid), {})
        asked = {p["partNumber"]: p["etag"].strip('"') for p in self.read_json()["parts"]}
        if asked != {number: etag for number, (etag, _) in stored.items()}:
            raise Refusal(400, "InvalidPart")
        digest, path = hashlib.sha256(), self.hub.new_file()
        with path.open("wb") as file:
            for number in sorted(stored):
                for piece in Content(stored[number][1], True, oid).pieces(0, self.hub.chunk_size):
                    digest.update(piece)
                    file.write(piece)
        if digest.hexdigest() != oid:
            raise Refusal(400, f"BadDigest: the parts' sha256 is not {oid}")
        with self.hub.lock:
            self.hub.repos[repo].objects[oid] = Content(path, True, oid)
        self.json({"success": True})

    def lfs_verify(self, repo: str) -> None:
        asked = self.read_json()
        there = self.access(repo).objects.get(asked["oid"])
        if there is None or there.size != asked["size"]:
            raise Refusal(404, "Object not found")
        self.json({"message": "ok"})

    def commit(self, repo: str, rev: str) -> None:
        lines = [json.loads(line) for line in b"".join(self.body).splitlines() if line.strip()]
        head = lines[0]["value"]
        proposal = self.flag("create_pr")
        found = self.may_upload(repo, proposal or rev.startswith("refs/pr/"))
        author = self.needs_user()
        with self.hub.lock:  # all of it or nothing
            if rev not in found.refs:
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            parent = found.find(rev)
            expected = head.get("parentCommit")
            if expected and proposal:
                parent = found.find(expected)
            elif expected and not parent.id.startswith(expected):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for line in lines[1:]:
                apply_change(found, files, line["key"], line["value"])
            summary, ref, answer = head["summary"], rev, {}
            if proposal:
                number = found.open_discussion(summary, author, parent)
                ref = f"refs/pr/{number}"
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
            new = found.commit(ref, parent, files, summary, head.get("description", ""), author)
        url = f"{self.hub.url}/{repo}/commit/{new.id}"
        self.json({"success": True, "commitOid": new.id, "commitUrl": url, **answer})

    def validate_card(self) -> None:
        problems, warnings = card_problems(self.read_json()["content"])
        errors = [{"message": m} for m in problems]
        told = {"errors": errors, "warnings": [{"message": m} for m in warnings]}
        self.json(told, 400 if problems else 200)


def apply_change(repo: Repo, files: dict[str, Content], key: str, value: dict[str, Any]) -> None:
    """Carry out one line of a commit on its files."""
    path = value["path"]
    if key == "file":
        data = value["content"]
        raw = base64.b64decode(data) if value.get("encoding") == "base64" else data.encode()
        if path == "README.md" and (problems := card_problems(raw.decode())[0]):
            raise Refusal(400, f"Invalid metadata in README.md: {problems[0]}")
        files[path] = Content(raw, False)
    elif key == "lfsFile":
        if value["oid"] not in repo.objects:
            missing = "an LFS pointer pointed to a file that does not exist"
            raise Refusal(400, f"Your push was rejected because {missing}: {path}")
        files[path] = repo.objects[value["oid"]]
    elif key == "deletedFile":
        if path not in files:
            raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        inside = [p for p in files if p.startswith(path.rstrip("/") + "/")]
        if not inside:
            raise Refusal(404, f"A folder with this name doesn't exist: {path}", "EntryNotFound")
        for inner in inside:
            del files[inner]
    else:
        raise Refusal(400, f"Unknown operation: {key}")


def card_problems(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings that the Hub has for a model card: its base models must be model ids."""
    found = re.match(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    if not found:
        return [], ["empty or missing yaml metadata in repo card"]
    models, listed = [], False
    for line in found[1].splitlines():
        item = re.match(r"\s*-\s+(.*)" if listed else r"base_model:(.*)", line)
        if item and item[1].strip():
            models.append(item[1].strip().strip("'\""))
        listed = bool(item) and (listed or not item[1].strip())
    wrong = [m for m in models if not MODEL_ID.fullmatch(m)]
    hint = "is not valid. Use a model id from https://hf.co/models."
    return [f'"base_model" with value "{m}" {hint}' for m in wrong], []
