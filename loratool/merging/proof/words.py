"""What was found, in sentences: the bad first, modules of one kind together."""

from __future__ import annotations

from collections.abc import Sequence

from loratool.dtypes import dtype_name
from loratool.merging.proof.findings import Finding
from loratool.paths import pattern, ranged

#: Ways of rounding more than once, in words; see `ways`.
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


def _grouped(findings: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(_phrase(finding), []).append(finding)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _phrase(f: Finding) -> str:
    """What happened, to follow "3 modules …"."""
    if f.code == "weight":
        assert f.times is not None
        times = f"{f.times:.2f}"
        if times == "2.00":
            return "were merged twice, or with twice the weight"
        return f"were merged with {times} times the weight"
    kind, _, half = f.way.rpartition("-")
    way = _WAYS[kind].format(dtype_name(half)) if f.way else ""
    return {
        "once": "are the once-rounded result",
        "same": "are as the adapter holds them",
        "same-rounded": f"are as they should be, but rounded twice: {way}",
        "rounded-twice": f"are merged and rounded twice: {way}",
        "low-precision": f"are merged, with a product of low precision: {way}"
        if way
        else "are merged, with less precision than by rounding once",
        "not-merged": "were never merged",
        "weights": "were merged with "
        + " and ".join(f"{weight:.2f} × {name}" for name, weight in f.by_adapter.items())
        + " instead of what was asked",
        "damaged": "are merged, but some of their values are off",
        "other": "changed in a way that the adapters do not explain",
        "changed": "changed although no adapter touches them",
        "missing": "are missing",
        "added": "are not in the base",
        "shape": "have another shape",
        "dtype": "have a dtype that cannot hold them",
    }[f.code]


def _sentence(phrase: str, group: list[Finding], whole: Sequence[Finding]) -> str:
    noun = "module" if whole else "tensor"
    if len(group) == 1:
        for many, one in (("are ", "is "), ("were ", "was "), ("have ", "has "),
                          (" them", " it"), (" their ", " its ")):  # fmt: skip
            phrase = phrase.replace(many, one) if many.startswith(" ") else (
                one + phrase.removeprefix(many) if phrase.startswith(many) else phrase
            )  # fmt: skip
    count = f"{len(group)} of {len(whole)} {noun}s" if whole else (
        f"{len(group)} {noun}" + ("s" if len(group) > 1 else ""))  # fmt: skip
    if len(whole) == 1:
        return f"the only {noun} {phrase}" + ("" if group[0].sound else f": {group[0].tensor}")
    if whole and len(group) == len(whole):
        return f"all {len(whole)} {noun}s {phrase}"
    # Where all is well, the places would only be in the way of those where it is not.
    return f"{count} {phrase}" + ("" if group[0].sound else f": {_places(group, whole)}")


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
