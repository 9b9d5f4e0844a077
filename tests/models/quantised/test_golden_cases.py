"""The golden cases beside the project, where they are: are they read bit for bit?"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.dequantising import values
from helpers.places import ROOT
from safetensors.torch import load_file

from loratool.models.checkpoint import open_checkpoint
from loratool.models.quantised.base import Dequantised, dequantised

GOLDEN = ROOT.parent / "shared" / "quantised" / "golden"
#: A GGUF file is no base.
CASES = sorted(path.name for path in GOLDEN.glob("*") if not path.name.startswith("gguf"))

# They lie beside the project, not in it, so a clone by itself has none. The project's own golden
# files, fixtures/quantised, are read in every run (test_golden_files.py).
pytestmark = pytest.mark.skipif(not CASES, reason="needs the golden cases beside the project")


@pytest.mark.parametrize("name", CASES or [""])
def test_weights_are_the_librarys(name: str, tmp_path: Path) -> None:
    """Every format as its own library reads it: whole, by rows, and in cuts that end anywhere."""
    (tmp_path / "config.json").write_bytes((GOLDEN / name / "config.json").read_bytes())
    data = (GOLDEN / name / "quantised.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    base = dequantised(open_checkpoint(tmp_path))
    assert isinstance(base, Dequantised)
    for weight, expected in load_file(GOLDEN / name / "expected.safetensors").items():
        found = values(base, weight)
        assert found.shape == expected.shape
        assert bool((found.to(expected.dtype) == expected).all()), weight
