"""A multilayer perceptron as expression head: what a non-linear map adds to ridge on the same components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pekasc._expression import Matrix, dense
from pekasc.models.heads._ridge import Projection, n_components_for, projection_of_rows

HIDDEN = 512
MAX_EPOCHS = 40
_BATCH, _RATE, _DECAY = 64, 1e-3, 1e-3


@dataclass(frozen=True)
class MlpHead:
    """Two hidden layers with ReLU, from standardised components to expression.

    Parameters
    ----------
    projection
        Standardisation and PCA.
    spread
        Standard deviation of all scores of the training spots together. One number: equal spread of all components
        would give the many that are noise the weight of the few that are not.
    layers
        Weight (in, out) and bias (out,) of every layer.
    intercept
        Mean expression over training spots, shape (genes,).
    """

    projection: Projection
    spread: float
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    intercept: np.ndarray

    def predict(self, features: np.ndarray, genes: slice = slice(None)) -> np.ndarray:
        """Return predicted expression (n, genes), float32, for (n, d) `features`; of some genes if asked."""
        x = self.projection(features) / self.spread
        for weight, bias in self.layers[:-1]:
            x = np.maximum(x @ weight + bias, 0)
        weight, bias = self.layers[-1]
        return (x @ weight[:, genes] + bias[genes] + self.intercept[genes]).astype(np.float32)


def fit_mlp(
    features: np.ndarray,
    y: Matrix,
    n_components: int | None,
    epochs: int,
    random_state: int,
    on_epoch: Callable[[int, MlpHead], None] | None = None,
) -> MlpHead:
    """Train the head for a number of epochs (Adam with decoupled weight decay, mean squared error).

    Parameters
    ----------
    features
        Shape (n, d).
    y
        Expression, shape (n, genes), dense or CSR.
    n_components
        See :func:`pekasc.models._heads.n_components_for`.
    epochs
        Passes over the spots.
    random_state
        Seed of weights and order.
    on_epoch
        Called with the number of epochs done and the head as it is.
    """
    n, d = features.shape
    projection = projection_of_rows(features, n_components_for(n, d, n_components))
    scores = projection(features)
    spread = max(float(scores.std()), 1e-12)
    measured = np.asarray(dense(y), dtype=np.float64)
    intercept = measured.mean(axis=0)
    x = torch.from_numpy((scores / spread).astype(np.float32))
    target = torch.from_numpy((measured - intercept).astype(np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_state)
        sizes = (x.shape[1], HIDDEN, HIDDEN, target.shape[1])
        linear = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    net = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])
    optimiser = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=_DECAY)
    generator = torch.Generator().manual_seed(random_state)

    def head() -> MlpHead:
        layers = [(m.weight.detach().numpy().T.astype(np.float64), m.bias.detach().numpy().copy()) for m in linear]
        return MlpHead(projection, spread, tuple(layers), intercept)

    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(n, generator=generator).split(_BATCH):
            optimiser.zero_grad()
            nn.functional.mse_loss(net(x[rows]), target[rows]).backward()
            optimiser.step()
        if on_epoch is not None:
            on_epoch(epoch, head())
    return head()
