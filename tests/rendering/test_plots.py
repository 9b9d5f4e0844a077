"""Charts that can be read: names that do not run into each other, scales that mean something."""

from __future__ import annotations

from itertools import pairwise

import pytest

from loratool.rendering import plots
from loratool.sheet import HeatMap

PROGRAMS = ["vLLM", "SGLang", "llama.cpp", "LoRAX", "TGI", "exllamav3", "Ollama", "PEFT hotswap",
            "mlx-lm"]  # fmt: skip


def heat_map(columns: list[str], value: float = 0.5) -> HeatMap:
    return HeatMap("Title", ["a", "b"], columns, [[value] * len(columns)] * 2, "unit", "across")


@pytest.mark.parametrize(
    ("columns", "slanted"),
    [
        (PROGRAMS, True),
        (["A", "B", "C"], False),
        ([str(layer) for layer in range(40)], False),
        ([str(layer) for layer in range(126)], False),
        ([f"adapter number {n}" for n in range(3)], False),
        ([f"adapter number {n}" for n in range(12)], True),
        (["only one with a very long name, longer than all that is above it"], False),
    ],
)
def test_names_below_a_heat_map_stand_apart(columns: list[str], slanted: bool) -> None:
    """They lie flat where there is room for it, and slant where there is none."""
    with plots._settings("#000000"):
        figure = plots._figure([heat_map(columns)])
        figure.draw_without_rendering()
        labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
        assert {label.get_rotation() for label in labels} <= {20.0 if slanted else 0.0}
        if not slanted:
            boxes = [label.get_window_extent() for label in labels]
            assert all(one.x1 < other.x0 for one, other in pairwise(boxes))


@pytest.mark.parametrize("value", [0.0, 0.5, 8.0])
def test_one_number_everywhere_has_a_scale_from_zero(value: float) -> None:
    """A share of zero is not shown as something between -0.5 and 0.5."""
    figure = plots._figure([heat_map(["0", "1"], value)])
    (image,) = figure.axes[0].get_images()
    assert image.get_clim() == (0.0, value or 1.0)
