"""`calibrate`: intervals from held-out training groups and from sections that the adapter never saw."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.transformations import Identity, remove_transformation, set_transformation

import pekasc as pk
from pekasc.models.trust import COUNTS, RESIDUALS, UNSEEN

PATIENTS = [f"P{i}S1_spots" for i in range(1, 5)]
FIT: dict[str, Any] = {
    "method": None, "compute": {"device": "cpu"}, "progress": False,
    "readout": pk.Readout.preset("ridge").replace(n_depths=None, depth=2, n_components=10),
}  # fmt: skip
CPU: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:Intervals from", "ignore:Section 'P", "ignore:Many tiles of")


@pytest.fixture(scope="module")
def four() -> SpatialData:
    sdata = pk.datasets.phantom(n_patients=4, size_um=700, mpp=1.0, n_genes=24)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    return sdata


@pytest.fixture(scope="module")
def fitted(four: SpatialData) -> pk.Adapter:
    return pk.tl.fit_adapter(four, train=PATIENTS[:2], **FIT)


def part(sdata: SpatialData, regions: list[str]) -> SpatialData:
    """Return the table's rows of some sections, with everything else."""
    table = sdata["table"]
    rows = table.obs["region"].isin(regions).to_numpy()
    new = sd.models.TableModel.parse(
        table[rows].copy(), region=regions, region_key="region", instance_key="spot_id", overwrite_metadata=True
    )
    return SpatialData(
        images=dict(sdata.images), shapes={n: s.copy() for n, s in sdata.shapes.items()}, tables={"table": new}
    )


def test_from_the_held_out_training_groups(four: SpatialData, fitted: pk.Adapter) -> None:
    with pytest.warns(UserWarning, match="Intervals from 2 groups: how far groups differ is hardly known from so few"):
        calibrated = pk.tl.calibrate(fitted)
    assert fitted.calibration is None and "intervals   none yet" in repr(fitted)
    found = calibrated.calibration
    assert found is not None and found.level == 0.9 and found.groups == ("P1", "P2") and found.noise.kind == COUNTS
    assert "90% intervals from 2 training groups, held out in turn (approximate, no promise: 2 groups" in repr(
        calibrated
    )
    narrow = pk.tl.calibrate(fitted, level=0.5).calibration
    assert narrow is not None and (narrow.threshold < found.threshold).all()

    sdata = part(four, PATIENTS)
    pk.tl.predict_expression(sdata, calibrated, **CPU)
    table = sdata["table"]
    low, value, high = (table.layers[f"peka{end}"] for end in ("_lower", "", "_upper"))
    assert low.dtype == high.dtype == np.float32 and (low <= high).all() and np.isfinite(low).all()
    rates = np.expm1(value) * found.noise.scale
    assert ((np.log1p(rates) >= low) | (value <= 0)).mean() > 0.99
    wide_low, wide_high = pk.get.interval(sdata)
    assert wide_low.shape == table.shape and (wide_high - wide_low).mean() > (high - low).mean()
    deep_low, deep_high = pk.get.interval(sdata, total=1e6)
    assert (deep_high - deep_low).mean() < (wide_high - wide_low).mean()
    np.testing.assert_allclose(deep_high, high, atol=0.2)  # sequenced deeply, a measurement is its rate

    scores = pk.tl.evaluate(sdata)
    truth = np.log1p(1e4 * table.X.toarray() / np.asarray(table.X.sum(axis=1)))
    rows = (table.obs["region"] == "P3S1_spots").to_numpy()
    inside = (truth >= wide_low - 1e-5) & (truth <= wide_high + 1e-5)
    own = scores[scores["group"] == "P3S1_spots"].set_index("gene").loc[table.var_names]
    np.testing.assert_allclose(own["coverage"], inside[rows].mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(own["width"], (wide_high - wide_low)[rows].mean(axis=0), rtol=1e-5)
    assert 0.75 < scores["coverage_randomised"].mean() <= scores["coverage"].mean() < 1
    assert table.var["peka_coverage"].to_numpy() == pytest.approx(
        scores.groupby("gene")["coverage"].mean()[table.var_names]
    )
    assert list(table.var["peka_trust"].cat.categories) == ["low", "medium", "high"]
    novelty = table.obs["peka_novelty"]
    assert novelty.dtype == np.float32 and novelty.between(0, 1).all()


def test_an_adapter_that_is_not_calibrated_leaves_nothing_of_one_that_was(
    four: SpatialData, fitted: pk.Adapter
) -> None:
    sdata = part(four, PATIENTS)
    pk.tl.predict_expression(sdata, pk.tl.calibrate(fitted), **CPU)
    before = sdata["table"].layers["peka"].copy()
    pk.tl.evaluate(sdata)
    pk.tl.predict_expression(sdata, fitted, **CPU)
    table = sdata["table"]
    np.testing.assert_allclose(table.layers["peka"], before, atol=1e-5)
    left = {"peka_lower", "peka_upper"} & set(table.layers) | {"peka_novelty"} & set(table.obs)
    assert not left and not {"peka_trust", "peka_coverage"} & set(table.var)
    assert "coverage" not in pk.tl.evaluate(sdata)
    with pytest.raises(ValueError, match=r"layers\['peka'\] has no intervals: calibrate the adapter"):
        pk.get.interval(sdata)


def test_from_sections_that_it_never_saw(four: SpatialData, fitted: pk.Adapter) -> None:
    unseen = part(four, PATIENTS[2:])
    found = pk.tl.calibrate(fitted, unseen, level=0.6, guarantee="exact", **CPU).calibration
    assert found is not None and found.source == UNSEEN and found.groups == ("P3", "P4") and "(exact)" in found.text
    assert fitted.held_out is not None and found.noise is fitted.held_out.noise
    again = pk.tl.calibrate(fitted, unseen, level=0.6, guarantee="exact", **CPU).calibration
    assert again is not None
    np.testing.assert_array_equal(found.threshold, again.threshold)
    # at that level they cover the very groups that they are from
    sdata = part(four, PATIENTS[2:])
    pk.tl.predict_expression(sdata, pk.tl.calibrate(fitted, unseen, level=0.6, **CPU), **CPU)
    scores = pk.tl.evaluate(sdata)
    assert scores["coverage_randomised"].mean() == pytest.approx(0.6, abs=0.03)
    np.testing.assert_allclose(scores["calibration_error"], scores["coverage_randomised"] - 0.6)
    assert not {"peka", "peka_lower"} & set(unseen["table"].layers)


@pytest.mark.parametrize("shared", [False, True])
def test_the_line_that_leaves_training_sections_out_works(four: SpatialData, fitted: pk.Adapter, shared: bool) -> None:
    sdata = part(four, PATIENTS)
    elements = [element for kind, _, element in sdata.gen_elements() if kind != "tables"] if shared else []
    for element in elements:  # then sections are not told apart by their coordinate systems
        set_transformation(element, Identity(), "global")
    try:
        with pytest.raises(ValueError, match="Calibrate on other sections alone") as error:
            pk.tl.calibrate(fitted, sdata, **CPU)
        line = re.search(r"calibrate\(adapter, (sdata\.(\w+)\(.*?\))\)`", str(error.value))
        assert line is not None and line[2] == ("subset" if shared else "filter_by_coordinate_system")
        unseen = eval(line[1], {"sdata": sdata})
        found = pk.tl.calibrate(fitted, unseen, **CPU).calibration
    finally:
        for element in elements:
            remove_transformation(element, "global")
    assert found is not None and found.source == UNSEEN and found.groups == ("P3", "P4")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guarantee": "exact"}, '"exact"` needs sections that the adapter never saw: give them as `sdata=`'),
        ({"level": 1.0}, "`level` must be above 0 and below 1"),
        ({"guarantee": "sure"}, "`guarantee` must be one of"),
        ({"groups": "patient"}, "`groups=` does nothing without `sdata=`"),
    ],
)
def test_bad_arguments(fitted: pk.Adapter, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.tl.calibrate(fitted, **given)


def test_sections_that_cannot_be_calibrated_on(four: SpatialData, fitted: pk.Adapter) -> None:
    with pytest.raises(TypeError, match="`adapter` must be a pekasc.Adapter, got str"):
        pk.tl.calibrate("adapter")
    with pytest.raises(
        ValueError,
        match=r"trained on \d+ of the \d+ measured spots, in \['P1S1_spots', 'P2S1_spots'\], where .* sections alone "
        r"\(`calibrate\(adapter, sdata.filter_by_coordinate_system\(\['P3S1', 'P4S1'\]\)\)`\), or without `sdata=`",
    ):
        pk.tl.calibrate(fitted, part(four, PATIENTS), **CPU)
    with pytest.raises(ValueError, match="Calibrate on other sections, or without `sdata=`"):
        pk.tl.calibrate(fitted, part(four, PATIENTS[:2]), **CPU)
    with pytest.raises(ValueError, match='`level=0.9` with `guarantee="exact"` needs at least 9 groups .* got 2:'):
        pk.tl.calibrate(fitted, part(four, PATIENTS[2:]), guarantee="exact", **CPU)
    with pytest.raises(KeyError, match="`groups='site'` not found in `obs`"):
        pk.tl.calibrate(fitted, part(four, PATIENTS[2:]), groups="site", **CPU)
    old = replace(fitted, held_out=None, novelty=None)
    with pytest.raises(ValueError, match="has no held-out predictions: it was saved by an earlier version"):
        pk.tl.calibrate(old)
    with pytest.raises(ValueError, match="no held-out predictions, which the noise of an exact interval"):
        pk.tl.calibrate(old, part(four, PATIENTS[2:]), level=0.5, guarantee="exact", **CPU)
    approximate = pk.tl.calibrate(old, part(four, PATIENTS[2:]), **CPU)
    assert approximate.calibration is not None and approximate.calibration.source == UNSEEN
    sdata = part(four, PATIENTS[2:])
    with pytest.raises(ValueError, match="`abstain=` needs the novelty of tiles, and this adapter was saved by"):
        pk.tl.predict_expression(sdata, approximate, abstain=0.01, **CPU)
    pk.tl.predict_expression(sdata, approximate, **CPU)
    assert "peka_lower" in sdata["table"].layers and "peka_novelty" not in sdata["table"].obs


def test_tiles_that_are_too_novel_are_not_predicted(
    four: SpatialData, fitted: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    sdata = part(four, PATIENTS)
    image = sdata.images["P4S1_he"].copy(deep=True)
    for scale in image:
        image[scale]["image"] = image[scale]["image"] * 0 + np.uint8(250)  # white
    sdata.images["P4S1_he"] = image
    with pytest.raises(ValueError, match="`abstain=` needs the novelty of tiles, which a calibrated adapter gives"):
        pk.tl.predict_expression(sdata, fitted, abstain=0.01, **CPU)
    calibrated = pk.tl.calibrate(fitted)
    for wrong in (0, 1, "0.1"):
        with pytest.raises(ValueError, match="`abstain` must be above 0 and below 1"):
            pk.tl.predict_expression(sdata, calibrated, abstain=wrong, **CPU)
    said = r"less like the training tiles .*'P4S1_spots' \(100%\).*Check the pixel size"
    with caplog.at_level("INFO", logger="pekasc"), pytest.warns(UserWarning, match=said):
        pk.tl.predict_expression(sdata, calibrated, abstain=0.05, **CPU)
    table = sdata["table"]
    nothing = np.isnan(table.layers["peka"]).all(axis=1)
    assert f"{nothing.sum()} of {table.n_obs} tiles are not predicted: their novelty p-value is below" in caplog.text
    np.testing.assert_array_equal(nothing, table.obs["peka_novelty"] < 0.05)
    region = table.obs["region"]
    record = table.uns["pekasc"]["peka"]
    assert record["abstain"] == 0.05 and record["n_abstained"] == nothing.sum()
    assert nothing[region == "P4S1_spots"].all() and nothing[region.isin(PATIENTS[:2])].mean() < 0.1
    assert np.isnan(table.layers["peka_lower"][nothing]).all()


def test_predictions_in_a_store(four: SpatialData, fitted: pk.Adapter, tmp_path: Path) -> None:
    sdata, calibrated = part(four, PATIENTS[2:]), pk.tl.calibrate(fitted)
    pk.tl.predict_expression(sdata, calibrated, **CPU)
    table = sdata["table"]
    expected = {name: table.layers[name].copy() for name in ("peka", "peka_lower", "peka_upper")}
    novelty, interval = table.obs["peka_novelty"].copy(), pk.get.interval(sdata)
    pk.tl.predict_expression(sdata, calibrated, store=tmp_path / "store", **CPU)
    sdata.write(tmp_path / "sdata.zarr")
    back = sd.read_zarr(tmp_path / "sdata.zarr")
    assert not set(expected) & set(back["table"].layers)
    pk.io.attach_predictions(back)
    for name, values in expected.items():
        np.testing.assert_allclose(back["table"].layers[name].compute(), values, atol=1e-5)
    np.testing.assert_allclose(back["table"].obs["peka_novelty"], novelty, atol=1e-6)
    np.testing.assert_allclose(pk.get.interval(back), interval, atol=1e-4)


def test_saved_adapters_keep_it(fitted: pk.Adapter, tmp_path: Path) -> None:
    calibrated = pk.tl.calibrate(fitted)
    calibrated.save(tmp_path / "a")
    loaded = pk.Adapter.load(tmp_path / "a")
    assert loaded.calibration is not None and calibrated.calibration is not None and loaded.novelty is not None
    np.testing.assert_array_equal(loaded.calibration.threshold, calibrated.calibration.threshold)
    assert loaded.calibration.text == calibrated.calibration.text
    assert json.loads((tmp_path / "a" / "pekasc.json").read_text())["format"] == 9
    again = pk.tl.calibrate(loaded, level=0.8).calibration
    expected = pk.tl.calibrate(fitted, level=0.8).calibration
    assert again is not None and expected is not None
    np.testing.assert_array_equal(again.threshold, expected.threshold)


def test_values_that_are_no_counts(four: SpatialData) -> None:
    sdata = part(four, PATIENTS)
    table = sdata["table"]
    values = table.X.toarray()[:, :3] + np.random.default_rng(0).normal(size=(table.n_obs, 3))
    table.obsm["scores"] = values
    adapter = pk.tl.fit_adapter(sdata, train=PATIENTS[:2], target={"obsm": "scores"}, **FIT)
    calibrated = pk.tl.calibrate(adapter)
    assert calibrated.calibration is not None and calibrated.calibration.noise.kind == RESIDUALS
    pk.tl.predict_expression(sdata, calibrated, **CPU)
    low, high = (sdata["table"].obsm[f"X_peka_scores_{end}"] for end in ("lower", "upper"))
    assert list(low.columns) == ["0", "1", "2"] and ((high - low).to_numpy() > 0).all()
    scores = pk.tl.evaluate(sdata, target="scores")
    assert 0.6 < scores["coverage"].mean() <= 1
    unseen = pk.tl.calibrate(adapter, part(sdata, PATIENTS[2:]), **CPU)
    assert unseen.calibration is not None and unseen.calibration.noise.kind == RESIDUALS
    as_is = part(four, PATIENTS)
    log = as_is["table"].X.copy()
    log.data = np.log1p(log.data)
    as_is["table"].layers["log"] = log
    adapter = pk.tl.fit_adapter(as_is, train=PATIENTS[:2], target="as_is", layer="log", **FIT)
    pk.tl.predict_expression(as_is, pk.tl.calibrate(adapter), **CPU)
    assert 0.6 < pk.tl.evaluate(as_is)["coverage"].mean() <= 1
    with pytest.raises(ValueError, match="`total=` does nothing: these predictions are of no counts"):
        pk.get.interval(as_is, total=100)


def test_totals_of_intervals(four: SpatialData, fitted: pk.Adapter) -> None:
    sdata = part(four, PATIENTS[2:])
    pk.tl.predict_expression(sdata, pk.tl.calibrate(fitted), **CPU)
    n = sdata["table"].n_obs
    np.testing.assert_array_equal(pk.get.interval(sdata, total=500), pk.get.interval(sdata, total=[500] * n))
    for wrong in (0, -1, [1, 2, 3], np.inf, True, "5000", ["500"] * n, [None] * n):
        with pytest.raises(ValueError, match=f"`total` must be a count above 0, or one for each of the {n} rows"):
            pk.get.interval(sdata, total=wrong)
    del sdata["table"].obs["peka_total"]
    with pytest.raises(ValueError, match=r"The spots have no totals .* such as `total=5000`"):
        pk.get.interval(sdata)


def test_totals_of_other_genes_are_warned_of(
    four: SpatialData, fitted: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    sdata = part(four, PATIENTS[2:])
    kept = sdata["table"][:, list(fitted.genes[:8])].copy()
    del sdata.tables["table"]
    sdata.tables["table"] = kept
    with (
        pytest.warns(UserWarning, match="not in the table get no interval: 16 of the adapter's 24"),
        pytest.warns(UserWarning, match="Totals of spots are over 8 genes here, and were over 24 in the training"),
    ):
        pk.tl.calibrate(fitted, sdata, **CPU)
    # as of an adapter whose training sections measured different genes
    panels = replace(fitted, info={**fitted.info, "total_genes": list(fitted.genes[4:14]), "n_genes_in_total": 10})
    with (
        caplog.at_level("INFO"),
        pytest.warns(UserWarning, match="Totals of spots are over 4 genes here, and were over 10 in the training"),
    ):
        pk.tl.calibrate(panels, sdata, **CPU)
    assert "Totals are over 4 genes of the 10 that all training sections measured" in caplog.text


def test_trust_in_get_and_pl(four: SpatialData, fitted: pk.Adapter) -> None:
    sdata = part(four, PATIENTS[1:3])
    pk.tl.predict_expression(sdata, fitted, **CPU)
    with pytest.raises(
        ValueError, match=r"needs `var\['peka_trust'\]`, which predictions of a calibrated adapter have"
    ):
        pk.get.expression(sdata, min_trust="high")
    pk.tl.predict_expression(sdata, pk.tl.calibrate(fitted), **CPU)
    levels = sdata["table"].var["peka_trust"]
    medium = pk.get.expression(sdata, min_trust="medium")
    assert list(medium.var_names) == list(levels.index[levels >= "medium"]) and 0 < medium.n_vars < len(levels)
    some = list(levels.index[levels == "low"][:2]) + list(medium.var_names[:3])
    assert list(pk.get.expression(sdata, genes=some, min_trust="medium").var_names) == some[2:]
    with pytest.raises(ValueError, match=r"`min_trust` must be one of \['low', 'medium', 'high'\], got 'sure'"):
        pk.get.expression(sdata, min_trust="sure")
    sdata["table"].var["peka_trust"] = levels.where(levels == "low", "low")
    with pytest.raises(ValueError, match="No gene has a level of trust of 'high' or more: .* Take a lower"):
        pk.get.expression(sdata, min_trust="high")


def test_what_is_not_to_be_trusted_is_shaded(four: SpatialData, fitted: pk.Adapter) -> None:
    sdata = part(four, PATIENTS[2:3])
    pk.tl.predict_expression(sdata, pk.tl.calibrate(fitted), **CPU)
    table = sdata["table"]
    levels = table.var["peka_trust"]
    table.obs["peka_novelty"] = np.where(np.arange(table.n_obs) < 5, 0.001, 0.5)
    figure = pk.pl.expression(sdata, levels.index[levels == "low"][0])
    assert figure.get_suptitle().endswith(" (low trust)")
    *_, predicted, _ = figure.axes
    assert [len(drawn.get_offsets()) for drawn in predicted.collections] == [table.n_obs, 5]
    plt.close(figure)
    table.obs["peka_novelty"] = 0.5
    figure = pk.pl.expression(sdata, levels.index[levels == "high"][0])
    assert not figure.get_suptitle().endswith("trust)") and len(figure.axes[-2].collections) == 1
    plt.close(figure)


def test_groups_that_are_not_new(four: SpatialData, fitted: pk.Adapter) -> None:
    exact: dict[str, Any] = {"level": 0.5, "guarantee": "exact", **CPU}
    again = part(four, PATIENTS[2:])
    again["table"].obs["patient"] = again["table"].obs["patient"].astype(str).replace("P3", "P1")
    with pytest.raises(ValueError, match=r"\['P1'\] are names of training groups: more tissue of a training patient"):
        pk.tl.calibrate(fitted, again, **exact)
    with pytest.warns(UserWarning, match="Intervals may cover less in a new group: .* names of training groups"):
        pk.tl.calibrate(fitted, again, level=0.5, **CPU)
    one = part(four, PATIENTS[2:])
    one["table"].obs["patient"] = "P9"
    with pytest.raises(ValueError, match="patient 'P9' is in 2 groups, which are not independent then"):
        pk.tl.calibrate(fitted, one, **exact)
    spots = part(four, PATIENTS[2:])
    spots["table"].obs["spot"] = [f"s{i}" for i in range(spots["table"].n_obs)]
    with pytest.raises(ValueError, match="section 'P3S1_spots' is in .* groups, which are not independent then"):
        pk.tl.calibrate(fitted, spots, groups="spot", **exact)


def test_a_column_that_never_varied_has_no_interval(four: SpatialData) -> None:
    sdata = part(four, PATIENTS)
    table = sdata["table"]
    log = np.log1p(table.X.toarray())
    log[table.obs["region"].isin(PATIENTS[:2]).to_numpy(), 0] = 2.0
    table.layers["log"] = log
    adapter = pk.tl.fit_adapter(sdata, train=PATIENTS[:2], target="as_is", layer="log", **FIT)
    for calibrated in (pk.tl.calibrate(adapter), pk.tl.calibrate(adapter, part(sdata, PATIENTS[2:]), **CPU)):
        assert calibrated.calibration is not None
        at = adapter.genes.index(table.var_names[0])
        assert (
            np.isnan(calibrated.calibration.threshold[at]) and np.isfinite(calibrated.calibration.threshold).sum() > 20
        )


def test_what_is_the_users_own_stays(four: SpatialData, fitted: pk.Adapter) -> None:
    sdata = part(four, PATIENTS[2:])
    pk.tl.predict_expression(sdata, fitted, **CPU)
    sdata["table"].obs["peka_novelty"] = "mine"
    pk.tl.predict_expression(sdata, fitted, **CPU)
    assert (sdata["table"].obs["peka_novelty"] == "mine").all()
    other = part(four, PATIENTS[2:])
    other["table"].var["peka_trust"] = "mine"
    with pytest.raises(ValueError, match=r"would replace `var\['peka_trust'\]`, which was not written by this call"):
        pk.tl.predict_expression(other, pk.tl.calibrate(fitted), **CPU)


def test_three_layers_need_three_times_the_memory(four: SpatialData, fitted: pk.Adapter) -> None:
    sdata = part(four, PATIENTS[2:])
    n, m = sdata["table"].shape
    how: dict[str, Any] = {"compute": {"device": "cpu", "max_memory": 2 * 4 * n * m}, "progress": False}
    with pytest.raises(ValueError, match=f"3 layers of {n} x {m} would take"):
        pk.tl.predict_expression(sdata, pk.tl.calibrate(fitted), **how)


@pytest.mark.parametrize("image_mpp", [0.5, 2.0])
def test_a_wrong_pixel_size_is_novel(fitted: pk.Adapter, image_mpp: float) -> None:
    sdata = pk.datasets.phantom(n_patients=4, size_um=700, mpp=1.0, n_genes=24)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0, image_mpp=image_mpp, strict=False)
    with pytest.warns(UserWarning, match="Many tiles of"):
        pk.tl.predict_expression(sdata, pk.tl.calibrate(fitted), **CPU)
    assert (sdata["table"].obs["peka_novelty"] < 0.05).mean() > 0.3
