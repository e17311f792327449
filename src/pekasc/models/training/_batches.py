"""Training batches, in the same order and orientations in every process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pekasc._options import Recipe
from pekasc.models.encoders import VIEWS
from pekasc.models.features import Inputs
from pekasc.tiling import read_ahead

# inputs, their rows among the training tiles, how many of them count in the loss, size of the whole batch
Batch = tuple[Tensor, Tensor, int, int]


class _Batches:
    """Shuffled batches, the same in every process; each process yields its own rows of them.

    The order of the tiles, and their orientations, are drawn once per epoch from one generator, so that a training
    resumed within an epoch gets the same batches.
    """

    def __init__(
        self, inputs: Inputs, index: np.ndarray, local: np.ndarray, recipe: Recipe, parts: int, random_state: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.inputs, self.index, self.recipe, self.parts, self.device = inputs, index, recipe, parts, device
        self.local = local[index]  # by row among the training tiles
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
            if self._drawn > self.epoch:  # skip the epochs before a checkpoint
                return order, np.asarray(VIEWS)[views]

    def _plan(self) -> list[tuple[np.ndarray, np.ndarray, int, int]]:
        order, views = self._draw()
        plan = []
        for start in range(0, len(order), self.recipe.batch_size):
            whole = order[start : start + self.recipe.batch_size]
            for part in np.array_split(whole, self.parts):
                rows = part[self.local[part]]
                # a micro-batch without rows of this process runs on a row of weight 0: all processes run every step
                rows, n = (rows, len(rows)) if len(rows) else (np.flatnonzero(self.local)[:1], 0)
                plan.append((rows, views[rows], n, len(whole)))
        return plan

    def _read(self, part: tuple[np.ndarray, np.ndarray, int, int]) -> np.ndarray:
        rows, views, _, _ = part
        return self.inputs.read(self.index[rows], views)

    def __iter__(self) -> Iterator[Batch]:
        if self.batch == len(self):  # Lightning stops at the length, without exhausting the iterator
            self.epoch, self.batch = self.epoch + 1, 0
        plan = self._plan()[self.batch :]
        for (rows, _, n, n_all), found in read_ahead(self._read, plan):
            x = torch.from_numpy(found)
            if self.device.type == "cuda":
                x = x.pin_memory()  # for asynchronous copies to the GPU
            self.batch += 1
            yield x, torch.from_numpy(rows), n, n_all

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and batch, for Lightning's checkpoint."""
        done = self.batch == len(self)
        return {"epoch": self.epoch + done, "batch": 0 if done else self.batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the epoch and batch of a checkpoint."""
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
