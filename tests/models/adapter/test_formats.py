"""Small adapters that earlier versions saved, one a format: what they predicted then is predicted now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import pekasc as pk
from pekasc.models.adapter._folder import FORMAT, READ

# Each was saved by the last version that wrote its format: two synthetic patients, an encoder with random weights of 16
# features, hidden layers of 16 units (512 in releases) so that files are small. `predicted.npz` is what it predicted.
FORMATS = Path(__file__).parent / "formats"


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
    found = adapter.predict(kept["tiles"], mpp=4.0, coords_um=kept["coords_um"], compute={"device": "cpu"})
    np.testing.assert_allclose(found, kept["predicted"], atol=1e-4)
    assert found.std(axis=0).min() > 1e-3  # tiles differ
    assert (adapter.held_out is not None) == (number >= 7) and (adapter.n_adapters == 2) == (number >= 6)


@pytest.mark.parametrize("number", READ)
def test_it_is_saved_in_the_format_of_today(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FORMATS)
    shutil.copytree(FORMATS / str(number), tmp_path / "old")
    pk.Adapter.load(tmp_path / "old").save(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "pekasc.json").read_text())["format"] == FORMAT
    again, kept = pk.Adapter.load(tmp_path / "new"), np.load(FORMATS / str(number) / "predicted.npz")
    found = again.predict(kept["tiles"], mpp=4.0, coords_um=kept["coords_um"], compute={"device": "cpu"})
    np.testing.assert_allclose(found, kept["predicted"], atol=1e-4)
