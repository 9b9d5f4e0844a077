"""Do the libraries still make what is committed, and read it so?"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.golden import GOLDEN

pytestmark = pytest.mark.quantised


@pytest.mark.parametrize(
    "script",
    ["make_bitsandbytes", "make_transformers", "make_compressed_tensors", "make_torchao"],
)
def test_golden_files_are_made_anew(script: str, tmp_path: Path) -> None:
    """The same tensors and the same words, by the libraries of the extra."""
    from helpers.live_quantised import maker

    maker(script)
    golden = maker("golden")
    made = golden.make(script, tmp_path)
    assert made
    found = {path.name: golden.differences(path, GOLDEN / path.name) for path in made}
    assert not any(found.values()), found
