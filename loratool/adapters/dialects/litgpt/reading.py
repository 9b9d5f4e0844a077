"""Modules of litgpt's file by the Hub's names: q, k, v taken apart, or in one where they are."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations

from loratool.adapters.adapter import Adapter
from loratool.adapters.dialects.litgpt.config import LitConfig
from loratool.adapters.dialects.litgpt.families import LLAMA, Family
from loratool.adapters.dialects.litgpt.fused import fused_b, qkv_parts
from loratool.adapters.dialects.troubles import refuse_halves, refuse_modules
from loratool.adapters.factors import LowRank
from loratool.adapters.told import scaling
from loratool.errors import AdapterError
from loratool.models.heads import Heads
from loratool.storage.composed import joined
from loratool.storage.tensors import TensorInfo

#: A key of the file, whose tensors may lie in a table of their own.
KEY = re.compile(
    r"(model\.)?(?P<path>transformer\.h\.(?P<layer>\d+)\.(?P<module>[\w.]+)|lm_head)"
    r"\.lora_(?P<half>[AB])"
)
#: Names that only litgpt's layers have.
OWN = re.compile(
    r"(model\.)?transformer\.h\.\d+\.(attn\.(qkv|attn|proj)|mlp\.(experts\.\d+\.)?(fc|fc_1|fc_2|"
    r"proj|gate))\.lora_[AB]"
)
_QKV = "attn.qkv"
#: What qkv was called before, in weights with q, k and v of each group of heads together; and in
#: lit-llama, which litgpt was made of.
_OLD = {"attn.attn": "an older litgpt", "attn.c_attn": "lit-llama"}


@dataclass
class _Troubles:
    ranks: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    old: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class Reader:
    """Fills an adapter; `family` and `heads` are None where nothing tells them."""

    adapter: Adapter
    config: LitConfig
    family: Family | None
    heads: Heads | None

    def read(self) -> None:
        found = self._sorted()
        halves, troubles = {}, _Troubles()
        waiting: dict[str, list[tuple[str, TensorInfo, TensorInfo]]] = defaultdict(list)
        for path, (layer, module, parts) in found.items():
            if len(parts) < 2:
                halves[path] = [f"lora_{half}" for half in parts]
                continue
            a, b = parts["A"], parts["B"]
            if module in _OLD:
                troubles.old[module].append(path)
            elif module == _QKV:
                self._qkv(path, layer, a, b, troubles)
            else:
                self._plain(path, layer, module, a, b, troubles, waiting)
        self._halves_of_one(waiting, halves)
        self._refuse(halves, troubles)

    def _sorted(self) -> dict[str, tuple[str, str, dict[str, TensorInfo]]]:
        """Layer, module and factors by litgpt's path; other tensors are unknown."""
        found: dict[str, tuple[str, str, dict[str, TensorInfo]]] = {}
        for key, info in self.adapter.tensors.items():
            match = KEY.fullmatch(key)
            if match is None:
                self.adapter.unknown.append(key)
                continue
            own = found.setdefault(match["path"], (match["layer"], match["module"] or "", {}))
            if own[2].setdefault(match["half"], info) is not info:
                self.adapter.unknown.append(key)
        return found

    def _plain(
        self,
        path: str,
        layer: str,
        module: str,
        a: TensorInfo,
        b: TensorInfo,
        troubles: _Troubles,
        waiting: dict[str, list[tuple[str, TensorInfo, TensorInfo]]],
    ) -> None:
        family = self.family or LLAMA
        half = (family.halves or {}).get(module)
        if half:
            waiting[family.path(layer, half)].append((module, a, b))
            return
        name = family.head if path == "lm_head" else family.named(layer, module)
        if name is None:
            self.adapter.unknown += [a.name, b.name]
            return
        self._check_rank(name, a.shape[0] if a.shape else 0, troubles)
        self._put(name, a, b)

    def _halves_of_one(
        self,
        waiting: dict[str, list[tuple[str, TensorInfo, TensorInfo]]],
        halves: dict[str, list[str]],
    ) -> None:
        """Pairs of two modules that are one above the other on the Hub, as blocks on a diagonal."""
        for name, found in waiting.items():
            (one, a, b), *rest = sorted(found, key=lambda each: each[0])
            if not rest or (a.shape, a.dtype) != (rest[0][1].shape, rest[0][1].dtype):
                halves[name] = [module for module, _, _ in found]
                continue
            _, other_a, other_b = rest[0]
            if (b.shape, b.dtype) != (other_b.shape, other_b.dtype) or len(a.shape) != 2:
                halves[name] = [one]
                continue
            self._put(
                name,
                joined(a.name, (2 * a.shape[0], a.shape[1]), [a, other_a]),
                joined(b.name, (2 * b.shape[0], *b.shape[1:]), [b, other_b]),
                blocks=2,
            )

    def _qkv(
        self, path: str, layer: str, a: TensorInfo, b: TensorInfo, troubles: _Troubles
    ) -> None:
        family, heads = self.family or LLAMA, self.heads
        rank = b.shape[1] if len(b.shape) == 2 else 0
        if not rank or len(a.shape) != 2 or a.shape[0] % rank or a.shape[0] > 3 * rank:
            troubles.parts.append(f"{path}: A {list(a.shape)}, B {list(b.shape)}")
            return
        self._check_rank(path, rank, troubles)
        if heads is None:
            troubles.parts.append(f"{path}: no config says how many heads there are")
            return
        enabled = self._enabled(path, a.shape[0] // rank, b.shape[0], heads)
        if isinstance(enabled, str):
            troubles.parts.append(f"{path}: {enabled}")
        elif family.order == "apart":
            for number, own_a, own_b in qkv_parts(a, b, enabled, heads):
                self._put(family.path(layer, family.qkv[number]), own_a, own_b)
        else:
            whole = fused_b(b, enabled, heads, family.order == "grouped")
            self._put(family.path(layer, family.qkv[0]), a, whole, parts=sum(enabled))

    def _enabled(self, path: str, count: int, rows: int, heads: Heads) -> tuple[bool, ...] | str:
        """Which of q, k and v the factors are of, or in words why that cannot be said."""
        told = self.adapter.told
        said = next(
            (parts for end, parts in told.enable_lora.items() if f".{path}".endswith(f".{end}")),
            None,
        )
        own = self.config.enabled
        if said is not None and own not in (None, said) and not told.override:
            raise AdapterError(
                f"{path}: --enable-lora says {_flags(said)}, and hyperparameters.yaml "
                f"{_flags(own or ())}.",
                "Omit the option, or add --override if the file is wrong.",
            )
        enabled = said or own
        if enabled is None:
            fitting = [
                tuple(number in chosen for number in range(3))
                for chosen in combinations(range(3), count)
                if sum(heads.rows[number] for number in chosen) == rows
            ]
            if len(fitting) > 1:
                return f"it could be {' or '.join(map(_flags, fitting))} of q, k, v"
            enabled = fitting[0] if fitting else (False,)
        wanted = sum(size for size, is_on in zip(heads.rows, enabled, strict=False) if is_on)
        if len(enabled) != 3 or sum(enabled) != count or wanted != rows:
            sizes = ", ".join(map(str, heads.rows))
            return f"{count} parts in {rows} rows of B, and q, k, v have {sizes}"
        return enabled

    def _put(
        self, name: str, a: TensorInfo, b: TensorInfo, blocks: int = 1, parts: int = 1
    ) -> None:
        """A module whose A is that of `parts` or `blocks` modules of litgpt's, one above the other,
        so that its own rank is a multiple of theirs."""
        times = max(blocks, parts)
        own = (a.shape[0] if a.shape else 0) / times
        said = scaling(
            self.adapter.told, own or 1, alpha=self.config.alpha, origin="hyperparameters.yaml",
            where=name,
        )  # fmt: skip
        if name in self.adapter.modules:
            self.adapter.unknown += [a.name, b.name]
            return
        alpha = said.alpha * times if said.alpha is not None else None
        self.adapter.modules[name] = LowRank(
            name, "linear", a, b, alpha, said.scale, blocks_b=blocks, scale_from=said.origin
        )

    def _check_rank(self, path: str, rank: int, troubles: _Troubles) -> None:
        said, told = self.config.run.get("lora_r"), self.adapter.told
        if rank and told.rank not in (None, rank):
            raise AdapterError(
                f"--adapter-rank {told.rank}: the factors of {path} have rank {rank}.",
                "Omit the option.",
            )
        if rank and said not in (None, 0, rank):
            troubles.ranks.append(f"{path}: lora_r is {said}, the factors have {rank}")

    def _refuse(self, halves: dict[str, list[str]], troubles: _Troubles) -> None:
        refuse_halves(self.adapter, halves, "lora_A and lora_B")
        refuse_modules(
            self.adapter, "rank-mismatch", "has another rank than hyperparameters.yaml gives",
            troubles.ranks,
        )  # fmt: skip
        refuse_modules(
            self.adapter, "fused-parts",
            "has factors of q, k and v in one, which cannot be taken apart. Put model_config.yaml "
            "and hyperparameters.yaml beside the file, or say --base and --enable-lora qkv=1,0,1",
            troubles.parts,
        )  # fmt: skip
        for module, paths in troubles.old.items():
            refuse_modules(
                self.adapter, "fused-parts",
                f"is called {module}, as by {_OLD[module]}, whose weights have q, k and v in "
                "another order, which litgpt itself no longer reads", paths,
            )  # fmt: skip


def _flags(parts: tuple[bool, ...]) -> str:
    return ",".join(str(int(part)) for part in parts)
