"""PEKA's lesson in plain torch: structure labels, the frozen cluster head, projector and losses.

Method: Pan, Chen, Secrier, "Teaching pathology foundation models to accurately predict gene expression with
parameter efficient knowledge transfer", arXiv:2504.07061.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional

from pekasc._options import Recipe

HIDDEN = 512


def n_clusters_for(n_spots: int, n_clusters: int | None) -> int:
    """Return the number of structure labels: ``min(100, n // 20)``, at least 2, or `n_clusters` if it fits.

    Raises
    ------
    ValueError
        If `n_clusters` was given and the training spots cannot support it.
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
    # one thread: k-means sums in the order of its threads, and labels must not depend on it
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        labels = KMeans(n_clusters, n_init=4, random_state=random_state).fit_predict(embedding.astype(np.float64))
    return labels.astype(np.int64)


def mlp(n_in: int, n_out: int, n_hidden: int) -> nn.Sequential:
    """Return Linear-ReLU blocks of width 512 and a last Linear."""
    layers: list[nn.Module] = []
    for i in range(n_hidden):
        layers += [nn.Linear(n_in if i == 0 else HIDDEN, HIDDEN), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, n_out))


def cluster_head(n_teacher: int, n_clusters: int) -> nn.Sequential:
    """Return f: Linear(D, 512)-ReLU-Linear(512, 512)-ReLU-Linear(512, K)."""
    return mlp(n_teacher, n_clusters, n_hidden=2)


def projector(n_features: int, n_teacher: int) -> nn.Sequential:
    """Return P: Linear(d, 512)-ReLU-Linear(512, D)."""
    return mlp(n_features, n_teacher, n_hidden=1)


def train_cluster_head(
    head: nn.Module, embedding: Tensor, labels: Tensor, recipe: Recipe, generator: torch.Generator
) -> None:
    """Train `head` on (teacher embedding, label) by cross-entropy, keep the best of a tenth held out, freeze it."""
    n = len(embedding)
    order = torch.randperm(n, generator=generator)
    check, train = order[: max(1, n // 10)], order[max(1, n // 10) :]
    # fused: of a step for so small a network, most is torch's own bookkeeping
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


def losses(
    head: nn.Module, teacher: Tensor, student: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return knowledge distillation ``T**2 * KL(softmax(f(t)/T) || softmax(f(s)/T))`` and structure alignment.

    Parameters
    ----------
    head
        The frozen cluster head f.
    teacher, student
        Embeddings t and s, (batch, D).
    labels
        Structure labels, (batch,).
    temperature
        T.
    """
    with torch.no_grad():
        target = functional.log_softmax(head(teacher) / temperature, dim=1)
    logits = head(student)
    soft = functional.log_softmax(logits / temperature, dim=1)
    kd = functional.kl_div(soft, target, reduction="batchmean", log_target=True) * temperature**2
    return kd, functional.cross_entropy(logits, labels)


def turned(tiles: Tensor, number: int, axes: tuple[int, int]) -> Tensor:
    """Return tiles in one of their eight orientations: turned by so many quarters, from 4 on mirrored as well."""
    out = torch.rot90(tiles, number % 4, axes)
    return out.flip(axes[1]) if number >= 4 else out


def orient(tiles: np.ndarray, views: np.ndarray) -> np.ndarray:
    """Return every tile (n, y, x, 3) in the orientation that `views` (n,) says, see :func:`turned`.

    In NumPy, for it runs in a thread beside the training: torch's own threads there would spin and slow that down.
    """
    out = np.empty_like(tiles)
    for i, (tile, number) in enumerate(zip(tiles, views.tolist(), strict=True)):
        side = np.rot90(tile, number % 4)
        out[i] = side[:, ::-1] if number >= 4 else side
    return out
