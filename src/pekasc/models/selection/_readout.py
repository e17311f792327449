"""Features to genes, by one rule: depth and penalty from held-out groups, then one fit on all training spots."""

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
    """A head fitted on the features of the depth that the held-out error chose.

    Parameters
    ----------
    depth
        The block(s).
    head, setting
        The fitted head, and its setting (penalty or penalties).
    inner
        What it was chosen on, one entry per inner fold.
    table
        What was tried: columns depth, alpha, error.
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
    """Return what a head reads of the training spots: features with their context, on their side of an inner fold.

    Parameters
    ----------
    spec
        The head.
    data
        The training spots.
    features
        Their features, (n, d).
    frozen
        Their frozen features, for a head that reads both.
    fold
        The inner fold; None for all training spots together.
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
    """Return the depth with the smallest held-out error of what a head reads; the same in every process."""
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
    """Return the head fitted on all training spots, and its setting, which the inner folds chose.

    Parameters
    ----------
    spec
        The head.
    inner
        What it reads in every inner fold, see :func:`head_inputs`.
    inputs, expression
        What it reads of all training spots, and what it learns.
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
    """Choose depth and penalty on held-out groups and fit the head: the one rule for whatever has features.

    Parameters
    ----------
    features
        Features of all training spots by depth, from which one is chosen, or several side by side.
    data
        The training spots.
    folds
        Inner folds.
    spec
        The head.
    n_components
        Principal components that it reads.
    n_depths
        Most depths whose features are concatenated.
    random_state
        Seed.
    """
    choice = choose_depth(features, data, folds, spec, n_components, n_depths)
    x = features_at(features, choice.depth)
    inner = [FoldData(head_inputs(spec, data, x, fold=fold), data.expression, fold) for fold in folds]
    head, setting = fit_head(spec, inner, head_inputs(spec, data, x), data.expression, n_components, random_state)
    return Reading(choice.depth, head, setting, inner, choice.table)
