"""Ridge where sections measured different genes: a fit for each set of genes that the same spots measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pekasc._panels import LEAST_SPOTS
from pekasc.models.heads._fits import Inputs, Target, Tried, relative
from pekasc.models.heads._linear import Block, Source, beside


@dataclass(frozen=True)
class _Split:
    train: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class _Part:
    """One set of genes.

    Parameters
    ----------
    genes, rows
        The genes, and the spots that measured them.
    numbers, folds
        Inner folds in which they can be learned: which, and their spots among these.
    fits
        The head on these genes and spots.
    """

    genes: np.ndarray
    rows: np.ndarray
    numbers: list[int]
    folds: list[_Split]
    fits: Any

    @property
    def held_out(self) -> bool:
        """Whether the genes are held out in a fold in which they can be learned."""
        return any(len(fold.held_out) for fold in self.folds)

    def inputs(self, inputs: Inputs) -> Inputs:
        """Return the inputs of these spots, in the folds in which the genes can be learned."""
        fold = inputs.fold
        return Inputs(
            lambda: inputs.whole()[self.rows], None if fold is None else lambda i: fold(self.numbers[i])[self.rows]
        )


def _nothing(n_settings: int) -> Tried:
    """Return what is known of genes that can be learned in no inner fold."""
    return Tried([], np.ones((0, n_settings)), squares=np.zeros(0))


class PanelFits:
    """A head on every set of genes that the same spots measured, fitted on these spots alone.

    The features of each are standardised and projected anew: principal components are uncorrelated, and ridge in closed
    form, on the spots that they were found on only.
    """

    shares_output = False
    takes_panels = True

    def __init__(self, kind: Callable[..., Any], target: Target, n_components: int | None = None) -> None:
        assert target.panels is not None  # for the type checker
        self.n_genes, self.n_folds = target.expression.shape[1], len(target.folds)
        self.parts: list[_Part] = []
        for genes, rows in target.panels.patterns():
            splits = [
                _Split(*(np.flatnonzero(np.isin(rows, part)) for part in (fold.train, fold.held_out)))
                for fold in target.folds
            ]
            numbers = [i for i, split in enumerate(splits) if len(split.train) >= LEAST_SPOTS]
            folds = [splits[i] for i in numbers]
            # fewer spots than the head has on all
            least = min([len(rows), *(len(fold.train) for fold in folds)]) - 1
            k = None if n_components is None else max(1, min(n_components, least))
            fits = kind(Target(target.expression[rows][:, genes], folds), k)
            self.parts.append(_Part(genes, rows, numbers, folds, fits))
        self.settings = self.parts[0].fits.settings

    def tried(self, inputs: Inputs) -> Tried:
        """Fit on every inner fold; errors are over the genes that training and held-out spots of a fold measured."""
        n = len(self.settings)
        errors, squares = np.zeros((self.n_folds, n)), np.full(self.n_folds, np.nan)
        found = [part.fits.tried(part.inputs(inputs)) if part.numbers else _nothing(n) for part in self.parts]
        penalties = [
            one.alphas for part, one in zip(self.parts, found, strict=True) if part.held_out and one.alphas is not None
        ]
        parts, by_fold = [], list[list[Any]]([] for _ in range(self.n_folds))
        for part, one in zip(self.parts, found, strict=True):
            if not part.held_out and penalties:
                # a penalty per gene: that of the others, since none could be chosen
                typical = np.exp(np.log(np.concatenate(penalties)).mean())
                one = replace(one, alphas=np.full(len(part.genes), typical))
            assert one.squares is not None  # for the type checker
            for i, split, error, square in zip(part.numbers, part.folds, one.errors, one.squares, strict=True):
                if len(split.held_out):
                    errors[i] += error * square
                    squares[i] = np.nansum([squares[i], square])
            parts.append(one)
            fits = dict(zip(part.numbers, one.folds, strict=True))
            for i, own in enumerate(by_fold):
                own.append(fits.get(i))
        relative_errors = np.where(np.isnan(squares)[:, None], np.nan, relative(errors, squares))
        return Tried(by_fold, relative_errors, squares=squares, parts=parts)

    def final(self, inputs: Inputs) -> list[Any]:
        """Fit on all training spots."""
        return [part.fits.final(part.inputs(inputs)) for part in self.parts]

    def block(
        self, fit: Sequence[Any], weights: np.ndarray, tried: Tried, fold: int | None, sources: Sequence[Source], *,
        context: bool,
    ) -> Block:  # fmt: skip
        """Return the prediction of the fits of all parts; genes that cannot be learned in a fold get none."""
        made = [
            (part.fits.block(own, weights, one, None, sources, context=context), part.genes)
            for part, own, one in zip(self.parts, fit, tried.parts, strict=True)
            if own is not None
        ]
        return beside(made, self.n_genes)

    def intercept(self, fold: int | None) -> np.ndarray:
        """Return the mean expression over the training spots that measured a gene, (genes,); 0 where none did."""
        out = np.zeros(self.n_genes)
        for part in self.parts:
            if fold is None or fold in part.numbers:
                out[part.genes] = part.fits.intercept(None if fold is None else part.numbers.index(fold))
        return out
