"""Names of slots, and what `uns` holds after a trip to disk."""

from __future__ import annotations

import re
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from pekasc._keys import (
    check_key,
    element_name,
    feature_key,
    read_uns,
    score_key,
    short_name,
    slide_stem,
    tile_shapes_name,
    write_uns,
)


@pytest.mark.parametrize("key", ["peka", "X_uni2-h", "a.b", "9", "é", "\u60a3\u80051"])
def test_valid_keys(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "a/b", "a b", "..", "__x", "a\n", "e\u0301"])
def test_invalid_keys(key: str) -> None:
    with pytest.raises(ValueError, match=r"`key_added=.* cannot be stored: only letters"):
        check_key(key)


def test_keys_are_strings() -> None:
    with pytest.raises(TypeError, match="`layer` must be a string, got int"):
        check_key(3, argument="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("hf-hub:MahmoodLab/UNI2-h", "UNI2-h"),
        ("/a/b/my weights.pth", "my_weights.pth"),
        ("C:\\models\\enc", "enc"),
        ("vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("???", "encoder"),
    ],
)
def test_short_names_fit_a_slot(name: str, short: str) -> None:
    assert short_name(name) == short
    assert feature_key(name) == f"X_{short}"
    assert tile_shapes_name("A_spots") == "A_spots_tiles"
    assert score_key("peka", "rmse") == "peka_rmse"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.1.svs", "a.1"),
        ("a.2.OME.TIF", "a.2"),
        ("TCGA-A1-A0SB-01Z-00-DX1.B34C267B.svs", "TCGA-A1-A0SB-01Z-00-DX1.B34C267B"),
        ("no ending", "no_ending_"),
        ("a.qptiff", "a"),
        ("Größe.ndpi", "Größe"),
        ("my slide.tif", "my_slide_"),
        ("my  slide.tif", "my_slide_"),
        ("my_slide.tif", "my_slide"),
        ("__a.tif", "a_"),
        (".a.tif", "a_"),
        ("???.png", ""),
        (".svs", ""),
    ],
)
def test_the_name_of_a_slide(file: str, name: str) -> None:
    found = element_name(slide_stem(file))
    assert check_key(found) == found and not found.startswith(".")
    replaced = not name or name.endswith("_")
    assert re.fullmatch(rf"{re.escape(name)}[0-9a-f]{{8}}" if replaced else re.escape(name), found)


def test_different_names_stay_different() -> None:
    stems = ["a b", "a  b", "a_b", "a(b", "_a b", "__a_b", "\u00e9", "e\u0301", "a.b", ".a.b", "", "?", "??"]
    names = {element_name(stem) for stem in stems}
    assert len(names) == len(stems)


VALUES = {
    "number": 3,
    "real": 0.25,
    "text": "a",
    "flag": True,
    "nothing": None,
    "path": Path("a/b"),
    "names": ["a", "b"],
    "mixed": [{"a": 1}, None, 2.5],
    "pair": (1, 2),
    "empty": [],
    "array": np.array([1.5, 2.5]),
    "inner": {"b": None, "c": {"d": [1, None]}},
    "integer keys": {1: "a"},
    "frame": pd.DataFrame({"x": [1.0, 2.0]}, index=["g1", "g2"]),
}


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_uns_survives_the_disk(tmp_path: Path, suffix: str) -> None:
    adata = AnnData(np.zeros((2, 2)))
    write_uns(adata, "record", VALUES)
    path = tmp_path / f"a.{suffix}"
    if suffix == "h5ad":
        adata.write_h5ad(path)
        read = ad.read_h5ad(path)
    else:
        adata.write_zarr(path)
        read = ad.read_zarr(path)
    expected = {
        **VALUES,
        "path": "a/b",
        "pair": [1, 2],
        "integer keys": {"1": "a"},
    }
    for source in (adata, read):
        value = read_uns(source, "record")
        assert value is not None and value.keys() == expected.keys()
        for name, wanted in expected.items():
            if isinstance(wanted, pd.DataFrame):
                pd.testing.assert_frame_equal(value[name], wanted, check_names=False)
            elif isinstance(wanted, np.ndarray):
                np.testing.assert_array_equal(value[name], wanted)
            else:
                assert value[name] == wanted and type(value[name]) is type(wanted), name
    assert read_uns(read, "other") is None


def test_writing_does_not_touch_another_objects_record() -> None:
    adata = AnnData(np.zeros((2, 2)))
    write_uns(adata, "a", {"x": 1})
    other = AnnData(np.zeros((2, 2)), uns=dict(adata.uns))
    write_uns(other, "b", {"x": 2})
    assert read_uns(adata, "b") is None
