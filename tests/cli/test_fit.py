"""`pekasc fit`: an adapter from sections on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd

import pekasc as pk
from pekasc.cli import _fit

HOW = ["--tile-px", "56", "--mpp", "2", "--compute", "device=cpu"]
for _field in ("ridge", "n_depths=none", "depth=2", "n_components=5"):
    HOW += ["--readout", _field]


def test_the_frozen_encoder_on_two_sections(run: Any, sections: Path, phantom: sd.SpatialData, tmp_path: Path) -> None:
    out = tmp_path / "adapters" / "new"
    sources = [sections / "P1S1.zarr", sections / "P2S1.zarr"]
    done = run("fit", *sources, "--out", out, "--method", "none", *HOW, "--json")
    assert done.code == 0, done.stderr
    (result,) = done.results
    made = pk.Adapter.load(out)
    assert result["output"] == str(out) and result["method"] == made.method == "frozen"
    assert result["n_spots"] == made.info["n_spots"] == sum(sd.read_zarr(path)["table"].n_obs for path in sources)
    # as from one object with all sections
    expected = phantom.subset([*phantom.images, *phantom.shapes, "table"])
    expected.tables["table"] = phantom["table"].copy()
    pk.pp.tile(expected, tile_px=56, mpp=2.0)
    readout = pk.Readout.preset("ridge").replace(n_depths=None, depth=2, n_components=5)
    same = pk.tl.fit_adapter(
        expected, method=None, train=["P1S1_spots", "P2S1_spots"], readout=readout,
        compute={"device": "cpu"}, progress=False,
    )  # fmt: skip
    assert made.genes == same.genes
    np.testing.assert_allclose(made.gene_scores["pearson"], same.gene_scores["pearson"], atol=1e-5)


def test_a_target_that_is_no_gene(run: Any, phantom: sd.SpatialData, tmp_path: Path) -> None:
    for name in ("P1S1", "P2S1", "P3S1"):
        one = phantom.filter_by_coordinate_system(name)
        table = one["table"].copy()
        pair = np.asarray(table.layers["truth"])[:, :2]
        table.obsm["pair"] = pd.DataFrame(pair, index=table.obs_names, columns=["a", "b"])
        one.tables["table"] = table
        one.write(tmp_path / f"{name}.zarr")
    sources, out = [tmp_path / "P1S1.zarr", tmp_path / "P2S1.zarr"], tmp_path / "adapter"
    done = run("fit", *sources, "--out", out, "--method", "none", "--target", "obsm:pair", *HOW, "--json")
    assert done.code == 0, done.stderr
    assert done.results[0]["target"] == "obsm['pair'], as stored" and pk.Adapter.load(out).genes == ("a", "b")
    done = run(
        "predict", tmp_path / "P3S1.zarr", "--adapter", out, "--out", tmp_path / "out", "--compute", "device=cpu"
    )
    assert done.code == 0, done.stderr
    done = run("evaluate", tmp_path / "out" / "P3S1.zarr", "--target", "pair", "--json")
    assert done.code == 0, done.stderr
    assert done.results[0]["n_genes"] == 2 and done.results[0]["pearson_median"] > 0
    done = run("fit", *sources, "--out", tmp_path / "b", "--target", "obs:pair", *HOW)
    assert done.code == 3 and "a target that is no gene is" in done.stderr


def test_panels(run: Any, phantom: sd.SpatialData, tmp_path: Path) -> None:
    regions = ["P1S1_spots", "P2S1_spots"]
    two = phantom.filter_by_coordinate_system(["P1S1", "P2S1"])
    table = two["table"].copy()
    names = list(table.var_names)
    table.var["half"] = np.arange(len(names)) < len(names) // 2
    two.tables["table"] = table
    two.write(tmp_path / "two.zarr")
    (tmp_path / "genes.txt").write_text("\n".join(names))
    panels = ["--panels", f"{regions[0]}={tmp_path / 'genes.txt'}", "--panels", f"{regions[1]}=half"]
    command = ["fit", tmp_path / "two.zarr", "--out", tmp_path / "adapter", "--method", "none", *HOW]
    done = run(*command, *panels)
    assert done.code == 0, done.stderr
    made = pk.Adapter.load(tmp_path / "adapter")
    # what the second section did not measure was learned from the first
    assert made.info["total_genes"] == names[: len(names) // 2]
    assert set(made.genes) - set(made.info["total_genes"])
    for wrong, message in (
        (["--panels", "P1S1_spots"], "must be REGION=FILE or REGION=COLUMN"),
        ([*panels, "--panels", f"{regions[1]}=half"], "P2S1_spots is named twice"),
    ):
        done = run(*command, *wrong)
        assert done.code == 2 and message in " ".join(done.stderr.split())


def test_resume(run: Any, sections: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "adapter"
    state = tmp_path / "adapter.resume"
    recipe = ["epochs=1", "choose_epochs=false", "rank=4", "n_clusters=2", "teacher_components=4", "n_views=1"]
    how = [text for field in recipe for text in ("--recipe", field)]
    command = ["fit", sections / "P1S1.zarr", sections / "P2S1.zarr", "--out", out, *how, *HOW, "--resume"]

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(pk.Adapter, "save", no_room)
        failed = run(*command)
    assert failed.code == 3 and failed.stderr.endswith("pekasc: error: [Errno 28] No space left on device\n")
    assert (state / "settings.json").is_file()
    done = run(*command)
    assert done.code == 0, done.stderr
    assert pk.Adapter.load(out).method == "bone"
    assert f"saved to {out}" in done.stdout
    assert not state.exists()  # nothing to go on from


def test_what_could_not_be_saved_is_not_trained(run: Any, sections: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    done = run("fit", sections / "P1S1.zarr", "--out", tmp_path / "mine")
    assert done.code == 2 and "holds no adapter of pekasc" in " ".join(done.stderr.split())


def test_no_such_section(run: Any, sections: Path, tmp_path: Path) -> None:
    done = run("fit", tmp_path / "nothing.zarr", "--out", tmp_path / "a")
    assert done.code == 3 and done.stderr == f"pekasc: error: {tmp_path / 'nothing.zarr'} is not there.\n"


def test_genes_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "genes.txt").write_text("ERBB2\n\n GATA3 \n")
    assert _fit.names_or_files([str(tmp_path / "genes.txt"), "ESR1"]) == ["ERBB2", "GATA3", "ESR1"]
    assert _fit.names_or_files([]) is None
