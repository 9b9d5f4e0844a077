"""Whose tokenizer a merge takes: all of it, from one folder; and whether its ids have rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import Q, codes, pair, write_adapter
from helpers.cli import run_cli
from helpers.files import State, random_of, write_base
from helpers.outcomes import refused
from transformers import AutoTokenizer

import loratool
from loratool.errors import UsageError
from loratool.publishing.manifest import pack

EMBEDDING = "model.embed_tokens.weight"


def state(rows: int = 30) -> State:
    return {
        f"{Q}.weight": random_of(torch.float32, 12, 10),
        EMBEDDING: random_of(torch.float32, rows, 12),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", state())


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", pair(Q, 12, 10), {})


def added(*ids: int) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": i, "content": f"<t{i}>", "special": True, **plain} for i in ids]


def tokenizer(folder: Path, words: int = 30, ids: tuple[int, ...] = (), **config: Any) -> None:
    """A word-level tokenizer that transformers loads."""
    vocabulary = {f"w{i}": i for i in range(words)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    document = {"version": "1.0", "added_tokens": added(*ids), "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def files(folder: Path) -> set[str]:
    return {
        str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "loratool" not in
        p.name and p.suffix != ".safetensors" and p.name != "config.json"
    }  # fmt: skip


TEMPLATES = ["config", "jinja", "json", "named"]


def template(folder: Path, form: str, text: str) -> None:
    """A chat template in one of the places where transformers looks for it."""
    if form == "config":
        tokenizer(folder, chat_template=text)
        return
    tokenizer(folder)
    if form == "named":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text)
    if form == "json":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    else:
        (folder / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize("of_base", TEMPLATES)
@pytest.mark.parametrize("of_adapter", TEMPLATES)
def test_the_chat_template_is_that_of_the_tokenizer(
    tmp_path: Path, base: Path, adapter: Path, of_base: str, of_adapter: str
) -> None:
    """Wherever the two have theirs, the output loads the adapter's, as its own folder does."""
    template(base, of_base, "BASE")
    template(adapter, of_adapter, "ADAPTER")
    report = loratool.merge(base, adapter, tmp_path / "out")
    found, wanted = (AutoTokenizer.from_pretrained(p) for p in (tmp_path / "out", adapter))
    assert found.chat_template == wanted.chat_template
    assert "BASE" not in str(found.chat_template)
    assert report.tokenizer == "that of adapter, all of it with its chat template"


def test_no_file_of_the_other_tokenizer_stays(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Vocabulary, merges and special tokens of the base are left out by name, even those the
    adapter has no file for; its processor and generation config stay."""
    tokenizer(base)
    for name in ("tokenizer.model", "special_tokens_map.json", "added_tokens.json", "merges.txt",
                 "preprocessor_config.json", "generation_config.json", "notes.txt"):  # fmt: skip
        (base / name).write_text("{}")
    tokenizer(adapter)
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert files(tmp_path / "out") == {
        "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
        "generation_config.json", "notes.txt",
    }  # fmt: skip
    left = {name.partition(" ")[0] for name in report.left_out}
    assert {"tokenizer.model", "special_tokens_map.json", "merges.txt"} <= left


def test_processor_and_generation_config_come_with_it(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """Where the adapter brings them too, they are its own, and the summary says so."""
    for folder in (base, adapter):
        tokenizer(folder)
        for name in ("preprocessor_config.json", "generation_config.json"):
            (folder / name).write_text(json.dumps({"of": folder.name}))
    (base / "processor_config.json").write_text("{}")
    report = loratool.merge(base, adapter, tmp_path / "out")
    out = tmp_path / "out"
    for name in ("preprocessor_config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == {"of": "adapter"}
    assert not (out / "processor_config.json").exists()
    assert report.tokenizer == "that of adapter, all of it, processor and generation config too"


@pytest.mark.parametrize("choice", ["base", "adapter", None])
def test_the_option_chooses(tmp_path: Path, base: Path, adapter: Path, choice: str | None) -> None:
    """--tokenizer base keeps the base's whole, also where the adapter brings one."""
    template(base, "jinja", "BASE")
    template(adapter, "config", "ADAPTER")
    chosen = [] if choice is None else ["--tokenizer", choice]
    done = run_cli("merge", base, adapter, "-o", tmp_path / "out", *chosen, COLUMNS="120")
    assert done.exit_code == 0
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert found == ("BASE" if choice == "base" else "ADAPTER")
    assert f"that of {'the base' if choice == 'base' else 'adapter'}" in done.stdout


def test_a_tokenizer_that_is_not_there_cannot_be_chosen(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    tokenizer(base)
    refused(UsageError, base, adapter, tmp_path / "out", "No adapter", tokenizer="adapter")
    (base / "tokenizer.json").unlink()
    refused(UsageError, base, adapter, tmp_path / "out", "The base does not", tokenizer="base")
    refused(UsageError, base, adapter, tmp_path / "out", "'mine'", tokenizer="mine")


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "special_tokens_map.json", "preprocessor_config.json",
     "generation_config.json"],
)  # fmt: skip
def test_a_part_without_a_vocabulary_is_no_tokenizer(
    tmp_path: Path, base: Path, adapter: Path, name: str
) -> None:
    """A lone template or map of special tokens is not laid over the base's; it is named."""
    tokenizer(base, chat_template="BASE")
    (adapter / name).write_text("ADAPTER")
    report = loratool.merge(base, adapter, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "BASE"
    (notice,) = report.warnings
    assert notice.code == "tokenizer-part"
    assert name in notice.message


@pytest.mark.parametrize("same", [True, False])
def test_two_adapters_with_tokenizers(tmp_path: Path, base: Path, same: bool) -> None:
    """The last one's is taken; where they differ that is said."""
    adapters = [write_adapter(tmp_path / f"a{n}", pair(Q, 12, 10, seed=n), {}) for n in range(2)]
    for n, folder in enumerate(adapters):
        tokenizer(folder, chat_template="SAME" if same else f"OF {n}")
    report = loratool.merge(base, adapters, tmp_path / "out")
    wanted = "SAME" if same else "OF 1"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == wanted
    assert codes(report) == ([] if same else ["tokenizers-differ"])


def test_unmerge_gives_the_bases_tokenizer_back(tmp_path: Path, base: Path, adapter: Path) -> None:
    """Files that the adapter's tokenizer displaced come back byte for byte."""
    template(base, "named", "BASE")
    template(adapter, "config", "ADAPTER")
    loratool.merge(base, adapter, tmp_path / "out", reversible=True)
    loratool.unmerge(tmp_path / "out", adapter, tmp_path / "back")
    assert files(tmp_path / "back") == files(base)
    for name in files(base):
        assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes()


def sentencepiece(folder: Path, last: int) -> None:
    """The bytes of a SentencePiece model: pieces with a text, a score and a type, and a trailer."""

    def piece(text: str) -> bytes:
        inner = b"\n" + bytes([len(text)]) + text.encode() + b"\x15\x00\x00\x80\xbf\x18\x01"
        return b"\n" + bytes([len(inner)]) + inner

    data = b"".join(piece(f"p{i}") for i in range(last + 1)) + b"\x12\x02\x08\x01"
    (folder / "tokenizer.model").write_bytes(data)


def tiktoken(folder: Path, last: int) -> None:
    lines = "".join(f"{'QQ=='} {i}\n" for i in range(last + 1))
    (folder / "qwen.tiktoken").write_text(lines)


def unigram(folder: Path, last: int) -> None:
    pieces = [[f"p{i}", -1.0] for i in range(last + 1)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": pieces}}))


WAYS = {
    "added-in-tokenizer-json": lambda f, n: tokenizer(f, ids=tuple(range(30, n + 1))),
    "vocabulary": lambda f, n: tokenizer(f, words=n + 1),
    "unigram": unigram,
    "sentencepiece": sentencepiece,
    "tiktoken": tiktoken,
    "tekken": lambda f, n: (f / "tekken.json").write_text(
        json.dumps({"config": {"default_vocab_size": n + 1}})
    ),
    "added-tokens-json": lambda f, n: (
        tokenizer(f), (f / "added_tokens.json").write_text(json.dumps({f"<t{n}>": n})),
    ),
    "added-tokens-decoder": lambda f, n: tokenizer(
        f, added_tokens_decoder={str(n): {"content": f"<t{n}>"}}
    ),
    "vocab-json": lambda f, n: (f / "vocab.json").write_text(json.dumps({"x": n})),
    "vocab-txt": lambda f, n: (f / "vocab.txt").write_text("w\n" * (n + 1)),
}  # fmt: skip


@pytest.mark.parametrize("owner", ["base", "adapter"])
@pytest.mark.parametrize("way", WAYS)
def test_ids_without_rows_are_named(
    tmp_path: Path, base: Path, adapter: Path, way: str, owner: str
) -> None:
    """The first id without a row is a warning of merge, inspect --base and push, however the
    tokenizer says it; the last one with a row is none."""
    folder = {"base": base, "adapter": adapter}[owner]
    WAYS[way](folder, 29)
    assert codes(loratool.merge(base, adapter, tmp_path / "fine")) == []
    WAYS[way](folder, 30)
    report = loratool.merge(base, adapter, tmp_path / "out", dry_run=True)
    (notice,) = report.warnings
    assert notice.code == "tokens-without-rows"
    assert "(30)" in notice.message
    assert EMBEDDING in notice.message
    assert codes(loratool.inspect(adapter, base=base)) == ["tokens-without-rows"]
    loratool.merge(base, adapter, tmp_path / "out")
    assert "tokens-without-rows" in {n.code for n in pack(tmp_path / "out").notices}


def test_rows_that_the_adapter_brings_count(tmp_path: Path) -> None:
    """A resized embedding has rows for the new ids; its own tokenizer is held against it."""
    base = write_base(tmp_path / "base", state(200))
    tensors = {
        **pair(Q, 12, 10),
        f"base_model.model.{EMBEDDING}": random_of(torch.float32, 204, 12).numpy(),
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, {"modules_to_save": ["embed_tokens"]})
    tokenizer(adapter, ids=tuple(range(200, 204)))
    assert codes(loratool.merge(base, adapter, tmp_path / "out")) == []
    assert codes(loratool.inspect(adapter, base=base)) == []
    tokenizer(adapter, ids=tuple(range(200, 205)))
    assert codes(loratool.merge(base, adapter, tmp_path / "more")) == ["tokens-without-rows"]
    assert "tokens-without-rows" in {n.code for n in pack(adapter).notices}


def test_padding_without_a_row_is_called_harmless(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    """One id beyond the rows is common for padding; of any other token that is not said."""
    for token, harmless in (("<pad>", True), ("<new>", False)):
        tokenizer(adapter)
        (adapter / "added_tokens.json").write_text(json.dumps({token: 30}))
        (notice,) = loratool.merge(base, adapter, tmp_path / "out", dry_run=True).warnings
        assert ("harmless" in notice.message) == harmless


def test_each_adapter_keeps_what_lies_beside_its_own_tokenizer(tmp_path: Path, base: Path) -> None:
    """Two folders of one name: the generation config is that of the tokenizer's folder."""
    adapters = []
    for n in range(2):
        folder = write_adapter(tmp_path / str(n) / "adapter", pair(Q, 12, 10, seed=n), {})
        (folder / "generation_config.json").write_text(json.dumps({"of": n}))
        adapters.append(folder)
    tokenizer(adapters[0])
    loratool.merge(base, adapters, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"of": 0}


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3, "added_tokens": [1]}', ""])
def test_a_tokenizer_that_cannot_be_read_stops_nothing(
    tmp_path: Path, base: Path, adapter: Path, text: str
) -> None:
    """It is copied as it is; what is in it is not for loratool to say."""
    (adapter / "tokenizer.json").write_text(text)
    loratool.merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == text


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "licence.md", "COPYING", "Use Policy.pdf",
     "LICENSE_gemma", "MODEL_LICENSE", "llama_license.txt", "Gemma_Prohibited_Use_Policy.md",
     "terms_of_use.md", "USAGE_POLICY.md"],
)  # fmt: skip
def test_what_the_licence_asks_goes_along(
    tmp_path: Path, base: Path, adapter: Path, name: str
) -> None:
    """Licence, notice and use policy of the base, also where one file of it was given."""
    (base / name).write_text("terms")
    for number, source in enumerate((base, base / "model.safetensors")):
        loratool.merge(source, adapter, tmp_path / f"out{number}")
        assert (tmp_path / f"out{number}" / name).read_text() == "terms"


def test_ids_of_a_model_without_embedding_are_not_looked_at(tmp_path: Path, adapter: Path) -> None:
    """A base that has no token embedding has no rows to miss."""
    base = write_base(tmp_path / "vision", {f"{Q}.weight": state()[f"{Q}.weight"]})
    tokenizer(adapter)
    assert codes(loratool.merge(base, adapter, tmp_path / "out")) == []


def test_the_largest_embedding_counts(tmp_path: Path, adapter: Path) -> None:
    """A small embedding of another part, wherever it stands in the file, tells nothing of ids."""
    small = {"a.embed_tokens.weight": random_of(torch.float32, 5, 12)}
    base = write_base(tmp_path / "parts", {**small, **state()})
    tokenizer(adapter)
    assert codes(loratool.merge(base, adapter, tmp_path / "out")) == []
