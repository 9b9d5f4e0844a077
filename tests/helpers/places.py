"""Where the project's fixtures lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
#: Public files of other people, beside the project where they are there at all.
SHARED = ROOT.parent / "shared" / "adapters"
