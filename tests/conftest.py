"""Fixtures that tests of several folders use."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("helpers")

from helpers.places import FIXTURES  # noqa: E402

# Two processes of tests share the cores: BLAS threads of each would only wait for the other's. Set
# before NumPy and torch are imported, and inherited by the processes that xdist starts.
for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")

if TYPE_CHECKING:
    from helpers.hub import HubServer


@pytest.fixture
def base() -> Path:
    return FIXTURES / "base"


@pytest.fixture
def adapter() -> Path:
    return FIXTURES / "adapter"


@pytest.fixture
def hub(stock: HubServer) -> HubServer:
    """The Hub that a module calls `stock`, with an empty log and no faults."""
    stock.clear()
    return stock


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """HF_HOME, not there yet."""
    return tmp_path / "home"


@pytest.fixture
def repo(tmp_path: Path) -> str:
    """A repository that is not there yet, of a name that no other test uses."""
    return f"org/{tmp_path.name.strip('_')}"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts memory disks with given options; skips where mounting is not permitted."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True
        )
        if done.returncode:
            # Only root can mount, and CI is root. Elsewhere a file size limit stands in for the
            # full disk, in a test of its own in storage/staging that runs everywhere.
            assert "CI" not in os.environ, done.stderr
            pytest.skip(f"mounting a tmpfs is not possible here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        if subprocess.run(["umount", str(place)], capture_output=True).returncode:
            subprocess.run(["umount", "-l", str(place)], check=True)
