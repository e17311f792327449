"""`Readout.stain` through every call that reads tiles: the same map everywhere, and nothing of the test group in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pekasc as pk
from pekasc._keys import read_uns
from pekasc._sections import reference_stain, tiled_sections
from pekasc.tiling import Stain, StainMap

FIRST, SECOND = "P1S1_spots", "P2S1_spots"
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None, depth=2, n_components=10)
STAINED = RIDGE.replace(stain="reinhard")
QUICK: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}
CPU = QUICK["compute"]


def with_image(sdata: SpatialData, region: str, change: Callable[[np.ndarray], np.ndarray]) -> SpatialData:
    """Return an object in which the image of a section is another, (3, y, x)."""
    name = f"{region[:-6]}_he"
    old = sdata.images[name]
    level = np.asarray(old["scale0"]["image"])
    new = Image2DModel.parse(
        change(level), dims=("c", "y", "x"), c_coords=["r", "g", "b"], scale_factors=[2, 2],
        transformations=get_transformation(old, get_all=True),
    )  # fmt: skip
    return SpatialData(
        images={**sdata.images, name: new}, shapes=dict(sdata.shapes), tables={"table": sdata["table"].copy()}
    )


def paler(level: np.ndarray) -> np.ndarray:
    """Return an image with 0.6 of the stain."""
    return np.clip(256 * ((level.astype(float) + 1) / 256) ** 0.6 - 1, 0, 255).round().astype(np.uint8)


def fit(sdata: SpatialData, readout: pk.Readout = STAINED, **how: Any) -> pk.Adapter:
    return pk.tl.fit_adapter(sdata, **{"method": None, "readout": readout, "train": [FIRST], **QUICK, **how})


@pytest.fixture(scope="module")
def stained(_tiled: SpatialData) -> pk.Adapter:
    """Return a frozen encoder with context and a wider field of view, fitted on both patients with a stain."""
    readout = pk.Readout(stain="reinhard", context_um=150, fields_um=(224,), n_components=10)
    return fit(_tiled, readout, train=None)


def predicted(sdata: SpatialData, adapter: pk.Adapter, **how: Any) -> np.ndarray:
    pk.tl.predict_expression(sdata, adapter, **{**QUICK, **how})
    return np.asarray(sdata["table"].layers["peka"])


def test_the_reference_is_the_mean_of_the_training_sections_alone(tiled: SpatialData, stained: pk.Adapter) -> None:
    """Check that neither other sections are looked at, nor the rest of one that is trained on in part."""
    sections, spec = tiled_sections(tiled)
    first, second = sections
    assert stained.stain == reference_stain(sections, spec, "reinhard")[0]
    own = reference_stain([first], spec, "reinhard")[0]
    assert fit(tiled).stain == own != reference_stain([second], spec, "reinhard")[0]
    some = np.arange(tiled["table"].n_obs) < 38
    cut = reference_stain([first.take(some[first.rows])], spec, "reinhard")[0]
    assert fit(tiled, train=some).stain == cut != own


def test_the_test_sections_image_changes_nothing_in_a_fit(
    tiled: SpatialData, all_bits: Callable[[pk.Adapter], dict[str, bytes]]
) -> None:
    adapter = fit(tiled)
    other = fit(with_image(tiled, SECOND, lambda level: 255 - level))
    assert other.stain == adapter.stain
    ours, theirs = all_bits(adapter), all_bits(other)
    assert {name: ours[name] for name in ours if name in theirs} == {n: b for n, b in theirs.items() if n in ours}


def test_training_and_prediction_read_the_same_tiles(tiled: SpatialData, stained: pk.Adapter) -> None:
    """Check that arrays, recoloured by hand, give what the calls on the object give."""
    plain = replace(stained, stain=None)
    maps = pk.get.stain_maps(tiled, stained)
    assert list(maps) == [FIRST, SECOND] and all(each.reference == stained.stain for each in maps.values())
    layer = predicted(tiled, stained)
    table = tiled["table"]
    assert read_uns(table, "peka")["stain"] == "reinhard"  # type: ignore[index]
    section = table.obs["region"].astype(str).to_numpy()
    tiles, wide = (pk.get.tiles(tiled, field_um=field).to_numpy() for field in (None, 224.0))
    by_hand = [np.concatenate([maps[name](a[section == name]) for name in (FIRST, SECOND)]) for a in (tiles, wide)]
    np.testing.assert_array_equal(section, np.sort(section))  # so that the parts join in the order of the rows
    places: dict[str, Any] = {"mpp": 2.0, "coords_um": _centres(tiled), "section": section, "compute": CPU}
    expected = plain.predict(by_hand[0], fields={224.0: by_hand[1]}, **places)
    columns = table.var_names.get_indexer(stained.genes)
    np.testing.assert_allclose(layer[:, columns], expected, rtol=0, atol=1e-5)
    given = stained.predict(tiles, fields={224.0: wide}, stain=maps, **places)
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5)
    # measured on the tiles given: all of the sections, at nearly the same pixels
    near = stained.predict(tiles, fields={224.0: wide}, stain="tiles", **places)
    np.testing.assert_allclose(near, expected, rtol=0, atol=0.02)
    assert np.abs(plain.predict(tiles, fields={224.0: wide}, **places) - expected).max() > 0.05
    # features
    pk.tl.embed_tiles(tiled, stained, key_added="mine", **QUICK)
    assert read_uns(table, "mine")["stain"] == "reinhard"  # type: ignore[index]
    features = plain.embed(by_hand[0], mpp=2.0, compute=CPU)
    np.testing.assert_allclose(table.obsm["mine"], features, atol=1e-4)
    np.testing.assert_allclose(table.obsm["X_peka"], features, atol=1e-4)
    of_maps = stained.embed(tiles, mpp=2.0, section=section, stain=maps, compute=CPU)
    np.testing.assert_allclose(of_maps, features, atol=1e-4)


def _centres(sdata: SpatialData) -> np.ndarray:
    out = np.empty((sdata["table"].n_obs, 2))
    for section in tiled_sections(sdata)[0]:
        out[section.rows] = section.centres_um
    return out


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_a_section_stained_otherwise_is_brought_back(tiled: SpatialData, method: str) -> None:
    def otherwise(level: np.ndarray) -> np.ndarray:
        if method == "reinhard":
            return paler(level)
        # another hue: part of the absorbance of red goes to blue, as no less stain does
        density = -np.log((level.astype(float) + 1) / 256)
        density = np.stack([0.8 * density[0], density[1], density[2] + 0.2 * density[0]])
        return np.clip(256 * np.exp(-density) - 1, 0, 255).round().astype(np.uint8)

    other = with_image(tiled, SECOND, otherwise)
    rows = (tiled["table"].obs["region"] == SECOND).to_numpy()
    moved = {}
    for readout in (RIDGE, RIDGE.replace(stain=method)):
        adapter = fit(tiled, readout)
        found = [predicted(sdata, adapter)[rows] for sdata in (tiled, other)]
        moved[readout.stain] = np.nanmean(np.abs(found[1] - found[0])) / np.nanstd(found[0])
    assert moved[method] < 0.5 * moved[None]


def test_features_of_another_stain_are_never_reused(tiled: SpatialData, tmp_path: Path, counted: list[int]) -> None:
    adapter = fit(tiled)
    plain, other = (
        replace(adapter, stain=None),
        replace(adapter, stain=Stain("reinhard", (8.5, 0, 0), (0.3, 0.05, 0.02))),
    )
    expected = [predicted(tiled, each).copy() for each in (adapter, plain, other)]
    n = tiled["table"].n_obs
    for each, values in zip((adapter, plain, other), expected, strict=True):
        counted.clear()
        np.testing.assert_allclose(predicted(tiled, each, store=tmp_path / "store"), values, atol=1e-5)
        assert sum(counted) == n
        counted.clear()
        predicted(tiled, each, store=tmp_path / "store")
        assert not counted
    # a section that is stained otherwise has another map and other pixels
    counted.clear()
    predicted(with_image(tiled, SECOND, paler), adapter, store=tmp_path / "store")
    assert sum(counted) == (tiled["table"].obs["region"] == SECOND).sum()
    # features alone
    for each in (adapter, plain):
        counted.clear()
        pk.tl.embed_tiles(tiled, each, store=tmp_path / "features", **QUICK)
        assert sum(counted) == n


def test_a_grid_and_its_novelty(tiled: SpatialData) -> None:
    adapter = pk.tl.fit_adapter(tiled, method=None, readout=STAINED, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # intervals of two groups
        adapter = pk.tl.calibrate(adapter)
    grid: dict[str, Any] = {"tile_px": 56, "mpp": 2.0, "stride_um": 112, "tissue": False, "min_sharpness": None}
    p_values = []
    for sdata in (with_image(tiled, SECOND, np.array), with_image(tiled, SECOND, paler)):
        pk.pp.tile_grid(sdata, "P2S1_he", image_mpp=1.0, **grid)
        pk.tl.predict_expression(sdata, adapter, table_name="grid", **QUICK)
        p_values.append(sdata["grid"].obs["peka_novelty"].to_numpy())
        assert sdata["grid"].layers["peka"].shape == (sdata["grid"].n_obs, len(adapter.genes))
        assert list(pk.get.stain_maps(sdata, adapter, table_name="grid")) == ["P2S1_he_grid"]
    plain = replace(adapter, stain=None)
    sdata = with_image(tiled, SECOND, paler)
    pk.pp.tile_grid(sdata, "P2S1_he", image_mpp=1.0, **grid)
    pk.tl.predict_expression(sdata, plain, table_name="grid", **QUICK)
    # what is brought back is less novel than what is not
    unstained = sdata["grid"].obs["peka_novelty"].to_numpy()
    assert np.abs(p_values[1] - p_values[0]).mean() < np.abs(unstained - p_values[0]).mean()


def test_a_fold_is_a_fit_on_its_training_sections(tiled: SpatialData, tmp_path: Path) -> None:
    """Check that a comparison scores what `fit_adapter` on the fold's training sections predicts."""
    how: dict[str, Any] = {
        "methods": ["frozen-best"], "genes": {"some": list(tiled["table"].var_names[:6])}, "per_gene": True,
        "folds": {"P2": ([FIRST], [SECOND])}, "progress": False,
    }  # fmt: skip
    readouts = [RIDGE.replace(depth="best", n_depths=1), STAINED.replace(depth="best", n_depths=1)]
    frame = pk.tl.cross_validate(tiled, readout=readouts, compute={**CPU, "cache": tmp_path / "cache"}, **how)
    again = pk.tl.cross_validate(tiled, readout=readouts[::-1], compute={**CPU, "cache": tmp_path / "cache"}, **how)
    alone = pk.tl.cross_validate(tiled, readout=readouts[1], compute=CPU, **how)
    keys = ["gene", "section", "readout"]
    scores = {
        name: f.set_index(keys)["pearson"].sort_index() for name, f in {"a": frame, "b": again, "c": alone}.items()
    }
    np.testing.assert_allclose(scores["a"], scores["b"], atol=1e-6)
    np.testing.assert_allclose(scores["a"].reindex(scores["c"].index), scores["c"], atol=1e-3)
    by_readout = frame.groupby("readout")["pearson"].mean()
    assert by_readout.nunique() == 2
    for readout in readouts:
        adapter = fit(tiled, readout, genes=how["genes"]["some"])
        pk.tl.predict_expression(tiled, adapter, **QUICK)
        pk.tl.evaluate(tiled)
        own = tiled["table"].var["peka_pearson"].reindex(adapter.genes)
        found = frame[(frame["readout"] == repr(readout)) & (frame["section"] == SECOND)].set_index("gene")["pearson"]
        np.testing.assert_allclose(found.reindex(adapter.genes), own, atol=2e-3)


def test_a_fold_that_cuts_a_section_measures_each_side_on_its_own(
    tiled: SpatialData, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pekasc.models.comparing import Comparison

    seen: list[Any] = []
    whole = Comparison.on_encoder

    def spy(self: Comparison, *arguments: Any) -> Any:
        seen.append(self.bench)
        return whole(self, *arguments)

    monkeypatch.setattr(Comparison, "on_encoder", spy)
    train = np.arange(tiled["table"].n_obs) % 2 == 0
    with pytest.warns(UserWarning, match="spots of one section in training and in test"):
        pk.tl.cross_validate(
            tiled, methods=["frozen"], readout=STAINED, folds={"odd": (train, ~train)}, genes="svg", n_genes=4, **QUICK
        )
    (bench,) = seen
    (source, *_), _ = bench.stained("odd")
    sections, spec = tiled_sections(tiled)
    reference, own = reference_stain([s.take(train[s.rows]) for s in sections], spec, "reinhard")
    assert [found.reference for found in source.maps] == [reference] * 4
    assert [found.source for found in source.maps[:2]] == own
    assert source.maps[2].source != own[0]
    np.testing.assert_array_equal(source.which >= 2, ~train[np.concatenate([s.rows for s in sections])])


def test_the_audit_takes_a_stain(tiled: SpatialData) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = pk.tl.leakage_audit(tiled, methods=["frozen"], readout=STAINED, genes="svg", n_genes=4, **QUICK)
    assert len(frame) and np.isfinite(frame[["grouped", "random_spots"]]).all(axis=None)


def test_an_unfinished_fit_of_another_stain_is_not_gone_on_from(
    tiled: SpatialData, tmp_path: Path, trained_options: dict[str, Any],
    all_bits: Callable[[pk.Adapter], dict[str, bytes]],
) -> None:  # fmt: skip
    how: dict[str, Any] = {**trained_options, "train": None, "compute": {"device": "cpu", "resume": tmp_path / "state"}}
    first = pk.tl.fit_adapter(tiled, **{**how, "readout": STAINED})
    again = pk.tl.fit_adapter(tiled, **{**how, "readout": STAINED})
    assert all_bits(again) == all_bits(first) and again.stain == first.stain
    for readout in (RIDGE, RIDGE.replace(stain="macenko")):
        with pytest.raises(ValueError, match="stain"):
            pk.tl.fit_adapter(tiled, **{**how, "readout": readout})


def test_a_section_without_tissue_is_refused_and_the_object_as_it_was(tiled: SpatialData, stained: pk.Adapter) -> None:
    white = with_image(tiled, SECOND, lambda level: np.full_like(level, 250))
    before = sorted(white["table"].uns["pekasc"]), list(white["table"].obsm), list(white["table"].obs)
    calls: list[Callable[[], object]] = [
        lambda: pk.tl.predict_expression(white, stained, **QUICK),
        lambda: pk.tl.embed_tiles(white, stained, **QUICK),
        lambda: pk.get.stain_maps(white, stained),
        lambda: fit(white, train=None),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"Section '{SECOND}': 0 of \d+ pixels of 8 um under its tiles show tissue"
        ):
            call()
        assert before == (sorted(white["table"].uns["pekasc"]), list(white["table"].obsm), list(white["table"].obs))
    with pytest.raises(ValueError, match=rf"Fold 'P1S1_spots', section '{SECOND}' \(\d+ training spots\): 0 of"):
        pk.tl.cross_validate(
            white, methods=["frozen"], groups="region", readout=STAINED, genes="svg", n_genes=4, **QUICK
        )


def test_what_has_no_reference(tiled: SpatialData, frozen: pk.Adapter) -> None:
    with pytest.raises(ValueError, match="'stain' does nothing in this call: colours are brought to those of training"):
        pk.tl.embed_tiles(tiled, "tiny", readout={"stain": "reinhard"}, **QUICK)
    with pytest.raises(ValueError, match="fitted without `stain`"):
        pk.get.stain_maps(tiled, frozen)
    with pytest.raises(ValueError, match=r"`readout`: `stain='reinhart'` must be one of .*Did you mean 'reinhard'"):
        fit(tiled, {"stain": "reinhart"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="HEST-Bench embeds every tile once"):
        pk.tl.cross_validate(tiled, methods=["frozen"], protocol="hest", readout={"stain": "reinhard"}, **QUICK)


def test_what_an_adapter_says_of_its_stain(stained: pk.Adapter, frozen: pk.Adapter, tmp_path: Path) -> None:
    assert "  stain       reinhard, brought to the mean colours of the training sections" in repr(stained).splitlines()
    assert "stain" not in repr(frozen)
    assert "stain='reinhard'" in stained.info["call"]
    pk.report(stained, tmp_path / "a.html")
    pk.report(frozen, tmp_path / "b.html")
    assert "the colours of every section are brought to the mean" in (tmp_path / "a.html").read_text()
    assert "Stain normalisation" not in (tmp_path / "b.html").read_text()


def test_maps_of_a_section_by_itself(tiled: SpatialData, stained: pk.Adapter) -> None:
    """Check that a single section needs no name, and that a map of another adapter is refused."""
    rows = (tiled["table"].obs["region"] == FIRST).to_numpy()
    tiles = pk.get.tiles(tiled).to_numpy()[rows]
    found = pk.get.stain_maps(tiled, stained)[FIRST]
    one = stained.embed(tiles, mpp=2.0, stain=found, compute=CPU)
    np.testing.assert_array_equal(stained.embed(tiles, mpp=2.0, stain={"any": found}, compute=CPU), one)
    foreign = StainMap(found.source, replace(found.reference, first=(8.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="This stain map is of another adapter"):
        stained.embed(tiles, mpp=2.0, stain=foreign, compute=CPU)
    with pytest.raises(ValueError, match="`section` must have shape"):
        stained.embed(tiles, mpp=2.0, stain=found, section=np.zeros(3), compute=CPU)
    with pytest.raises(TypeError, match="`adapter` must be a pekasc.Adapter, got str"):
        pk.get.stain_maps(tiled, "x")  # type: ignore[arg-type]
    pk.pp.tile(tiled, tile_px=28, mpp=4.0, key_added="coarse")
    with pytest.raises(ValueError, match="trained on tiles of 56 px"):
        pk.get.stain_maps(tiled, stained, key="coarse")
    with pytest.raises(ValueError, match="trained on tiles of 56 px"):
        pk.pl.tiles(tiled, adapter=stained, key="coarse")
