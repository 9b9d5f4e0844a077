"""What all reports can do: show themselves in a notebook, and give their rows as a data frame.

How an answer looks is known above; `loratool` itself says who is asked (`show_with`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from loratool.errors import UsageError


class _Showing(Protocol):
    def html_of(self, report: Any) -> str: ...
    def text_of(self, report: Any) -> str: ...


_showing: Callable[[], _Showing] | None = None


def show_with(showing: Callable[[], Any]) -> None:
    """Say who shows reports: a function that gives something with `html_of` and `text_of`."""
    global _showing
    _showing = showing


class Answer(ABC):
    """A report that notebooks show as the page that `--html` writes, and others in a few lines."""

    #: The list of the report whose entries are the rows of `to_frame`.
    ROWS: ClassVar[str] = ""

    def __repr__(self) -> str:
        return _showing().text_of(self) if _showing is not None else f"<{type(self).__name__}>"

    def _repr_html_(self) -> str | None:
        return _showing().html_of(self) if _showing is not None else None

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""

    def to_frame(self) -> Any:
        """The rows of the report, its modules as a rule, as a pandas DataFrame.

        Raises UsageError where pandas is not installed, or the report has no rows.
        """
        if not self.ROWS:
            raise UsageError(f"{type(self).__name__} has no rows.", "Use to_dict().")
        try:
            import pandas
        except ImportError:
            raise UsageError(
                "Data frames are pandas', which is not installed.",
                "Install it: pip install pandas. Or use to_dict().",
            ) from None
        return pandas.DataFrame(self.to_dict()[self.ROWS])
