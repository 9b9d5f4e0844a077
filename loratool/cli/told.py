"""The options that say of adapters what their files do not, the same on every command."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import click

from loratool.adapters.told import COMPOSITIONS, NOTHING_TOLD, PRODUCTS, Told

_T = TypeVar("_T")

#: In place of a value: as the adapter's file says.
_AS_IT_SAYS = "-"


class _OrDash(click.ParamType):  # type: ignore[type-arg]
    """A value of another type, or "-" for an adapter whose file tells."""

    def __init__(self, inner: click.ParamType) -> None:  # type: ignore[type-arg]
        self.inner = inner
        self.name = inner.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return None if value == _AS_IT_SAYS else self.inner.convert(value, param, ctx)


class _Parts(click.ParamType):  # type: ignore[type-arg]
    """MODULE=1,0,1 as a name and flags."""

    name = "parts"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[bool, ...]]:
        module, _, flags = str(value).rpartition("=")
        words = flags.lower().replace("true", "1").replace("false", "0").split(",")
        if not module or any(word not in ("0", "1") for word in words) or "1" not in words:
            self.fail(f"{value!r}: write MODULE=1,0,1, a 1 for each part that has factors.")
        return module, tuple(word == "1" for word in words)


_OPTIONS = (
    click.option(
        "--from", "told_dialect", multiple=True, type=_OrDash(click.STRING), metavar="DIALECT",
        help="What the adapter is, where its file does not tell: mlx, litgpt, … "
        "(docs/dialects.md). This and the next six: once per adapter, in their order; - for one "
        "whose file tells.",
    ),
    click.option(
        "--alpha", "told_alpha", multiple=True, type=_OrDash(click.FLOAT), metavar="A",
        help="lora_alpha of the training script, where the adapter does not hold it.",
    ),
    click.option(
        "--scale", "told_scale", multiple=True, type=_OrDash(click.FLOAT), metavar="S",
        help="The factor of the product itself, in place of alpha/r.",
    ),
    click.option(
        "--adapter-rank", "told_rank", multiple=True, type=_OrDash(click.IntRange(1)), metavar="R",
        help="Its rank, where shapes do not tell.",
    ),
    click.option(
        "--product", "told_product", multiple=True, type=_OrDash(click.Choice(PRODUCTS)),
        metavar="|".join(PRODUCTS),
        help="How two factors A and B make the change of a weight, where shapes do not tell; ABt "
        "is (A·B)ᵀ.",
    ),
    click.option(
        "--kind", "told_kind", multiple=True, type=_OrDash(click.Choice(COMPOSITIONS)),
        metavar="|".join(COMPOSITIONS),
        help="Whether the product is added to W, or multiplied with it: W + s·B·A·W. "
        "[default: additive]",
    ),
    click.option(
        "--enable-lora", multiple=True, type=_Parts(), metavar="MODULE=1,0,1",
        help="Which equal parts of a fused layer have factors (loralib); repeatable.",
    ),
    click.option(
        "--fan-in-fan-out", multiple=True, metavar="GLOB",
        help="Modules whose weights are stored [in, out]; repeatable.",
    ),
    click.option(
        "--override", is_flag=True, help="What these options say holds against the file."
    ),
)  # fmt: skip


def told_options(command: Any) -> Any:
    """Adds the options; the command gets them as `told`, a list with a Told for each adapter."""

    @functools.wraps(command)
    def with_told(
        enable_lora: tuple[tuple[str, tuple[bool, ...]], ...],
        fan_in_fan_out: tuple[str, ...],
        override: bool,
        **others: Any,
    ) -> Any:
        count = len(others.get("adapters", ("",)))
        names = ("dialect", "alpha", "scale", "rank", "product", "kind")
        columns = {name: _spread(name, others.pop(f"told_{name}"), count) for name in names}
        told = [
            Told(
                **{name: column[i] for name, column in columns.items()},
                enable_lora=dict(enable_lora), fan_in_fan_out=fan_in_fan_out, override=override,
            )
            for i in range(count)
        ]  # fmt: skip
        return command(told=told if any(one != Told() for one in told) else (), **others)

    for option in reversed(_OPTIONS):
        with_told = option(with_told)
    return with_told


def _spread(name: str, values: Sequence[_T], count: int) -> Sequence[_T | None]:
    """A value for each adapter: none, one for all of them, or one after the other."""
    if len(values) in (0, 1):
        return [values[0] if values else None] * count
    if len(values) != count:
        option = {"dialect": "from", "rank": "adapter-rank"}.get(name, name)
        raise click.UsageError(
            f"--{option} was given {len(values)} times for {count} adapters. Give it once for "
            "all, or once per adapter, in their order."
        )
    return values


def one_told(told: Sequence[Told]) -> Told:
    """What is said of the only adapter."""
    return told[0] if told else NOTHING_TOLD
