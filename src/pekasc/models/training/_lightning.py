"""Lightning trainer of a training, and checks of the user's arguments for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, GradientAccumulationScheduler, Timer
from lightning.pytorch.loggers import Logger

from pekasc._options import Recipe
from pekasc.models.runtime import processes, quiet_lightning

_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Engine:
    """Settings of a training that do not change its result, beyond rounding.

    Parameters
    ----------
    device, precision, progress
        As in ``tl.fit_adapter``.
    trainer
        Further arguments of :class:`lightning.Trainer`.
    accumulate
        Gradient accumulation: micro-batches per batch.
    gradient_checkpointing
        Recompute the blocks in the backward pass.
    compile
        Compile the trained blocks with ``torch.compile``.
    checkpoint_minutes
        Minutes between two checkpoints, if there is a folder for them.
    """

    device: torch.device
    precision: str
    progress: bool
    trainer: Mapping[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_minutes: float = 5.0


# arguments of a Trainer that pekasc sets itself, or that would change the result
_RESERVED = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run", "overfit_batches",
    "limit_train_batches", "accumulate_grad_batches", "reload_dataloaders_every_n_epochs", "enable_checkpointing",
    "use_distributed_sampler", "num_sanity_val_steps", "gradient_clip_val", "gradient_clip_algorithm",
)  # fmt: skip
_TRAINER_PRECISIONS = ("32-true", "32", 32, "bf16-mixed", "16-mixed")
_INSTEAD = {
    "max_epochs": "Recipe.epochs", "accumulate_grad_batches": "Compute.accumulate",
    "enable_checkpointing": "Compute.resume", "gradient_clip_val": "Recipe.gradient_clip",
}  # fmt: skip


def as_list(given: Any) -> list[Any]:
    """Return callbacks or loggers as a list; Lightning takes None, one or several."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def check_trainer(trainer: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check the user's arguments of the :class:`lightning.Trainer`, and return them.

    Raises
    ------
    TypeError
        If an argument is unknown to Lightning, or a callback or logger has a wrong type.
    ValueError
        If an argument would change the result.
    """
    if trainer is None:
        return {}
    known = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    if unknown := sorted(set(trainer) - known):
        raise TypeError(f"`trainer`: lightning.Trainer knows no {unknown}. It knows: {sorted(known - set(_RESERVED))}.")
    for name in _RESERVED:
        if name in trainer:
            instead = f"give `{_INSTEAD[name]}`" if name in _INSTEAD else "leave it out"
            raise ValueError(f"`trainer`: {name!r} is set by pekasc: {instead}.")
    for logger in [] if isinstance(trainer.get("logger"), bool) else as_list(trainer.get("logger")):
        if not isinstance(logger, Logger):
            raise TypeError(f"`trainer`: logger must be lightning's Logger, several, or False, got {logger!r}.")
    for callback in as_list(trainer.get("callbacks")):
        if not isinstance(callback, L.Callback):
            raise TypeError(f"`trainer`: callbacks must be lightning.Callback, got {type(callback).__name__}.")
        if isinstance(callback, EarlyStopping):
            raise ValueError(
                "`trainer`: EarlyStopping would change what is learned, and the last fit, on all training spots, has "
                "no held-out error to stop by: give `Recipe.patience`."
            )
        if isinstance(callback, GradientAccumulationScheduler | Timer):
            raise ValueError(
                f"`trainer`: {type(callback).__name__} would change what is learned: give `Compute.accumulate` "
                "or `Recipe.epochs`."
            )
    if trainer.get("precision", "32-true") not in _TRAINER_PRECISIONS:
        raise ValueError(
            f"`trainer`: precision={trainer['precision']!r} would change the encoder itself. Take one of "
            f'{list(_TRAINER_PRECISIONS)}, or `Compute(precision="bf16")`, which keeps frozen weights in '
            "half precision."
        )
    return dict(trainer)


def check_starts(engine: Engine, recipe: Recipe) -> None:
    """Raise ValueError if Lightning rejects the user's arguments, before any work."""
    try:
        with quiet_lightning():
            _trainer(engine, recipe, 1, [])
    except (MisconfigurationException, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"`trainer`: Lightning rejects {dict(engine.trainer)}: {error}") from error


def _trainer(engine: Engine, recipe: Recipe, epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    given = dict(engine.trainer)
    user_callbacks = as_list(given.pop("callbacks", None))
    if processes.n_ranks() == 1 and "devices" not in given and "accelerator" not in given:
        given |= {
            "accelerator": engine.device.type,
            "devices": 1 if engine.device.index is None else [engine.device.index],
        }
    how: dict[str, Any] = {
        "precision": _PRECISION[engine.precision], "logger": False, "enable_model_summary": False,
        "enable_progress_bar": engine.progress, "gradient_clip_val": recipe.gradient_clip, **given,
    }  # fmt: skip
    return L.Trainer(
        max_epochs=epochs, enable_checkpointing=any(isinstance(c, Checkpoint) for c in user_callbacks),
        accumulate_grad_batches=engine.accumulate, use_distributed_sampler=False, num_sanity_val_steps=0,
        # last, so that a checkpoint includes the effects of the user's callbacks
        callbacks=[*user_callbacks, *callbacks], **how,
    )  # fmt: skip


def release(trainer: L.Trainer, student: L.LightningModule) -> None:
    """Take apart a trainer that has ended, so that memory is free as soon as the fit's result is.

    Trainer, loops, connectors, callbacks and module refer to one another: tens of MB of a fit, its network and features
    among them, would wait for the oldest generation of Python's garbage collector.
    """
    strategy: Any = trainer.strategy  # may be the user's own, for the next training as well
    strategy.connect(None)
    strategy.optimizers, strategy.lr_scheduler_configs = [], []
    student.trainer = None
    vars(trainer).clear()
