"""Which trainings of a fit predict: the last one, those of the inner folds, or both; and their weights."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from peft import PeftConfig
from torch import Tensor

from pekasc._settings import get_logger
from pekasc.models.selection._state import Resume
from pekasc.models.training import Trained, kept_from

logger = get_logger(__name__)

KEPT = "adapters.pt"  # weights of an inner fold, in its folder of checkpoints


@dataclass(eq=False)
class Training:
    """Results of one training: by epoch, the features, the weights that are kept, and for an inner fold the errors.

    Those are the held-out error per penalty, one array per head.
    """

    features: dict[int, np.ndarray]
    errors: dict[int, list[np.ndarray]]
    history: list[dict[str, Any]]
    kept: Trained | None = None

    def adapter(self, epoch: int) -> tuple[PeftConfig, dict[str, dict[str, Tensor]]]:
        """Return configuration and weights after an epoch."""
        assert self.kept is not None  # for the type checker: this training is one of those that predict
        return self.kept.configs[epoch], self.kept.weights[epoch]


def predicting(refit: str, epoch: int, final: Training, runs: Sequence[Training]) -> Sequence[Training]:
    """Return the trainings whose adapters after `epoch` predict.

    Parameters
    ----------
    refit
        See :class:`pekasc.Recipe`.
    epoch
        The epoch that was chosen. After 0, all adapters are the same, and one of them predicts.
    final, runs
        The training on all spots, and those of the inner folds.
    """
    if refit == "last" or not epoch:
        return [final]
    found = runs if refit == "ensemble" else [final, *runs]
    logger.hint("The mean of %d adapters predicts, %d of them of inner folds.", len(found), len(runs))
    return found


def kept_of(resume: Resume, name: str, history: list[dict[str, Any]], keep: Collection[int]) -> Trained:
    """Return the weights that an earlier run kept of a finished training."""
    try:
        kept = kept_from(resume.content(name), history)
    except ValueError as error:
        raise ValueError(resume.damaged(f"{name}: {error}")) from error
    if kept.weights.keys() != {epoch for epoch in keep if epoch <= len(history)}:
        raise ValueError(resume.damaged(f"{name} holds weights of other epochs"))
    return kept
