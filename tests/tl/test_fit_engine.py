"""How a fit runs: devices, processes, states on disk, profile. What it learns does not depend on it."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from lightning.pytorch.callbacks import EarlyStopping, Timer
from safetensors.numpy import load_file
from spatialdata import SpatialData

import pekasc as pk

Bits = Callable[[pk.Adapter], dict[str, bytes]]
SMALL: dict[str, Any] = {
    "epochs": 2, "depth": 4, "blocks": 2, "device": "cpu", "progress": False, "groups": "patient", "rank": 16,
}  # fmt: skip
SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
import pekasc as pk
options, out = json.loads(sys.argv[1]), sys.argv[2]
sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=1.0, n_genes=24)
pk.pp.tile(sdata, tile_px=56, mpp=2.0)
# the published way always trains, so that there is something to compare
adapter = pk.tl.fit_adapter(
    sdata, preset="paper", epochs=3, depth=4, blocks=2, rank=16, n_clusters=4, n_components=10, n_views=4,
    learning_rate=1e-3, device="cpu", progress=False, groups="patient", **options,
)
if os.environ.get("LOCAL_RANK", "0") == "0":
    adapter.history.to_csv(out + ".csv")
    adapter.save(out)
print("done", os.environ.get("LOCAL_RANK"), adapter.history["loss"].iloc[-1])
"""


def script(folder: Path) -> Path:
    path = folder / "fit_it.py"
    path.write_text(SCRIPT)
    return path


def run(folder: Path, name: str, options: dict[str, Any], **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(script(folder)), json.dumps(options), str(folder / name)]
    env = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    env |= {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=env, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fit in one process that nothing interrupted."""
    folder = tmp_path_factory.mktemp("alone")
    finished(run(folder, "adapter", {}))
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {
        **load_file(folder / "adapter" / "adapter_model.safetensors"),
        **load_file(folder / "adapter" / "heads.safetensors"),
    }


def test_two_processes_learn_what_one_learns(alone: Path, tmp_path: Path) -> None:
    trainer = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    out = finished(run(tmp_path, "adapter", {"trainer": trainer}))
    assert "done 0" in out and "done 1" in out
    one, two = (pd.read_csv(folder / "adapter.csv") for folder in (alone, tmp_path))
    columns = ["fold", "epoch", "loss", "kd", "sa"]
    np.testing.assert_allclose(two[columns], one[columns], atol=1e-4)
    np.testing.assert_allclose(two["val_error"], one["val_error"], atol=1e-4)
    first, second = weights(alone), weights(tmp_path)
    assert first.keys() == second.keys()
    for name in first:
        if "miss" in name:
            np.testing.assert_allclose(second[name], first[name], atol=1e-4)


def test_killed_and_resumed_ends_with_the_same_bits(alone: Path, tmp_path: Path) -> None:
    options = {"resume": str(tmp_path / "state"), "checkpoint_minutes": 0}
    kills = 0
    # in the first fold, and in the last fit
    for wanted in ("fold-0/last.ckpt", "final/last.ckpt"):
        process = run(tmp_path, "adapter", options)
        while process.poll() is None and not (tmp_path / "state" / wanted).exists():
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills
    assert not (tmp_path / "adapter").exists()
    finished(run(tmp_path, "adapter", options))
    first, second = weights(alone), weights(tmp_path)
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)
    drop = ["peak_memory"]
    one, two = (pd.read_csv(folder / "adapter.csv").drop(columns=drop) for folder in (alone, tmp_path))
    pd.testing.assert_frame_equal(one, two)


def test_resume_finds_what_is_finished(
    tiled: SpatialData, tmp_path: Path, all_bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    plain = pk.tl.fit_adapter(tiled, **SMALL)
    first = pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": state})
    monkeypatch.setattr("pekasc.models._fit.choose", lambda *args: pytest.fail("chosen again"))
    monkeypatch.setattr("pekasc.models._fit.train_student", _only_final())
    second = pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": state})
    assert all_bits(first) == all_bits(plain) == all_bits(second)


def _only_final() -> Any:
    from pekasc.models import _fit

    original = _fit.train_student

    def called(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["folder"].name == "final"
        return original(*args, **kwargs)

    return called


def test_a_state_of_other_settings_is_refused(tiled: SpatialData, tmp_path: Path) -> None:
    pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": tmp_path / "state"})
    with pytest.raises(
        ValueError, match=r"state of a fit with other settings or data \(.*random_state: 0 there, 1 now"
    ):
        pk.tl.fit_adapter(tiled, random_state=1, **SMALL, compute={"resume": tmp_path / "state"})
    with pytest.raises(ValueError, match=r"other settings or data \(recipe.learning_rate: 0.0003 there, 0.001 now\)"):
        pk.tl.fit_adapter(tiled, **SMALL, recipe={"learning_rate": 1e-3}, compute={"resume": tmp_path / "state"})
    tiled["table"].X[0, 0] += 1
    with pytest.raises(ValueError, match=r"other settings or data \(.*expression: "):
        pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": tmp_path / "state"})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds no state of a fit \(settings.json is missing\)"):
        pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": tmp_path / "mine"})
    with pytest.raises(ValueError, match=r"is a file: give a folder"):
        pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": tmp_path / "mine" / "thesis.tex"})
    (tmp_path / "state" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"is damaged: settings.json is no JSON.*Delete the folder"):
        pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": tmp_path / "state"})


@pytest.mark.parametrize("kind", ["fp16", "fp32", None])
def test_the_prefix_changes_little_and_its_place_nothing(
    tiled: SpatialData, all_bits: Bits, tmp_path: Path, kind: Any
) -> None:
    adapter = pk.tl.fit_adapter(tiled, **SMALL, compute={"cached_activations": kind})
    whole = pk.tl.fit_adapter(tiled, **SMALL, compute={"cached_activations": None})
    on_disk = pk.tl.fit_adapter(
        tiled, **SMALL, compute={"cached_activations": kind, "cache": tmp_path / "p.zarr", "max_memory": 1}
    )
    assert all_bits(on_disk) == all_bits(adapter)
    assert (tmp_path / "p.zarr").exists() == (kind is not None)
    atol = {"fp16": 0.05, "fp32": 1e-3, None: 0}[kind]
    np.testing.assert_allclose(adapter.history["loss"], whole.history["loss"], atol=atol)


def test_blocks_auto_says_what_it_chose(
    tiled: SpatialData, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    options = {**SMALL, "blocks": "auto", "depth": 6, "epochs": 1}
    adapter = pk.tl.fit_adapter(tiled, **options)
    assert adapter.info["blocks"] == 4
    assert 'blocks="auto": the last 4 of 6; training one takes about' in caplog.text
    assert "Frozen prefix of 2 blocks" in caplog.text
    monkeypatch.setattr("pekasc.models._auto.memory_at_hand", lambda device: 1)
    little = pk.tl.fit_adapter(tiled, **options)
    assert little.info["blocks"] == 1
    assert "Training even one block may not fit: `accumulate=`" in caplog.text


def test_patience_ends_folds_early(tiled: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SMALL, "epochs": 5}
    errors = {0: 1.0, 1: 0.5, 2: 0.9, 3: 0.1, 4: 0.1, 5: 0.1}
    asked: list[int] = []

    def measured(features: Any, y: Any, folds: Any, n: Any) -> np.ndarray:
        epoch = 0 if not asked else asked.pop(0)
        return np.full((1, 16), errors[epoch])

    monkeypatch.setattr("pekasc.models._fit.held_out_errors", measured)
    for patience, ran, chosen in ((1, 2, 1), (None, 5, 3), (2, 5, 3)):
        asked[:] = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
        if patience == 1:
            asked[:] = [0, 1, 2, 0, 1, 2]
        adapter = pk.tl.fit_adapter(tiled, **options, recipe={"patience": patience})
        inner = adapter.history[adapter.history["fold"] >= 0]
        assert inner.groupby("fold")["epoch"].max().tolist() == [ran, ran]
        assert adapter.info["epochs"] == chosen


def test_the_profile_adds_up(tiled: SpatialData) -> None:
    start = time.perf_counter()
    adapter = pk.tl.fit_adapter(tiled, **SMALL)
    whole = time.perf_counter() - start
    profile = adapter.info["profile"]
    assert list(profile["seconds"]) == ["reading", "encoding", "training", "head"]
    assert all(seconds > 0 for seconds in profile["seconds"].values())
    assert 0.4 * whole < sum(profile["seconds"].values()) <= whole
    assert profile["tiles_per_second"]["training"] > 0 and profile["peak_memory"] > 10**8
    assert "profile     reading " in repr(adapter) and " tiles/s)" in repr(adapter)
    assert tiled["table"].uns["pekasc"]["adapter"]["profile"] == profile
    trained = adapter.history[adapter.history["epoch"] > 0]
    assert (trained["peak_memory"] > 10**8).all()
    frozen = pk.tl.fit_adapter(tiled, method=None, progress=False, compute={"device": "cpu"})
    assert frozen.info["profile"]["seconds"]["training"] == 0


def test_precision_of_half_trains_and_predicts(tiled: SpatialData) -> None:
    full = pk.tl.fit_adapter(tiled, **SMALL)
    half = pk.tl.fit_adapter(tiled, **SMALL, compute={"precision": "bf16"})
    np.testing.assert_allclose(half.history["loss"], full.history["loss"], rtol=0.1)
    pk.tl.predict_expression(tiled, half, progress=False, compute={"device": "cpu"})
    assert np.isfinite(tiled["table"].layers["peka"]).any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trainer": {"accelerator": "gpu", "devices": 7}}, ValueError, r"cannot be had: .*Available: "),
        ({"trainer": {"devices": 0, "accelerator": "cpu"}}, ValueError, r"cannot be had: "),
        (
            {"trainer": {"devices": 2, "accelerator": "cpu", "strategy": "ddp_spawn"}},
            ValueError,
            r"forks or spawns.*\"ddp\"",
        ),
        ({"trainer": {"epochs": 2}}, TypeError, r"knows no \['epochs'\]"),
        ({"trainer": {"devices": [0], "accelerator": "cpu"}}, ValueError, r"cannot be had: .*Available: "),
        ({"trainer": {"callbacks": "x"}}, TypeError, r"callbacks must be lightning.Callback, got str"),
        ({"trainer": {"callbacks": [EarlyStopping("loss")]}}, ValueError, r"EarlyStopping.*give `patience=`"),
        ({"trainer": {"logger": "x"}}, TypeError, r"logger must be lightning's Logger, several, or False, got 'x'"),
        (
            {"trainer": {"callbacks": Timer("00:00:01:00")}},
            ValueError,
            r"Timer would change what is learned.*`epochs=`",
        ),
        ({"trainer": {"logger": [True]}}, TypeError, r"logger must be lightning's Logger, several, or False, got True"),
        ({"trainer": {"gradient_clip_val": "x"}}, ValueError, r"`trainer`: Lightning does not take .*gradient_clip"),
        ({"prefix": "int8"}, ValueError, r"`prefix='int8'` is not known.*fp16.*None"),
        ({"n_views": 3}, ValueError, r"`n_views=3` must be one of \[1, 2, 4, 8\]"),
        ({"patience": 0}, ValueError, r"`patience=0` must be positive"),
        ({"accumulate": 0}, ValueError, r"`accumulate=0` must be positive"),
        ({"checkpoint_minutes": -1}, ValueError, r"`checkpoint_minutes=-1` must be a number of minutes"),
        ({"blocks": "some"}, ValueError, r"`blocks='some'` does not fit.*\"auto\", \"all\" or 1 to"),
    ],
)
def test_what_cannot_run_is_refused(
    tiled: SpatialData, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "gpu" in str(options) and torch.cuda.device_count() >= 7:
        pytest.skip("seven GPUs are there")
    before = set(tiled["table"].uns["pekasc"])
    with pytest.raises(error, match=message):
        pk.tl.fit_adapter(tiled, **{**SMALL, **options})
    assert set(tiled["table"].uns["pekasc"]) == before


def test_more_of_a_state_that_counts(tiled: SpatialData, tmp_path: Path) -> None:
    from peft import LoraConfig

    state = tmp_path / "state"
    options = {**SMALL, "method": LoraConfig(r=4, target_modules=["attn.qkv", "mlp.fc1"]), "resume": state}
    pk.tl.fit_adapter(tiled, **options)
    for change, name in (
        ({"head": "ridge-per-gene"}, "readers"),
        ({"accumulate": 2}, "engine"),
        ({"precision": "bf16"}, "precision: fp32 there, bf16 now"),
    ):
        with pytest.raises(ValueError, match=rf"other settings or data \(.*{name}"):
            pk.tl.fit_adapter(tiled, **{**options, **change})
    # the same call in another process names the layers in another order
    again = {**options, "method": LoraConfig(r=4, target_modules=["mlp.fc1", "attn.qkv"])}
    pk.tl.fit_adapter(tiled, **again)
    # what the weights are needed for cannot be made again without them
    for file in (state / "fold-1").glob("epoch-*.npy"):
        file.unlink()
    with pytest.raises(ValueError, match=r"is damaged: fold-1/epoch-1.npy is missing. Delete the folder"):
        pk.tl.fit_adapter(tiled, **options)


def test_blocks_auto_stay_what_they_were(tiled: SpatialData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**SMALL, "blocks": "auto", "depth": 6, "epochs": 1, "resume": tmp_path / "state"}
    assert pk.tl.fit_adapter(tiled, **options).info["blocks"] == 4
    monkeypatch.setattr("pekasc.models._auto.memory_at_hand", lambda device: 1)
    assert pk.tl.fit_adapter(tiled, **options).info["blocks"] == 4


def test_biases_everywhere_are_trained_everywhere(tiled: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    from peft import LoraConfig

    caplog.set_level(logging.INFO)
    kept = pk.tl.fit_adapter(tiled, **{**SMALL, "method": LoraConfig(r=4, bias="all")})
    assert "All blocks run in every epoch, the frozen ones too: its configuration trains biases" in caplog.text
    whole = pk.tl.fit_adapter(tiled, **{**SMALL, "method": LoraConfig(r=4, bias="all"), "prefix": None})
    np.testing.assert_array_equal(kept.history["loss"], whole.history["loss"])


def test_an_encoder_whose_blocks_cannot_be_split(tiled: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    eva = pk.models.Encoder("eva02_tiny_patch14_224", weights="random", model_kwargs={"depth": 2})
    options = {**SMALL, "encoder": eva, "depth": 2, "epochs": 1}
    adapter = pk.tl.fit_adapter(tiled, **{**options, "blocks": "auto"})
    assert adapter.info["blocks"] == "all"
    assert 'blocks="auto": all 2, for those of this encoder cannot be run one by one' in caplog.text
    pk.tl.fit_adapter(tiled, **{**options, "blocks": 1})
    assert "this encoder's cannot be split" in caplog.text
    for name in ("gradient_checkpointing", "compile"):
        with pytest.raises(ValueError, match=r"cannot be run one by one.*plain VisionTransformer"):
            pk.tl.fit_adapter(tiled, **{**options, name: True})


def test_spots_stay_with_their_tiles_in_any_order(tiled: SpatialData) -> None:
    order = np.random.default_rng(0).permutation(tiled["table"].n_obs)
    plain = pk.tl.fit_adapter(
        tiled, method=None, progress=False, groups="patient", readout={"depth": 4}, compute={"device": "cpu"}
    )
    mixed = SpatialData(
        images=dict(tiled.images), shapes=dict(tiled.shapes), tables={"table": tiled["table"][order].copy()}
    )
    again = pk.tl.fit_adapter(
        mixed, method=None, progress=False, groups="patient", readout={"depth": 4}, compute={"device": "cpu"}
    )
    np.testing.assert_allclose(again.gene_scores["pearson"], plain.gene_scores["pearson"], atol=1e-5)


def test_features_of_an_early_block_beside_the_last(tiled: SpatialData) -> None:
    options = {**SMALL, "epochs": 1, "blocks": 2}
    for depth in ((1, 6), (4, 6)):
        kept = pk.tl.fit_adapter(tiled, **{**options, "depth": depth, "prefix": "fp32"})
        whole = pk.tl.fit_adapter(tiled, **{**options, "depth": depth, "prefix": None})
        np.testing.assert_allclose(kept.history["loss"], whole.history["loss"], atol=1e-3)


def test_dropout_rests_while_features_are_measured(tiled: SpatialData, all_bits: Bits, tmp_path: Path) -> None:
    from peft import LoraConfig

    options = {**SMALL, "method": LoraConfig(r=4, lora_dropout=0.5)}
    plain = pk.tl.fit_adapter(tiled, **options)
    state = tmp_path / "state"
    pk.tl.fit_adapter(tiled, **options, compute={"resume": state, "checkpoint_minutes": 0})
    # as after a kill between the features of an epoch and the next state: they are there, what comes after is not
    (state / "fold-0" / "done.json").unlink()
    assert all_bits(
        pk.tl.fit_adapter(tiled, **options, compute={"resume": state, "checkpoint_minutes": 0})
    ) == all_bits(plain)


def test_a_teacher_of_other_genes_is_another_fit(tiled: SpatialData, tmp_path: Path) -> None:
    genes = list(tiled["table"].var_names[:5])
    pk.tl.fit_adapter(tiled, genes=genes, **SMALL, compute={"resume": tmp_path / "state"})
    # counts change places in one spot: its sum, and with it what is learned of the five genes, stays what it was
    counts = tiled["table"].X
    row = counts[[0]].toarray().ravel()
    most, least = 5 + int(row[5:].argmax()), 5 + int(row[5:].argmin())
    assert row[most] > row[least]
    counts[0, most], counts[0, least] = row[least], row[most]
    with pytest.raises(ValueError, match=r"other settings or data"):
        pk.tl.fit_adapter(tiled, genes=genes, **SMALL, compute={"resume": tmp_path / "state"})


class _Ends(L.Callback):
    """Ends a training after its first epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


class _Button(L.Callback):
    """Presses the stop button of a notebook."""

    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyboardInterrupt


def test_a_callback_must_not_end_the_training(tiled: SpatialData) -> None:
    with pytest.raises(RuntimeError, match=r"ended the training after epoch 1 of 2.*Give `epochs=` or `patience=`"):
        pk.tl.fit_adapter(tiled, **SMALL, compute={"trainer": {"callbacks": _Ends()}})


def test_the_stop_button_stops(tiled: SpatialData, all_bits: Bits) -> None:
    before, handler = pk.tl.fit_adapter(tiled, **SMALL), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        pk.tl.fit_adapter(tiled, key_added="other", **SMALL, compute={"trainer": {"callbacks": [_Button()]}})
    assert signal.getsignal(signal.SIGINT) == handler
    assert "other" not in tiled["table"].uns["pekasc"]
    assert all_bits(pk.tl.fit_adapter(tiled, **SMALL)) == all_bits(before)


def test_one_run_at_a_time_in_a_folder(tiled: SpatialData, tmp_path: Path) -> None:
    state = tmp_path / "state"
    pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": state})
    with FileLock(state / "in-use.lock"):
        with pytest.raises(ValueError, match=r"`resume=.*is in use: another run of this fit is going on"):
            pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": state})
    pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": state})


@pytest.fixture
def unfinished(tiled: SpatialData, tmp_path: Path) -> Path:
    """Return the folder of a fit that was killed in its first fold, after the state of the last epoch."""
    state = tmp_path / "state"
    pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": state, "checkpoint_minutes": 0})
    (state / "fold-0" / "done.json").unlink()
    return state


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("fold-0/last.ckpt", r"state of a training in `resume=` is damaged: .*last.ckpt.*Delete that file"),
        ("fold-1/epoch-1.npy", r"is damaged: fold-1/epoch-1.npy cannot be read .*Delete the folder"),
        ("frozen.npy", r"is damaged: frozen.npy cannot be read .*Delete the folder"),
        ("choice.json", r"is damaged: choice.json is no JSON .*Delete the folder"),
    ],
)
def test_damaged_states_are_named(tiled: SpatialData, unfinished: Path, file: str, message: str) -> None:
    whole = (unfinished / file).read_bytes()
    for left in (whole[: len(whole) // 2], b""):
        (unfinished / file).write_bytes(left)
        with pytest.raises(ValueError, match=message):
            pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": unfinished, "checkpoint_minutes": 0})


def test_a_state_of_another_adapter_is_refused(tiled: SpatialData, unfinished: Path) -> None:
    file = unfinished / "fold-0" / "last.ckpt"
    state = torch.load(file, weights_only=False)
    state["state_dict"] = {f"{name}.x": value for name, value in state["state_dict"].items()}
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"is of another adapter: .* are not in both. Delete the folder"):
        pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": unfinished, "checkpoint_minutes": 0})


def test_epochs_after_the_state_are_run_and_measured_again(
    tiled: SpatialData, unfinished: Path, all_bits: Bits
) -> None:
    # on a GPU the epoch that is run again is not the one before, to the last bit: its features must not stay
    newer = unfinished / "fold-0" / "epoch-2.npy"
    before = np.load(newer)
    np.save(newer, np.random.default_rng(0).normal(size=before.shape).astype(np.float32))
    again = pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": unfinished, "checkpoint_minutes": 0})
    np.testing.assert_array_equal(np.load(newer), before)
    plain = pk.tl.fit_adapter(tiled, **SMALL)
    assert all_bits(again) == all_bits(plain)
    np.testing.assert_array_equal(again.history["val_error"], plain.history["val_error"])


def test_a_prefix_on_disk_lies_in_the_folder_of_the_fit(tiled: SpatialData, tmp_path: Path, all_bits: Bits) -> None:
    state = tmp_path / "state"
    adapter = pk.tl.fit_adapter(tiled, **SMALL, compute={"resume": state, "max_memory": 1})
    assert (state / "prefix.zarr").is_dir()
    assert all_bits(adapter) == all_bits(pk.tl.fit_adapter(tiled, **SMALL))


def test_numbers_of_numpy_are_numbers(tiled: SpatialData, tmp_path: Path) -> None:
    options = {**SMALL, "blocks": np.int64(2), "epochs": np.int64(1)}
    assert pk.tl.fit_adapter(tiled, **options, compute={"resume": tmp_path / "state"}).info["blocks"] == 2


@pytest.mark.parametrize("depth", [None, 4, (3, 5)])
def test_the_first_pass_leaves_the_prefix_behind(
    tiled: SpatialData, all_bits: Bits, monkeypatch: pytest.MonkeyPatch, depth: Any
) -> None:
    from pekasc.models import _prefix
    from pekasc.models.selection._job import Job

    options = {**SMALL, "depth": depth, "epochs": 1, "scales": (1, 2), "orientations": 2}
    with monkeypatch.context() as patched:
        patched.setattr(Job, "embed_first", lambda self, depths: self.embed(depths))
        twice = pk.tl.fit_adapter(tiled, **options, recipe={"n_views": 2})
    with monkeypatch.context() as patched:
        patched.setattr(_prefix._BlockRunner, "over", lambda *args: pytest.fail("the frozen blocks ran again"))
        once = pk.tl.fit_adapter(tiled, **options, recipe={"n_views": 2})
    assert all_bits(once) == all_bits(twice)
    # of further views, only those are computed
    ran: list[list[int]] = []
    over = _prefix._BlockRunner.over

    def counted(self: Any, order: Any, views: Any, *rest: Any) -> None:
        ran.append(list(views))
        over(self, order, views, *rest)

    monkeypatch.setattr(_prefix._BlockRunner, "over", counted)
    pk.tl.fit_adapter(tiled, **options, recipe={"n_views": 4})
    assert ran == [[1, 3]]


def test_where_nothing_is_frozen_the_log_says_why(tiled: SpatialData, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    pk.tl.fit_adapter(tiled, **{**SMALL, "depth": (1, 4), "epochs": 1})
    assert "All blocks run in every epoch, the frozen ones too: features of block 1 are read." in caplog.text


TOGETHER = """
import sys
import torch.distributed as dist
from pekasc.models.runtime import _processes as processes
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
assert processes.n_on_machine() == 2
with processes.raise_together():
    pass
try:
    with processes.raise_together():
        if rank == 1:
            raise OSError("no room")
except (OSError, RuntimeError) as error:
    print(type(error).__name__, error)
"""


def test_processes_fail_together(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    both = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "together.py"), str(rank), str(tmp_path / "meet")],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    out = [finished(process) for process in both]
    assert "RuntimeError Another process failed (process 1: OSError: no room)" in out[0]
    assert "OSError no room" in out[1]
