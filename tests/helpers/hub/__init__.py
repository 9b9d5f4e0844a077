"""A small Hugging Face Hub on loopback, for tests that run the real client against it.

It speaks what `huggingface_hub` asks of the Hub for model repositories (with Xet switched off):
creating repositories and branches, listing, uploading through LFS, committing, pull requests,
model cards, and downloading whole files or ranges. Nothing of the client is mocked; it is pointed
here by `HF_ENDPOINT`, which it reads when imported, so run it in a subprocess:

    with HubServer() as hub:
        first = hub.add("org/base", {"config.json": "{}", "model.safetensors": Path("big.bin")})
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "home"))
        assert hub.files("org/base")["config.json"] == b"{}"

Two ports listen: `hub.url` is the Hub, `hub.storage_url` is its storage, to which LFS downloads
(`/cdn/<repo>/<oid>?…filename=…`) and uploads (`/upload/<repo>/<oid>/<size>[/<part>]`) go by signed
links. It must be another origin, as on the real Hub: the client reads a file's metadata from the
redirect only if that leaves the Hub, and drops its token there (the storage refuses a token).

Users: the token "hf_writer" is of "someone", a member of "org", who may write in both namespaces;
"hf_reader" is of "reader", who may only read what is public; every other token is invalid. More
in `hub.users["hf_x"] = User("x", ("x", "org"), writes=False)`: members see their namespaces'
private repositories and gated files.

State:
    hub.add(repo, {path: bytes | str | Path | None}, private=, gated=, branch=, message=)
        creates the repository or adds a commit (None deletes), returns the commit's id;
        a Path is served from where it lies, without a copy
    hub.files(repo, revision), hub.commits(repo, revision): newest first, each with
        .id .message .description .changed (paths) .files
    hub.exists(repo), hub.is_private(repo), hub.branches(repo) -> {name or "refs/pr/1": commit id}
    hub.truncate(repo, path, size): the storage holds less of the file than its metadata says
    hub.repos[repo]: .private, .gated ("auto" or False), .objects (LFS, by sha256)
Repositories created by the client begin, as on the Hub, with a commit that adds .gitattributes;
those made by hub.add do not. Settings, at any time: page_size (listings), lfs_threshold (bytes
from which a file goes to LFS; *.safetensors and the like always do), chunk_size (LFS files above
it are uploaded in parts), link_seconds (how long signed links hold).

Traffic (patterns are regular expressions, searched in the unquoted path with its query):
    hub.log: records with .method .path .status .received .sent (body bytes) .range .token; it
        leaves out /api/agent-harnesses, which the client fetches for itself with every new cache
    hub.requests(match, method), hub.sent(match), hub.received(match), hub.clear()

Faults:
    hub.fail(pattern, status, times=1, headers=, method=, message=)   answer so instead
    hub.cut(pattern, after=BYTES, times=1, method=, side=, reset=)    drop the connection once that
        many body bytes of the response were sent, or, for PUT and POST, of the request read;
        side="response" on a POST carries it out and then loses the answer; reset=True ends with
        RST in place of FIN. A body that is not longer than `after` is not cut and uses up nothing.
    hub.hang(pattern, after=-1, times=99)    never answer, or with `after` no further than so many
        bytes of the body
    hub.answer(pattern, body, times=1, method=, headers=, status=)    answer with this body instead
    hub.on(pattern, callback, method=None)    call once, before the matching request is answered

A mistake in this server answers 500 and is raised again when the `with` block ends.
"""

from helpers.hub.repositories import User
from helpers.hub.server import HubServer

__all__ = ["HubServer", "User"]
