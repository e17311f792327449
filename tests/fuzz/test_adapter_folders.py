"""Folders of adapters that were damaged, or changed with digests made anew: an error that names it, or an adapter."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pekasc as pk
from pekasc._digests import file_sha256
from pekasc.models.adapter import _folder

FILES = ["pekasc.json", "heads.safetensors", "adapter_config.json", "adapter_model.safetensors"]
# what a record may hold elsewhere, and what it never does
VALUES: st.SearchStrategy[Any] = st.sampled_from([
    None, True, False, 0, 1, -1, 3, 10**6, 10**30, 10**400, 0.5, -0.5, float("nan"), float("inf"),
    "", "a", "../x", "1", "a\0b", "ü" * 99,
    [], [1], [None], ["a", "a"], [[1]], [1.5, "a"], {}, {"a": 1}, {"": []}, {"__class__": "os.system"},
])  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]
N = pytest.mark.parametrize("n", [50, pytest.param(2000, marks=SLOW)])


def how(n: int) -> Any:
    return settings(
        max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small adapter."""
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=2.0, n_genes=12, n_spots=24)
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    recipe = pk.Recipe(epochs=1, rank=4, blocks=1, n_views=1, cluster_head_epochs=1, choose_epochs=False)
    readout = {"depth": 2, "n_components": 4, "context_um": 300, "fields_um": (168,)}
    fitted = pk.tl.fit_adapter(sdata, recipe=recipe, readout=readout, compute={"device": "cpu"}, progress=False)
    with pytest.warns(UserWarning, match="Intervals from 2 groups"):
        fitted = pk.tl.calibrate(fitted)
    folder = tmp_path_factory.mktemp("fuzz") / "mine"
    fitted.save(folder)
    return folder


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all parts of a JSON value; of long lists the first and the last."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    listed = list(parts)
    found = [before] if before else []
    for name, part in listed if len(listed) < 30 or isinstance(value, dict) else [listed[0], listed[-1]]:
        found += places(part, (*before, name))
    return found


def changed(data: st.DataObject, value: Any) -> None:
    """Replace, drop, repeat or rename a part of a JSON value."""
    *path, last = data.draw(st.sampled_from(places(value)))
    part = value
    for name in path:
        part = part[name]
    action = data.draw(st.sampled_from(["replace", "replace", "drop", "repeat", "rename"]))
    if action == "replace":
        part[last] = data.draw(VALUES)
    elif isinstance(part, list):
        part.append(part[last]) if action == "repeat" else part.pop(last)
    elif action == "rename":
        part[f"{last}_"] = part.pop(last)
    else:
        part.pop(last)


NAMES = ["x", "head.x", "reading.0.x", "reading.0.0.0.around", "trained_on.x", "trained_on.x.points"]


def change_tensors(data: st.DataObject, file: Path) -> None:
    tensors = load_file(file)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    action = data.draw(st.sampled_from(["shape", "dtype", "value", "drop", "rename", "transpose"]))
    if action == "shape":
        shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
        tensors[name] = torch.ones(shape, dtype=tensor.dtype)
    elif action == "dtype":
        tensors[name] = tensor.to(data.draw(st.sampled_from(DTYPES)))
    elif action == "value":
        value = data.draw(st.sampled_from([0, -1, float("nan"), float("inf")])) if tensor.is_floating_point() else 0
        tensors[name] = torch.full_like(tensor, value)
    elif action == "drop":
        del tensors[name]
    elif action == "rename":
        tensors[data.draw(st.sampled_from(NAMES))] = tensors.pop(name)
    else:
        tensors[name] = tensor.reshape(-1).clone() if tensor.ndim < 2 else tensor.transpose(0, 1).contiguous()
    save_file(tensors, file)


def reseal(folder: Path, record: Any) -> None:
    if isinstance(record, dict) and isinstance(record.get("files"), dict):
        for name, digest in record["files"].items():
            if (folder / name).is_file() and len(str(digest)) == 64:
                record["files"][name] = file_sha256(folder / name)
    (folder / "pekasc.json").write_text(json.dumps(record))
    if isinstance(record, dict):
        (folder / "pekasc.json").write_text(json.dumps({**record, "sha256": _folder._seal(record)}))


def damage(data: st.DataObject, file: Path) -> None:
    """Flip a byte, cut the file, put bytes in, or delete it."""
    content = bytearray(file.read_bytes())
    action = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if action == "delete":
        file.unlink()
        return
    if action == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif action == "cut":
        del content[at:]
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    file.write_bytes(content)


def tried(folder: Path, whole: pk.Adapter) -> str:
    """Load, print and use an adapter; return what came of it."""
    try:
        found = pk.Adapter.load(folder)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error) and len(str(error)) < 2000, error
        return "refused"
    assert repr(found)
    widths = {
        s: len(m.centre) for member in found.reading.members for b in member.head.blocks for s, m in b.maps.items()
    }
    zeros = {source: np.zeros((2, width), dtype=np.float32) for source, width in widths.items()}
    assert found.reading.expression(found.reading.scores(zeros)).shape == (2, len(found.genes))
    if found.encoder != whole.encoder or found.spec != whole.spec or found.fields_um != whole.fields_um:
        return "loaded"
    try:
        px = found.spec.tile_px
        out = found.predict(
            np.zeros((1, px, px, 3), np.uint8),
            mpp=found.spec.mpp,
            coords_um=np.zeros((1, 2)),
            fields={width: np.zeros((1, px, px, 3), np.uint8) for width in found.fields_um},
            compute={"device": "cpu"},
        )
    except (ValueError, OSError) as error:
        assert "adapter" in str(error) or "head" in str(error) or "depth" in str(error), error
        return "loaded"
    assert out.shape == (1, len(found.genes))
    return "used"


@N
def test_changed_and_sealed_again(saved: Path, n: int) -> None:
    whole, results = pk.Adapter.load(saved), list[str]()

    @how(n)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(shutil.copytree(saved, Path(parent) / "mine"))
            record = json.loads((folder / "pekasc.json").read_text())
            kind = data.draw(st.sampled_from(["record", "record", "record", "config", "heads", "weights"]))
            if kind == "record":
                for _ in range(data.draw(st.integers(1, 3))):
                    changed(data, record)
            elif kind == "config":
                config = json.loads((folder / "adapter_config.json").read_text())
                changed(data, config)
                (folder / "adapter_config.json").write_text(json.dumps(config))
            else:
                change_tensors(data, folder / ("heads.safetensors" if kind == "heads" else "adapter_model.safetensors"))
            reseal(folder, record)
            results.append(tried(folder, whole))

    run()
    print({name: results.count(name) for name in sorted(set(results))})  # noqa: T201 (shown with -s, for the slow job)
    assert results.count("refused") > n // 4


@N
def test_damaged(saved: Path, n: int) -> None:
    whole, results = pk.Adapter.load(saved), list[str]()

    @how(n)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(shutil.copytree(saved, Path(parent) / "mine"))
            damage(data, folder / data.draw(st.sampled_from(FILES)))
            results.append(tried(folder, whole))

    run()
    assert results.count("refused") > 0.9 * n  # but for white space and names of files in a damaged record
