"""The synthetic slide: the same pixels however they are asked for, and counts that hold what was planted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import spatialdata
from scipy import ndimage
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Identity, get_transformation

import pekasc as pk
from pekasc.datasets._phantom_image import (
    STATES,
    SlideParams,
    nuclear_density,
    random_slide,
    render_region,
    stain,
    tissue_depth,
    tissue_state,
)

SLIDE = SlideParams(seed=7, width_um=800.0, height_um=700.0, state_scale_um=150.0)
BARE = replace(SLIDE, noise=0.0, blur_um=0.0)


@pytest.fixture(scope="module")
def sdata() -> SpatialData:
    return pk.datasets.phantom(n_patients=2, n_sections=2, size_um=(1300.0, 1000.0), mpp=2.0, random_state=3)


def log_normalised(counts: np.ndarray) -> np.ndarray:
    return np.log1p(1e4 * counts / counts.sum(1, keepdims=True))


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson of the columns of a and b."""
    a, b = a - a.mean(0), b - b.mean(0)
    return (a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0))


# ------------------------------------------------------------------------------------------------ image


@pytest.mark.parametrize("mpp", [0.5, 1.0, 3.0])
def test_pixels_do_not_depend_on_the_rectangle(mpp: float) -> None:
    slide = SLIDE.at_mpp(mpp)
    x0, y0, width, height = -13, 40, 211, 190
    whole = render_region(slide, x0, y0, width, height)
    for ys in (range(0, height, 64), range(0, height, 101)):
        for y in ys:
            for x in range(0, width, 37):
                w, h = min(37, width - x), min(ys.step, height - y)
                np.testing.assert_array_equal(
                    render_region(slide, x0 + x, y0 + y, w, h), whole[:, y : y + h, x : x + w]
                )


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    first = render_region(SLIDE, 300, 300, 80, 60)
    assert first.dtype == np.uint8 and first.shape == (3, 60, 80)
    np.testing.assert_array_equal(first, render_region(SLIDE, 300, 300, 80, 60))
    assert (first != render_region(replace(SLIDE, seed=8), 300, 300, 80, 60)).mean() > 0.9


def test_pixel_sizes_agree() -> None:
    fine = render_region(BARE, 400, 400, 400, 400).astype(float)
    for factor in (2, 4):
        coarse = render_region(BARE.at_mpp(0.5 * factor), 400 // factor, 400 // factor, 400 // factor, 400 // factor)
        mean = fine.reshape(3, 400 // factor, factor, 400 // factor, factor).mean((2, 4))
        assert np.abs(coarse - mean).mean() < 5
        assert all(np.corrcoef(c.ravel(), m.ravel())[0, 1] > 0.95 for c, m in zip(coarse, mean, strict=True))


def test_glass_is_background_and_tissue_is_not() -> None:
    mpp = 4.0
    slide = BARE.at_mpp(mpp)
    height, width = slide.shape_px
    image = render_region(slide, 0, 0, width, height)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    depth = tissue_depth(slide, np.stack([x, y], -1).reshape(-1, 2) * mpp).reshape(height, width)
    np.testing.assert_array_equal(
        image[:, depth < -20], np.broadcast_to([[243], [241], [244]], (3, (depth < -20).sum()))
    )
    assert 0.4 < (depth > 0).mean() < 0.95
    assert (image[1, depth > 20] < 220).mean() > 0.6


def test_nuclei_counted_are_the_nuclei_drawn() -> None:
    # round dark immune cells only: blobs of hematoxylin can be counted in the picture
    slide = replace(BARE, outline=False, crowding=0.12, state_bias=(-9.0, -9.0, 0.0, -9.0, -9.0), mpp=0.25)
    # light through hematoxylin only: it is black, eosin is invisible
    slide = replace(slide, hematoxylin=(1.0, 1.0, 1.0), eosin=(0.0, 0.0, 0.0))
    side_px = 1200
    image = render_region(slide, 0, 0, side_px, side_px)
    _, drawn = ndimage.label(image[0] < 130)
    side_um = side_px * slide.mpp
    counted = nuclear_density(slide, np.array([[side_um / 2, side_um / 2]]), side_um)[0] * (side_um / 1000) ** 2
    assert counted > 80
    assert drawn == pytest.approx(counted, rel=0.12)  # those that touch or are cut by the border


def test_counts_add_up_over_squares() -> None:
    whole = nuclear_density(SLIDE, np.array([[400.0, 350.0]]), 200.0)[0] * 0.2**2
    quarters = (
        nuclear_density(SLIDE, np.array([[x, y] for x in (350.0, 450.0) for y in (300.0, 400.0)]), 100.0) * 0.1**2
    )
    assert whole > 30
    assert quarters.sum() == pytest.approx(whole)


def test_states_are_memberships_with_smooth_borders() -> None:
    line = np.stack([np.arange(0.0, 800.0, 1.0), np.full(800, 333.0)], 1)
    states = tissue_state(SLIDE, line)
    assert states.shape == (800, len(STATES))
    np.testing.assert_allclose(states.sum(1), 1)
    assert states.min() >= 0
    assert np.abs(np.diff(states, axis=0)).max() < 0.15
    assert np.ptp(states, axis=0).max() > 0.8


def test_stains_differ_between_patients_and_random_slides_render() -> None:
    one, two = stain(1), stain(2)
    assert one == stain(1) and one != two
    same = stain(1, spread=0.0)
    assert same == stain(2, spread=0.0)
    colours = [render_region(replace(SLIDE, **look), 300, 300, 200, 200).mean((1, 2)) for look in (one, two)]
    assert np.abs(colours[0] - colours[1]).max() > 3
    slide = random_slide(5, mpp=1.0, outline=False)
    assert slide == random_slide(5, mpp=1.0, outline=False) and slide.mpp == 1.0 and not slide.outline
    assert render_region(slide, 0, 0, 64, 64).std() > 5


@pytest.mark.parametrize(
    ("mpp", "width", "message"), [(0.0, 10, "`mpp` must lie in"), (0.5, 0, "must be positive, got width=0")]
)
def test_impossible_regions_are_refused(mpp: float, width: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_region(SLIDE.at_mpp(mpp), 0, 0, width, 10)


# ------------------------------------------------------------------------------------------------ sections


def test_names_coordinates_and_columns(sdata: SpatialData) -> None:
    sections = ["P1S1", "P1S2", "P2S1", "P2S2"]
    assert sorted(sdata.images) == [f"{s}_he" for s in sections]
    assert sorted(sdata.shapes) == [f"{s}_spots" for s in sections]
    assert sorted(sdata.coordinate_systems) == sections
    table = sdata["table"]
    assert table.obs_names.is_unique and table.n_vars == 200
    assert table.X.dtype == np.float32 and (table.X.data == np.rint(table.X.data)).all()
    assert dict(table.uns["pekasc"]["image_mpp"]) == dict.fromkeys(sdata.images, 2.0)
    assert list(table.obs["patient"].cat.categories) == ["P1", "P2"]
    for s in sections:
        Image2DModel().validate(sdata[f"{s}_he"])
        assert sdata[f"{s}_he"]["scale0"].image.shape == (3, 500, 650)
        assert get_transformation(sdata[f"{s}_he"], s) == Identity()
        rows = table[table.obs["section"] == s]
        circles = sdata[f"{s}_spots"].loc[rows.obs["spot_id"]]
        np.testing.assert_array_equal(circles.get_coordinates().to_numpy(), rows.obsm["spatial"])
        assert (circles["radius"] == 27.5 / 2.0).all()
        name = f"{s}_{rows.obs['array_col'].iloc[0]}x{rows.obs['array_row'].iloc[0]}"
        assert rows.obs_names[0] == name


@pytest.mark.parametrize(("array", "pitch_x", "pitch_y"), [("visium", 50.0, 86.60254037844386), ("st", 200.0, 200.0)])
def test_grid_gives_the_pixel_size_exactly(array: str, pitch_x: float, pitch_y: float) -> None:
    table = pk.datasets.phantom(1, size_um=1100.0, mpp=0.8, array=array, lazy=True)["table"]  # type: ignore[arg-type]
    steps = table.obs[["array_col", "array_row"]].to_numpy() * [pitch_x, pitch_y]
    offset = table.obsm["spatial"] * 0.8 - steps
    np.testing.assert_allclose(offset, np.broadcast_to(offset[0], offset.shape), atol=1e-9)
    assert len(table) > 10
    if array == "visium":
        assert ((table.obs["array_col"] + table.obs["array_row"]) % 2 == 0).all()


def test_spots_lie_on_tissue(sdata: SpatialData) -> None:
    table = sdata["table"]
    for s in ("P1S1", "P2S2"):
        pixels = sdata[f"{s}_he"]["scale0"].image.to_numpy()
        x, y = np.floor(table[table.obs["section"] == s].obsm["spatial"]).astype(int).T
        glass = np.median(pixels[:, :20, :20].reshape(3, -1), axis=1)
        near = np.stack([pixels[:, y + dy, x + dx] for dy in (-8, 0, 8) for dx in (-8, 0, 8)])
        stained = np.abs(near - glass[:, None]).max(1) > 15
        assert stained.any(0).mean() > 0.97


def test_planted_dependence(sdata: SpatialData) -> None:
    table = sdata["table"]
    observed = log_normalised(table.X.toarray())
    truth, var = table.layers["truth"], table.var
    kind = var["phantom_depends_on"].to_numpy()
    assert dict(var["phantom_depends_on"].value_counts()) == {"state": 100, "density": 50, "nothing": 50}
    states = table.obsm["phantom_states"][list(STATES)].to_numpy()
    patient = (table.obs["patient"] == "P2").to_numpy(float)

    # the truth is a function of what is kept: nothing else moves it
    assert truth[:, kind == "nothing"].std(0).max() < 1e-5
    density = np.log1p(table.obs["phantom_density"].to_numpy() / 1000)
    log_share, effect = np.log(np.expm1(truth.astype(float))), var["phantom_effect"].to_numpy()
    own = states[:, [STATES.index(s) for s in var["phantom_state"][kind == "state"]]]
    for p in (0, 1):
        one = patient == p
        # within a kind and a patient, log ratios are linear in what the genes depend on, with the effects that are kept
        of_density, of_state = np.flatnonzero(kind == "density"), np.flatnonzero(kind == "state")
        ratio = log_share[np.ix_(one, of_density[1:])] - log_share[one][:, of_density[:1]]
        slope = np.polyfit(density[one], ratio, 1)[0]
        np.testing.assert_allclose(slope, (effect[of_density[1:]] - effect[of_density[0]]) / 0.6, atol=1e-3)
        expected = (effect[of_state] * own)[one]
        left = log_share[np.ix_(one, of_state)] - expected
        left -= left[:, :1]
        assert left.std(0).max() < 1e-3
        score = correlation(truth[np.ix_(one, of_density)], density[one, None])
        assert (np.sign(score) == np.sign(effect[of_density])).all()

    # the counts show it: against each gene's own state, and nothing for genes that depend on nothing
    assert np.median(correlation(observed[:, kind == "state"], own)) > 0.4
    assert np.median(np.abs(correlation(observed[:, kind == "density"], density[:, None]))) > 0.5
    none = observed[:, kind == "nothing"]
    bound = 4 / np.sqrt(len(none))
    for what in (*states.T, density):
        assert np.abs(correlation(none, what[:, None])).max() < bound
    assert np.median(correlation(observed[:, kind != "nothing"], truth[:, kind != "nothing"])) > 0.5


def test_counts_are_overdispersed_with_library_size_and_dropout(sdata: SpatialData) -> None:
    table = sdata["table"]
    nothing = (table.var["phantom_depends_on"] == "nothing").to_numpy()
    counts = table.X.toarray()
    library = counts.sum(1)
    assert 0.3 < np.log(library).std() < 0.55
    # constant share: beyond library size, the variance is far above Poisson's
    scaled = counts[:, nothing] * (library.mean() / library)[:, None]
    assert np.median(scaled.var(0) / scaled.mean(0)) > 2
    assert 0.02 < (counts == 0).mean() < 0.3


def test_same_seed_same_bytes_lazy_or_not(sdata: SpatialData) -> None:
    again = pk.datasets.phantom(
        n_patients=2, n_sections=2, size_um=(1300.0, 1000.0), mpp=2.0, random_state=3, lazy=True
    )
    for name in sdata.images:
        for scale in sdata[name]:
            np.testing.assert_array_equal(sdata[name][scale].image.to_numpy(), again[name][scale].image.to_numpy())
    one, two = sdata["table"], again["table"]
    assert (one.X != two.X).nnz == 0
    np.testing.assert_array_equal(one.layers["truth"], two.layers["truth"])
    np.testing.assert_array_equal(one.obsm["spatial"], two.obsm["spatial"])
    other = pk.datasets.phantom(1, size_um=(1300.0, 1000.0), mpp=2.0, random_state=4)
    assert (other["P1S1_he"]["scale0"].image.to_numpy() != sdata["P1S1_he"]["scale0"].image.to_numpy()).mean() > 0.5


def test_more_patients_leave_the_first_as_they_were(sdata: SpatialData) -> None:
    fewer = pk.datasets.phantom(1, size_um=(1300.0, 1000.0), mpp=2.0, random_state=3)
    first = sdata["table"][sdata["table"].obs["section"] == "P1S1"]
    assert (fewer["table"].X != first.X).nnz == 0
    np.testing.assert_array_equal(
        fewer["P1S1_he"]["scale0"].image.to_numpy(), sdata["P1S1_he"]["scale0"].image.to_numpy()
    )


def test_coarser_levels_are_means_of_the_finest() -> None:
    image = pk.datasets.phantom(1, size_um=1100.0, mpp=0.5, lazy=True)["P1S1_he"]
    assert [image[s].image.shape for s in image] == [(3, 2200, 2200), (3, 1100, 1100), (3, 550, 550)]
    fine = image["scale0"].image.data[:, 800:1200, 1000:1200].compute().astype(float)
    for scale, f in (("scale1", 2), ("scale2", 4)):
        level = image[scale].image.data[:, 800 // f : 1200 // f, 1000 // f : 1200 // f].compute()
        mean = fine.reshape(3, 400 // f, f, 200 // f, f).mean((2, 4))
        np.testing.assert_array_equal(level, np.floor(mean + 0.5))


def test_a_slide_of_ten_billion_pixels_is_only_described(monkeypatch: pytest.MonkeyPatch) -> None:
    from pekasc.datasets import _phantom

    drawn: list[int] = []

    def counting(params: SlideParams, x0: int, y0: int, width: int, height: int) -> np.ndarray:
        drawn.append(width * height)
        return render_region(params, x0, y0, width, height)

    monkeypatch.setattr(_phantom, "render_region", counting)
    sdata = pk.datasets.phantom(1, size_um=50_000.0, n_spots=60)
    image = sdata["P1S1_he"]
    assert image["scale0"].image.shape == (3, 100_000, 100_000)
    assert max(image[f"scale{len(image) - 1}"].image.shape) <= 1024
    assert sdata["table"].n_obs == 60
    assert not drawn
    x, y = sdata["table"].obsm["spatial"][0].astype(int)
    crop = image["scale0"].image.data[:, y - 50 : y + 50, x - 50 : x + 50].compute()
    assert crop.shape == (3, 100, 100) and crop.std() > 5
    assert sum(drawn) <= 4 * 1024**2  # no more than the chunks that the crop touches


def test_round_trip(sdata: SpatialData, tmp_path: Path) -> None:
    sdata.write(tmp_path / "phantom.zarr")
    back = spatialdata.read_zarr(tmp_path / "phantom.zarr")
    one, two = sdata["table"], back["table"]
    assert (one.X != two.X).nnz == 0
    np.testing.assert_array_equal(one.layers["truth"], two.layers["truth"])
    assert one.var.equals(two.var.loc[one.var_names])
    assert one.obsm["phantom_states"].equals(two.obsm["phantom_states"])
    assert dict(two.uns["pekasc"]["image_mpp"]) == dict(one.uns["pekasc"]["image_mpp"])
    for scale in sdata["P2S1_he"]:
        np.testing.assert_array_equal(back["P2S1_he"][scale].image.to_numpy(), sdata["P2S1_he"][scale].image.to_numpy())
    assert get_transformation(back["P2S1_spots"], "P2S1") == Identity()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_patients": 0}, "`n_patients` must be at least 1, got 0"),
        ({"n_genes": 3}, "`n_genes` must be at least 4"),
        ({"n_spots": 0}, "`n_spots` must be at least 1"),
        ({"mpp": 5.0}, r"`mpp` must lie in \(0, 4\]"),
        ({"size_um": -1.0}, "`size_um` must be positive"),
        ({"size_um": 40.0}, "No spot lies on the tissue .* larger `size_um`"),
        ({"array": "hex"}, r"`array='hex'` is unknown. Known arrays: \['visium', 'st'\]"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.datasets.phantom(**arguments)
