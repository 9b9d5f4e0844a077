"""Names, paths and configs that hold control characters, markup and line breaks, on a terminal."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import forked
from helpers.adapters import pair, write_adapter
from helpers.cli import run_cli
from safetensors.numpy import save_file

from loratool.text import is_printable, printable

#: Everything at once: a link, colours, the window's title, markup, lines, C1, bidi, the unseen.
EVIL = (
    "q\x1b]8;;http://x.y\x07\x1b[35;41m\x1b]0;pwned\x07[bold red][/]:smile:\nerror: forged\r"
    "\x9b35;41m\x08\x7f\u202e\u2066\u200b\u2028\U000e0041\\"
)
#: What must be seen of it, whole.
SHOWN = r"\x1b]8;;http:", r"\x1b[35;41m\x1b]0;pwned\x07[bold red][", r"\u200b"
#: PEFT's names have no line breaks in them; those of other tensors may.
LEAF = EVIL.replace("\n", "")
MODULE = f"model.layers.0.self_attn.{LEAF}"

#: `loratool ARGUMENTS` on a terminal of its own; prints its bytes and its exit code.
_ON_A_TERMINAL = """
import os, pty, sys
child, screen = pty.fork()
if child == 0:
    sys.stdout, sys.stderr = (open(n, "w", 1, encoding="utf-8", closefd=False) for n in (1, 2))
    from loratool.cli.main import main
    main(sys.argv[1:])
seen = b""
while True:
    try:
        data = os.read(screen, 65536)
    except OSError:
        break
    if not data:
        break
    seen += data
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), repr(seen))
"""

#: What Rich writes itself: colours, and the moves of a progress bar.
_RICH = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r")


def on_terminal(*arguments: object, code: str = _ON_A_TERMINAL) -> tuple[int, str]:
    """Exit code and screen of a run; no character of it does anything but what Rich means."""
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "800", "HF_HUB_OFFLINE": "1"}
    env.pop("NO_COLOR", None)
    done = forked.run_snippet(code, list(map(str, arguments)), env, Path.cwd())
    assert done.code == 0, done.err
    ended, _, seen = done.out.partition(" ")
    screen = eval(seen).decode()
    assert "35;41m" not in re.sub(r"\\x1b\[35;41m|\\u001b\[35;41m|\\x9b35;41m", "", screen)
    text = _RICH.sub("", screen)
    for line in text.split("\n"):
        assert is_printable(line), repr(line)
        assert not line.startswith("error: forged"), text
    assert "Traceback" not in text
    return int(ended), text


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an evil name with a base, a tuned model and two adapters that fit it."""
    place = tmp_path_factory.mktemp("names") / EVIL.replace("/", "_")
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((12, 10)).astype(np.float32)
    for name, change in (("base", 0.0), ("tuned", 1.0)):
        folder = place / name
        folder.mkdir(parents=True)
        delta = change * np.outer(rng.standard_normal(12), rng.standard_normal(10))
        state = {f"{MODULE}.weight": weight + delta.astype(np.float32),
                 f"{EVIL}.weight": np.ones(3, np.float32)}  # fmt: skip
        save_file(state, folder / "model.safetensors", metadata={EVIL: EVIL})
        config = {"model_type": EVIL, "architectures": [EVIL]}
        (folder / "config.json").write_text(json.dumps(config))
    for seed, name in enumerate(("one", "two")):
        config = {"target_modules": [LEAF], "base_model_name_or_path": EVIL, "task_type": EVIL,
                  "revision": EVIL}  # fmt: skip
        write_adapter(place / name, pair(MODULE, 12, 10, seed=seed), config)
    assert run_cli("merge", place / "base", place / "one", "-o", place / "merged",
                   "--reversible", "--dtype", "float32").exit_code == 0  # fmt: skip
    return place


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("inspect {}/one --full --tensors --spectrum --base {}/base", 0, SHOWN),
        ("merge {}/base {}/one {}/two -o {}/out --verify -v", 0, SHOWN),
        ("merge {}/base {}/one -o {}/none --dry-run", 0, SHOWN),
        ("verify {}/merged --base {}/base {}/one --full", 0, SHOWN),
        ("verify {}/base --base {}/base {}/one", 3, SHOWN),
        ("unmerge {}/merged {}/one -o {}/again", 0, SHOWN),
        ("combine {}/one {}/two -o {}/both --full", 0, SHOWN),
        ("resize {}/one --rank 2 -o {}/less --full", 0, SHOWN),
        ("compare {}/one {}/two --base {}/base --full", 0, SHOWN),
        ("extract {}/base {}/tuned -o {}/taken --rank 2 --full --spectrum", 0, SHOWN),
        ("lint {}/one --base {}/base", 0, ["q\\x1b"]),
        ("lint {}/one {}/two --together --for vllm", 0, ["vLLM"]),
        ("card {}/one --dry-run", 0, SHOWN),
        ("card {}/merged --dry-run", 0, SHOWN),
        ("push {}/one org/name --dry-run", 1, ["org/name"]),
        ("inspect {}/nothing", 1, ["nothing"]),
        ("inspect {}/one --layer {}", 2, ["Not a range"]),
        ("inspect {}/one --include {}", 2, ["No module matches"]),
        ("inspect {}/one --{}", 2, ["No such option"]),
        ("inspect {}/one {}", 1, SHOWN),
        ("card {}/one {}", 2, ["unexpected extra argument", *SHOWN]),
        ("{}", 2, ["No such command"]),
        ("merge {}/base {}/one -o {}/out --dtype {}", 2, ["is not one of"]),
    ],
)  # fmt: skip
def test_what_files_hold_does_nothing_to_a_terminal(
    line: str, code: int, said: Sequence[str], evil: Path
) -> None:
    """Every verb shows names of files with escapes, on one line, without their markup."""
    found, text = on_terminal(*(word.replace("{}", str(evil)) for word in line.split()))
    assert found == code, text
    assert all(part in text for part in said), text


#: Strings that reach the console as they are: printed, in tables, on a bar, in a message.
_FORGOTTEN = """
import sys
from loratool.errors import LoraToolError
from loratool.notices import Notice
from loratool import sheet
from loratool.rendering import drawing, terminal
evil = sys.argv[1]
raw = evil.replace("[/]", "").replace("\\n", "")
terminal.out.print(raw)
terminal.out.print(raw, markup=False, soft_wrap=True)
table = sheet.table_of(raw, "b", caption=raw)
table.add(raw, sheet.Toned(raw, "bad"))
facts = sheet.Facts([(raw, (raw, sheet.strong(raw)))])
drawing.draw(sheet.Sheet(raw, [facts, table, sheet.Sentence(raw), sheet.Line(raw)]))
grid = terminal.fact_grid()
grid.add_row(raw, raw)
terminal.out.print(grid)
error = LoraToolError("x")
error.message = error.hint = evil
terminal.print_error(error)
terminal.print_warnings([Notice("code", evil)])
with terminal.progress_bar(True, "merging") as advance:
    advance(1, 2, evil)
"""


def test_the_console_shows_nothing_raw() -> None:
    """A string that nobody made printable before is made so by the console, on bars too."""
    code = _ON_A_TERMINAL.replace(
        "from loratool.cli.main import main\n    main(sys.argv[1:])",
        f"exec({_FORGOTTEN!r})\n    os._exit(0)",
    )
    ended, text = on_terminal(EVIL, code=code)
    assert ended == 0
    assert text.count(SHOWN[0]) > 8
    assert re.search(r"\[bold red\]\[/\]:smile:.*━", text)  # the bar's


def test_warnings_and_refusals_name_the_field_printable(tmp_path: Path) -> None:
    """What a config holds stands in warnings and errors as one printable line."""
    folder = write_adapter(tmp_path / "a", pair(MODULE, 12, 10), {EVIL: EVIL})
    code, text = on_terminal("inspect", folder)
    assert code == 0
    assert r"\x1b]0;pwned" in text
    names = {LEAF: np.ones(1, np.float32), EVIL: np.ones(1, np.float32)}
    save_file(names, tmp_path / "x.safetensors", metadata={LEAF: "…", "…": LEAF})
    code, text = on_terminal("inspect", tmp_path / "x.safetensors", "--tensors")
    assert text.count(printable(LEAF)) == 2
    assert text.count(printable(EVIL)) == 1


def test_json_has_the_exact_names_and_no_control_character(evil: Path) -> None:
    """Programs get what is in the file; a terminal that shows the JSON obeys nothing in it."""
    done = run_cli("inspect", evil / "one", "--json")
    document = json.loads(done.stdout)
    assert [m["path"] for m in document["modules"]] == [MODULE]
    assert document["base_model"] == EVIL
    assert all(map(is_printable, done.stdout.split("\n")))
    failed = run_cli("inspect", evil / "nothing\x9b", "--json", HF_HUB_OFFLINE="1")
    assert failed.exit_code == 1
    assert is_printable(failed.stderr.rstrip("\n"))
    assert "nothing" in json.loads(failed.stderr)["message"]


def test_json_is_whole_where_a_terminal_has_ascii_alone(evil: Path) -> None:
    """No name becomes question marks in JSON."""
    code = (
        "import sys; sys.stdout.reconfigure(encoding='ascii'); sys.stderr.reconfigure("
        "encoding='ascii'); from loratool.cli.main import main; main(sys.argv[1:])"
    )
    arguments = ["inspect", str(evil / "one"), "--json"]
    done = forked.run_snippet(code, arguments, dict(os.environ), Path.cwd())
    assert json.loads(done.out)["modules"][0]["path"] == MODULE


def test_a_card_of_somebody_else_is_exact_in_a_pipe(tmp_path: Path) -> None:
    """`card --dry-run` gives the file byte for byte, but escaped on a terminal."""
    folder = write_adapter(tmp_path / "a", pair("q", 12, 10), {})
    card = "---\nlicense: mit\n---\nMine\x1b[35;41m\tcolour \x9b [bold]x[/] \u202e\r\n"
    (folder / "README.md").write_bytes(card.encode())
    done = forked.run_snippet(
        "import sys; from loratool.cli.main import main; main(sys.argv[1:])",
        ["card", str(folder), "--dry-run"], dict(os.environ), Path.cwd(),
    )  # fmt: skip
    assert "Mine\x1b[35;41m\tcolour \x9b [bold]x[/] \u202e" in done.out
    _, text = on_terminal("card", folder, "--dry-run")
    assert r"Mine\x1b[35;41m" in text
    assert r"colour \x9b [bold]x[/] \u202e" in text


def test_very_long_names_are_cut(tmp_path: Path) -> None:
    """A name of a megabyte takes a few lines, in tables and in errors, and no time."""
    long, name = "n" * 1_000_000, "n" * 4_000  # the longest that a tensor may have
    save_file({name: np.ones(1, np.float32)}, tmp_path / "x.safetensors", metadata={long: long})
    done = run_cli("inspect", tmp_path / "x.safetensors", "--tensors")
    assert done.exit_code == 0
    assert len(done.stdout) < 5_000
    folder = write_adapter(
        tmp_path / "a", pair(f"layers.0.{name}", 4, 4), {"base_model_name_or_path": long}
    )
    done = run_cli("inspect", folder, "--full")
    assert len(done.stdout) + len(done.stderr) < 10_000
