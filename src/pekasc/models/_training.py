"""Train a student with Lightning: tiles in, adapter and projector out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from peft import PeftConfig, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from pekasc.models._choose import Depth
from pekasc.models._embed import features_of
from pekasc.models._encoders import FrozenEncoder
from pekasc.models._methods import attached, method_name, with_steps
from pekasc.models._peka import (
    Recipe,
    cluster_head,
    losses,
    n_clusters_for,
    orient,
    projector,
    structure_labels,
    train_cluster_head,
)
from pekasc.tiling import TileSource, batches

_CHECKED = 4  # tiles on which an adapter is compared with the frozen encoder
_PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class Lesson:
    """What the teacher says about every training spot, and the frozen head that the student is judged by.

    Parameters
    ----------
    embedding
        Teacher embedding, (n, D) float32, in the scale that the student learns.
    labels
        Structure labels, (n,).
    head
        The trained and frozen cluster head.
    """

    embedding: Tensor
    labels: Tensor
    head: nn.Module


def prepare_lesson(embedding: np.ndarray, recipe: Recipe, random_state: int) -> Lesson:
    """Fit structure labels and the cluster head on the training spots' teacher embedding (n, D)."""
    scale = float(embedding.std()) if recipe.standardise_teacher else 1.0
    scaled = (embedding / (scale or 1.0)).astype(np.float32)
    k = n_clusters_for(len(scaled), recipe.n_clusters)
    labels = torch.from_numpy(structure_labels(scaled, k, random_state))
    generator = torch.Generator().manual_seed(random_state)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_state)
        head = cluster_head(scaled.shape[1], k)
    teacher = torch.from_numpy(scaled)
    train_cluster_head(head, teacher, labels, recipe, generator)
    return Lesson(teacher, labels, head)


class _Shuffled(IterableDataset):
    """Batches of (tiles, row of the lesson) in a new order every epoch, drawn from one generator."""

    def __init__(self, source: TileSource, index: np.ndarray, batch_size: int, generator: torch.Generator) -> None:
        self.source, self.index, self.batch_size, self.generator = source, index, batch_size, generator

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.index), generator=self.generator)
        rows = order.split(self.batch_size)
        stream = batches(self.source, self.batch_size, index=self.index[order.numpy()])
        for row, (_, tiles) in zip(rows, stream, strict=True):
            yield torch.from_numpy(tiles), row


class Student(L.LightningModule):
    """The encoder with its adapter, and the projector into the teacher's space.

    Parameters
    ----------
    encoder
        The encoder, adapter attached.
    depth
        Block(s) whose features the projector reads.
    lesson
        Teacher embedding, labels, cluster head.
    recipe
        Numbers of the training.
    random_state
        Seed of projector and augmentation.
    """

    def __init__(self, encoder: FrozenEncoder, depth: Depth, lesson: Lesson, recipe: Recipe, random_state: int) -> None:
        super().__init__()
        self.encoder, self.depth, self.recipe, self.cluster_head = encoder, depth, recipe, lesson.head
        self.register_buffer("teacher", lesson.embedding, persistent=False)
        self.register_buffer("labels", lesson.labels, persistent=False)
        self.generator = torch.Generator().manual_seed(random_state)
        tile = torch.zeros(1, 3, encoder.tile_px, encoder.tile_px, device=encoder.mean.device)
        with torch.no_grad():
            width = features_of(encoder, tile, [depth])[0].shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_state)
            self.projector = projector(width, lesson.embedding.shape[1])
        self.sums = np.zeros(5)
        self.allocate: Callable[[int], None] | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch of (tiles, rows of the lesson)."""
        tiles, rows = batch
        if self.recipe.augment:
            tiles = orient(tiles, self.generator)
        features = features_of(self.encoder, self.encoder.normalise(tiles), [self.depth])[0]
        said, taught = self.projector(features), self.teacher[rows]  # type: ignore[index]
        kd, sa = losses(self.cluster_head, taught, said, self.labels[rows], self.recipe.temperature)  # type: ignore[index]
        matching = float("nan")
        loss = self.recipe.kd_weight * kd + (1 - self.recipe.kd_weight) * sa
        if self.recipe.matching_weight:
            error = functional.mse_loss(said, taught)
            loss, matching = loss + self.recipe.matching_weight * error, float(error.detach())
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss became {float(loss)} in epoch {self.current_epoch + 1}, batch {batch_idx + 1} "
                f"(distillation {float(kd):.4g}, structure {float(sa):.4g}, matching {matching:.4g}): "
                "try a smaller `learning_rate=`."
            )
        parts = [float(part.detach()) for part in (loss, kd, sa)]
        self.sums += np.array([*parts, matching, 1.0]) * len(rows)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let a method that moves rank between layers do so, while the gradients are there."""
        if self.allocate is not None:
            self.allocate(self.global_step)

    def configure_optimizers(self) -> Any:
        """Return AdamW over adapter and projector, with the recipe's steps in the learning rate."""
        trained = [p for p in self.parameters() if p.requires_grad]
        # without weight decay AdamW is Adam, which the paper used
        optimiser = torch.optim.AdamW(trained, lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay)
        if self.recipe.step_epochs is None:
            return {"optimizer": optimiser}
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, self.recipe.step_epochs, gamma=0.1)
        return {"optimizer": optimiser, "lr_scheduler": schedule}


class _History(L.Callback):
    """Collect the mean losses of every epoch, and what `on_epoch` measures after it."""

    def __init__(self, on_epoch: Callable[[int], float]) -> None:
        self.on_epoch, self.rows = on_epoch, list[dict[str, float]]()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Student)  # for the type checker: only this file calls it
        *sums, n = pl_module.sums
        loss, kd, sa, matching = (value / n for value in sums)
        pl_module.sums = np.zeros(5)
        epoch = trainer.current_epoch + 1
        self.rows.append(
            {
                "epoch": epoch,
                "loss": loss,
                "kd": kd,
                "sa": sa,
                "matching": matching,
                "val_error": self.on_epoch(epoch),
            }  # fmt: skip
        )


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
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            # on purpose: see FrozenEncoder.train
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
        One dict per epoch: epoch, loss, kd, sa, matching, val_error.
    """

    weights: dict[int, dict[str, dict[str, Tensor]]]
    configs: dict[int, PeftConfig]
    history: list[dict[str, float]]


def train_student(
    encoder: FrozenEncoder,
    depth: Depth,
    config: PeftConfig,
    source: TileSource,
    index: np.ndarray,
    teacher: np.ndarray,
    *,
    recipe: Recipe,
    epochs: int,
    device: torch.device,
    precision: str,
    random_state: int,
    progress: bool,
    keep: Collection[int] = (),
    on_epoch: Callable[[int], float] | None = None,
) -> Trained:
    """Train an adapter on the tiles `index` of `source`; the encoder is given back without it.

    Parameters
    ----------
    encoder
        The frozen encoder.
    depth
        Block(s) whose features are trained.
    config
        The adapter, layers named.
    source, index
        Tiles, and which of them to train on.
    teacher
        Teacher embedding of those tiles, (len(index), D).
    recipe, epochs
        Numbers of the training; `epochs` of it run.
    device, precision, random_state, progress
        As in ``tl.fit_adapter``.
    keep
        Epochs after which the weights are kept; 0 is before the first.
    on_epoch
        Called after every epoch, while the adapter is in the encoder; returns the held-out error.
    """
    lesson = prepare_lesson(teacher, recipe, random_state)
    config = with_steps(config, -(-len(index) // recipe.batch_size) * max(recipe.epochs, 1))
    some = torch.from_numpy(source.read(index[:_CHECKED]))
    frozen = _features(encoder, some, depth)
    # the caller's generator is left as it was, and what draws from it (dropout) draws the same every time
    with torch.random.fork_rng(devices=[]), attached(encoder, config, random_state) as peft_model:
        if not _same(_features(encoder, some, depth), frozen):
            raise ValueError(
                f"The adapter {method_name(config)!r} does not begin as the frozen encoder: its features differ before "
                "any training, and zero epochs have to be the frozen encoder. Take an initialisation that adds "
                "nothing (`init_lora_weights=True`; an even rank for HRA)."
            )
        torch.manual_seed(random_state)
        student = Student(encoder, depth, lesson, recipe, random_state)
        student.allocate = getattr(peft_model.base_model, "update_and_allocate", None)
        weights, configs = {}, {}

        def state(module: nn.Module) -> dict[str, Tensor]:
            return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}

        def after(epoch: int) -> float:
            if epoch in keep:
                adapter = get_peft_model_state_dict(peft_model)
                weights[epoch] = {
                    "adapter": {k: v.detach().cpu().clone() for k, v in adapter.items()},
                    "projector": state(student.projector),
                    "cluster_head": state(student.cluster_head),
                }
                configs[epoch] = deepcopy(peft_model.active_peft_config)
            return float("nan") if on_epoch is None or epoch == 0 else on_epoch(epoch)

        after(0)
        history = _History(after)
        if epochs:
            generator = torch.Generator().manual_seed(random_state)
            # no workers: they would each hold the tiles; from pinned memory a GPU copies while it computes
            batches_of = _Shuffled(source, index, recipe.batch_size, generator)
            loader = DataLoader(batches_of, batch_size=None, pin_memory=device.type == "cuda")
            with quiet_lightning(), _plain_attention(encoder.model, device):
                trainer = L.Trainer(
                    max_epochs=epochs,
                    accelerator=device.type,
                    devices=1 if device.index is None else [device.index],
                    precision=_PRECISION[precision],  # type: ignore[arg-type]
                    logger=False,
                    enable_checkpointing=False,
                    enable_model_summary=False,
                    enable_progress_bar=progress,
                    gradient_clip_val=recipe.gradient_clip,
                    callbacks=[history],
                )
                trainer.fit(student, loader)
    if not _same(_features(encoder, some, depth), frozen):
        raise ValueError(
            f"The adapter {method_name(config)!r} left the encoder changed: its initialisation rewrites frozen "
            "weights. Take one that leaves them alone (`init_lora_weights=True`)."
        )
    return Trained(weights, configs, history.rows)


def _features(encoder: FrozenEncoder, tiles: Tensor, depth: Depth) -> Tensor:
    """Return the features of a few tiles, in full precision."""
    with torch.inference_mode():
        return features_of(encoder, encoder.normalise(tiles.to(encoder.mean.device)), [depth])[0].clone()


def _same(a: Tensor, b: Tensor) -> bool:
    # far above what a sum in another order changes, far below what a random adapter does
    return bool((a - b).abs().max() <= 1e-2 * max(float(b.std()), 1e-6))
