"""Folders of unfinished fits that were damaged or changed: an error that names the folder, or the result of the fit.

What was only damaged never changes the result; what was changed and sealed again may, but stops with an error of ours.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pekasc._options import Compute, Readout, Recipe
from pekasc.models.adapter import Adapter
from pekasc.models.encoders import EncoderNetwork, resolve_encoder
from pekasc.models.runtime import replace_sealed, write_sealed_array, write_sealed_json
from pekasc.models.selection import Data, HeadSpec, Options, fit
from pekasc.models.teachers import StoredTeacher
from pekasc.tiling import ArrayTiles, TileSpec

N_SPOTS, TILE_PX = 24, 28
RNG = np.random.default_rng(0)
CPU = torch.device("cpu")
DATA = Data(
    ArrayTiles(RNG.integers(0, 255, (N_SPOTS, TILE_PX, TILE_PX, 3), dtype=np.uint8)),
    RNG.random((N_SPOTS, 3), dtype=np.float32), ["a", "b", "c"], np.repeat(["P1", "P2"], N_SPOTS // 2),
    np.repeat(["P1S1", "P2S1"], N_SPOTS // 2), RNG.uniform(0, 2000, (N_SPOTS, 2)),
)  # fmt: skip
TEACHER = StoredTeacher(RNG.normal(size=(N_SPOTS, 4)).astype(np.float32), "mine", None, None)
RECIPE = Recipe(epochs=1, rank=2, blocks=1, n_views=1, batch_size=8, n_clusters=3, cluster_head_epochs=1,
                choose_epochs=False)  # fmt: skip
# what the state of a fit may hold elsewhere, and what it never does
VALUES: st.SearchStrategy[Any] = st.sampled_from([
    None, True, 0, 1, -1, 10**6, 10**400, 0.5, float("nan"), float("inf"), "", "a", "all", [], [1], [None], [[1]],
    {}, {"a": 1}, [{"epoch": 1}],
])  # fmt: skip
SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]
N = pytest.mark.parametrize("n", [50, pytest.param(2000, marks=SLOW)])


@pytest.fixture(scope="module")
def model() -> EncoderNetwork:
    return EncoderNetwork(resolve_encoder("tiny"), TILE_PX)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def run_fit(model: EncoderNetwork, folder: Path | None) -> Adapter:
    compute = Compute(device="cpu", resume=folder, checkpoint_minutes=0)
    # a blend: what it reads is all that a state holds
    readout = Readout(depth=2, n_components=2, context_um=None, fields_um=None)
    options = Options("bone", RECIPE, readout, compute, CPU)
    return fit(model, TileSpec(TILE_PX, 4.0), DATA, TEACHER, options, [HeadSpec(readout)])[0]


def bits(adapter: Adapter) -> bytes:
    weights = [t.numpy().tobytes() for kind in adapter.weights.values() for _, t in sorted(kind.items())]
    ones = {source: np.ones((1, 512), dtype=np.float32) for source in adapter.reading.sources}
    return b"".join([*weights, adapter.reading.expression(adapter.reading.scores(ones)).tobytes()])


@pytest.fixture(scope="module")
def state(model: EncoderNetwork, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """Return the folder of a fit that was stopped in its last training, and the result of the fit."""
    folder = tmp_path_factory.mktemp("state") / "state"
    return folder, bits(run_fit(model, folder))


def tried(model: EncoderNetwork, folder: Path) -> bytes | None:
    """Go on with a fit; return its result, None if it was refused."""
    try:
        return bits(run_fit(model, folder))
    except (ValueError, OSError) as error:
        assert str(folder) in str(error) and len(str(error)) < 3000, error
        return None


def how(n: int) -> Any:
    return settings(
        max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def files_of(folder: Path) -> list[Path]:
    """Return the files that such a fit reads again."""
    read = ["settings.json", "choice.json", "frozen/2.npy", "final/last.ckpt", "final/last.json"]
    read += [f"fold-{i}/{name}" for i in (0, 1) for name in ("done.json", "epoch-1.npy")]
    return [folder / name for name in read]


@N
def test_damaged(model: EncoderNetwork, state: tuple[Path, bytes], n: int) -> None:
    whole, result = state
    refused = list[bool]()

    @how(n)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(shutil.copytree(whole, Path(parent) / "state"))
            file = data.draw(st.sampled_from(files_of(folder)))
            content = bytearray(file.read_bytes())
            action, at = data.draw(st.sampled_from(["flip", "cut", "insert", "delete"])), 0
            at = data.draw(st.integers(0, len(content) - 1))
            if action == "flip":
                content[at] ^= data.draw(st.integers(1, 255))
            elif action == "cut":
                del content[at:]
            elif action == "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
            file.unlink() if action == "delete" else file.write_bytes(content)
            found = tried(model, folder)
            assert found in (None, result)
            refused.append(found is None)

    run()
    print({"refused": sum(refused), "the same result": len(refused) - sum(refused)})  # noqa: T201 (shown with -s, for the slow job)
    # files that can be made again may be deleted
    assert sum(refused) > n // 3


def change_json(data: st.DataObject, file: Path) -> None:
    value = json.loads(file.read_text())["value"]
    if isinstance(value, dict) and data.draw(st.booleans()):
        value[data.draw(st.sampled_from(sorted(value)))] = data.draw(VALUES)
    elif isinstance(value, list) and value and isinstance(value[0], dict) and data.draw(st.booleans()):
        value[0][data.draw(st.sampled_from(sorted(value[0])))] = data.draw(VALUES)
    else:
        value = data.draw(VALUES)
    write_sealed_json(file, value, "The state")


def change_array(data: st.DataObject, file: Path) -> None:
    shape = data.draw(st.sampled_from([(), (0,), (N_SPOTS,), (N_SPOTS, 1), (N_SPOTS, 384), (3, 384), (N_SPOTS, 2, 2)]))
    dtype = data.draw(st.sampled_from(["f4", "f8", "i8", "U3", "?", "c8"]))
    values = np.zeros(shape, dtype) if data.draw(st.booleans()) or dtype != "f4" else np.full(shape, np.nan, dtype)
    write_sealed_array(file, values, "The state")


def change_checkpoint(data: st.DataObject, file: Path) -> None:
    found = torch.load(file, weights_only=True)
    part: Any = found
    path = []
    for _ in range(data.draw(st.integers(1, 4))):
        names = (
            sorted(part, key=str)
            if isinstance(part, dict)
            else list(range(len(part)))
            if isinstance(part, list)
            else []
        )
        if not names:
            break
        path.append((part, data.draw(st.sampled_from(names))))
        part = path[-1][0][path[-1][1]]
    holder, name = path[-1]
    action = data.draw(st.sampled_from(["replace", "drop", "tensor"]))
    if action == "drop":
        del holder[name]
    elif action == "replace":
        holder[name] = data.draw(st.sampled_from([None, 0, -1, "a", [], {}, [1], {"a": 1}, 1.5]))
    else:
        holder[name] = torch.zeros(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    content = io.BytesIO()
    torch.save(found, content)
    replace_sealed(file, content.getvalue(), "The state")


@N
def test_changed_and_sealed_again(model: EncoderNetwork, state: tuple[Path, bytes], n: int) -> None:
    whole, _ = state
    refused = list[bool]()

    @how(n)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(shutil.copytree(whole, Path(parent) / "state"))
            change = data.draw(st.sampled_from([change_json, change_array, change_checkpoint]))
            if change is change_json:
                files = [p for p in files_of(folder) if p.suffix == ".json" and p.stem not in ("settings", "last")]
            else:
                files = [p for p in files_of(folder) if p.suffix == (".npy" if change is change_array else ".ckpt")]
            change(data, data.draw(st.sampled_from(files)))
            refused.append(tried(model, folder) is None)

    run()
    print({"refused": sum(refused), "a result": len(refused) - sum(refused)})  # noqa: T201 (shown with -s, for the slow job)
    assert sum(refused) > n // 4
