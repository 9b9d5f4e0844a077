"""What can go wrong, in words for people.

Every error a user can meet is a `LoraToolError`: a message that says what is wrong and where, and a
hint that says what to do next. The command line prints both and exits with the error's `exit_code`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from loratool.text import printable, printable_message

#: Paths that people know by another name: the folders of the download cache, by Hub id.
_KNOWN_AS: dict[str, str] = {}


def show_as(path: object, name: str) -> None:
    """From now on show `name` to people where `path` would stand."""
    _KNOWN_AS[str(path)] = name


def shown(text: object) -> str:
    """A path or a text with paths as people should see it."""
    result = str(text)
    for path, name in _KNOWN_AS.items():
        inside = name if "://" in name else f"hf://{name}"
        result = result.replace(f"{path}/", f"{inside}/").replace(path, name)
    return result


def shown_argument(text: object) -> str:
    """A path as a shell takes it, and no option: for commands in hints."""
    word = str(text)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


class LoraToolError(Exception):
    """Something the user can act on.

    Parameters
    ----------
    message: what is wrong and where (file, tensor, expected and found).
    hint: what to do next; may be empty.

    Both are made printable, so whatever they name may be put into them as it is. Lines after the
    first are indented by two spaces, as those of `listed` are; other line breaks are escaped.
    """

    exit_code = 1
    code = "error"
    #: Whether what a run had finished before it is of use to the next one.
    keeps_work = False

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = printable_message(shown(message))
        self.hint = printable_message(shown(hint))
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:
        """For processes of a cluster; what was made printable stays as it is."""
        return _rebuilt, (type(self), self.__dict__)

    def to_dict(self) -> dict[str, str]:
        """The object that `--json` prints on stderr."""
        return {"error": self.code, "message": self.message, "hint": self.hint}


def _rebuilt(kind: type[LoraToolError], values: dict[str, object]) -> LoraToolError:
    error = kind.__new__(kind, values["message"])
    error.__dict__.update(values)
    return error


class FileError(LoraToolError):
    """A file that is missing, truncated, corrupt or not what its name says."""

    code = "bad-file"


class SeveralMeantError(FileError):
    """A path that could mean several things, called `given` by the user; `choice` is one of them,
    to which the hint leads with the words of `lead`."""

    def __init__(self, message: str, lead: str, given: object, choice: object) -> None:
        super().__init__(message, f"{lead} {shown_argument(choice)}")
        self.lead, self.given, self.choice = lead, str(given), shown(choice)


class TruncatedError(FileError):
    """A weights file that ends before its data does."""


class AdapterError(LoraToolError):
    """An adapter that cannot be used as asked: wrong kind, inconsistent, or not merged honestly."""

    code = "bad-adapter"


class BaseError(LoraToolError):
    """A base checkpoint that cannot be used as asked: quantised, incomplete, damaged."""

    code = "bad-base"


#: What is said of an adapter in the place of a base.
NO_MODEL = "this is an adapter, not a base model."


class MatchError(LoraToolError):
    """Adapter and base do not fit each other."""

    code = "no-match"


class ValueRangeError(LoraToolError):
    """NaN, infinity or overflow: numbers that must not be written."""

    code = "bad-values"


class RestoreError(LoraToolError):
    """A merge that cannot be taken back as asked."""

    code = "not-restored"


class VerifyError(LoraToolError):
    """What was written is not what was computed."""

    code = "not-verified"
    exit_code = 3


class OutputError(LoraToolError):
    """The output cannot be written: it exists, the disk is full, it would harm an input."""

    code = "bad-output"


class HubError(LoraToolError):
    """The Hub cannot be reached, has not got what was asked for, or does not give it."""

    code = "hub"
    keeps_work = True


class LoginError(HubError):
    """Not logged in, or this login lacks permission."""

    code = "hub-login"
    exit_code = 4


class PushError(LoraToolError):
    """Files that should not go to the Hub as they are."""

    code = "not-pushed"


class UsageError(LoraToolError):
    """Arguments that contradict each other."""

    code = "usage"
    exit_code = 2


class AnswerLost(LoraToolError):
    """The answer was found and stdout does not take it; the reason is the system's."""

    code = "not-printed"

    def __init__(self, reason: str) -> None:
        super().__init__(f"The answer could not be printed ({reason}).")


class ReaderGone(Exception):
    """Whoever read our output has closed it. No error: `head` and `less` do so."""


@contextmanager
def explained_os_errors() -> Iterator[None]:
    """Turn what the system says about an input (no permission, a bad disk) into a FileError."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: it" if error.filename else "A file"
        raise FileError(
            f"{what} cannot be read ({error.strerror or error}).",
            "Check the path and its permissions.",
        ) from error


def listed(items: Iterable[str], shown: int = 5) -> str:
    """Join the first `shown` items as an indented list and say how many more there are.

    An item is one line, whatever its name holds.
    """
    all_items: Sequence[str] = list(items)
    lines = [f"  - {printable(item)}" for item in all_items[:shown]]
    if len(all_items) > shown:
        lines.append(f"  … and {len(all_items) - shown} more")
    return "\n".join(lines)


def by_cause(reasons: Iterable[tuple[str, str]]) -> str:
    """Names and what is wrong with each, as an indented list with one line for each cause.

    What differs in names and numbers of layers only is one cause: its line has the first names,
    how many more there are, and what is wrong with the first.
    """
    causes: dict[str, list[tuple[str, str]]] = {}
    for name, reason in reasons:
        cause = _NAMES.sub("*", _NEAREST.sub("", reason))
        causes.setdefault(cause, []).append((name, reason))
    lines = []
    for found in causes.values():
        names = ", ".join(printable(name) for name, _ in found[:3])
        names += f" and {len(found) - 3} more" if len(found) > 3 else ""
        same = len({reason for _, reason in found}) == 1
        reason = found[0][1] if same else f"of the first, {found[0][1]}"
        lines.append(f"{names}: {reason}" if reason else names)
    return listed(lines)


#: Names of modules and tensors in a reason, and what is nearest to one.
_NAMES = re.compile(r"\b[\w-]+(\.[\w-]+)+")
_NEAREST = re.compile(r" \(nearest: [^)]*\)")


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, for "did you mean"; None where nothing is near."""
    import difflib

    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is none of the choices, with the nearest of them."""
    near = nearest(name.lower().replace("-", "_"), choices)
    return UsageError(
        f"Unknown {what} {name!r}.",
        (f"Did you mean {near}? " if near else "") + f"Choose among {', '.join(choices)}.",
    )
