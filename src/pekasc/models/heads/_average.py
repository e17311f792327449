"""Choose one setting by its held-out error, or average all of them with weights from it."""

from __future__ import annotations

import numpy as np

_SPREAD = 0.01  # of a few groups and a few hundred held-out spots
_GROUPS, _SPOTS = 3, 500
_LEAST = 1e-3  # of the largest weight: settings below it are left out


def spread(n_groups: int, n_spots: float) -> float:
    """Return the relative difference of held-out errors that says little: settings that close weigh nearly the same.

    It falls with the square root of the number of held-out groups and spots, and never far below what the scarcer of
    the two allows, so that with much of both the average comes to the best setting.

    Parameters
    ----------
    n_groups, n_spots
        Held-out groups and spots, of all inner folds.
    """
    return _SPREAD * float(np.sqrt((_GROUPS / n_groups + _SPOTS / n_spots) / 2))


def setting_weights(errors: np.ndarray, selection: str, temperature: float) -> np.ndarray:
    """Return the weight of every setting, of the shape of `errors`; they sum to 1.

    Parameters
    ----------
    errors
        Held-out error of every setting; NaN where it could not be tried.
    selection
        ``"best"`` gives the setting with the smallest error all weight; ``"average"`` weighs a setting by
        ``exp(-(error / smallest - 1) / temperature)``.
    temperature
        See :func:`spread`.
    """
    known = np.where(np.isfinite(errors), errors, np.inf)
    least = known.min()
    if selection == "best" or least <= 0:
        out = np.zeros(errors.shape)
        out.flat[int(known.argmin())] = 1.0
        return out
    out = np.exp(-(known / least - 1) / temperature)
    out[out < _LEAST] = 0.0
    return out / out.sum()
