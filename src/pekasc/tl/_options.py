"""What the arguments of a call that fits come to: options resolved, devices found, and what does nothing named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig

from pekasc._options import Compute, Readout, Recipe, resolve, resolve_recipe, unused_in_embedding
from pekasc.models import Encoder, Teacher
from pekasc.models.encoders import resolve_encoder
from pekasc.models.heads import check_head
from pekasc.models.runtime import autocast, processes, resolve_device
from pekasc.models.selection import Options
from pekasc.models.teachers import resolve_teacher
from pekasc.models.training import check_method, check_trainer

_FROZEN = "with `method=None` nothing is trained"
_ONE_DEPTH = "an adapter is trained at one depth"


@dataclass(frozen=True)
class FitCall:
    """A call that fits, resolved.

    Parameters
    ----------
    encoder, teacher
        Their rows.
    options
        Method, option objects and device.
    """

    encoder: Encoder
    teacher: Teacher
    options: Options


def unused_in_recipe(method: Any, teacher: Teacher) -> dict[str, str]:
    """Return the fields of `Recipe` that do nothing for a method and a teacher, with the reason."""
    if method is None:
        return dict.fromkeys(Recipe.__dataclass_fields__, _FROZEN)
    unused = {}
    if isinstance(method, PeftConfig):
        unused["rank"] = "a peft.PeftConfig has its own"
    if teacher.name != "pca":
        unused["teacher_components"] = f'`teacher="{teacher.name}"` has dimensions of its own'
    return unused


def resolve_fit(
    encoder: Any, teacher: Any, method: Any, recipe: Any, readout: Any, compute: Any, random_state: int, progress: bool
) -> FitCall:
    """Return what the arguments of a fit come to; processes are started where several devices are asked for.

    Raises
    ------
    TypeError, ValueError
        If an argument or a field is none, does not fit, or does nothing here.
    """
    row, described, method = resolve_encoder(encoder), resolve_teacher(teacher), check_method(method)
    training, readout = resolve_recipe(recipe, readout, unused=unused_in_recipe(method, described))
    unused = {} if method is None else {"n_depths": _ONE_DEPTH}
    reading = resolve(readout, Readout, "readout", unused=unused)
    check_head(reading.head)
    unused = {"client": "a fit runs in this process, or in those of `trainer`"}
    if method is None:
        unused |= dict.fromkeys(unused_in_embedding(), _FROZEN)
    how = resolve(compute, Compute, "compute", unused=unused)
    device, trainer = processes.launch(check_trainer(how.trainer), resolve_device(how.device))
    autocast(device, how.precision)
    options = Options(method, training, reading, how, device, random_state, progress, trainer)
    return FitCall(row, described, options)
