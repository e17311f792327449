"""From features to genes: choose depth and penalty on held-out groups, then fit the head on all training spots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pekasc._expression import Matrix
from pekasc.models.encoders import Depth, features_at
from pekasc.models.heads import FoldData, Head, check_head, with_context
from pekasc.models.runtime import processes
from pekasc.models.selection._choice import Choice, choose
from pekasc.models.selection._folds import InnerFold
from pekasc.models.selection._inputs import Data, HeadSpec


@dataclass(frozen=True)
class Reading:
    """A head fitted on the features of the chosen depth.

    Parameters
    ----------
    depth
        The block(s).
    head, setting
        The fitted head, and its setting (penalty or penalties).
    inner
        Features and expression of every inner fold, on which the setting was chosen.
    table
        Candidates: columns depth, alpha, error.
    """

    depth: Depth
    head: Head
    setting: Any
    inner: Sequence[FoldData]
    table: pd.DataFrame


def head_inputs(
    spec: HeadSpec,
    data: Data,
    features: np.ndarray,
    frozen: np.ndarray | None = None,
    fold: InnerFold | None = None,
) -> np.ndarray:
    """Return the inputs of a head for the training spots: features with their spatial context.

    Parameters
    ----------
    spec
        The head.
    data
        The training spots.
    features
        Features of the spots, (n, d).
    frozen
        Frozen features of the spots, for a head that uses both.
    fold
        An inner fold, across which there is no spatial context; None for all training spots.
    """
    if spec.beside_frozen and frozen is not None:
        features = np.concatenate([frozen, features], axis=1)
    return with_context(features, data.coords_um, data.sections, spec.context_um, fold)


def choose_depth(
    features: Mapping[Depth, np.ndarray],
    data: Data,
    folds: Sequence[InnerFold],
    spec: HeadSpec,
    n_components: int | None,
    n_depths: int = 1,
) -> Choice:
    """Return the depth with the smallest held-out error for a head, the same in every process."""
    inputs = None
    if spec.context_um is not None:

        def inputs(x: np.ndarray, fold: InnerFold) -> np.ndarray:
            return head_inputs(spec, data, x, fold=fold)

    return processes.broadcast(choose(features, data.expression, folds, n_components, inputs, n_depths))


def fit_head(
    spec: HeadSpec,
    inner: Sequence[FoldData],
    inputs: np.ndarray,
    expression: Matrix,
    n_components: int | None,
    random_state: int,
) -> tuple[Head, Any]:
    """Choose the setting of a head on the inner folds and fit it on all training spots; return both.

    Parameters
    ----------
    spec
        The head.
    inner
        Inputs and expression of every inner fold, see :func:`head_inputs`.
    inputs, expression
        Inputs and target for all training spots.
    n_components, random_state
        See :class:`pekasc.Readout`.
    """
    method = check_head(spec.head)
    setting = method.choose(inner, n_components, random_state)
    return method.fit(inputs, expression, n_components, setting, random_state), setting


def read_features(
    features: Mapping[Depth, np.ndarray],
    data: Data,
    folds: Sequence[InnerFold],
    spec: HeadSpec,
    n_components: int | None,
    *,
    n_depths: int = 1,
    random_state: int = 0,
) -> Reading:
    """Choose depth and penalty on held-out groups and fit the head, by the same rule for every method.

    Parameters
    ----------
    features
        Features of all training spots by depth, of which one is chosen, or several to concatenate.
    data
        The training spots.
    folds
        Inner folds.
    spec
        The head.
    n_components
        Principal components of the features.
    n_depths
        Maximum number of depths to concatenate.
    random_state
        Seed.
    """
    choice = choose_depth(features, data, folds, spec, n_components, n_depths)
    x = features_at(features, choice.depth)
    inner = [FoldData(head_inputs(spec, data, x, fold=fold), data.expression, fold) for fold in folds]
    head, setting = fit_head(spec, inner, head_inputs(spec, data, x), data.expression, n_components, random_state)
    return Reading(choice.depth, head, setting, inner, choice.table)
