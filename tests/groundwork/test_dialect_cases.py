"""Are the adapters of `fixtures/dialects` all there, and their answers of their bases?"""

from __future__ import annotations

import numpy as np
from helpers.dialects import CASES, DIALECTS


def test_every_folder_is_a_case() -> None:
    """What lies there is named in the manifest, and the other way round."""
    folders = {path.name for path in DIALECTS.iterdir() if path.is_dir()}
    assert folders - {"bases", "__pycache__"} == {*CASES}


def test_every_case_has_its_files() -> None:
    """Adapter and base are there; an answer is there just where the adapter can be merged, and why
    not is said where it cannot."""
    for case in CASES.values():
        assert case.adapter.exists(), case.name
        assert (case.base / "config.json").exists(), case.name
        assert (DIALECTS / case.name / "expected.safetensors").exists() == case.merges, case.name
        assert bool(case.why) != case.merges, case.name


def test_every_answer_changes_its_base() -> None:
    """It has names and shapes of the base, finite values, and none that are all zeros."""
    for case in CASES.values():
        if not case.merges:
            continue
        base = case.base_tensors()
        expected = case.expected()
        assert expected, case.name
        for name, added in expected.items():
            assert added.shape == base[name].shape, (case.name, name)
            assert np.isfinite(added).all(), (case.name, name)
            assert added.any(), (case.name, name)
