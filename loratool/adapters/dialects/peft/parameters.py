"""target_parameters: the factors of bare parameters in a PEFT file, and what stands in their way.

A has the rows of one expert after the other, so that the number of experts is that of its rows by
the rank of the config. How B holds them no file of PEFT's says: it is PEFT's way, unless a field
of Unsloth's or the user says otherwise. Source: peft/tuners/lora/layer.py (`ParamWrapper`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.peft.wrappers import Parameter, WrappedPair, Wrappers, packings
from loratool.adapters.experts import ExpertStack
from loratool.adapters.factors import LowRank
from loratool.adapters.told import Packing, Scaling
from loratool.errors import AdapterError
from loratool.notices import Notice
from loratool.storage.fields import value_text
from loratool.storage.filenames import ADAPTER_CONFIG
from loratool.storage.tensors import TensorInfo

#: lora_B_layout of Unsloth's configs, and the same in our words.
_LAYOUTS: dict[str, Packing] = {"rank_major": "rank-major", "grouped_by_expert": "grouped"}

#: Fields that PEFT refuses beside target_parameters: they would change the arithmetic.
_APART = ("fan_in_fan_out", "lora_bias", "use_dora")

#: How much of a card is searched for the name of a program.
_CARD, _LONGEST_CARD = "README.md", 200_000

#: A hundred times as many as any model has; each is work.
_MOST_EXPERTS = 50_000

#: Rank and scale by the config, of a path.
Resolve = Callable[[str], tuple[int, Scaling]]


class _Trouble(Exception):
    """Why factors do not fit the config: a code of a notice, and what of them."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


class BareParameters:
    """Makes modules of the pairs in a file that adapt a bare parameter.

    `troubles` collects, by code, what is wrong with them.
    """

    def __init__(self, adapter: Adapter, pairs: Mapping[str, WrappedPair]) -> None:
        self._adapter, self._pairs = adapter, pairs
        self._wrappers = Wrappers(adapter.config, pairs)
        self._layout = _said(adapter)
        self.troubles: dict[str, list[str]] = defaultdict(list)

    def take(self, path: str, resolve: Resolve) -> bool:
        """Add the factors at a path to the adapter; False where they adapt a layer."""
        parameter = self._wrappers.parameters.get(path)
        unclear = self._wrappers.unclear.get(path)
        if parameter is None and unclear is None:
            return False
        a, b = self._pairs[path]
        modules = self._adapter.modules
        key = parameter.path if parameter else path
        if key in modules:
            self._adapter.unknown += [a.name, b.name]
            return True
        try:
            if parameter is None:
                raise _Trouble("target-parameters", unclear or "")
            self._add(parameter, a, b, resolve)
        except _Trouble as trouble:
            self.troubles[trouble.code].append(f"{key}: {trouble}")
            # What `inspect` can show of it all the same.
            modules[key] = LowRank(key, "experts", a, b, None, None)
        return True

    def _add(self, parameter: Parameter, a: TensorInfo, b: TensorInfo, resolve: Resolve) -> None:
        rank, scaled = resolve(parameter.path)
        experts, packing = _sizes(a.shape, b.shape, rank, self._layout or "rank-major")
        modules = self._adapter.modules
        if parameter.name == "weight" and experts == 1 and len(a.shape) == 2:
            # A layer's weight is that, whether it is targeted as a parameter or not.
            path = parameter.module
            modules[path] = LowRank(
                path, "linear", a, b, scaled.alpha, scaled.scale, scale_from=scaled.origin
            )
            return
        modules[parameter.path] = ExpertStack(
            parameter.module, parameter.name, a, b, experts, rank, scaled.alpha, scaled.scale,
            packing, self._adapter.config.get("peft_version") or "", scaled.origin,
        )  # fmt: skip

    def finish(self) -> None:
        """Look at what all of them are together."""
        stacks = [m for m in self._adapter.modules.values() if isinstance(m, ExpertStack)]
        if not stacks:
            return
        self._adapter.notices += _notices(self._adapter, stacks, bool(self._layout))


def _sizes(a: tuple[int, ...], b: tuple[int, ...], rank: int, flat: Packing) -> tuple[int, Packing]:
    """The number of experts, and how B holds them; `flat` is how it does where it has two axes."""
    shapes = f"A {list(a)}, B {list(b)}"
    if 0 in (*a, *b) or not (2 <= len(a) <= 3 and 2 <= len(b) <= 3):
        raise _Trouble("zero3-placeholder", shapes)
    if len(a) == 3 and a[1] != rank:
        raise _Trouble("rank-mismatch", f"the config gives {rank}, lora_A has {a[1]}")
    if len(a) == 2 and a[0] % rank:
        what = f"the config gives {rank}, of which the {a[0]} rows of lora_A are no multiple"
        raise _Trouble("rank-mismatch", what)
    experts = a[0] if len(a) == 3 else a[0] // rank
    if experts > _MOST_EXPERTS:
        what = f"the config gives {rank}, by which lora_A would be of {experts} experts"
        raise _Trouble("rank-mismatch", what)
    shared = len(a) == 3 and len(b) == 2 and b[1] == rank  # one B for all experts
    if shared or (len(b) == 2 and b[1] == experts * rank):
        return experts, flat
    if len(b) == 3:
        if len(a) == 2 and experts == 1:  # one A for all experts
            experts = b[2] if b[1] == rank else b[0]
        fits = packings((experts, rank, a[-1]), b)
        if len(fits) == 1:
            return experts, fits[0]
    raise _Trouble("pair-mismatch", shapes)


def _said(adapter: Adapter) -> Packing | None:
    """How a flat B holds its experts, as the config or the user says; None where neither does.

    Raises AdapterError where they say different things.
    """
    field = adapter.config.get("lora_B_layout") or ""
    layout, asked = _LAYOUTS.get(field), adapter.told.expert_b_layout
    if layout and asked and layout != asked:
        raise AdapterError(
            f"{adapter.label}: {ADAPTER_CONFIG} says lora_B_layout {value_text(field)}, but "
            f"--expert-b-layout is {asked}.",
            "Omit --expert-b-layout; the program that trained the adapter wrote the field.",
        )
    return layout or asked


def layout_notices(field: str) -> list[Notice]:
    """A refusal of a lora_B_layout that nobody knows."""
    if not field or field in _LAYOUTS:
        return []
    text = f"lora_B_layout is {value_text(field)}; known are {' and '.join(_LAYOUTS)}."
    return [Notice("unknown-expert-layout", text, ADAPTER_CONFIG, refused=True)]


def _notices(adapter: Adapter, stacks: list[ExpertStack], said: bool) -> list[Notice]:
    notices = []
    wrong = [field for field in _APART if adapter.config.get(field)]
    if wrong:
        text = (
            f"{', '.join(wrong)} has no meaning together with target_parameters; PEFT refuses it."
        )
        notices.append(Notice("parameter-options", text, ADAPTER_CONFIG, refused=True))
    flat = any(s.experts > 1 and len(s.b.shape) == 2 and not s.shares[1] for s in stacks)
    if flat and not said and _names_unsloth(adapter):
        text = (
            "The adapter seems to be made with Unsloth, whose versions before unsloth-zoo 2026.9.6 "
            "stored lora_B of experts in another order, which nothing in the files shows. It is "
            "read as PEFT and later versions store it; if it is older, say "
            "--expert-b-layout grouped, else --expert-b-layout rank-major."
        )
        notices.append(Notice("expert-layout", text, stacks[0].weight_name))
    return notices


def _names_unsloth(adapter: Adapter) -> bool:
    """Whether config or card name Unsloth."""
    if "unsloth" in str(adapter.config).lower():
        return True
    if not adapter.folder.has(_CARD):
        return False
    with adapter.folder.reading(_CARD) as (stream, _, _):
        return b"unsloth" in stream.read(_LONGEST_CARD).lower()
