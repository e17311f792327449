from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from spatialdata import SpatialData

import pekasc as pk
from pekasc._sections._resolve import resolve_sections
from pekasc.pl._picture import chosen_sections, label, picture, radii_um

# rotation, anisotropic scale, flip and shift at once
AFFINE = np.array([[0.6, 0.8, -60.0], [0.9, -0.7, 150.0], [0, 0, 1]])


@pytest.mark.parametrize("multi_scale", [True, False])
@pytest.mark.parametrize("px_to_cs", [np.eye(3), AFFINE], ids=["straight", "affine"])
def test_picture_shows_what_lies_there(scene, scene_truth, px_to_cs, multi_scale) -> None:
    centre = np.array([[190.0, 160.0]]) if px_to_cs is AFFINE else np.array([[200.0, 180.0]])
    sdata = scene(centres=centre, px_to_cs=px_to_cs, multi_scale=multi_scale)
    (section,) = resolve_sections(sdata, um_coordinate_system="um")
    half, mpp = 24.0, 2.0
    x, y = section.centres_um[0]
    image, extent = picture(section, (x - half, y - half, x + half, y + half), max_px=24)
    assert image.shape == (24, 24, 3)
    assert extent == pytest.approx((x - half, x + half, y + half, y - half))
    truth = scene_truth(centre, 24, mpp)[0]
    inside = (truth > 5) & (truth < 250)
    assert inside.mean() > 0.8
    np.testing.assert_allclose(image[inside], truth[inside], atol=2.5)


def test_picture_is_never_finer_than_the_image(scene) -> None:
    sdata = scene()
    (section,) = resolve_sections(sdata, um_coordinate_system="um")
    image, _ = picture(section, (80.0, 60.0, 110.0, 80.0), max_px=5000)
    assert image.shape == (40, 60, 3)  # 0.5 um per pixel


def test_picture_in_blocks_is_the_picture_at_once(scene, monkeypatch) -> None:
    (section,) = resolve_sections(scene(), um_coordinate_system="um")
    box = (60.0, 50.0, 160.0, 131.0)
    once, extent = picture(section, box)
    monkeypatch.setattr("pekasc.pl._picture._BLOCK_PX", 37)
    blocks, same = picture(section, box)
    assert same == extent
    # the last grey level may round differently where a block's corner is not on the same decimal
    assert np.abs(once.astype(int) - blocks).max() <= 1


def test_a_section_without_an_image_is_white(scene) -> None:
    (section,) = resolve_sections(scene(), um_coordinate_system="um")
    image, extent = picture(replace(section, pyramid=None), (60.0, 50.0, 160.0, 130.0), max_px=50)
    assert image.shape == (40, 50, 3) and (image == 255).all()
    assert extent == (60.0, 160.0, 130.0, 50.0)


def test_big_slide_is_drawn_from_a_coarse_level() -> None:
    sdata = pk.datasets.phantom(1, size_um=20_000, n_spots=3, lazy=True, n_genes=4)  # 40,000 px wide
    section = resolve_sections(sdata)[0]
    image, _ = picture(section, (0, 0, 20_000, 20_000), max_px=128)
    assert image.shape == (128, 128, 3)
    assert np.ptp(image) > 50


def test_radius_is_in_micrometers(scene) -> None:
    sdata = scene(shapes_to_cs=np.diag([4.0, 4.0, 1.0]))  # radius 3 units, 4 x 0.5 um each
    (section,) = resolve_sections(sdata, um_coordinate_system="um")
    np.testing.assert_allclose(radii_um(sdata, section), 6.0)
    squares = scene(shapes_to_cs=np.diag([4.0, 4.0, 1.0]), polygons=True)  # side 1 unit: 2 um
    (section,) = resolve_sections(squares, um_coordinate_system="um")
    np.testing.assert_allclose(radii_um(squares, section), np.sqrt(4 / np.pi))


def test_sections_by_region_or_name(predicted: SpatialData) -> None:
    for asked in ("P2S1", "P2S1_spots", ["P2S1"]):
        (section,) = chosen_sections(predicted, asked, "table", "tiles")
        assert section.name == "P2S1_spots"
        assert label(predicted, section, "table") == "P2S1"
    assert len(chosen_sections(predicted, None, "table", "tiles")) == 2
    with pytest.raises(KeyError, match=r"Section 'P3' not found. Available sections: \['P1S1_spots', 'P2S1_spots'\]"):
        chosen_sections(predicted, "P3", "table", "tiles")
