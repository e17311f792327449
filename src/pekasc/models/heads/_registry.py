"""Registry of expression heads, and what every head does: try settings on inner folds, and fit with their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from pekasc.models.heads._fits import Inputs, RidgeFits, RidgePerGeneFits, Target, Tried
from pekasc.models.heads._linear import Block, LinearHead, Source, merged
from pekasc.models.heads._low_rank import LowRankFits
from pekasc.models.heads._panels import PanelFits
from pekasc.models.runtime import Registry


class HeadFits(Protocol):
    """A kind of head on one target, for the inputs of any number of depths."""

    @property
    def settings(self) -> Sequence[tuple[int | None, float]]:
        """Rank (None: no limit) and penalty of every setting."""
        ...

    @property
    def shares_output(self) -> bool:
        """Whether fits on different inputs share the map from scores to genes."""
        ...

    def tried(self, inputs: Inputs) -> Tried:
        """Fit on every inner fold."""
        ...

    def final(self, inputs: Inputs) -> Any:
        """Fit on all training spots."""
        ...

    def block(
        self, fit: Any, weights: np.ndarray, tried: Tried, fold: int | None, sources: Sequence[Source], *,
        context: bool,
    ) -> Block:  # fmt: skip
        """Return the prediction of a fit, for the weight of every setting."""
        ...

    def intercept(self, fold: int | None) -> np.ndarray:
        """Return the mean expression of the training spots of a fold, or of all, (genes,)."""
        ...


HEADS: Registry[Callable[[Target, int | None], HeadFits]] = Registry(
    "head", {"ridge": RidgeFits, "ridge-per-gene": RidgePerGeneFits, "low-rank": LowRankFits}
)


def check_head(head: str) -> Callable[[Target, int | None], HeadFits]:
    """Return the kind of head of that name.

    Raises
    ------
    ValueError
        If there is no head of that name.
    """
    return HEADS.find("head", head)


def head_fits(head: str, target: Target, n_components: int | None = None) -> HeadFits:
    """Return the head of that name on a target; where spots measured different genes, as many heads as it takes."""
    kind = check_head(head)
    if target.panels is None or getattr(kind, "takes_panels", False):
        return kind(target, n_components)
    return PanelFits(kind, target, n_components)


def linear_head(
    fits: HeadFits,
    tried: Sequence[Tried],
    weights: np.ndarray,
    sources: Sequence[Sequence[Source]],
    fitted: Sequence[Any],
    *,
    fold: int | None,
    context_um: float | None,
) -> LinearHead:
    """Return the weighted mean of fits at several depths, of one fold or of all training spots (`fold` None).

    Parameters
    ----------
    fits
        The kind of head on its target.
    tried, sources, fitted
        Per depth: its fits on inner folds, the features it reads, and the fit to use.
    weights
        Of every depth and setting, (depths, settings).
    fold, context_um
        Inner fold; radius of the spatial context.
    """
    blocks = [
        fits.block(fit, w, one, fold, names, context=context_um is not None)
        for one, fit, w, names in zip(tried, fitted, weights, sources, strict=True)
    ]
    if fits.shares_output and len(blocks) > 1:
        blocks = [merged(blocks)]
    return LinearHead(tuple(blocks), fits.intercept(fold).astype(np.float32), context_um)
