"""What counts as a secret in a text, and what does not; and how long the search takes."""

from __future__ import annotations

import json
import random
import string
import time
from pathlib import Path

import pytest

from loratool.errors import FileError
from loratool.publishing.secrets import why_secret

# Put together here, so that nobody's scanner takes this file for a find.
AWS = "wJalrXUtnFEMI/" + "K7MDENG/bPxRfiCYEXAMPLEKEY"
KEY = "Ab3dE6gH9jKlMnOp" + "QrStUvWx12345678"
HEX = "0a1b2c3d4e5f6071" * 2 + "deadbeef"
CODE = f'os.environ["AWS_SECRET_ACCESS_KEY"] = "{AWS}"\n'

SECRETS = [
    f"AWS_SECRET_ACCESS_KEY={AWS}", f"export AWS_SECRET_ACCESS_KEY='{AWS}'", CODE,
    json.dumps({"aws_secret_access_key": AWS}), f"aws-secret-access-key: {AWS}",
    json.dumps({"cells": [{"source": [CODE]}]}), "AWS_SESSION_TOKEN=" + "FwoGZXIvYXdzEBYaD/+=" * 40,
    f"AccountName=x;AccountKey={KEY}{KEY}==;", f"AZURE_OPENAI_KEY={HEX}", f"GOOGLE_API_KEY={KEY}",
    f"OPENAI_API_KEY: {KEY}", f"setdefault('HF_TOKEN', '{KEY}')", f'{{"apiKey": "{KEY}"}}',
    f"wandb login {HEX}", f"ENV AWS_SECRET_ACCESS_KEY {AWS}", f'API_KEY: str = "{KEY}"',
    f"const apiKey = `{KEY}`;", "client('gsk_" + KEY + KEY + "')", "r8_" + KEY + "aB3d5F7h",
    "sk_live_" + KEY, "SG." + KEY[:22] + "." + KEY + "xY1",
    f"wandb.login(key='{HEX}')", "DB_PASSWORD=hunter2secret", 'password: "hunter22"',
    "postgres://user:s3" + "cret@host/db", f'"Authorization": f"Bearer {KEY}"',
    '{"private_key": "-----BEGIN PRIVATE ' + 'KEY-----\\nMII"}', f"login('hf_{KEY}')",
]  # fmt: skip
HARMLESS = [
    "http://user:pass@host", "ENV PYTHONPATH /usr/lib/python3/site-packages",
    "ARG BUILD_KEY version_1",
    "HF_TOKEN=$TOKEN", "HF_TOKEN=${X}", "HF_TOKEN=<your token>", "HF_TOKEN=xxxxxxxxxxxxxxxxxxxxxx",
    "HF_TOKEN=your_token_here", "HF_TOKEN=hf_xxxxxxxx", "hf_" + "x" * 34, "API_KEY=YOUR_API_KEY_1",
    "token = os.environ['HF_TOKEN']", 'api_key=os.getenv("OPENAI_API_KEY")', "api_key = a_key2(3)",
    '"eos_token": "<|endoftext_1234567890|>"', '"pad_token": "extra_id_0_1_2_3_4"',
    '["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"]', "password: ${DB_PASSWORD}",
    "postgres://user:password@host", "postgres://user:$PASS@host", "http://localhost:8080/a@b",
    "Authorization: Bearer $HF_TOKEN", "Authorization: Bearer <token>", "num_key_value_heads: 8",
]  # fmt: skip
#: One of each form, told by nothing else: no name, and no assignment.
FORMS = [
    *(f"gh{kind}_{KEY}aB3d" for kind in "pousr"), *(f"xox{kind}-{KEY}" for kind in "abprs"),
    f"github_pat_{KEY}{KEY}", f"glpat-{KEY}", f"gsk_{KEY}{KEY}", f"r8_{KEY}aB3d", f"hf_{KEY}",
    f"sk_live_{KEY}", f"rk_live_{KEY}", f"SG.{KEY[:22]}.{KEY}", f"sk-{KEY}", f"sk-proj-{KEY}",
    "AKIA" + "Q3EGRIJ7K2LZ5XWT", "ASIA" + "Q3EGRIJ7K2LZ5XWT", f"AIza{KEY}xYz", f"ya29.{KEY}",
    f"GOCSPX-{KEY}", f"npm_{KEY}aB3d", f"pypi-{KEY}{KEY}", f"eyJ{KEY}.eyJ{KEY}.{KEY}",
    f"wandb login --relogin {HEX}", f"wandb.login('{HEX}')",
]  # fmt: skip


def held(folder: Path, data: bytes, name: str = "notes.txt") -> str:
    (folder / name).write_bytes(data)
    return why_secret(folder / name, name)


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "vocab.txt", "merges.txt"])
def test_secrets_and_their_likes(tmp_path: Path, name: str) -> None:
    """By names and forms, in vocabularies too; what stands for a secret is none."""
    known = SECRETS if name == "notes.txt" else SECRETS[:-6]
    assert [text for text in known if not held(tmp_path, text.encode(), name)] == []
    assert [text for text in HARMLESS if held(tmp_path, text.encode(), name)] == []


@pytest.mark.parametrize("text", FORMS, ids=lambda text: text[:9])
def test_keys_are_told_by_their_forms(tmp_path: Path, text: str) -> None:
    """In a sentence, and not as a part of a longer word."""
    assert held(tmp_path, f"It is {text} and goes on.".encode())
    assert not held(tmp_path, f"It is x{text} and goes on.".encode())


def test_a_file_that_is_no_text_is_looked_at_in_its_beginning(tmp_path: Path) -> None:
    """Gigabytes of zeros under a text's name take no time."""
    with (tmp_path / "notes.txt").open("wb") as stream:
        stream.truncate(6 << 30)
    started = time.monotonic()
    assert why_secret(tmp_path / "notes.txt", "notes.txt") == ""
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("code", ["utf-16", "utf-16-be"])
def test_texts_of_two_bytes_a_letter(tmp_path: Path, code: str) -> None:
    """As Windows saves them."""
    assert held(tmp_path, f"AWS_SECRET_ACCESS_KEY={AWS}\n".encode(code))


def test_secrets_wherever_they_stand(tmp_path: Path) -> None:
    """Across the end of a piece, far behind, after zero bytes, in the header of weights."""
    secret = f"\nHF_TOKEN={KEY}\n".encode()
    for before in ((1 << 22) - 20, (1 << 22) - 5, 9_000_000):
        assert held(tmp_path, b"x" * before + secret)
    assert held(tmp_path, bytes(10_000) + secret)
    assert held(tmp_path, b"x" * 8 + secret + bytes(10_000), "model.safetensors")


def test_vocabularies_are_no_secrets_and_quickly_seen(tmp_path: Path) -> None:
    """150,000 odd words and their merges, and a model of random bytes."""
    chance = random.Random(0)
    signs = string.ascii_letters + string.digits + "Ġ▁'-_/=:"
    words = ["".join(chance.choices(signs, k=chance.randint(1, 14))) for _ in range(150_000)]
    named = [f"<|{kind}_token_{i}|>" for kind in ("image", "secret", "key") for i in range(300)]
    vocabulary = {word: i for i, word in enumerate([*words, *named])}
    merges = [" ".join(pair) for pair in zip(words, reversed(words), strict=True)]
    data = json.dumps({"model": {"vocab": vocabulary, "merges": merges}}, indent=1).encode()
    started = time.perf_counter()
    assert not held(tmp_path, data, "tokenizer.json")
    assert not held(tmp_path, chance.randbytes(5_000_000), "tokenizer.model")
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "piece", [b"token", b"secret = aaaaaaa", b"eyJaaaaaa.", b"x://a:", b"api_key=a_", b"sk-"]
)
def test_no_text_takes_long(tmp_path: Path, piece: bytes) -> None:
    """A megabyte of what nearly is a secret: the time grows with the length, and no faster."""
    started = time.perf_counter()
    assert not held(tmp_path, piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - started < 8


def test_pipes_and_links_out_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "folder" / "notes.txt").symlink_to("../secret")
    with pytest.raises(FileError, match="link out"):
        why_secret(tmp_path / "folder" / "notes.txt", "notes.txt")
