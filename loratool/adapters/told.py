"""What a user says of an adapter, because its file cannot: dialect, alpha, how factors multiply.

Nothing here is guessed from files, and what a file says itself wins over nobody: where the two
contradict each other there is an error, unless the user overrides the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from loratool.errors import AdapterError, FileError, UsageError, unknown
from loratool.storage.fields import (
    ABSENT,
    COUNT,
    FINITE,
    FLAG,
    NAMES,
    TEXT,
    check_fields,
    list_of,
    mapping_to,
)

#: How two factors, the first called A, make Δ `[out, in]`: B·A, A·B, or (A·B)ᵀ.
Product = Literal["BA", "AB", "ABt"]
#: Whether a product is added to W, or W is multiplied with it: W += scale·B·A·W.
Composition = Literal["additive", "multiplicative"]

#: How B holds its experts, whether its axes are apart or flattened. `rank-major`, PEFT's way, is
#: `[out, r, E]`; `grouped`, of Unsloth's older files, `[out, E, r]`; `stacked` `[E, out, r]`.
Packing = Literal["rank-major", "grouped", "stacked"]

PRODUCTS: tuple[Product, ...] = get_args(Product)
COMPOSITIONS: tuple[Composition, ...] = get_args(Composition)

#: Codes of what stands in the way only because a file does not tell it, and somebody else can.
ASKS = frozenset(
    {"no-alpha", "row-order", "product-unknown", "fused-parts", "needs-base", "kernel-unknown"}
)

#: Where a scale comes from, in words of reports.
FROM_USER = "option"


@dataclass(frozen=True)
class Told:
    """What a user says of one adapter; None and empty for what is not said.

    `dialect` is a name of `loratool.adapters.dialects`. `alpha` makes the scale alpha/rank of every
    module, `scale` is the scale itself. `rank` is that of all modules, where shapes do not tell.
    `enable_lora` says by the end of a module's path which of its equal parts have factors
    (loralib's MergedLinear), `fan_in_fan_out` are globs of paths whose weights are stored
    `[in, out]`.
    `expert_b_layout` is how flat factors of expert stacks lie. With `override` all this holds
    against what the file says.
    """

    dialect: str | None = None
    alpha: float | None = None
    scale: float | None = None
    rank: int | None = None
    product: Product | None = None
    kind: Composition | None = None
    enable_lora: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    fan_in_fan_out: tuple[str, ...] = ()
    override: bool = False
    expert_b_layout: Packing | None = None

    def check(self) -> None:
        """Raise UsageError for what means nothing or contradicts itself."""
        if self.alpha is not None and self.scale is not None:
            raise UsageError("--alpha and --scale say the same thing twice.", "Omit one of them.")
        for name, value in (("--alpha", self.alpha), ("--scale", self.scale)):
            if value is not None and not (math.isfinite(value) and value):
                raise UsageError(f"{name} {value:g} is no factor.", "Give a number other than 0.")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"--adapter-rank {self.rank} is no rank.", "Give a number above 0.")
        if self.product not in (None, *PRODUCTS):
            raise unknown("product", str(self.product), PRODUCTS)
        if self.kind not in (None, *COMPOSITIONS):
            raise unknown("kind", str(self.kind), COMPOSITIONS)

    @property
    def says_scale(self) -> bool:
        return self.alpha is not None or self.scale is not None

    def to_dict(self) -> dict[str, Any]:
        """What is said, for records. How expert stacks lie stands elsewhere there."""
        said = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name != "expert_b_layout" and getattr(self, f.name) not in (None, {}, (), False)
        }
        if self.enable_lora:
            said["enable_lora"] = {path: list(parts) for path, parts in self.enable_lora.items()}
        if self.fan_in_fan_out:
            said["fan_in_fan_out"] = list(self.fan_in_fan_out)
        return said

    @staticmethod
    def from_dict(said: Mapping[str, Any], where: object = "loratool.json") -> Told:
        """The reverse of `to_dict`. Raises FileError for what cannot be understood; it names
        `where`."""
        check_fields(said, _RECORDED, where)
        strange = sorted(said.keys() - _RECORDED.keys())
        if strange:
            raise FileError(
                f"{where}: {strange[0]!a} is not known of an adapter.",
                "Another version of loratool wrote it; use that one.",
            )
        values = dict(said)
        parts = values.pop("enable_lora", {})
        values["enable_lora"] = {path: tuple(map(bool, own)) for path, own in parts.items()}
        values["fan_in_fan_out"] = tuple(values.pop("fan_in_fan_out", ()))
        return Told(**values)


_TEXT, _FACTOR, _FLAGS = TEXT | ABSENT, FINITE | ABSENT, list_of(FLAG, "a list of flags")
#: The types of what is recorded of an adapter.
_RECORDED = {
    "dialect": _TEXT, "alpha": _FACTOR, "scale": _FACTOR, "rank": COUNT | ABSENT, "product": _TEXT,
    "kind": _TEXT, "override": FLAG | ABSENT, "fan_in_fan_out": NAMES | ABSENT,
    "enable_lora": mapping_to(_FLAGS, "a table of lists of flags") | ABSENT,
}  # fmt: skip

NOTHING_TOLD = Told()


@dataclass(frozen=True)
class Scaling:
    """The scale of a module: `scale` is None where nobody says it, `alpha` where it is not made of
    one. `origin` says where it is from: "config", "alpha tensor", "option", …"""

    alpha: float | None = None
    scale: float | None = None
    origin: str = ""


def scaling(
    told: Told,
    rank: float,
    *,
    alpha: float | None = None,
    scale: float | None = None,
    origin: str = "config",
    where: str = "",
) -> Scaling:
    """The scale of a module that the file gives as `alpha` or `scale`, or does not give.

    `rank` is what alpha is divided by. Raises AdapterError where the user says something else than
    the file, which `where` and `origin` name.
    """
    if alpha is not None and scale is None:
        scale = alpha / rank
    said = told.scale if told.alpha is None else told.alpha / rank
    if said is None:
        return Scaling(alpha, scale, origin if scale is not None else "")
    if scale is not None and not math.isclose(scale, said, rel_tol=1e-6) and not told.override:
        option = f"--scale {told.scale:g}" if told.alpha is None else f"--alpha {told.alpha:g}"
        raise AdapterError(
            f"{where}: {option} makes its scale {said:g}, and the {origin} of the adapter says "
            f"{scale:g}" + (f" (alpha {alpha:g})." if alpha is not None else "."),
            "Omit the option, or add --override if the adapter is wrong.",
        )
    return Scaling(told.alpha, said, FROM_USER)


def refuse_contradictions(
    told: Told, what: str, product: Product, ranks: Mapping[str, int]
) -> None:
    """Raise AdapterError where the user says otherwise what files of one kind settle.

    `what` names the kind ("factors of MLX"), `product` is how theirs always multiply, and `ranks`
    are those of the modules, by path. Such files hold additive factors of whole layers.
    """
    other = next((path for path, rank in ranks.items() if told.rank not in (None, rank)), None)
    wrong = {
        f"--product {told.product}": told.product not in (None, product),
        "--kind multiplicative": told.kind == "multiplicative",
        "--enable-lora": bool(told.enable_lora),
        "--fan-in-fan-out": bool(told.fan_in_fan_out),
    }
    option = next((option for option, is_said in wrong.items() if is_said), None)
    if option is not None:
        raise AdapterError(f"{option}: {what} are read in one way, which is not this one.", _OMIT)
    if other is not None:
        raise AdapterError(
            f"--adapter-rank {told.rank}: the factors of {other} have rank {ranks[other]}.", _OMIT
        )


_OMIT = "Omit the option, or say with --from which dialect the file is of."
