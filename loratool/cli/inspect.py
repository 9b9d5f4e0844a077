"""`loratool inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from loratool.adapters.told import Told
from loratool.cli.options import (
    answer_options,
    base_option,
    components_option,
    expert_b_layout_option,
    full_option,
    include_option,
    layer_option,
    ray_option,
    spectrum_option,
)
from loratool.cli.told import one_told, told_options
from loratool.errors import LoraToolError

if TYPE_CHECKING:
    from loratool.rendering.answering import Forms


@click.command("inspect", short_help="Show what is in an adapter.")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@base_option("Base model: adds coverage and ‖ΔW‖/‖W‖.")
@components_option()
@told_options
@expert_b_layout_option()
@full_option("One line per module; do not fold layers.")
@click.option("--tensors", is_flag=True, help="List the raw tensors too.")
@spectrum_option("Show each module's singular values.")
@click.option(
    "--audit", is_flag=True,
    help="Find what is dead, larger than its spectrum needs, noise, or far off its like in other "
         "layers, and what to do about it.",
)  # fmt: skip
@click.option("--norms", is_flag=True, help="Download from the Hub what norms need, however large.")
@layer_option()
@include_option()
@ray_option("Look at each SOURCE by a task of the Ray cluster at ADDRESS (auto, host:port).")
@answer_options(pages=True)
def inspect_command(
    sources: tuple[str, ...],
    base: str | None,
    components: tuple[str, ...],
    told: Sequence[Told],
    expert_b_layout: str | None,
    full: bool,
    tensors: bool,
    spectrum: bool,
    audit: bool,
    norms: bool,
    layers: str | None,
    include: tuple[str, ...],
    ray: str | None,
    forms: Forms,
) -> int:
    """Show what is in an adapter: modules, ranks, scales, norms, and what is odd.

    A SOURCE is an adapter directory, a weights file (.safetensors, .bin, .pt) or a
    Hub id (org/name, org/name@revision, hf://org/name/folder). Norms come from the
    r × r core of each module, never from the dense product.

    From the Hub only headers are read: adapters above 50 MB, and weights of a base,
    are downloaded only with --norms (or --spectrum or --audit, for the adapter).

    \b
    Examples:
      loratool inspect adapter/
      loratool inspect adapter_model.safetensors --layer 0-3 --include 'q_proj'
      loratool inspect adapter/ --base base/ --json
      loratool inspect adapter/ --audit --base base/
      loratool inspect runs/*/adapter --json --ray
      loratool inspect org/adapter --base org/base
    """
    from loratool.rendering.answering import free_line
    from loratool.rendering.drawing import draw
    from loratool.rendering.inspect import inspect_sheet
    from loratool.rendering.terminal import print_error, print_json, print_warnings
    from loratool.verbs.inspecting import inspect_all

    options = {
        "base": base, "components": components, "spectrum": spectrum or forms.draws,
        "audit": audit, "norms": norms, "layers": layers, "include": include,
        "told": one_told(told),
        "expert_b_layout": expert_b_layout,
    }  # fmt: skip
    code, documents, sheets = 0, [], []
    for source, report in inspect_all(sources, options, ray):
        if isinstance(report, LoraToolError):
            if len(sources) == 1:
                raise report
            code = report.exit_code
            documents.append({"source": source, **report.to_dict()})
            if not forms.as_json:
                print_error(report)
            continue
        documents.append(report.to_dict())
        sheets.append(inspect_sheet(report, full, tensors, spectrum))
        if forms.as_json:
            continue
        if len(documents) > 1:
            free_line()
        draw(sheets[-1])
        if not forms.quiet:
            print_warnings(report.warnings)
    if forms.as_json:
        one = len(sources) == 1
        print_json(documents[0] if one else {"schema_version": 1, "adapters": documents})
    forms.write(sheets)
    return code
