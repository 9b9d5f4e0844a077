"""What of an adapter the rules of programs ask: ranks, scales, patterns, what is beside factors.

The programs read PEFT's config themselves, so its keys are read here as they stand in the file. Of
an adapter in another dialect the same is said of what PEFT's config of it would be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loratool.adapters.adapter import Adapter
from loratool.adapters.factors import Factors
from loratool.errors import FileError
from loratool.models.layouts.names import LANGUAGE_HEAD, TOKEN_EMBEDDING
from loratool.notices import Notice
from loratool.paths import numbers_of, pattern
from loratool.words import counted, enumerated

_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)", re.IGNORECASE)
#: Heads that vLLM takes whole, and that others skip.
_CLASSIFIERS = re.compile(r"(^|\.)(classifier|score)(\.|$)")
#: A layer of one expert of several.
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
#: What the factors of PEFT are called in a file.
_FACTOR = re.compile(r"\.(lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B)$")
#: Refusals that a user lifts by saying alpha, or by naming the base.
UNTOLD = {"no-alpha", "no-config"}
WITHOUT_BASE = {"row-order", "needs-base"}
#: Refusals of a merge that a program may not share; the rules say what it does.
_OF_CONFIG = {
    "layer-replication", "alora-invocation-tokens", "use-qalora", "base-changing-init",
}  # fmt: skip


@dataclass(frozen=True)
class Traits:
    """An adapter, asked as the rules ask."""

    adapter: Adapter

    @property
    def label(self) -> str:
        return self.adapter.label

    @property
    def is_peft(self) -> bool:
        return self.adapter.format == "peft"

    @cached_property
    def config(self) -> dict[str, Any]:
        """PEFT's config; {} in another dialect."""
        return self.adapter.config if self.is_peft else {}

    @property
    def kind(self) -> str:
        """PEFT's name of the kind of adapter."""
        return str(self.adapter.peft_type or "LORA").upper()

    @property
    def has_wrapped_names(self) -> bool:
        """Whether names hold more than PEFT's prefix and a path of the model."""
        return self.is_peft and any(n.code == "names-unwrapped" for n in self.adapter.notices)

    @property
    def entry(self) -> str:
        return self.adapter.weights.name

    # ------------------------------------------------------------------- ranks and scales

    @cached_property
    def factors(self) -> list[Factors]:
        return list(self.adapter.modules.values())

    @cached_property
    def ranks(self) -> list[int]:
        """The ranks that modules have, the smallest first."""
        return sorted({module.rank for module in self.factors})

    @cached_property
    def largest_rank(self) -> int:
        """The largest that a module has or the config names."""
        by_name = self.config.get("rank_pattern")
        # Configs of other kinds than LoRA may hold anything there; AdaLoRA's has lists.
        named = [
            int(_number(rank, 1))
            for rank in (by_name.values() if isinstance(by_name, dict) else ())
        ]
        return max(self.rank, *self.ranks, *named, 1)

    @cached_property
    def rank(self) -> int:
        """r of the config."""
        if not self.config:
            return max(self.ranks, default=1)
        return max(1, int(_number(self.config.get("r"), 8)))

    @cached_property
    def alpha(self) -> float:
        """lora_alpha of the config."""
        if self.config:
            return _number(self.config.get("lora_alpha"), 8)
        found = [m.scale * m.rank for m in self.factors if m.scale is not None]
        return max(set(found), key=found.count, default=1.0)

    @property
    def is_alpha_whole(self) -> bool:
        return math.isfinite(self.alpha) and self.alpha == int(self.alpha)

    @property
    def root_or_rank(self) -> float:
        """What programs that know rsLoRA divide alpha by."""
        return math.sqrt(self.rank) if self.config.get("use_rslora") else float(self.rank)

    @cached_property
    def has_alpha_pattern(self) -> bool:
        if self.config:
            return bool(self.config.get("alpha_pattern"))
        scales = [m.scale * m.rank for m in self.factors if m.scale is not None]
        return any(not math.isclose(scale, self.alpha) for scale in scales)

    def wrong_scales(self, served: Callable[[Factors], float]) -> str:
        """How the scale that a program takes differs from the adapter's own; "" where it does
        not."""
        wrong = [
            (module, given)
            for module in self.factors
            if module.scale is not None
            and module.rank
            and not math.isclose(given := served(module), module.scale, rel_tol=1e-6)
        ]
        if not wrong:
            return ""
        first, given = wrong[0]
        return (
            f"{counted(len(wrong), 'module', 'is')} given another scale: {first.path} "
            f"{given:.4g} instead of {first.scale:.4g}"
        )

    def unequal_ranks(self, padded: Callable[[int], int]) -> list[str]:
        """Kinds of modules whose ranks differ from layer to layer after padding."""
        by_kind: dict[str, set[int]] = {}
        for path, module in self.adapter.modules.items():
            by_kind.setdefault(pattern(path), set()).add(padded(module.rank))
        return [_leaf(kind) for kind, ranks in by_kind.items() if len(ranks) > 1]

    # ------------------------------------------------------------------- which modules

    def on(self, kind: str) -> list[str]:
        """Paths of the modules of a kind of layer."""
        return [module.path for module in self.factors if module.kind == kind]

    @property
    def head_factors(self) -> list[str]:
        return [p for p in self.adapter.modules if LANGUAGE_HEAD.search(f"{p}.weight")]

    @property
    def one_expert_each(self) -> list[str]:
        return [path for path in self.adapter.modules if _ONE_EXPERT.search(f".{path}.")]

    @cached_property
    def layers_by_kind(self) -> dict[str, set[int]]:
        """The layers in which there are modules of a kind, by its path without numbers."""
        seen: dict[str, set[int]] = {}
        for path in self.adapter.modules:
            if numbers := numbers_of(path):
                seen.setdefault(pattern(path), set()).add(numbers[0])
        return seen

    def gaps(self, layers: int | None) -> list[str]:
        """Kinds of modules that some layers lack; of `layers`, or of all that have any."""
        seen = self.layers_by_kind
        whole = set(range(layers)) if layers else set().union(*seen.values())
        return sorted({_leaf(kind) for kind, found in seen.items() if whole - found})

    # ------------------------------------------------------------------- beside the factors

    @cached_property
    def saved(self) -> dict[str, list[str]]:
        """Tensors that replace one of the base's, by group: "heads" that classify, "tokens" (with a
        row for each), "norms", "biases", "beside" (in a file of their own), "others"."""
        groups: dict[str, list[str]] = {}
        for name, info in self.adapter.replaced.items():
            groups.setdefault(self._group(name, info.file), []).append(name)
        named = [str(unit) for unit in self.adapter.declared.saved_modules] if self.config else []
        for unit in named:  # the config counts too, whatever the file holds
            if not any(f".{unit}." in f".{n}" for found in groups.values() for n in found):
                groups.setdefault(self._group(f"{unit}.weight", None), []).append(unit)
        return groups

    def _group(self, name: str, file: object) -> str:
        module = name.rpartition(".")[0]
        if file is not None and file in self.adapter.companions:
            return "beside"
        if _CLASSIFIERS.search(module):
            return "heads"
        if TOKEN_EMBEDDING.search(name) or LANGUAGE_HEAD.search(name):
            return "tokens"
        if _NORM.search(module.rpartition(".")[2]):
            return "norms"
        return "biases" if name.endswith(".bias") else "others"

    def held(self, *groups: str) -> str:
        """The tensors of these groups, named and counted; "" where there are none."""
        found = [name for group in groups for name in self.saved.get(group, [])]
        return f"{counted(len(found), 'tensor')} saved whole ({enumerated(found, 2)})" * bool(found)

    @property
    def token_rows(self) -> list[str]:
        trained = self.config.get("trainable_token_indices")
        return list(self.adapter.token_rows) or ["trainable_token_indices"] * bool(trained)

    @cached_property
    def added_tokens(self) -> list[int]:
        """Ids in added_tokens.json beside the weights."""
        folder = self.adapter.folder
        if not self.is_peft or not folder.has("added_tokens.json"):
            return []
        found: dict[str, Any] = {}
        with suppress(FileError):  # a damaged one is no reason to say nothing else
            found = folder.json("added_tokens.json")
        return [n for n in found.values() if type(n) is int]

    # ------------------------------------------------------------------- variants

    @property
    def has_dora(self) -> bool:
        found = any(module.magnitude is not None for module in self.factors)
        return found or bool(self.config.get("use_dora"))

    @property
    def has_factor_bias(self) -> bool:
        found = any(module.bias is not None for module in self.factors)
        return found or bool(self.config.get("lora_bias"))

    @property
    def trains_biases(self) -> str:
        """`bias` of the config, or what the file holds of it; "" for none."""
        said = self.config.get("bias") or "none"
        return str(said) if said != "none" else "all" if self.saved.get("biases") else ""

    def sets(self, field: str) -> bool:
        return bool(self.config.get(field))

    @property
    def init(self) -> str:
        """The name of the initialisation, in small letters; "" where it has none."""
        found = self.config.get("init_lora_weights")
        return found.lower() if isinstance(found, str) else ""

    @property
    def changed_base(self) -> str:
        return self.adapter.declared.changed_base

    @property
    def targets(self) -> str | list[str] | None:
        found = self.config.get("target_modules")
        return found if isinstance(found, str | list) else None

    @property
    def odd_kinds(self) -> list[str]:
        """Kinds of layers beside linear ones, embeddings and experts."""
        known = ("linear", "embedding", "experts")
        return sorted({module.kind for module in self.factors if module.kind not in known})

    @property
    def algorithms(self) -> list[str]:
        """How modules are changed that are no LoRA."""
        found = {module.algorithm for module in self.factors} - {"LoRA", "DoRA"}
        return sorted(found | {f.algorithm for f in self.adapter.functions.values()})

    @property
    def odd_names(self) -> list[str]:
        """Factors in the file under other names than PEFT saves them by."""
        if not self.is_peft:
            return []
        names = [t.name for module in self.factors for t in module.parts.values()]
        return [name for name in names if "lora_" in name and not _FACTOR.search(name)]

    @property
    def damage(self) -> Notice | None:
        """What makes the file itself impossible to use whole, by its reader."""
        whole = _OF_CONFIG | WITHOUT_BASE
        found = [n for n in self.adapter.notices if n.refused and n.code not in whole]
        return found[0] if found else None


def _number(value: object, default: float) -> float:
    """A number of a config; configs of other kinds than LoRA may hold anything there."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else default


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]
