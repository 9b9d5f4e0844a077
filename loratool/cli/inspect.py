"""`loratool inspect`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from loratool.adapters.told import Told
from loratool.cli.options import (
    base_option,
    components_option,
    expert_b_layout_option,
    full_option,
    include_option,
    json_option,
    layer_option,
    quiet_option,
    spectrum_option,
)
from loratool.cli.told import one_told, told_options


@click.command("inspect", short_help="Show what is in an adapter.")
@click.argument("source")
@base_option("Base model: adds coverage and ‖ΔW‖/‖W‖.")
@components_option()
@told_options
@expert_b_layout_option()
@full_option("One line per module; do not fold layers.")
@click.option("--tensors", is_flag=True, help="List the raw tensors too.")
@spectrum_option("Show each module's singular values.")
@click.option("--norms", is_flag=True, help="Download from the Hub what norms need, however large.")
@layer_option()
@include_option()
@json_option()
@quiet_option()
def inspect_command(
    source: str,
    base: str | None,
    components: tuple[str, ...],
    told: Sequence[Told],
    expert_b_layout: str | None,
    full: bool,
    tensors: bool,
    spectrum: bool,
    norms: bool,
    layers: str | None,
    include: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Show what is in an adapter: modules, ranks, scales, norms, and what is odd.

    SOURCE is an adapter directory, a weights file (.safetensors, .bin, .pt) or a
    Hub id (org/name, org/name@revision, hf://org/name/folder). Norms come from the
    r × r core of each module, never from the dense product.

    From the Hub only headers are read: adapters above 50 MB, and weights of a base,
    are downloaded only with --norms (or --spectrum, for the adapter).

    \b
    Examples:
      loratool inspect adapter/
      loratool inspect adapter_model.safetensors --layer 0-3 --include 'q_proj'
      loratool inspect adapter/ --base base/ --json
      loratool inspect org/adapter --base org/base
    """
    from loratool.rendering import terminal as common
    from loratool.rendering.inspect import show_inspect
    from loratool.verbs.inspect import inspect as run

    report = run(
        source, base=base, components=components, spectrum=spectrum, norms=norms, layers=layers,
        include=include, told=one_told(told), expert_b_layout=expert_b_layout,
    )  # fmt: skip
    if as_json:
        common.print_json(report.to_dict())
        return
    show_inspect(report, full, tensors, spectrum)
    if not quiet:
        common.print_warnings(report.warnings)
