"""Where red, green and blue lie in a TIFF, and what is refused by its name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

import pekasc as pk
from pekasc.tiling._chunks import chunk_source

PIXELS = np.random.default_rng(0).integers(90, 220, (100, 140, 3), dtype=np.uint8)
PLANES = np.moveaxis(PIXELS, -1, 0)


def ome(
    path: Path, planes: np.ndarray = PLANES, n_levels: int = 1, photometric: str = "minisblack", **channel: Any
) -> Path:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for i in range(n_levels):
            meta = {"axes": "CYX", **({"Channel": channel} if channel else {})}
            tiff.write(
                planes[:, :: 2**i, :: 2**i], photometric="minisblack", tile=(32, 48), compression="deflate",
                subifds=n_levels - 1 if i == 0 else None, subfiletype=int(i > 0), metadata=meta if i == 0 else None,
            )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["Red", "Green", "Blue"], [0, 1, 2]),
        (["B", "G", "R"], [2, 1, 0]),
        (["Channel 0", "Channel 1", "Channel 2"], [0, 1, 2]),
        (None, [0, 1, 2]),
    ],
)
def test_three_planes_of_an_ome_tiff_are_a_slide(tmp_path: Path, names: list[str] | None, order: list[int]) -> None:
    file = ome(tmp_path / "s.ome.tif", **({} if names is None else {"Name": names}))
    level = pk.io.read_slide(file)["s"].data
    assert np.array_equal(level.compute(), PLANES[order])
    source = chunk_source(level)
    assert source is not None and np.array_equal(source.read_chunk(1, 1), PLANES[order][:, 32:64, 48:96])


def test_channels_without_names_are_a_choice_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pekasc"):
        pk.io.read_slide(ome(tmp_path / "a.ome.tif", Name=["Red", "Green", "Blue"]))
        assert "taken as red" not in caplog.text
        pk.io.read_slide(ome(tmp_path / "b.ome.tif"))
    assert "b.ome.tif: three channels without names are taken as red, green and blue." in caplog.text


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_channels_of_imagej(tmp_path: Path, compression: str | None) -> None:
    how: dict[str, Any] = {"imagej": True, "compression": compression}
    tifffile.imwrite(tmp_path / "s.tif", PLANES, metadata={"axes": "CYX", "mode": "composite"}, **how)
    assert np.array_equal(pk.io.read_slide(tmp_path / "s.tif")["s"].data.compute(), PLANES)
    tifffile.imwrite(tmp_path / "s.tif", PLANES, metadata={"axes": "CYX", "Labels": ["DAPI", "CD3", "CD8"]}, **how)
    with pytest.raises(ValueError, match="not red, green and blue. They are 'DAPI', 'CD3', 'CD8'"):
        pk.io.read_slide(tmp_path / "s.tif")


def test_colours_name_channels_that_have_no_name(tmp_path: Path) -> None:
    file = ome(tmp_path / "s.ome.tif", Color=[65535, 16711935, -16776961])  # blue, green, red
    assert np.array_equal(pk.io.read_slide(file)["s"].data.compute(), PLANES[::-1])


def test_planes_with_a_pyramid(tmp_path: Path) -> None:
    tree = pk.io.read_slide(ome(tmp_path / "s.ome.tif", n_levels=3, Name=["Red", "Green", "Blue"]))["s"]
    for i in range(3):
        assert np.array_equal(tree[f"scale{i}"]["image"].data.compute(), PLANES[:, :: 2**i, :: 2**i])


@pytest.mark.parametrize("photometric", ["rgb", "minisblack"])
def test_samples_in_planes(tmp_path: Path, photometric: str) -> None:
    how: dict[str, Any] = {"photometric": photometric, "planarconfig": "separate"}
    tifffile.imwrite(tmp_path / "s.ome.tif", PLANES, tile=(32, 48), metadata={"axes": "SYX"}, ome=True, **how)
    assert np.array_equal(pk.io.read_slide(tmp_path / "s.ome.tif")["s"].data.compute(), PLANES)


@pytest.mark.parametrize(
    ("channel", "match"),
    [
        ({"Name": ["DAPI", "CD3", "CD8"]}, "not red, green and blue. They are 'DAPI', 'CD3', 'CD8'"),
        ({"Name": ["Red", "Green", "Green"]}, "not red, green and blue"),
        ({"Color": [255, 16711935, 65535]}, "not red, green and blue"),
        ({"Fluor": ["a", "b", "c"]}, "not red, green and blue"),
    ],
)
def test_stains_are_not_taken_for_colours(tmp_path: Path, channel: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=rf"s\.ome\.tif' \(level 0\) .*{match}"):
        pk.io.read_slide(ome(tmp_path / "s.ome.tif", **channel))


def test_four_channels_are_no_slide(tmp_path: Path) -> None:
    planes = np.concatenate([PLANES, PLANES[:1]])
    with pytest.raises(ValueError, match="must be RGB, but has 4 channels in 4 pages. They are 'a', 'b', 'c', 'd'"):
        pk.io.read_slide(ome(tmp_path / "s.ome.tif", planes, Name=list("abcd")))


def test_pages_that_do_not_say_their_colours(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", PLANES, photometric="minisblack", metadata=None)
    with pytest.raises(ValueError, match="pages of one channel each and does not say which colours"):
        pk.io.read_slide(tmp_path / "s.tif")


@pytest.mark.parametrize(
    ("pixels", "how", "match"),
    [
        (PIXELS.astype(np.uint16), {"photometric": "rgb"}, r"uint16 \(RGB\)\. Convert it to 8 bit, .*>> 8"),
        (PIXELS[..., 0], {"photometric": "minisblack"}, "must be RGB of uint8, but has axes YX"),
        (PIXELS, {"photometric": "miniswhite", "planarconfig": "contig"}, "not red, green and blue: MINISWHITE"),
        (
            PIXELS[..., 0],
            {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)},
            r"PALETTE.*convert\('RGB'\)",
        ),
    ],
)
def test_what_is_no_rgb_is_refused_by_name(tmp_path: Path, pixels: np.ndarray, how: dict[str, Any], match: str) -> None:
    tifffile.imwrite(tmp_path / "s.tif", pixels, metadata=None, **how)
    with pytest.raises(ValueError, match=rf"s\.tif' \(level 0\) .*{match}"):
        pk.io.read_slide(tmp_path / "s.tif")


@pytest.mark.parametrize(
    ("orientation", "match"), [(3, "turned by 180"), (6, "90 degrees clockwise"), (77, "not defined")]
)
def test_a_slide_that_is_to_be_turned_is_refused(tmp_path: Path, orientation: int, match: str) -> None:
    tifffile.imwrite(
        tmp_path / "s.tif", PIXELS, photometric="rgb", metadata=None, extratags=[(274, 3, 1, orientation, True)]
    )
    with pytest.raises(ValueError, match=rf"orientation {orientation} \(.*{match}.*upright"):
        pk.io.read_slide(tmp_path / "s.tif")


def test_an_upright_slide_may_say_so(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", PIXELS, photometric="rgb", metadata=None, extratags=[(274, 3, 1, 1, True)])
    assert np.array_equal(pk.io.read_slide(tmp_path / "s.tif")["s"].data.compute(), PLANES)


def test_a_larger_image_that_is_no_slide_is_not_passed_over(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as tiff:
        tiff.write(PIXELS, photometric="rgb", metadata=None)
        tiff.write(np.zeros((300, 300), np.uint8), photometric="minisblack", metadata=None)
    with pytest.raises(ValueError, match="must be RGB of uint8, but has axes YX"):
        pk.io.read_slide(tmp_path / "s.tif")


def test_a_level_is_not_taken_for_the_slide(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", PIXELS, photometric="rgb", metadata=None, subfiletype=1)
    with pytest.raises(ValueError, match="is a reduced copy of one that is damaged"):
        pk.io.read_slide(tmp_path / "s.tif")


def test_a_fourth_channel_of_no_defined_kind(tmp_path: Path) -> None:
    rgba = np.concatenate([PIXELS, PIXELS[..., :1]], axis=-1)
    tifffile.imwrite(tmp_path / "s.tif", rgba, photometric="rgb", extrasamples=["unspecified"], metadata=None)
    with tifffile.TiffFile(tmp_path / "s.tif", mode="r+b") as tiff:
        tiff.pages[0].tags[338].overwrite(7)
    with pytest.raises(ValueError, match=r"ExtraSamples is \[7\]; 0, 1 and 2 are defined"):
        pk.io.read_slide(tmp_path / "s.tif")


def test_overlapping_tiles_of_ventana_are_refused(tmp_path: Path) -> None:
    xmp = b"<EncodeInfo><iScan/></EncodeInfo>"
    tifffile.imwrite(
        tmp_path / "s.tif", PIXELS, photometric="rgb", tile=(32, 48), metadata=None,
        software="Ventana", extratags=[(700, 1, len(xmp), xmp, True)],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"is a slide of Ventana \(BIF\), whose tiles overlap.*vips tiffsave"):
        pk.io.read_slide(tmp_path / "s.tif")
