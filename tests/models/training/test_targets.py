"""Structure labels, the cluster head, and the scale of the teacher's embedding."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pekasc._options import Recipe
from pekasc.models.training._network import cluster_head, projector
from pekasc.models.training._targets import n_clusters_for, prepare_targets, structure_labels, train_cluster_head


def blobs(n: int = 200, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = np.arange(n) % k
    return (rng.normal(size=(k, 10))[truth] * 4 + rng.normal(size=(n, 10)) * 0.2).astype(np.float32), truth


def test_labels_find_the_clusters_and_the_head_learns_them() -> None:
    x, truth = blobs()
    labels = structure_labels(x, 4, random_state=0)
    assert len({*zip(labels, truth, strict=True)}) == 4  # a renumbering of the truth
    head = cluster_head(10, 4)
    before = (head(torch.from_numpy(x)).argmax(1).numpy() == labels).mean()
    recipe = Recipe(cluster_head_epochs=15)
    train_cluster_head(head, torch.from_numpy(x), torch.from_numpy(labels), recipe, torch.Generator().manual_seed(0))
    after = (head(torch.from_numpy(x)).argmax(1).numpy() == labels).mean()
    assert before < 0.9 < after
    assert not any(p.requires_grad for p in head.parameters())


def test_shapes_of_the_heads() -> None:
    widths = [tuple(layer.weight.shape) for layer in cluster_head(30, 7) if isinstance(layer, nn.Linear)]
    assert widths == [(512, 30), (512, 512), (7, 512)]
    widths = [tuple(layer.weight.shape) for layer in projector(384, 30) if isinstance(layer, nn.Linear)]
    assert widths == [(512, 384), (30, 512)]


def test_targets_leave_the_callers_random_numbers_alone_and_repeats() -> None:
    x, _ = blobs(80)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = prepare_targets(x, Recipe(cluster_head_epochs=2), 0)
    assert torch.equal(torch.rand(3), expected)
    second = prepare_targets(x, Recipe(cluster_head_epochs=2), 0)
    assert torch.equal(first.labels, second.labels)
    for a, b in zip(first.head.parameters(), second.head.parameters(), strict=True):
        assert torch.equal(a, b)
    # by default in units of its own standard deviation, which leaves no trace of its scale
    assert first.embedding.std().item() == pytest.approx(1, abs=0.01)
    raw = prepare_targets(x, Recipe(cluster_head_epochs=1, standardise_teacher=False), 0)
    assert torch.equal(raw.embedding, torch.from_numpy(x))


def test_number_of_clusters_adapts_and_explicit_ones_must_fit() -> None:
    assert [n_clusters_for(n, None) for n in (10, 200, 5000)] == [2, 10, 100]
    assert n_clusters_for(30, 30) == 30
    for k in (1, 31):
        with pytest.raises(ValueError, match=rf"`n_clusters={k}` does not fit 30 training spots.*2 to 30"):
            n_clusters_for(30, k)


def test_the_best_cluster_head_is_kept_not_the_last() -> None:
    x, _ = blobs()
    labels, embedding = torch.from_numpy(structure_labels(x, 4, random_state=0)), torch.from_numpy(x)
    # the tenth that the generator draws first is what heads are compared on
    check = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: len(x) // 10]
    kept = []
    for epochs in range(1, 8):
        torch.manual_seed(0)
        head = cluster_head(10, 4)
        # steps so large that the loss goes up and down
        recipe = Recipe(cluster_head_epochs=epochs, cluster_head_learning_rate=0.3)
        train_cluster_head(head, embedding, labels, recipe, torch.Generator().manual_seed(0))
        with torch.no_grad():
            kept.append(float(nn.functional.cross_entropy(head(embedding[check]), labels[check])))
    assert all(b <= a for a, b in pairwise(kept))
    assert len(set(kept)) < len(kept)  # some epochs made it worse, and were not kept


def test_the_head_ends_when_it_has_stopped_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs()
    # labels that have nothing to do with the embedding: soon there is nothing more to learn for the held-out ones
    labels, embedding = torch.from_numpy(np.random.default_rng(1).integers(0, 4, len(x))), torch.from_numpy(x)
    steps: list[int] = []
    step = torch.optim.Adam.step

    def counted(self: Any, *args: Any) -> Any:
        steps.append(1)
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    heads, counts = [], []
    for patience in (10, None):
        torch.manual_seed(0)
        heads.append(cluster_head(10, 4))
        recipe = Recipe(cluster_head_epochs=30, cluster_head_patience=patience, batch_size=60)
        train_cluster_head(heads[-1], embedding, labels, recipe, torch.Generator().manual_seed(0))
        counts.append(len(steps))
        steps.clear()
    assert counts[0] < counts[1] == 30 * 3  # nine tenths of 200 spots, in batches of the recipe's size
    assert all(torch.equal(a, b) for a, b in zip(*(head.parameters() for head in heads), strict=True))
