"""What happens around the steps of a training: losses, weights that are kept, states on disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from peft import PeftConfig, get_peft_model_state_dict
from torch import Tensor

from pekasc.models.runtime import peak_memory, processes
from pekasc.models.training._plan import Student


class Allocation(L.Callback):
    """Let a method that moves rank between layers do so, while the gradients are there.

    A callback, for those come before a module's own hooks, and the state that is written has to have it.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.allocate is not None and (batch_idx + 1) % pl_module.parts == 0:
            pl_module.allocate(trainer.global_step)


class History(L.Callback):
    """Collect the mean losses of every epoch, and what `on_epoch` measures after it; end when it says so.

    `known` is told which epochs an earlier run finished, where a training goes on from its state.
    """

    def __init__(
        self, on_epoch: Callable[[int], float], stop: Callable[[int], bool], known: Callable[[int], Any]
    ) -> None:
        self.on_epoch, self.stop, self.known = on_epoch, stop, known
        self.rows, self.stopped = list[dict[str, float]](), False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Student)  # for the type checker: only this file calls it
        *sums, n = processes.all_reduce(pl_module.sums).tolist()
        loss, kd, sa, matching = (value / n for value in sums)
        pl_module.sums.zero_()
        epoch = trainer.current_epoch + 1
        row = {"epoch": epoch, "loss": loss, "kd": kd, "sa": sa, "matching": matching}
        row["peak_memory"] = peak_memory(pl_module.device)
        # measured without dropout, and without drawing from what the training draws from
        pl_module.encoder.eval()
        with torch.random.fork_rng(devices=[pl_module.device] if pl_module.device.type == "cuda" else []):
            row["val_error"] = self.on_epoch(epoch)
        pl_module.encoder.train()
        if np.isfinite(row["val_error"]):
            pl_module.log("val_error", row["val_error"], sync_dist=processes.n_ranks() > 1)
        self.rows.append(row)
        if self.stop(epoch):
            trainer.should_stop = self.stopped = True

    def state_dict(self) -> dict[str, Any]:
        """Return the rows, for Lightning's checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.rows = list(state_dict["rows"])
        for row in self.rows:
            self.known(int(row["epoch"]))


class Checkpoints(L.Callback):
    """Write the state of a training every few minutes: whole, or not at all."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.file, self.seconds, self._last = folder / LAST, 60 * minutes, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # gradients of a part of a batch are no state to go on from. Nor is the end of an epoch: Lightning's own steps
        # there (the schedule of the learning rate) come after all hooks
        if (batch_idx + 1) % pl_module.parts or trainer.is_last_batch:
            return
        if not processes.broadcast(time.monotonic() - self._last >= self.seconds):
            return
        partial = self.file.with_suffix(".partial")
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            os.replace(partial, self.file)
        self._last = time.monotonic()


LAST = "last.ckpt"


class Kept(L.Callback):
    """The weights after some epochs, part of the state of a training."""

    def __init__(self, student: Student, epochs: Collection[int]) -> None:
        self.student, self.epochs = student, epochs
        self.weights: dict[int, dict[str, dict[str, Tensor]]] = {}
        self.configs: dict[int, PeftConfig] = {}

    def keep(self, epoch: int) -> None:
        """Keep them, if this is such an epoch."""
        if epoch not in self.epochs:
            return
        s = self.student
        parts = {"adapter": get_peft_model_state_dict(s.peft_model), "projector": s.projector.state_dict()}
        parts["cluster_head"] = s.cluster_head.state_dict()
        self.weights[epoch] = {
            kind: {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
            for kind, state in parts.items()
        }
        self.configs[epoch] = deepcopy(s.peft_model.active_peft_config)

    def state_dict(self) -> dict[str, Any]:
        """Return them, for Lightning's checkpoint; the configuration as text that can be read without code."""
        patterns = {epoch: json.dumps(getattr(c, "rank_pattern", None)) for epoch, c in self.configs.items()}
        return {"weights": self.weights, "patterns": patterns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.weights = dict(state_dict["weights"])
        for epoch, pattern in state_dict["patterns"].items():
            self.configs[epoch] = deepcopy(self.student.peft_model.active_peft_config)
            if hasattr(self.configs[epoch], "rank_pattern"):
                self.configs[epoch].rank_pattern = json.loads(pattern)  # type: ignore[attr-defined]
