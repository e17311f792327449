"""Which tissue is this: by what the image shows and where the tile lies, not by names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import spatialdata as sd
from spatialdata import SpatialData

from pekasc._sections import places, resolve_sections, trained_rows

Scene = Callable[..., SpatialData]
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
