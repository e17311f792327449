"""`pekasc predict`: slides and tiled objects, one result each."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spatialdata as sd

import pekasc as pk

CPU = ["--compute", "device=cpu"]


def test_three_slides_of_which_one_is_half_a_file(predicted: Any, run: Any) -> None:
    done, out = predicted
    first, half = (Path(done.arguments[i]) for i in (1, 2))
    assert done.code == 1
    assert [r["status"] for r in done.results] == ["done", "failed", "done", "done"]
    assert "half.1.svs" in done.results[1]["reason"] and "cut short" in done.results[1]["reason"]
    assert done.stderr.splitlines()[-2] == "1 of 4 failed:"
    assert done.stderr.splitlines()[-1].startswith(f"pekasc: error: {half}: ")
    assert "Traceback" not in done.stderr
    assert [Path(r["output"]).name for r in done.results if "output" in r] == ["A_x.zarr", "B_x.zarr", "P3S1.zarr"]
    assert sorted(p.name for p in out.iterdir()) == [".pekasc", "A_x.zarr", "B_x.zarr", "P3S1.zarr", "predictions"]
    # run again: what is finished is not done again
    before = (out / "A_x.zarr" / "zarr.json").stat().st_mtime_ns
    again = run(*done.arguments)
    assert again.code == 1
    assert [r["status"] for r in again.results] == ["finished", "failed", "finished", "finished"]
    assert (out / "A_x.zarr" / "zarr.json").stat().st_mtime_ns == before
    # other arguments are another result
    other = run("predict", first, *done.arguments[5:], "--stride-um", "80")
    assert other.code == 3 and "stride_um was None, is 80.0" in other.stderr


def test_result_is_that_of_the_calls(predicted: Any, adapter: Path) -> None:
    done, out = predicted
    sdata = sd.read_zarr(out / "A_x.zarr")
    pk.io.attach_predictions(sdata)
    loaded = pk.Adapter.load(adapter)
    expected = pk.io.read_slide(done.results[0]["source"], name="A_x")
    pk.pp.tile_grid(expected, "A_x", tile_px=56, mpp=2.0)
    pk.tl.predict_expression(expected, loaded, table_name="grid", compute={"device": "cpu"}, progress=False)
    np.testing.assert_array_equal(np.asarray(sdata["grid"].layers["peka"]), expected["grid"].layers["peka"])
    assert done.results[0]["n_tiles"] == sdata["grid"].n_obs == expected["grid"].n_obs > 3
    assert done.results[0]["n_genes"] == sdata["grid"].n_vars == len(loaded.genes)
    assert pk.get.expression(sdata, table_name="grid").n_vars == len(loaded.genes)


def test_section_with_spots(predicted: Any) -> None:
    _, out = predicted
    sdata = sd.read_zarr(out / "P3S1.zarr")
    pk.io.attach_predictions(sdata)
    table = sdata["table"]
    assert np.isfinite(np.asarray(table.layers["peka"])).any()
    assert not table.obs["peka_train"].any()  # of another patient
    assert list(sdata.images) == ["P3S1_he"]


def test_options_of_the_grid(run: Any, adapter: Path, slides: Callable[..., list[Path]], tmp_path: Path) -> None:
    (slide,) = slides("s.tif")
    how = ["--stride-um", "150", "--shape", "hexagon", "--tissue", "none", "--min-sharpness", "none"]
    genes = list(pk.Adapter.load(adapter).genes[1:3])
    named = [text for gene in genes for text in ("--genes", gene)]
    done = run("predict", slide, "--adapter", adapter, "--out", tmp_path / "out", *how, *named, *CPU)
    assert done.code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out' / 's.zarr'}\n"  # what a script reads
    assert re.search(r"^\[1/1\] .*s\.tif: done in [\d.]+ s$", done.stderr, re.MULTILINE)
    sdata = sd.read_zarr(tmp_path / "out" / "s.zarr")
    record = sdata["grid"].uns["pekasc"]["grid"]
    assert record["stride_um"] == 150 and record["shape"] == "hexagon" and record["tissue"] == "all"
    assert "min_sharpness" not in record["thresholds"]
    assert list(sdata["grid"].var_names) == genes


def test_a_map_between_the_spots_of_a_section(
    run: Any, adapter: Path, sections: Path, slide: Path, tmp_path: Path
) -> None:
    how = ["--adapter", adapter, "--out", tmp_path / "out", "--measured", "kriging", "--stride-um", "50", *CPU]
    done = run("predict", sections / "P3S1.zarr", slide, *how, "--json")
    assert [result["status"] for result in done.results] == ["done", "failed"]
    assert "has no table, and --measured needs one of measured spots" in done.results[1]["reason"]
    sdata = sd.read_zarr(tmp_path / "out" / "P3S1.zarr")
    pk.io.attach_predictions(sdata)
    expected = sd.read_zarr(sections / "P3S1.zarr")
    pk.pp.tile_grid(expected, "P3S1_he", stride_um=50, tile_px=56, mpp=2.0)
    pk.tl.predict_expression(
        expected, pk.Adapter.load(adapter), table_name="grid", measured="kriging", compute={"device": "cpu"},
        progress=False,
    )  # fmt: skip
    for name in ("peka", "peka_kriging_sd"):
        found = np.asarray(sdata["grid"].layers[name])
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, expected["grid"].layers[name], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compute", "epochs=3"], "Compute has no field 'epochs'"),
        (["--compute", "resume=state"], "'resume' does nothing in this call"),
        (["--adapter", "nothing"], "nothing holds no adapter of pekasc"),
        (["--genes", "nix"], "The adapter does not predict"),
        (["--min-tissue", "much"], "'much' is no number"),
        (["--min-tissue", "2"], "must be a fraction between 0 and 1"),
        (["--stride-um", "-5"], "`stride_um` must be a positive number"),
        (["--measured", "idw"], "`measured='idw'` is unknown: use one of ['kriging']"),
        (["--measured-table", "table"], "does nothing without `measured="),
        (["--measured", "kriging", "--table-name", "table"], "name their table with --measured-table"),
        (["--shape", "triangle"], "choose one of ['square', 'hexagon']"),
        (["--image-mpp", "500"], "`image_mpp` must be between 0.05 and 50"),
        (["--list", "nothing.txt"], "nothing.txt cannot be read"),
        (["--tile-px", "56"], "No such option"),  # that is the adapter's
    ],
)
def test_wrong_arguments_start_nothing(
    run: Any, adapter: Path, slide: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run("predict", slide, "--adapter", adapter, "--out", tmp_path / "out", *arguments)
    assert done.code == 2
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.rglob("*.zarr"))


def test_an_output_folder_that_is_none(run: Any, adapter: Path, slide: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    done = run("predict", slide, "--adapter", adapter, "--out", tmp_path / "out")
    assert done.code == 2 and "out is no folder" in " ".join(done.stderr.split())


def test_no_source(run: Any, adapter: Path, tmp_path: Path) -> None:
    done = run("predict", "--adapter", adapter, "--out", tmp_path)
    assert done.code == 2 and "Nothing is given" in done.stderr


def test_damaged_adapter(run: Any, adapter: Path, slide: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "heads.safetensors").write_bytes(b"")
    done = run("predict", slide, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert done.code == 2 and "is damaged" in " ".join(done.stderr.split())


@pytest.mark.slow
def test_two_processes_on_one_list_of_which_one_is_killed(
    adapter: Path, slides: Callable[..., list[Path]], tmp_path: Path
) -> None:
    sources, out = slides(*[f"{i}.tif" for i in range(8)]), tmp_path / "out"
    (tmp_path / "slides.txt").write_text("\n".join(map(str, sources)))
    command = [sys.executable, "-m", "pekasc", "predict", "--list", str(tmp_path / "slides.txt"), "--json", *CPU]
    command += ["--adapter", str(adapter), "--out", str(out)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def results(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in process.communicate(timeout=300)[0].splitlines()]

    killed, other = start(), start()
    while len(list(out.glob("*.zarr"))) < 2:
        assert killed.poll() is None and other.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    by = [results(killed), results(other), results(start())]
    assert other.returncode == 0
    done = [r["source"] for found in by for r in found if r["status"] == "done"]
    assert len(done) == len(set(done)) and set(map(str, sources)) - set(done) <= {r["source"] for r in by[1]}
    assert {r["status"] for r in by[2]} <= {"done", "finished"} and len(by[2]) == 8
    assert sorted(path.name for path in out.glob("*.zarr")) == [f"{i}.zarr" for i in range(8)]
    assert sd.read_zarr(out / "7.zarr")["grid"].n_obs == by[2][7].get(
        "n_tiles", sd.read_zarr(out / "0.zarr")["grid"].n_obs
    )


def test_snakemake_rule_of_the_docs(adapter: Path, slides: Callable[..., list[Path]], tmp_path: Path) -> None:
    pytest.importorskip("snakemake")
    page = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    (rule,) = re.findall(r"^## Snakemake\n.*?^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "Snakefile").write_text(rule)
    first, half, last = slides("a.1.svs", "b.svs", "c.tif")
    half.write_bytes(half.read_bytes()[:100_000])
    (tmp_path / "slides.txt").write_text(f"{first}\n{half}\n{last}\n")
    shutil.copytree(adapter, tmp_path / "adapter")
    script = tmp_path / "bin" / "pekasc"  # which may not be installed where the tests run
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m pekasc "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}

    def snakemake() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakemake", "--cores", "1", "--keep-going"]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = snakemake()
    assert done.returncode == 1 and f"pekasc: error: {half}: " in done.stderr
    assert sorted(path.name for path in (tmp_path / "predicted").glob("*.zarr")) == ["a.1.zarr", "c.zarr"]
    assert sd.read_zarr(tmp_path / "predicted" / "a.1.zarr")["grid"].n_obs > 3
    # the broken slide is replaced: the rest is not done again
    shutil.copyfile(first, half)
    again = snakemake()
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("rule predict:") == 1
