"""What a person wrote in a card stays."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.cards import ID, data
from helpers.places import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loratool.errors import FileError
from loratool.publishing.cards.document import BEGIN, END, Licence, make_card

PROSE = "# My model\n\nI trained it on *my* texts.  \n\n| a | b |\n|---|---|\n| 1 | 2 |\n"


def test_a_persons_text_stays(made: dict[str, Path]) -> None:
    """The section is appended once, replaced later, and moves nowhere."""
    text = make_card(made["plain"], PROSE)
    assert text.partition("---\n\n")[2].startswith(PROSE + f"\n{BEGIN}\n")
    assert data(text)["base_model"] == ID
    more = text.replace(f"{END}\n", f"{END}\n\nThe end.") + " Or not"
    again = make_card(made["plain"], more)
    assert again == more
    other = make_card(made["combined"], more)
    assert other.split(BEGIN)[0] == more.split(BEGIN)[0]
    assert other.split(END)[1] == more.split(END)[1]
    assert "combined from" in other
    assert other.count(BEGIN) == 1


def test_markers(made: dict[str, Path]) -> None:
    """Only whole lines are markers, and one without the other takes nothing along."""
    inline = f"Between `{BEGIN}` and `{END}` is what loratool says.\n"
    text = make_card(made["plain"], inline)
    assert inline in text
    assert make_card(made["plain"], text) == text
    for lone in (f"a\n{BEGIN}\nb\n", f"a\n{END}\nb\n", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\nx"):
        text = make_card(made["plain"], lone)
        assert lone in text
        again = make_card(made["combined"], text)
        assert lone in again
        assert "combined from" in again
        assert make_card(made["plain"], again) == text
    old = f"a\n\n{BEGIN}\nstale words\n{END}  \n\nb"
    text = make_card(made["plain"], old)
    assert "stale words" not in text
    assert text.endswith(f"{END}  \n\nb")
    empty = make_card(made["plain"], f"{BEGIN}\n{END}")
    assert empty.endswith(END)
    assert empty.count(BEGIN) == 1


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_breaks(made: dict[str, Path], newline: str, mark: str) -> None:
    """The section has the line breaks of the card; a byte order mark stays first."""
    text = mark + f"---\nlicense: mit # mine\n---\n\n{PROSE}".replace("\n", newline)
    made_card = make_card(made["plain"], text)
    assert made_card.startswith(f"{mark}---{newline}license: mit # mine{newline}base_model")
    assert PROSE.replace("\n", newline) in made_card
    if newline == "\r\n":
        assert not re.search(r"(?<!\r)\n", made_card)
    assert make_card(made["plain"], made_card) == made_card
    assert data(made_card.removeprefix(mark))["license"] == "mit"


@pytest.mark.parametrize(
    "block",
    [
        "license: mit",
        "license: mit  # a comment\n# another\n",
        "tags:\n- mine\n- peft",
        "tags:\n  - mine # why\n  - peft\nlicense: mit",
        "license: mit\ntags: [mine, peft]",
        "tags: [mine, ]",
        "tags: []",
        "tags:\n  - mine\n  - >-\n    two\n    lines",
        "tags:",
        "tags: mine",
        "  license: mit\n  tags:\n    - mine",
        "{license: mit, tags: [mine]}",
        "{}",
        "",
        "# nothing",
        "description: |\n  two\n  lines",
        "description: |+\n  two\n  lines\n",
        "date: 2024-05-01\nvalue: .nan\n'a b': \"c: d\"\n",
        "library_name: diffusers\nbase_model: [a/b, c/d]\npipeline_tag: fill-mask",
        "tags: &t\n- mine\nother: *t",
        "model-index:\n- name: x\n  results: []",
        "model-index: nonsense",
    ],
)
def test_yaml_of_a_person(made: dict[str, Path], block: str) -> None:
    """Keys, their values and their comments stay; lists of tags grow at their end."""
    text = f"---\n{block}\n---\n\n{PROSE}"
    card = make_card(made["plain"], text, licence=Licence("apache-2.0"))
    assert card.partition("\n---\n")[2].startswith("\n" + PROSE)
    assert make_card(made["plain"], card, licence=Licence("apache-2.0")) == card
    old = yaml.safe_load(block + "\n") or {}
    new = yaml.safe_load(card[4:].partition("\n---\n")[0] + "\n")
    for key, value in old.items():
        if key == "tags" and isinstance(value, list) and "&t" not in block:
            assert new[key][: len(value)] == value
            assert set(new[key]) == {*value, "lora", "loratool", "peft"}
            assert len(new[key]) == len({*new[key]})
        else:
            assert repr(new[key]) == repr(value)
    assert {"base_model", "library_name", "pipeline_tag", "tags", "license"} <= new.keys()
    for line in block.splitlines():
        if "[" not in line and "{" not in line:
            assert line in card.splitlines()


@pytest.mark.parametrize(
    "block",
    ["a: [", "a: b: c", "- a\n- b", "just words", "1: 2", "a: !!python/object:os.system x",
     "license: mit\n\ttags: x", "ignore_metadata_errors: 1"],
)  # fmt: skip
def test_broken_yaml(made: dict[str, Path], block: str) -> None:
    """A clear error that names the file and the reason, and not a card that hides it."""
    with pytest.raises(FileError, match=r"README\.md: .* not valid \(.+\)") as caught:
        make_card(made["plain"], f"---\n{block}\n---\n\n{PROSE}")
    for mark in ("\n", r"\n", "<unicode string>"):  # as a YAML library writes its own messages
        assert mark not in caught.value.message


def test_a_card_of_yaml_only_gets_a_title(made: dict[str, Path]) -> None:
    """As the Hub makes it with a new repository."""
    for end in ("", "\n", "\n\n"):
        text = make_card(made["plain"], f"---\nlicense: mit\n---{end}", repo_id="me/mine")
        assert "\n# mine\n" in text
        assert data(text)["license"] == "mit"
        assert make_card(made["plain"], text, repo_id="me/mine") == text
    for nothing in ("", "\n", " \n\n"):
        assert "\n# mine\n" in make_card(made["plain"], nothing, repo_id="me/mine")


KEYS = st.from_regex(r"[a-z][a-z_]{0,12}", fullmatch=True).filter(
    lambda key: key not in ("ignore_metadata_errors", "self", "model_index", "eval_results")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    keys=st.none()
    | st.dictionaries(KEYS | st.sampled_from(["tags", "license"]), VALUES, max_size=4),
    body=st.text(max_size=60),
    flow=st.sampled_from([True, False, None]),
)
def test_whatever_a_person_wrote_stays(
    adapter: Path, keys: dict[str, Any] | None, body: str, flow: bool | None
) -> None:
    """Any keys and any text: all of it is there again, and again the same the second time."""
    block = yaml.safe_dump(keys, default_flow_style=flow, allow_unicode=True) if keys else ""
    text = f"---\n{block}---\n\n{body}" if keys else body
    try:
        card = make_card(adapter, text, licence=Licence("mit"))
    except FileError:
        # Only a text that looks like broken YAML itself, or a list of tags that is none.
        assert keys is None or not isinstance(keys.get("tags"), list | None)
        return
    assert make_card(adapter, card, licence=Licence("mit")) == card
    assert body in card or not body.strip()
    own = yaml.safe_load(re.split(r"(?m)^---\s*$", card, maxsplit=2)[1])
    # Not the values that were generated: PyYAML does not give each of them back.
    for key, value in (yaml.safe_load(block) or {}).items():
        if key == "tags" and isinstance(value, list):
            assert own[key][: len(value)] == value
        else:
            assert own[key] == value


@pytest.mark.process
def test_a_card_needs_no_torch() -> None:
    """A card is written without importing torch, transformers or rich."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from pathlib import Path; "
         "import loratool.publishing.cards.document as c; "
         "assert 'huggingface_hub' not in sys.modules; "
         "c.make_card(Path('fixtures/adapter'), None); "
         "print([m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
