"""What was found, in sentences: the bad first, modules of one kind together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratool.dtypes import dtype_name
from loratool.merging.proof.findings import Finding
from loratool.paths import pattern, ranged
from loratool.words import agreeing, counted

#: Ways of rounding more than once, in words; see `rounding_paths`.
_WAYS = {
    "delta": "the delta was rounded to {} before it was added, as PEFT's safe_merge, PEFT's "
    "embeddings and mlx-lm do",
    "through": "the sum was rounded to {} before it was stored",
    "product": "factors, product and sum were all {}",
    "steps": "the adapters were merged one after the other, with the model {} between them",
    "cast": "the base was rounded to {} before the delta was added",
    "both": "base and delta were rounded to {} before they were added",
    "within": "the model was {} when it was merged, and stored otherwise",
    "within-both": "the model and the delta were {} when they were merged, and stored otherwise",
}


def sentences(findings: Sequence[Finding]) -> list[str]:
    """What was found, the bad first, modules of one kind together."""
    modules = [f for f in findings if f.adapted]
    said = []
    for phrase, group in _grouped([f for f in findings if not f.sound]):
        whole = modules if group[0].adapted and group[0].code not in _OF_TENSORS else []
        said.append(_sentence(phrase, group, whole))
    for phrase, group in _grouped([f for f in findings if f.sound and f.adapted]):
        said.append(_sentence(phrase, group, modules))
    return said


_OF_TENSORS = ("missing", "added", "shape", "dtype", "changed")


@dataclass(frozen=True)
class Phrase:
    """What happened to one module or tensor, and, where that reads otherwise, to several.

    Names of adapters stand in it as they are: only the verb, by itself, is made to agree.
    """

    verb: str
    one: str
    many: str = ""

    def of(self, count: int) -> str:
        rest = self.one if count == 1 else self.many or self.one
        return f"{agreeing(count, self.verb)} {rest}" if self.verb else rest


def _grouped(findings: Sequence[Finding]) -> list[tuple[Phrase, list[Finding]]]:
    groups: dict[Phrase, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(_phrase(finding), []).append(finding)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _phrase(f: Finding) -> Phrase:
    """What happened, to follow "3 modules …"."""
    if f.code == "weight":
        assert f.times is not None
        times = f"{f.times:.2f}"
        if times == "2.00":
            return Phrase("was", "merged twice, or with twice the weight")
        return Phrase("was", f"merged with {times} times the weight")
    kind, _, half = f.way.rpartition("-")
    way = _WAYS[kind].format(dtype_name(half)) if f.way else ""
    weights = " and ".join(f"{weight:.2f} × {name}" for name, weight in f.by_adapter.items())
    return {
        "once": Phrase("is", "the once-rounded result"),
        "same": Phrase("is", "as the adapter holds it", "as the adapter holds them"),
        "same-rounded": Phrase(
            "is", f"as it should be, but rounded twice: {way}",
            f"as they should be, but rounded twice: {way}",
        ),
        "rounded-twice": Phrase("is", f"merged and rounded twice: {way}"),
        "low-precision": Phrase("is", f"merged, with a product of low precision: {way}")
        if way
        else Phrase("is", "merged, with less precision than by rounding once"),
        "requantised": Phrase("is", f"merged and quantised again, with {f.note} of the delta left"),
        "delta-lost": Phrase(
            "is", f"quantised, and holds {f.note} of the delta",
            f"quantised, and hold {f.note} of the delta",
        ),
        "same-quantised": Phrase(
            "is", "as it should be, but quantised", "as they should be, but quantised"
        ),
        "original": Phrase("was", "merged into the model that the base was quantised from")
        if f.adapted
        else Phrase("is", "as in the model that the base was quantised from"),
        "not-merged": Phrase("was", "never merged"),
        "weights": Phrase("was", f"merged with {weights} instead of what was asked"),
        "damaged": Phrase(
            "is", "merged, but some of its values are off",
            "merged, but some of their values are off",
        ),
        "other": Phrase("", "changed in a way that the adapters do not explain"),
        "changed": Phrase(
            "", "changed although no adapter touches it", "changed although no adapter touches them"
        ),
        "missing": Phrase("is", "missing"),
        "added": Phrase("is", "not in the base"),
        "shape": Phrase("has", "another shape"),
        "dtype": Phrase("has", "a dtype that cannot hold it", "a dtype that cannot hold them"),
    }[f.code]  # fmt: skip


def _sentence(phrase: Phrase, group: list[Finding], whole: Sequence[Finding]) -> str:
    noun = "module" if whole else "tensor"
    said = phrase.of(len(group))
    if len(whole) == 1:
        return f"the only {noun} {said}" + ("" if group[0].sound else f": {group[0].tensor}")
    if whole and len(group) == len(whole):
        return f"all {counted(len(whole), noun)} {said}"
    count = f"{len(group)} of {len(whole)} {noun}s" if whole else counted(len(group), noun)
    # Where all is well, the places would only be in the way of those where it is not.
    return f"{count} {said}" + ("" if group[0].sound else f": {_places(group, whole)}")


def _places(group: Sequence[Finding], whole: Sequence[Finding]) -> str:
    """ "all of mlp.down_proj" where every module of that name is meant, else names with ranges."""
    kinds: dict[str, list[str]] = {}
    for finding in group:
        name = finding.module if whole else finding.tensor
        kinds.setdefault(pattern(name), []).append(name)
    sizes: dict[str, int] = {}
    for finding in whole:
        kind = pattern(finding.module)
        sizes[kind] = sizes.get(kind, 0) + 1
    named = []
    for kind, members in kinds.items():
        if len(members) > 1 and sizes.get(kind) == len(members):
            named.append("all of " + kind.rpartition("#.")[2])
        else:
            named.append(ranged(members))
    more = f" and {len(named) - 5} more kinds" if len(named) > 5 else ""
    return ", ".join(named[:5]) + more
