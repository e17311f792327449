"""Training on what the frozen blocks left: the same numbers as running all of them, whole states, honest ends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from pekasc._options import Recipe
from pekasc.models import Encoder
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.features._cached_blocks import PrefixPlan, TileInputs, make_prefix
from pekasc.models.features._embed import embed
from pekasc.models.training._callbacks import LAST
from pekasc.models.training._lightning import Engine, check_trainer
from pekasc.models.training._methods import make_config, target_layers
from pekasc.models.training._plan import NotFinite
from pekasc.models.training._trainer import Trained, train_student
from pekasc.tiling import ArrayTiles

CPU = torch.device("cpu")
RECIPE = Recipe(rank=8, n_clusters=4, head_epochs=2, batch_size=8, epochs=2, learning_rate=1e-3)
ENGINE = Engine(CPU, "fp32", progress=False)
RNG = np.random.default_rng(0)
TILES = ArrayTiles(RNG.integers(0, 255, (22, 32, 32, 3), dtype=np.uint8))
TEACHER = RNG.normal(size=(22, 6)).astype(np.float32)
ALL = np.ones(22, dtype=bool)


@pytest.fixture(scope="module")
def encoder() -> EncoderNetwork:
    kwargs = {"depth": 4, "reg_tokens": 2, "init_values": 0.5}
    return EncoderNetwork(Encoder("vit_tiny_patch16_224", weights="random", model_kwargs=kwargs), 32)


def plan(start: int, **changes: Any) -> PrefixPlan:
    how: dict[str, Any] = {
        "n_views": 8, "kind": "fp32", "batch_size": 7, "device": CPU, "precision": "fp32", "max_memory": None,
        "progress": False, "store": None, "facts": "x",
    }  # fmt: skip
    return PrefixPlan(start=start, **{**how, **changes})


def train(encoder: EncoderNetwork, inputs: Any, depth: Any = (3,), blocks: int = 2, **changes: Any) -> Trained:
    method = changes.pop("method", "bone")
    recipe = changes.pop("recipe", RECIPE)
    config = make_config(method, recipe.rank, target_layers(encoder, depth, blocks))
    how: dict[str, Any] = {
        "recipe": recipe, "epochs": recipe.epochs, "engine": ENGINE, "random_state": 0, "mine": ALL,
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


@pytest.mark.parametrize("depth", [(3,), (2, 4), None])
def test_the_tail_learns_what_all_blocks_learn(encoder: EncoderNetwork, depth: Any) -> None:
    recipe = replace(RECIPE, epochs=1, learning_rate=Recipe.learning_rate)
    last = 4 if depth is None else max(depth)
    start = min(depth or (4,)) - 1 if depth == (2, 4) else last - 2
    whole = train(encoder, TileInputs(TILES), depth, last - start, recipe=recipe)
    tail = train(encoder, make_prefix(encoder, TILES, np.arange(22), plan(start)), depth, last - start, recipe=recipe)
    assert_near(tail, whole, 1e-4)
    assert any(np.abs(v).max() > 1e-4 for n, v in numbers(tail).items() if n.startswith("adapter."))
    # half precision rounds, and little more
    half = make_prefix(encoder, TILES, np.arange(22), plan(start, kind="fp16"))
    rounded = train(encoder, half, depth, last - start, recipe=recipe)
    assert rounded.history[0]["loss"] == pytest.approx(whole.history[0]["loss"], abs=2e-2)


@pytest.mark.parametrize("n_views", [1, 2, 8])
def test_views_are_the_orientations_of_a_tile(encoder: EncoderNetwork, n_views: int) -> None:
    made = make_prefix(encoder, TILES, np.arange(22), plan(2, n_views=n_views))
    features = embed(encoder, TILES, [(4,)], orientations=n_views, batch_size=5, device=CPU)
    again = embed(encoder, TILES, [(4,)], orientations=n_views, batch_size=5, device=CPU, prefixes=[made])
    np.testing.assert_allclose(again[4,], features[4,], atol=1e-4)
    assert len(made.parts) == n_views


def test_a_prefix_on_disk_is_the_one_in_memory(
    encoder: EncoderNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("pekasc.models.features._cached_blocks._CHUNK_BYTES", 3 * 7 * 192 * 4)  # three tiles
    kept = make_prefix(encoder, TILES, np.arange(22), plan(2))
    assert "0.00538 MB a tile and view (fp32), 22 tiles in 8 views: 0.000946 GB, in memory" in caplog.text
    stored = make_prefix(encoder, TILES, np.arange(22), plan(2, max_memory=1, store=tmp_path / "p.zarr"))
    assert "on disk" in caplog.text
    index, views = RNG.integers(0, 22, 40), RNG.choice([0, 3, 7], 40)
    np.testing.assert_array_equal(stored.read(index, views), kept.read(index, views))
    learned, expected = numbers(train(encoder, stored)), numbers(train(encoder, kept))
    assert all(learned[name].tobytes() == expected[name].tobytes() for name in expected)
    # a second call computes nothing; one of other tiles or another block does
    counted: list[int] = []
    tokens = encoder.tokens

    def count(x: torch.Tensor, n: int) -> torch.Tensor:
        counted.append(len(x))
        return tokens(x, n)

    monkeypatch.setattr(encoder, "tokens", count)
    make_prefix(encoder, TILES, np.arange(22), plan(2, max_memory=1, store=tmp_path / "p.zarr"))
    assert sum(counted) == 1  # the shape
    other = ArrayTiles(TILES.array ^ 1)
    make_prefix(encoder, other, np.arange(22), plan(2, max_memory=1, store=tmp_path / "p.zarr"))
    assert sum(counted) == 2 + 22 * 8
    # a damaged chunk is computed again
    file = next((tmp_path / "p.zarr").glob("*/c/0/0"))
    file.write_bytes(b"no")
    again = make_prefix(encoder, TILES, np.arange(22), plan(2, max_memory=1, store=tmp_path / "p.zarr"))
    np.testing.assert_array_equal(again.read(index, views), kept.read(index, views))


def test_a_temporary_prefix_goes_away(encoder: EncoderNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = make_prefix(encoder, TILES, np.arange(22), plan(1, max_memory=1, n_views=1))
    assert list(tmp_path.iterdir())
    assert made.read(np.arange(2), np.zeros(2, int)).shape == (2, 7, 192)
    del made
    assert not list(tmp_path.iterdir())


def test_no_room_for_the_prefix_is_said_before_any_work(
    encoder: EncoderNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("pekasc.models.features._cached_blocks.shutil.disk_usage", lambda folder: usage)
    monkeypatch.setattr("pekasc.models.features._cached_blocks._BlockRunner.over", lambda *args: pytest.fail("worked"))
    with pytest.raises(OSError, match=r"The frozen prefix takes 0.000946 GB more, and .* has 1e-06 GB left.*`store=`"):
        make_prefix(encoder, TILES, np.arange(22), plan(2, max_memory=1, store=tmp_path / "p"))
    # two processes that share the disk
    with pytest.raises(OSError, match=r"The frozen prefix takes 0.00189 GB more"):
        make_prefix(encoder, TILES, np.arange(22), plan(2, max_memory=1, store=tmp_path / "p", n_here=2))


def test_tokens_beyond_half_precision_are_refused(encoder: EncoderNetwork) -> None:
    norm = encoder.model.blocks[0].ls2
    before = norm.gamma.detach().clone()
    with torch.no_grad():
        norm.gamma.fill_(1e7)
    try:
        with pytest.raises(FloatingPointError, match=r'after block 1 leave the range of fp16: take `prefix="fp32"`'):
            make_prefix(encoder, TILES, np.arange(22), plan(1, kind="fp16"))
    finally:
        with torch.no_grad():
            norm.gamma.copy_(before)


@pytest.mark.parametrize(
    "changes",
    [{"accumulate": 3}, {"accumulate": 8}, {"gradient_checkpointing": True}],
    ids=["parts", "more parts than tiles in the last batch", "checkpointing"],
)
def test_less_memory_gives_the_same_gradients(encoder: EncoderNetwork, changes: dict[str, Any]) -> None:
    plain = train(encoder, TileInputs(TILES))
    assert_near(train(encoder, TileInputs(TILES), engine=replace(ENGINE, **changes)), plain, 2e-5)
    assert not encoder.checkpointing


def test_checkpointing_runs_the_blocks_again(encoder: EncoderNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hook = encoder.model.blocks[2].register_forward_pre_hook(lambda *args: calls.append(1))
    train(encoder, TileInputs(TILES))
    plain = len(calls)
    train(encoder, TileInputs(TILES), engine=replace(ENGINE, gradient_checkpointing=True))
    hook.remove()
    assert len(calls) - plain == plain + 6  # three batches in two epochs


class _Killed(L.Callback):
    """End the process's work in the middle of an epoch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [1, 3, 4, 6], ids=["early", "end of an epoch", "next epoch", "last"])
@pytest.mark.parametrize("method", ["bone", "adalora"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_was_killed_goes_on_to_the_same_bits(
    encoder: EncoderNetwork, tmp_path: Path, at: int, method: str, accumulate: int
) -> None:
    recipe = replace(RECIPE, step_epochs=1, n_views=8)
    inputs = make_prefix(encoder, TILES, np.arange(22), plan(1))
    engine = replace(ENGINE, accumulate=accumulate, checkpoint_minutes=0)
    how: dict[str, Any] = {"recipe": recipe, "method": method, "keep": {2}}
    whole = train(encoder, inputs, engine=engine, **how)
    killed = replace(engine, trainer={"callbacks": [_Killed(at)]})
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(encoder, inputs, engine=killed, folder=tmp_path, **how)
    if at > 1:
        assert (tmp_path / LAST).exists()
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
    assert not list(tmp_path.glob("*.partial"))


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(encoder: EncoderNetwork, tmp_path: Path) -> None:
    good: dict[str, torch.Tensor] = {}

    class Poison(L.Callback):
        """Break the weights before the fifth step."""

        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            if trainer.global_step == 4:
                good.update({n: p.detach().clone() for n, p in module.trained().items()})
                module.teacher[:] = float("nan")

    match = r"The loss became nan .* at step 5, epoch 2, batch 2 .*smaller `learning_rate=`"
    with pytest.raises(NotFinite, match=match) as caught:
        train(encoder, TileInputs(TILES), engine=replace(ENGINE, trainer={"callbacks": [Poison()]}), folder=tmp_path)
    from safetensors.torch import load_file

    for kept in (caught.value.last_good, load_file(tmp_path / "last_good.safetensors")):
        assert kept.keys() == good.keys()
        assert all(torch.equal(kept[name], good[name]) for name in kept)
    assert "last_good.safetensors has it" in caught.value.__notes__[0]
    with pytest.raises(NotFinite) as caught:
        train(encoder, TileInputs(TILES), engine=replace(ENGINE, trainer={"callbacks": [Poison()]}))
    assert "give `resume=` a folder" in caught.value.__notes__[0]
    # and the encoder is clean for the next training
    assert train(encoder, TileInputs(TILES)).history[0]["loss"] > 0


def test_callbacks_and_loggers_pass_through(encoder: EncoderNetwork, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

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


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, r"`trainer` must map arguments.*got int"),
        ({"device": 2}, TypeError, r"lightning.Trainer knows no \['device'\].*'devices'"),
        ({"max_epochs": 2}, ValueError, r"'max_epochs' is pekasc's to say: give `epochs=`"),
        ({"accumulate_grad_batches": 2}, ValueError, r"give `accumulate=`"),
        ({"limit_train_batches": 2}, ValueError, r"leave it out"),
        ({"precision": "bf16-true"}, ValueError, r"precision='bf16-true' would change the encoder itself"),
    ],
)
def test_arguments_of_a_trainer_that_do_not_fit(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_trainer(given)


def test_half_precision_keeps_no_second_copy(encoder: EncoderNetwork) -> None:
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
    assert trained.history[1]["loss"] == pytest.approx(train(encoder, TileInputs(TILES)).history[1]["loss"], rel=0.05)
