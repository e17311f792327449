"""The folder of an adapter: saves that are killed, and a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pekasc as pk
from pekasc.models.adapter import _folder as _store
from pekasc.models.heads import with_context
from pekasc.models.runtime import _files
from pekasc.tiling import Stain

KILL_SAVE = Path(__file__).parents[3] / "benchmarks" / "kill_save.py"
FILES = ["adapter_config.json", "adapter_model.safetensors", "heads.safetensors", "pekasc.json"]


@pytest.mark.parametrize("n_kills", [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.skipif(not KILL_SAVE.is_file(), reason="the benchmarks are not part of an installed package")
def test_a_save_that_is_killed_leaves_the_old_or_the_new(adapter: pk.Adapter, tmp_path: Path, n_kills: int) -> None:
    found = runpy.run_path(str(KILL_SAVE))["killed_saves"](adapter, tmp_path / "mine", n_kills)
    assert found.pop("kills") == n_kills
    assert not any(found.values()), found
    assert sorted(file.name for file in (tmp_path / "mine").iterdir()) == FILES


@pytest.mark.parametrize("file", ["heads", "adapter_model", "pekasc"])
def test_a_full_disk_leaves_what_was_there(
    adapter: pk.Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = tmp_path / "mine"
    replace(adapter, config=None, weights={}, method="frozen").save(path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}

    def full(descriptor: int) -> None:
        if f".{file}" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    for place in (path, tmp_path / "new"):
        with pytest.raises(OSError, match=rf"The adapter cannot be written to '{place}.*': No room"):
            adapter.save(place)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_killed_saves_of_earlier_versions_left_beside_it_goes(adapter: pk.Adapter, tmp_path: Path) -> None:
    left, mine = tmp_path / ".mine-ab12cd_8" / "adapter", tmp_path / ".mine-backup12"
    left.mkdir(parents=True)
    mine.mkdir()
    (mine / "notes.txt").write_text("precious")
    adapter.save(tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine-backup12", "mine"]


def old_folder(
    adapter: pk.Adapter, path: Path, number: int, n_scales: int, context_um: float | None
) -> Callable[[np.ndarray], np.ndarray]:
    """Write a folder as earlier versions did, with one ridge on every scale; return what it predicts from inputs."""
    rng = np.random.default_rng(0)
    width, k, n_genes = 512 * n_scales * (2 if context_um else 1), 6, len(adapter.genes)
    head = {
        "mean": rng.normal(size=width), "scale": rng.uniform(1, 2, width), "components": rng.normal(size=(k, width)),
        "coef": rng.normal(size=(k, n_genes)), "intercept": rng.normal(size=n_genes), "alpha": np.array([0.5]),
    }  # fmt: skip
    head = {name: array.astype(np.float32) for name, array in head.items()}
    adapter.save(path)
    tensors = {
        name: t
        for name, t in load_file(path / "heads.safetensors").items()
        if not name.startswith(("reading.", "trust."))
    }
    tensors |= {f"head.{name}": torch.from_numpy(array) for name, array in head.items()}
    save_file(tensors, path / "heads.safetensors")
    record = json.loads((path / "pekasc.json").read_text())
    new = ("reading", "fields_um", "smooth_um", "smooth_weight", "trust", "stain", "sha256")
    record = {k: v for k, v in record.items() if k not in new}
    record |= {"format": number, "head": "ridge", "context_um": context_um}
    if number == 2:
        del record["orientations"]
    else:
        record["scales"] = [1.0, 2.0, 3.5][:n_scales]
    record["files"]["heads.safetensors"] = _store.sha256((path / "heads.safetensors").read_bytes())
    (path / "pekasc.json").write_text(json.dumps({**record, "sha256": _store._seal(record)}))

    def predicted(x: np.ndarray) -> np.ndarray:
        scores = (x.astype(np.float64) - head["mean"]) / head["scale"] @ head["components"].T
        return np.asarray(scores @ head["coef"] + head["intercept"])

    return predicted


@pytest.mark.parametrize(
    ("number", "n_scales", "context_um"),
    [(2, 1, None), (2, 1, 150.0), (3, 1, 150.0), (3, 3, None), (4, 2, 150.0), (4, 3, 150.0)],
)
def test_adapters_of_earlier_formats_predict_what_they_did(
    adapter: pk.Adapter, tiles: np.ndarray, tmp_path: Path, number: int, n_scales: int, context_um: float | None
) -> None:
    by_hand = old_folder(adapter, tmp_path / "old", number, n_scales, context_um)
    loaded = pk.Adapter.load(tmp_path / "old")
    assert loaded.scales == (1.0, 2.0, 3.5)[:n_scales] and loaded.fields_um == (224.0, 392.0)[: n_scales - 1]
    assert loaded.context_um == context_um and loaded.orientations == 1 and repr(loaded)
    # every scale went through the adapter, and neighbours were averaged over all scales
    cpu: dict[str, Any] = {"mpp": 2.0, "compute": {"device": "cpu"}}
    wide = {width: np.roll(tiles, i + 1, axis=0) for i, width in enumerate(loaded.fields_um)}
    x = np.concatenate([loaded.embed(array, **cpu) for array in (tiles, *wide.values())], axis=1)
    coords = np.random.default_rng(1).uniform(0, 400, (len(tiles), 2))
    given: dict[str, Any] = {"fields": wide} if wide else {}
    if context_um is not None:
        given["coords_um"] = coords
    expected = by_hand(with_context(x, coords, np.zeros(len(tiles)), context_um))
    np.testing.assert_allclose(loaded.predict(tiles, **cpu, **given), expected, atol=2e-2, rtol=1e-4)
    # and they never do without what they need
    for name, message in (("fields", "also needs tiles of 224"), ("coords_um", "as spatial context, which needs posi")):
        if name in given:
            with pytest.raises(ValueError, match=message):
                loaded.predict(tiles, **cpu, **{k: v for k, v in given.items() if k != name})
    # saved again, they are of this format and predict the same bits
    loaded.save(tmp_path / "new")
    again = pk.Adapter.load(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "pekasc.json").read_text())["format"] == 9
    np.testing.assert_array_equal(again.predict(tiles, **cpu, **given), loaded.predict(tiles, **cpu, **given))


def test_format_5_knows_nothing_of_its_errors(adapter: pk.Adapter, tiles: np.ndarray, tmp_path: Path) -> None:
    adapter.save(tmp_path / "old")
    heads, main = tmp_path / "old" / "heads.safetensors", tmp_path / "old" / "pekasc.json"
    save_file({name: tensor for name, tensor in load_file(heads).items() if not name.startswith("trust.")}, heads)
    record = {k: v for k, v in json.loads(main.read_text()).items() if k not in ("trust", "stain", "sha256")}
    record["format"] = 5
    record["files"]["heads.safetensors"] = _store.sha256(heads.read_bytes())
    main.write_text(json.dumps({**record, "sha256": _store._seal(record)}))
    loaded = pk.Adapter.load(tmp_path / "old")
    assert loaded.held_out is None and loaded.novelty is None and loaded.calibration is None and repr(loaded)
    cpu: dict[str, Any] = {"mpp": 2.0, "compute": {"device": "cpu"}}
    np.testing.assert_array_equal(loaded.predict(tiles, **cpu), adapter.predict(tiles, **cpu))
    with pytest.raises(ValueError, match="has no held-out predictions: it was saved by an earlier version"):
        pk.tl.calibrate(loaded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "mlp"}, "has the head 'mlp', which this pekasc does not read: fit it again"),
        ({"context_um": -1}, r"`context_um` must be null or a positive number, got -1"),
        ({"scales": [2.0]}, r"`scales` must be positive numbers, each once, the first 1, got \[2.0\]"),
        ({"scales": [1, 1]}, "`scales` must be positive numbers, each once"),
    ],
)
def test_damaged_records_of_earlier_formats(
    adapter: pk.Adapter, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    old_folder(adapter, tmp_path / "old", 4, 1, None)
    main = tmp_path / "old" / "pekasc.json"
    record = json.loads(main.read_text()) | change
    main.write_text(json.dumps({**record, "sha256": _store._seal(record)}))
    with pytest.raises(ValueError, match=message):
        pk.Adapter.load(tmp_path / "old")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("head.coef", None, "head.coef is missing"),
        ("head.mean", lambda t: t[1:].clone(), "head.scale must be floating-point numbers of shape"),
        ("head.scale", lambda t: t * 0, "head.scale must be positive"),
        ("head.components", lambda t: t[:, :8].clone(), r"head.components must be floating-point numbers of shape"),
        ("head.intercept", lambda t: t * float("nan"), "head.intercept has values that are NaN"),
    ],
)
def test_damaged_heads_of_earlier_formats(
    adapter: pk.Adapter, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    path = tmp_path / "old"
    old_folder(adapter, path, 4, 1, None)
    tensors = load_file(path / "heads.safetensors")
    found = tensors.pop(name)
    save_file(tensors | ({} if change is None else {name: change(found)}), path / "heads.safetensors")
    record = json.loads((path / "pekasc.json").read_text())
    record["files"]["heads.safetensors"] = _store.sha256((path / "heads.safetensors").read_bytes())
    (path / "pekasc.json").write_text(json.dumps({**record, "sha256": _store._seal(record)}))
    with pytest.raises(ValueError, match=rf"is damaged: heads.safetensors cannot be read \(.*{message}"):
        pk.Adapter.load(path)


@pytest.mark.parametrize("n_scales", [1, 2])
def test_an_old_head_of_another_width_than_the_scales(adapter: pk.Adapter, tmp_path: Path, n_scales: int) -> None:
    """Heads of an odd number of features cannot be those of tiles and their neighbours."""
    path = tmp_path / "old"
    old_folder(adapter, path, 4, n_scales, 150.0)
    tensors = load_file(path / "heads.safetensors")
    for name, axis in (("mean", 0), ("scale", 0), ("components", 1)):
        tensors[f"head.{name}"] = tensors[f"head.{name}"].narrow(axis, 0, 1023).contiguous()
    save_file(tensors, path / "heads.safetensors")
    record = json.loads((path / "pekasc.json").read_text())
    record["files"]["heads.safetensors"] = _store.sha256((path / "heads.safetensors").read_bytes())
    (path / "pekasc.json").write_text(json.dumps({**record, "sha256": _store._seal(record)}))
    with pytest.raises(ValueError, match=r"is damaged: heads.safetensors .*head.mean has 1023 features"):
        pk.Adapter.load(path)


def test_a_configuration_that_names_code_to_import_is_refused(adapter: pk.Adapter, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    adapter.save(path)
    config = json.loads((path / "adapter_config.json").read_text()) | {"auto_mapping": {"parent_library": "os"}}
    (path / "adapter_config.json").write_text(json.dumps(config))
    record = json.loads((path / "pekasc.json").read_text())
    record["files"]["adapter_config.json"] = _store.sha256((path / "adapter_config.json").read_bytes())
    (path / "pekasc.json").write_text(json.dumps({**record, "sha256": _store._seal(record)}))
    with pytest.raises(ValueError, match="adapter_config.json .*`auto_mapping` names code to import"):
        pk.Adapter.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"../secret": "0" * 64}}, "names other files"),
        ({"genes": 3}, r"pekasc.json: `genes` must be names, each once, got 3"),
        ({"gene_scores": []}, r"pekasc.json: `gene_scores` must be a table"),
    ],
)
def test_a_record_that_others_sealed(adapter: pk.Adapter, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    adapter.save(tmp_path / "mine")
    main = tmp_path / "mine" / "pekasc.json"
    record = json.loads(main.read_text()) | change
    main.write_text(json.dumps({**record, "sha256": _store._seal(record)}))
    with pytest.raises(ValueError, match=message):
        pk.Adapter.load(tmp_path / "mine")


def test_arguments_of_an_encoder_that_read_files_are_refused(adapter: pk.Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "mine")
    main = tmp_path / "mine" / "pekasc.json"
    record = json.loads(main.read_text())
    record["encoder"]["model_kwargs"]["checkpoint_path"] = "evil.pth"
    main.write_text(json.dumps({**record, "sha256": _store._seal(record)}))
    with pytest.raises(ValueError, match=r"`model_kwargs` takes arguments .*checkpoint_path"):
        pk.Adapter.load(tmp_path / "mine")


@pytest.mark.parametrize(
    "stain",
    [Stain("reinhard", (8.8, -0.1, 0.03), (0.22, 0.06, 0.012)), Stain("macenko", (0.6, 0.64, 0.48), (0.28, 0.96, 0.0))],
)
def test_a_stain_is_saved(adapter: pk.Adapter, tiles: np.ndarray, tmp_path: Path, stain: Stain) -> None:
    adapter.save(tmp_path / "plain")
    replace(adapter, stain=stain).save(tmp_path / "stained")
    plain, record = (json.loads((tmp_path / name / "pekasc.json").read_text()) for name in ("plain", "stained"))
    assert plain["format"] == record["format"] == 9 and plain["stain"] is None
    assert record["stain"] == {"method": stain.method, "first": list(stain.first), "second": list(stain.second)}
    assert pk.Adapter.load(tmp_path / "plain").stain is None
    loaded = pk.Adapter.load(tmp_path / "stained")
    assert loaded.stain == stain
    with pytest.raises(ValueError, match="each section has a map of its own"):
        loaded.predict(tiles, mpp=2.0, compute={"device": "cpu"})
    # a record that says there is one, and lacks it
    del record["stain"]
    (tmp_path / "stained" / "pekasc.json").write_text(json.dumps({**record, "sha256": _store._seal(record)}))
    with pytest.raises(ValueError, match=r"is damaged: pekasc.json lacks \['stain'\]"):
        pk.Adapter.load(tmp_path / "stained")
