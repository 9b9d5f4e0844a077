"""The Hub itself: which request is answered by what."""

from __future__ import annotations

from helpers.hub.reading import Reading
from helpers.hub.uploads import Uploads

REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
REV = r"(?P<rev>refs/(?:pr|convert)/[^/]+|[^/]+)"
API = rf"/api/models/{REPO}"


class HubHandler(Reading, Uploads):
    """The Hub itself."""

    routes = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_card"),
        ("POST", r"/api/complete_multipart", "complete_parts"),
        ("GET", rf"{API}/revision/{REV}", "info"),
        ("GET", rf"{API}/tree/{REV}(?:/(?P<path>.+))?", "tree"),
        ("POST", rf"{API}/paths-info/{REV}", "paths_info"),
        ("GET", rf"{API}/refs", "refs"),
        ("GET", rf"{API}/commits/{REV}", "commits"),
        ("POST", rf"{API}/branch/{REV}", "create_branch"),
        ("DELETE", rf"{API}/branch/{REV}", "delete_branch"),
        ("POST", rf"{API}/preupload/{REV}", "preupload"),
        ("POST", rf"{API}/commit/{REV}", "commit"),
        ("POST", rf"{API}/discussions", "open_discussion"),
        ("GET", rf"{API}/discussions/(?P<num>\d+)", "discussion"),
        ("GET", rf"{API}/auth-check(?P<write>/write)?", "auth_check"),
        ("GET", r"/api/models", "models"),
        ("GET", API, "info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", "lfs_verify"),
        ("GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)", "resolve"),
    )
