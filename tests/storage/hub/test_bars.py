"""The library's own progress bars, which show names of files as they are."""

from __future__ import annotations

import sys

import pytest

from loratool.storage.hub.errors import progress_bars


@pytest.mark.parametrize(
    ("names", "shown"),
    [(["model.safetensors"], True), (["a", "b\x1b]0;x\x07"], False), (["a\u202eb"], False)],
)
def test_no_bar_is_named_after_a_file_with_control_characters(
    names: list[str], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one name is not printable, nothing is shown of the transfer, which goes on."""
    from huggingface_hub.utils import are_progress_bars_disabled

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    before = are_progress_bars_disabled()
    with progress_bars(True, names):
        assert are_progress_bars_disabled() == (before or not shown)
    assert are_progress_bars_disabled() == before
