"""Training targets: the teacher's embedding, structure labels and the frozen cluster head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional

from pekasc._options import Recipe
from pekasc.models.training._network import cluster_head


def n_clusters_for(n_spots: int, n_clusters: int | None) -> int:
    """Return the number of structure labels: ``min(100, n // 20)``, at least 2, or `n_clusters` if not too large.

    Raises
    ------
    ValueError
        If `n_clusters` is larger than the number of training spots.
    """
    if n_clusters is None:
        return max(2, min(100, n_spots // 20))
    if not 2 <= n_clusters <= n_spots:
        raise ValueError(
            f"`n_clusters={n_clusters}` does not fit {n_spots} training spots: give 2 to {n_spots}, or None to adapt."
        )
    return n_clusters


def structure_labels(embedding: np.ndarray, n_clusters: int, random_state: int) -> np.ndarray:
    """Return the k-means label of every spot's teacher embedding (n, D), int64."""
    # one thread, since rounding, and with it labels, would depend on the number of threads
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        labels = KMeans(n_clusters, n_init=4, random_state=random_state).fit_predict(embedding.astype(np.float64))
    return labels.astype(np.int64)


def train_cluster_head(
    head: nn.Module, embedding: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator
) -> None:
    """Train `head` to predict labels from the embedding, keep its best state by held-out loss (10 %), and freeze it."""
    n = len(embedding)
    order = torch.randperm(n, generator=generator)
    check, train = order[: max(1, n // 10)], order[max(1, n // 10) :]
    # fused: for a network this small, most of a step is overhead
    optimiser = torch.optim.Adam(head.parameters(), lr=recipe.cluster_head_learning_rate, fused=True)
    best, best_loss, best_epoch = {k: v.clone() for k, v in head.state_dict().items()}, float("inf"), 0
    for epoch in range(recipe.cluster_head_epochs):
        if recipe.cluster_head_patience is not None and epoch - best_epoch > recipe.cluster_head_patience:
            break
        for batch in train[torch.randperm(len(train), generator=generator)].split(recipe.batch_size):
            optimiser.zero_grad()
            functional.cross_entropy(head(embedding[batch]), labels[batch]).backward()
            optimiser.step()
        with torch.no_grad():
            loss = float(functional.cross_entropy(head(embedding[check]), labels[check]))
        if loss < best_loss:
            best, best_loss, best_epoch = {k: v.clone() for k, v in head.state_dict().items()}, loss, epoch
    head.load_state_dict(best)
    head.requires_grad_(False)


@dataclass(frozen=True)
class TeacherTargets:
    """Targets of the training spots, and the frozen cluster head that the losses are computed with.

    Parameters
    ----------
    embedding
        Teacher embedding, (n, D) float32, standardised if the recipe says so.
    labels
        Structure labels, (n,).
    head
        The trained and frozen cluster head.
    """

    embedding: Tensor
    labels: Tensor
    head: nn.Module


def prepare_targets(embedding: np.ndarray, recipe: Recipe, random_state: int) -> TeacherTargets:
    """Compute structure labels, and train the cluster head, from the teacher embedding (n, D) of the training spots."""
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
    return TeacherTargets(teacher, labels, head)
