"""The scripts of docs/clusters.md, run by bash with stand-ins for what a cluster has."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()


def blocks(heading: str, language: str) -> list[str]:
    """Return the code blocks of a language under a heading."""
    (part,) = re.findall(rf"^##+ {heading}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a node, where `srun` runs a command, and `pekasc` writes down what it was asked for."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    scripts = {
        "srun": 'exec "$@"\n',
        "pekasc": f'printf "%s\\n" "task $SLURM_ARRAY_TASK_ID: $*" >> {tmp_path}/calls\n'
        f'while [ $# -gt 0 ]; do [ "$1" = --list ] && cat "$2" >> {tmp_path}/slides; shift; done\n',
    }
    for name, text in scripts.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{text}")
        (bin_ / name).chmod(0o755)
    (tmp_path / "slides.txt").write_text("".join(f"slide {i}.svs\n" for i in range(21)))
    return {**os.environ, "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}"}


def array(script: str, folder: Path, environment: dict[str, str], n_tasks: int = 8) -> list[str]:
    """Run a script once for each task of an array, and return the calls of pekasc."""
    (folder / "job.sh").write_text(script)
    for task in range(n_tasks):
        of_task = {**environment, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", "-eu", "job.sh"], cwd=folder, env=of_task, check=True)
    return (folder / "calls").read_text().splitlines()


def test_slurm_array(tmp_path: Path, cluster: dict[str, str]) -> None:
    (script,) = blocks("A Slurm array", "bash")
    (tasks,) = re.findall(r"^#SBATCH --array=0-(\d+)$", script, re.MULTILINE)
    calls = array(script, tmp_path, cluster, int(tasks) + 1)
    what = "predict --list slides.txt --adapter adapter --out predicted --compute device=cuda"
    assert calls == [f"task {i}: {what}" for i in range(8)]  # each has the whole list


def test_a_list_for_each_task_where_locks_do_not_hold(tmp_path: Path, cluster: dict[str, str]) -> None:
    split, job = blocks("File systems", "bash")[-1].splitlines()
    subprocess.run(["bash", "-eu", "-c", split], cwd=tmp_path, env=cluster, check=True)
    calls = array(job, tmp_path, cluster)
    assert [re.search(r"--out (\S+)", call)[1] for call in calls] == [f"predicted-{i}" for i in range(8)]
    # every slide in one of the lists
    assert (tmp_path / "slides").read_text() == (tmp_path / "slides.txt").read_text()


def test_whether_locks_hold(tmp_path: Path) -> None:
    command = blocks("File systems", "bash")[0].replace("sleep 60", "sleep 3")
    (tmp_path / "shared-folder").mkdir()
    first = subprocess.Popen(["bash", "-c", command], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    second = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert second.stdout == "locked by the other\n"
    first.wait()


def test_the_nextflow_process_asks_for_what_pekasc_has(tmp_path: Path) -> None:
    (workflow,) = blocks("Nextflow", "groovy")
    (script,) = re.findall(r'"""\n(.*?)"""', workflow, re.DOTALL)
    for name, value in (("slide", "a.svs"), ("adapter", "adapter")):
        script = script.replace(f"${{{name}}}", value)
    assert "$" not in script  # nothing is left for bash or Groovy
    from typer.testing import CliRunner

    from pekasc.cli import app

    arguments = script.split()
    assert arguments.pop(0) == "pekasc"
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2 and "adapter holds no adapter of pekasc" in " ".join(found.output.split())
    assert re.findall(r"path '(.*?)', emit", workflow) == ["*.zarr", "predictions/*.zarr"]
