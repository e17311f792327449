"""What every call reads of an object: spots, expression and positions in one order; tiles made where none are."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from spatialdata import SpatialData

import pekasc as pk
from pekasc._expression import log1p_cp10k
from pekasc._keys import read_uns
from pekasc._settings import HINT
from pekasc.tiling import TileSpec
from pekasc.tl._read import ensure_tiles, field_scales, fields_of, reading, untiled_on_error

HOW: dict[str, Any] = {"table_name": "table", "key": "tiles", "layer": None, "gene_key": None, "groups": None}


def state(sdata: SpatialData) -> tuple[Any, ...]:
    table = sdata["table"]
    return sorted(sdata.shapes), list(table.obs), sorted(table.uns.get("pekasc", {}))


def test_everything_is_in_one_order(tiled: SpatialData) -> None:
    order = np.random.default_rng(0).permutation(tiled["table"].n_obs)
    table = tiled["table"][order].copy()
    values = table.X.toarray()
    values[3] = 0
    table.X = values
    del tiled.tables["table"]
    tiled.tables["table"] = table
    with reading(tiled, **HOW) as spots:
        assert len(spots.rows) == table.n_obs - 1 and 3 not in spots.rows
        np.testing.assert_allclose(spots.expression, log1p_cp10k(table)[spots.rows])
        np.testing.assert_array_equal(spots.counts, values[spots.rows])
        assert spots.group_key == "patient"
        np.testing.assert_array_equal(spots.groups, table.obs["patient"].iloc[spots.rows].astype(str))
        np.testing.assert_array_equal(spots.labels, table.obs["region"].iloc[spots.rows].astype(str))
        np.testing.assert_allclose(spots.coords_um, table.obsm["spatial"][spots.rows], atol=1e-6)  # 1 um per pixel
        assert list(spots.names) == list(table.var_names)
        tiles = pk.get.tiles(tiled).to_numpy()
        (source,) = spots.read_tiles((1.0,), 2**30)
        np.testing.assert_array_equal(source.read(np.arange(source.n)), tiles[spots.rows])
        assert np.concatenate([section.rows for section in spots.sections]).tolist() == spots.rows.tolist()


def test_nothing_outside_train_is_looked_at(tiled: SpatialData) -> None:
    table = tiled["table"]
    values = table.X.toarray()
    values[(table.obs["region"] == "P2S1_spots").to_numpy()] = np.nan
    table.X = values
    with reading(tiled, **HOW, train=["P1S1"]) as spots:
        assert set(spots.labels) == {"P1S1_spots"} and len(spots.sections) == 1
        assert spots.group_key is None  # one patient: sections are held out
        assert np.isfinite(spots.expression).all()


def test_the_counts_of_data_as_stored_are_looked_for_elsewhere(tiled: SpatialData) -> None:
    table = tiled["table"]
    table.layers["log"] = log1p_cp10k(table)
    with reading(tiled, **{**HOW, "layer": "log"}, target="as_is") as spots:
        assert spots.counts_layer is None
        np.testing.assert_array_equal(spots.counts.toarray(), table.X[spots.rows].toarray())


def test_what_is_left_out_is_counted(tiled: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    table = tiled["table"]
    values = table.X.toarray()
    values[:2] = 0
    table.X = values
    shapes = tiled.shapes["P2S1_spots_tiles"]
    tiled.shapes["P2S1_spots_tiles"] = shapes.drop(index=shapes.index[:3])
    with caplog.at_level(logging.INFO, logger="pekasc"), pytest.warns(UserWarning, match="Spots without a tile"):
        with reading(tiled, **HOW):
            pass
    assert "Left out: 2 spots without counts, 3 without a tile." in caplog.text
    table.X = np.zeros_like(values)
    with pytest.raises(ValueError, match="No spot has both a tile and counts"), reading(tiled, **HOW):
        pass


@pytest.mark.parametrize("how", ["raises inside", "refused while reading", "interrupted"])
def test_tiles_that_a_failing_call_made_go_again(untiled: SpatialData, how: str) -> None:
    before = state(untiled)
    options = {**HOW, "groups": "donor"} if how == "refused while reading" else HOW
    error = {"raises inside": RuntimeError, "refused while reading": KeyError, "interrupted": KeyboardInterrupt}[how]
    with pytest.raises(error), reading(untiled, **options):
        assert "P1S1_spots_tiles" in untiled.shapes
        raise error
    assert state(untiled) == before
    with reading(untiled, **HOW) as spots:
        assert (spots.spec.tile_px, spots.spec.mpp) == (224, 0.5)
    assert "P1S1_spots_tiles" in untiled.shapes  # and stay where all went well


def test_tiles_that_were_there_stay_when_a_call_fails(tiled: SpatialData) -> None:
    before = state(tiled)
    with pytest.raises(RuntimeError), untiled_on_error(tiled, table_name="table", key="tiles"):
        raise RuntimeError
    assert state(tiled) == before and "P1S1_spots_tiles" in tiled.shapes


def test_an_adapters_size_is_taken_where_nothing_is_there(
    untiled: SpatialData, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        _, spec = ensure_tiles(untiled, table_name="table", key="tiles", spec=TileSpec(56, 2.0))
    assert (spec.tile_px, spec.mpp) == (56, 2.0) and "Tiled: 56 px at 2 um/px." in caplog.text
    assert read_uns(untiled["table"], "tiles")["tile_px"] == 56  # type: ignore[index]
    with caplog.at_level(logging.INFO, logger="pekasc"):
        _, spec = ensure_tiles(untiled, table_name="table", key="tiles", spec=TileSpec(28, 4.0))
    assert spec.tile_px == 56 and "tiles 'tiles'" in caplog.text  # what is there is used, and said


def test_an_object_that_cannot_be_tiled_shows_the_line_that_does(unknown: SpatialData) -> None:
    before = state(unknown)
    line = r"`pekasc\.pp\.tile\(sdata, tile_px=224, mpp=0\.5, \.\.\.\)`"
    with pytest.raises(ValueError, match=line), reading(unknown, **HOW):
        pass
    with pytest.raises(ValueError, match=r"tile_px=56, mpp=2, key_added='wide', \.\.\.\)"):
        ensure_tiles(unknown, table_name="table", key="wide", spec=TileSpec(56, 2.0))
    assert state(unknown) == before


def _fields(sdata: SpatialData, **how: Any) -> tuple[float, ...]:
    """Return the fields of view that a fit of the frozen encoder takes by itself."""
    options: dict[str, Any] = {"method": None, "compute": {"device": "cpu"}, "progress": False, **how}
    readout = pk.Readout(head="ridge", depth=1, context_um=None)
    return pk.tl.fit_adapter(sdata, readout=readout, **options).fields_um


def test_a_wider_field_is_read_where_there_is_tissue_to_spare(
    tiled: SpatialData, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(HINT, logger="pekasc"):
        assert _fields(tiled) == (448.0,)  # patients are held out: no margin takes spots away
    for name in ("P1S1", "P2S1"):
        assert f"section {name}_spots, field of view of 448 um: 56 px at 8 um/px, " in caplog.text
    assert "the tile alone" not in caplog.text


def test_a_margin_that_leaves_too_few_spots_drops_the_field(
    tiled: SpatialData, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(HINT, logger="pekasc"):
        assert _fields(tiled, train=["P1S1"]) == ()  # blocks of one section of 0.7 mm
    line = "Field of view: the tile alone. The margin of one of 448 um would leave an inner fold 0 % of its spots."
    assert line in caplog.text and "field of view of" not in caplog.text


@pytest.mark.parametrize(("kept", "fields"), [([(5, 10), (9, 10)], (448.0,)), ([(10, 10), (4, 10)], ())])
def test_the_scarcest_inner_fold_decides(
    tiled: SpatialData, caplog: pytest.LogCaptureFixture, kept: list[tuple[int, int]], fields: tuple[float, ...]
) -> None:
    with caplog.at_level(HINT, logger="pekasc"), reading(tiled, **HOW) as spots:
        assert fields_of(spots, pk.Readout(), lambda width: kept) == fields
        assert fields_of(spots, pk.Readout(fields_um=(300, 200)), lambda width: kept) == (300.0, 200.0)
        assert fields_of(spots, pk.Readout(fields_um=None), lambda width: kept) == ()
        adapted = pk.Readout(members=("adapted:ridge", "adapted:low-rank"))  # which read no field beyond the tile
        assert fields_of(spots, adapted, lambda width: kept) == ()
    assert ("leave an inner fold 40 % of its spots" in caplog.text) == (not fields)


def test_an_image_that_is_too_small_drops_the_field(tiled: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    pk.pp.tile(tiled, tile_px=56, mpp=8.0)
    with caplog.at_level(HINT, logger="pekasc"):
        assert _fields(tiled) == ()
    assert "Field of view: the tile alone, since 1792 um cannot be read: " in caplog.text
    assert "tiles of 1792 um lie to 8" in caplog.text


def test_fields_that_are_given_and_do_not_fit_are_errors(tiled: SpatialData) -> None:
    spec = TileSpec(56, 2.0)
    assert field_scales(spec, (224.0, 448.0)) == (1.0, 2.0, 4.0) and field_scales(spec, None) == (1.0,)
    with pytest.raises(ValueError, match=r"112.5 um is not wider than the tile \(112 um\): .* such as \(448,\)"):
        field_scales(spec, (112.5,))
    with reading(tiled, **HOW) as spots, pytest.raises(ValueError, match="tiles of 4480 um lie to 9.% outside"):
        spots.read_tiles((1.0, 40.0), 2**30)


def test_a_table_alone_has_no_tiles(tiled: SpatialData) -> None:
    with pytest.raises(TypeError, match="Tiles need images: expected a SpatialData, got AnnData"):
        ensure_tiles(tiled["table"], table_name="table", key="tiles")  # type: ignore[arg-type]
