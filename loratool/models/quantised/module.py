"""The tensors that may be the parts of one quantised weight, by role, and what config.json says.

A format names its tensors after the weight or after the module. `gathered` sorts the tensors of a
checkpoint by the weight that they would be parts of; which of them really are, the formats say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NoReturn

from loratool.errors import BaseError, FileError
from loratool.models.checkpoint import Checkpoint
from loratool.models.layouts.names import CONV1D
from loratool.models.quantised.scheme import Scheme
from loratool.storage.jsonfile import parse_json
from loratool.storage.tensors import TensorInfo, blocks

#: The longest description in a tensor that is read (bitsandbytes' is about 200 bytes).
LONGEST_DESCRIPTION = 1 << 16

#: What to do where weights cannot be read.
UNQUANTISED = "Merge into the unquantised model it was made from, then quantise the result."

#: How many ranges are read at a time.
_STREAMS = 8

#: Numbers for activations and for the cache of keys and values, which a program with plain weights
#: has no use for. They hang on a quantised module, or on the attention that it is in.
ACTIVATIONS = frozenset(
    f"{of}_{what}"
    for of in ("input", "output", "activation", "act", "q", "k", "v", "kv", "prob_output")
    for what in ("scale", "zero_point", "global_scale", "scale_ub")
) | {"qscale_act"}


@dataclass(frozen=True, eq=False)
class Quantisation:
    """What a model says of its quantisation: `method` and the whole `table` of it.

    `places` are those in config.json where it says so, each by the keys that lead there;
    `contradiction` is what is said twice and differently, in words.
    """

    method: str = ""
    table: dict[str, Any] = field(default_factory=dict)
    places: tuple[tuple[str, ...], ...] = ()
    contradiction: str = ""

    @property
    def where(self) -> str:
        """The first place, for people; "" where config.json says nothing."""
        return ".".join(self.places[0]) if self.places else ""


@dataclass
class Module:
    """What may be one quantised weight: `tensors` by role, of the weight called `name`.

    `described` are the bytes of those tensors that describe others, by role.
    """

    name: str
    tensors: dict[str, TensorInfo]
    base: Checkpoint
    settings: Quantisation
    described: dict[str, bytes] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The module's path, or the parameter's where it is no `….weight`."""
        return self.name.removesuffix(".weight")

    @property
    def is_conv1d(self) -> bool:
        """Whether its class has the weight as `[in, out]`, which only the name of the class tells:
        quantised it is `[out, in]` like all others."""
        pattern = CONV1D.get(self.base.model_type)
        return pattern is not None and re.search(pattern, self.path) is not None

    def refuse(self, reason: str, hint: str = "") -> NoReturn:
        """Raise BaseError: this module cannot be read."""
        raise BaseError(
            f"{self.base.label}: {self.path}, a quantised weight: {reason}.",
            hint or "The base is incomplete, or not a checkpoint of this format.",
        )

    def want(self, role: str, title: str) -> TensorInfo:
        """A part that must be there."""
        found = self.tensors.get(role)
        if found is None:
            have = ", ".join(sorted(info.name for info in self.tensors.values()))
            self.refuse(f"it is stored in {title} and its {role} is missing (there is {have})")
        return found

    def beside(
        self, parts: dict[str, TensorInfo], telling: Collection[str] = ()
    ) -> tuple[TensorInfo, ...]:
        """What goes with the weight and is no part of its value; `telling` are the roles of those
        that say how it is stored.

        Raises BaseError for anything that would change it.
        """
        others = {role: info for role, info in self.tensors.items() if role not in parts}
        for role, info in others.items():
            if role == "pre_quant_scale":
                self.refuse(
                    f"{info.name} says that it was rescaled for quantisation, so an adapter of the "
                    "original model does not fit it",
                    UNQUANTISED,
                )
            if role not in ACTIVATIONS and role not in telling:
                self.refuse(f"it has {info}, which the other tensors of it leave no meaning for")
        return tuple(others.values())

    def want_shape(self, info: TensorInfo, *shapes: tuple[int, ...]) -> None:
        """Raise BaseError for a part of another shape than one of these."""
        if info.shape not in shapes:
            expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            self.refuse(f"{info.name} is {list(info.shape)}, expected {expected}")

    def want_dtype(self, info: TensorInfo, *dtypes: str) -> None:
        """Raise BaseError for a part of another dtype than one of these."""
        if info.dtype not in dtypes:
            self.refuse(f"{info.name} is {info.dtype}, expected {' or '.join(dtypes)}")


@dataclass(frozen=True)
class Format:
    """One way to store weights.

    `roles` are patterns of whole tensor names, with a template of the weight's name and the role
    that each stands for. `claims` says, from roles, dtypes and settings, whether a module is of
    this format, also a damaged one; `scheme` makes the scheme of a module that is claimed, or
    raises BaseError.
    """

    name: str
    roles: tuple[tuple[re.Pattern[str], str, str], ...]
    claims: Callable[[Module], bool]
    scheme: Callable[[Module], Scheme]
    #: The roles of small tensors that describe others, whose bytes are read beforehand.
    descriptions: tuple[str, ...] = ()


def roles(*rows: tuple[str, str, str]) -> tuple[tuple[re.Pattern[str], str, str], ...]:
    r"""Rows of (pattern of a whole tensor name, template of the weight's name, template of its
    role); groups of the pattern are `\1` and `\2` in these."""

    def formatted(template: str) -> str:
        return re.sub(r"\\(\d)", r"{\1}", template)

    return tuple((re.compile(p), formatted(weight), formatted(role)) for p, weight, role in rows)


#: How names end that say nothing, in any format; nearly all tensors of a plain model are called so.
_NO_PARTS = (".weight", ".bias")

_ACTIVATION_ROLES = roles(
    (rf"(.+)\.({'|'.join(sorted(ACTIVATIONS))})", r"\1.weight", r"\2"),
    (rf"(.+\.\w+_proj)_({'|'.join(sorted(ACTIVATIONS))})", r"\1", r"\2"),
)


def gathered(
    base: Checkpoint, formats: Iterable[Format], settings: Quantisation
) -> dict[str, Module]:
    """The tensors of a model by the weight that they may be a part of.

    A tensor whose name says nothing is in no module, unless another one names it as its weight, or
    it holds floats of 8 bits, which are nothing by themselves.
    """
    rows = list(dict.fromkeys([*_ACTIVATION_ROLES, *(r for form in formats for r in form.roles)]))
    modules: dict[str, Module] = {}
    for name, info in base.tensors.items():
        for pattern, template, role in () if name.endswith(_NO_PARTS) else rows:
            found = pattern.fullmatch(name)
            if found:
                texts = (name, *found.groups())
                weight, part = template.format(*texts), role.format(*texts)
                module = modules.setdefault(weight, Module(weight, {}, base, settings))
                module.tensors[part] = info
                break
        else:
            if info.dtype.startswith(("F8_E4", "F8_E5")):  # its scale may be missing
                modules.setdefault(name, Module(name, {}, base, settings))
    for weight, module in modules.items():
        if weight in base.tensors:
            module.tensors.setdefault("weight", base.tensors[weight])
    return modules


def read_descriptions(modules: Iterable[Module], roles_read: frozenset[str]) -> None:
    """Read the tensors of these roles, and leave their bytes in `Module.described`.

    Over the network they are read by ranges, several at a time, and each stream reads neighbours:
    safetensors files have all whole numbers side by side. Raises BaseError for one that is too
    large for a description.
    """
    wanted: dict[str, list[tuple[Module, str, TensorInfo]]] = {}
    for module in modules:
        for role in roles_read & module.tensors.keys():
            info = module.tensors[role]
            if info.nbytes > LONGEST_DESCRIPTION:
                module.refuse(f"{info} is too large for a description")
            wanted.setdefault(info.file.name, []).append((module, role, info))
    pieces = []
    for file, rows in wanted.items():
        rows.sort(key=lambda row: row[2].start)
        pieces += [
            (file, rows[low:high]) for low, high in blocks(len(rows), -(-len(rows) // _STREAMS))
        ]

    def read(piece: tuple[str, list[tuple[Module, str, TensorInfo]]]) -> None:
        file, rows = piece
        places = [(info.start, info.nbytes) for _, _, info in rows]
        found = rows[0][0].base.folder.ranges(file, places)
        for (module, role, _), data in zip(rows, found, strict=True):
            module.described[role] = data

    with ThreadPoolExecutor(_STREAMS) as pool:
        for _ in pool.map(read, pieces):
            pass


def json_in(module: Module, role: str) -> dict[str, Any]:
    """The JSON object that a tensor of bytes holds. Raises BaseError for anything else."""
    info = module.tensors[role]
    module.want_dtype(info, "U8")
    try:
        found = parse_json(module.described[role], info.name)
    except FileError:
        found = None
    if not isinstance(found, dict):
        module.refuse(f"{info.name} does not hold a JSON object")
    return found
