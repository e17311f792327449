from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

import pekasc as pk
from pekasc.models.trust import EDGES

GROUPS = ("A", "B", "$C_1$")


def _adapter(*powers: float, level: float | None = None) -> Any:
    """Return an adapter whose groups cover level ** power of their measurements."""
    curve = np.array([EDGES**power for power in powers], dtype=np.float32)
    held_out = SimpleNamespace(curve=curve, groups=GROUPS[: len(powers)])
    return SimpleNamespace(held_out=held_out, calibration=None if level is None else SimpleNamespace(level=level))


def _lines(ax: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in ax.lines}


def test_a_line_for_each_group_and_their_mean() -> None:
    ax = pk.pl.calibration(_adapter(1.0, 2.0, 0.5))
    lines = _lines(ax)
    assert set(lines) >= {"B: covered least", "each of the others", "mean of 3 held-out groups"}
    np.testing.assert_allclose(lines["B: covered least"].get_ydata(), EDGES**2, atol=1e-6)
    mean = lines["mean of 3 held-out groups"]
    np.testing.assert_allclose(mean.get_xdata(), EDGES)
    np.testing.assert_allclose(mean.get_ydata(), (EDGES + EDGES**2 + EDGES**0.5) / 3, atol=1e-6)
    assert len(ax.lines) == 5  # with the diagonal
    assert ax.get_legend().get_texts()[0].get_text() == "mean of 3 held-out groups"


def test_the_level_of_a_calibrated_adapter() -> None:
    ax = pk.pl.calibration(_adapter(2.0, 2.0, level=0.81))
    point = _lines(ax)["81% lie in nominal 90% intervals"]
    np.testing.assert_allclose([point.get_xdata()[0], point.get_ydata()[0]], [0.9, 0.81], atol=1e-3)


def test_one_group_and_groups_without_scores() -> None:
    adapter = _adapter(1.0, 2.0, 1.0)
    adapter.held_out.curve[[0, 2]] = np.nan
    ax = pk.pl.calibration(adapter)
    assert "B, the only held-out group" in _lines(ax)
    assert len(ax.lines) == 2


def test_names_are_no_formulas() -> None:
    ax = pk.pl.calibration(_adapter(1.0, 1.0, 2.0))
    text = next(text for text in ax.get_legend().get_texts() if "covered least" in text.get_text())
    assert text.get_text() == "$C_1$: covered least" and not text.get_parse_math()


def test_draws_on_the_axes_given() -> None:
    _, ax = plt.subplots()
    assert pk.pl.calibration(_adapter(1.0), ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="Expected an Adapter, got str"):
        pk.pl.calibration("adapter")
    with pytest.raises(ValueError, match="no held-out predictions to plot: it was saved by an earlier version"):
        pk.pl.calibration(SimpleNamespace(held_out=None))
    adapter = _adapter(1.0)
    adapter.held_out.curve[:] = np.nan
    with pytest.raises(ValueError, match="No gene was measured in a group that was held out"):
        pk.pl.calibration(adapter)
    assert not plt.get_fignums()
