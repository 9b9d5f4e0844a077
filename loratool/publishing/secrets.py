"""Keys, tokens and passwords in files that are to be pushed: told by names, forms and assignments.

Every file but weights is gone through to its end, in pieces, vocabularies too; of weights the
beginning, where their metadata is. What is compressed or encoded is not unpacked.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from loratool.storage.links import open_own

#: Names of files that hold keys and passwords.
_FILES = re.compile(
    r"(^|/)(\.env(\..+)?|\.netrc|\.pgpass|\.pypirc|\.npmrc|\.git-credentials|\.htpasswd|"
    r"id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|jks|keystore|kdbx)|"
    r"(service[-_]?account|client[-_]?secrets?|credentials?|secrets?)([-_.].*)?|"
    r"api[-_]?keys?(\..*)?|kaggle\.json|"
    r"(hf|api|access|auth|stored)?[-_.]?token(\.(txt|json))?)$",
    re.IGNORECASE,
)
_WEIGHTS = re.compile(r"\.(safetensors|gguf|bin|pt|pth|ckpt|pkl|pickle)$")
#: Vocabularies are long lists of odd words.
_VOCABULARY = re.compile(r"(^|/)(tokenizer|vocab|merges|added_tokens)\b[^/]*$")

#: Bytes that are looked at together, and that two pieces share: more than any secret is told by.
_PIECE, _SHARED = 1 << 22, 4_096
#: Bytes by which a text is told from what is none.
_BEGINNING = 8_192
#: Bytes at the beginning of weights that may be a header.
_HEADER = 4_000_000

#: Texts that are keys by their form, by how they begin: each is looked for by that alone first.
_FORMS = [
    (start, re.compile(re.escape(start) + rest))
    for start, rest in (
        (b"hf_", rb"[A-Za-z0-9]{30,}\b"),
        *((b"gh" + kind + b"_", rb"[A-Za-z0-9]{36,}\b") for kind in (b"p", b"o", b"u", b"s", b"r")),
        (b"github_pat_", rb"\w{50,}"),
        (b"glpat-", rb"[\w-]{20,}"),
        (b"gsk_", rb"[A-Za-z0-9]{40,}\b"),
        (b"r8_", rb"[A-Za-z0-9]{36,}\b"),
        (b"sk_live_", rb"[A-Za-z0-9]{20,}\b"),
        (b"rk_live_", rb"[A-Za-z0-9]{20,}\b"),
        (b"SG.", rb"[\w-]{16,32}\.[\w-]{30,}"),
        (b"sk-", rb"(?:proj-|ant-)?[A-Za-z0-9_-]{32,}"),
        (b"AKIA", rb"[0-9A-Z]{16}\b"),
        (b"ASIA", rb"[0-9A-Z]{16}\b"),
        (b"AIza", rb"[0-9A-Za-z_-]{35}(?![0-9A-Za-z_-])"),
        (b"ya29.", rb"[\w-]{20,}"),
        (b"GOCSPX-", rb"[\w-]{20,}"),
        (b"npm_", rb"[A-Za-z0-9]{36}\b"),
        (b"pypi-", rb"[\w-]{50,}"),
        *((b"xox" + kind + b"-", rb"[0-9A-Za-z-]{20,}") for kind in (b"a", b"b", b"p", b"r", b"s")),
        (b"wandb login ", rb"(?:--?[\w-]{1,20} ){0,4}[0-9a-f]{40}"),
        (b"wandb.login(", rb"\s{0,9}(?:key\s?=\s?)?\\?[\"'][0-9a-f]{40}"),
        (b"eyJ", rb"[\w-]{10,512}\.eyJ[\w-]{10,2048}\.[\w-]{10,}"),
    )
]
_PRIVATE = re.compile(rb"-----BEGIN (?:[A-Z]{1,20} ){0,3}PRIVATE KEY")

#: Names of secrets, without regard to their case.
_NAME = re.compile(
    rb".*(api_?key|secret(_?access)?(_?key)?|(access|private|account|auth|storage|encryption|"
    rb"subscription|signing|master)_?key|passw(or)?d|passphrase|"
    rb"(hf|hub|hugging_?face(_hub)?|auth|access|api|bearer|refresh|session|security|github|gitlab|"
    rb"slack|bot|wandb|personal|replicate|write|read)_?token)"
)
#: Names as shells have them, of whatever service.
_SHELL_NAME = re.compile(
    rb"(?!.*(PUBLIC|CACHE)_KEY)[A-Z][A-Z0-9_]*_(KEY|TOKEN|SECRET|CREDENTIALS?)"
)
#: A part of a name in small letters, and after it the value that the name is given: by ` = "`,
#: `": "`, `"] = '` or `", "`, in notebooks with backslashes.
_GIVEN = re.compile(
    rb"(?:key|token|secret|passw)(?=([a-z0-9_-]{0,24})(?![a-z0-9_-])"
    rb"[\\\"'\])]{0,6}[ \t]{0,8}(?:[=:]{1,2}(?:[ \t]{0,4}[a-z]{1,12}[ \t]{0,4}=)?|=>|,)"
    rb"[ \t]{0,8}[rbuf]?\\?[\"'`]?"
    rb"([a-z0-9/+=_!@#%^&*?~-]{6,100}))"
)
#: A name and its value with a space between, as Dockerfiles and csh have them.
_SPACED = re.compile(
    rb"(?m)^[ \t]{0,40}(?:env|arg|setenv)[ \t]{1,8}([a-z][a-z0-9_]{2,60})[ \t]{1,8}[\"']?"
    rb"([a-z0-9/+=_.~-]{16,100})"
)
_GOES_ON = (b"(", b"[", b".", b"{", b"<")
_BEFORE = re.compile(rb"[A-Za-z0-9_-]*\Z")
_BEARER = re.compile(rb"bearer[ \t]{1,4}([a-z0-9/+=_.~-]{20,512})")
#: user:password@host, after the "://" of an address.
_LOGIN = re.compile(rb"://[^\s:/@\"'<>{}$\\]{0,64}:([^\s/@\"'<>{}$\\]{3,128})@[A-Za-z0-9\[]")
_WORDS = re.compile(rb"([A-Z]?[a-z]+|[A-Z]+|\d{1,4})([_/.-]+([A-Z]?[a-z]+|[A-Z]+|\d{1,4}))*[_/.-]*")
#: Signs of a key at least; a password may be shorter.
_SHORTEST = 16
#: Words that stand for a password.
_STAND_IN = re.compile(
    rb"(?i)(your|my|the|some|enter|change|insert|replace|example|placeholder|pass|secret|dummy|"
    rb"test|none|null|true|false|required|optional|str|xxx|\*\*|###|redacted)"
)


def why_secret(path: Path, name: str) -> str:
    """Why the file `name` of a folder, at `path`, looks like a secret; "" for one that does not.

    Raises FileError for what is no file of the folder.
    """
    if _FILES.search(name):
        return "by its name"
    left = _HEADER if _WEIGHTS.search(name) else None
    made_up = _VOCABULARY.search(name) is not None
    tail = b""
    with open_own(path, name) as stream:
        start = stream.read(_BEGINNING)
        zeros = start.count(b"\0")
        wide = len(start) < 4 * zeros < 3 * len(start)
        if zeros and not wide:  # no text: of these, too, the beginning alone
            left = _HEADER
        stream.seek(0)
        while piece := stream.read(_PIECE if left is None else min(_PIECE, left)):
            # UTF-16 has a zero byte beside each letter.
            piece = tail + (piece.replace(b"\0", b"") if wide else piece)
            if _holds_secret(piece, made_up):
                return "it holds what looks like a key or a token"
            tail = piece[-_SHARED:]
            left = None if left is None else left - _PIECE
            if left is not None and left <= 0:
                break
    return ""


def _holds_secret(data: bytes, made_up: bool) -> bool:
    if b"PRIVATE KEY" in data and _PRIVATE.search(data):
        return True
    for start, form in _FORMS:
        if start in data and any(_is_formed(m, made_up) for m in form.finditer(data)):
            return True
    if b"://" in data and any(not _STAND_IN.match(m[1]) for m in _LOGIN.finditer(data)):
        return True
    small = data.lower()
    if any(_is_key(data[slice(*m.span(1))]) for m in _BEARER.finditer(small)):
        return True
    for spaced in _SPACED.finditer(small):
        if _is_secret(data[slice(*spaced.span(1))], data[slice(*spaced.span(2))]):
            return True
    return any(_is_given(data, found) for found in _GIVEN.finditer(small))


def _is_formed(found: re.Match[bytes], made_up: bool) -> bool:
    """Whether what has the form of a key stands alone, and is neither words nor a stand-in."""
    text, before = found[0], found.string[max(0, found.start() - 1) : found.start()]
    words = re.search(rb"[_-]", text[4:]) is not None and _is_words(text[3:])
    return not (before.isalnum() or before == b"_" or words) and _is_random(text, made_up)


def _is_given(data: bytes, found: re.Match[bytes]) -> bool:
    """Whether a name is given a value that looks like a secret, and no part of an expression."""
    start, end = found.span(2)
    return data[end : end + 1] not in _GOES_ON and _is_secret(_name(data, found), data[start:end])


def _name(data: bytes, found: re.Match[bytes]) -> bytes:
    """The whole name, of which a part was found in small letters."""
    left = _BEFORE.search(data[max(0, found.start() - 40) : found.start()])
    return (left[0] if left else b"") + data[found.start() : found.end(1)]


def _is_secret(name: bytes, value: bytes) -> bool:
    """Whether a value is a secret, by the name that it is given."""
    plain = name.lower().replace(b"-", b"_")
    if len(value) < _SHORTEST and b"passw" not in plain:
        return False
    if re.search(rb"passw(or)?d$|passphrase$", plain):
        return not _STAND_IN.match(value) and not _is_words(value)
    known = _NAME.fullmatch(plain) or _SHELL_NAME.fullmatch(name)
    return known is not None and _is_key(value)


def _is_key(value: bytes) -> bool:
    """Whether a text is one that nobody would write by hand."""
    switches = len(re.findall(rb"[a-z][A-Z]|[A-Z]{2}[a-z]", value))
    if len(value) < _SHORTEST or len(set(value)) < 6:
        return False
    mixed = re.search(rb"\d", value) is not None or switches >= 3
    return mixed and not _is_words(value)


def _is_words(value: bytes) -> bool:
    """Whether it is words and numbers in a row, such as your_token_here or extra_id_0."""
    return _WORDS.fullmatch(value) is not None


def _is_random(text: bytes, made_up: bool) -> bool:
    """Whether a text has as many different signs as keys have.

    With `made_up`, in lists of odd words, letters and digits in their own order are none either.
    """
    body = text[4:] if len(text) > 12 else text
    if len(set(body)) < (6 if made_up else 3):
        return False
    steps = sum(b - a == 1 for a, b in pairwise(body))
    return not made_up or steps < len(body) // 2
