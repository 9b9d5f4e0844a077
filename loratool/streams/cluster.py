"""Calls as tasks of a Ray cluster: functions by name, paths and small answers travel, no tensors.

Ray (`loratool[ray]`) is imported here and nowhere else.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO, cast

from loratool.errors import LoraToolError, UsageError

#: What Ray's addresses look like: "auto", "local", host:port, ray://host:port.
_ADDRESS = re.compile(r"auto|local|(ray://)?[^/\s]+:\d+")

#: How often a task is begun again whose process or node was lost.
_RETRIES = 5

#: Threads of a task. Several tasks a node keep its disk busy while one of them begins or ends.
_THREADS = 2

#: Bytes of Ray's store of objects on this machine, which is hardly used; its least is 75 MB.
_STORE = 80_000_000

#: Seconds that a host may take to answer, and those that tasks may take to end when cancelled.
_ANSWER, _ENDING = 10.0, 20.0


#: Ray's settings, where the environment has no others.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "2",
    "RAY_py_gcs_connect_timeout_s": "10",
}


class ClusterError(LoraToolError):
    """The cluster cannot be reached, or lost a task again and again."""

    code = "cluster"
    keeps_work = True


@dataclass(frozen=True)
class ClusterCall:
    """One call of a function in the cluster. `memory` are the bytes that it takes at most."""

    name: str
    arguments: tuple[Any, ...]
    memory: int


class Cluster:
    """The tasks of one run. Use as a context manager: what still runs at its end is cancelled.

    `address` is Ray's, "" for a cluster on this machine that lives as long as the run.
    """

    def __init__(self, address: str, threads: int | None = None) -> None:
        check_address(address)
        self._address = "local" if address == "" else address
        self._wanted = threads or _THREADS
        self._mine = False
        self._pending: dict[Any, ClusterCall] = {}

    def __enter__(self) -> Cluster:
        # Nothing is told to anybody, no library draws over our progress, and who does not answer
        # is not asked for minutes. Ray reads some of these when it is imported.
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        self._ray = _imported()
        if self._ray.is_initialized():
            self._refuse_another()
            return self
        options: dict[str, Any] = {}
        if self._address == "local":
            options = {"include_dashboard": False, "object_store_memory": _STORE}
        try:
            with _own_signals(), _hushed():
                _refuse_silent(self._address)
                self._ray.init(
                    self._address, log_to_driver=False, logging_level=logging.ERROR, **options
                )
        except BaseException as error:
            with suppress(Exception):  # Ctrl-C comes here too, with half a cluster begun
                self._ray.shutdown()
            if not isinstance(error, Exception):
                raise
            first = str(error).strip().partition("\n")[0]
            if self._address == "local":
                raise ClusterError(
                    f"Ray does not begin on this machine: {first}"[:500],
                    "Run the command without --ray; look at Ray's logs, or begin a cluster with "
                    "`ray start --head`.",
                ) from None
            raise ClusterError(
                f"No Ray cluster answers at {self._address}: {first}"[:500],
                "Begin one with `ray start --head`, or omit the address for one on this machine.",
            ) from None
        self._mine = True
        self._stdout = sys.stdout
        sys.stdout = cast(TextIO, _WithoutRay(sys.stdout))
        return self

    def _refuse_another(self) -> None:
        """Raise UsageError where this process has a cluster, and another one is asked for."""
        _, _, port = self._address.rpartition(":")
        there = str(self._ray.get_runtime_context().gcs_address)
        if re.fullmatch(r"[^/]+:\d+", self._address) and port != there.rpartition(":")[2]:
            raise UsageError(
                f"Ray is connected to {there} in this process, not to {self._address}.",
                "Omit the address, or call ray.shutdown() before.",
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Until tasks are gone they write, and what is removed after us would come again. A task
        # that is just beginning may miss that it was cancelled, so they are told again.
        pending, until = list(self._pending), time.monotonic() + _ENDING
        while pending and time.monotonic() < until:
            try:
                # The last first: a task that waits must not begin when one that runs is gone.
                for reference in reversed(pending):
                    self._ray.cancel(reference, force=True)
                _, pending = self._ray.wait(pending, num_returns=len(pending), timeout=1.0)
            except Exception:  # the cluster is gone
                break
        if self._mine:
            self._ray.shutdown()
            sys.stdout = self._stdout

    def threads(self) -> int:
        """Threads of a task: as many as wanted, and as the largest node has cores."""
        return max(1, min(self._wanted, int(max((cpus for cpus, _ in self._nodes()), default=1))))

    def _nodes(self) -> list[tuple[float, float]]:
        """Cores and bytes of memory that each node has for tasks."""
        found = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [(node.get("CPU", 0.0), node.get("memory", 0.0)) for node in found]

    def _most_memory(self, threads: int) -> float:
        """What a task may ask for: a node has to have it that has the cores too."""
        return max((memory for cpus, memory in self._nodes() if cpus >= threads), default=0.0)

    def results(
        self, function: Callable[..., Any], calls: Sequence[ClusterCall]
    ) -> Iterator[tuple[str, Any]]:
        """The name of each call and what it returned, as they end.

        `function` is one of a module, which every node can import. Errors of its own end the run;
        a call whose process or node was lost is made again.
        """
        threads = self.threads()
        memory = self._most_memory(threads)
        task = self._ray.remote(function)
        for call in calls:
            reference = task.options(
                name=f"loratool {call.name}", num_cpus=threads, max_retries=_RETRIES,
                memory=int(min(call.memory, memory)), scheduling_strategy="SPREAD",
            ).remote(*call.arguments)  # fmt: skip
            self._pending[reference] = call
        while self._pending:
            # With a timeout, so that Ctrl-C is heard.
            ready, _ = self._ray.wait(list(self._pending), timeout=1.0)
            for reference in ready:
                answer = self._answer(reference)
                yield self._pending.pop(reference).name, answer

    def _answer(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, LoraToolError):
                raise cause from None
            raise ClusterError(
                f"{self._pending[reference].name}: a task failed: {cause!r}"[:500],
                "What is finished is kept; look at the node's logs, and run the command again.",
            ) from None
        except self._ray.exceptions.TaskCancelledError:
            raise ClusterError(
                f"{self._pending[reference].name}: its task was cancelled.",
                "What is finished is kept; run the command again.",
            ) from None
        except self._ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            raise ClusterError(
                f"{self._pending[reference].name}: its task was lost {_RETRIES + 1} times: {first}"[
                    :500
                ],
                "What is finished is kept; run the command again when the cluster is well.",
            ) from None


def check_address(address: str) -> None:
    """Raise UsageError for what is no address of a cluster, as a path that follows --ray."""
    if address and not _ADDRESS.fullmatch(address):
        raise UsageError(
            f"{address!r} is not the address of a Ray cluster.",
            "Addresses are auto, host:6379 or ray://host:10001. For a cluster on this machine "
            "write --ray at the end of the command, or --ray=local.",
        )


def _imported() -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError(
            "Ray is not installed.", "Install it: pip install 'loratool[ray]'."
        ) from None
    return ray


def _refuse_silent(address: str) -> None:
    """Raise OSError where no program listens at an address: Ray would ask for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep stderr free of what Ray's C++ parts write there while they begin."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _WithoutRay:
    """stdout without what a thread of Ray's prints there, as when a task's process was killed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if threading.current_thread().name.startswith("ray_"):
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give signals back to whoever had them: Ray takes SIGTERM for itself when it begins."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        with suppress(ValueError):  # not the main thread, which Ray leaves alone
            for number, handler in before.items():
                signal.signal(number, handler)
