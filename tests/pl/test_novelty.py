from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import EllipseCollection
from spatialdata import SpatialData

import pekasc as pk


@pytest.fixture(scope="module")
def _tiled() -> SpatialData:
    sdata = pk.datasets.phantom(2, size_um=700, mpp=2.0, n_genes=8)
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    obs = sdata["table"].obs
    p = np.random.default_rng(0).uniform(0.02, 1, len(obs)).astype(np.float32)
    p[[3, 5]] = 0.001, 0.002
    p[4] = np.nan
    obs["peka_novelty"], obs["peka_train"] = p, False
    return sdata


@pytest.fixture
def tiled(_tiled: SpatialData) -> SpatialData:
    _tiled["table"].obs["peka_train"] = False
    return _tiled


def _titles(figure) -> list[str]:
    return [ax.get_title() for ax in figure.axes]


def test_maps_show_every_tile_and_its_p_value(tiled: SpatialData) -> None:
    figure = pk.pl.novelty(tiled, n=3)
    assert _titles(figure)[:2] == ["P1S1", "P2S1"]
    obs = tiled["table"].obs
    for ax, name in zip(figure.axes, ("P1S1", "P2S1"), strict=False):
        values = obs["peka_novelty"][obs["section"] == name].to_numpy()
        circles = [part for part in ax.collections if isinstance(part, EllipseCollection)]
        np.testing.assert_allclose(circles[-1].get_array(), values[np.isfinite(values)])
        assert circles[-1].norm.vmin == pytest.approx(0.001)


def test_the_histogram_counts_every_tile_beside_what_is_expected(tiled: SpatialData) -> None:
    ax = next(ax for ax in pk.pl.novelty(tiled).axes if ax.get_ylabel() == "tiles")
    p = tiled["table"].obs["peka_novelty"].dropna()
    heights = [bar.get_height() for bar in ax.patches if hasattr(bar, "get_height")]
    assert sum(heights) == len(p)
    (expected,) = (part for part in ax.patches if part.get_label() == "tiles like those of the training")
    values, edges, _ = expected.get_data()
    np.testing.assert_allclose(values, len(p) * np.diff(np.r_[0, edges[1:]]))
    share = (p < 0.01).mean()
    assert [text.get_text() for text in ax.texts] == [f"{share:.1%} of {len(p)} tiles below 0.01"]


@pytest.mark.parametrize("n", [1, 4])
def test_the_labels_are_not_cut(tiled: SpatialData, n: int) -> None:
    figure = pk.pl.novelty(tiled, section="P1S1", n=n)
    figure.canvas.draw()
    ax = next(ax for ax in figure.axes if ax.get_ylabel() == "tiles")
    assert ax.get_xlabel().endswith("small is unlike the training")
    box = ax.xaxis.label.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize("least", [0.0, 1e-30])
def test_tiles_far_beyond_all_known_ones(tiled: SpatialData, least: float) -> None:
    obs = tiled["table"].obs
    obs["far_novelty"] = obs["peka_novelty"]
    obs.loc[obs.index[7], "far_novelty"] = least
    figure = pk.pl.novelty(tiled, layer="far", n=2)
    figure.canvas.draw()
    circles = [part for part in figure.axes[0].collections if isinstance(part, EllipseCollection)]
    assert circles[-1].norm.vmin == pytest.approx(1e-4) and circles[-1].get_array().min() == pytest.approx(1e-4)
    ax = next(ax for ax in figure.axes if ax.get_ylabel() == "tiles")
    assert sum(bar.get_height() for bar in ax.patches if hasattr(bar, "get_height")) == obs["far_novelty"].notna().sum()
    del obs["far_novelty"]


def test_tiles_at_both_ends(tiled: SpatialData) -> None:
    figure = pk.pl.novelty(tiled, n=4)
    values = tiled["table"].obs["peka_novelty"]
    ends = values.sort_values().dropna()
    shown = [ax for ax in figure.axes if ax.get_title().startswith("p = ")]
    wanted = [*ends.iloc[:4], *ends.iloc[::-1].iloc[:4]]
    assert [ax.get_title() for ax in shown] == [f"p = {value:.2g}" for value in wanted]
    assert [ax.get_ylabel() for ax in (shown[0], shown[4])] == ["most novel", "least novel"]
    tiles = pk.get.tiles(tiled)
    for ax, name in zip((shown[0], shown[1], shown[4]), (ends.index[0], ends.index[1], ends.index[-1]), strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), tiles.sel(tile=name).compute())


def test_tiles_that_were_trained_on_are_in_maps_only(tiled: SpatialData) -> None:
    obs = tiled["table"].obs
    obs["peka_train"] = obs["section"] == "P1S1"
    figure = pk.pl.novelty(tiled, n=2)
    assert _titles(figure)[:2] == ["P1S1 (trained on)", "P2S1"]
    ax = next(ax for ax in figure.axes if ax.get_ylabel() == "tiles not trained on")
    other = obs["peka_novelty"][obs["section"] == "P2S1"].dropna()
    assert f"of {len(other)} tiles" in ax.texts[0].get_text()
    # nothing else is there
    assert _titles(pk.pl.novelty(tiled, n=2, section="P1S1"))[0] == "P1S1 (trained on)"


def test_a_slide(tiled: SpatialData) -> None:
    slide = pk.datasets.phantom(1, size_um=700, mpp=2.0, n_genes=8)
    pk.pp.tile_grid(slide, "P1S1_he", tile_px=28, mpp=4.0)
    obs = slide["grid"].obs
    obs["peka_novelty"] = np.linspace(0.05, 1, len(obs))
    with pytest.raises(KeyError, match=r"not found in `obs` of the table 'table'. Tables that have it: \['grid'\]"):
        pk.pl.novelty(slide)
    figure = pk.pl.novelty(slide, table_name="grid", n=2)
    image = figure.axes[0].images[-1].get_array()
    np.testing.assert_allclose(np.sort(np.ma.compressed(image)), np.linspace(0.05, 1, len(obs)))
    del slide.tables["table"]
    assert len(pk.pl.novelty(slide, n=10_000).axes) == 3 + 2 * len(obs)


def test_bad_input(tiled: SpatialData) -> None:
    with pytest.raises(KeyError, match="Novelty 'mine_novelty' not found .* Available columns: .*a calibrated adapter"):
        pk.pl.novelty(tiled, layer="mine")
    with pytest.raises(ValueError, match="`n` must be a positive integer, got 0"):
        pk.pl.novelty(tiled, n=0)
    with pytest.raises(KeyError, match="Section 'P9' not found"):
        pk.pl.novelty(tiled, section="P9")
    with pytest.raises(TypeError, match="SpatialData"):
        pk.pl.novelty(tiled["table"])
    tiled["table"].obs["none_novelty"] = np.nan
    with pytest.raises(ValueError, match=r"`obs\['none_novelty'\]` has no values in these sections"):
        pk.pl.novelty(tiled, layer="none")
    del tiled["table"].obs["none_novelty"]
    assert not plt.get_fignums()
