"""What a shell offers where a value is typed: files, names, or what the help lists.

What it is follows from what the help shows of a parameter, its metavar, so that a new command has
it by itself. Hub ids are typed, and pass as ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import click
from click.shell_completion import CompletionItem

#: Metavars that list what they stand for: "total|frequency".
_CHOICES = re.compile(r"[\w-]+(?:\|[\w-]+)+")


def _methods() -> Iterable[str]:
    from loratool.linalg.methods import METHODS

    return METHODS


def _dialects() -> Iterable[str]:
    from loratool.adapters.dialects import DIALECTS

    return [dialect.name for dialect in DIALECTS]


def _targets() -> Iterable[str]:
    from loratool.adapters.dialects import TARGETS

    return TARGETS


def _programs() -> Iterable[str]:
    from loratool.serving.programs import PROGRAMS

    return PROGRAMS


#: Options whose values have names that a verb knows, asked for only when a shell wants them.
_NAMES: dict[str, Callable[[], Iterable[str]]] = {
    "--method": _methods,
    "--from": _dialects,
    "--to": _targets,
    "--for": _programs,
}


class _Offered(click.ParamType):  # type: ignore[type-arg]
    """The type of a parameter, with what a shell offers for it: names, or files if there are none.

    Files are left to the shell, which completes them as it does for other programs.
    """

    def __init__(self, inner: click.ParamType, names: Callable[[], Iterable[str]] | None) -> None:  # type: ignore[type-arg]
        self.name = inner.name
        self._inner, self._names = inner, names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._inner.convert(value, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        if self._names is None:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]


def offer_values(command: click.Command) -> None:
    """Let shells complete the values of a command's parameters."""
    for param in command.params:
        option = param if isinstance(param, click.Option) else None
        if (option is not None and option.is_flag) or isinstance(param.type, click.Choice):
            continue  # nothing to complete, or click does it
        metavar = param.metavar or ""
        named = [_NAMES[name] for name in param.opts if name in _NAMES]
        if option is not None and named:
            param.type = _Offered(param.type, named[0])
        elif option is not None and _CHOICES.fullmatch(metavar):
            param.type = _Offered(param.type, partial(str.split, metavar, "|"))
        elif isinstance(param.type, click.types.StringParamType):
            param.type = _Offered(param.type, None)
