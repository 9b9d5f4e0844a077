"""Which part of a base an adapter's names mean: with a prefix more, or one less.

A text-only adapter fits into a model of text and images, an adapter of a whole model onto its text
part alone, and what was saved without its head onto what was saved with it. Candidates are tried on
all names at once, and the one that places most wins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from loratool.errors import MatchError
from loratool.models.layouts.components import (
    Hint,
    Wanted,
    choose_part,
    contradicts,
    kind_of,
    may_be,
)
from loratool.models.layouts.layout import Layout, Naming
from loratool.notices import Notice
from loratool.words import enumerated

#: Prefixes that are tried; models have fewer parts.
_PREFIXES = 12

#: Leading parts of names that are taken off before prefixes are tried: model.language_model.
_STRIPPED = 2


def choose_naming(layout: Layout, wanted: Sequence[Wanted], hints: Sequence[Hint] = ()) -> Naming:
    """The renaming from adapter names to names of the base that places the most of `wanted`.

    Candidates, in this order: as they are; with a leading component taken off; with a prefix put
    before; with leading components taken off and a prefix put before. The one that places most with
    fitting shapes wins, and among equals the first. Where several prefixes do equally well
    `hints` decide, and MatchError is raised if they do not.
    """
    return _Search(layout, wanted, hints).best()


class _Search:
    def __init__(self, layout: Layout, wanted: Sequence[Wanted], hints: Sequence[Hint]) -> None:
        self.layout = layout
        self.wanted = wanted
        self.hints = hints
        self.everything = (len(wanted), len(wanted))

    def best(self) -> Naming:
        best: Naming = _identity
        most = (-1, -1)
        for naming in self._plain():
            score = self._score(naming)
            if score > most:
                best, most = naming, score
            if score == self.everything:
                return self._instead() or best
        for stripped in self._beginnings():
            rooted: dict[str, Naming] = {}
            for prefix, naming in self._prefixed(stripped):
                score = self._score(naming)
                if score > most:
                    best, most, rooted = naming, score, {prefix: naming}
                elif score == most and rooted and not self._means_the_same(naming, best):
                    rooted.setdefault(prefix, naming)
            if len(rooted) > 1 and 2 * most[0] >= len(self.wanted):  # less is another model's
                return rooted[self._chosen(list(rooted))]
            for prefix in rooted:
                self._note_doubt(prefix.rstrip("."))
            if most == self.everything:
                break
        return best

    def _score(self, naming: Naming) -> tuple[int, int]:
        """How many of `wanted` find a tensor that fits, and how many find one at all."""
        fitting = there = 0
        for one in self.wanted:
            name = naming(one.name)
            if not self.layout.admits(name):
                continue
            fits = self.layout.fits(one, name)
            fitting += fits
            there += fits or self.layout.has(name)
        return fitting, there

    def _means_the_same(self, one: Naming, other: Naming) -> bool:
        """Whether two namings lead to the same parameters, by two of their names."""
        segments = self.layout.holdings.names.segments
        return all(
            segments(one(wanted.name)) == segments(other(wanted.name)) for wanted in self.wanted
        )

    def _plain(self) -> Iterator[Naming]:
        yield _identity
        heads = {one.name.partition(".")[0] for one in self.wanted}
        roots = {name.partition(".")[0] for name in self.layout.base.tensors}
        own = kind_of(self.layout.base.model_type)
        for root in sorted(heads - roots):
            if own and kind_of(root) not in (None, own):
                continue  # a text tower's adapter is none for a vision tower without a root
            yield self._moved(root + ".", "")

    def _beginnings(self) -> Iterator[str]:
        """What is taken off the names before prefixes are tried: nothing, then more and more."""
        yield ""
        for depth in range(1, _STRIPPED + 1):
            found = Counter(
                ".".join(one.name.split(".")[:depth]) + "."
                for one in self.wanted
                if one.name.count(".") > depth
            )
            if found:
                yield found.most_common(1)[0][0]

    def _prefixed(self, stripped: str) -> Iterator[tuple[str, Naming]]:
        """The prefixes that make names of the base out of the most of `wanted`."""
        rest = {one.name[len(stripped) :] for one in self.wanted if one.name.startswith(stripped)}
        known = {*self.layout.base.tensors, *self.layout.holdings}
        counts = Counter(name[: -len(end)] for name in known for end in _ends(name) if end in rest)
        if stripped:
            counts[""] = sum(name in known for name in rest)
        own = kind_of(self.layout.base.model_type)
        for prefix, count in counts.most_common(_PREFIXES):
            if count and prefix != stripped and (not stripped or may_be(stripped, prefix, own)):
                yield prefix, self._moved(stripped, prefix)

    def _moved(self, stripped: str, prefix: str) -> Naming:
        """One beginning of names in the place of another, where names begin so; a head beside the
        part that moves stays where it is."""
        has = self.layout.has

        def naming(name: str) -> str:
            if name.startswith(stripped):
                moved = prefix + name[len(stripped) :]
                return name if stripped and not has(moved) and has(name) else moved
            return name if has(name) else prefix + name

        return naming

    def _instead(self) -> Naming | None:
        """The part that takes everything too and that the class in the config names, where the
        names fit as they are: beside towers with a root one may have none."""
        classes = [hint for hint in self.hints if hint.field == "base_model_class"]
        whole = {
            prefix.rstrip("."): naming
            for prefix, naming in (self._prefixed("") if classes else ())
            if self._score(naming) == self.everything
        }
        part, hint = choose_part(list(whole), classes)
        if part is None:
            return None
        self._note(
            f"The names fit as they are and in {part}; {hint.field} of its config, {hint.value}, "
            f"is for {part}."
        )
        return whole[part]

    def _note_doubt(self, part: str) -> None:
        hint = None if self.layout.components else contradicts(part, self.hints)
        if hint is not None:
            self._note(
                f"The adapter went into {part}, the only part of the base that takes it, though "
                f"{hint.field} of its config, {hint.value}, speaks of another part."
            )

    def _chosen(self, prefixes: list[str]) -> str:
        """One of the parts of the base that take the whole adapter, by what its config says."""
        parts = [prefix.rstrip(".") for prefix in prefixes]
        chosen, hint = choose_part(parts, self.hints)
        if chosen is None:
            raise MatchError(
                f"{self.layout.base.label}: {enumerated(parts)} would each take the whole adapter, "
                "and its config does not say for which part of the model it was trained.",
                f"Choose with --components, for instance --components {parts[0]}.",
            )
        self._note(
            f"{enumerated(parts)} would each take the whole adapter; {hint.field} of its config, "
            f"{hint.value}, is for {chosen}."
        )
        return f"{chosen}."

    def _note(self, text: str) -> None:
        self.layout.notices.append(Notice("component", text, self.layout.base.label))


def _identity(name: str) -> str:
    return name


def _ends(name: str) -> Iterator[str]:
    """The dotted ends of a name, without itself: "b.c" and "c" of "a.b.c"."""
    while "." in name:
        name = name.partition(".")[2]
        yield name
