"""docs/scale.md shows what is printed, and the files of docs/scale make a whole output."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import yaml
from helpers import forked
from helpers.cli import run_cli
from helpers.places import FIXTURES, ROOT

DOCUMENT = ROOT / "docs" / "scale.md"
FILES = ROOT / "docs" / "scale"

#: Hands its arguments over to `Calls`, and is what comes of them: the shell waits for a real run,
#: which has been forked and not begun anew.
LORATOOL = r"""#!/bin/bash
call=$(mktemp -d "$CALLS/new-XXXXXX")
printf '%s\0' "$PWD" "$@" > "$call/words"
ready=${call/new-/call-}
mv "$call" "$ready"
until [ -e "$ready/code" ]; do sleep 0.02; done
cat "$ready/out"
cat "$ready/err" >&2
exit "$(cat "$ready/code")"
"""

#: A job step on this node.
SRUN = r"""#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""

#: What is left of the options is the host; what comes then is one line for a shell over there.
SSH = r"""#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == -o ]] && shift; shift; done
echo "$1" >> "$CALLS/hosts"
[[ "$1" == lost* ]] && exit 255
shift
cd / && exec bash -c "$*"
"""


class Calls:
    """A PATH on which `loratool`, `srun` and `ssh` do here what they do elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: The arguments of each run, and its exit code.
        self.made: list[tuple[list[str], int]] = []
        self._ended = threading.Event()

    def __enter__(self) -> Calls:
        programs = self.folder / "bin"
        programs.mkdir(parents=True)
        for name, text in {"loratool": LORATOOL, "srun": SRUN, "ssh": SSH}.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _serve(self) -> None:
        while not self._ended.is_set():
            for call in sorted(self.folder.glob("call-*")):
                if not (call / "code").exists():
                    self._run(call)
            time.sleep(0.02)

    def _run(self, call: Path) -> None:
        place, *words = (call / "words").read_text().rstrip("\0").split("\0")
        done = forked.run(words, os.environ, Path(place))
        self.made.append((words, done.code))
        (call / "out").write_text(done.out)
        (call / "err").write_text(done.err)
        (call / "being-written").write_text(str(done.code))
        (call / "being-written").rename(call / "code")

    def run(self, *command: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        """A command with this PATH, and these environment variables more."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "CALLS": str(self.folder), **settings}
        return subprocess.run(
            list(command), env=env, cwd=self.folder, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def calls(tmp_path: Path) -> Iterator[Calls]:
    with Calls(tmp_path / "calls") as made:
        yield made


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one run on one machine."""
    output = tmp_path_factory.mktemp("single") / "merged"
    done = run_cli("merge", FIXTURES / "base", FIXTURES / "adapter", "-o", output)
    assert done.exit_code == 0, done.stderr
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def places(output: Path) -> dict[str, str]:
    """Where the files of docs/scale are told that base, adapter and output are."""
    return {
        "BASE": str(FIXTURES / "base"),
        "ADAPTER": str(FIXTURES / "adapter"),
        "OUTPUT": str(output),
    }


def read_yaml(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FILES / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["slurm.sh", "ssh.sh"])
def test_scripts_are_bash(name: str) -> None:
    """They parse, and can be run as they are copied."""
    path = FILES / name
    subprocess.run(["bash", "-n", path], check=True)
    assert path.read_text(encoding="utf-8").startswith("#!/bin/bash\n")
    assert os.access(path, os.X_OK)


def test_slurm_reads_the_options_of_the_array() -> None:
    """sbatch reads options up to the first command, and those here make a share be repeated."""
    lines = (FILES / "slurm.sh").read_text(encoding="utf-8").splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert all(not line.startswith("#SBATCH") for line in lines[first:])
    assert {"--array=1-8", "--requeue", "--open-mode=append"} <= set(options)
    assert "--output=loratool-%A_%a.log" in options


def test_the_tasks_of_a_slurm_array_make_the_output(
    calls: Calls, tmp_path: Path, single: dict[str, bytes]
) -> None:
    """In any order; a task that is repeated afterwards has nothing to do, and says so."""
    output = tmp_path / "of an array"
    array = {"SLURM_ARRAY_TASK_COUNT": "3", "SLURM_CPUS_PER_TASK": "2"}
    for task in ("2", "3", "1", "2"):
        done = calls.run(
            "bash", FILES / "slurm.sh", SLURM_ARRAY_TASK_ID=task, **array, **places(output)
        )
        assert done.returncode == 0, done.stderr
        assert output.exists() == (task in ("1", "2") and len(calls.made) > 2)
    assert "completed by another worker" in done.stdout
    assert calls.made[0][0][-4:] == ["--threads", "2", "--worker", "2/3"]
    assert contents(output) == single


def test_a_part_of_a_slurm_array_keeps_its_shares(
    calls: Calls, tmp_path: Path, single: dict[str, bytes]
) -> None:
    """Where some tasks are submitted again, the number of shares is said."""
    output = tmp_path / "merged"
    for task, count in (("1", "3"), ("2", "2"), ("3", "2")):
        done = calls.run(
            "bash", FILES / "slurm.sh", SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT=count,
            SHARES="3", **places(output),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert contents(output) == single


def test_hosts_by_ssh_make_the_output(
    calls: Calls, tmp_path: Path, single: dict[str, bytes]
) -> None:
    """Names with spaces arrive whole. A lost host is named, and the rest make its share."""
    output = tmp_path / "of three hosts"
    done = calls.run("bash", FILES / "ssh.sh", "one", "lost", "three", **places(output))
    assert done.returncode == 1
    assert "failed on: lost" in done.stderr
    assert not output.exists()
    done = calls.run("bash", FILES / "ssh.sh", "one", "three", **places(output))
    assert done.returncode == 0, done.stderr
    hosts = (calls.folder / "hosts").read_text().split()
    assert sorted(hosts) == sorted(["one", "lost", "three", "one", "three"])
    for host in ("one", "three"):
        assert "28 merged" in (calls.folder / f"loratool-{host}.log").read_text()
    assert contents(output) == single
    assert calls.run("bash", FILES / "ssh.sh").returncode == 2


def test_the_kubernetes_job_repeats_its_indexes() -> None:
    """An Indexed Job whose shares are as many as its workers, on a volume that all may write."""
    claim, job = read_yaml("kubernetes.yaml")
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"  # what backoffLimitPerIndex and podFailurePolicy want
    assert spec["backoffLimitPerIndex"] > 0
    assert spec["completions"] == spec["parallelism"] == int(environment(pod)["WORKERS"])
    lost, wrong = spec["podFailurePolicy"]["rules"]
    assert lost == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    (container,) = pod["containers"]
    assert wrong["onExitCodes"] == {
        "containerName": container["name"], "operator": "In", "values": [2],
    }  # fmt: skip
    (volume,) = pod["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/models"}]
    assert all(environment(pod)[name].startswith("/models/") for name in places(Path()))


def environment(pod: dict[str, Any]) -> dict[str, str]:
    """The variables of a pod's container, all of them text."""
    found = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    assert all(isinstance(value, str) for value in found.values())
    return found


def test_the_indexes_of_a_kubernetes_job_make_the_output(
    calls: Calls, tmp_path: Path, single: dict[str, bytes]
) -> None:
    """The container's command, with its environment; indexes begin at 0."""
    pod = read_yaml("kubernetes.yaml")[1]["spec"]["template"]["spec"]
    container, output = pod["containers"][0], tmp_path / "of a job"
    settings = environment(pod) | places(output) | {"WORKERS": "3", "THREADS": "1"}
    for index in range(3):
        assert not output.exists()
        done = calls.run(
            *container["command"], *container["args"], JOB_COMPLETION_INDEX=str(index), **settings
        )
        assert done.returncode == 0, done.stderr
    assert contents(output) == single


def test_the_skypilot_task_is_one_of_many_nodes() -> None:
    """Its nodes write one volume, which is no bucket."""
    (task,), (volume,) = read_yaml("skypilot.yaml"), read_yaml("skypilot-volume.yaml")
    assert task["num_nodes"] == 8
    assert task["volumes"] == {"/models": volume["name"]}
    assert "file_mounts" not in task
    assert task["resources"]["infra"] == volume["infra"] == "k8s"
    assert volume["type"] == "k8s-pvc"
    assert volume["config"]["access_mode"] == "ReadWriteMany"
    assert task["envs"].keys() == places(Path()).keys()


def test_the_nodes_of_a_skypilot_task_make_the_output(
    calls: Calls, tmp_path: Path, single: dict[str, bytes]
) -> None:
    """The run section is a script of bash; ranks begin at 0."""
    (task,), output = read_yaml("skypilot.yaml"), tmp_path / "of nodes"
    for rank in (2, 0, 1):
        assert not output.exists()
        done = calls.run(
            "bash", "-c", task["run"], SKYPILOT_NODE_RANK=str(rank), SKYPILOT_NUM_NODES="3",
            **places(output),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert contents(output) == single


def test_the_ray_job_ends_with_its_command() -> None:
    """A RayJob whose head and workers have the volume and one image, and loratool's own options."""
    (job,) = read_yaml("kuberay.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    for group, pod in zip(groups, pods, strict=True):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        mount = {"name": pod["volumes"][0]["name"], "mountPath": "/models"}
        assert pod["containers"][0]["volumeMounts"] == [mount]
    program, *words = shlex.split(spec["entrypoint"])
    assert program == "loratool"
    from loratool.cli.main import cli

    context = cli.commands[words[0]].make_context(words[0], words[1:])
    assert context.params["ray"] == "auto"
    assert str(context.params["output"]) == "/models/merged"


@pytest.mark.ray
def test_the_entrypoint_of_the_ray_job_makes_the_output(
    tmp_path: Path, single: dict[str, bytes]
) -> None:
    """On a cluster of this machine, in place of the one that KubeRay would have begun."""
    (job,), output = read_yaml("kuberay.yaml"), tmp_path / "merged"
    words = job["spec"]["entrypoint"].replace("--ray=auto", "--ray=local")
    for name, path in (("base", FIXTURES), ("adapter", FIXTURES), ("merged", tmp_path)):
        words = words.replace(f"/models/{name}", shlex.quote(str(path / name)))
    arguments = [sys.executable, "-m", *shlex.split(words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert contents(output) == single


# ------------------------------------------------------------------------------ the document

#: Runs a command that gets a SIGINT before its second file, when the first one is finished.
INTERRUPTED = """
import os, signal, sys, time
import loratool.cli.main
import loratool.streams.shards as shards
from loratool.storage.journal import Journal

finished = []
enter = Journal.enter
Journal.enter = lambda *of: finished.append(enter(*of))
begun = []

class Writer(shards.ShardWriter):
    def __init__(self, *of):
        begun.append(of)
        if len(begun) == 2:
            while not finished:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        super().__init__(*of)

shards.ShardWriter = Writer
sys.exit(loratool.cli.main.main(sys.argv[1:]))
"""


def sessions() -> list[list[tuple[str, str]]]:
    """The sessions of the document: commands, each with what it shows."""
    found = []
    for session in re.findall(r"```console\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL):
        steps = [step.partition("\n") for step in session.split("$ ")[1:]]
        found.append([(command, shown) for command, _, shown in steps])
    return found


def test_the_sessions_are_what_is_printed(tmp_path: Path) -> None:
    """In their order, each session in a folder of its own; ^C is one."""
    shown = sessions()
    assert len(shown) == 3
    for number, session in enumerate(shown):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "fixtures").symlink_to(FIXTURES)
        for command, text in session:
            assert plain(run_step(command, text, place), place) == plain(text, place), command


def run_step(command: str, text: str, place: Path) -> str:
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    if program != "loratool":
        return subprocess.run(
            [program, *arguments], cwd=place, capture_output=True, text=True, check=True
        ).stdout
    env = {**os.environ, "COLUMNS": "80"}
    if text.startswith("^C"):
        done = forked.run_snippet(INTERRUPTED, arguments, env, place)
        assert done.code == 130
        return f"^C\n{done.out}{done.err}"
    done = forked.run(arguments, env, place)
    assert (done.code == 0) == ("error: " not in text)
    return done.out + done.err


def plain(text: str, place: Path) -> str:
    """Without times, spaces at the ends, empty lines and this test's folder."""
    text = text.replace(str(place), "/data")
    text = re.sub(r"\d+\.\d s\b", "… s", text)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


def test_files_are_linked_and_links_lead_somewhere() -> None:
    """Every file of docs/scale is named in the document, and no other."""
    targets = re.findall(r"\]\(([^)#:]+)\)", DOCUMENT.read_text(encoding="utf-8"))
    assert all((DOCUMENT.parent / target).exists() for target in targets)
    named = {target.removeprefix("scale/") for target in targets if target.startswith("scale/")}
    assert named == {path.name for path in FILES.iterdir()}


def test_the_tables_are_those_of_the_model() -> None:
    """docs/scale_model.py computes them; writing them again changes nothing."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from scale_model import whole
    finally:
        sys.path.pop(0)
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == whole(text)
