"""Several adapters side by side: which module each of them adapts, and whether they fit together.

Made from headers; data is read when a part's factors are asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np

from loratool.adapters.adapter import Adapter, TokenRows
from loratool.adapters.effect import check_ranges, note_scales
from loratool.adapters.factors import Factors
from loratool.adapters.weighting import Weight
from loratool.combining.stacks import Unstacked, refuse_stacks
from loratool.dtypes import FLOAT_FORMATS
from loratool.errors import AdapterError, MatchError, ValueRangeError, listed
from loratool.linalg.chance import SINGLE
from loratool.linalg.methods import Term
from loratool.notices import Notice
from loratool.storage.tensors import FilePool, TensorInfo
from loratool.storage.values import count_not_finite
from loratool.words import counted


@dataclass(frozen=True)
class Contribution:
    """What one adapter, by its place in the command, adds to a module: `weight·scale·B·A`."""

    index: int
    weight: float
    module: Factors

    @property
    def scale(self) -> float:
        """α/r, or α/√r, or twice that (see `Factors`)."""
        assert self.module.scale is not None  # without a config the adapter was refused
        return self.module.scale

    @property
    def doubling(self) -> int:
        """2 for the output projection of an attention module, whose delta counts twice in every
        adapter, also in the one to be written; 1 otherwise."""
        return 2 if self.module.kind == "attention-out" else 1

    def read(self, files: FilePool) -> Term:
        """The factors, and the scale they would be written with: without the doubling.

        Raises ValueRangeError for NaN and infinity.
        """
        pair = self.module.left_right(files)
        if pair is None:
            raise AdapterError(
                f"{self.module.path}: its {self.module.algorithm} is no product of two factors "
                "that are smaller than the weight.",
                "`loratool merge BASE ADAPTER ADAPTER` merges it together with others.",
            )
        b, a = pair
        if not (np.isfinite(b).all() and np.isfinite(a).all()):
            broken = {info: count_not_finite(info, files) for info in self.module.parts.values()}
            info, count = next((info, count) for info, count in broken.items() if count)
            raise ValueRangeError(
                f"{info.file}: {info.name} holds NaN or infinity ({count} of {info.numel} values).",
                "Training diverged or the file is damaged; use an earlier checkpoint.",
            )
        rounding = max(FLOAT_FORMATS[self.module.dtype].rounding, SINGLE)
        return Term(self.index, self.weight, self.scale / self.doubling, b, a, rounding)


@contextmanager
def explained_overflow(path: str) -> Iterator[None]:
    """Turn what LAPACK says about infinite values into words."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    except np.linalg.LinAlgError:
        raise ValueRangeError(
            f"{path}: the values are too large to compute with.",
            "Look at the factors with `loratool inspect`, and at the weights.",
        ) from None


@dataclass(frozen=True)
class Saved:
    """A tensor that is replaced whole: the weighted mean of these, of which there is mostly one."""

    name: str
    sources: tuple[tuple[float, TensorInfo], ...]


@dataclass
class Joined:
    """Adapters by module path. `saved` and `token_rows` are what the result replaces whole."""

    adapters: list[Adapter]
    weights: list[Weight]
    modules: dict[str, list[Contribution]] = field(default_factory=dict)
    saved: dict[str, Saved] = field(default_factory=dict)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)
    #: Files that go along as they are, by name: trained weights that lie beside the factors.
    companions: dict[str, Path] = field(default_factory=dict)
    notices: list[Notice] = field(default_factory=list)

    @property
    def used(self) -> list[Adapter]:
        """The adapters whose weight is not zero."""
        return [a for a, w in zip(self.adapters, self.weights, strict=True) if w]

    @property
    def biased(self) -> bool:
        """Whether any module has a bias of its own (lora_bias)."""
        return any(p.module.bias for parts in self.modules.values() for p in parts)


def refuse_unusable(adapter: Adapter, verb: str) -> None:
    """Raise AdapterError for what stands in the way of any arithmetic with an adapter."""
    reasons = [n for n in adapter.notices if n.refused]
    if adapter.declared.changed_base and not reasons:
        raise AdapterError(
            f"{adapter.label}: this adapter cannot be {verb}. Its initialisation "
            f"({adapter.declared.changed_base}) also changed the base weights, so its factors are "
            "not what training changed.",
            "Convert it with PEFT first: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...). Or merge it into its base.",
        )
    if reasons:
        raise AdapterError(
            f"{adapter.label}: this adapter cannot be {verb}.\n"
            + "\n".join(f"  [{n.code}] {n.message}" for n in reasons),
            "`loratool inspect` shows what is in it.",
        )
    if adapter.functions:
        words = sorted({function.algorithm for function in adapter.functions.values()})
        paths = {function.path for function in adapter.functions.values()}
        raise AdapterError(
            f"{adapter.label}: {' and '.join(words)} cannot be {verb}: "
            f"{counted(len(paths), 'module', 'makes')} a new weight of the base's own, "
            "so their change is not B·A and depends on the base.",
            "`loratool merge BASE ADAPTER` merges it; `loratool extract` makes a LoRA of that.",
        )
    if not adapter.modules:
        raise AdapterError(
            f"{adapter.label}: the adapter has no low-rank modules to be {verb}.",
            "`loratool inspect` shows what is in it.",
        )


def join(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    verb: str,
    with_dora: bool = False,
    with_stacks: bool = False,
) -> Joined:
    """Put adapters side by side; those with weight 0 are left out.

    Raises AdapterError for an adapter that has no such arithmetic (DoRA, unless `with_dora`, and
    stacks of experts, unless `with_stacks`), and MatchError where adapters give one module
    different shapes.
    """
    joined = Joined(list(adapters), list(weights))
    unstacked = Unstacked()
    for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        refuse_unusable(adapter, verb)
        if not weight:
            text = f"{adapter.label} has weight 0 and is left out, with all it holds."
            joined.notices.append(Notice("zero-weight", text, adapter.label))
            continue
        if not with_dora:
            _refuse_dora(adapter, verb)
        if not with_stacks:
            refuse_stacks(adapter, verb)
        # Whether square weights are stored [in, out] does not matter among adapters.
        joined.notices += [n for n in adapter.notices if n.code != "square-conv1d"]
        check_ranges(adapter, weight)
        joined.notices += note_scales(adapter, weight)
        for path, module in unstacked.modules(adapter):
            joined.modules.setdefault(path, []).append(Contribution(index, weight.at(path), module))
    _refuse_unlike_modules(joined)
    _compare_names(joined)
    return joined


def _refuse_dora(adapter: Adapter, verb: str) -> None:
    dora = [path for path, m in adapter.modules.items() if not m.adds]
    if dora:
        raise AdapterError(
            f"{adapter.label}: DoRA cannot be {verb}: {counted(len(dora), 'module', 'scales')} the "
            "base's own weights, so their change is not B·A and depends on the base.",
            "`loratool merge BASE ADAPTER ADAPTER` merges it together with others.",
        )


def _form(module: Factors) -> tuple[object, ...]:
    return module.kind, module.shape, module.outline.inner[1:]


def _refuse_unlike_modules(joined: Joined) -> None:
    unlike = [
        f"{path}: " + ", ".join(_words(joined, part) for part in parts)
        for path, parts in joined.modules.items()
        if len({_form(part.module) for part in parts}) > 1
    ]
    if unlike:
        raise MatchError(
            f"{counted(len(unlike), 'module', 'has')} different shapes, so these adapters are for "
            f"different base models:\n{listed(unlike)}",
            "Combine and compare adapters of one base model.",
        )


def _words(joined: Joined, part: Contribution) -> str:
    out, width = part.module.shape
    return f"{out}×{width} ({part.module.kind}) in {joined.adapters[part.index].name}"


def _compare_names(joined: Joined) -> None:
    """Adapters that share no module, and base models that are not called the same."""
    for number, one in enumerate(joined.used):
        others = joined.used[:number]
        if not others or any(one.modules.keys() & other.modules.keys() for other in others):
            continue
        for other in others:
            for short, long in ((one, other), (other, one)):
                prefix = _prefix(list(short.modules), long.modules.keys())
                if prefix:
                    path = next(iter(short.modules))
                    raise MatchError(
                        f"{short.label} calls a module {path!r} that {long.label} calls "
                        f"'{prefix}{path}': they were trained on different classes of the model.",
                        "Give both adapters the same names first.",
                    )
        text = (
            f"{one.label} shares no module with the adapters before it: it has "
            f"{next(iter(one.modules))}, they have {next(iter(others[0].modules))}. Is it for "
            "another architecture?"
        )
        joined.notices.append(Notice("nothing-shared", text, one.label))
    tasks = {str(a.declared.task) for a in joined.used}
    if len(tasks) > 1:
        text = f"The adapters are for different tasks ({', '.join(sorted(tasks))}): none is noted."
        joined.notices.append(Notice("tasks-differ", text))
    names = {_base_name(a) for a in joined.used} - {""}
    if len({PurePath(name).name.lower() for name in names}) > 1:
        text = (
            f"The adapters name different base models: {', '.join(sorted(names))}. Their shapes "
            "agree, but on another base than its own an adapter means little."
        )
        joined.notices.append(Notice("bases-differ", text))


def _base_name(adapter: Adapter) -> str:
    name, revision = adapter.declared.base_name, adapter.declared.base_revision
    return f"{name}@{revision}" if name and revision else str(name or "")


def _prefix(short: Sequence[str], long: Set[str]) -> str:
    """What most of the paths in `short` lack of one in `long`; "" if there is no such thing."""
    found = Counter(
        path.removesuffix(name) for name in short for path in long if path.endswith(f".{name}")
    )
    prefix, count = found.most_common(1)[0] if found else ("", 0)
    return prefix if 2 * count > len(short) else ""
