"""The cluster that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from helpers.ray import Nodes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def _nodes() -> Iterator[Nodes]:
    from helpers.ray import Nodes

    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture
def nodes(_nodes: Nodes) -> Nodes:
    """A cluster with two nodes of one CPU each."""
    _nodes.complete()
    return _nodes
