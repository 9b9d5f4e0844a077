"""What the Hub answers, in words for people; and whether it is asked with a login."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from loratool.errors import HubError, LoginError, LoraToolError, OutputError
from loratool.storage.hub.address import Address
from loratool.storage.hub.patience import Unreachable
from loratool.text import is_printable


@contextmanager
def explained(address: Address, writing: bool = False) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into errors for people.

    What is not known is not quoted: it may hold a signed link.
    """
    try:
        yield
    except LoraToolError:
        raise
    except Exception as error:
        raise _explanation(error, address, writing) from error


def _explanation(error: Exception, address: Address, writing: bool) -> LoraToolError:
    """The error for people, told from the one in the chain of causes that says most."""
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    answered = next(
        (e for e in chain if isinstance(e, errors.HfHubHTTPError) and hasattr(e, "response")
         and e.response is not None),
        None,
    )  # fmt: skip
    if answered is not None:
        return _answer(answered, address, writing)
    if any(isinstance(e, errors.HFValidationError) for e in chain):
        return HubError(f"{address.repo}: not a repository id ({error}).", "Ids are org/name.")
    if constants.HF_HUB_OFFLINE and any(
        isinstance(e, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError) for e in chain
    ):
        return Unreachable(
            f"{address}: not in the download cache, and HF_HUB_OFFLINE is set.",
            "Unset HF_HUB_OFFLINE to ask the Hub.",
        )
    families = {type(e).__module__.partition(".")[0] for e in chain}
    lost = (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    if families & _NETWORK or any(isinstance(e, lost) for e in chain):
        return Unreachable(
            f"{address.repo}: the Hub at {constants.ENDPOINT} cannot be reached, or broke off.",
            "Check the network, and try again.",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{address.repo}: the disk of the download cache is full ({constants.HF_HUB_CACHE}).",
            "Free some space, or set HF_HOME to a place on another disk.",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return OutputError(
            f"{address.repo}: the download cache at {constants.HF_HUB_CACHE} cannot be written "
            f"({error.strerror}).",
            "HF_HOME can put it elsewhere.",
        )
    if isinstance(error, OSError):
        text = str(error).partition("\n")[0].rstrip(".")
        return HubError(f"{address.repo}: {text}.", "Try again; if it stays, tell its owner.")
    return HubError(
        f"{address.repo}: the transfer failed ({type(error).__name__}).",
        "Try again; HF_HUB_DISABLE_XET=1 takes another way.",
    )


#: Libraries whose errors mean that a connection failed.
_NETWORK = {"httpx", "httpx2", "httpcore", "requests", "urllib3"}


def _answer(error: Any, address: Address, writing: bool) -> HubError:
    """What an answer of the Hub that is no success means."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{address.repo}"
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        text = f"{address.repo} is gated: who wants to read it must ask at {page}."
        if logged_in():
            return HubError(text, "The account you are logged in with has no access yet.")
        return LoginError(text, f"Ask for access there, then log in: {LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        if logged_in():
            return HubError(
                f"{address.repo}: no such repository on the Hub, or not for your account.",
                f"Check the name at {page}.",
            )
        return LoginError(
            f"{address.repo}: no such repository on the Hub, or a private one, and you are not "
            "logged in.",
            f"Check the name; for a private repository log in: {LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{address.repo} has no revision {address.revision!r}.",
            f"Its branches and tags are at {page}/tree/main.",
        )
    if status == 401:
        known = "The Hub does not know the token that you are logged in with."
        text = known if logged_in() else "The Hub asks for a login."
        return LoginError(text, f"Log in again: {LOGIN}")
    if status == 403:
        verb = "write" if writing else "read"
        return LoginError(
            f"The Hub does not let this login {verb} {address.repo}{_said(error)}.",
            f"If it is for the token, use one that may {verb} there: {LOGIN}",
        )
    if status == 409:
        return HubError(
            f"Somebody else made {address.repo}, or wrote to it, meanwhile{_said(error)}.",
            "Look at what is there now, and run the command again.",
        )
    if status == 412:
        return HubError(
            f"Somebody else committed to {address.repo} meanwhile. Nothing was committed.",
            "Run the command again; what is uploaded is not sent twice.",
        )
    if status == 429:
        return HubError(
            "The Hub is rate-limiting this client (429).", "Wait a few minutes; try again."
        )
    return HubError(
        f"The Hub answered {status} for {address.repo}{_said(error)}.",
        "Try again later." if status >= 500 else f"Look at {page}.",
    )


LOGIN = "hf auth login (or set HF_TOKEN)"


def logged_in() -> bool:
    """Whether there is a token, stored or in HF_TOKEN."""
    from huggingface_hub import get_token

    return get_token() is not None


def _said(error: Exception) -> str:
    """What the Hub gave as reason, in brackets."""
    message = getattr(error, "server_message", None)
    return f" ({str(message).strip().rstrip('.')})" if message else ""


_quiet = 0
_switching = threading.Lock()


@contextmanager
def progress_bars(shown: bool, names: Iterable[str] = ()) -> Iterator[None]:
    """Let the library show its bars, on a terminal alone and if the user lets it.

    It writes the names of the files on them as they are, so all of them must be printable.
    Its switch is one for all threads; they stay off while any thread wants them off.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    global _quiet
    if shown and sys.stderr.isatty() and all(map(is_printable, names)):
        yield
        return
    with _switching:
        if _quiet or not are_progress_bars_disabled():  # else: the user has switched them off
            _quiet += 1
            disable_progress_bars()
            counted = True
        else:
            counted = False
    try:
        yield
    finally:
        if counted:
            with _switching:
                _quiet -= 1
                if not _quiet:
                    enable_progress_bars()
