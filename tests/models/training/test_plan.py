"""The published training, field by field; the optimiser and the loss are those of the recipe."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from pekasc._options import Readout, Recipe
from pekasc.models.encoders import EncoderNetwork
from pekasc.models.features import features_of
from pekasc.models.training._losses import losses
from pekasc.models.training._methods import attached, make_config, target_layers
from pekasc.models.training._plan import Student
from pekasc.models.training._targets import TeacherTargets, prepare_targets


def test_published_numbers() -> None:
    # every field, so that a new one has to say what the published training did
    assert asdict(Recipe.preset("paper")) == {
        "rank": 256, "blocks": "all", "n_clusters": 100, "teacher_components": 256, "kd_weight": 0.5,
        "matching_weight": 0.0, "temperature": 2.0, "learning_rate": 1e-4, "weight_decay": 0.0, "batch_size": 32,
        "step_epochs": 10, "epochs": 50, "patience": None, "choose_epochs": False, "n_views": 1, "gradient_clip": 1.0,
        "standardise_teacher": False, "cluster_head_learning_rate": 1e-4, "cluster_head_epochs": 20,
        "cluster_head_patience": None, "refit": "last",
    }  # fmt: skip
    assert asdict(Readout.preset("paper")) == {
        "head": "ridge", "head_rank": None, "members": None, "depth": "own", "selection": "best", "n_depths": None,
        "n_components": 256, "context_um": None, "smooth_um": None, "fields_um": None, "orientations": 1,
        "stain": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def targets() -> TeacherTargets:
    embedding = np.random.default_rng(0).normal(size=(40, 10)).astype(np.float32)
    return prepare_targets(embedding, Recipe(n_clusters=4, cluster_head_epochs=1), 0)


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [(Recipe.preset("paper"), 10), (Recipe(weight_decay=0.3, learning_rate=2e-3), None)],
    ids=["paper", "own"],
)
def test_the_optimiser_is_the_recipes(
    encoder: EncoderNetwork, targets: TeacherTargets, recipe: Recipe, steps: int | None
) -> None:
    config = make_config("bone", 8, target_layers(encoder, (2,), "all"))
    with attached(encoder, config, 0):
        made = Student(encoder, (2,), targets, recipe, 0).configure_optimizers()
        (group,) = made["optimizer"].param_groups
        assert (group["lr"], group["weight_decay"]) == (recipe.learning_rate, recipe.weight_decay)
        # two blocks' adapters, and two layers of the projector: the cluster head is frozen
        assert len(group["params"]) == 2 + 4
        schedule = made.get("lr_scheduler")
        assert (schedule is None) == (steps is None)
        if schedule is not None:
            assert (schedule.step_size, schedule.gamma) == (steps, 0.1)


def test_the_loss_is_weighed_as_the_recipe_says(encoder: EncoderNetwork, targets: TeacherTargets) -> None:
    recipe = Recipe(kd_weight=0.3, matching_weight=1.5, temperature=4.0)
    rows = torch.tensor([3, 7, 11])
    tiles = torch.from_numpy(np.random.default_rng(1).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8))
    student = Student(encoder, (2,), targets, recipe, 0)
    encoder.eval()
    with torch.no_grad():
        loss = student.training_step((tiles, rows, 3, 3), 0)
        guess = student.projector(features_of(encoder, encoder.normalise(tiles), [(2,)])[0])
        teacher = targets.embedding[rows]
        kd, sa = losses(targets.head, teacher, guess, targets.labels[rows], 4.0)
        expected = 0.3 * kd + 0.7 * sa + 1.5 * (guess - teacher).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(student.step[1:3].numpy(), [3 * kd.item(), 3 * sa.item()], rtol=1e-6)
