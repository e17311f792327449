"""PNG and JPEG as slides."""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pekasc as pk
from pekasc.io import _picture

PIXELS = np.random.default_rng(0).integers(90, 220, (60, 80, 3), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    return np.moveaxis(pk.io.read_slide(path)["he"].data.compute(), 0, -1)


@pytest.mark.parametrize(
    ("ending", "how"),
    [("png", {}), ("jpg", {}), ("jpeg", {"subsampling": 0, "quality": 100}), ("jpg", {"progressive": True}),
     ("jpg", {"dpi": (72, 72)}), ("JPG", {})],
)  # fmt: skip
def test_the_pixels_of_a_picture(tmp_path: Path, ending: str, how: dict[str, Any]) -> None:
    file = tmp_path / f"he.{ending}"
    Image.fromarray(PIXELS).save(file, **how)
    sdata = pk.io.read_slide(file, image_mpp=0.5)
    truth = np.moveaxis(np.asarray(Image.open(file)), -1, 0)
    assert np.array_equal(sdata["he"].data.compute(), truth)
    assert np.array_equal(pickle.loads(pickle.dumps(sdata["he"].data))[:, 3:9, 5:7].compute(), truth[:, 3:9, 5:7])
    assert sdata.attrs["pekasc"]["image_mpp"] == {"he": 0.5}


def test_a_picture_says_no_pixel_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "he.png", dpi=(25400, 25400))
    assert not pk.io.read_slide(tmp_path / "he.png").attrs
    assert "he.png does not say its pixel size" in caplog.text


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "he.tif", "png")
    assert np.array_equal(read(tmp_path / "he.tif"), PIXELS)


def test_transparent_is_white(tmp_path: Path) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (60, 80, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([PIXELS, alpha], axis=-1)).save(tmp_path / "he.png")
    np.testing.assert_allclose(read(tmp_path / "he.png"), PIXELS * (alpha / 255) + 255 - alpha, atol=0.51)
    Image.fromarray(PIXELS).save(tmp_path / "he.png", transparency=tuple(int(n) for n in PIXELS[5, 7]))
    expected = PIXELS.copy()
    expected[(PIXELS == PIXELS[5, 7]).all(-1)] = 255
    assert np.array_equal(read(tmp_path / "he.png"), expected)


@pytest.mark.parametrize("transparency", [None, 3])
def test_a_palette_is_resolved(tmp_path: Path, transparency: int | None) -> None:
    image = Image.fromarray(PIXELS).quantize(16)
    image.save(tmp_path / "he.png", **({} if transparency is None else {"transparency": transparency}))
    expected = np.asarray(image.convert("RGB")).copy()
    if transparency is not None:
        expected[np.asarray(image) == transparency] = 255
    assert np.array_equal(read(tmp_path / "he.png"), expected)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_a_picture_that_is_to_be_turned_is_refused(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"he.{ending}"
    Image.fromarray(PIXELS).save(file, exif=_exif(1))
    assert read(file).shape == PIXELS.shape
    Image.fromarray(PIXELS).save(file, exif=_exif(6))
    with pytest.raises(ValueError, match=r"orientation 6 \(turned by 90 degrees clockwise\)"):
        pk.io.read_slide(file)


def _bomb(path: Path) -> None:
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def _cut(path: Path, ending: str) -> None:
    Image.fromarray(PIXELS).save(path, ending)
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda f: Image.fromarray(PIXELS[..., 0]).save(f, "png"), "It is greyscale"),
        (lambda f: Image.fromarray(PIXELS[..., 0]).save(f, "jpeg"), "It is greyscale"),
        (lambda f: Image.fromarray(PIXELS[..., :2]).save(f, "png"), "It is greyscale"),
        (lambda f: Image.fromarray(PIXELS[..., 0].astype(np.uint16)).save(f, "png"), "16 bits per channel.*>> 8"),
        (lambda f: Image.fromarray(PIXELS).convert("CMYK").save(f, "jpeg"), r"colours are CMYK.*convert\('RGB'\)"),
        (_bomb, "60000 x 60000 pixels, 10800 MB, which no compression"),
        (lambda f: _cut(f, "png"), "is cut short"),
        (lambda f: f.write_bytes(b"\xff\xd8\xff\xe0 and no more"), "cannot be read"),
        (lambda f: f.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0IEND\0\0\0\0"), "its header is missing"),
    ],
)
def test_pictures_that_are_refused_by_name(tmp_path: Path, make: Callable[[Path], Any], match: str) -> None:
    make(tmp_path / "he.png")
    with pytest.raises(ValueError, match=rf"he\.png' .*{match}"):
        pk.io.read_slide(tmp_path / "he.png")


def test_damaged_pixels_are_named(tmp_path: Path) -> None:
    _cut(tmp_path / "he.jpg", "jpeg")
    sdata = pk.io.read_slide(tmp_path / "he.jpg")
    with pytest.raises(OSError, match=r"he\.jpg' is damaged"):
        sdata["he"].data.compute()


def test_more_pixels_than_pillow_allows_are_read_where_the_file_justifies_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "he.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert np.array_equal(read(tmp_path / "he.png"), PIXELS)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_that_was_replaced_is_not_read(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "he.png")
    sdata = pk.io.read_slide(tmp_path / "he.png")
    Image.fromarray(PIXELS[:50]).save(tmp_path / "he.png")
    with pytest.raises(OSError, match="has changed since it was read"):
        sdata["he"].data.compute()


def test_pictures_that_are_too_large_for_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_picture, "_LARGEST_CHUNK", 3 * 80 * 25)
    Image.fromarray(PIXELS).save(tmp_path / "he.png")
    data = pk.io.read_slide(tmp_path / "he.png")["he"].data
    assert data.chunks == ((3,), (25, 25, 10), (80,))
    assert np.array_equal(np.moveaxis(data.compute(), 0, -1), PIXELS)
