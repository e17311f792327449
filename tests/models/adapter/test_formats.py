"""Small adapters that earlier versions saved, one a format: what they predicted then is predicted now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import pekasc as pk
from pekasc.models.adapter._folder import FORMAT, READ
from pekasc.tiling import Stain, StainMap

# Each was saved by the last version that wrote its format: two synthetic patients, an encoder with random weights of 16
# features, hidden layers of 16 units (512 in releases) so that files are small. `predicted.npz` is what it predicted.
FORMATS = Path(__file__).parent / "formats"
SOURCE = Stain("reinhard", (9.0, -0.08, 0.02), (0.2, 0.04, 0.009))


def predicted(adapter: pk.Adapter, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what an adapter predicts now and then, with one stain map for all tiles of format 8."""
    kept = np.load(FORMATS / str(number) / "predicted.npz")
    stain = None if adapter.stain is None else StainMap(SOURCE, adapter.stain)
    found = adapter.predict(
        kept["tiles"], mpp=4.0, coords_um=kept["coords_um"], stain=stain, compute={"device": "cpu"}
    )  # fmt: skip
    return found, kept["predicted"]


def test_there_is_one_of_each_format() -> None:
    assert sorted(int(folder.name) for folder in FORMATS.iterdir() if folder.is_dir()) == sorted(READ)
    assert max(READ) == FORMAT


@pytest.mark.parametrize("number", READ)
def test_it_predicts_what_it_did(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FORMATS)  # where the encoder's weights are
    assert json.loads((FORMATS / str(number) / "pekasc.json").read_text())["format"] == number
    adapter = pk.Adapter.load(FORMATS / str(number))
    kept = np.load(FORMATS / str(number) / "predicted.npz")
    assert list(adapter.genes) == kept["genes"].tolist()
    found, then = predicted(adapter, number)
    np.testing.assert_allclose(found, then, atol=1e-4)
    assert (adapter.stain is not None) == (number == 8)
    assert adapter.novelty is None or (len(adapter.novelty.distance.faults.names) == 5) == (number >= 9)
    assert found.std(axis=0).min() > 1e-3  # tiles differ
    assert (adapter.held_out is not None) == (number >= 7) and (adapter.n_adapters == 2) == (number >= 6)


@pytest.mark.parametrize("number", READ)
def test_it_is_saved_in_the_format_of_today(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FORMATS)
    shutil.copytree(FORMATS / str(number), tmp_path / "old")
    pk.Adapter.load(tmp_path / "old").save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "pekasc.json").read_text())["format"] == FORMAT
    found, then = predicted(pk.Adapter.load(tmp_path / "new"), number)
    np.testing.assert_allclose(found, then, atol=1e-4)
