"""Positions on a square lattice become rows and columns; others are refused."""

from __future__ import annotations

import numpy as np
import pytest

from pekasc.tiling import square_lattice


@pytest.mark.parametrize("stride", [None, 25.0])
def test_rows_columns_and_back(stride: float | None) -> None:
    rng = np.random.default_rng(0)
    rows, cols = np.divmod(rng.choice(400, 150, replace=False), 20)
    positions = np.column_stack([cols, rows]) * 25.0 + [310.5, -70.25] + rng.normal(0, 1e-4, (150, 2))
    lattice = square_lattice(positions, stride)
    assert (lattice.row == rows - rows.min()).all() and (lattice.col == cols - cols.min()).all()
    assert lattice.shape == (rows.max() - rows.min() + 1, cols.max() - cols.min() + 1)
    pixels = np.column_stack([lattice.col + 0.5, lattice.row + 0.5, np.ones(150)])
    np.testing.assert_allclose((pixels @ lattice.to_positions().T)[:, :2], positions, atol=1e-3)


def test_an_inexact_stride_does_not_add_up() -> None:
    x = np.arange(5000) * 8.0001
    lattice = square_lattice(np.column_stack([x + np.random.default_rng(0).normal(0, 0.02, x.size), 0 * x]))
    assert (lattice.col == np.arange(5000)).all()
    assert lattice.stride == pytest.approx(8.0001, rel=1e-6)


def test_a_single_row_and_a_single_tile() -> None:
    assert square_lattice(np.array([[0.0, 5.0], [30.0, 5.0]])).shape == (1, 2)
    one = square_lattice(np.array([[100.0, 50.0]]), 20.0)
    assert one.shape == (1, 1)
    np.testing.assert_allclose(one.origin, [90, 40])


@pytest.mark.parametrize(
    ("positions", "stride", "match"),
    [
        ([[0, 0], [10, 0], [5, 8.66]], None, "do not lie on a square lattice: they are off by up to"),
        ([[0, 0], [10, 0], [24, 0]], 10.0, "do not lie on a square lattice"),
        ([[0, 0], [10, 0], [10, 0], [20, 0]], 10.0, "1 positions share a place"),
        ([[0, 0]], None, "not known from a single position"),
        ([[3, 3], [3, 3]], None, "lie upon one another"),
    ],
)
def test_what_is_no_lattice(positions: list[list[float]], stride: float | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        square_lattice(np.array(positions, dtype=float), stride)
