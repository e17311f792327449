"""Epochs of a training: chosen by the held-out error of the inner folds, and ended early by patience."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import pytest
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.heads import ALPHAS
from pekasc.models.selection._readout import choose_depth

Fit = Callable[..., pk.Adapter]


@pytest.mark.parametrize(("patience", "ran", "chosen"), [(1, 2, 1), (2, 5, 3), (None, 5, 3)])
def test_patience_ends_folds_early(
    sections: SpatialData, fit: Fit, monkeypatch: pytest.MonkeyPatch, patience: int | None, ran: int, chosen: int
) -> None:
    errors = {0: 1.0, 1: 0.5, 2: 0.9, 3: 0.1, 4: 0.1, 5: 0.1}
    epochs = iter([*range(ran + 1), *range(ran + 1)])  # of both folds

    def measured(features: Any, y: Any, folds: Any, n: Any, panels: Any = None) -> np.ndarray:
        return np.full((1, len(ALPHAS)), errors[next(epochs)])

    monkeypatch.setattr("pekasc.models.selection._student.held_out_errors", measured)
    adapter = fit(sections, recipe={"epochs": 5, "patience": patience})
    inner = adapter.history[adapter.history["fold"] >= 0]
    assert inner.groupby("fold")["epoch"].max().tolist() == [ran, ran]
    assert adapter.info["epochs"] == chosen
    # the last fit runs as long as was chosen
    assert adapter.history.loc[adapter.history["fold"] == -1, "epoch"].tolist() == list(range(1, chosen + 1))


def test_all_epochs_are_trained_where_none_is_chosen(sections: SpatialData, fit: Fit) -> None:
    adapter = fit(sections, recipe={"choose_epochs": False, "epochs": 2})
    assert adapter.info["epochs"] == 2
    # the held-out error is that of the last epoch, and of the frozen encoder
    inner = adapter.history[adapter.history["fold"] >= 0]
    assert inner["val_error"].notna().tolist() == [True, False, True] * 2
    chosen = adapter.selection[adapter.selection["stage"] == "adapter"]
    assert set(chosen["epochs"]) == {2}


def test_a_batch_size_larger_than_a_fold_is_the_fold(sections: SpatialData, fit: Fit) -> None:
    steps: list[int] = []

    class Count(L.Callback):
        """Count the steps of an epoch."""

        def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
            steps.append(trainer.num_training_batches)

    recipe: dict[str, Any] = {"epochs": 1, "choose_epochs": False}
    for batch_size, expected in ((5, [5, 5, 10]), (100, [1, 1, 1])):
        fit(sections, recipe={**recipe, "batch_size": batch_size}, compute={"trainer": {"callbacks": Count()}})
        assert steps == expected  # two folds of 24 spots, and all 48
        steps.clear()


def test_more_blocks_than_the_depth_that_was_chosen(
    sections: SpatialData, fit: Fit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def first(*args: Any) -> Any:
        return replace(choose_depth(*args), depth=(1,))

    monkeypatch.setattr("pekasc.models.selection._fit.choose_depth", first)
    caplog.set_level("INFO")
    adapter = fit(sections, readout={"depth": "all"}, recipe={"blocks": 2, "epochs": 1})
    assert adapter.depth == (1,)
    assert "Features are taken after block 1, so all of these blocks are adapted, not 2" in caplog.text
    # a depth of the user's own choice is another matter
    with pytest.raises(ValueError, match="`blocks=2` does not fit"):
        fit(sections, readout={"depth": 1}, recipe={"blocks": 2})


@pytest.mark.parametrize(("depth", "depths"), [("best", 1), ("all", 6)])
def test_frozen_members_of_a_blend_read_the_depths_of_the_readout(
    sections: SpatialData, fit: Fit, depth: str, depths: int
) -> None:
    readout = {"head": "blend", "members": ("frozen:low-rank", "adapted:ridge"), "depth": depth}
    adapter = fit(sections, readout=readout, recipe={"epochs": 1})
    read = adapter.selection[adapter.selection["stage"] == "reading"]
    assert read.groupby("network")["depth"].nunique().to_dict() == {"adapted": 1, "frozen": depths}
    # the adapter's depth is the one that plain ridge chose on frozen features
    first = adapter.selection[adapter.selection["stage"] == "frozen"]
    assert first["depth"].nunique() == 6
    assert first.loc[first["error"].idxmin(), "depth"] == adapter.info["depth"]
    assert set(read.loc[read["network"] == "adapted", "depth"]) == {adapter.info["depth"]}


def test_half_precision_learns_about_the_same(sections: SpatialData, fit: Fit) -> None:
    recipe = {"epochs": 1}
    full, half = fit(sections, recipe=recipe), fit(sections, recipe=recipe, compute={"precision": "bf16"})
    np.testing.assert_allclose(half.history["loss"], full.history["loss"], rtol=0.1)
    assert half.info["precision"] == "bf16"
    pk.tl.predict_expression(sections, half, progress=False, compute={"device": "cpu"})
    assert np.isfinite(sections["table"].layers["peka"]).any()
