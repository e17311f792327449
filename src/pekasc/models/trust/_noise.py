"""What measured values are around predicted ones: counts around a rate, or residuals on the scale of the prediction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pekasc._expression import SCALE
from pekasc.models.trust._counts import quantiles, rate_factors, steps

COUNTS, RESIDUALS = "counts", "residuals"
_MANY = 20_000.0  # counts, whose own spread is 0.7 %
FLOOR = 0.05  # of a gene's mean rate: a linear head predicts less than nothing here and there


@dataclass(frozen=True, eq=False)
class Noise:
    """Distribution of a measured value around its prediction, gene by gene.

    Counts are negative binomial: their mean is the predicted rate times the spot's total and `scale`, their variance
    mean + `spread` * mean^2. Without the counting, the rate itself is gamma distributed with that `spread`. Values of
    another target lie around the prediction by `spread`, their root mean squared residual.

    Parameters
    ----------
    kind
        ``"counts"`` or ``"residuals"``.
    scale
        Measured over predicted mean (the mean of a logarithm is not the logarithm of the mean), (genes,) float64.
    spread
        Dispersion, or root mean squared residual, (genes,) float64.
    floor
        Least rate in counts per 10,000, (genes,) float64.
    """

    kind: str
    scale: np.ndarray
    spread: np.ndarray
    floor: np.ndarray

    def take(self, genes: np.ndarray | slice) -> Noise:
        """Return the noise of some genes."""
        return Noise(self.kind, self.scale[genes], self.spread[genes], self.floor[genes])

    @property
    def varies(self) -> np.ndarray:
        """Whether measured values vary around predictions at all, (genes,) bool."""
        if self.kind == COUNTS:
            return np.ones(len(self.spread), dtype=bool)
        return self.spread > 1e-6 * np.median(self.spread, axis=0)

    def rates(self, predicted: np.ndarray) -> np.ndarray:
        """Return the expected rate in counts per 10,000, (n, genes) float64."""
        return self.scale * np.maximum(np.expm1(predicted.astype(np.float64)), self.floor)

    def means(self, predicted: np.ndarray, totals: np.ndarray) -> np.ndarray:
        """Return expected counts, (n, genes) float64, at the total of every spot, (n,)."""
        return self.rates(predicted) * (totals[:, None] / SCALE)

    def scores(self, predicted: np.ndarray, measured: np.ndarray, totals: np.ndarray | None) -> np.ndarray:
        """Return the ends of what the score of every measurement is drawn from, (2, n, genes) float64.

        A score s in [0, 1] says that the measurement lies on the edge of the central interval of probability s. Of
        counts it is |2 F - 1|, with F drawn within the step of the distribution function, whose ends these are; of
        residuals |r| / (|r| + spread), twice.
        """
        if self.kind == RESIDUALS:
            size = np.abs(measured.astype(np.float64) - predicted)
            score = size / (size + self.spread)
            return np.stack([score, score])
        assert totals is not None  # for the type checker: counts have totals
        below, mass = steps(whole(measured), self.means(predicted, totals), self.spread)
        return np.stack([below, below + mass])

    def central(self, ends: np.ndarray) -> np.ndarray:
        """Return the ends on the scale of a distribution function, where a score s lies at (1 + s) / 2."""
        return ends if self.kind == COUNTS else (1 + ends) / 2

    def drawn(self, ends: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return one score of every measurement, (n, genes), drawn between its ends where they are of counts."""
        if self.kind == RESIDUALS:
            return ends[0]
        return np.abs(2 * (ends[0] + random.random(ends[0].shape) * (ends[1] - ends[0])) - 1)

    def share_within(self, ends: np.ndarray, threshold: np.ndarray) -> np.ndarray:
        """Return the probability that the score of a measurement is at most `threshold`, (genes,); (n, genes)."""
        if self.kind == RESIDUALS:
            return (ends[0] <= threshold).astype(np.float64)
        low = np.maximum(ends[0], (1 - threshold) / 2)
        high = np.minimum(ends[1], (1 + threshold) / 2)
        width = ends[1] - ends[0]
        return np.divide(np.maximum(high - low, 0), width, out=(high >= low).astype(np.float64), where=width > 0)

    def covered(self, ends: np.ndarray, threshold: np.ndarray) -> np.ndarray:
        """Return whether measurements lie in the closed interval, (n, genes) bool."""
        if self.kind == RESIDUALS:
            return np.asarray(ends[0] <= threshold)
        return np.asarray((ends[1] >= (1 - threshold) / 2 - 1e-12) & (ends[0] < (1 + threshold) / 2))

    def rate_bounds(self, predicted: np.ndarray, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the interval of the rate on the scale of the prediction, (n, genes) float32 each."""
        if self.kind == RESIDUALS:
            return self._around(predicted, threshold)
        rates = self.rates(predicted)
        low, high = rate_factors((1 - threshold) / 2, self.spread), rate_factors((1 + threshold) / 2, self.spread)
        return np.log1p(rates * low).astype(np.float32), np.log1p(rates * high).astype(np.float32)

    def measurement_bounds(
        self, predicted: np.ndarray, threshold: np.ndarray, totals: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the interval of a measurement at the total of every spot, on the scale of the prediction."""
        if self.kind == RESIDUALS:
            return self._around(predicted, threshold)
        assert totals is not None  # for the type checker: counts have totals
        mean = self.means(predicted, totals)
        known = np.isfinite(threshold) & np.isfinite(mean)  # not without a total, either
        bounds = []
        for probability in ((1 - threshold) / 2, (1 + threshold) / 2):
            at = np.where(np.isfinite(probability), np.minimum(probability, 1 - 1e-12), 0.5)
            # of many counts, drawing them adds next to nothing to the rate
            many = known & (mean > _MANY)
            counts = quantiles(at, np.where(known & ~many, mean, 0.0), self.spread)
            counts = np.where(many, mean * rate_factors(at, self.spread), counts)
            values = np.log1p(counts * (SCALE / totals[:, None]))
            bounds.append(np.where(known, values, np.nan).astype(np.float32))
        return bounds[0], bounds[1]

    def _around(self, predicted: np.ndarray, threshold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = self.spread * threshold / np.maximum(1 - threshold, 1e-12)
        return (predicted - size).astype(np.float32), (predicted + size).astype(np.float32)


def whole(counts: np.ndarray) -> np.ndarray:
    """Return counts as whole numbers, int64: log1p of float32 and back leaves rounding."""
    return np.maximum(np.rint(counts), 0).astype(np.int64)


def counts_of(expression: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return the counts of log1p(1e4 * count / total), (n, genes) float64."""
    return np.asarray(np.rint(np.expm1(expression.astype(np.float64)) * (totals[:, None] / SCALE)))
