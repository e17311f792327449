"""Which tissue is this: by what the image shows and where the tile lies, not by names."""

from __future__ import annotations

from collections.abc import Callable

import dask.array as da
import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import Affine, Identity, set_transformation

import pekasc as pk
from pekasc._sections import places, resolve_sections, tissue_of, trained_rows
from pekasc._sections._identity import Landmarks, alignment, find_landmarks

Scene = Callable[..., SpatialData]
TILE_UM = 112.0
SIDE_UM = 20.0  # 40 px of the scene


def test_places_are_the_centres_of_every_picture(scene: Scene) -> None:
    (section,) = resolve_sections(scene(), image_mpp=0.5)
    (name,) = section.picture_ids()
    found = places([section])
    assert list(found) == [name]
    np.testing.assert_array_equal(found[name], section.centres_px)
    # two regions of one picture are one tissue
    both = places([section.take(np.arange(5)), section.take(np.arange(5, 12))])
    np.testing.assert_array_equal(both[name], section.centres_px)


def test_a_spot_within_half_a_tile_of_a_trained_one_is_trained(scene: Scene) -> None:
    centres = np.array([[100.0, 100], [119, 100], [121, 100], [100, 119.5], [115, 115], [250, 250]])
    (section,) = resolve_sections(scene(centres=centres), image_mpp=0.5)
    trained = places([section.take(np.array([0]))])
    # half of 20 um is 20 px: rows 2 and 4 are farther away than that
    assert sorted(trained_rows([section], SIDE_UM, trained)) == [0, 1, 3]
    assert sorted(trained_rows([section], 1.5 * SIDE_UM, trained)) == [0, 1, 2, 3, 4]
    # rows are those of the table
    assert trained_rows([section.take(np.array([5, 1]))], SIDE_UM, trained).tolist() == [1]


@pytest.mark.parametrize("n", [0, 1])
def test_another_picture_in_the_same_place_is_not(scene: Scene, n: int) -> None:
    (section,) = resolve_sections(scene(), image_mpp=0.5)
    if n:
        other = scene()
        image = other["A_he"]
        for scale in image:
            image[scale]["image"].data = 255 - image[scale]["image"].data
        (inverted,) = resolve_sections(other, image_mpp=0.5)
        assert trained_rows([inverted], SIDE_UM, places([section])).size == 0
    assert trained_rows([section], SIDE_UM, {}).size == 0
    assert trained_rows([], SIDE_UM, places([section])).size == 0


def test_neither_names_nor_pixel_size_are_part_of_it(scene: Scene) -> None:
    (section,) = resolve_sections(scene(), image_mpp=0.5)
    (renamed,) = resolve_sections(scene(name="B"), image_mpp=0.5005)
    assert renamed.picture_ids() == section.picture_ids()
    assert trained_rows([renamed], SIDE_UM, places([section])).size == renamed.rows.size


def test_each_section_of_an_object_for_itself(scene: Scene) -> None:
    flipped = np.array([[-1.0, 0, 400], [0, 1, 0], [0, 0, 1]])
    sdata = sd.concatenate([scene(name="A"), scene(name="B", px_to_cs=flipped)], concatenate_tables=True)
    a, b = resolve_sections(sdata, image_mpp=0.5)
    assert sorted(trained_rows([a, b], SIDE_UM, places([b]))) == sorted(b.rows)


@pytest.fixture(scope="module")
def phantom() -> SpatialData:
    return pk.datasets.phantom(n_patients=2, size_um=1200, n_genes=20, mpp=1.0)


@pytest.fixture(scope="module")
def trained(phantom: SpatialData) -> dict[str, np.ndarray]:
    """Tissue of the first patient's section."""
    return tissue_of([section for section in resolve_sections(phantom) if section.name == "P1S1_spots"])


def shown(phantom: SpatialData, section: str, pixels: np.ndarray, to_full: np.ndarray) -> SpatialData:
    """Return an object with `section`'s spots on other pixels of its image, where `to_full` maps them to the first."""
    table = phantom["table"][phantom["table"].obs["region"] == f"{section}_spots"].copy()
    table.obs["region"] = table.obs["region"].cat.remove_unused_categories()
    table.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": f"{section}_spots"}
    out = SpatialData(
        images={"he": Image2DModel.parse(np.ascontiguousarray(pixels), dims=("c", "y", "x"))},
        shapes={f"{section}_spots": phantom.shapes[f"{section}_spots"].copy()},
        tables={"table": table},
    )
    set_transformation(out["he"], Affine(to_full, ("x", "y"), ("x", "y")), "full")
    set_transformation(out.shapes[f"{section}_spots"], Identity(), "full")
    return out


def pixels_of(phantom: SpatialData, section: str) -> np.ndarray:
    return np.asarray(sd.get_pyramid_levels(phantom[f"{section}_he"], n=0))


def coarser(pixels: np.ndarray, by: int) -> np.ndarray:
    height, width = (n // by for n in pixels.shape[1:])
    return pixels.reshape(3, height, by, width, by).mean(axis=(2, 4)).round().astype(np.uint8)


VIEWS = {
    "a coarser level": (lambda p: coarser(p, 2), [[2.0, 0, 0], [0, 2, 0], [0, 0, 1]]),
    "another size": (lambda p: p[:, :-1, :-3], np.eye(3)),
    "turned by 90 degrees": (lambda p: np.rot90(p, axes=(1, 2)), [[0.0, -1, 1200], [1, 0, 0], [0, 0, 1]]),
    "a mirror image": (lambda p: p[:, :, ::-1], [[-1.0, 0, 1200], [0, 1, 0], [0, 0, 1]]),
    "darker": (lambda p: (p * 0.9).astype(np.uint8), np.eye(3)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_the_same_tissue_however_it_is_shown(phantom: SpatialData, trained: dict[str, np.ndarray], view: str) -> None:
    change, to_full = VIEWS[view]
    for section in ("P1S1", "P2S1"):
        pixels = change(pixels_of(phantom, section))
        mpp = float(np.sqrt(abs(np.linalg.det(np.array(to_full)[:2, :2]))))
        (found,) = resolve_sections(shown(phantom, section, pixels, np.array(to_full)), image_mpp=mpp)
        rows = trained_rows([found], TILE_UM, trained)
        assert rows.size == (found.rows.size if section == "P1S1" else 0)


def test_a_crop_is_the_section_that_it_was_cut_from(phantom: SpatialData, trained: dict[str, np.ndarray]) -> None:
    for x, y in ((0, 0), (150, 90), (600, 560)):
        crop = sd.bounding_box_query(
            phantom, axes=("x", "y"), min_coordinate=[x, y], max_coordinate=[x + 600, y + 600],
            target_coordinate_system="P1S1",
        )  # fmt: skip
        sections = resolve_sections(crop, image_mpp=1.0)
        rows = trained_rows(sections, TILE_UM, trained)
        assert rows.size == (crop["table"].obs["region"] == "P1S1_spots").sum() > 9


def test_landmarks_say_where(phantom: SpatialData) -> None:
    first, _ = resolve_sections(phantom)
    half = coarser(pixels_of(phantom, "P1S1"), 2)
    (small,) = resolve_sections(shown(phantom, "P1S1", half, np.diag([2.0, 2, 1])), image_mpp=2.0)
    matrix = alignment(find_landmarks(small), find_landmarks(first))
    assert matrix is not None
    np.testing.assert_allclose(matrix[:2, :2], 2 * np.eye(2), atol=0.02)
    np.testing.assert_allclose(matrix[:2, 2], 0, atol=4)


def landmarks(points: np.ndarray, descriptors: np.ndarray) -> Landmarks:
    return Landmarks(np.column_stack([points, np.full(len(points), 2.0)]).astype(np.float32), descriptors)


@pytest.mark.parametrize(("n", "share"), [(40, 0.25), (600, 0.2)])  # all twos of pairs are tried, and some
def test_an_arrangement_is_found_among_wrong_pairs(n: int, share: float) -> None:
    rng = np.random.default_rng(0)
    descriptors = rng.integers(0, 256, (n, 128), dtype=np.uint8)
    points = rng.uniform(0, 2000, (n, 2))
    planted = np.array([[0.6, -0.8, 70], [0.8, 0.6, -30], [0, 0, 1]]) @ np.diag([2, 2, 1])
    elsewhere = rng.uniform(0, 4000, (n, 2))
    right = rng.permutation(n) < share * n
    known = np.where(right[:, None], points @ planted[:2, :2].T + planted[:2, 2], elsewhere)
    matrix = alignment(landmarks(points, descriptors), landmarks(known, descriptors))
    assert matrix is not None
    np.testing.assert_allclose(matrix, planted, atol=0.02)
    # as many pairs without an arrangement, or all onto one place, are none
    assert alignment(landmarks(points, descriptors), landmarks(elsewhere, descriptors)) is None
    assert alignment(landmarks(points, descriptors), landmarks(np.full((n, 2), 5.0), descriptors)) is None


def test_white_scans_of_one_size_are_different_tissue(scene: Scene) -> None:
    scans = []
    for seed in (0, 1):
        sdata = scene()
        for scale in sdata["A_he"]:
            image = sdata["A_he"][scale]["image"]
            white = np.full(image.shape, 255, np.uint8)
            n = image.shape[1] // 4
            biopsy = np.random.default_rng(seed).integers(100, 220, (3, n // 4, n // 4), dtype=np.uint8)
            white[:, n : n + n // 4 * 4, n : n + n // 4 * 4] = biopsy.repeat(4, 1).repeat(4, 2)
            image.data = da.from_array(white)
        scans.append(resolve_sections(sdata, image_mpp=0.5)[0])
    assert trained_rows([scans[1]], SIDE_UM, tissue_of([scans[0]])).size == 0
    assert trained_rows([scans[0]], SIDE_UM, tissue_of([scans[0]])).size == scans[0].rows.size
