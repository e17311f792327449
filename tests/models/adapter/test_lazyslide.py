"""Models for LazySlide: on the same tiles, the values of pekasc; without the package, as it calls them, and in it."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd
import tifffile
import torch
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.adapter import _lazyslide
from pekasc.models.adapter._lazyslide import ToTensor

CPU = {"device": "cpu"}


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lazyslide, "version", lambda name: "0.13.0")


@pytest.fixture(scope="module")
def grid(make_sections: Callable[[], SpatialData]) -> SpatialData:
    """Return a slide with tiles on a grid finer than the training spots."""
    sdata = make_sections()
    pk.pp.tile_grid(sdata, "P2S1_he", tile_px=56, mpp=2.0, stride_um=50, min_sharpness=None)
    return sdata


@pytest.fixture(scope="module")
def without_fields(adapter: pk.Adapter) -> pk.Adapter:
    """Return the adapter with the heads that read the tile alone, and its spatial context."""
    members = tuple(member for member in adapter.reading.members if not member.fields)
    return replace(adapter, reading=replace(adapter.reading, members=members), fields_um=())


def batches(sdata: SpatialData, size: int = 16) -> Iterator[torch.Tensor]:
    """Yield batches of the tiles of a grid as LazySlide makes them."""
    pixels = pk.get.tiles(sdata, table_name="grid").to_numpy()
    for start in range(0, len(pixels), size):
        yield torch.stack([ToTensor()(tile) for tile in pixels[start : start + size]])


def embedded(model: Any, sdata: SpatialData) -> np.ndarray:
    return np.vstack([model.encode_image(batch) for batch in batches(sdata)])


def corners(sdata: SpatialData) -> np.ndarray:
    """Return the upper left corners of the tiles in pixels of the slide, as LazySlide reads them off its shapes."""
    bounds = sdata["P2S1_he_grid_tiles"].geometry.bounds
    return bounds[["minx", "miny"]].to_numpy()


@pytest.mark.usefixtures("_installed")
def test_features_and_predictions_are_those_of_pekasc(grid: SpatialData, without_fields: pk.Adapter) -> None:
    image, feature = models = without_fields.as_lazyslide(mpp=2.0, slide_mpp=1.0)
    assert feature.needs_coords and feature.whole_slide
    made = embedded(image, grid)
    pk.tl.predict_expression(grid, without_fields, table_name="grid", compute=CPU, progress=False)
    table = grid["grid"]
    np.testing.assert_allclose(made[:, : image.n_features], table.obsm["X_peka"], atol=1e-5)
    predicted = feature.predict(made, corners(grid))
    assert tuple(predicted) == without_fields.genes
    np.testing.assert_allclose(np.column_stack(list(predicted.values())), table.layers["peka"], atol=1e-5)
    # context matters, so that corners that are not turned into centres, or a wrong pixel size, would be seen
    alone = models.tile_model(without_fields.genes[1])
    single = np.concatenate([alone.predict(batch)[without_fields.genes[1]] for batch in batches(grid)])
    assert np.abs(single - table.layers["peka"][:, 1]).max() > 1e-2
    tiles = pk.get.tiles(grid, table_name="grid").to_numpy()
    expected = without_fields.predict(tiles, mpp=2.0, compute=CPU)[:, 1]
    np.testing.assert_allclose(single, expected, atol=1e-5)
    wrong = without_fields.as_lazyslide(mpp=2.0, slide_mpp=0.25).feature.predict(made, corners(grid))
    assert np.abs(wrong[without_fields.genes[1]] - table.layers["peka"][:, 1]).max() > 1e-3


@pytest.mark.usefixtures("_installed")
def test_without_context_tiles_are_predicted_one_by_one(
    grid: SpatialData, sections: SpatialData, fit: Callable[..., pk.Adapter]
) -> None:
    plain = fit(sections, method=None)
    image, feature = plain.as_lazyslide(mpp=2.0, genes=plain.genes[3:0:-1])
    assert not feature.needs_coords and not feature.whole_slide
    assert (image.name, feature.features_model_name) == ("peka", "peka") and feature.name != image.name
    made = embedded(image, grid)
    parts = [feature.predict(torch.from_numpy(made[i : i + 7])) for i in range(0, len(made), 7)]
    assert tuple(parts[0]) == plain.genes[3:0:-1]
    expected = plain.predict(pk.get.tiles(grid, table_name="grid").to_numpy(), mpp=2.0, compute=CPU)
    found = np.concatenate([np.column_stack(list(part.values())) for part in parts])
    np.testing.assert_allclose(found, expected[:, [3, 2, 1]], atol=1e-5)


@pytest.mark.usefixtures("_installed")
def test_wider_fields_of_view_are_left_out_and_that_is_said(
    grid: SpatialData, adapter: pk.Adapter, without_fields: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="pekasc"):
        image, feature = adapter.as_lazyslide(mpp=2.0, slide_mpp=1.0)
    assert "wider fields of view (168 um) cannot be read in LazySlide" in caplog.text
    made = embedded(image, grid)
    pk.tl.predict_expression(grid, without_fields, table_name="grid", compute=CPU, progress=False)
    found = np.column_stack(list(feature.predict(made, corners(grid)).values()))
    np.testing.assert_allclose(found, grid["grid"].layers["peka"], atol=1e-5)
    only_wide = tuple(member for member in adapter.reading.members if member.fields)
    with pytest.raises(ValueError, match="heads that only read fields of view of 168 um"):
        replace(adapter, reading=replace(adapter.reading, members=only_wide)).as_lazyslide(mpp=2.0, slide_mpp=1.0)


@pytest.mark.usefixtures("_installed")
def test_tiles_of_another_size_are_refused(without_fields: pk.Adapter) -> None:
    with pytest.raises(ValueError, match="trained on tiles of 56 px at 2 um/px .* 56 px at 0.5 um/px"):
        without_fields.as_lazyslide(mpp=0.5, slide_mpp=0.5)
    image, _ = without_fields.as_lazyslide(mpp=2.0, slide_mpp=0.5)
    with pytest.raises(ValueError, match="trained on tiles of 56 px .* these have 64 px"):
        image.encode_image(torch.zeros((2, 3, 64, 64), dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be squares of 56 px, got 40 x 56 px"):
        image.encode_image(torch.zeros((2, 3, 56, 40), dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(n, 3, 56, 56\) uint8, and got \(2, 3, 56, 56\) torch.float32"):
        image.encode_image(torch.zeros((2, 3, 56, 56)))
    with pytest.raises(ValueError, match="uint8, and got"):
        image.encode_image(np.zeros((2, 56, 56, 3), dtype=np.uint8))


@pytest.mark.usefixtures("_installed")
def test_a_stain_map_is_refused(without_fields: pk.Adapter) -> None:
    mapped = replace(without_fields)
    object.__setattr__(mapped, "stain", object())
    with pytest.raises(ValueError, match="maps the stain of a slide .*LazySlide gives tiles as they are"):
        mapped.as_lazyslide(mpp=2.0, slide_mpp=1.0)


@pytest.mark.usefixtures("_installed")
def test_what_context_needs(without_fields: pk.Adapter) -> None:
    with pytest.raises(ValueError, match="`slide_mpp=wsi.properties.mpp`"):
        without_fields.as_lazyslide(mpp=2.0)
    with pytest.raises(ValueError, match="`slide_mpp` must be a positive number, got -1"):
        without_fields.as_lazyslide(mpp=2.0, slide_mpp=-1)
    image, feature = without_fields.as_lazyslide(mpp=2.0, slide_mpp=1.0)
    columns = np.zeros((4, image.n_columns), dtype=np.float32)
    with pytest.raises(ValueError, match="`coords` is None: predict with .* of LazySlide 0.13 or newer, which"):
        feature.predict(columns)
    with pytest.raises(ValueError, match=r"must have shape \(4, 2\)"):
        feature.predict(columns, np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"features have shape \(4, 5\), and this adapter's image model makes"):
        feature.predict(columns[:, :5], np.zeros((4, 2)))
    members = tuple(m for m in without_fields.reading.members if m.head.context_um is not None)
    only = replace(without_fields, reading=replace(without_fields.reading, members=members))
    with pytest.raises(ValueError, match="uses the neighbours within 200 um, which a model of single tiles has not"):
        only.as_lazyslide(mpp=2.0, slide_mpp=1.0).tile_model(only.genes[0])


@pytest.mark.usefixtures("_installed")
def test_a_stride_too_coarse_for_the_context_is_said(
    without_fields: pk.Adapter, caplog: pytest.LogCaptureFixture
) -> None:
    image, feature = without_fields.as_lazyslide(mpp=2.0, slide_mpp=1.0)
    x, y = np.meshgrid(np.arange(4) * 112.0, np.arange(3) * 112.0)
    with caplog.at_level(logging.WARNING, logger="pekasc"):
        feature.predict(np.zeros((12, image.n_columns), dtype=np.float32), np.column_stack([x.ravel(), y.ravel()]))
    assert "Tiles are 112 um apart" in caplog.text


@pytest.mark.usefixtures("_installed")
def test_genes_that_are_not_predicted(without_fields: pk.Adapter) -> None:
    gene = without_fields.genes[0]
    with pytest.raises(KeyError, match=f"does not predict .*{gene}x.*Did you mean {gene}"):
        without_fields.as_lazyslide(mpp=2.0, slide_mpp=1.0, genes=[gene, f"{gene}x"])
    with pytest.raises(ValueError, match="`genes=` is empty: name at least one gene"):
        without_fields.as_lazyslide(mpp=2.0, slide_mpp=1.0).tile_model([])


def test_lazyslide_is_missing_or_old(without_fields: pk.Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_lazyslide, "version", missing)
    with pytest.raises(ImportError, match=r"LazySlide is not installed: `pip install 'pekasc\[lazyslide\]'`"):
        without_fields.as_lazyslide(mpp=2.0, slide_mpp=1.0)
    monkeypatch.setattr(_lazyslide, "version", lambda name: "0.12.1")
    with pytest.raises(ImportError, match="LazySlide 0.12.1 is installed.* 0.13 is needed"):
        without_fields.as_lazyslide(mpp=2.0, slide_mpp=1.0)


@pytest.mark.usefixtures("_installed")
def test_what_lazyslide_asks_of_a_model(without_fields: pk.Adapter, caplog: pytest.LogCaptureFixture) -> None:
    models = without_fields.as_lazyslide(mpp=2.0, slide_mpp=1.0)
    assert pickle.loads(pickle.dumps(models.image.get_transform()))  # its workers get a copy
    single = models.tile_model(without_fields.genes[0])
    assert re.fullmatch(
        r"LazySlideModels\(image=ImageModel\(encoder='tiny', tile_px=56, mpp=2, n_features=\d+, n_columns=\d+\), "
        rf"feature=FeatureModel\(n_genes={len(without_fields.genes)}, context_um=\(200.0,\)\)\)",
        repr(models),
    )
    assert repr(single).startswith("TileModel(n_genes=1, image=ImageModel(encoder='tiny', ")
    assert repr(single.get_transform()) == "ToTensor()"
    for model in (*models, single):
        assert model.to("cpu") is model
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="pekasc"):
            model.try_compile(mode="default")
        assert "`compile=` is ignored" in caplog.text


@pytest.fixture(scope="module")
def file(make_sections: Callable[[], SpatialData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a slide of 2 um per pixel, at which the adapter reads tiles."""
    sdata = make_sections()
    pixels = np.moveaxis(np.asarray(sd.get_pyramid_levels(sdata["P2S1_he"], n=1)), 0, -1)
    path = tmp_path_factory.mktemp("slides") / "s.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            np.ascontiguousarray(pixels), photometric="rgb", tile=(256, 256), compression="zlib", metadata=None,
            resolution=(1e4 / 2.0,) * 2, resolutionunit="CENTIMETER",
        )  # fmt: skip
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", ["openslide", "tiffslide"])
def test_in_lazyslide(file: Path, adapter: pk.Adapter, without_fields: pk.Adapter, reader: str) -> None:
    zs = pytest.importorskip("lazyslide", reason="needs LazySlide: pip install 'pekasc[lazyslide]'")
    protocols = pytest.importorskip("lazyslide_models.base")
    pytest.importorskip(reader)
    from wsidata import open_wsi

    wsi = open_wsi(file, store=None, reader=reader)
    zs.pp.tile_tissues(wsi, 56, mpp=2.0, stride_px=25, tissue_key=None, background_filter=False)
    image, feature = models = adapter.as_lazyslide(mpp=2.0, slide_mpp=wsi.properties.mpp)
    single = models.tile_model(adapter.genes[:2])
    assert isinstance(image, protocols.ImageModelProtocol)
    assert isinstance(feature, protocols.FeaturePredictionModelProtocol)
    assert isinstance(single, protocols.TilePredictionModelProtocol)
    how = {"device": "cpu", "pbar": False}
    zs.tl.feature_extraction(wsi, image, batch_size=5, **how)
    zs.tl.feature_prediction(wsi, feature, batch_size=10, **how)
    zs.tl.tile_prediction(wsi, single, batch_size=7, **how)
    # pekasc on LazySlide's tiles, of the same object
    pk.pp.tile_grid(
        wsi, "wsi", shapes="tiles", tile_px=56, mpp=2.0, tissue=False, min_sharpness=None, max_pen=None
    )  # fmt: skip
    pk.tl.predict_expression(wsi, without_fields, table_name="grid", compute=CPU, progress=False)
    table, features, predicted = wsi["grid"], wsi["peka_tiles"], wsi["peka_expression_tiles"]
    assert table.n_obs == len(wsi["tiles"]) > 100
    np.testing.assert_array_equal(table.obs["tile_id"], predicted.obs["tile_id"])
    np.testing.assert_allclose(features.X[:, : image.n_features], table.obsm["X_peka"], atol=1e-5)
    np.testing.assert_allclose(predicted.X, table.layers["peka"], atol=1e-5)
    assert list(predicted.var_names) == list(adapter.genes)
    tiles = pk.get.tiles(wsi, table_name="grid").to_numpy()
    alone = without_fields.predict(tiles, mpp=2.0, compute=CPU)[:, :2]
    np.testing.assert_allclose(wsi["tiles"][list(adapter.genes[:2])].to_numpy(), alone, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lazyslides_tiles_of_another_size_are_refused(file: Path, without_fields: pk.Adapter) -> None:
    zs = pytest.importorskip("lazyslide", reason="needs LazySlide: pip install 'pekasc[lazyslide]'")
    from wsidata import open_wsi

    wsi = open_wsi(file, store=None, reader="openslide")
    zs.pp.tile_tissues(wsi, 48, mpp=2.0, tissue_key=None, background_filter=False)
    image, _ = without_fields.as_lazyslide(mpp=2.0, slide_mpp=2.0)
    with pytest.raises(ValueError, match="trained on tiles of 56 px .* these have 48 px"):
        zs.tl.feature_extraction(wsi, image, device="cpu", pbar=False)
    assert "peka_tiles" not in wsi.tables
