"""Training plan: the student network, its loss, optimiser and checkpoints, as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pekasc._options import Recipe
from pekasc.models.encoders import Depth, EncoderNetwork
from pekasc.models.features import features_of
from pekasc.models.runtime import autocast, processes
from pekasc.models.training._batches import Batch
from pekasc.models.training._losses import losses
from pekasc.models.training._network import projector
from pekasc.models.training._targets import TeacherTargets


class Student(L.LightningModule):
    """The student: the encoder with its adapter, and the projector to the teacher's embedding space.

    Parameters
    ----------
    encoder
        The encoder with the adapter attached.
    depth
        Block(s) after which the projector gets features.
    targets
        Teacher embedding, structure labels and cluster head.
    recipe
        Hyperparameters.
    random_state
        Seed of the projector.
    start
        Number of blocks before the cached activations; 0 for tiles.
    precision
        Precision of the forward pass that determines the width of the features.
    """

    strict_loading = False  # checkpoints hold only the trained parameters

    def __init__(
        self,
        encoder: EncoderNetwork,
        depth: Depth,
        targets: TeacherTargets,
        recipe: Recipe,
        random_state: int,
        start: int = 0,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.depth, self.recipe, self.cluster_head = encoder, depth, recipe, targets.head
        self.start, self.parts = start, 1
        # not as buffers, which DDP would broadcast before every step
        self.teacher, self.labels = targets.embedding, targets.labels
        # sums over rows of loss, distillation, structure alignment and matching, and the number of rows, of the epoch
        # and of this step. They stay on the device, since reading a number would synchronise the GPU
        self.sums, self.step = torch.zeros(5), torch.zeros(5)
        device = encoder.mean.device
        tile = torch.zeros(1, 3, encoder.tile_px, encoder.tile_px, device=device)
        with torch.no_grad(), autocast(device, precision):
            width = features_of(encoder, tile, [depth])[0].shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_state)
            self.projector = projector(width, targets.embedding.shape[1])
        self.allocate: Callable[[int], None] | None = None
        self.peft_model: Any = None
        self.started = False  # whether a checkpoint, if there is one, was restored

    def on_train_start(self) -> None:
        """Note that everything is restored."""
        self.started = True

    def on_fit_start(self) -> None:
        """Move targets and sums, which are not buffers, to the device."""
        for name in ("teacher", "labels", "sums", "step"):
            setattr(self, name, getattr(self, name).to(self.device))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a micro-batch of this process, scaled so that the mean gradient is that of the batch."""
        x, rows, n, n_all = batch
        x = self.encoder.normalise(x) if self.start == 0 else x.to(self.teacher.dtype)
        features = features_of(self.encoder, x, [self.depth], self.start)[0]
        student, teacher = self.projector(features), self.teacher[rows]
        kd, sa = losses(self.cluster_head, teacher, student, self.labels[rows], self.recipe.temperature)
        loss = self.recipe.kd_weight * kd + (1 - self.recipe.kd_weight) * sa
        matching = torch.full_like(loss, float("nan"))
        if self.recipe.matching_weight:
            matching = functional.mse_loss(student, teacher)
            loss = loss + self.recipe.matching_weight * matching
        if n:
            parts = torch.stack([part.detach().float() for part in (loss, kd, sa, matching, torch.ones_like(loss))])
            self.step += parts * n
            if self._trainer is not None:  # for the user's loggers and callbacks
                self.log_dict(dict(zip(("loss", "kd", "sa"), parts, strict=False)), batch_size=n)
        return loss * (n / n_all * self.parts * processes.n_ranks())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients; raise if the loss or the gradient is NaN or infinite, before the weights change."""
        # the gradient scaler of fp16 skips steps whose gradients overflow
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        # without a scaler, a bad loss of any process shows in the gradients of all
        step = processes.all_reduce(self.step) if scaled else self.step
        total, norm_value = torch.stack([step[0], norm.to(step.device)]).tolist()
        if not np.isfinite(total) or not (scaled or np.isfinite(norm_value)):
            loss, kd, sa, matching, n = step.tolist()
            n = n or 1.0
            raise NotFinite(
                f"The loss became {loss / n:g} (norm of the gradient {norm_value:g}) at step {self.global_step + 1}, "
                f"epoch {self.current_epoch + 1}, batch {self.trainer.fit_loop.batch_idx // self.parts + 1} "
                f"(distillation {kd / n:.4g}, structure {sa / n:.4g}, matching {matching / n:.4g}): "
                "try a smaller `Recipe.learning_rate`."
            )
        self.sums += self.step
        self.step.zero_()
        if gradient_clip_val:
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(trained, gradient_clip_val)
            else:
                torch.nn.utils.clip_grads_with_norm_(trained, gradient_clip_val, norm)

    def trained(self) -> dict[str, Tensor]:
        """Return the trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the trained parameters without the encoder, the random states and the sums."""
        checkpoint["state_dict"] = {name: p.detach().cpu() for name, p in self.trained().items()}
        own = {"rng": torch.get_rng_state(), "sums": self.sums.cpu()}
        if torch.cuda.is_available():
            own["rng_cuda"] = torch.cuda.get_rng_state()
        checkpoint["pekasc"] = {"processes": processes.all_gather(own)}
        allocator = getattr(getattr(self.peft_model, "base_model", None), "rankallocator", None)
        if allocator is not None:  # AdaLoRA: the importance of each rank so far
            importance = {name: getattr(allocator, name) for name in _ALLOCATOR}
            pattern = self.peft_model.active_peft_config.rank_pattern
            checkpoint["pekasc"]["allocator"] = {**importance, "rank_pattern": pattern}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore random states and sums, after checking that the checkpoint is of this adapter."""
        there, wanted = set(checkpoint["state_dict"]), set(self.trained())
        if there != wanted:  # loading is not strict, since the encoder's weights are not in the checkpoint
            raise ValueError(
                f"The checkpoint is of another adapter: {sorted(there ^ wanted)[:4]} are not in both. "
                "Delete the folder of `Compute.resume`."
            )
        extra = checkpoint["pekasc"]
        own = _of_process(extra, self.sums.shape)
        _check_optimiser(checkpoint, self.configure_optimizers())
        torch.set_rng_state(own["rng"].cpu())
        if "rng_cuda" in own:
            torch.cuda.set_rng_state(own["rng_cuda"].cpu())
        self.sums = own["sums"].to(self.device)
        if "allocator" in extra:
            base, found = self.peft_model.base_model, extra["allocator"]
            shapes = {name: p.shape for name, p in base.model.named_parameters() if "lora_" in name}
            stored = [{key: value.shape for key, value in found[name].items()} for name in _ALLOCATOR]
            if stored not in ([shapes] * 3, [{}] * 3):  # none in the last steps, in which ranks stay
                raise ValueError("the importance of ranks that it holds is not that of this adapter's layers")
            for name in _ALLOCATOR:
                setattr(base.rankallocator, name, found[name])
            self.peft_model.active_peft_config.rank_pattern = found["rank_pattern"]

    def configure_optimizers(self) -> Any:
        """Return AdamW over adapter and projector, with the recipe's learning rate schedule."""
        # without weight decay, AdamW is Adam, as in the paper
        optimiser = torch.optim.AdamW(
            list(self.trained().values()), lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
        )
        if self.recipe.step_epochs is None:
            return {"optimizer": optimiser}
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, self.recipe.step_epochs, gamma=0.1)
        return {"optimizer": optimiser, "lr_scheduler": schedule}


_ALLOCATOR = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def _check_optimiser(checkpoint: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """Check the moments of a checkpoint's optimiser, its options and its schedule against those of a new one.

    torch takes over whatever there is, and fails in the middle of a step.

    Raises
    ------
    ValueError
        If they are not of these parameters.
    LookupError, TypeError
        If the checkpoint has another structure.
    """
    (stored,) = checkpoint["optimizer_states"]
    (group,), (options,) = made["optimizer"].param_groups, stored["param_groups"]
    shapes = [p.shape for p in group["params"]]
    for i, moments in stored["state"].items():
        if {name: value.shape for name, value in moments.items()} != {
            "step": torch.Size(), "exp_avg": shapes[i], "exp_avg_sq": shapes[i],
        }:  # fmt: skip
            raise ValueError("the moments of its optimiser are not of this adapter's parameters")
    same = options["params"] == list(range(len(shapes))) and options.keys() == group.keys()
    # the learning rate changes from epoch to epoch
    fixed = [name for name in group if name not in ("params", "lr")]
    if not same or any(options[name] != group[name] for name in fixed) or not isinstance(options["lr"], float):
        raise ValueError("the options of its optimiser are not those of this training")
    schedules = [made["lr_scheduler"].state_dict()] if "lr_scheduler" in made else []
    kinds = [[{name: type(value) for name, value in s.items()} for s in each]
             for each in (schedules, checkpoint["lr_schedulers"])]  # fmt: skip
    if kinds[0] != kinds[1]:
        raise ValueError("its schedule of learning rates is not that of this training")


def _of_process(extra: Mapping[str, Any], sums: torch.Size) -> dict[str, Any]:
    """Return what a checkpoint holds of this process: random states, and sums of shape `sums`.

    Raises
    ------
    ValueError
        If it holds something else, which torch would take apart as if it were an index.
    """
    states = extra.get("processes")
    if not isinstance(states, list) or len(states) <= processes.rank():
        raise ValueError(f"it holds no random state of process {processes.rank()}")
    own = states[processes.rank()]
    tensors = own.values() if isinstance(own, dict) else ()
    if not {"rng", "sums"} <= set(own if tensors else ()) or not all(isinstance(value, Tensor) for value in tensors):
        raise ValueError("its random states and sums of losses are no tensors")
    if any(own[name].dtype != torch.uint8 for name in own if name != "sums") or own["sums"].shape != sums:
        raise ValueError("its random states and sums of losses are of another type or size")
    return dict(own)


class NotFinite(FloatingPointError):
    """The loss or the gradient is NaN or infinite; `last_good` has the trained parameters before that step, by name."""

    last_good: Mapping[str, Tensor]
