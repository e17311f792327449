"""Train a student with Lightning, from tiles or cached activations to the weights of adapter and projector."""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import numpy as np
import torch
from peft import PeftConfig
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from pekasc._digests import sha256
from pekasc._options import Recipe
from pekasc.models.encoders import Depth, EncoderNetwork
from pekasc.models.features import Inputs, features_of
from pekasc.models.runtime import autocast, check_sealed, processes, quiet_lightning, tensor_parts, write_whole
from pekasc.models.training._batches import _Batches
from pekasc.models.training._callbacks import LAST, Allocation, Checkpoints, History, KeepWeights
from pekasc.models.training._lightning import Engine, _trainer, release
from pekasc.models.training._methods import attached, method_name, with_steps
from pekasc.models.training._plan import NotFinite, Student
from pekasc.models.training._targets import prepare_targets

GOOD = "last_good.safetensors"
_PARTS = {"state_dict": dict, "loops": dict, "callbacks": dict, "optimizer_states": list, "pekasc": dict}
_CHECKED = 4  # tiles on which an adapter is compared with the frozen encoder


@contextmanager
def _plain_attention(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On the CPU, compute attention as two matrix products within the block.

    The backward pass of torch's fused kernel takes about twice as long there for the 65 tokens of a 112 px tile.
    """
    modules: list[Any] = [m for m in model.modules() if device.type == "cpu" and getattr(m, "fused_attn", False)]
    for module in modules:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in modules:
            module.fused_attn = True


@dataclass(frozen=True)
class Trained:
    """Result of a training, on the CPU.

    Parameters
    ----------
    weights
        Tensors by kept epoch: ``"adapter"`` under PEFT's names, ``"projector"``, ``"cluster_head"``.
    configs
        Configuration by kept epoch, in which AdaLoRA records the remaining ranks.
    history
        One dict per epoch: epoch, loss, kd, sa, matching, peak_memory, val_error.
    """

    weights: dict[int, dict[str, dict[str, Tensor]]]
    configs: dict[int, PeftConfig]
    history: list[dict[str, float]]


def train_student(
    encoder: EncoderNetwork,
    depth: Depth,
    config: PeftConfig,
    inputs: Inputs,
    index: np.ndarray,
    teacher: np.ndarray,
    *,
    recipe: Recipe,
    epochs: int,
    engine: Engine,
    random_state: int,
    local: np.ndarray,
    keep: Collection[int] = (),
    on_epoch: Callable[[int], float] | None = None,
    stop: Callable[[int], bool] = lambda epoch: False,
    known: Callable[[int], Any] = lambda epoch: None,
    folder: Path | None = None,
) -> Trained:
    """Train an adapter on the tiles `index`, and leave the encoder without it.

    Parameters
    ----------
    encoder
        The frozen encoder.
    depth
        Block(s) after which features are taken.
    config
        PEFT configuration with the full names of the layers.
    inputs, index
        Tiles or cached activations, and indices of the training tiles.
    teacher
        Teacher embedding of the training tiles, (len(index), D).
    recipe, epochs
        Hyperparameters, and the maximum number of epochs.
    engine
        Settings that do not change the result.
    random_state
        Seed.
    local
        Boolean mask of the tiles of this process.
    keep
        Epochs after which weights are kept; 0 is before the first.
    on_epoch
        Called after every epoch, with the adapter attached; returns the held-out error.
    stop
        Called after every epoch; true stops the training.
    known
        Called for every finished epoch of a checkpoint before the training continues.
    folder
        Folder of the checkpoint, which is resumed from if there is one.

    Raises
    ------
    NotFinite
        If the loss or a gradient becomes NaN or infinite, before the weights are updated.
    ValueError
        If a process has no tile, the untrained adapter changes features, or the checkpoint in `folder` is damaged.
    RuntimeError
        If a callback of the user stops the training.
    """
    _check_shares(local[index])
    encoder.to(engine.device)
    targets = processes.broadcast(prepare_targets(teacher, recipe, random_state))
    config = with_steps(config, -(-len(index) // recipe.batch_size) * max(recipe.epochs, 1))
    zeros = np.zeros(_CHECKED, dtype=np.int64)
    checked_rows = index[local[index]][:_CHECKED]
    checked = torch.from_numpy(inputs.read(checked_rows, zeros[: len(checked_rows)]))

    def features() -> Tensor:
        return _features(encoder, checked, depth, inputs.start, engine.precision)

    frozen = features()
    # seeds dropout, and leaves the caller's random state alone
    with torch.random.fork_rng(devices=[]), attached(encoder, config, random_state) as peft_model:
        _check_same(
            features(), frozen,
            f"The untrained adapter {method_name(config)!r} changes the features of the encoder, but zero epochs have "
            "to be the frozen encoder. Take an initialisation that adds nothing (`init_lora_weights=True`; an even "
            "rank for HRA).",
        )  # fmt: skip
        torch.manual_seed(random_state + processes.rank())
        student = Student(encoder, depth, targets, recipe, random_state, inputs.start, engine.precision)
        student.peft_model, student.parts = peft_model, engine.accumulate
        student.allocate = getattr(peft_model.base_model, "update_and_allocate", None)
        kept = KeepWeights(student, keep)

        def after(epoch: int) -> float:
            kept.keep(epoch)
            return float("nan") if on_epoch is None else on_epoch(epoch)

        kept.keep(0)
        history = History(after, stop, known)
        if epochs:
            batches = _Batches(inputs, index, local, recipe, engine.accumulate, random_state, engine.device)
            _run(student, batches, encoder, epochs, recipe, engine, [Allocation(), history, kept], folder)
            if len(history.rows) < epochs and not history.stopped:
                raise RuntimeError(
                    f"A callback in `trainer` stopped the training after epoch {len(history.rows)} of {epochs}, but "
                    "epochs are chosen by the held-out error. Give `Recipe.epochs` or `Recipe.patience` instead."
                )
    encoder.to(engine.device)  # Lightning leaves a model on the CPU
    _check_same(
        features(), frozen,
        f"The adapter {method_name(config)!r} left the encoder changed: its initialisation rewrites frozen weights. "
        "Take one that does not (`init_lora_weights=True`).",
    )  # fmt: skip
    return Trained(kept.weights, kept.configs, history.rows)


def _run(
    student: Student,
    batches: _Batches,
    encoder: EncoderNetwork,
    epochs: int,
    recipe: Recipe,
    engine: Engine,
    callbacks: list[L.Callback],
    folder: Path | None,
) -> None:
    """Train, resuming from the checkpoint in `folder` if there is one."""
    state = None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / LAST if (folder / LAST).exists() else None
        if state is not None:
            _check_state(state)
        callbacks = [*callbacks, Checkpoints(folder, engine.checkpoint_minutes)]
    encoder.checkpointing = engine.gradient_checkpointing
    compiled = _compiled(encoder, student.start, student.depth) if engine.compile else []
    try:
        with quiet_lightning(), _plain_attention(encoder.model, engine.device), _interruptible():
            trainer = _trainer(engine, recipe, epochs, callbacks)
            try:
                trainer.fit(student, batches, ckpt_path=None if state is None else str(state), weights_only=True)
            finally:
                release(trainer, student)
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        if state is None or student.started:
            raise
        raise _damaged(state, error) from error
    except NotFinite as error:
        error.last_good = {name: p.detach().cpu().clone() for name, p in student.trained().items()}
        where = "give `Compute.resume` a folder to have it on disk"
        if folder is not None:
            where = f"{folder / GOOD} has it"
            try:
                if processes.rank() == 0:
                    _write_good(folder / GOOD, error.last_good)
            except OSError as full:  # the error of the training matters more
                where = str(full)
        error.add_note(f"The weights before that step are kept in this error's attribute `last_good`; {where}.")
        if folder is not None:
            error.add_note("`Compute.resume` continues only with the same options: with others, give another folder.")
        raise
    finally:
        encoder.checkpointing = False
        for block in compiled:
            block._compiled_call_impl = None


def _write_good(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their SHA-256 in the metadata."""
    content = to_bytes(dict(tensors), metadata={"sha256": sha256(*tensor_parts(tensors))})
    write_whole(file, lambda out: out.write(content), "The last good weights")


def _check_state(file: Path) -> None:
    """Raise ValueError if a checkpoint is not the one that was written, or cannot be read without running code."""
    try:
        check_sealed(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or not all(isinstance(found.get(name), kind) for name, kind in _PARTS.items()):
            raise ValueError("it lacks parts of a checkpoint")
        if "fit_loop" not in found["loops"]:
            raise ValueError("it does not say how far the training was")
    except UnpicklingError as error:
        raise _damaged(file, "it holds other objects than tensors and plain values, which are not loaded") from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception | str) -> ValueError:
    return ValueError(
        f"The checkpoint of a training in `Compute.resume` is damaged: {str(file)!r} ({str(error)[:300]}). Delete "
        "that file: this training starts again, finished ones are kept."
    )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make the stop button of a notebook raise KeyboardInterrupt, as often as it is pressed.

    Lightning would exit instead, and ignore every further interrupt.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def _compiled(encoder: EncoderNetwork, start: int, depth: Depth) -> list[Any]:
    encoder.check_splits()
    last = encoder.n_blocks if depth is None else max(depth)
    blocks = list(encoder.model.blocks[start:last])
    for block in blocks:
        block.compile(dynamic=False)
    return blocks


def _features(encoder: EncoderNetwork, inputs: Tensor, depth: Depth, start: int, precision: str) -> Tensor:
    """Return the features of a few tiles, from their pixels or cached activations."""
    device = encoder.mean.device
    x = inputs.to(device)
    with torch.inference_mode(), autocast(device, precision):
        x = encoder.normalise(x) if start == 0 else x.float()
        return features_of(encoder, x, [depth], start)[0].float().cpu().clone()


def _check_same(a: Tensor, b: Tensor, problem: str) -> None:
    # far above rounding, far below the effect of a random adapter
    if not bool((a - b).abs().max() <= 1e-2 * max(float(b.std()), 1e-6)):
        raise ValueError(problem)


def _check_shares(local: np.ndarray) -> None:
    """Raise ValueError if a process has no training tile; `local` is the mask of those of this process."""
    if without := [number for number, n in enumerate(processes.all_gather(int(local.sum()))) if not n]:
        raise ValueError(
            f"Process {without[0]} of {processes.n_ranks()} has no tile to train on: there are {len(local)}. "
            "Take fewer devices."
        )
