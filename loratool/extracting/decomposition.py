"""The factors of every module of a fine-tune, each module read, taken apart and put away in turn.

Modules are worked on by several threads, the largest first. Where the ranks depend on one another
(a budget for the file, one rank for all), modules that turn out to need more than was computed are
done again with a higher rank.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from loratool.adapters.factorfile import AdapterWriter, factor_bytes, rounding_loss
from loratool.dtypes import DTYPE_BITS
from loratool.errors import UsageError, ValueRangeError
from loratool.extracting.counterparts import Counterpart
from loratool.extracting.difference import Difference, Size
from loratool.linalg.lowrank import NEGLIGIBLE, Float64
from loratool.linalg.ranks import LARGEST_RANK, Criterion, spread
from loratool.linalg.truncation import truncated
from loratool.storage.tensors import Bytes, FilePool
from loratool.storage.values import count_not_finite, same_values
from loratool.streams.workers import Workers
from loratool.words import format_bytes

_NOTHING = Size(0.0, 0.0, False, 0.0)

#: The rank to begin with where none is asked for.
_FIRST = 32

#: The lowest rank that is computed for a budget, of which it may take less.
_LEAST = 8


@dataclass(frozen=True)
class Decomposed:
    """What is known of one counterpart after it has been read.

    `values` are the singular values of the factors that were put away, `following` those known
    beyond. `cut` is ‖Δ - B·A‖² at that rank, and `least` what any factors of that rank have at
    least. `rounding` is what the factors' dtype takes of B·A. With `noise` the change is rounding
    alone, and is to be left out.
    """

    part: Counterpart
    size: Size = _NOTHING
    values: Float64 = field(default_factory=partial(np.zeros, 0))
    following: Float64 = field(default_factory=partial(np.zeros, 0))
    cut: float = 0.0
    least: float = 0.0
    rounding: float | None = None
    passes: int = 0
    noise: bool = False

    @property
    def changed(self) -> bool:
        """Whether there is something to hold."""
        return self.size.changed and not self.noise

    def at(self, rank: int) -> tuple[float, float]:
        """`cut` and `least` for the first `rank` of the factors."""
        more = float((self.values[rank:] ** 2).sum())
        return self.cut + more, self.least + more


def joined_stacks(found: Iterable[Decomposed]) -> list[Decomposed]:
    """The same with one for all matrices of a stack, where the first of them is."""
    units: dict[str, list[Decomposed]] = defaultdict(list)
    for one in found:
        units[one.part.unit].append(one)
    return [_joined(own) if own[0].part.stack else own[0] for own in units.values()]


def _joined(found: list[Decomposed]) -> Decomposed:
    """All matrices of a stack as one: their k-th singular values count together as the k-th."""
    part = replace(found[0].part, name=found[0].part.unit)
    sizes = [f.size for f in found]
    size = Size(
        energy=math.fsum(s.energy for s in sizes), weight=math.fsum(s.weight for s in sizes),
        changed=any(s.changed for s in sizes), noise=math.fsum(s.noise for s in sizes),
    )  # fmt: skip
    alive = [f for f in found if f.changed]
    if not alive:
        return Decomposed(part, size, noise=size.changed)
    values = _together([f.values for f in alive])
    spectrum = _together([np.concatenate([f.values, f.following]) for f in alive])
    # Rounding alone is held by no factors.
    noise = math.fsum(f.size.energy for f in found if f.noise)
    kept = [float((f.values**2).sum()) for f in alive]
    lost = [f.rounding for f in alive if f.rounding is not None]
    rounding = None
    if len(lost) == len(alive) and sum(kept) > 0:
        rounding = math.sqrt(
            math.fsum(k * r**2 for k, r in zip(kept, lost, strict=True)) / sum(kept)
        )
    return Decomposed(
        part, size, values, spectrum[len(values) :], noise + math.fsum(f.cut for f in alive),
        noise + math.fsum(f.least for f in alive), rounding, max(f.passes for f in alive),
    )  # fmt: skip


def _together(values: Sequence[Float64]) -> Float64:
    """Singular values of several matrices, which get their ranks together."""
    squares = np.zeros(max(map(len, values)))
    for own in values:
        squares[: len(own)] += own**2
    return np.sqrt(squares)


@dataclass(frozen=True)
class Policy:
    """How the ranks are chosen: by `criterion`, or such that the file is no larger than `budget`.

    With `uniform` all modules get the same. No rank is above what the widest matrix has.
    `cost(part)` are the bytes of one rank of a module, and `size(parts, ranks)` those of the file;
    of a stack they are given one matrix, and count all.
    """

    criterion: Criterion
    cost: Callable[[Counterpart], int]
    size: Callable[[Sequence[Counterpart], Sequence[int]], int]
    budget: int | None = None
    uniform: bool = False

    def ranks(self, found: Sequence[Decomposed]) -> dict[str, int]:
        """The rank of each module, by unit; it may be higher than what was computed of it.

        All matrices of a stack have one: the highest that one of them needs. Where it depends on
        errors, a rank of a stack counts as one of a module, of all its matrices together.
        """
        units = [one.part.unit for one in found]
        if self.criterion.rank is not None:
            widest = widest_of([f.part for f in found])
            return dict.fromkeys(units, min(self.criterion.rank, widest))
        stacks = joined_stacks(found)
        parts = [f.part for f in stacks]
        if self.budget is not None and self.uniform:
            ranks = [self.even(parts)] * len(parts)
        elif self.budget is not None:
            ranks = self._spread(parts, [f.values for f in stacks], self.budget)
        elif self.uniform and found:
            ranks = [max(len(f.values) for f in found)] * len(parts)
        else:
            ranks = [len(f.values) for f in stacks]
        return dict(zip([part.unit for part in parts], ranks, strict=True))

    def even(self, found: Sequence[Counterpart]) -> int:
        """The one rank for which the budget is enough, up to the largest that a module can have.

        Raises UsageError if it is not enough for one.
        """
        parts = by_unit(found)
        budget, costs = self.budget or 0, sum(self.cost(part) for part in parts)
        if self.size(parts, [1] * len(parts)) > budget:
            raise _too_small(budget, costs, "all modules")
        largest = widest_of(parts)
        rank = min(budget // costs, self.criterion.max_rank or largest, largest)
        while self.size(parts, [rank] * len(parts)) > budget:
            rank -= 1
        return rank

    def _spread(
        self, parts: Sequence[Counterpart], values: Sequence[Float64], budget: int
    ) -> list[int]:
        costs = [self.cost(part) for part in parts]
        rest = budget - (self.size(parts, [1] * len(parts)) - sum(costs))
        while True:
            ranks = spread(values, costs, rest)
            if not any(ranks):
                raise _too_small(budget, min(costs), "the smallest module")
            alive = [(part, rank) for part, rank in zip(parts, ranks, strict=True) if rank]
            over = self.size([p for p, _ in alive], [r for _, r in alive]) - budget
            if over <= 0:
                return ranks
            rest -= over  # larger ranks have more digits in the header


def by_unit(parts: Iterable[Counterpart]) -> list[Counterpart]:
    """One of the matrices of each stack, and all other parts."""
    return list({part.unit: part for part in parts}.values())


def _too_small(budget: int, least: int, what: str) -> UsageError:
    return UsageError(
        f"--budget {format_bytes(budget)} is too small: one rank of {what} takes "
        f"{format_bytes(least)}, beside the header and what is saved whole.",
        "Give more, or leave parts out with --exclude or --skip.",
    )


def widest_of(parts: Sequence[Counterpart]) -> int:
    """The largest rank that one of these modules can have."""
    return max(min(part.outline.shape) for part in parts)


def cost(part: Counterpart, dtype: str) -> int:
    """Bytes of one rank of a module, or of the stack that it is of."""
    elements = sum(outline.experts * sum(outline.shape) for outline in part.filed())
    return elements * DTYPE_BITS[dtype] // 8


@dataclass
class Extraction:
    """Reads counterparts and takes their differences apart. Use within its two pools.

    `advance(bytes, name)` is told of every tensor that is done. With `keep_noise` differences that
    are rounding alone are changes like others.
    """

    files: FilePool
    workers: Workers
    dtype: str
    device: torch.device
    seed: int
    exact: bool
    keep_noise: bool
    advance: Callable[[int, str], None]
    _stop: threading.Event = field(default_factory=threading.Event)

    def measure(self, parts: Iterable[Counterpart]) -> list[Decomposed]:
        """Only how much each of them changed."""
        calls = (partial(self._measured, part) for part in _largest_first(parts))
        measured = []
        with self._stopping():
            for found in self.workers.in_order(calls):
                measured.append(found)
                self.advance(found.part.nbytes, found.part.name)
        return measured

    def decompose(
        self, parts: Sequence[Counterpart], policy: Policy, writer: AdapterWriter
    ) -> tuple[list[Decomposed], dict[str, int]]:
        """Factors for all parts that changed, put into `writer`; and by unit the rank each is to
        have."""
        criterion = policy.criterion
        if policy.budget is not None:
            guess = policy.budget // max(1, sum(policy.cost(part) for part in by_unit(parts)))
            guess = max(guess if policy.uniform else 2 * guess, _LEAST)
            criterion = Criterion(rank=min(guess, criterion.max_rank or LARGEST_RANK))
        found = self._pass([(part, criterion) for part in parts], writer, self.advance)
        while True:
            alive = [f for f in found if f.changed]
            if not alive:
                return found, {}
            ranks = policy.ranks(alive)
            again = []
            for own in alive:
                rank = ranks[own.part.unit]
                # A budget may want more of a module that it takes all of what is known.
                open_ended = policy.budget is not None and not policy.uniform
                short = rank > len(own.values) or (open_ended and rank == len(own.values))
                limit = min(own.part.outline.shape)
                most = min(limit, policy.criterion.max_rank or limit)
                wanted = min(2 * rank if open_ended else rank, most)
                if short and len(own.following) and wanted > len(own.values):
                    again.append((own.part, Criterion(rank=wanted)))
            if not again:
                return found, ranks
            # These are read a second time, which nobody counted on.
            deeper = {f.part.name: f for f in self._pass(again, writer, lambda *_: None)}
            found = [deeper.get(f.part.name, f) for f in found]

    def _pass(
        self,
        work: Sequence[tuple[Counterpart, Criterion]],
        writer: AdapterWriter,
        advance: Callable[[int, str], None],
    ) -> list[Decomposed]:
        criteria = {part.name: criterion for part, criterion in work}
        calls = (
            partial(self._decomposed, part, criteria[part.name])
            for part in _largest_first(part for part, _ in work)
        )
        done = {}
        with self._stopping():
            for found, data in self.workers.in_order(calls):
                outlines = found.part.outlines if found.changed else []
                for outline, own in zip(outlines, data, strict=True):
                    writer.add(outline, len(found.values), own)
                done[found.part.name] = found
                advance(found.part.nbytes, found.part.name)
        return [done[part.name] for part, _ in work]

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """After an error or Ctrl-C the other threads stop at their next block."""
        try:
            yield
        except BaseException:
            self._stop.set()
            raise

    def _measured(self, part: Counterpart) -> Decomposed:
        if part.base is None or not part.is_comparable:
            _refuse_not_finite(part)
            return Decomposed(part, replace(_NOTHING, changed=True))
        if not (part.tuned.is_float and part.base.is_float):
            changed = not same_values(part.base, part.tuned)
            return Decomposed(part, replace(_NOTHING, changed=changed))
        size = self._difference(part).measure()
        return Decomposed(part, size, noise=self._is_noise(size) and part.fate != "left")

    def _is_noise(self, size: Size) -> bool:
        return size.rounding and not self.keep_noise

    def _difference(self, part: Counterpart) -> Difference:
        assert part.base is not None
        return Difference(part.base, part.tuned, self.files, self.device, self._stop)

    def _decomposed(
        self, part: Counterpart, criterion: Criterion
    ) -> tuple[Decomposed, list[Bytes]]:
        try:
            return self._factors(part, criterion)
        except torch.OutOfMemoryError:
            raise UsageError(
                f"{part.name} {list(part.tuned.shape)}: the memory of {self.device} is full.",
                "Use --threads 1, a lower rank, or --device cpu.",
            ) from None

    def _factors(self, part: Counterpart, criterion: Criterion) -> tuple[Decomposed, list[Bytes]]:
        difference = self._difference(part)
        size = difference.measure(hold=True)
        if not size.changed or self._is_noise(size):
            return Decomposed(part, size, noise=self._is_noise(size)), []
        result = truncated(
            difference, size.energy, partial(_choose, criterion),
            criterion.rank or criterion.max_rank, zlib.crc32(f"{self.seed} {part.name}".encode()),
            self.exact, criterion.rank or min(_FIRST, criterion.max_rank or _FIRST),
        )  # fmt: skip
        left, right = result.left.cpu().numpy(), result.right.cpu().numpy()
        b, a = (right, left.T) if part.place.transposed else (left, right.T)
        data = [factor_bytes(part.outline.path, b, a, self.dtype)]
        if part.twin:
            data.append(factor_bytes(part.twin, a.T, b.T, self.dtype))
        lost = None if self.dtype == "F32" else rounding_loss(b, a, data[0], self.dtype)
        following = result.following[result.following > NEGLIGIBLE * result.values[0]]
        return Decomposed(
            part, size, result.values, following, result.cut, result.least, lost, result.passes
        ), data


def as_device(name: str) -> torch.device:
    """The device of this name. Raises UsageError if torch has none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"There is no device {name!r}.", "Use cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"Nothing is computed on {device.type}.", "Use cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"torch finds no GPU for --device {name}.",
            "Install a torch with CUDA, or leave the option out.",
        )
    if device.type == "cuda":
        # Its linear algebra is set up at the first call, which several threads must not do at once.
        torch.linalg.eigh(torch.linalg.qr(torch.eye(2, device=device, dtype=torch.float64))[0])
    return device


def _choose(criterion: Criterion, values: Float64, energy: float) -> int:
    """The rank among these singular values, of which rounding left the smallest."""
    return criterion.choose(values[values > NEGLIGIBLE * values[0]], energy)


def _largest_first(parts: Iterable[Counterpart]) -> list[Counterpart]:
    """So that no thread is left alone with the largest matrix at the end."""
    return sorted(parts, key=lambda part: -part.tuned.numel)


def _refuse_not_finite(part: Counterpart) -> None:
    if count_not_finite(part.tuned):
        raise ValueRangeError(
            f"{part.name}: the tuned model holds NaN or infinity ({part.tuned.file}).",
            "The file is damaged, or training diverged. Nothing was written.",
        )
