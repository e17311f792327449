"""The power of the objective: read from the file, recorded, and checked against the pixel size."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import pekasc as pk
from pekasc.io._power import tiff_power

PIXELS = np.full((64, 96, 3), 200, np.uint8)
TWO_OBJECTIVES = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Instrument ID="Instrument:0">
<Objective ID="Objective:0" NominalMagnification="10"/><Objective ID="Objective:1" NominalMagnification="{power}"/>
</Instrument><Image ID="Image:0"><ObjectiveSettings ID="Objective:1"/><Pixels ID="Pixels:0" DimensionOrder="XYCZT"
Type="uint8" SizeX="96" SizeY="64" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="{mpp}" PhysicalSizeY="{mpp}">
<Channel ID="Channel:0" SamplesPerPixel="3"/><TiffData IFD="0" PlaneCount="1"/></Pixels></Image></OME>"""


def write(path: Path, **how: Any) -> Path:
    tifffile.imwrite(path, PIXELS, **{"photometric": "rgb", "metadata": None, "tile": (32, 32)} | how)
    return path


def aperio(mpp: float | None, power: Any, size: str = "96x64") -> dict[str, Any]:
    said = "" if mpp is None else f"|MPP = {mpp}"
    return {"description": f"Aperio Image Library v12\r\n{size} (32x32) JPEG/RGB Q=70|AppMag = {power}{said}"}


def ome(mpp: float, power: Any) -> dict[str, Any]:
    return {"description": TWO_OBJECTIVES.format(mpp=mpp, power=power)}


@pytest.mark.parametrize(
    ("how", "power", "source"),
    [
        (aperio(0.25, 40), 40, "description (MPP)"),
        (aperio(0.499, "20"), 20, "description (MPP)"),
        (aperio(0.504, 40.0), 40, "description (MPP)"),
        (aperio(0.125, 40), 40, "description (MPP)"),
        (ome(0.5, 20), 20, "OME metadata"),
    ],
)
def test_the_power_is_recorded_beside_the_pixel_size(
    tmp_path: Path, how: dict[str, Any], power: float, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        sdata = pk.io.read_slide(write(tmp_path / "s.tif", **how))
    assert sdata.attrs["pekasc"]["objective_power"] == {"s": power}
    assert sdata.attrs["pekasc"]["image_mpp_source"] == {"s": source}
    assert f"um by its {source}, objective {power}x by its " in caplog.text


@pytest.mark.parametrize("how", [aperio(1.0, 40), aperio(0.25, 10), ome(0.1, 20)])
def test_a_pixel_size_that_contradicts_the_power(tmp_path: Path, how: dict[str, Any]) -> None:
    file = write(tmp_path / "s.tif", **how)
    match = r"'s\.tif' says [\d.]+ um per pixel by its .*, but an objective of [124]0x by its .* about .* `image_mpp=`"
    with pytest.raises(ValueError, match=match):
        pk.io.read_slide(file)
    given = pk.io.read_slide(file, image_mpp=1.0).attrs["pekasc"]
    assert given["image_mpp"] == {"s": 1.0} and given["image_mpp_source"] == {"s": "image_mpp"}
    assert "objective_power" in given


def test_an_image_saved_at_another_size_has_other_pixels(tmp_path: Path) -> None:
    tags = {"resolution": (1e4, 1e4), "resolutionunit": "CENTIMETER"}
    found = pk.io.read_slide(write(tmp_path / "s.tif", **aperio(0.25, 40, "384x256"), **tags)).attrs["pekasc"]
    assert found["image_mpp"] == {"s": 1.0} and found["objective_power"] == {"s": 40}


def test_a_power_is_no_pixel_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sdata = pk.io.read_slide(write(tmp_path / "s.tif", **aperio(None, 20)))
    assert sdata.attrs["pekasc"] == {"objective_power": {"s": 20}}
    assert "does not say its pixel size (the power of its objective, 20x, is none). Give `image_mpp=`" in caplog.text


@pytest.mark.parametrize("power", [0, -1, "nan", "1e9", "forty"])
def test_what_is_no_power(tmp_path: Path, power: Any) -> None:
    assert tiff_power(write(tmp_path / "s.tif", **aperio(0.25, power)), 0) is None
    assert "objective_power" not in pk.io.read_slide(tmp_path / "s.tif").attrs["pekasc"]
