"""Projector and cluster head, the small networks trained in addition to the adapter."""

from __future__ import annotations

from torch import nn

HIDDEN = 512


def mlp(n_in: int, n_out: int, n_hidden: int) -> nn.Sequential:
    """Return a perceptron with `n_hidden` hidden layers of width 512 and ReLU."""
    layers: list[nn.Module] = []
    for i in range(n_hidden):
        layers += [nn.Linear(n_in if i == 0 else HIDDEN, HIDDEN), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, n_out))


def cluster_head(n_teacher: int, n_clusters: int) -> nn.Sequential:
    """Return the cluster head f: Linear(D, 512)-ReLU-Linear(512, 512)-ReLU-Linear(512, K)."""
    return mlp(n_teacher, n_clusters, n_hidden=2)


def projector(n_features: int, n_teacher: int) -> nn.Sequential:
    """Return the projector P: Linear(d, 512)-ReLU-Linear(512, D)."""
    return mlp(n_features, n_teacher, n_hidden=1)
