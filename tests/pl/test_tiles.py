from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from spatialdata import SpatialData

import pekasc as pk


@pytest.fixture(scope="module")
def tiled() -> SpatialData:
    sdata = pk.datasets.phantom(2, size_um=600, mpp=2.0, n_genes=4)
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    return sdata


def test_shows_the_tiles_that_get_reads(tiled: SpatialData) -> None:
    figure = pk.pl.tiles(tiled, n=5)
    titles = [ax.get_title() for ax in figure.axes]
    assert len(titles) == 5
    expected = pk.get.tiles(tiled).sel(tile=titles).values
    np.testing.assert_array_equal([ax.images[0].get_array() for ax in figure.axes], expected)
    # in the order of the table
    order = [tiled["table"].obs_names.get_loc(title) for title in titles]
    assert order == sorted(order)


def test_scale_bar_on_the_first(tiled: SpatialData) -> None:
    figure = pk.pl.tiles(tiled, n=4)
    (bar,) = figure.axes[0].patches
    assert bar.get_width() == 50
    assert [text.get_text() for ax in figure.axes for text in ax.texts] == ["50 µm"]
    for ax in figure.axes:
        assert ax.get_xlim() == (0, 112)
        assert tuple(ax.images[0].get_extent()) == (0, 112, 112, 0)


def test_names_in_the_order_asked(tiled: SpatialData) -> None:
    names = list(tiled["table"].obs_names[[7, 2, 30]])
    figure = pk.pl.tiles(tiled, names=names, n_columns=3)
    assert [ax.get_title() for ax in figure.axes] == names
    assert len({round(ax.get_position().y0, 6) for ax in figure.axes}) == 1


def test_the_same_seed_shows_the_same(tiled: SpatialData) -> None:
    shown = [[ax.get_title() for ax in pk.pl.tiles(tiled, n=6, random_state=s).axes] for s in (0, 0, 1)]
    assert shown[0] == shown[1] != shown[2]


def test_all_of_a_few(tiled: SpatialData) -> None:
    n = tiled["table"].n_obs
    figure = pk.pl.tiles(tiled, n=10_000, n_columns=10, figsize=(5, 5))
    assert len(figure.axes) == n
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "`n` must be a positive integer, got 0"),
        ({"n": 2.5}, ValueError, "`n` must be a positive integer, got 2.5"),
        ({"n_columns": 0}, ValueError, "`n_columns` must be a positive integer, got 0"),
        ({"names": ["x"]}, KeyError, "No tile for 'x'. Observations with tiles: 'P1S1"),
        ({"names": []}, ValueError, "`names` is empty"),
        ({"key": "other"}, KeyError, "other"),
    ],
)
def test_bad_input(tiled: SpatialData, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        pk.pl.tiles(tiled, **arguments)
    assert not plt.get_fignums()
