from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import Normalize

from pekasc.pl._draw import bounding_box, frame, length_label, robust_limits, round_length, scale_bar, spots


@pytest.mark.parametrize(
    ("width", "expected"), [(6400, 1000), (1500, 200), (112, 20), (8, 2), (0.9, 0.2), (4000, 1000), (800, 200)]
)
def test_round_length_is_one_two_or_five(width: float, expected: float) -> None:
    assert round_length(width) == pytest.approx(expected)
    assert round_length(width) <= 0.25 * width * (1 + 1e-9)


def test_length_label_has_the_unit() -> None:
    assert [length_label(um) for um in (0.5, 200, 1000, 2500)] == ["0.5 µm", "200 µm", "1 mm", "2.5 mm"]


def test_scale_bar_is_as_long_as_it_says() -> None:
    _, ax = plt.subplots()
    frame(ax, (100, 50, 900, 650))
    bar = scale_bar(ax, 200)
    assert bar.get_width() == 200
    assert [text.get_text() for text in ax.texts] == ["200 µm"]
    # inside the axes, in the lower left corner: y points down
    x0, x1 = ax.get_xlim()
    assert ax.get_ylim() == (650, 50)
    assert x0 < bar.get_x() < bar.get_x() + 200 < (x0 + x1) / 2
    assert 500 < bar.get_y() + bar.get_height() < bar.get_y() < 650


def test_bounding_box_holds_whole_circles() -> None:
    box = bounding_box(np.array([[0.0, 0.0], [100.0, 40.0]]), np.array([10.0, 5.0]))
    assert box == pytest.approx((-10 - 8.05, -10 - 8.05, 105 + 8.05, 45 + 8.05))


def test_spots_are_true_to_size_and_place() -> None:
    _, ax = plt.subplots()
    frame(ax, (0, 0, 100, 100))
    centres = np.array([[20.0, 30.0], [60.0, 30.0], [60.0, 80.0]])
    drawn = spots(ax, centres, np.full(3, 5.0), np.array([0.0, np.nan, 2.0]), norm=Normalize(0, 2), cmap="viridis")
    np.testing.assert_array_equal(drawn.get_offsets(), centres[[0, 2]])
    np.testing.assert_array_equal(np.asarray(drawn.get_array()), [0.0, 2.0])
    # a spot without a value is a ring
    rings = next(c for c in ax.collections if c is not drawn)
    np.testing.assert_array_equal(rings.get_offsets(), centres[[1]])
    assert len(rings.get_facecolor()) == 0


def test_spots_cover_their_true_area() -> None:
    fig = plt.figure(figsize=(4, 4), dpi=100)
    ax = fig.add_axes((0, 0, 1, 1))
    frame(ax, (0, 0, 100, 100))  # 4 px per unit
    spots(
        ax,
        np.array([[20.0, 30.0], [60.0, 70.0]]),
        np.array([5.0, 20.0]),
        np.ones(2),
        norm=Normalize(0, 2),
        cmap="viridis",
    )
    fig.canvas.draw()
    covered = (np.asarray(fig.canvas.buffer_rgba())[..., :3] < 250).any(axis=-1)
    assert covered[:200].sum() == pytest.approx(np.pi * (5 * 4) ** 2, rel=0.05)
    assert covered[200:].sum() == pytest.approx(np.pi * (20 * 4) ** 2, rel=0.05)
    rows, columns = np.nonzero(covered[:200])
    assert (columns.mean(), rows.mean()) == pytest.approx((20 * 4, 30 * 4), abs=0.6)  # y points down


def test_limits_are_robust_and_shared() -> None:
    measured = np.r_[np.linspace(0, 1, 99), 50.0, np.nan]
    predicted = np.linspace(0.4, 0.6, 100)
    pooled = np.r_[measured[:-1], predicted]
    assert robust_limits(measured, predicted) == pytest.approx(tuple(np.percentile(pooled, (1, 99))))
    assert robust_limits(measured, vmin=-1, vmax=2) == (-1, 2)


def test_limits_are_never_equal() -> None:
    # a gene in one spot of 500: the percentiles meet, the range does not
    assert robust_limits(np.r_[np.zeros(500), 3.0]) == (0, 3)
    assert robust_limits(np.full(10, 2.0)) == (2, 3)
    assert robust_limits(np.full(10, np.nan)) == (0, 1)
