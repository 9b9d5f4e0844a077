"""Who may do what."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import urlencode, urlsplit

from helpers.hub.repositories import Repo, User
from helpers.hub.traffic import Refusal
from helpers.hub.wire import Handler


class Access(Handler):
    """Knows the user of a request, and what is not theirs to see or to write."""

    user: User | None

    def dispatch(self) -> None:
        if self.record.token is not None and self.record.token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        self.user = self.hub.users.get(self.record.token or "")
        super().dispatch()

    def access(self, repo_id: str, *, content: bool = False, write: bool = False) -> Repo:
        repo = self.hub.repos.get(repo_id)
        member = self.user is not None and self.user.member_of(repo_id)
        if repo is None or (repo.private and not member):
            if self.user:
                raise Refusal(404, "Repository not found", "RepoNotFound")
            raise self.unauthorized()
        if content and repo.gated and not member:
            restricted = f"Access to model {repo_id} is restricted"
            if self.user:
                message = f"{restricted} and you are not in the authorized list."
                raise Refusal(403, message, "GatedRepo")
            raise Refusal(401, f"{restricted}. Please log in.", "GatedRepo")
        if write:
            self.needs_write(repo_id)
        return repo

    def needs_write(self, repo_id: str) -> None:
        if self.user is None:
            raise self.unauthorized()
        if not self.user.member_of(repo_id):
            hint = "pass `create_pr=1` as a query parameter to create a Pull Request"
            raise Refusal(403, f"Forbidden: {hint}")
        if not self.user.writes:
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")

    def needs_user(self) -> str:
        if self.user is None:
            raise self.unauthorized()
        return self.user.name

    def unauthorized(self) -> Refusal:
        # From the Hub a bare 401 is enough, but the client looks for it under https:// only.
        return Refusal(401, "Invalid username or password.", "RepoNotFound")

    def whoami(self) -> None:
        if self.user is None:
            raise Refusal(401, "Invalid username or password.")
        role = "write" if self.user.writes else "read"
        orgs = [n for n in self.user.namespaces if n != self.user.name]
        self.json(
            {
                "type": "user",
                "id": hashlib.md5(self.user.name.encode()).hexdigest()[:24],
                "name": self.user.name,
                "fullname": self.user.name.title(),
                "orgs": [{"type": "org", "name": n, "roleInOrg": role} for n in orgs],
                "auth": {
                    "type": "access_token",
                    "accessToken": {"displayName": "tests", "role": role},
                },
            }
        )

    def auth_check(self, repo: str, write: str = "") -> None:
        self.access(repo, content=True, write=bool(write))
        self.json({})

    def flag(self, name: str) -> bool:
        return self.query.get(name, "").lower() in ("1", "true")

    def page(self, items: list[dict[str, Any]]) -> None:
        """One page of a listing, with the link to the next."""
        start = int(self.query.get("cursor", 0))
        stop = start + self.hub.page_size
        headers = {}
        if stop < len(items):
            query = urlencode({**self.query, "cursor": stop})
            following = f"{self.hub.url}{urlsplit(self.path).path}?{query}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.json(items[start:stop], headers=headers)
