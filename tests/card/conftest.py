"""The models and adapters that cards are made for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.cards import ADAPTER, BASE, HTML, ID, KINDS, TUNED

import loratool


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("made")
    found = {kind: folder / kind for kind in KINDS}
    loratool.merge(BASE, ADAPTER, found["merged"], dtype="float32")
    both = [ADAPTER, HTML]
    loratool.merge(BASE, both, found["two"], weights=[0.7, -0.4], dtype="bfloat16", reversible=True)
    loratool.combine(both, found["combined"], weights=[0.7, 0.5], rank=8)
    loratool.resize(ADAPTER, found["resized"], energy=0.95, patterns=True)
    loratool.extract(BASE, TUNED, found["extracted"], rank=8, save=["norms"], embeddings=True,
                     base_name=ID, dtype="float32")  # fmt: skip
    loratool.unmerge(found["two"], both, found["unmerged"], subtract=True)
    shutil.copytree(ADAPTER, found["plain"])
    shutil.copytree(BASE, found["base"])
    return found
