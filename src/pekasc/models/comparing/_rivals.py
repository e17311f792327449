"""Registry of the methods of a comparison, one row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import PeftConfig

from pekasc.models.comparing._fold import (
    Encoded,
    Fold,
    Prediction,
    predict_adapted,
    predict_adapted_hest,
    predict_coordinates,
    predict_frozen,
    predict_frozen_best,
    predict_frozen_hest,
    predict_lazy,
    predict_mean,
    predict_neighbours,
    predict_teacher,
    predict_teacher_hest,
)
from pekasc.models.runtime import Registry
from pekasc.models.selection import HeadSpec, Options
from pekasc.models.training import check_method, method_name

Predict = Callable[[Fold, Encoded, Options, Sequence[HeadSpec]], list[Prediction]]


@dataclass(frozen=True)
class Rival:
    """A method of a comparison.

    Parameters
    ----------
    name
        Name in the registry.
    predict
        Function that fits on the training spots of a fold and predicts the test spots, for every head.
    hest
        The same under the protocol of HEST-Bench; None if the method is not part of it.
    chosen
        Whether settings are chosen on inner folds.
    reads_image
        Whether it uses the tiles.
    reads_teacher
        Whether it needs a teacher.
    trains
        PEFT method that it trains; rivals with the same one share the training. None trains nothing.
    beside_frozen
        Whether frozen and adapted features are concatenated.
    """

    name: str
    predict: Predict
    hest: Predict | None = None
    chosen: bool = True
    reads_image: bool = True
    reads_teacher: bool = False
    trains: str | PeftConfig | None = None
    beside_frozen: bool = False


def adapter_rival(
    method: str | PeftConfig, *, name: str | None = None, beside_frozen: bool = False, in_hest: bool = True
) -> Rival:
    """Return the rival that trains a PEFT method."""

    def predict(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
        return predict_adapted(fold, encoded, method, options, heads)

    def hest(fold: Fold, encoded: Encoded, options: Options, heads: Sequence[HeadSpec]) -> list[Prediction]:
        return predict_adapted_hest(fold, encoded, method, options, heads)

    return Rival(
        name or method_name(method), predict, hest if in_hest else None, reads_teacher=True, trains=method,
        beside_frozen=beside_frozen,
    )  # fmt: skip


LAZY = "lazy"  # reads the last block
BEST_FROZEN = "frozen-best"  # the baseline of every difference

RIVALS: Registry[Rival] = Registry("rival")
for _row in (
    Rival("mean", predict_mean, predict_mean, chosen=False, reads_image=False),
    Rival("coordinates", predict_coordinates, reads_image=False),
    Rival("neighbours", predict_neighbours, predict_neighbours, chosen=False, reads_image=False),
    Rival("teacher", predict_teacher, predict_teacher_hest, reads_image=False, reads_teacher=True),
    Rival(LAZY, predict_lazy, chosen=False),
    Rival("frozen", predict_frozen, predict_frozen_hest),
    Rival(BEST_FROZEN, predict_frozen_best),
    adapter_rival("bone", name="frozen+peka", beside_frozen=True, in_hest=False),
):
    RIVALS.register(_row.name, _row)


def rival(method: str | PeftConfig) -> Rival:
    """Return the rival of that name, or the one that trains a PEFT method.

    Raises
    ------
    TypeError, ValueError
        If it is neither the name of a rival nor a PEFT method.
    """
    if isinstance(method, str) and method in RIVALS:
        return RIVALS[method]
    checked = check_method(method)
    assert checked is not None  # for the type checker: None is no method of a comparison
    return adapter_rival(checked)
