"""`pekasc info`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import pekasc as pk


def test_what_there_is(run: Any, predicted: Any, slide: Path, sections: Path, adapter: Path, tmp_path: Path) -> None:
    _, out = predicted
    (tmp_path / "folder").mkdir()
    paths = [slide, sections / "P1S1.zarr", adapter, out / "predictions" / "A_x.zarr", tmp_path / "folder", "nothing"]
    done = run("info", *paths, "--json")
    assert done.code == 1
    of_slide, of_sdata, of_adapter, of_store, *failed = done.results
    assert of_slide == {
        "source": str(slide), "status": "done", "kind": "slide", "size_px": [300, 300], "levels_px": [[300, 300]],
        "mpp": 2.0,
    }  # fmt: skip
    assert of_sdata["kind"] == "spatialdata" and of_sdata["images"] == ["P1S1_he"]
    assert of_sdata["tables"]["table"]["n_vars"] == 12 and "image_mpp" in of_sdata["tables"]["table"]["pekasc"]
    loaded = pk.Adapter.load(adapter)
    assert of_adapter["kind"] == "adapter" and of_adapter["encoder"] == "tiny" and of_adapter["tile_px"] == 56
    assert of_adapter["n_genes"] == len(loaded.genes) and of_adapter["fields_um"] == []
    assert of_adapter["target"] == loaded.info["target"]
    assert of_store["kind"] == "store" and of_store["bytes"] > 0
    assert [done.results[0]["n_tiles"] for done in [predicted[0]]][0] in {a["shape"][0] for a in of_store["arrays"]}
    assert [r["status"] for r in failed] == ["failed", "failed"]
    assert "neither a SpatialData, an adapter nor a store" in failed[0]["reason"]
    assert "nothing" in failed[1]["reason"]

    shown = run("info", *paths[:4])
    assert shown.code == 0
    assert f"{slide}: slide of 300 x 300 px at 2 um/px, 1 level\n" in shown.stdout
    assert str(loaded) in shown.stdout  # what print(adapter) shows
    assert "'P1S1_spots': GeoDataFrame" in shown.stdout and "table 'table': " in shown.stdout
    assert "store of 2 arrays, " in shown.stdout


def test_an_adapter_on_the_hub(run: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, *file: str, **_: Any) -> str:
        if name != "lab/breast":
            raise FileNotFoundError("404")
        return str(adapter.joinpath(*file))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert run("info", "hf-hub:lab/breast").stdout == run("info", adapter).stdout.replace(
        str(adapter), "hf-hub:lab/breast"
    )
    failed = run("info", "hf-hub:lab/none", "--json")
    assert failed.code == 3 and "could not be fetched from the model hub" in failed.results[0]["reason"]
    failed = run("predict", "slide.tif", "--adapter", "hf-hub:lab/none", "--out", tmp_path / "out")
    assert failed.code == 2 and "could not be fetched from the model hub" in " ".join(failed.stderr.split())


def test_addresses_are_refused_at_once(run: Any, adapter: Path, slide: Path) -> None:
    for arguments in (["predict", slide, "--out", "s3://bucket/out"], ["predict", "s3://bucket/a.tif", "--out", "out"]):
        done = run(*arguments, "--adapter", adapter)
        assert done.code == 2 and "is an address: fetch what is there" in " ".join(done.stderr.split())
    assert not Path("s3:").exists()
