from __future__ import annotations

import warnings
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import EllipseCollection
from matplotlib.colors import Normalize
from spatialdata import SpatialData

import pekasc as pk
from pekasc._keys import write_uns


def _gene(sdata: SpatialData, i: int = 0) -> str:
    return str(sdata["table"].var_names[i])


def _circles(ax):
    return [c for c in ax.collections if isinstance(c, EllipseCollection) and c.get_array() is not None]


def _measured(sdata: SpatialData, i: int) -> np.ndarray:
    counts = sdata["table"].X.toarray().astype(float)
    return np.log1p(1e4 * counts[:, i] / counts.sum(axis=1))


def test_panels_share_one_scale(predicted: SpatialData) -> None:
    figure = pk.pl.expression(predicted, _gene(predicted))
    assert len(figure.axes) == 2 * 3 + 1  # the last is the colour bar
    table = predicted["table"]
    both = np.r_[_measured(predicted, 0), table.layers["peka"][:, 0]]
    expected = np.percentile(both[np.isfinite(both)], (1, 99))
    limits = [c.get_clim() for ax in figure.axes[:6] for c in _circles(ax)]
    assert len(limits) == 4
    np.testing.assert_allclose(limits, [expected] * 4, rtol=1e-6)
    assert figure.axes[-1].get_ylabel() == "log1p(counts per 10k)"
    np.testing.assert_allclose(figure.axes[-1].get_ylim(), expected, rtol=1e-6)


def test_values_lie_at_their_spots(predicted: SpatialData) -> None:
    figure = pk.pl.expression(predicted, _gene(predicted), section="P1S1")
    table = predicted["table"]
    rows = np.flatnonzero(table.obs["section"] == "P1S1")
    where = table.obsm["spatial"][rows] * 2.0  # um per pixel
    _, measured, predicted_ax = figure.axes[:3]
    (drawn,) = _circles(measured)
    np.testing.assert_allclose(drawn.get_offsets(), where)
    np.testing.assert_allclose(np.asarray(drawn.get_array()), _measured(predicted, 0)[rows], rtol=1e-6)
    (drawn,) = _circles(predicted_ax)
    known = rows != 2  # row 2 is not predicted: a ring without a colour
    np.testing.assert_allclose(drawn.get_offsets(), where[known])
    np.testing.assert_allclose(np.asarray(drawn.get_array()), table.layers["peka"][rows, 0][known], rtol=1e-6)
    assert sum(np.shape(c.get_offsets())[0] for c in predicted_ax.collections) == rows.size


def test_title_gives_the_correlation_of_the_section(predicted: SpatialData) -> None:
    figure = pk.pl.expression(predicted, _gene(predicted))
    table = predicted["table"]
    for i, name in enumerate(("P1S1", "P2S1")):
        rows = (table.obs["section"] == name).to_numpy() & np.isfinite(table.layers["peka"][:, 0])
        r = np.corrcoef(_measured(predicted, 0)[rows], table.layers["peka"][rows, 0])[0, 1]
        he, measured, predicted_ax = figure.axes[3 * i : 3 * i + 3]
        assert he.get_ylabel() == name
        assert measured.get_title() == "measured"
        assert predicted_ax.get_title() == f"predicted, r = {r:.2f}"
    assert figure.get_suptitle() == _gene(predicted)


def test_correlation_with_a_constant_is_undefined(predicted: SpatialData) -> None:
    table = predicted["table"]
    table.layers["flat"] = np.ones(table.shape, dtype=np.float32)
    try:
        figure = pk.pl.expression(predicted, _gene(predicted), layer="flat")
    finally:
        del table.layers["flat"]
    assert figure.axes[2].get_title() == "predicted, r undefined"


def test_scale_bar_in_micrometers(predicted: SpatialData) -> None:
    figure = pk.pl.expression(predicted, _gene(predicted), section="P1S1")
    he = figure.axes[0]
    (bar,) = he.patches
    assert [text.get_text() for text in he.texts] == [f"{bar.get_width():g} µm"]
    width = he.get_xlim()[1] - he.get_xlim()[0]
    assert 0.09 * width < bar.get_width() <= 0.25 * width
    # the image lies under the same units
    left, right, bottom, top = he.images[0].get_extent()
    assert left == pytest.approx(he.get_xlim()[0])
    assert (bottom, top) == pytest.approx(he.get_ylim(), abs=4)


def test_spots_on_the_dimmed_image(predicted: SpatialData) -> None:
    white = pk.pl.expression(predicted, _gene(predicted), section="P1S1")
    image = pk.pl.expression(predicted, _gene(predicted), section="P1S1", background="image")
    assert [len(ax.images) for ax in white.axes[:3]] == [1, 0, 0]
    assert [len(ax.images) for ax in image.axes[:3]] == [1, 1, 1]
    assert image.axes[1].images[0].get_alpha() < 0.5
    assert image.axes[0].images[0].get_alpha() is None


def test_limits_and_colours_can_be_set(predicted: SpatialData) -> None:
    figure = pk.pl.expression(predicted, _gene(predicted), vmin=0, vmax=9, cmap="magma", figsize=(4, 5))
    circles = _circles(figure.axes[1])[0]
    assert circles.get_clim() == (0, 9)
    assert circles.get_cmap().name == "magma"
    assert isinstance(circles.norm, Normalize)
    assert tuple(figure.get_size_inches()) == (4, 5)


def test_without_measurement_only_the_prediction(predicted: SpatialData) -> None:
    table = predicted["table"]
    counts = table.X
    try:
        table.X = None
        figure = pk.pl.expression(predicted, _gene(predicted), section="P1S1")
    finally:
        table.X = counts
    assert [ax.get_title() for ax in figure.axes[:2]] == ["H&E", "predicted"]
    assert len(figure.axes) == 3


def test_table_of_predictions_has_no_measured_panel(predicted: SpatialData) -> None:
    table = predicted["table"]
    counts = table.X
    try:
        table.X = table.layers["peka"]
        figure = pk.pl.expression(predicted, _gene(predicted), section="P1S1")
    finally:
        table.X = counts
    assert [ax.get_title() for ax in figure.axes[:2]] == ["H&E", "predicted"]


def test_truth_on_the_scale_of_the_predictions(predicted: SpatialData) -> None:
    figure = pk.pl.expression(predicted, _gene(predicted), truth="truth", section="P1S1")
    rows = np.flatnonzero(predicted["table"].obs["section"] == "P1S1")
    (drawn,) = _circles(figure.axes[1])
    np.testing.assert_allclose(np.asarray(drawn.get_array()), predicted["table"].layers["truth"][rows, 0])
    assert figure.axes[-1].get_ylabel() == "expression"


def test_says_what_the_adapter_was_trained_on(predicted: SpatialData) -> None:
    obs = predicted["table"].obs
    obs["peka_train"] = (obs["section"] == "P1S1").to_numpy()
    obs["peka_total"] = predicted["table"].X.sum(axis=1, dtype=np.float64).A1
    try:
        figure = pk.pl.expression(predicted, _gene(predicted))
    finally:
        del obs["peka_train"], obs["peka_total"]
    titles = [figure.axes[i].get_title() for i in (2, 5)]
    assert [title.endswith("(trained on)") for title in titles] == [True, False]


def test_the_correlation_is_that_of_spots_not_trained_on(predicted: SpatialData) -> None:
    table, gene = predicted["table"], _gene(predicted)
    rows = np.flatnonzero(table.obs["section"] == "P1S1")
    table.obs["peka_train"] = np.isin(np.arange(table.n_obs), rows[::2])
    table.obs["peka_total"] = table.X.sum(axis=1, dtype=np.float64).A1
    try:
        figure = pk.pl.expression(predicted, gene, section="P1S1")
    finally:
        totals = table.obs["peka_total"].to_numpy()
        del table.obs["peka_train"], table.obs["peka_total"]
    at = table.var_names.get_loc(gene)
    measured = np.log1p(1e4 * table.X[rows[1::2], at].toarray().ravel() / totals[rows[1::2]])
    r = np.corrcoef(measured, np.asarray(table.layers["peka"])[rows[1::2], at])[0, 1]
    assert figure.axes[2].get_title() == f"predicted, r = {r:.2f} on spots not trained on"


def test_tiled_sections_leave_out_what_has_no_tile() -> None:
    sdata = pk.datasets.phantom(1, size_um=700, mpp=2.0, n_genes=4)
    table = sdata["table"]
    table.layers["peka"] = np.asarray(table.layers["truth"])
    table.obs["in_tissue"] = 1
    table.obs.loc[table.obs_names[:3], "in_tissue"] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a tile without tissue
        pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    figure = pk.pl.expression(sdata, _gene(sdata))
    assert len(_circles(figure.axes[1])[0].get_offsets()) == table.n_obs - 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gene": "DENSITY_0"}, KeyError, "Gene 'DENSITY_0' not found in `var_names`. Did you mean DENSITY_00"),
        (
            {"layer": "pekka"},
            KeyError,
            r"Layer 'pekka' not found. Available layers: \['truth', 'peka'\]\. Predict first",
        ),
        ({"gene": 3}, ValueError, "was not predicted: layers\\['peka'\\] holds only NaN"),
        ({"gene": ["A", "B"]}, TypeError, "`gene` must be the name of one gene, got .* call once for each"),
        ({"section": "C2"}, KeyError, "Section 'C2' not found"),
        ({"background": "black"}, ValueError, "`background='black'` is not known, use one of"),
        ({"truth": "raw"}, KeyError, "Layer 'raw' not found"),
        ({"counts_layer": "raw"}, KeyError, "Layer 'raw' not found"),
        ({"counts_layer": "truth"}, ValueError, "Raw counts are needed"),
        ({"table_name": "cells"}, KeyError, "Table 'cells' not found"),
    ],
)
def test_bad_input(predicted: SpatialData, arguments, error, message) -> None:
    gene = arguments.pop("gene", 0)
    gene = _gene(predicted, gene) if isinstance(gene, int) else gene
    with pytest.raises(error, match=message):
        pk.pl.expression(predicted, gene, **arguments)
    assert not plt.get_fignums()


def test_images_are_needed(predicted: SpatialData) -> None:
    with pytest.raises(TypeError, match="expected a SpatialData, got AnnData"):
        pk.pl.expression(predicted["table"], _gene(predicted))


@pytest.fixture
def with_target(predicted: SpatialData) -> Iterator[SpatialData]:
    """Return the sections with cell types, measured but for row 1, and predicted but for row 2."""
    table = predicted["table"]
    rng = np.random.default_rng(0)
    values = pd.DataFrame(rng.dirichlet([1, 1, 1], table.n_obs), index=table.obs_names, columns=["T cell", "B:x", "c"])
    table.obsm["types"] = values.copy()
    table.obsm["types"].iloc[1] = np.nan
    table.obsm["X_peka_types"] = (values + rng.normal(0, 0.1, values.shape)).astype(np.float32)
    table.obsm["X_peka_types"].iloc[2] = np.nan
    write_uns(table, "X_peka_types", {"obsm": "types", "key_added": "peka"}, kind="prediction")
    yield predicted
    for key in ("types", "X_peka_types"):
        table.obsm.pop(key, None)
    del table.uns["pekasc"]["X_peka_types"]


@pytest.mark.parametrize("column", ["T cell", "B:x"])
def test_a_column_of_another_target(with_target: SpatialData, column: str) -> None:
    figure = pk.pl.expression(with_target, f"types:{column}", section="P1S1")
    table = with_target["table"]
    rows = np.flatnonzero(table.obs["section"] == "P1S1")
    measured, shown = table.obsm["types"][column].to_numpy(), table.obsm["X_peka_types"][column].to_numpy()
    for ax, values, missing in ((figure.axes[1], measured, 1), (figure.axes[2], shown, 2)):
        (drawn,) = _circles(ax)
        np.testing.assert_allclose(np.asarray(drawn.get_array()), values[rows[rows != missing]], rtol=1e-6)
    known = rows[~np.isin(rows, (1, 2))]
    r = np.corrcoef(measured[known], shown[known])[0, 1]
    assert figure.axes[2].get_title() == f"predicted, r = {r:.2f}"
    assert figure.get_suptitle() == f"types:{column}" and figure.axes[-1].get_ylabel() == "types"


def test_another_target_without_a_measurement(with_target: SpatialData) -> None:
    del with_target["table"].obsm["types"]
    figure = pk.pl.expression(with_target, "types:c", section="P1S1")
    assert [ax.get_title() for ax in figure.axes[:2]] == ["H&E", "predicted"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gene": "types:T cel"}, KeyError, "has no column 'T cel'. Did you mean 'T cell'"),
        ({"gene": "typs:c"}, KeyError, "no predictions of 'typs'. Targets predicted under 'peka': .*types"),
        ({"gene": "types:c", "layer": "mine"}, KeyError, "obsm.*X_mine_types.* not found"),
        ({"gene": "types:c", "truth": "raw"}, KeyError, "`truth`: obsm.*raw.* is not in the table"),
        ({"gene": "types:c", "counts_layer": "counts"}, ValueError, "`counts_layer=` does nothing for a target"),
    ],
)
def test_bad_target(with_target: SpatialData, arguments, error, message) -> None:
    gene = arguments.pop("gene")
    with pytest.raises(error, match=message):
        pk.pl.expression(with_target, gene, **arguments)
    assert not plt.get_fignums()


def test_a_column_that_was_not_predicted(with_target: SpatialData) -> None:
    with_target["table"].obsm["X_peka_types"]["c"] = np.nan
    with pytest.raises(ValueError, match=r"Column 'c' was not predicted: obsm\['X_peka_types'\] holds only NaN"):
        pk.pl.expression(with_target, "types:c")


def test_ends_of_the_interval(predicted: SpatialData) -> None:
    table = predicted["table"]
    gene, values = str(table.var_names[0]), np.asarray(table.layers["peka"])
    with pytest.raises(ValueError, match=r"layers\['peka'\] has no intervals: calibrate the adapter"):
        pk.pl.expression(predicted, gene, interval=True)
    table.layers["peka_lower"], table.layers["peka_upper"] = values - 1, values + 2
    try:
        figure = pk.pl.expression(predicted, gene, section="P1S1", interval=True)
        with pytest.raises(ValueError, match="has no interval: it was not measured"):
            table.layers["peka_upper"] = values * np.nan
            pk.pl.expression(predicted, gene, interval=True)
    finally:
        del table.layers["peka_lower"], table.layers["peka_upper"]
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[3:5] == ["lower end of the interval", "upper end"] and len(titles) == 6  # with the colour bar
    shown = [np.asarray(ax.collections[-1].get_array()) for ax in figure.axes[2:5]]
    np.testing.assert_allclose(shown[1], shown[0] - 1, rtol=1e-5)
    np.testing.assert_allclose(shown[2], shown[0] + 2, rtol=1e-5)


def test_tiles_that_are_named_must_be_there(predicted: SpatialData) -> None:
    with pytest.raises(KeyError, match="No tiles 'tils'"):
        pk.pl.expression(predicted, _gene(predicted), key="tils")
