"""The folder of an adapter: saves that are killed, and a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pekasc as pk
from pekasc.models.adapter import _folder as _store
from pekasc.models.runtime import _files

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


def test_an_adapter_of_format_3_is_read(adapter: pk.Adapter, tmp_path: Path) -> None:
    adapter.save(tmp_path / "mine")
    main = tmp_path / "mine" / "pekasc.json"
    old = {k: v for k, v in json.loads(main.read_text()).items() if k != "sha256"} | {"format": 3}
    main.write_text(json.dumps({**old, "sha256": _store._seal(old)}))
    assert pk.Adapter.load(tmp_path / "mine").genes == adapter.genes


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
