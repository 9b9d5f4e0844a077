"""How large the weights of modules are, where a file does not tell and the base does."""

from __future__ import annotations

from collections.abc import Mapping

from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.components import Wanted
from loratool.models.layouts.layout import Layout
from loratool.models.layouts.naming import choose_naming

#: (out, in) of a weight; 0 for what is not known.
Size = tuple[int, int]


def sizes_in(base: Checkpoint, known: Mapping[str, Size], transposes: bool) -> dict[str, Size]:
    """The sizes of the linear modules at these paths, of which a side may be known, in the base.

    Modules whose weights are no tensors of their own there, or of another size, are left out.
    """
    layout = Layout(base)
    naming = choose_naming(layout, [Wanted(f"{p}.weight", size) for p, size in known.items()])
    found: dict[str, Size] = {}
    for path, (out, width) in known.items():
        name = naming(f"{path}.weight")
        name = layout.name_of(name) or name
        info = layout.tensor_of(name)
        if info is None or len(info.shape) != 2:
            continue
        rows, columns = info.shape
        square = rows == columns
        if layout.is_transposed(name.rpartition(".")[0], transposes, square):
            rows, columns = columns, rows
        if out in (0, rows) and width in (0, columns):
            found[path] = rows, columns
    return found
