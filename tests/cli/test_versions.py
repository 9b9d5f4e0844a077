"""`loratool --version`, which reports of bugs begin with."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata

import pytest
from helpers.cli import run_cli

import loratool
from loratool.cli import versions


@pytest.mark.process
def test_versions_of_all_that_counts_are_shown_as_text_and_json() -> None:
    """loratool, Python, torch, safetensors, huggingface-hub, numpy and the platform, by either
    form, by each way of starting it."""
    command = [sys.executable, "-m", "loratool", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert shown["loratool"] == loratool.__version__
    assert shown["python"].startswith(platform.python_version())
    for name in ("torch", "safetensors", "huggingface-hub", "numpy"):
        assert shown[name] == metadata.version(name)
    assert shown["platform"] == platform.platform()
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(as_json.stdout) == {"schema_version": 1, **shown}
    assert run_cli("--version").stdout == done.stdout


def test_a_package_that_is_missing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not installed is said to be so, and is null as JSON."""
    monkeypatch.setattr(versions, "_PACKAGES", ("no-such-package-anywhere",))
    assert "no-such-package-anywhere  not installed" in versions.versions_text(as_json=False)
    found = json.loads(versions.versions_text(as_json=True))
    assert found["no-such-package-anywhere"] is None


@pytest.mark.process
def test_versions_are_told_before_anything_slow_is_imported() -> None:
    """Neither the packages nor the commands are imported to tell versions."""
    code = (
        "import sys, atexit; sys.argv[1:] = ['--version']\n"
        "slow = {'torch', 'numpy', 'safetensors', 'huggingface_hub', 'click', 'rich'}\n"
        "atexit.register(lambda: print('slow:', *sorted(slow & sys.modules.keys())))\n"
        "from loratool.__main__ import start; start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "slow:"


@pytest.mark.process
@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
@pytest.mark.parametrize("form", ["", "--json"])
def test_versions_that_cannot_be_printed_are_an_error(where: str, form: str) -> None:
    """A full disk behind stdout, and one that is closed, are said, as for any answer."""
    line = f"{sys.executable} -m loratool --version {form} {where}"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "could not be printed" in done.stderr
    line = f"{sys.executable} -m loratool --version {form} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
