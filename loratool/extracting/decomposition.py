"""The factors of every module of a fine-tune, each module read, taken apart and put away in turn.

Modules are worked on by several threads, the largest first. Where the ranks depend on one another
(a budget for the file, one rank for all), modules that turn out to need more than was computed are
done again with a higher rank.

Each result goes into a log as soon as it is there, and what is in the log is not computed again, be
it from a run that was stopped or from another process.
"""

from __future__ import annotations

import json
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch

from loratool.adapters.factorfile import AdapterWriter, factor_bytes, rounding_loss
from loratool.errors import UsageError, ValueRangeError
from loratool.extracting.counterparts import Counterpart
from loratool.extracting.decomposed import NOTHING, Decomposed
from loratool.extracting.difference import Difference, Size
from loratool.extracting.policy import Policy
from loratool.linalg.lowrank import NEGLIGIBLE, Float64
from loratool.linalg.ranks import Criterion
from loratool.linalg.truncation import truncated
from loratool.storage.tensors import Bytes, FilePool
from loratool.storage.values import count_not_finite, same_values
from loratool.streams.results import Piece, ResultLog
from loratool.streams.workers import Workers

#: The rank to begin with where none is asked for.
_FIRST = 32

#: The two things that are computed of a part, in the keys of a log.
_SIZE, _FACTORS = "size", "factors"


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

    def measure(
        self, parts: Iterable[Counterpart], log: ResultLog | None = None
    ) -> list[Decomposed]:
        """Only how much each of them changed."""
        if log is not None:
            log.refresh()
        calls = (partial(self._size, part, log) for part in _largest_first(parts))
        measured = []
        with self._stopping():
            for found in self.workers.in_order(calls):
                measured.append(found)
                self.advance(found.part.nbytes, found.part.name)
        return measured

    def begin(self, parts: Iterable[Counterpart], criterion: Criterion, log: ResultLog) -> None:
        """Factors by a policy's first criterion for some of its parts: `decompose` finds them."""
        for _ in self._factors_of([(part, criterion) for part in parts], log, self.advance):
            pass

    def decompose(
        self, parts: Sequence[Counterpart], policy: Policy, writer: AdapterWriter
    ) -> tuple[list[Decomposed], dict[str, int]]:
        """Factors for all parts that changed, put into `writer`; and by unit the rank each is to
        have."""
        criterion = policy.first(parts)
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
        done = {}
        for found, data in self._factors_of(work, writer.log, advance):
            outlines = found.part.outlines if found.changed else []
            for outline, own in zip(outlines, data, strict=True):
                writer.take(outline, len(found.values), own)
            done[found.part.name] = found
        return [done[part.name] for part, _ in work]

    def _factors_of(
        self,
        work: Sequence[tuple[Counterpart, Criterion]],
        log: ResultLog,
        advance: Callable[[int, str], None],
    ) -> Iterator[tuple[Decomposed, tuple[Piece, ...]]]:
        """Each of these as soon as its factors are in the log."""
        log.refresh()
        criteria = {part.name: criterion for part, criterion in work}
        calls = (
            partial(self._logged, _FACTORS, part, criteria[part.name], log)
            for part in _largest_first(part for part, _ in work)
        )
        with self._stopping():
            for found, data in self.workers.in_order(calls):
                yield found, data
                advance(found.part.nbytes, found.part.name)

    def _size(self, part: Counterpart, log: ResultLog | None) -> Decomposed:
        return self._measured(part) if log is None else self._logged(_SIZE, part, None, log)[0]

    def _logged(
        self, step: str, part: Counterpart, criterion: Criterion | None, log: ResultLog
    ) -> tuple[Decomposed, tuple[Piece, ...]]:
        """What is in the log of this step, or is computed now and put there."""
        key = self._key(step, part, criterion)
        known = log.get(key)
        if known is not None:
            return Decomposed.of(part, known.facts), known.pieces
        data: list[Bytes] = []
        if criterion is None:
            found = self._measured(part)
        else:
            found, data = self._decomposed(part, criterion)
        return found, log.put(key, found.facts, data).pieces

    def knows(self, part: Counterpart, criterion: Criterion | None, log: ResultLog) -> bool:
        """Whether the log has the factors of a part by this criterion; without one, its size."""
        return log.get(self._key(_FACTORS if criterion else _SIZE, part, criterion)) is not None

    def _key(self, step: str, part: Counterpart, criterion: Criterion | None) -> str:
        """What the log calls a result by.

        It has what the result depends on beside the two models: whoever shares a log has the same,
        but a pass may ask for another rank than the one before, and a machine may have another
        device.
        """
        depends = [
            step, part.name, part.fate, criterion and asdict(criterion), self.dtype, self.seed,
            self.exact, self.keep_noise, self.device.type,
        ]  # fmt: skip
        return json.dumps(depends)

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
            return Decomposed(part, replace(NOTHING, changed=True))
        if not (part.tuned.is_float and part.base.is_float):
            changed = not same_values(part.base, part.tuned)
            return Decomposed(part, replace(NOTHING, changed=changed))
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
        if len(result.values) * 4 * (difference.rows + difference.columns) <= difference.elements:
            size = size.bounded(result.cut)
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
