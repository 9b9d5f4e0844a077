"""An adapter directory that appears complete or not at all: weights, config, tokenizer, record.

What combine, resize and extract have in common; in which dialect, `dialects.WRITTEN` says.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loratool.adapters.dialects import WRITTEN
from loratool.adapters.dialects.dialect import Recipe
from loratool.adapters.factorfile import AdapterWriter, Extra, file_size, tensors_of
from loratool.adapters.factors import ModuleShape
from loratool.notices import Notice
from loratool.storage.destination import Overwrite, refuse_full_disk
from loratool.storage.filenames import ADAPTER_CONFIG, ADAPTER_MODEL, PROVENANCE
from loratool.storage.hashing import file_sha256
from loratool.storage.jsonfile import write_json
from loratool.storage.links import copy_own
from loratool.storage.staging import StagedDirectory
from loratool.streams.results import ResultLog

#: The folder in the output's own for results that nobody else shall find.
_RESULTS = "results.partial"


class AdapterDirectory:
    """The folder while it is being made. `writer` takes the factors, then `finish` writes them."""

    def __init__(self, path: Path, output: Path, writer: AdapterWriter) -> None:
        self.path = path
        self.writer = writer
        #: After the block: what came up when it was put into its place.
        self.notices: list[Notice] = []
        self._output = output

    def finish(
        self,
        outlines: Sequence[ModuleShape],
        ranks: Sequence[int],
        extras: Sequence[Extra],
        threads: int | None,
    ) -> int:
        """Write the weights, each module with its rank. Returns the bytes of the file.

        Raises OutputError if the disk has not got these.
        """
        tensors = tensors_of(outlines, ranks, self.writer.dtype, extras)
        nbytes = file_size(tensors, self.writer.metadata)
        refuse_full_disk(nbytes, self._output)
        self.writer.finish(outlines, ranks, extras, threads)
        return nbytes

    def write_config(self, recipe: Recipe) -> None:
        write_json(self.path / ADAPTER_CONFIG, WRITTEN.config(recipe))

    def copy(self, files: Mapping[str, Path]) -> None:
        """Put these files beside the weights, by name."""
        for name, path in files.items():
            copy_own(path, name, self.path / name)

    def write_record(self, document: dict[str, Any]) -> None:
        """loratool.json, which holds no path and no date, with the hashes of weights and config."""
        written = (ADAPTER_MODEL, ADAPTER_CONFIG)
        files = {name: file_sha256(self.path / name) for name in written}
        write_json(self.path / PROVENANCE, {**document, "files": files})


@contextmanager
def adapter_directory(
    output: Path, dtype: str, metadata: dict[str, str], overwrite: Overwrite
) -> Iterator[AdapterDirectory]:
    """Make `output`; it is put in its place when the block ends without an error."""
    with StagedDirectory(output, overwrite) as stage:
        own = stage.path / _RESULTS
        with ResultLog(own) as log:
            made = adapter_within(stage.path, output, dtype, metadata, log)
            yield made
        if own.exists():
            shutil.rmtree(own)
        made.notices += stage.commit()


def adapter_within(
    folder: Path, output: Path, dtype: str, metadata: dict[str, str], log: ResultLog
) -> AdapterDirectory:
    """An adapter that is made in `folder`, of factors that are in `log` or come there; whoever has
    the folder puts it into the output's place."""
    return AdapterDirectory(folder, output, AdapterWriter(folder, dtype, metadata, log))
