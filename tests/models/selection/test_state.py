"""A fit that goes on from its folder: with the same bits, and never from what is damaged or of another fit."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from filelock import FileLock
from peft import LoraConfig
from spatialdata import SpatialData

import pekasc as pk
from pekasc.models.runtime import replace_sealed, write_sealed_array, write_sealed_json
from pekasc.models.selection._student import train_student
from pekasc.models.training._callbacks import HISTORY

Fit = Callable[..., pk.Adapter]
Numbers = Callable[[pk.Adapter], dict[str, bytes]]


@pytest.fixture(scope="module")
def plain(make_sections: Callable[[], SpatialData], fit: Fit) -> pk.Adapter:
    """Return a fit without a folder."""
    return fit(make_sections())


@pytest.fixture(scope="module")
def _finished(
    make_sections: Callable[[], SpatialData], fit: Fit, tmp_path_factory: pytest.TempPathFactory, plain: pk.Adapter
) -> tuple[Path, pk.Adapter]:
    folder = tmp_path_factory.mktemp("state") / "finished"
    return folder, fit(make_sections(), compute={"resume": folder, "checkpoint_minutes": 0})


@pytest.fixture
def finished(_finished: tuple[Path, pk.Adapter], tmp_path: Path) -> Path:
    """Return the folder of a fit that ended."""
    return Path(shutil.copytree(_finished[0], tmp_path / "state"))


@pytest.fixture
def unfinished(finished: Path) -> Path:
    """Return the folder of a fit that was killed in its first fold, after the state of the last epoch."""
    (finished / "fold-0" / "done.json").unlink()
    return finished


class _Button(L.Callback):
    """Press the stop button in the second epoch of the final training, which alone has six batches."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.num_training_batches == 6 and trainer.global_step == 8:
            raise KeyboardInterrupt


# members of both networks, averaged, with context and a wider field: all that a reading may need of a state
BLEND: dict[str, Any] = {
    "head": "blend", "members": ("frozen:low-rank", "adapted:ridge", "adapted:low-rank"), "selection": "average",
    "context_um": "auto", "fields_um": (168.0,), "n_components": 8,
}  # fmt: skip
# dies in the first fold, as a machine does: there is no time to say goodbye
KILLED = """
import os, signal, sys
import lightning as L
class Dies(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
quick_fit(
    sdata, recipe={"choose_epochs": False}, readout=READOUT,
    compute={"resume": sys.argv[1], "checkpoint_minutes": 0, "trainer": {"callbacks": Dies()}},
)
"""


def test_killed_and_resumed_ends_with_the_same_bits(
    sections: SpatialData, fit: Fit, fit_script: str, numbers: Numbers, tmp_path: Path
) -> None:
    # every epoch is trained, so that there is a final training to be killed
    recipe, state = {"choose_epochs": False}, tmp_path / "state"
    plain = fit(sections, recipe=recipe, readout=BLEND)
    (tmp_path / "killed.py").write_text(fit_script + KILLED.replace("READOUT", repr(BLEND)))
    killed = subprocess.run([sys.executable, "-W", "ignore", str(tmp_path / "killed.py"), str(state)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (state / "fold-0" / "last.ckpt").exists() and not (state / "fold-0" / "done.json").exists()
    how: dict[str, Any] = {"resume": state, "checkpoint_minutes": 0}
    with pytest.raises(KeyboardInterrupt):
        fit(sections, recipe=recipe, readout=BLEND, compute={**how, "trainer": {"callbacks": _Button()}})
    assert (state / "fold-1" / "done.json").exists() and (state / "final" / "last.ckpt").exists()
    again = fit(sections, recipe=recipe, readout=BLEND, compute=how)
    assert len(again.reading.use().members) >= 3 and again.fields_um == (168.0,)
    assert numbers(again) == numbers(plain)
    assert max(t.abs().max().item() for t in again.weights["adapter"].values()) > 0


def test_resume_finds_what_is_finished(
    sections: SpatialData, fit: Fit, numbers: Numbers, plain: pk.Adapter, _finished: tuple[Path, pk.Adapter],
    finished: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def only_final(*args: Any, **kwargs: Any) -> Any:
        assert kwargs["folder"].name == "final"
        return train_student(*args, **kwargs)

    monkeypatch.setattr("pekasc.models.selection._fit.choose_depth", lambda *args: pytest.fail("chosen again"))
    monkeypatch.setattr("pekasc.models.selection._student.train_student", only_final)
    # nor does it matter how often it writes, or how much memory it may take
    second = fit(sections, compute={"resume": finished, "checkpoint_minutes": 9, "max_memory": 10**9})
    assert numbers(_finished[1]) == numbers(plain) == numbers(second)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"random_state": 1}, "random_state: 0 there, 1 now"),
        ({"recipe": {"learning_rate": 1e-3}}, "recipe.learning_rate: 0.003 there, 0.001 now"),
        ({"readout": {"n_components": 3}}, "heads.0.readout.n_components: None there, 3 now"),
        ({"readout": {"head": "ridge-per-gene"}}, "heads.0.readout.head: ridge there, ridge-per-gene now"),
        ({"readout": {"selection": "average"}}, "heads.0.readout.selection: best there, average now"),
        ({"readout": {"fields_um": (168,)}}, r"fields_um: \[\] there, \[168.0\] now"),
        ({"compute": {"accumulate": 2}}, "compute.accumulate: 1 there, 2 now"),
        ({"compute": {"precision": "bf16"}}, "compute.precision: fp32 there, bf16 now"),
        ({"recipe": {"gradient_clip": 0.5}}, "recipe.gradient_clip: 1.0 there, 0.5 now"),
        ({"method": "lora"}, "method: bone there, lora now"),
    ],
)
def test_a_state_of_other_settings_is_refused(
    sections: SpatialData, fit: Fit, finished: Path, changes: dict[str, Any], message: str
) -> None:
    compute = {**changes.get("compute", {}), "resume": finished}
    with pytest.raises(ValueError, match=rf"of a fit with other settings or data \(.*{message}"):
        fit(sections, **{**changes, "compute": compute})


def test_a_state_of_other_data_is_refused(sections: SpatialData, fit: Fit, finished: Path) -> None:
    sections["table"].X[0, 0] += 1
    with pytest.raises(ValueError, match=r"other settings or data \(.*expression: "):
        fit(sections, compute={"resume": finished})


def test_a_teacher_of_other_genes_is_another_fit(sections: SpatialData, fit: Fit, tmp_path: Path) -> None:
    how: dict[str, Any] = {"genes": list(sections["table"].var_names[:5]), "recipe": {"epochs": 1}}
    fit(sections, **how, compute={"resume": tmp_path / "state"})
    # counts change places in one spot: its sum, and with it what is learned of the five genes, stays what it was
    counts = sections["table"].X
    row = counts[[0]].toarray().ravel()
    most, least = 5 + int(row[5:].argmax()), 5 + int(row[5:].argmin())
    assert row[most] > row[least]
    counts[0, most], counts[0, least] = row[least], row[most]
    with pytest.raises(ValueError, match=r"other settings or data \(every gene: .*teacher: "):
        fit(sections, **how, compute={"resume": tmp_path / "state"})


def test_layers_of_a_configuration_have_no_order(
    sections: SpatialData, fit: Fit, numbers: Numbers, tmp_path: Path
) -> None:
    # the same call in another process names them in another order
    made = [
        fit(
            sections, method=LoraConfig(r=4, target_modules=targets), recipe={"epochs": 1},
            compute={"resume": tmp_path / "state"},
        )
        for targets in (["attn.qkv", "mlp.fc1"], ["mlp.fc1", "attn.qkv"])
    ]  # fmt: skip
    assert numbers(made[0]) == numbers(made[1])


def test_numbers_of_numpy_are_numbers(sections: SpatialData, fit: Fit, tmp_path: Path) -> None:
    recipe = {"blocks": np.int64(1), "epochs": np.int64(1)}
    assert fit(sections, recipe=recipe, compute={"resume": tmp_path / "state"}).info["blocks"] == 1


def test_a_folder_of_something_else_is_refused(sections: SpatialData, fit: Fit, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds no .* of a fit \(settings.json is missing\)"):
        fit(sections, compute={"resume": tmp_path / "mine"})
    with pytest.raises(ValueError, match=r"is a file: give a folder"):
        fit(sections, compute={"resume": tmp_path / "mine" / "thesis.tex"})
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_one_run_at_a_time_in_a_folder(sections: SpatialData, fit: Fit, finished: Path) -> None:
    with FileLock(finished / "in-use.lock"):
        with pytest.raises(ValueError, match=r"`resume=.*is in use.* another run of this fit"):
            fit(sections, compute={"resume": finished})
    fit(sections, compute={"resume": finished})


@pytest.mark.parametrize("left", ["half", "nothing"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("settings.json", r"is damaged: settings.json is no JSON of ours .*Delete the folder"),
        ("fold-0/last.ckpt", r"checkpoint of a training in `Compute.resume` is damaged: .*last.ckpt.*Delete that file"),
        ("fold-1/epoch-1.npy", r"is damaged: fold-1/epoch-1.npy cannot be read .*Delete the folder"),
        ("frozen/2.npy", r"is damaged: frozen/2.npy cannot be read .*Delete the folder"),
        ("choice.json", r"is damaged: choice.json cannot be read \(choice.json is no JSON .*Delete the folder"),
        ("fold-1/done.json", r"is damaged: fold-1/done.json cannot be read .*Delete the folder"),
    ],
)
def test_damaged_states_are_named(
    sections: SpatialData, fit: Fit, unfinished: Path, file: str, message: str, left: str
) -> None:
    whole = (unfinished / file).read_bytes()
    (unfinished / file).write_bytes(whole[: len(whole) // 2] if left == "half" else b"")
    with pytest.raises(ValueError, match=message):
        fit(sections, compute={"resume": unfinished, "checkpoint_minutes": 0})


@pytest.mark.parametrize(
    "file",
    ["fold-0/last.ckpt", "fold-1/epoch-1.npy", "frozen/2.npy", "choice.json", "fold-1/done.json", "settings.json"],
)
def test_a_flipped_bit_is_found(sections: SpatialData, fit: Fit, unfinished: Path, file: str) -> None:
    content = bytearray((unfinished / file).read_bytes())
    content[len(content) // 2] ^= 1
    (unfinished / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{Path(file).name}|other settings or data"):
        fit(sections, compute={"resume": unfinished, "checkpoint_minutes": 0})


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        ("choice.json", [], "choice.json has another shape"),
        ("choice.json", {"depth": [1], "alpha": "a", "table": []}, "choice.json has another shape"),
        ("choice.json", {"depth": [1], "alpha": 10**400, "table": []}, "choice.json has another shape"),
        ("choice.json", {"depth": [1], "alpha": 1.0, "table": [[[1], 1.0]]}, "choice.json has another shape"),
        (
            "choice.json",
            {"depth": [99], "alpha": 1.0, "table": [[[99], 1.0, 1.0]]},
            "depths or penalties that this fit",
        ),
        ("fold-1/done.json", 3, "fold-1/done.json: the history has another shape"),
        ("fold-1/done.json", [{"epoch": 7}], "fold-1/done.json: the history has another shape"),
        ("fold-1/done.json", [{**dict.fromkeys(HISTORY, 1), "kd": 10**400}], "the history does not hold numbers"),
        ("fold-1/done.json", [], "fold-1/done.json is no history of 1 to 2 epochs"),
        ("blocks.json", 99, "blocks.json names 99 of 2 blocks"),
    ],
)
def test_a_state_of_another_shape_is_named(
    sections: SpatialData, fit: Fit, tmp_path: Path, finished: Path, file: str, value: Any, message: str
) -> None:
    how: dict[str, Any] = {"compute": {"resume": finished}}
    if file == "blocks.json":
        how = {"recipe": {"blocks": "auto", "epochs": 1}, "compute": {"resume": tmp_path / "auto"}}
        fit(sections, **how)
    write_sealed_json(Path(how["compute"]["resume"]) / file, value, "The state")
    with pytest.raises(ValueError, match=rf"is damaged: .*{message}.*Delete the folder"):
        fit(sections, **how)


def test_features_of_other_spots_are_refused(sections: SpatialData, fit: Fit, finished: Path) -> None:
    write_sealed_array(finished / "frozen/2.npy", np.zeros((3, 4), dtype=np.float32), "The state")
    with pytest.raises(ValueError, match=r"frozen/2.npy holds float32 of shape \(3, 4\), not 512 features of 48 spots"):
        fit(sections, compute={"resume": finished})


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_finished_state_is_read_where_nothing_can_be_written(
    sections: SpatialData, fit: Fit, finished: Path, numbers: Numbers, plain: pk.Adapter,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int,
) -> None:  # fmt: skip
    # tests may run as root, for whom no folder is read-only
    opened = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if str(path).startswith(str(finished)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, flags, *args, **options)

    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("pekasc.models.runtime._sealed.write_whole", lambda path, *rest: pytest.fail(f"writes {path}"))
    found = fit(sections, compute={"resume": finished, "checkpoint_minutes": 0})
    assert numbers(found) == numbers(plain)
    assert "cannot be written: what is finished is read from it" in caplog.text
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before


def test_features_whose_weights_are_gone_cannot_be_made_again(sections: SpatialData, fit: Fit, finished: Path) -> None:
    for file in (finished / "fold-1").glob("epoch-*.npy"):
        file.unlink()
    with pytest.raises(ValueError, match=r"is damaged: fold-1/epoch-1.npy is missing. Delete the folder"):
        fit(sections, compute={"resume": finished})


def test_a_state_of_another_adapter_is_refused(sections: SpatialData, fit: Fit, unfinished: Path) -> None:
    file = unfinished / "fold-0" / "last.ckpt"
    state = torch.load(file, weights_only=True)
    state["state_dict"] = {f"{name}.x": value for name, value in state["state_dict"].items()}
    content = io.BytesIO()
    torch.save(state, content)
    replace_sealed(file, content.getvalue(), "The checkpoint")
    with pytest.raises(ValueError, match=r"is of another adapter: .* are not in both. Delete the folder"):
        fit(sections, compute={"resume": unfinished})


def test_epochs_after_the_state_are_run_and_measured_again(
    sections: SpatialData, fit: Fit, unfinished: Path, numbers: Numbers, plain: pk.Adapter
) -> None:
    # on a GPU the epoch that is run again is not the one before, to the last bit: its features must not stay
    newer = unfinished / "fold-0" / "epoch-2.npy"
    before = np.load(newer)
    np.save(newer, np.random.default_rng(0).normal(size=before.shape).astype(np.float32))
    again = fit(sections, compute={"resume": unfinished, "checkpoint_minutes": 0})
    np.testing.assert_array_equal(np.load(newer), before)
    assert numbers(again) == numbers(plain)


def test_dropout_rests_while_features_are_measured(
    sections: SpatialData, fit: Fit, numbers: Numbers, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    how: dict[str, Any] = {"method": LoraConfig(r=4, lora_dropout=0.5), "recipe": {"choose_epochs": False}}
    compute = {"resume": state, "checkpoint_minutes": 0}
    plain = fit(sections, **how)
    fit(sections, **how, compute=compute)
    # as after a kill between the features of an epoch and the next state: they are there, what comes after is not
    (state / "fold-0" / "done.json").unlink()
    assert numbers(fit(sections, **how, compute=compute)) == numbers(plain)


def test_blocks_auto_stay_what_they_were(
    sections: SpatialData, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"recipe": {"blocks": "auto", "epochs": 1}, "compute": {"resume": tmp_path / "state"}}
    assert fit(sections, **how).info["blocks"] == 2
    monkeypatch.setattr("pekasc.models.selection._student.choose_blocks", lambda *args: pytest.fail("chosen again"))
    assert fit(sections, **how).info["blocks"] == 2
