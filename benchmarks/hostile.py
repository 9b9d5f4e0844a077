"""Hostile and unlucky runs by the thousand: what is tried, and what holds.

Prints Markdown, which docs/reliability.md has between its markers; `--write` puts it there. Every
campaign says what "held" means for it. What does not hold is printed with all it takes to see it
again, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import machine  # noqa: E402
from helpers import faults, forked  # noqa: E402
from helpers.files import random_of, read_pickled, small_lora, small_state, write_base  # noqa: E402
from helpers.outcomes import beside, sha256s  # noqa: E402
from safetensors import deserialize  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import loratool  # noqa: E402
from loratool.errors import LoraToolError  # noqa: E402
from loratool.storage.header import read_header  # noqa: E402
from loratool.storage.values import read_raw  # noqa: E402
from loratool.text import is_printable  # noqa: E402

BEGIN, END = "<!-- hostile:begin -->\n", "<!-- hostile:end -->\n"


@dataclass
class Campaign:
    """`run` yields "" for a try that held, and what is wrong for one that did not."""

    name: str
    held: str
    run: Callable[[Path, random.Random, float], Iterator[str]]
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


# ---------------------------------------------------------------------------------- the disk


class Place:
    """A base, a tuned base, adapters, and for each command what it should make."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "parent"
        state = small_state()
        base, lora = write_base(self.folder / "base", state), small_lora(self.folder / "lora")
        (base / "tokenizer.json").write_text("{}")
        tuned = {k: v + 0.1 * random_of(v.dtype, *v.shape) for k, v in state.items()}
        write_base(self.folder / "tuned", tuned)
        merged = self.folder / "merged"
        loratool.merge(base, lora, merged, dtype="float32", reversible=True)
        self.out = self.folder / "out"
        end = ["-o", str(self.out), "--overwrite"]
        self.commands = {
            "merge": ["merge", str(base), str(lora), *end],
            "merge --reversible": ["merge", str(base), str(lora), "--reversible", *end],
            "unmerge": ["unmerge", str(merged), str(lora), *end],
            "combine": ["combine", str(lora), str(lora), *end],
            "resize": ["resize", str(lora), "--rank", "1", *end],
            "extract": ["extract", str(base), str(self.folder / "tuned"), "--rank", "2", *end],
        }
        self.old = folder / "old"
        loratool.merge(base, lora, self.old, dtype="bfloat16")
        self.inputs = self._inputs()

    def reset(self) -> None:
        for path in (self.out, *(self.folder / name for name in beside(self.out))):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.old, self.out)

    def wanted(self, command: list[str]) -> dict[str, str]:
        """What the output of a command is."""
        self.reset()
        done = forked.run(command, os.environ, self.folder)
        assert done.code == 0, done.err
        return sha256s(self.out)

    def judge(self, new: dict[str, str], ended: forked.Ended) -> str:
        """ "" where the output is the old or the new one, and what was said of it is true."""
        found, old = sha256s(self.out) if self.out.is_dir() else {}, sha256s(self.old)
        if found not in (old, new):
            return f"the output is neither the old nor the new one: {sorted(found)}"
        if "Traceback" in ended.err:
            return f"a traceback: {ended.err[-300:]}"
        complete = "is complete" in ended.err or ended.code == 0
        if ended.code >= 0 and complete != (found == new):
            return f"not true: exit {ended.code}, {ended.err[:300]}"
        if ended.code == 1 and ended.err.count("error:") != 1:
            return f"not one error: {ended.err[:300]}"
        if self._inputs() != self.inputs:
            return "an input changed"
        return ""

    def _inputs(self) -> list[dict[str, str]]:
        return [sha256s(self.folder / n) for n in ("base", "lora", "tuned", "merged")]


def failing_calls(folder: Path, chance: random.Random, share: float) -> Iterator[str]:
    """Every system call of every command that writes fails once."""
    place, library = Place(folder), faults.build(folder)
    for name, command in place.commands.items():
        new = place.wanted(command)
        place.reset()
        _, counts = faults.count_calls(library, command, place.folder)
        for kind, count in counts.items():
            for number in range(1, count + 1):
                if chance.random() >= share:
                    continue
                place.reset()
                ended = faults.run_failing(library, command, place.folder, kind, number)
                wrong = place.judge(new, ended)
                yield wrong and f"{name}, {kind} {number}: {wrong}"


def kills(folder: Path, chance: random.Random, share: float) -> Iterator[str]:
    """SIGKILL at a random moment of an overwrite; then the command once more."""
    place = Place(folder)
    command = place.commands["merge --reversible"]
    new = place.wanted(command)
    for _ in range(round(400 * share)):
        place.reset()
        delay = chance.uniform(0, 0.25)
        code = (
            "import os, signal, sys, threading, time\n"
            f"threading.Thread(target=lambda: (time.sleep({delay}), os.kill(os.getpid(), "
            f"{signal.SIGKILL:d})), daemon=True).start()\n"
            "from loratool.cli.main import main; main(sys.argv[1:])"
        )
        ended = forked.run_snippet(code, command, os.environ, place.folder)
        wrong = place.judge(new, ended) if ended.code < 0 else ""
        again = forked.run(command, os.environ, place.folder)
        if not wrong and (again.code or sha256s(place.out) != new or beside(place.out)):
            wrong = f"the next run: {again.err[:300]} {beside(place.out)}"
        yield wrong and f"killed after {delay:.3f} s: {wrong}"


def changes(folder: Path, chance: random.Random, share: float) -> Iterator[str]:
    """A random file of the base or of the adapter is rewritten or exchanged while it is read."""
    state = {
        f"model.layers.{i}.mlp.up_proj.weight": random_of(torch.float32, 512, 512, seed=i)
        for i in range(12)
    }
    origin = folder / "origin"
    write_base(origin / "base", small_state(), state)
    (origin / "base" / "tokenizer.json").write_text("{ }")
    small_lora(origin / "lora")
    loratool.merge(origin / "base", origin / "lora", folder / "wanted")
    wanted = sha256s(folder / "wanted")
    files = [p.relative_to(origin) for p in sorted(origin.rglob("*")) if p.is_file()]
    for number in range(round(400 * share)):
        place = shutil.copytree(origin, folder / f"run{number}")
        victim, exchanged = place / chance.choice(files), chance.random() < 0.5
        moment, seen = chance.randrange(13_000_000), []

        def change(done: int, *_: object, victim: Path = victim, exchanged: bool = exchanged,
                   moment: int = moment, seen: list[int] = seen) -> None:  # fmt: skip
            if done >= moment and not seen:
                seen.append(done)
                data = bytearray(victim.read_bytes())
                data[len(data) // 2] ^= 1
                if exchanged:
                    victim.with_name("other").write_bytes(data)
                    os.replace(victim.with_name("other"), victim)
                else:
                    victim.write_bytes(data)

        wrong = ""
        try:
            loratool.merge(place / "base", place / "lora", place / "out", progress=change)
            if sha256s(place / "out") != wanted:
                wrong = "another result with exit 0"
        except LoraToolError:
            if (place / "out").exists() or beside(place / "out"):
                wrong = "something is left"
        yield wrong and f"{victim.relative_to(place)} after {moment} bytes: {wrong}"
        shutil.rmtree(place)


# ---------------------------------------------------------------------------------- files


def edited(data: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, inserted, cut out or repeated."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5, 20])):
        at, size = chance.randrange(len(changed) + 1), chance.choice([1, 1, 2, 4, 8, 50])
        kind = chance.randrange(4)
        if kind == 0:
            changed[at : at + size] = chance.randbytes(min(size, len(changed) - at))
        elif kind == 1:
            changed[at:at] = chance.randbytes(size)
        elif kind == 2:
            del changed[at : at + size]
        else:
            changed[at:at] = changed[at : at + size] * chance.choice([1, 2, 100])
    return bytes(changed)


def outcome(path: Path, read: Callable[[Path], None]) -> str:
    """ "" where a file is read, or refused in words."""
    try:
        read(path)
    except LoraToolError:
        return ""
    except Exception as error:
        return f"{path.read_bytes()!r}: {type(error).__name__}: {error}"
    return ""


def headers(folder: Path, chance: random.Random, share: float) -> Iterator[str]:
    """Mutated safetensors files; the length at the beginning is mended in half of them."""
    path = folder / "x.safetensors"
    save_file(small_state(4), path, metadata={"format": "pt"})
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for number in range(round(10_000 * share)):
        head = edited(content[8:end], chance) if number % 2 else edited(content[:end], chance)
        data = len(head).to_bytes(8, "little") + head if number % 2 else head
        path.write_bytes(data + content[end:])
        yield outcome(path, _as_the_reference)


def _as_the_reference(path: Path) -> None:
    found = read_header(path)[0]
    assert found.keys() == dict(deserialize(path.read_bytes())).keys(), "other tensors"


def pickles(folder: Path, chance: random.Random, share: float) -> Iterator[str]:
    """Mutated torch files of both layouts, and mutated pickles in whole archives."""
    value = {"w": torch.arange(6.0), "n": {"t": random_of(torch.float16, 3, 2).T, "k": [1, "a"]}}
    kinds = {}
    for zipped in (True, False):
        torch.save(value, folder / "s.bin", _use_new_zipfile_serialization=zipped)
        kinds[zipped] = (folder / "s.bin").read_bytes()
    torch.save(value, folder / "s.bin")
    with zipfile.ZipFile(folder / "s.bin") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in entries if name.endswith("data.pkl"))
    path = folder / "x.bin"
    for number in range(round(10_000 * share)):
        if number % 2:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in entries.items():
                    data = edited(content, chance) if name == pickled else content
                    archive.writestr(name, data)
        else:
            path.write_bytes(edited(kinds[number % 4 == 0], chance))
        yield outcome(path, _every_tensor)


def _every_tensor(path: Path) -> None:
    for info in read_pickled(path)[0].values():
        if info.numel < 1000:
            read_raw(info)


def names(folder: Path, chance: random.Random, share: float) -> Iterator[str]:
    """Random characters, control characters among them, in names of tensors and in configs."""
    odd = [chr(i) for i in (*range(32), *range(127, 160), 0x202E, 0x2066, 0x200B, 0x2028, 0xE0041)]
    for _ in range(round(400 * share)):

        def text() -> str:
            common = (chr(chance.randrange(32, 0xD800)) for _ in range(8))
            mixed = [*chance.sample(odd, 6), *common, "[red]", "\\", "\x1b[31m", "\x1b]0;x\x07"]
            chance.shuffle(mixed)
            return "".join(mixed)

        place = folder / "adapter"
        shutil.rmtree(place, ignore_errors=True)
        lora = small_lora(place)
        config = json.loads((lora / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": text(), "target_modules": [text(), "q_proj"]}
        (lora / "adapter_config.json").write_text(json.dumps(config))
        tensors = {f"{text()}.lora_A.weight": torch.ones(2, 4), text(): torch.ones(3)}
        tensors[next(iter(tensors)).replace("lora_A", "lora_B")] = torch.ones(4, 2)
        save_file(tensors, lora / "adapter_model.safetensors", metadata={text(): text()})
        wrong = ""
        for command in (["inspect", str(lora), "--full", "--tensors"],
                        ["inspect", str(lora), "--json"], ["card", str(lora), "--dry-run"],
                        ["merge", str(lora), str(lora), "-o", str(folder / "out")]):  # fmt: skip
            ended = forked.run(command, os.environ, folder)
            seen = (ended.out + ended.err).replace("\n", "")
            if not is_printable(seen) or "Traceback" in seen or ended.code not in (0, 1):
                wrong = f"{command[0]}: {ended.code} {seen[:300]!r}"
        yield wrong


def fields(folder: Path, chance: random.Random, share: float) -> Iterator[str]:
    """Values of wrong types in every field of every JSON file, each before every verb."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hostile", "-p", "no:cacheprovider",
               "tests/adapters/test_wrong_types.py"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.path.insert(0, str(ROOT / "tests" / "adapters"))
    from test_wrong_types import CASES, VALUES

    failed = done.stdout.count("FAILED ")
    for number in range(len(CASES) * len(VALUES)):
        yield "" if number or not done.returncode else f"{failed} fields: {done.stdout[-2000:]}"


CAMPAIGNS = [
    Campaign("failing system calls", "the output is the old or the new one, whole, and what is "
             "said of it is so", failing_calls),
    Campaign("SIGKILL in an overwrite", "the output is the old or the new one, and the next run "
             "succeeds and leaves nothing beside it", kills),
    Campaign("inputs that change while they are read", "an error and nothing written, or the "
             "result of the unchanged inputs", changes),
    Campaign("mutated safetensors files", "one error, or the tensors that the reference library "
             "finds", headers),
    Campaign("mutated torch files", "one error, or tensors inside of the file", pickles),
    Campaign("odd characters in names", "none of them reaches the terminal", names),
    Campaign("values of wrong types in fields", "one error that names the field, or the result as "
             "without it, from every verb", fields),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="run this share of each campaign")
    parser.add_argument("--only", help="only campaigns whose name has this in it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md")
    asked = parser.parse_args()
    chosen = [c for c in CAMPAIGNS if not asked.only or asked.only in c.name]
    for campaign in chosen:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            for wrong in campaign.run(Path(folder), random.Random(asked.seed), asked.share):
                campaign.tried += 1
                if wrong:
                    campaign.wrong.append(wrong)
                    print(f"{campaign.name}: {wrong}", file=sys.stderr)
        campaign.seconds = time.monotonic() - started
        print(f"{campaign.name}: {campaign.tried} tried, {len(campaign.wrong)} did not hold, "
              f"{campaign.seconds:.0f} s", file=sys.stderr)  # fmt: skip
    lines = ["| what was done | tried | held | what held means |", "|---|--:|--:|---|"]
    lines += [f"| {c.name} | {c.tried:,} | {c.tried - len(c.wrong):,} | {c.held} |" for c in chosen]
    text = (
        f"{machine(Path.cwd())}, numpy {np.__version__}; seed {asked.seed}.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    print(text)
    if asked.write:
        page = ROOT / "docs" / "reliability.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        page.write_text(before + BEGIN + text + END + rest.partition(END)[2], encoding="utf-8")
    return int(any(c.wrong for c in chosen))


if __name__ == "__main__":
    sys.exit(main())
