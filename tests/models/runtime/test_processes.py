"""Several processes: each has its share, all learn what one learns, and all fail together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.runtime import _processes as processes

Fit = Callable[..., pk.Adapter]
CPU = torch.device("cpu")
RECIPE = {"choose_epochs": False, "n_views": 4, "refit": "both"}
# in one script, for a process takes seconds to import what it needs
TWO = """
import os, sys
from pekasc.models.runtime import _processes as processes
compute = {"resume": sys.argv[1] + "/state", "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}}
adapter = quick_fit(sdata, recipe=RECIPE, compute=compute)
rank = processes.rank()
adapter.save(f"{sys.argv[1]}/adapter-{rank}")
assert processes.n_ranks() == processes.n_on_machine() == 2
assert processes.all_gather(rank) == [0, 1] and processes.broadcast(rank) == 0
with processes.raise_together():
    pass
try:
    with processes.raise_together():
        if rank == 1:
            raise OSError("no room")
except (OSError, RuntimeError) as error:
    with open(f"{sys.argv[1]}/error-{rank}", "w") as file:
        file.write(f"{type(error).__name__} {error}")
"""


def states_of(adapter: pk.Adapter) -> list[dict[str, torch.Tensor]]:
    """Return the weights of the last adapter, and of those of the inner folds."""
    return [dict(adapter.weights["adapter"]), *(dict(weights) for _, weights in adapter.others)]


def test_two_processes_learn_what_one_learns_and_fail_together(
    sections: SpatialData, fit: Fit, fit_script: str, tmp_path: Path
) -> None:
    one = fit(sections, recipe=RECIPE)
    (tmp_path / "two.py").write_text(f"{fit_script}\nRECIPE = {RECIPE!r}\n{TWO}")
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(tmp_path / "two.py"), str(tmp_path)], env=env | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    made = [pk.Adapter.load(tmp_path / f"adapter-{rank}") for rank in (0, 1)]
    for two in made:
        columns = ["fold", "epoch", "loss", "kd", "sa", "val_error"]
        np.testing.assert_allclose(two.history[columns], one.history[columns], atol=1e-4)
        assert two.weights["adapter"].keys() == one.weights["adapter"].keys()
        for made_by_two, made_by_one in zip(states_of(two), states_of(one), strict=True):
            for name, tensor in made_by_one.items():
                np.testing.assert_allclose(made_by_two[name], tensor, atol=1e-4)
        assert two.trained_on.keys() == one.trained_on.keys()
        assert two.novelty is not None and one.novelty is not None
        known, alone = two.novelty.distance, one.novelty.distance
        assert known.faults.names == alone.faults.names and known.faults.names
        np.testing.assert_allclose(known.faults.weights, alone.faults.weights, rtol=1e-3, atol=1e-4)
    # to the bit, the call returns the same in every process
    for first, second in zip(states_of(made[0]), states_of(made[1]), strict=True):
        assert all(torch.equal(second[k], t) for k, t in first.items())
    pd.testing.assert_frame_equal(made[0].gene_scores, made[1].gene_scores)
    assert (tmp_path / "state" / "fold-1" / "done.json").exists()
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert errors == ["RuntimeError Another process failed (process 1: OSError: no room).", "OSError no room"]


def test_one_process_has_everything() -> None:
    assert (processes.n_ranks(), processes.rank(), processes.n_on_machine()) == (1, 0, 1)
    assert processes.broadcast("x") == "x" and processes.all_gather("x") == ["x"]
    assert not processes.owners(np.array(["a", "a", "b"]), np.arange(3)).any()
    with pytest.raises(OSError, match="no room"), processes.raise_together():
        raise OSError("no room")


def test_every_process_has_a_stretch_of_every_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "n_ranks", lambda: 2)
    sections = np.array(list("aaaabbbb"))
    order = np.array([3, 2, 1, 0, 4, 6, 5, 7])
    np.testing.assert_array_equal(processes.owners(sections, order), [1, 1, 0, 0, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"accelerator": "gpu", "devices": 7}, r"cannot be used: .*Available: "),
        ({"devices": 0, "accelerator": "cpu"}, r"cannot be used: "),
        ({"devices": [0], "accelerator": "cpu"}, r"cannot be used: .*Available: "),
        ({"devices": 2, "accelerator": "cpu", "strategy": "ddp_spawn"}, r"forks or spawns.*\"ddp\""),
    ],
)
def test_devices_that_cannot_be_had(trainer: dict[str, Any], message: str) -> None:
    if trainer["accelerator"] == "gpu" and torch.cuda.device_count() >= 7:
        pytest.skip("seven GPUs are there")
    with pytest.raises(ValueError, match=message):
        processes.launch(trainer, CPU)


def test_one_device_starts_nothing() -> None:
    assert processes.launch({"logger": False}, CPU) == (CPU, {"logger": False})
    device, trainer = processes.launch({"accelerator": "cpu", "logger": False}, CPU)
    assert (device, trainer) == (CPU, {"accelerator": "cpu", "devices": 1, "logger": False})
