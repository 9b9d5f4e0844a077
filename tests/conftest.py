"""Shared paths and small builders of inputs."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hub import HubServer

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
#: Public files of other people, beside the project where they are there at all.
SHARED = ROOT.parent / "shared" / "adapters"


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


def write_adapter(
    folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None
) -> Path:
    """An adapter directory with these tensors; no adapter_config.json if `config` is None."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if config is not None:
        settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def pair(
    path: str, out: int, width: int, rank: int = 4, seed: int = 0, prefix: str = "base_model.model."
) -> dict[str, np.ndarray]:
    """Random `lora_A` and `lora_B` of a linear module."""
    rng = np.random.default_rng(seed)
    return {
        f"{prefix}{path}.lora_A.weight": rng.standard_normal((rank, width)).astype(np.float32),
        f"{prefix}{path}.lora_B.weight": rng.standard_normal((out, rank)).astype(np.float32),
    }


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
            # full disk, in a test of its own in test_output.py that runs everywhere.
            assert "CI" not in os.environ, done.stderr
            pytest.skip(f"mounting a tmpfs is not possible here: {done.stderr.decode().strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        if subprocess.run(["umount", str(place)], capture_output=True).returncode:
            subprocess.run(["umount", "-l", str(place)], check=True)


def run_cli(*arguments: str) -> Result:
    """Run a command in a process of its own, as a user would; the exit code is in the result."""
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "loratool", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Result(
        CliRunner(), done.stdout.encode(), done.stderr.encode(), done.stdout.encode(),
        None, done.returncode, None, None,
    )  # fmt: skip
