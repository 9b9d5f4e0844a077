"""One model, made without and with every kind of trouble; the bytes must be the same.

A base in shards is merged undisturbed; by a run that is killed twice and continued; by three
workers; and by Ray on two nodes, one of which is killed when the first shard is finished. Prints
times, peaks and whether the sha256 of all files agree. Exits 1 where they do not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import machine, make_adapter, make_base, size_of


def sha256_of(folder: Path) -> str:
    """One hash over the names and hashes of all files."""
    lines = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
        lines.append(f"{digest.hexdigest()} {path.relative_to(folder)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Trial:
    """One base, one adapter, one output after the other in the same place."""

    def __init__(self, work: Path, base: Path, adapter: Path) -> None:
        self.work, self.base, self.adapter = work, base, adapter
        self.output = work / "output"
        self.journal = work / ".output.loratool-work" / "done"
        self.rows: list[tuple[str, float, int, str, str]] = []

    def command(self, *more: str) -> list[str]:
        merge = ["merge", str(self.base), str(self.adapter), "-o", str(self.output), "-q"]
        return [sys.executable, "-m", "loratool", *merge, *more]

    def finished(self) -> int:
        return len(list(self.journal.glob("*.json"))) if self.journal.is_dir() else 0

    def run(self, *more: str, kill_at: int = 0) -> tuple[int, int]:
        """Exit code and peak bytes; with `kill_at`, killed when so many shards are finished."""
        process = subprocess.Popen(self.command(*more), stderr=subprocess.PIPE, text=True)
        while kill_at and process.poll() is None:
            if self.finished() >= kill_at:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, -signal.SIGKILL):
            assert process.stderr is not None
            sys.exit(process.stderr.read())
        return process.returncode, usage.ru_maxrss * 1024

    def note(self, label: str, how: Callable[[], tuple[int, str]]) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        started = time.perf_counter()
        peak, remark = how()
        seconds = time.perf_counter() - started
        self.rows.append((label, seconds, peak, remark, sha256_of(self.output)))
        print(f"  {label}: {seconds:.1f} s, {remark}", file=sys.stderr)

    def undisturbed(self) -> tuple[int, str]:
        return self.run()[1], ""

    def killed_twice(self) -> tuple[int, str]:
        peaks, seen = [], []
        for shards in (4, 9):
            code, peak = self.run(kill_at=shards)
            assert code == -signal.SIGKILL, "it was through before it was killed"
            peaks.append(peak)
            seen.append(str(self.finished()))
        peaks.append(self.run()[1])
        return max(peaks), f"killed with {' and '.join(seen)} shards finished"

    def three_workers(self) -> tuple[int, str]:
        """Side by side; the peak is that of the largest."""
        running = [
            subprocess.Popen(self.command("--worker", f"{number}/3", "--threads", "1"))
            for number in (1, 2, 3)
        ]
        peaks = []
        for process in running:
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0
            process.returncode = 0
            peaks.append(usage.ru_maxrss * 1024)
        return max(peaks), "side by side, a thread each"

    def node_killed(self) -> tuple[int, str]:
        told = json.dumps([str(self.base), str(self.adapter), str(self.output)])
        step = [sys.executable, str(Path(__file__).resolve()), "--step", told]
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        peak, finished, again = done.stdout.split()[-3:]
        return int(peak), f"a node killed with {finished} shards finished, {again} of 16 tasks left"


def on_a_dying_cluster(base: str, adapter: str, output: str) -> None:
    """Merge on two nodes of one core, and kill one of them; prints the peak of a task's process."""
    import logging

    import psutil
    import ray
    from ray.cluster_utils import Cluster

    import loratool

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    killed, peaks = [], [0]

    def progress(done: int, total: int, name: str) -> None:
        for process in psutil.process_iter(["name", "memory_info"]):
            title = process.info["name"] or ""
            if title.startswith("ray::") and "IDLE" not in title:
                peaks.append(process.info["memory_info"].rss)
        if not killed and done > 0:
            finished = len(list(Path(output).parent.glob(".output.loratool-work/done/*.json")))
            cluster.remove_node(nodes[0], allow_graceful=False)
            killed.append((finished, 16 - finished))

    loratool.merge(base, adapter, output, ray=cluster.address, threads=1, progress=progress)
    ray.shutdown()
    cluster.shutdown()
    print(max(peaks), *killed[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=float, default=8.0, help="of the base in GB (8.0)")
    parser.add_argument("--shards", type=int, default=16, help="files of the base (16)")
    parser.add_argument("--no-ray", action="store_true", help="leave out Ray")
    parser.add_argument("--work", type=Path, help="keep the models here and use them again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        base = work / f"base-{args.size:g}GB-{args.shards}"
        adapter = work / f"adapter-{args.size:g}GB-r16"
        if not (base.exists() and adapter.exists()):  # by a process of its own: see `common`
            told = json.dumps([str(base), str(adapter), args.size, args.shards])
            step = [sys.executable, str(Path(__file__).resolve()), "--make", told]
            subprocess.run(step, check=True)
        trial = Trial(work, base, adapter)
        trial.note("undisturbed", trial.undisturbed)
        trial.note("killed twice, continued", trial.killed_twice)
        trial.note("three workers", trial.three_workers)
        if not args.no_ray:
            trial.note("Ray, two nodes, one killed", trial.node_killed)
        size = size_of(trial.output)
        shutil.rmtree(trial.output, ignore_errors=True)
        print(machine(work))
    print(f"\nBase: {size / 1e9:.2f} GB in {args.shards} shards; output the same.\n")
    print("| run | s | peak MB of a process | | sha256 of the output |\n|---|--:|--:|---|---|")
    for label, seconds, peak, remark, digest in trial.rows:
        print(f"| {label} | {seconds:.1f} | {peak / 1e6:.0f} | {remark} | {digest[:16]}… |")
    if len({digest for *_, digest in trial.rows}) > 1:
        sys.exit("the outputs differ")


def make(base: str, adapter: str, gigabytes: float, shards: int) -> None:
    """Write the models that are not there."""
    if not Path(base).exists():
        make_base(Path(base), gigabytes, shards)
    if not Path(adapter).exists():
        make_adapter(Path(adapter), gigabytes, 16)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make(*json.loads(sys.argv[2]))
    elif sys.argv[1:2] == ["--step"]:
        on_a_dying_cluster(*json.loads(sys.argv[2]))
    else:
        main()
