"""Intervals of a level, from scores of held-out groups. Pure arrays."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

import numpy as np

from pekasc._text import number
from pekasc.models.trust._conformal import groups_needed, quantiles_of_cumulative, reachable
from pekasc.models.trust._held_out import HeldOut
from pekasc.models.trust._noise import Noise

FEW_GROUPS = 5  # below which intervals say little about the next one
APPROXIMATE, EXACT = "approximate", "exact"
GUARANTEES = (APPROXIMATE, EXACT)
INSIDE, UNSEEN = "training groups, held out in turn", "groups that the adapter never saw"
# scores beyond this are where the distribution of counts has no more digits: any interval could be meant
_MOST = 1 - 1e-9


@dataclass(frozen=True, eq=False)
class Calibration:
    """Intervals around predictions.

    Parameters
    ----------
    noise
        What measured values are around predicted ones.
    threshold
        Score that a measurement of another group stays below with probability `level`, (genes,) float64; NaN for genes
        without an interval.
    level
        Probability that an interval holds the measurement.
    guarantee
        ``"exact"``: promised for a spot of a group that is exchangeable with the calibration groups.
        ``"approximate"``: what these groups say, with no promise.
    groups
        The groups that it is from.
    source
        Which groups these are.
    """

    noise: Noise
    threshold: np.ndarray
    level: float
    guarantee: str
    groups: tuple[str, ...]
    source: str

    @property
    def reachable(self) -> float:
        """Largest level that so many groups can promise."""
        return reachable(len(self.groups))

    @property
    def text(self) -> str:
        """The level, what it is from, and whether it is promised, in a line."""
        n, level = len(self.groups), percent(self.level)
        one = n == 1
        source = self.source.replace("groups", "group", 1) if one else self.source
        if self.guarantee == EXACT:
            return f"{level} intervals from {n} {source} (exact)"
        if one and self.source == INSIDE:
            return f"{level} intervals from held-out blocks of the one training group (approximate: of others, unknown)"
        most = f"{100 * self.reachable:.3g}%"
        return (
            f"{level} intervals from {n} {source} (approximate, no promise: {number(n, 'group')} could give "
            f"{most} at most)"
        )


def percent(level: float) -> str:
    """Return a level in percent, with as many digits as it has."""
    return f"{100 * level:.6g}%"


def check_level(level: float, guarantee: str) -> None:
    """Check a level and a guarantee.

    Raises
    ------
    ValueError
        If the level is not between 0 and 1, or the guarantee unknown.
    """
    if isinstance(level, bool | np.bool_) or not isinstance(level, Real) or not 0 < level < 1:
        raise ValueError(f"`level` must be above 0 and below 1, such as 0.9, got {level!r}.")
    if guarantee not in GUARANTEES:
        raise ValueError(f"`guarantee` must be one of {list(GUARANTEES)}, got {guarantee!r}.")


def check_groups(n_groups: int, level: float, guarantee: str) -> None:
    """Check that so many groups can promise a level.

    Raises
    ------
    ValueError
        If they cannot, and a promise is asked for.
    """
    if guarantee == EXACT and n_groups < groups_needed(level):
        raise ValueError(
            f'`level={level:g}` with `guarantee="exact"` needs at least {groups_needed(level)} groups that the adapter '
            f"never saw, got {n_groups}: K groups can guarantee K / (K + 1), here {reachable(n_groups):.3f}. Lower "
            '`level`, add groups, or take `guarantee="approximate"`, which promises nothing.'
        )


def from_held_out(held_out: HeldOut, level: float) -> Calibration:
    """Return intervals from what a fit kept of its held-out groups: cross-conformal, around the last fit.

    Scores of a group are by a model fitted without it, and by the mean and dispersion of other inner folds (Barber,
    Candes, Ramdas, Tibshirani. Predictive inference with the jackknife+. arXiv:1905.02928, of which this is the plain
    cross-conformal form). The last fit saw all groups, and the inner fits are few: nothing is promised.
    """
    threshold = usable(held_out.noise, quantiles_of_cumulative(held_out.cumulative.astype(np.float64), level))
    return Calibration(held_out.noise, threshold, float(level), APPROXIMATE, held_out.groups, INSIDE)


def usable(noise: Noise, threshold: np.ndarray) -> np.ndarray:
    """Return thresholds, (genes,); NaN, no interval, where none can be given.

    That is where groups are too few, a measurement lies beyond what counts can be told apart by, or values of another
    target did not vary around their predictions at all.
    """
    return np.where(noise.varies & (threshold <= _MOST), threshold, np.nan)
