"""Training on cached activations: the same numbers as running all blocks, whole states, honest ends."""

from __future__ import annotations

import errno
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from safetensors.torch import load_file

from pekasc._digests import sha256
from pekasc._options import Recipe
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import CachePlan, TileInputs, cache_activations, embed
from pekasc.models.runtime import _files, replace_sealed, tensor_parts
from pekasc.models.training._callbacks import LAST
from pekasc.models.training._lightning import Engine, check_trainer
from pekasc.models.training._methods import make_config, target_layers
from pekasc.models.training._plan import NotFinite
from pekasc.models.training._trainer import Trained, train_student
from pekasc.tiling import ArrayTiles

CPU = torch.device("cpu")
RECIPE = Recipe(rank=8, n_clusters=4, cluster_head_epochs=2, batch_size=8, epochs=2, learning_rate=1e-3)
ENGINE = Engine(CPU, "fp32", progress=False)
RNG = np.random.default_rng(0)
TILES = ArrayTiles(RNG.integers(0, 255, (22, 32, 32, 3), dtype=np.uint8))
TEACHER = RNG.normal(size=(22, 6)).astype(np.float32)
ALL = np.ones(22, dtype=bool)


def plan(start: int, **changes: Any) -> CachePlan:
    how: dict[str, Any] = {
        "n_views": 8, "kind": "fp32", "batch_size": 7, "device": CPU, "precision": "fp32", "max_memory": None,
        "progress": False, "store": None, "facts": "x",
    }  # fmt: skip
    return CachePlan(start=start, **{**how, **changes})


def train(encoder: EncoderNetwork, inputs: Any, depth: Any = (3,), blocks: int = 2, **changes: Any) -> Trained:
    method = changes.pop("method", "bone")
    recipe = changes.pop("recipe", RECIPE)
    config = make_config(method, recipe.rank, target_layers(encoder, depth, blocks))
    how: dict[str, Any] = {
        "recipe": recipe, "epochs": recipe.epochs, "engine": ENGINE, "random_state": 0, "local": ALL,
        "keep": {recipe.epochs},
    }  # fmt: skip
    return train_student(encoder, depth, config, inputs, np.arange(22), TEACHER, **{**how, **changes})


def numbers(trained: Trained) -> dict[str, np.ndarray]:
    (state,) = trained.weights.values()
    return {f"{kind}.{name}": t.numpy() for kind, part in state.items() for name, t in part.items()}


def assert_near(a: Trained, b: Trained, atol: float) -> None:
    for x, y in zip(a.history, b.history, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=atol)
    one, other = numbers(a), numbers(b)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=atol)


@pytest.fixture(scope="module")
def plain(encoder: EncoderNetwork) -> Trained:
    """Return a training that runs all blocks on whole batches."""
    return train(encoder, TileInputs(TILES))


@pytest.mark.parametrize("depth", [(3,), (2, 4), None])
def test_the_tail_learns_what_all_blocks_learn(encoder: EncoderNetwork, depth: Any) -> None:
    recipe = replace(RECIPE, epochs=1, learning_rate=Recipe.learning_rate)
    last = 4 if depth is None else max(depth)
    start = min(depth or (4,)) - 1 if depth == (2, 4) else last - 2
    whole = train(encoder, TileInputs(TILES), depth, last - start, recipe=recipe)
    tail = train(
        encoder, cache_activations(encoder, TILES, np.arange(22), plan(start)), depth, last - start, recipe=recipe
    )
    assert_near(tail, whole, 1e-4)
    assert any(np.abs(v).max() > 1e-4 for n, v in numbers(tail).items() if n.startswith("adapter."))
    # half precision rounds, and little more
    half = cache_activations(encoder, TILES, np.arange(22), plan(start, kind="fp16"))
    rounded = train(encoder, half, depth, last - start, recipe=recipe)
    assert rounded.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], abs=2e-2)


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 3}, {"accumulate": 8}, {"gradient_checkpointing": True}],
    ids=["parts", "more parts than tiles in the last batch", "checkpointing"],
)
def test_less_memory_gives_the_same_gradients(encoder: EncoderNetwork, plain: Trained, changes: dict[str, Any]) -> None:
    assert_near(train(encoder, TileInputs(TILES), engine=replace(ENGINE, **changes)), plain, 2e-5)
    assert not encoder.checkpointing


def test_checkpointing_runs_the_blocks_again(encoder: EncoderNetwork) -> None:
    calls: list[int] = []
    recipe = replace(RECIPE, epochs=1)
    hook = encoder.model.blocks[2].register_forward_pre_hook(lambda *args: calls.append(1))
    train(encoder, TileInputs(TILES), recipe=recipe)
    without = len(calls)
    train(encoder, TileInputs(TILES), recipe=recipe, engine=replace(ENGINE, gradient_checkpointing=True))
    hook.remove()
    assert len(calls) - without == without + 3  # three batches in an epoch


class _Killed(L.Callback):
    """End the process's work in the middle of an epoch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["bone", "adalora"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_was_killed_goes_on_to_the_same_bits(
    encoder: EncoderNetwork, tmp_path: Path, method: str, accumulate: int
) -> None:
    recipe = replace(RECIPE, step_epochs=1, n_views=8)
    inputs = cache_activations(encoder, TILES, np.arange(22), plan(1))
    engine = replace(ENGINE, accumulate=accumulate, checkpoint_minutes=0)
    how: dict[str, Any] = {"recipe": recipe, "method": method, "keep": {2}}
    whole = train(encoder, inputs, engine=engine, **how)
    # killed again and again: before there is a state, at the end of an epoch, in the next one, at the last step
    for at in (1, 3, 4, 6):
        killed = replace(engine, trainer={"callbacks": [_Killed(at)]})
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train(encoder, inputs, engine=killed, folder=tmp_path, **how)
        assert (tmp_path / LAST).exists() == (at > 1)
    again = train(encoder, inputs, engine=engine, folder=tmp_path, **how)
    drop = {"peak_memory"}
    rows, expected = ([{k: v for k, v in row.items() if k not in drop} for row in t.history] for t in (again, whole))
    np.testing.assert_equal(rows, expected)
    one, other = numbers(again), numbers(whole)
    assert all(one[name].tobytes() == other[name].tobytes() for name in other)


def test_a_checkpoint_holds_what_is_trained(encoder: EncoderNetwork, tmp_path: Path) -> None:
    train(encoder, TileInputs(TILES), engine=replace(ENGINE, checkpoint_minutes=0), folder=tmp_path)
    state = torch.load(tmp_path / LAST, weights_only=True)
    assert all("miss" in name or name.startswith("projector.") for name in state["state_dict"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.json"]  # nothing half written


class _Opens:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _resealed(folder: Path, state: Any) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    replace_sealed(folder / LAST, content.getvalue(), "The checkpoint")


def test_a_checkpoint_cannot_run_code(encoder: EncoderNetwork, tmp_path: Path) -> None:
    how: dict[str, Any] = {"engine": replace(ENGINE, checkpoint_minutes=0), "folder": tmp_path}
    train(encoder, TileInputs(TILES), **how)
    state = torch.load(tmp_path / LAST, weights_only=True)
    _resealed(tmp_path, {**state, "pekasc": _Opens(tmp_path / "opened")})
    with pytest.raises(
        ValueError, match=r"is damaged: .*last.ckpt' \(it holds other objects than .*Delete that file: this training"
    ):
        train(encoder, TileInputs(TILES), **how)
    assert not (tmp_path / "opened").exists()
    torch.load(tmp_path / LAST, weights_only=False)
    assert (tmp_path / "opened").exists()  # it is one that would have


@pytest.mark.parametrize(
    "change",
    [
        {"pekasc": {"processes": []}},
        {"pekasc": {"processes": torch.zeros(1)}},
        {"pekasc": {"processes": [torch.zeros(2, 2)]}},  # torch takes a name in [] for an index, with a warning
        {"pekasc": {"processes": [{"rng": torch.get_rng_state(), "sums": torch.zeros(())}]}},
        {"pekasc": {"processes": [{"rng": torch.zeros(3), "sums": torch.zeros(5)}]}},
        {"callbacks": {"History": 3}},
        {"loops": None},
        {"loops": {}},
        {"optimizer_states": [{"state": {}, "param_groups": []}]},
        {"optimizer_states": {"state": {0: torch.zeros(0)}}},
        {"optimizer_states": {"state": {0: {"step": torch.zeros(()), "exp_avg": torch.zeros(3)}}}},
        {"lr_schedulers": [{"last_epoch": None}]},
        {"state_dict": {}},
        None,
    ],
)
@pytest.mark.filterwarnings("error:Using a non-tuple sequence")
def test_a_checkpoint_of_another_shape_is_named(encoder: EncoderNetwork, tmp_path: Path, change: Any) -> None:
    how: dict[str, Any] = {"engine": replace(ENGINE, checkpoint_minutes=0), "folder": tmp_path}
    train(encoder, TileInputs(TILES), **how)
    state = torch.load(tmp_path / LAST, weights_only=True)
    if isinstance(change, dict) and isinstance(change.get("optimizer_states"), dict):
        change = {"optimizer_states": [{**state["optimizer_states"][0], **change["optimizer_states"]}]}
    _resealed(tmp_path, [1, 2] if change is None else {**state, **change})
    with pytest.raises(ValueError, match=r"is damaged: .*last.ckpt' .*Delete that file"):
        train(encoder, TileInputs(TILES), **how)
    # and the encoder is clean for the next training
    assert train(encoder, TileInputs(TILES)).history[0]["loss"] > 0


@pytest.mark.parametrize(
    "ipt", [{"a": torch.zeros(2)}, {"a": 1}, torch.zeros(2), None], ids=["other", "number", "tensor", "none"]
)
def test_importance_of_other_ranks_is_named(encoder: EncoderNetwork, tmp_path: Path, ipt: Any) -> None:
    how: dict[str, Any] = {"method": "adalora", "engine": replace(ENGINE, checkpoint_minutes=0), "folder": tmp_path}
    train(encoder, TileInputs(TILES), **how)
    state = torch.load(tmp_path / LAST, weights_only=True)
    state["pekasc"]["allocator"]["ipt"] = ipt
    _resealed(tmp_path, state)
    with pytest.raises(ValueError, match=r"is damaged: .*last.ckpt' .*Delete that file"):
        train(encoder, TileInputs(TILES), **how)


def test_a_full_disk_is_said(encoder: EncoderNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match=rf"The checkpoint of the fit cannot be written to '{tmp_path}.*: No room"):
        train(encoder, TileInputs(TILES), engine=replace(ENGINE, checkpoint_minutes=0), folder=tmp_path)
    assert not list(tmp_path.iterdir())

    class Poison(L.Callback):
        """Break the targets."""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            module.teacher[:] = float("nan")

    # the error of the training is not lost for the one of the disk
    engine = replace(ENGINE, trainer={"callbacks": [Poison()]}, checkpoint_minutes=9)
    with pytest.raises(NotFinite) as caught:
        train(encoder, TileInputs(TILES), engine=engine, folder=tmp_path)
    assert "last_good.safetensors': No room" in caught.value.__notes__[0]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(encoder: EncoderNetwork, tmp_path: Path) -> None:
    good: dict[str, torch.Tensor] = {}

    class Poison(L.Callback):
        """Break the weights before the fifth step."""

        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                good.update({n: p.detach().clone() for n, p in module.trained().items()})
                module.teacher[:] = float("nan")

    match = r"The loss became nan .* at step 5, epoch 2, batch 2 .*smaller `Recipe\.learning_rate`"
    with pytest.raises(NotFinite, match=match) as caught:
        train(encoder, TileInputs(TILES), engine=replace(ENGINE, trainer={"callbacks": [Poison()]}), folder=tmp_path)
    with safe_open(tmp_path / "last_good.safetensors", "pt") as file:
        assert file.metadata() == {"sha256": sha256(*tensor_parts(caught.value.last_good))}
    for kept in (caught.value.last_good, load_file(tmp_path / "last_good.safetensors")):
        assert kept.keys() == good.keys()
        assert all(torch.equal(kept[name], good[name]) for name in kept)
    assert "last_good.safetensors has it" in caught.value.__notes__[0]
    with pytest.raises(NotFinite) as caught:
        train(encoder, TileInputs(TILES), engine=replace(ENGINE, trainer={"callbacks": [Poison()]}))
    assert "give `Compute.resume` a folder" in caught.value.__notes__[0]
    # and the encoder is clean for the next training
    assert train(encoder, TileInputs(TILES)).history[0]["loss"] > 0


def test_callbacks_and_loggers_pass_through(encoder: EncoderNetwork, tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(L.Callback):
        """Count."""

        def on_train_epoch_end(self, trainer: Any, *args: Any) -> None:
            seen.append(trainer.current_epoch)

    given = check_trainer({"callbacks": Watch(), "logger": CSVLogger(tmp_path), "log_every_n_steps": 1})
    train(encoder, TileInputs(TILES), engine=replace(ENGINE, trainer=given))
    assert seen == [0, 1]
    logged = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert {"loss", "kd", "sa"} <= set(logged[0].split(","))


class _Ends(L.Callback):
    """Ends a training after its first epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


def test_a_callback_must_not_end_the_training(encoder: EncoderNetwork) -> None:
    engine = replace(ENGINE, trainer={"callbacks": _Ends()})
    message = r"stopped the training after epoch 1 of 2.*Give `Recipe\.epochs` or `Recipe\.patience` instead"
    with pytest.raises(RuntimeError, match=message):
        train(encoder, TileInputs(TILES), engine=engine)


def test_half_precision_keeps_no_second_copy(encoder: EncoderNetwork, plain: Trained) -> None:
    made = EncoderNetwork(encoder.encoder, 32)
    exact = embed(made, TILES, [(4,)], batch_size=22, device=CPU, precision="bf16")[4,]
    made.halve(torch.bfloat16)
    linear = [m for m in made.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert all(p.dtype == torch.bfloat16 for m in linear for p in m.parameters())
    # what autocast makes of the weights in full is the same half
    np.testing.assert_array_equal(embed(made, TILES, [(4,)], batch_size=22, device=CPU, precision="bf16")[4,], exact)
    bf16 = replace(ENGINE, precision="bf16")
    trained = train(made, TileInputs(TILES), engine=bf16)
    assert all(v.dtype == np.float32 for v in numbers(trained).values())
    assert all(p.dtype == torch.bfloat16 for m in linear for p in m.parameters())
    assert trained.history[1]["loss"] == pytest.approx(plain.history[1]["loss"], rel=0.05)
