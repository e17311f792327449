"""Lightning callbacks of a training: history of the losses, weights to keep, checkpoints."""

from __future__ import annotations

import io
import json
import sys
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

from pekasc.models.runtime import peak_memory, processes, replace_sealed
from pekasc.models.training._plan import Student

# what a row of the history has
HISTORY = ("epoch", "loss", "kd", "sa", "matching", "peak_memory", "val_error")


def check_history(rows: Any) -> None:
    """Check rows of a history that were read from a file: numbers of the epochs 1, 2, ...

    Raises
    ------
    ValueError
        If they are something else.
    """
    try:
        numbers = [row[name] for row in rows for name in HISTORY]
        # a larger integer is no float
        sound = all(isinstance(value, int | float) and not abs(value) > sys.float_info.max for value in numbers)
        sound = sound and [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    except (LookupError, TypeError) as error:
        raise ValueError(f"the history has another shape ({error!r})") from error
    if not sound:
        raise ValueError("the history does not hold numbers of the epochs 1, 2, ...")


class Allocation(L.Callback):
    """Let AdaLoRA reallocate ranks between layers after every step, while the gradients are available.

    It is a callback, since these run before the module's own hooks and a checkpoint must include the new ranks.
    """

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.allocate is not None and (batch_idx + 1) % pl_module.parts == 0:
            pl_module.allocate(trainer.global_step)


class History(L.Callback):
    """Collect the mean losses of every epoch and the held-out error from `on_epoch`; stop early when `stop` is true.

    After resuming from a checkpoint, `known` is called for every epoch that is finished already.
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
        # without dropout, and without changing the random state of the training
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
        """Restore the rows."""
        check_history(state_dict["rows"])
        self.rows = list(state_dict["rows"])
        for row in self.rows:
            self.known(int(row["epoch"]))


class Checkpoints(L.Callback):
    """Write a checkpoint every few minutes, atomically."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.file, self.seconds, self._last = folder / LAST, 60 * minutes, time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        # not between micro-batches, since accumulated gradients are not saved; not at the end of an epoch, where
        # Lightning updates the learning rate after all hooks
        if (batch_idx + 1) % pl_module.parts or trainer.is_last_batch:
            return
        if not processes.broadcast(time.monotonic() - self._last >= self.seconds):
            return
        # what `trainer.save_checkpoint` writes; it would leave an error of one process to the others' waiting
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        with processes.raise_together():
            if trainer.is_global_zero:
                content = io.BytesIO()  # torch hides why a file cannot be written
                torch.save(checkpoint, content)
                replace_sealed(self.file, content.getvalue(), CHECKPOINT)
        self._last = time.monotonic()


LAST, CHECKPOINT = "last.ckpt", "The checkpoint of the fit"


class KeepWeights(L.Callback):
    """Keep the weights after some epochs, as part of the checkpoint."""

    def __init__(self, student: Student, epochs: Collection[int]) -> None:
        self.student, self.epochs = student, epochs
        self.weights: dict[int, dict[str, dict[str, Tensor]]] = {}
        self.configs: dict[int, PeftConfig] = {}

    def keep(self, epoch: int) -> None:
        """Keep the weights, if `epoch` is one of those to keep."""
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
        """Return the weights for Lightning's checkpoint, with configurations as JSON, which cannot run code."""
        patterns = {epoch: json.dumps(getattr(c, "rank_pattern", None)) for epoch, c in self.configs.items()}
        return {"weights": self.weights, "patterns": patterns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the weights."""
        self.weights = dict(state_dict["weights"])
        for epoch, pattern in state_dict["patterns"].items():
            self.configs[epoch] = deepcopy(self.student.peft_model.active_peft_config)
            if hasattr(self.configs[epoch], "rank_pattern"):
                self.configs[epoch].rank_pattern = json.loads(pattern)  # type: ignore[attr-defined]
