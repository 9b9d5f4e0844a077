"""The README's section on the Hub can be followed, from nothing to a pushed merge."""

from __future__ import annotations

import os
import re
import shlex

import pytest
from helpers import forked
from helpers.hub import HubServer
from helpers.places import ROOT

SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## The Hub\n")[1]
SECTION = SECTION.split("\n## ")[0]
COMMANDS = [
    line.partition("#")[0].strip()
    for line in SECTION.split("```sh\n")[1].split("```")[0].splitlines()
]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command of the section prints, on a Hub that has nothing yet."""
    place = tmp_path_factory.mktemp("readme")
    (place / "fixtures").symlink_to(ROOT / "fixtures")
    printed = {}
    with HubServer() as hub:
        environment = hub.environment(place / "home") | {"COLUMNS": "80"}
        for command in COMMANDS:
            program, *arguments = shlex.split(command)
            assert program == "loratool"
            done = forked.run(arguments, environment, place)
            assert done.code == 0, (command, done.err)
            printed[command] = done.out.replace(hub.url, "https://huggingface.co")
        kept, streamed = hub.files("org/merged"), hub.files("org/streamed")
        for name in kept.keys() - {"README.md"}:
            assert kept[name] == streamed[name], name
        assert hub.branches("org/streamed").keys() == {"main"}
        assert not list((place / "home").rglob("*partial*"))
    assert sorted(os.listdir(place)) == ["fixtures", "home", "merged"]
    return printed


def test_every_command_of_the_section_works(followed: dict[str, str]) -> None:
    """Also: streaming through the disk gives what the two steps give, byte for byte."""
    assert [shlex.split(c)[1] for c in followed] == [
        "push", "push", "inspect", "merge", "push", "push", "merge", "verify",
    ]  # fmt: skip


def test_the_session_shown_is_what_is_printed(followed: dict[str, str]) -> None:
    """Times and commits aside, the session is what the command prints."""
    shown = SECTION.split("```console\n$ ")[1].split("```")[0]
    command, _, text = shown.partition("\n")
    found = "\n".join(line.rstrip() for line in followed[command].splitlines())
    assert masked(found) == masked(text)


def masked(text: str) -> str:
    text = re.sub(r"\d+\.\d s\b", "… s", text)
    return re.sub(r"\b[0-9a-f]{40}\b", "<commit>", text).rstrip()
