"""Repositories, branches, discussions and files, as the Hub tells of them."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

from helpers.hub.access import Access
from helpers.hub.repositories import Commit, Content, Repo, git_sha1
from helpers.hub.traffic import Refusal

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Reading(Access):
    """What can be asked about repositories and their files; and making them."""

    def create_repo(self) -> None:
        asked = self.read_json()
        repo_id = f"{asked.get('organization') or self.needs_user()}/{asked['name']}"
        self.needs_user()
        url = f"{self.hub.url}/{repo_id}"
        if not (self.user and self.user.writes and self.user.member_of(repo_id)):
            namespace = repo_id.partition("/")[0]
            right = f'create a model under the namespace "{namespace}"'
            raise Refusal(403, f"You don't have the rights to {right}")
        with self.hub.lock:
            if repo_id in self.hub.repos:
                raise Refusal(409, "You already created this model repo", url=url)
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo = self.hub.repos[repo_id] = Repo(repo_id, private)
            files = {".gitattributes": Content(GITATTRIBUTES, False)}
            repo.commit("main", None, files, "initial commit", author=self.user.name)
        self.json({"url": url, "name": repo_id, "id": repo_id})

    def info(self, repo: str, rev: str = "main") -> None:
        found = self.access(repo)
        commit = found.find(rev)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if self.flag("blobs"):
            for sibling in siblings:
                sibling.update(blob_details(commit.files[sibling["rfilename"]]))
        self.json(
            {
                "id": repo,
                "modelId": repo,
                "author": repo.partition("/")[0],
                "sha": commit.id,
                "lastModified": commit.date,
                "createdAt": found.created,
                "private": found.private,
                "gated": found.gated,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings,
            },
            headers={"X-Repo-Commit": commit.id},
        )

    def models(self) -> None:
        """The repositories of an author that the user may see."""
        author, limit = self.query.get("author", ""), int(self.query.get("limit", 1000))
        seen = [
            {"id": name, "modelId": name, "private": repo.private, "gated": repo.gated,
             "lastModified": repo.find("main").date, "createdAt": repo.created, "tags": [],
             "downloads": 0, "likes": 0, "sha": repo.find("main").id}
            for name, repo in sorted(self.hub.repos.items())
            if name.partition("/")[0] == author
            and (not repo.private or (self.user is not None and self.user.member_of(name)))
        ]  # fmt: skip
        self.page(seen[:limit])

    def refs(self, repo: str) -> None:
        found = self.access(repo)
        refs = [
            {"name": n, "ref": n if n.startswith("refs/") else f"refs/heads/{n}", "targetCommit": c}
            for n, c in found.refs.items()
        ]
        pulls = [r for r in refs if r["name"].startswith("refs/pr/")]
        branches = [r for r in refs if r not in pulls]
        known = {"branches": branches, "converts": [], "tags": []}
        self.json({**known, "pullRequests": pulls} if self.flag("include_prs") else known)

    def commits(self, repo: str, rev: str) -> None:
        self.page(
            [
                {
                    "id": c.id,
                    "authors": [{"user": c.author}],
                    "date": c.date,
                    "title": c.message,
                    "message": c.description,
                }
                for c in self.access(repo).history(rev)
            ]
        )

    def create_branch(self, repo: str, rev: str) -> None:
        found, start = self.access(repo, write=True), self.read_json().get("startingPoint", "main")
        with self.hub.lock:
            if rev in found.refs:
                raise Refusal(409, f"Reference already exists: refs/heads/{rev}")
            found.refs[rev] = found.find(start).id
        self.json({}, 201)

    def delete_branch(self, repo: str, rev: str) -> None:
        found = self.access(repo, write=True)
        with self.hub.lock:
            if found.refs.pop(rev, None) is None:
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        self.json({})

    def open_discussion(self, repo: str) -> None:
        found, author, asked = self.access(repo), self.needs_user(), self.read_json()
        with self.hub.lock:
            base = found.find("main") if asked.get("pullRequest") else None
            number = found.open_discussion(asked["title"], author, base)
        url = f"{self.hub.url}/{repo}/discussions/{number}"
        self.json({"num": number, "url": url, "pullRequest": base is not None})

    def discussion(self, repo: str, num: str) -> None:
        found = self.access(repo).discussions.get(int(num))
        if found is None:
            raise Refusal(404, "Discussion not found")
        self.json(found)

    def tree(self, repo: str, rev: str, path: str = "") -> None:
        found = self.access(repo)
        history = found.history(rev)
        entries = self.entries(history, f"{path}/" if path else "", self.flag("recursive"))
        if path and not entries:
            raise Refusal(404, f"{path} does not exist on {rev!r}", "EntryNotFound")
        self.page(entries)

    def entries(self, history: list[Commit], prefix: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders under a prefix."""
        folders: dict[str, list[Content]] = {}
        entries: list[dict[str, Any]] = []
        for path, content in sorted(history[0].files.items()):
            if not path.startswith(prefix):
                continue
            inner = path[len(prefix) :].split("/")
            depth = len(inner) if recursive else min(len(inner), 2)
            for i in range(1, depth):
                folders.setdefault(prefix + "/".join(inner[:i]), []).append(content)
            if recursive or len(inner) == 1:
                entries.append({"type": "file", "path": path, **file_details(content)})
        for path, inside in folders.items():
            oid = git_sha1("".join(c.blob for c in inside).encode())
            entries.append({"type": "directory", "path": path, "oid": oid, "size": 0})
        if self.flag("expand"):
            for entry in entries:
                entry.update(last_change(history, entry["path"]))
        return sorted(entries, key=lambda e: e["path"])

    def paths_info(self, repo: str, rev: str) -> None:
        found = self.access(repo)
        raw = b"".join(self.body)
        if "json" in self.headers.get("Content-Type", ""):
            asked = json.loads(raw)
        else:
            asked = parse_qs(raw.decode())
            self.query["expand"] = asked.get("expand", ["false"])[-1]
        wanted = {path.strip("/") for path in asked.get("paths", [])}
        entries = self.entries(found.history(rev), "", True)
        self.json([entry for entry in entries if entry["path"] in wanted])

    def resolve(self, repo: str, rev: str, path: str) -> None:
        commit = self.access(repo, content=True).find(rev)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers=headers)
        content = commit.files[path]
        if not content.lfs:
            if self.command == "HEAD":
                headers |= {"ETag": f'"{content.etag}"', "Accept-Ranges": "bytes"}
                return self.reply(200, [], content.size, headers)
            return self.send_content(content, headers)
        link = f"/cdn/{repo}/{content.sha256}"
        headers |= {
            "Location": self.hub.sign(self.hub.storage_url, link, filename=path),
            "X-Linked-Size": str(content.size),
            "X-Linked-ETag": f'"{content.etag}"',
            "Accept-Ranges": "bytes",
        }
        return self.reply(302, [], 0, headers)


def file_details(content: Content) -> dict[str, Any]:
    details: dict[str, Any] = {"size": content.size, "oid": content.blob}
    if content.lfs:
        lfs = {"size": content.size, "oid": content.sha256, "pointerSize": len(content.pointer)}
        details["lfs"] = lfs
    return details


def blob_details(content: Content) -> dict[str, Any]:
    """The same with the names that a model's siblings have."""
    details: dict[str, Any] = {"size": content.size, "blobId": content.blob}
    if content.lfs:
        size = len(content.pointer)
        details["lfs"] = {"size": content.size, "sha256": content.sha256, "pointerSize": size}
    return details


def last_change(history: list[Commit], path: str) -> dict[str, Any]:
    touched = (c for c in history if any(p == path or p.startswith(f"{path}/") for p in c.changed))
    commit = next(touched, history[-1])
    return {
        "lastCommit": {"id": commit.id, "title": commit.message, "date": commit.date},
        "securityFileStatus": {"status": "safe", "avScan": None, "pickleImportScan": None},
    }
