"""The profile of a fit: every second in one stage, tiles counted, and what is shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.runtime._profile import STAGES, Profile, peak_memory, profile_text


def test_a_stage_inside_another_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 5.0, 5.5, 9.5, 10.0])
    monkeypatch.setattr("pekasc.models.runtime._profile.time.perf_counter", lambda: next(clock))
    profile = Profile()
    with profile.stage("training"):
        with profile.stage("encoding", 30):
            pass
        with profile.stage("encoding", 10):
            pass
    assert profile.seconds == {"reading": 0.0, "encoding": 7.0, "training": 3.0, "head": 0.0}
    assert profile.tiles["encoding"] == 40
    profile.saw_memory(5)
    profile.saw_memory(3)
    record = profile.record()
    assert record == {
        "seconds": {"reading": 0.0, "encoding": 7.0, "training": 3.0, "head": 0.0},
        "tiles_per_second": {"encoding": 40 / 7}, "peak_memory": 5,
    }  # fmt: skip
    assert profile_text(record) == ("reading 0 s, encoding 7 s (5.71 tiles/s), training 3 s, head 0 s; peak 0.00 GB")


def test_an_adapter_has_the_profile_of_its_fit(
    sections: SpatialData, fit: Callable[..., pk.Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[dict[str, int]] = []
    record = Profile.record

    def watched(self: Profile) -> dict[str, Any]:
        counted.append(dict(self.tiles))
        return record(self)

    monkeypatch.setattr(Profile, "record", watched)
    adapter = fit(sections, recipe={"choose_epochs": False, "epochs": 2, "n_views": 2})
    profile = adapter.info["profile"]
    assert tuple(profile["seconds"]) == STAGES and all(seconds > 0 for seconds in profile["seconds"].values())
    assert sections["table"].uns["pekasc"]["adapter"]["profile"] == profile
    assert "profile     reading " in repr(adapter) and " tiles/s)" in repr(adapter)
    # 48 spots are read; two folds and all spots are trained for two epochs; the frozen pass and the second orientation
    # of the activations are encoded, and all spots again at the end of each fold and of the last training
    assert counted[0] == {"reading": 48, "encoding": 48 * 2 + 48 * 3, "training": 2 * (24 + 24 + 48), "head": 0}
    trained = adapter.history[adapter.history["epoch"] > 0]
    assert (trained["peak_memory"] > 10**8).all() and profile["peak_memory"] >= trained["peak_memory"].max()
    frozen = fit(sections, method=None)
    assert frozen.info["profile"]["seconds"]["training"] == 0


def test_the_peak_of_the_cpu_is_that_of_the_process() -> None:
    first = peak_memory(torch.device("cpu"))
    assert 10**7 < first <= peak_memory(torch.device("cpu"))
