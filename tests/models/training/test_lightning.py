"""Arguments of a Lightning trainer: which may be given, and what the recipe says in their place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, Timer

from pekasc._options import Recipe
from pekasc.models.training._lightning import Engine, _trainer, as_list, check_starts, check_trainer

ENGINE = Engine(torch.device("cpu"), "fp32", progress=False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"device": 2}, TypeError, r"lightning.Trainer knows no \['device'\].*'devices'"),
        ({"epochs": 2}, TypeError, r"lightning.Trainer knows no \['epochs'\]"),
        ({"max_epochs": 2}, ValueError, r"'max_epochs' is set by pekasc: give `Recipe\.epochs`\."),
        ({"accumulate_grad_batches": 2}, ValueError, r"give `Compute\.accumulate`\."),
        ({"enable_checkpointing": True}, ValueError, r"give `Compute\.resume`\."),
        ({"limit_train_batches": 2}, ValueError, r"leave it out"),
        (
            {"precision": "bf16-true"},
            ValueError,
            r"precision='bf16-true' would change .*`Compute\(precision=\"bf16\"\)`",
        ),
        ({"callbacks": "x"}, TypeError, r"callbacks must be lightning.Callback, got str"),
        ({"callbacks": [EarlyStopping("loss")]}, ValueError, r"EarlyStopping .*: give `Recipe\.patience`\."),
        ({"callbacks": Timer("00:00:01:00")}, ValueError, r"Timer would change what is learned: .* `Recipe\.epochs`\."),
        (
            {"callbacks": GradientAccumulationScheduler({0: 2})},
            ValueError,
            r"GradientAccumulationScheduler would change what is learned: give `Compute\.accumulate`",
        ),
        ({"logger": "x"}, TypeError, r"logger must be lightning's Logger, several, or False, got 'x'"),
        ({"logger": [True]}, TypeError, r"logger must be lightning's Logger, several, or False, got True"),
    ],
)
def test_arguments_of_a_trainer_that_do_not_fit(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_trainer(given)


def test_arguments_that_fit_pass() -> None:
    assert check_trainer(None) == {}
    given = {"logger": False, "precision": "bf16-mixed", "devices": 1}
    assert check_trainer(given) == given
    assert as_list(None) == [] and as_list("one") == ["one"] and as_list(("a", "b")) == ["a", "b"]


def test_what_lightning_does_not_take_is_refused_before_any_work() -> None:
    engine = replace(ENGINE, trainer={"gradient_clip_val": "x"})
    with pytest.raises(ValueError, match=r"`trainer`: Lightning rejects .*gradient_clip_val"):
        check_starts(engine, Recipe())
    check_starts(replace(ENGINE, trainer={"logger": False}), Recipe())


def test_the_recipe_and_the_engine_set_the_trainer() -> None:
    made = _trainer(replace(ENGINE, accumulate=3, precision="bf16"), Recipe(gradient_clip=0.7), 5, [])
    assert (made.max_epochs, made.accumulate_grad_batches, made.gradient_clip_val) == (5, 3, 0.7)
    assert made.precision == "bf16-mixed"
    # but the user's arguments come first
    with pytest.raises(ValueError, match=r"'gradient_clip_val' is set by pekasc: give `Recipe.gradient_clip`"):
        check_trainer({"gradient_clip_val": 0.1})
