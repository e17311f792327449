"""Train a student with Lightning: tiles (or what the frozen blocks made of them) in, adapter and projector out."""

from __future__ import annotations

import inspect
import logging
import signal
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, GradientAccumulationScheduler, Timer
from lightning.pytorch.loggers import Logger
from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from pekasc._options import Recipe
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.features._cached_blocks import Inputs
from pekasc.models.features._embed import VIEWS, autocast, features_of
from pekasc.models.runtime import _processes as processes
from pekasc.models.selection._choice import Depth
from pekasc.models.training._callbacks import LAST, Allocation, Checkpoints, History, Kept
from pekasc.models.training._methods import attached, method_name, with_steps
from pekasc.models.training._plan import Batch, NotFinite, Student, prepare_targets
from pekasc.tiling import read_ahead

_CHECKED = 4  # tiles on which an adapter is compared with the frozen encoder
_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Engine:
    """How to run a training; nothing here changes what is learned, but for rounding.

    Parameters
    ----------
    device, precision, progress
        As in ``tl.fit_adapter``.
    trainer
        Further arguments of :class:`lightning.Trainer`.
    accumulate
        Parts that a batch is run in, one after the other.
    gradient_checkpointing
        Recompute the blocks in the backward pass.
    compile
        ``torch.compile`` the trained blocks.
    checkpoint_minutes
        Between two states on disk, where there is a folder for them.
    """

    device: torch.device
    precision: str
    progress: bool
    trainer: Mapping[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    checkpoint_minutes: float = 5.0


class _Batches:
    """Batches in a new order every epoch, the same in every process; each yields its own rows of them.

    The order, and the view of every row, are drawn for a whole epoch from one generator, so that a training that goes
    on from the middle of one draws the same.
    """

    def __init__(
        self, inputs: Inputs, index: np.ndarray, local: np.ndarray, recipe: Recipe, parts: int, random_state: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.inputs, self.index, self.recipe, self.parts, self.device = inputs, index, recipe, parts, device
        self.local = local[index]  # by row of the lesson
        self.generator = torch.Generator().manual_seed(random_state)
        self.epoch, self.batch, self._drawn = 0, 0, 0

    def __len__(self) -> int:
        return -(-len(self.index) // self.recipe.batch_size) * self.parts

    def _draw(self) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.index)
        while True:
            order = torch.randperm(n, generator=self.generator).numpy()
            views = torch.randint(self.recipe.n_views, (n,), generator=self.generator).numpy()
            self._drawn += 1
            if self._drawn > self.epoch:  # epochs before were drawn by the run that this one goes on from
                return order, np.asarray(VIEWS)[views]

    def _plan(self) -> list[tuple[np.ndarray, np.ndarray, int, int]]:
        order, views = self._draw()
        plan = []
        for start in range(0, len(order), self.recipe.batch_size):
            whole = order[start : start + self.recipe.batch_size]
            for part in np.array_split(whole, self.parts):
                rows = part[self.local[part]]
                # a part without rows of this process runs on one that does not count: all go through every step
                rows, n = (rows, len(rows)) if len(rows) else (np.flatnonzero(self.local)[:1], 0)
                plan.append((rows, views[rows], n, len(whole)))
        return plan

    def _read(self, part: tuple[np.ndarray, np.ndarray, int, int]) -> np.ndarray:
        rows, views, _, _ = part
        return self.inputs.read(self.index[rows], views)

    def __iter__(self) -> Iterator[Batch]:
        if self.batch == len(self):  # who knows the length does not ask for more than that
            self.epoch, self.batch = self.epoch + 1, 0
        plan = self._plan()[self.batch :]
        for (rows, _, n, n_all), found in read_ahead(self._read, plan):
            x = torch.from_numpy(found)
            if self.device.type == "cuda":
                x = x.pin_memory()  # from there a GPU copies while it computes
            self.batch += 1
            yield x, torch.from_numpy(rows), n, n_all

    def state_dict(self) -> dict[str, Any]:
        """Return where this is, for Lightning's checkpoint."""
        done = self.batch == len(self)
        return {"epoch": self.epoch + done, "batch": 0 if done else self.batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hints on loaders and devices out of the user's log; restore the levels afterwards."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            # on purpose: see EncoderNetwork.train
            warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")
            # the frozen encoder stays in evaluation mode on purpose
            warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _plain_attention(model: nn.Module, device: torch.device) -> Iterator[None]:
    """On the CPU, train with attention as two matrix products.

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
    """What training left, on the CPU.

    Parameters
    ----------
    weights
        After each epoch that was to be kept: ``"adapter"`` in PEFT's own names, ``"projector"``, ``"cluster_head"``.
    configs
        The configuration that fits those weights: AdaLoRA notes in it which ranks are left.
    history
        One dict per epoch: epoch, loss, kd, sa, matching, peak_memory, val_error.
    """

    weights: dict[int, dict[str, dict[str, Tensor]]]
    configs: dict[int, PeftConfig]
    history: list[dict[str, float]]


# arguments of a Trainer that would change what is learned, or that this file needs
_OURS = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "fast_dev_run", "overfit_batches",
    "limit_train_batches", "accumulate_grad_batches", "reload_dataloaders_every_n_epochs", "enable_checkpointing",
    "use_distributed_sampler", "num_sanity_val_steps",
)  # fmt: skip
_TRAINER_PRECISIONS = ("32-true", "32", 32, "bf16-mixed", "16-mixed")
_INSTEAD = {
    "max_epochs": "epochs=", "accumulate_grad_batches": "accumulate=", "enable_checkpointing": "resume=",
}  # fmt: skip


def as_list(given: Any) -> list[Any]:
    """Return one callback or logger, several or none, as Lightning takes them, in a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def check_trainer(trainer: Any) -> dict[str, Any]:
    """Return arguments of a :class:`lightning.Trainer`, if they may be given.

    Raises
    ------
    TypeError
        If they are no mapping, Lightning knows no such argument, or a callback or logger is none.
    ValueError
        If one would change what is learned.
    """
    if trainer is None:
        return {}
    if not isinstance(trainer, Mapping):
        raise TypeError(
            '`trainer` must map arguments of lightning.Trainer to values, such as {"devices": 2, "strategy": "ddp"}, '
            f"got {type(trainer).__name__}."
        )
    known = set(inspect.signature(L.Trainer.__init__).parameters) - {"self"}
    if unknown := sorted(set(trainer) - known):
        raise TypeError(f"`trainer`: lightning.Trainer knows no {unknown}. It knows: {sorted(known - set(_OURS))}.")
    for name in _OURS:
        if name in trainer:
            instead = f"give `{_INSTEAD[name]}`" if name in _INSTEAD else "leave it out"
            raise ValueError(f"`trainer`: {name!r} is pekasc's to say: {instead}.")
    for logger in [] if isinstance(trainer.get("logger"), bool) else as_list(trainer.get("logger")):
        if not isinstance(logger, Logger):
            raise TypeError(f"`trainer`: logger must be lightning's Logger, several, or False, got {logger!r}.")
    for callback in as_list(trainer.get("callbacks")):
        if not isinstance(callback, L.Callback):
            raise TypeError(f"`trainer`: callbacks must be lightning.Callback, got {type(callback).__name__}.")
        if isinstance(callback, EarlyStopping):
            raise ValueError(
                "`trainer`: EarlyStopping would change what is learned, and the last fit, on all training spots, has "
                "no held-out error to stop by: give `patience=`."
            )
        if isinstance(callback, GradientAccumulationScheduler | Timer):
            raise ValueError(
                f"`trainer`: {type(callback).__name__} would change what is learned: give `accumulate=` or `epochs=`."
            )
    if trainer.get("precision", "32-true") not in _TRAINER_PRECISIONS:
        raise ValueError(
            f"`trainer`: precision={trainer['precision']!r} would change the encoder itself. Take one of "
            f'{list(_TRAINER_PRECISIONS)}, or `precision="bf16"`, which keeps frozen weights in half precision.'
        )
    return dict(trainer)


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
    """Train an adapter on the tiles `index`; the encoder is given back without it.

    Parameters
    ----------
    encoder
        The frozen encoder.
    depth
        Block(s) whose features are trained.
    config
        The adapter, layers named.
    inputs, index
        What enters the encoder, and which tiles to train on.
    teacher
        Teacher embedding of those tiles, (len(index), D).
    recipe, epochs
        Numbers of the training; `epochs` of it run at most.
    engine
        Where and how.
    random_state
        Seed.
    mine
        Which of all tiles this process has, boolean.
    keep
        Epochs after which the weights are kept; 0 is before the first.
    on_epoch
        Called after every epoch, while the adapter is in the encoder; returns the held-out error.
    stop
        Asked after every epoch.
    known
        Called before the training goes on, for every epoch that `folder`'s state has behind it.
    folder
        Where the state is written every few minutes, and read from if it is there.

    Raises
    ------
    NotFinite
        If the loss or a gradient is not finite, before the weights take it in.
    ValueError
        If a process has no tile, the adapter does not begin as the frozen encoder, or the state in `folder` is damaged.
    RuntimeError
        If a callback of the user ends the training.
    """
    if without := [number for number, n in enumerate(processes.all_gather(int(local[index].sum()))) if not n]:
        raise ValueError(
            f"Process {without[0]} of {processes.n_ranks()} has no tile to train on: there are {len(index)}. Take fewer "
            "devices."
        )
    encoder.to(engine.device)
    targets = processes.broadcast(prepare_targets(teacher, recipe, random_state))
    config = with_steps(config, -(-len(index) // recipe.batch_size) * max(recipe.epochs, 1))
    zeros = np.zeros(_CHECKED, dtype=np.int64)
    some_rows = index[local[index]][:_CHECKED]
    some = torch.from_numpy(inputs.read(some_rows, zeros[: len(some_rows)]))

    def features() -> Tensor:
        return _features(encoder, some, depth, inputs.start, engine.precision)

    frozen = features()
    # the caller's generator is left as it was, and what draws from it (dropout) draws the same every time
    with torch.random.fork_rng(devices=[]), attached(encoder, config, random_state) as peft_model:
        if not _same(features(), frozen):
            raise ValueError(
                f"The adapter {method_name(config)!r} does not begin as the frozen encoder: its features differ before "
                "any training, and zero epochs have to be the frozen encoder. Take an initialisation that adds "
                "nothing (`init_lora_weights=True`; an even rank for HRA)."
            )
        torch.manual_seed(random_state + processes.rank())
        student = Student(encoder, depth, targets, recipe, random_state, inputs.start, engine.precision)
        student.peft_model, student.parts = peft_model, engine.accumulate
        student.allocate = getattr(peft_model.base_model, "update_and_allocate", None)
        kept = Kept(student, keep)

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
                    f"A callback in `trainer` ended the training after epoch {len(history.rows)} of {epochs}: epochs "
                    "are chosen by the held-out error. Give `epochs=` or `patience=` instead."
                )
    encoder.to(engine.device)  # Lightning leaves a model on the CPU
    if not _same(features(), frozen):
        raise ValueError(
            f"The adapter {method_name(config)!r} left the encoder changed: its initialisation rewrites frozen "
            "weights. Take one that leaves them alone (`init_lora_weights=True`)."
        )
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
    """Train, from the state in `folder` if there is one."""
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
            trainer.fit(student, batches, ckpt_path=None if state is None else str(state), weights_only=state is None)
    except NotFinite as error:
        error.last_good = {name: p.detach().cpu().clone() for name, p in student.trained().items()}
        where = "give `resume=` a folder to have it on disk"
        if folder is not None:
            if processes.rank() == 0:
                save_file(dict(error.last_good), folder / "last_good.safetensors")
            where = f"{folder / 'last_good.safetensors'} has it"
        error.add_note(f"The state before that step is kept: it is this error's `last_good`; {where}.")
        if folder is not None:
            error.add_note("`resume=` goes on with the same numbers only: with others, give it another folder.")
        raise
    finally:
        encoder.checkpointing = False
        for block in compiled:
            block._compiled_call_impl = None


def check_starts(engine: Engine, recipe: Recipe) -> None:
    """Raise ValueError where Lightning does not take what the user gives it, before there is any work."""
    try:
        with quiet_lightning():
            _trainer(engine, recipe, 1, [])
    except (MisconfigurationException, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"`trainer`: Lightning does not take {dict(engine.trainer)}: {error}") from error


def _trainer(engine: Engine, recipe: Recipe, epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    given = dict(engine.trainer)
    theirs = as_list(given.pop("callbacks", None))
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
        max_epochs=epochs, enable_checkpointing=any(isinstance(c, Checkpoint) for c in theirs),
        accumulate_grad_batches=engine.accumulate, use_distributed_sampler=False, num_sanity_val_steps=0,
        # last: what a user's callbacks do is done when a state is written
        callbacks=[*theirs, *callbacks], **how,
    )  # fmt: skip


def _check_state(file: Path) -> None:
    """Raise ValueError if a state is not whole."""
    try:
        with ZipFile(file) as parts:
            bad = parts.testzip()
    except (BadZipFile, OSError) as error:
        bad = str(error)
    if bad is not None:
        raise ValueError(
            f"The state of a training in `resume=` is damaged: {str(file)!r} ({bad}). Delete that file: the training "
            "begins anew, and the others stay."
        )


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let the stop button of a notebook raise KeyboardInterrupt, and leave it working.

    Lightning exits instead, and has the process ignore every further interrupt.
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


def _features(encoder: EncoderNetwork, some: Tensor, depth: Depth, start: int, precision: str) -> Tensor:
    """Return the features of a few tiles, or of their tokens."""
    device = encoder.mean.device
    x = some.to(device)
    with torch.inference_mode(), autocast(device, precision):
        x = encoder.normalise(x) if start == 0 else x.float()
        return features_of(encoder, x, [depth], start)[0].float().cpu().clone()


def _same(a: Tensor, b: Tensor) -> bool:
    # far above what a sum in another order changes, far below what a random adapter does
    return bool((a - b).abs().max() <= 1e-2 * max(float(b.std()), 1e-6))
