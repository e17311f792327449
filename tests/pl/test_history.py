from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import pekasc as pk


def _adapter(chosen: int = 3) -> Any:
    rows = []
    for fold, name in enumerate(("A", "B")):
        for epoch in range(6):
            loss = np.nan if epoch == 0 else 2.0 / epoch
            error = 0.9 + 0.01 * (epoch - 3) ** 2 + 0.1 * fold
            rows.append((fold, name, epoch, loss, 2 * loss, 3 * loss, error))
    rows += [(-1, "", epoch, 1.0 / epoch, 2.0 / epoch, 3.0 / epoch, np.nan) for epoch in range(1, chosen + 1)]
    columns = ["fold", "held_out", "epoch", "loss", "kd", "sa", "val_error"]
    return SimpleNamespace(history=pd.DataFrame(rows, columns=columns), info={"epochs": chosen})


def test_losses_of_every_fit() -> None:
    losses, _ = pk.pl.history(_adapter())
    drawn = [line for line in losses.lines if len(line.get_xdata())]
    assert len(drawn) == 3 * 3  # loss, distillation, structure alignment of two folds and the final fit
    final = [line for line in drawn if len(line.get_xdata()) == 3]
    np.testing.assert_allclose([line.get_ydata()[0] for line in final], [1, 2, 3])
    assert min(line.get_linewidth() for line in final) > max(
        line.get_linewidth() for line in drawn if line not in final
    )
    assert losses.get_ylim()[0] == 0


def test_held_out_error_and_the_epoch_chosen() -> None:
    _, ax = pk.pl.history(_adapter())
    curves = {line.get_label(): line for line in ax.lines}
    mean = curves["mean of held-out groups"]
    np.testing.assert_allclose(mean.get_ydata(), 0.95 + 0.01 * (np.arange(6) - 3) ** 2)
    point = curves["chosen: epoch 3"]
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([3], [pytest.approx(0.95)])
    assert [text.get_text() for text in ax.texts] == ["A", "B"]


def test_no_epoch_chosen_is_epoch_0() -> None:
    _, ax = pk.pl.history(_adapter(chosen=0))
    assert "chosen: epoch 0" in [line.get_label() for line in ax.lines]


def test_draws_on_the_axes_given() -> None:
    _, given = plt.subplots(1, 2)
    drawn = pk.pl.history(_adapter(), axes=tuple(given))
    assert list(drawn) == list(given)
    assert len(plt.get_fignums()) == 1


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="Nothing was trained: this adapter is a frozen encoder"):
        pk.pl.history(SimpleNamespace(history=pd.DataFrame()))
    with pytest.raises(TypeError, match="Expected an Adapter, got str"):
        pk.pl.history("adapter")
    assert not plt.get_fignums()
