"""Several scenes in one file: which there are, which is read, and that its pixel size is its own."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import pekasc as pk

RNG = np.random.default_rng(0)
LARGE, SMALL, OTHER = (
    RNG.integers(90, 220, (height, width, 3), dtype=np.uint8) for height, width in ((96, 144), (64, 48), (64, 48))
)
SCENES = {"left": (SMALL, 0.5), "right": (OTHER, 0.25), "both": (LARGE, 1.0), "Macro": (SMALL[:32], 8.0)}


def ome(path: Path, names: bool = True, subifds: bool = True) -> Path:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for name, (pixels, mpp) in SCENES.items():
            meta = {"axes": "YXS", "PhysicalSizeX": mpp, "PhysicalSizeY": mpp} | ({"Name": name} if names else {})
            how: dict[str, Any] = {"photometric": "rgb", "tile": (16, 16)}
            tiff.write(pixels, metadata=meta, subifds=int(subifds), **how)
            if subifds:
                tiff.write(pixels[::2, ::2], subfiletype=1, **how)
    return path


def read(path: Path, scene: int | str | None) -> tuple[str, np.ndarray, float]:
    sdata = pk.io.read_slide(path, scene=scene)
    ((name, image),) = sdata.images.items()
    level = image["scale0"]["image"].data if hasattr(image, "children") else image.data
    level = pickle.loads(pickle.dumps(level))
    return name, np.moveaxis(level.compute(), 0, -1), sdata.attrs["pekasc"]["image_mpp"][name]


@pytest.mark.parametrize(
    ("scene", "name", "expected"),
    [(None, "a.1", "both"), (2, "a.1_2", "both"), ("both", "a.1_both", "both"), (0, "a.1_0", "left"),
     ("right", "a.1_right", "right"), (1, "a.1_1", "right")],
)  # fmt: skip
def test_a_scene_has_its_own_pixels_and_pixel_size(
    tmp_path: Path, scene: int | str | None, name: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        found, pixels, mpp = read(ome(tmp_path / "a.1.ome.tif"), scene)
    assert found == name and mpp == SCENES[expected][1]
    assert np.array_equal(pixels, SCENES[expected][0])
    number = list(SCENES).index(expected)
    assert (
        "slide a.1.ome.tif: has 3 scenes: 0 'left' 48 x 64 px at 0.5 um per pixel; 1 'right' 48 x 64 px at 0.25 um per "
        f"pixel; 2 'both' 144 x 96 px at 1 um per pixel. Scene {number} is read" in caplog.text
    )
    assert "Left out: Macro (48 x 32 px)." in caplog.text
    assert ("the largest (`scene=` takes another)" in caplog.text) == (scene is None)


def test_two_scenes_of_one_file_at_once(tmp_path: Path) -> None:
    file = ome(tmp_path / "a.ome.tif", names=False, subifds=False)
    images = [pk.io.read_slide(file, scene=scene)[f"a_{scene}"].data for scene in (0, 1)]
    # dask tells them apart, as does the cache of open files
    assert np.array_equal(np.asarray(images[0] != images[1]), np.moveaxis(SMALL != OTHER, -1, 0))
    assert list(pk.io.read_slide(file, scene=1, name="he").images) == ["he"]


@pytest.mark.parametrize("scene", [3, -1, "middle", "Macro"])
def test_a_scene_that_is_not_there(tmp_path: Path, scene: int | str) -> None:
    with pytest.raises(
        ValueError, match=rf"`scene={scene!r}`: the slide 'a.ome.tif' has no such scene; it has 0 'left'"
    ):
        pk.io.read_slide(ome(tmp_path / "a.ome.tif"), scene=scene)


def test_scenes_of_one_name_are_taken_by_index(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        for pixels in (SMALL, LARGE):
            tiff.write(pixels, photometric="rgb", metadata={"axes": "YXS", "Name": "Scene"})
    with pytest.raises(ValueError, match=r"2 scenes of 'a\.ome\.tif' have that name\. Give an index: it has 0 'Scene'"):
        pk.io.read_slide(tmp_path / "a.ome.tif", scene="Scene")
    sdata = pk.io.read_slide(tmp_path / "a.ome.tif", scene=0)
    assert sdata["a_0"].shape == (3, 64, 48)


@pytest.mark.parametrize("scene", [True, 1.0])
def test_a_scene_is_an_index_or_a_name(tmp_path: Path, scene: Any) -> None:
    with pytest.raises(TypeError, match="must be the index or the name of a scene, got"):
        pk.io.read_slide(ome(tmp_path / "a.ome.tif"), scene=scene)


def test_pages_that_are_copies_are_no_scenes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for i in range(3):
            tiff.write(LARGE[:: 2**i, :: 2**i], photometric="rgb", tile=(16, 16), subfiletype=int(i > 0), metadata=None)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        sdata = pk.io.read_slide(tmp_path / "a.tif", scene=0)
    assert list(sdata.images) == ["a_0"] and "scenes" not in caplog.text
    with pytest.raises(ValueError, match="has no such scene; it has 0 144 x 96 px of unknown pixel size"):
        pk.io.read_slide(tmp_path / "a.tif", scene=1)
