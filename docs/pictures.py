"""Make the pictures of README and docs, from the fixtures: `python docs/pictures.py`."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from safetensors.numpy import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"

#: Pictures of charts, and the commands that draw them, in a folder with what `prepare` puts there.
PLOTS = {
    "resize": ["resize", "adapter", "--energy", "0.9", "--patterns", "-o", "small"],
    "inspect": ["inspect", "adapter", "--base", "base"],
    "compare": ["compare", "adapter", "tasks/html", "tasks/tables"],
    "extract": ["extract", "base", "tuned", "--rank", "8", "-o", "taken"],
    "verify": ["verify", "merged", "adapter", "--base", "base"],
}
#: Pictures of answers in a terminal of so many columns.
ANSWERS = {
    "list": (88, ["list", "loras"]),
    "lint": (88, ["lint", "tasks/html"]),
    "audit": (88, ["inspect", "loras/half-trained", "--audit"]),
}

#: A terminal with colours, whatever there is where this runs.
_TERMINAL = {"FORCE_COLOR": "1", "NO_COLOR": "", "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}

_WEIGHTS = "adapter_model.safetensors"
#: When the files of the list were written: a picture drawn anew shows the same.
_WRITTEN = 1_780_000_000


def prepare(folder: Path) -> None:
    """Links to the fixtures, a merged model, and adapters in all sorts of states to list."""
    for name in ("adapter", "base", "tasks", "tuned"):
        (folder / name).symlink_to(ROOT / "fixtures" / name)
    _run(folder, ["merge", "base", "adapter", "-o", "merged", "--dtype", "bfloat16", "-q"])
    loras = folder / "loras"
    for name, source in {
        "style": "adapter", "html": "tasks/html", "html-copy": "tasks/html",
        "tables": "tasks/tables", "half-trained": "adapter", "untrained": "adapter",
        "broken-off": "adapter",
    }.items():  # fmt: skip
        shutil.copytree(folder / source, loras / name)
    for name, layer in (("half-trained", "layers.3.self_attn.q_proj"), ("untrained", "")):
        file = loras / name / _WEIGHTS
        tensors = load_file(file)
        zeros = [key for key in tensors if f"{layer}.lora_B" in key or (not layer and "_B" in key)]
        save_file(tensors | {key: 0 * tensors[key] for key in zeros}, file, {"format": "pt"})
    with (loras / "broken-off" / _WEIGHTS).open("r+b") as stream:
        stream.truncate(200_000)
    _save_portrait(loras / "portrait.safetensors", load_file(folder / "tasks/html" / _WEIGHTS))
    for file in sorted(loras.rglob("*")):
        os.utime(file, (_WRITTEN, _WRITTEN))


def _save_portrait(file: Path, tensors: dict[str, object]) -> None:
    """Factors in kohya's names, with what its training script writes beside them."""
    named = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if found:
            side = {"A": "down", "B": "up"}[found[2]]
            named[f"lora_unet_{found[1].replace('.', '_')}.lora_{side}.weight"] = tensor
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": "4", "ss_network_alpha": "4",
        "ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "ohwx person",
    }  # fmt: skip
    save_file(named, file, metadata)


def draw(pictures: Path) -> None:
    """Write all pictures into a folder."""
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        prepare(folder)
        for name, command in PLOTS.items():
            _run(folder, [*command, "-q", "--plot", str(pictures.resolve() / f"{name}.svg")])
        for name, (columns, command) in ANSWERS.items():
            answer = _run(folder, command, **_TERMINAL, COLUMNS=str(columns))
            (pictures / f"{name}.svg").write_text(
                _terminal(answer, columns, command), encoding="utf-8"
            )


def _run(folder: Path, command: list[str], **settings: str) -> str:
    """What a command prints; 3 is the exit status of an answer that is "no"."""
    done = subprocess.run(
        [sys.executable, "-m", "loratool", *command],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    return done.stdout


def _terminal(answer: str, columns: int, command: list[str]) -> str:
    """A terminal with an answer in it, in whatever font for code there is: nothing is fetched."""
    console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(answer))
    frame = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    frame = frame.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    title = " ".join(["loratool", *command])
    return console.export_svg(title=title, code_format=frame, unique_id="terminal")


if __name__ == "__main__":
    draw(PICTURES)
