"""The process around a command: its streams, its signals, its end.

Nothing here is imported slowly, so that Ctrl-C is heard from the first moment on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO, NoReturn

from loratool.text import FITTING

#: The exit code after Ctrl-C and polite kills.
INTERRUPTED = 130

#: Ctrl-C, `kill`, and a terminal that is closed.
_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_SIGNALS = (signal.SIGINT, signal.SIGTERM, *([_HANGUP] if _HANGUP else []))

#: Whether a signal came that was raised as KeyboardInterrupt.
_interrupted = False


def prepare_imports() -> None:
    """Until the command line is imported, Ctrl-C ends the process at once: nothing was begun.

    Raised in the middle of an import, it could come out as another exception.
    """
    _open_streams()
    _hear_signals(_end)


def prepare() -> None:
    """Make the process fit for a command: streams that are open, signals that are heard.

    The first signal is a KeyboardInterrupt, the others nothing: a second Ctrl-C must not stop the
    cleaning up after the first.
    """
    _open_streams()
    _fit_streams()
    _hear_signals(_interrupt)
    # What goes wrong in a thread is told by who waits for it; in a destructor, by nobody.
    threading.excepthook = lambda _: None
    sys.unraisablehook = _unraisable


def was_interrupted() -> bool:
    """Whether a signal came, whatever became of the KeyboardInterrupt on its way."""
    return _interrupted


def _hear_signals(handler: Callable[..., object]) -> None:
    for number in _SIGNALS:
        # What `nohup` ignores stays so; a shell's `&` ignores Ctrl-C, which others may send.
        if number != _HANGUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end(*_: object) -> NoReturn:
    say("interrupted; nothing was begun")
    os._exit(INTERRUPTED)


def _interrupt(*_: object) -> NoReturn:
    global _interrupted
    _interrupted = True
    _ignore_signals()
    raise KeyboardInterrupt


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt):  # it stopped nothing; the next one shall
        _hear_signals(_interrupt)


def _open_streams() -> None:
    """Give the process all three streams, also where the shell has closed some (`>&-`).

    The next file to be opened would get the free number: then what a library prints would be
    written into the output. What is written to a closed stdout fails, as it should.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, mode)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    sys.stdout = sys.stdout or _stream(1)
    sys.stderr = sys.stderr or _stream(2)
    # A terminal that cannot show a character gets a "?" for it, not a crash.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _fit_streams() -> None:
    """Let streams show signs that their encoding lacks by others, as ASCII where that is asked for.

    In the locale C Python writes UTF-8 all the same, which who asks for C does not expect; a
    container that says nothing of a locale is another matter.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            encoding = "ascii" if _asks_for_ascii() else stream.encoding
            stream.reconfigure(encoding=encoding, errors=FITTING)


def _asks_for_ascii() -> bool:
    if os.environ.get("PYTHONIOENCODING") or os.environ.get("PYTHONUTF8"):
        return False
    names = [os.environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG")]
    if names[1] in ("C.UTF-8", "C.utf8", "UTF-8"):  # Python sets it so, for C
        names[1] = ""
    return next(filter(None, names), "") in ("C", "POSIX")


def _stream(number: int) -> IO[str]:
    return open(number, "w", closefd=False)


def say(text: str) -> None:
    """Print lines on stderr, whoever hears it."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def print_answer(text: str) -> OSError | None:
    """Print lines on stdout, before Rich is imported; the reason where it does not take them."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        return error
    return None


def leave(code: int) -> NoReturn:
    """End the process. With torch imported, taking it down in order takes longer than a fsync; and
    after Ctrl-C threads may still be computing what nobody wants any more."""
    from loratool.storage.hub.patience import is_left_behind

    _ignore_signals()  # the answer stands
    broken = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # said already, or the reader (head, less) has seen enough
            broken = True
    if broken or "torch" in sys.modules or code == INTERRUPTED or is_left_behind():
        os._exit(code)
    sys.exit(code)
