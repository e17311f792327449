"""Real sections against the raw files, small made-up copies for the layout, and downloads from a local server."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import spatialdata
import zarr
from PIL import Image
from spatialdata.models import Image2DModel
from spatialdata.transformations import Identity, get_transformation

import pekasc as pk
from pekasc._settings import HINT
from pekasc.datasets import _her2st
from pekasc.datasets._download import fetch, git_blob_sha1
from pekasc.datasets._pyramid import jpeg_levels
from pekasc.tiling._zarr_chunks import ZarrChunks

SPOTS = "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def write_section(folder: Path, counts: pd.DataFrame, spots: str, *, names: dict[str, str], seed: int = 0) -> None:
    for name in names.values():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / names["counts"]).write_bytes(gzip.compress(counts.to_csv(sep="\t").encode(), mtime=0))
    (folder / names["spots"]).write_text(SPOTS + spots)
    pixels = np.random.default_rng(seed).integers(0, 255, (23, 30, 3), dtype=np.uint8)
    Image.fromarray(np.kron(pixels, np.ones((4, 4, 1), np.uint8))).save(folder / names["image"], quality=95)


def counts_table(rows: dict[str, list[int]], genes: list[str]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(rows, orient="index", columns=genes)


@pytest.fixture(autouse=True, scope="module")
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep images out of the user's own cache, but decode the real ones only once."""
    folder = tmp_path_factory.mktemp("user_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pooch.os_cache", lambda project: folder / project)
        yield folder


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Two sections: one spot without counts, one row without place, genes that differ."""
    for name, rows, genes, spots in (
        (
            "C2",
            {"2x1": [1, 0, 5], "1x1": [2, 2, 0]},
            ["A", "B", "C"],
            "1 1 1 1 10.5 20 1\n2 1 2 1 60 21 1\n9 9 9 9 5 5 1\n",
        ),
        ("B4", {"3x1": [7, 8], "4x1": [1, 1]}, ["D", "B"], "3 1 3 1 30 40 1\n"),
    ):
        names = {kind: f"{name}/{file}" for kind, file in _her2st._LOCAL_NAMES.items()}
        write_section(tmp_path, counts_table(rows, genes), spots.replace(" ", "\t"), names=names)
    labels = "\tpatient_id\tlabel\tx\ty\n60x21\tC\t5\t2\t1\n"
    (tmp_path / "C2" / "cluster_labels.tsv.gz").write_bytes(gzip.compress(labels.encode()))
    return tmp_path


# ------------------------------------------------------------------------------------------------ real sections


def test_values_are_those_of_the_raw_files(shared: Path) -> None:
    folder = shared / "data" / "her2st"
    sdata = pk.datasets.her2st(["B4", "C3"], path=folder)
    table = sdata["table"]
    assert sorted(sdata.coordinate_systems) == ["B4", "C3"]
    assert dict(table.obs["section"].value_counts()) == {"B4": 283, "C3": 180}
    raw = {s: pd.read_csv(folder / s / "counts.tsv.gz", sep="\t", index_col=0) for s in ("B4", "C3")}
    assert set(table.var_names) == set(raw["B4"]) | set(raw["C3"])
    for s, counts in raw.items():
        rows = table[table.obs["section"] == s]
        assert (rows.obs["patient"] == s[0]).all()
        ids = [name.removeprefix(f"{s}_") for name in rows.obs_names]
        np.testing.assert_array_equal(rows[:, counts.columns].X.toarray(), counts.loc[ids].to_numpy())
        assert rows.X.sum() == counts.to_numpy().sum()  # genes that are not in the table of the section are 0
        spots = pd.read_csv(folder / s / "spots.tsv", sep="\t")
        spots.index = pd.Index(spots["x"].astype(str) + "x" + spots["y"].astype(str))
        np.testing.assert_array_equal(rows.obsm["spatial"], spots.loc[ids, ["pixel_x", "pixel_y"]].to_numpy())
        np.testing.assert_array_equal(rows.obs[["array_col", "array_row"]], spots.loc[ids, ["x", "y"]])
        circles = sdata[f"{s}_spots"].loc[rows.obs["spot_id"]]
        np.testing.assert_array_equal(circles.get_coordinates(), rows.obsm["spatial"])
        np.testing.assert_allclose(circles["radius"] * 2 * 0.688, 100)
        labels = pd.read_csv(folder / s / "cluster_labels.tsv.gz", sep="\t", index_col=0)
        expected = dict(
            zip(labels["x"].astype(str) + "x" + labels["y"].astype(str), labels["label"].astype(str), strict=True)
        )
        found = dict(zip(ids, rows.obs["label"], strict=True))
        assert {i: label for i, label in found.items() if isinstance(label, str)} == {
            i: label for i, label in expected.items() if i in found
        }
    assert dict(table.uns["pekasc"]["image_mpp"]) == {"B4_he": 0.688, "C3_he": 0.688}
    assert sdata["B4_he"]["scale0"].image.shape == (3, 9923, 9272)
    assert len(sdata["B4_he"]) > 3


def test_real_pixels_are_those_of_the_file(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shared / "data" / "her2st"
    image = pk.datasets.her2st("B4", path=folder)["B4_he"]  # as above: a large image is decoded once
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with Image.open(folder / "B4" / "image.jpg") as raw:
        expected = np.moveaxis(np.asarray(raw), -1, 0)
    for i, (name, level) in enumerate(image.items()):
        assert name == f"scale{i}"
        found = level.image.to_numpy()
        if i == 0:
            np.testing.assert_array_equal(found, expected)
        else:  # rounded means of the pixels below
            height, width = (n // 2**i for n in expected.shape[1:])
            blocks = expected[:, : 2**i * 100, : 2**i * width].reshape(3, 100, 2**i, width, 2**i)
            np.testing.assert_array_equal(found[:, :100], np.floor(blocks.mean((2, 4)) + 0.5))
            assert found.shape == (3, height, width)
    assert i == 4


def test_the_shipped_checksums_are_those_of_the_copies(shared: Path) -> None:
    sources = _her2st._sources()
    assert len(sources) == 108 and (sources["git_blob_sha1"].str.len() == 40).all()
    for section in ("B4", "C2"):
        for kind, name in _her2st._LOCAL_NAMES.items():
            file = shared / "data" / "her2st" / section / name
            assert git_blob_sha1(file) == sources.loc[(section, kind), "git_blob_sha1"]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == sources.loc[(section, kind), "sha256"]


# ------------------------------------------------------------------------------------------------ layout


def test_union_of_genes_join_by_place_and_labels(local: Path) -> None:
    table = pk.datasets.her2st(["C2", "B4"], path=local)["table"]
    assert list(table.obs_names) == ["C2_2x1", "C2_1x1", "B4_3x1"]
    assert list(table.var_names) == ["A", "B", "C", "D"]
    np.testing.assert_array_equal(table.X.toarray(), [[1, 0, 5, 0], [2, 2, 0, 0], [0, 8, 0, 7]])
    np.testing.assert_array_equal(table.obsm["spatial"], [[60, 21], [10.5, 20], [30, 40]])
    assert table.obs["label"].iloc[0] == "5" and table.obs["label"].isna().tolist() == [False, True, True]
    assert "label" not in pk.datasets.her2st("B4", path=local)["table"].obs


def test_round_trip(local: Path, tmp_path: Path) -> None:
    sdata = pk.datasets.her2st(["C2", "B4"], path=local)
    sdata.write(tmp_path / "her2st.zarr")
    back = spatialdata.read_zarr(tmp_path / "her2st.zarr")
    assert back["table"].obs.equals(sdata["table"].obs)
    assert (back["table"].X != sdata["table"].X).nnz == 0
    for name, element in back.images.items():
        Image2DModel().validate(element)
        for scale in sdata[name]:
            np.testing.assert_array_equal(element[scale].image.to_numpy(), sdata[name][scale].image.to_numpy())
    assert get_transformation(back["C2_spots"], "C2") == Identity()


def test_unknown_sections_and_missing_files(local: Path) -> None:
    with pytest.raises(ValueError, match=r"Unknown sections \['C9'\]. Valid sections: A1, A2"):
        pk.datasets.her2st(["C2", "C9"], path=local)
    with pytest.raises(ValueError, match="`sections` is empty"):
        pk.datasets.her2st([], path=local)
    with pytest.raises(ValueError, match=r"names \['C2'\] more than once"):
        pk.datasets.her2st(["C2", "C2"], path=local)
    with pytest.raises(FileNotFoundError, match="nowhere'` is no folder. Without `path` the data is downloaded"):
        pk.datasets.her2st("C2", path=local / "nowhere")
    with pytest.raises(FileNotFoundError, match="Section A1 has no counts .*A1/counts.tsv.gz nor data/ST-cnts/A1"):
        pk.datasets.her2st("A1", path=local)
    (local / "C2" / "image.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="image.jpg is no image"):
        pk.datasets.her2st("C2", path=local)
    spots = local / "B4" / "spots.tsv"
    spots.write_text(SPOTS + "30\t1\t3\t1\t30\t40\t1\n")
    with pytest.raises(ValueError, match="Section B4: no row of .* is a spot of"):
        pk.datasets.her2st("B4", path=local)


# ------------------------------------------------------------------------------------------------ images


def test_an_image_is_decoded_once(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, cache = local / "C2" / "image.jpg", tmp_path / "cache"
    for entry in (local / "C2", *(local / "C2").iterdir()):
        entry.chmod(entry.stat().st_mode & ~0o222)  # nothing is written beside the data
    with caplog.at_level(HINT, logger="pekasc"):
        first = jpeg_levels(file, cache=cache)
    assert f"{file}: decoded once and kept as zarr, {cache}" in caplog.text
    with Image.open(file) as raw:
        np.testing.assert_array_equal(first[0].compute(), np.moveaxis(np.asarray(raw), -1, 0))
    monkeypatch.setattr("pekasc.datasets._pyramid._decoded", None)
    copy = tmp_path / "copy.jpg"  # known by its content
    copy.write_bytes(file.read_bytes())
    for fine, again in zip(first, jpeg_levels(copy, cache=cache), strict=True):
        np.testing.assert_array_equal(fine.compute(), pickle.loads(pickle.dumps(again)).compute())
    assert sorted(entry.suffix for entry in (cache / "images").iterdir()) == [".lock", ".zarr"]
    # tiles are read from it without zarr's event loop
    assert ZarrChunks.of(zarr.open_array(next((cache / "images").glob("*.zarr")) / "0", mode="r")) is not None


def test_what_is_left_of_an_image_is_written_again(local: Path, tmp_path: Path) -> None:
    file, cache = local / "C2" / "image.jpg", tmp_path / "cache"
    expected = [level.compute() for level in jpeg_levels(file, cache=cache)]
    (stored,) = (cache / "images").glob("*.zarr")
    (stored / "1" / "c" / "0" / "0" / "0").unlink()
    stored.with_suffix(".part").mkdir()  # of a process that was killed
    (stored.with_suffix(".part") / "zarr.json").write_text("{")
    for _ in range(2):
        for level, whole in zip(jpeg_levels(file, cache=cache), expected, strict=True):
            np.testing.assert_array_equal(level.compute(), whole)
        assert not stored.with_suffix(".part").exists()
        shutil.rmtree(stored / "0")


def test_several_processes_write_one_image(local: Path, tmp_path: Path) -> None:
    file, cache = local / "C2" / "image.jpg", tmp_path / "cache"
    code = f"""
from pathlib import Path
from pekasc.datasets._pyramid import jpeg_levels
print(jpeg_levels(Path({str(file)!r}), cache=Path({str(cache)!r}))[0].compute().sum())
"""
    running = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    results = [process.communicate(timeout=300) for process in running]
    assert {out for out, _ in results} == {f"{jpeg_levels(file, cache=cache)[0].compute().sum()}\n"}
    assert sum("decoded once" in said for _, said in results) == 1


def test_images_that_cannot_be_kept_or_read(local: Path, tmp_path: Path) -> None:
    file, cache = local / "C2" / "image.jpg", tmp_path / "cache"
    cache.write_text("no folder")
    with pytest.raises(OSError, match="image.jpg is decoded once and kept as zarr in .*cache/images, where it cannot"):
        jpeg_levels(file, cache=cache)
    file.write_bytes(file.read_bytes()[:-1500])
    with pytest.raises(ValueError, match="image.jpg is a truncated JPEG image"):
        jpeg_levels(file, cache=tmp_path)
    assert not (tmp_path / "images").exists()


def test_a_grey_image_has_three_channels(tmp_path: Path) -> None:
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "grey.jpg")
    pixels = jpeg_levels(tmp_path / "grey.jpg", cache=tmp_path)[0].compute()
    assert pixels.shape == (3, 16, 16) and (pixels[0] == pixels[2]).all()


# ------------------------------------------------------------------------------------------------ download


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/", folder
        httpd.shutdown()


def test_git_blob_sha1(tmp_path: Path) -> None:
    # `printf 'hello\n' | git hash-object --stdin`
    (tmp_path / "file").write_bytes(b"hello\n")
    assert git_blob_sha1(tmp_path / "file") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_download_once_in_the_published_layout(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = server
    published = _her2st._sources().loc[["C2"]]
    names = {str(kind): path for (_, kind), path in published["path"].items()}
    write_section(folder, counts_table({"1x1": [3, 1]}, ["A", "B"]), "1\t1\t1\t1\t10\t20\t1\n", names=names)
    published = published.assign(git_blob_sha1=[git_blob_sha1(folder / path) for path in published["path"]], sha256="")
    monkeypatch.setattr(_her2st, "_sources", lambda: published)
    cache = tmp_path / "cache"
    monkeypatch.setattr(_her2st, "_download", partial(_her2st._download, base_url=url, cache=cache))
    sdata = pk.datasets.her2st("C2")
    assert list(sdata["table"].obs_names) == ["C2_1x1"]
    assert sdata["C2_he"]["scale0"].image.to_numpy().shape == (3, 92, 120)
    stored = sorted(p.relative_to(cache) for p in cache.rglob("*") if p.is_file())
    assert stored == sorted(Path("her2st-85df7411") / path for path in names.values())
    for path in names.values():
        (folder / path).unlink()
    assert pk.datasets.her2st("C2")["table"].n_obs == 1  # from the cache
    # a copy of the repository works as `path`
    assert pk.datasets.her2st("C2", path=cache / "her2st-85df7411")["table"].n_vars == 2


def test_another_file_than_was_published_is_refused(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    (folder / "file").write_bytes(b"forged\n")
    cache = tmp_path / "cache"
    get = partial(fetch, url + "file", folder="set", path="deep/file", cache=cache)
    with pytest.raises(ValueError, match="is not the file that was published: its git SHA-1 is .*, expected ce0136"):
        get(git_sha1="ce013625030ba8dba906f756967f9e9ca394464a")
    assert not [p for p in cache.rglob("*") if p.is_file()]
    (folder / "file").write_bytes(b"hello\n")
    got = get(git_sha1="ce013625030ba8dba906f756967f9e9ca394464a")
    assert got.read_bytes() == b"hello\n"
    got.write_bytes(b"damaged")  # in the cache: fetched again
    assert get(git_sha1="ce013625030ba8dba906f756967f9e9ca394464a").read_bytes() == b"hello\n"


def test_sha256_is_checked_where_it_is_known(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    (folder / "file").write_bytes(b"hello\n")
    get = partial(fetch, url + "file", folder="set", path="file", cache=tmp_path / "cache")
    sha1 = "ce013625030ba8dba906f756967f9e9ca394464a"
    with pytest.raises(
        ValueError, match="its SHA-256 is 5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
    ):
        get(git_sha1=sha1, sha256="0" * 64)
    assert get(git_sha1=sha1, sha256=hashlib.sha256(b"hello\n").hexdigest()).is_file()


def test_a_download_that_fails_says_what_to_do(server: tuple[str, Path], tmp_path: Path) -> None:
    url, _ = server
    with pytest.raises(OSError, match="Could not download .*absent .*pass `path=` a folder with the data"):
        fetch(url + "absent", folder="set", path="absent", git_sha1="0" * 40, cache=tmp_path / "cache")
