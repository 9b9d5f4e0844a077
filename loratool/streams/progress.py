"""The functions by which work tells what is done."""

from __future__ import annotations

from collections.abc import Callable

#: `progress(bytes_done, bytes_total, label)`, called as the output grows.
Progress = Callable[[int, int, str], None]


#: `advance(bytes, label)`: so many more output bytes are done.
Advance = Callable[[int, str], None]
