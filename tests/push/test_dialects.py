"""push takes adapters of every dialect, whatever their files do not tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.dialects import CASES
from helpers.hub import HubServer
from helpers.pushing import as_json, states


@pytest.mark.parametrize("case", ["mlx-lora", "litgpt-qv", "torchtune-lora", "hand-subclass"])
def test_the_files_of_an_adapter_go_up(
    case: str, hub: HubServer, home: Path, repo: str, tmp_path: Path
) -> None:
    """All of them with a card: nobody is asked whether another program would load them."""
    source = CASES[case].adapter
    folder = shutil.copytree(source if source.is_dir() else source.parent, tmp_path / case)
    names = {path.name for path in folder.iterdir()}
    report = as_json(hub, home, folder, repo)
    assert states(report).keys() == names | {"README.md"}
