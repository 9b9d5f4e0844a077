"""`loratool.json` as a file: which versions of it there are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratool.errors import FileError
from loratool.storage.fields import ABSENT, COUNT, FieldType, is_count, mapping_to
from loratool.storage.hashing import is_digest

#: What is written. In version 1 all digests are sha256, in version 2 those of a model's shards are
#: BLAKE3; the others are compared with the Hub's, or known from inputs, and are sha256 in both.
SCHEMA_VERSION = 2

#: The types of the version, and of a table of digests by name.
SCHEMA = COUNT | ABSENT
HASHES = mapping_to(FieldType("a hash", is_digest), "a table of hashes")


def check_schema(record: Mapping[str, Any], path: Path) -> None:
    """Raise FileError for a record of a version that this loratool does not know."""
    version: Any = record.get("schema_version")
    if is_count(version) and version > SCHEMA_VERSION:
        raise FileError(
            f"{path}: a later loratool wrote it (schema version {version}; this one knows "
            f"{SCHEMA_VERSION} and below).",
            "Update loratool.",
        )
