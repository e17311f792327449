"""Resolve the arguments of calls that train: option objects, encoders, teacher and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from pekasc._options import NOT_STORED, Compute, Readout, Recipe, resolve, resolve_recipe, unused_in_embedding, whole
from pekasc._paths import check_no_file, folder_path
from pekasc._settings import get_logger
from pekasc.models import Encoder, Teacher
from pekasc.models.comparing import (
    BEST_FROZEN,
    HEST_PROTOCOLS,
    LAZY,
    RIVALS,
    Comparison,
    Rival,
    rival,
)
from pekasc.models.encoders import resolve_encoder
from pekasc.models.heads import check_head
from pekasc.models.runtime import autocast, processes, resolve_device
from pekasc.models.selection import HeadSpec, Options, fixed_radius
from pekasc.models.teachers import resolve_teacher
from pekasc.models.training import check_method, check_trainer, known_methods, method_name
from pekasc.tl._teachers import check_installed

logger = get_logger(__name__)

_FROZEN = "with `method=None` nothing is trained"
_ONE_DEPTH = "an adapter is trained at one depth"


@dataclass(frozen=True)
class FitCall:
    """The resolved arguments of a fit.

    Parameters
    ----------
    encoder, teacher
        Description of the encoder and of the teacher.
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
    """Resolve the arguments of a fit, and start the other processes of a fit on several devices.

    Raises
    ------
    TypeError, ValueError
        If an argument or a field is unknown, out of range, or does nothing in this call.
    """
    described, method = resolve_teacher(teacher), check_method(method)
    training, readout = resolve_recipe(recipe, readout, unused=unused_in_recipe(method, described))
    if method is not None and training.epochs == 0 and not training.choose_epochs:
        logger.hint("`recipe` trains no epoch: the frozen encoder is read.")
        method = None
    unused = {} if method is None else {"n_depths": _ONE_DEPTH}
    reading = resolve(readout, Readout, "readout", unused=unused)
    check_reading(reading, frozen=method is None)
    unused = {"client": "a fit runs in this process, or in those of `trainer`", **NOT_STORED}
    if method is None:
        # several devices share the embedding
        unused |= dict.fromkeys(unused_in_embedding().keys() - {"trainer"}, _FROZEN)
    how = resolve(compute, Compute, "compute", unused=unused)
    device, trainer = resolve_device(how.device), check_trainer(how.trainer)
    # last of the arguments: a warning about the encoder must not precede an error about another argument
    row = resolve_encoder(encoder)
    device, trainer = processes.launch(trainer, device)
    autocast(device, how.precision)
    options = Options(method, training, reading, how, device, (), random_state, progress, trainer)
    return FitCall(row, described, options)


def check_reading(readout: Readout, *, frozen: bool) -> None:
    """Check the head of a readout.

    Raises
    ------
    ValueError
        If there is no such head, or nothing of a blend is left for the frozen encoder.
    """
    if readout.head != "blend":
        check_head(readout.head)
    if frozen and not HeadSpec(readout).names(adapted=False):
        raise ValueError(
            f"`members={readout.members!r}` are all adapted, and {_FROZEN}: name a frozen one, or a method."
        )


_HERE, _KEPT = "a comparison runs in this process", "a comparison keeps its finished fits in `store=`"
UNUSED_IN_COMPARISON = {"client": _HERE, "trainer": _HERE, "resume": _KEPT, "checkpoint_minutes": _KEPT}


@dataclass(frozen=True)
class ComparisonCall:
    """The resolved arguments of a comparison."""

    methods: dict[str, Rival]
    encoders: list[Encoder]
    teacher: Teacher
    protocol: str
    seeds: tuple[int, ...]
    recipe: Recipe
    readouts: list[Readout]
    compute: Compute
    device: torch.device
    store: Path | None

    def shared_readouts(self) -> list[list[Readout]]:
        """Return the readouts grouped by training: those with the same features share one."""
        shared: dict[Any, list[Readout]] = {}
        for readout in self.readouts:
            # plain ridge chooses an adapter's depth, with as many components as the readout has
            alike = (readout.depth, readout.fields_um, readout.orientations, readout.stain, readout.n_components)
            shared.setdefault(alike, []).append(readout)
        return list(shared.values())

    def n_units(self, comparisons: Sequence[Comparison]) -> int:
        """Return the number of fits, for the progress bar."""
        return len(self.encoders) * sum(
            len(comparison.bench.folds) * len(comparison.seeds_of(name))
            for comparison in comparisons
            for name in self.methods
        )


def resolve_comparison(
    methods: Any, encoders: Any, teacher: Any, protocol: str, seeds: Any, recipe: Any, readout: Any, compute: Any,
    store: Any = None,
) -> ComparisonCall:  # fmt: skip
    """Resolve the arguments of a comparison.

    Raises
    ------
    ImportError
        If a teacher needs a package that is not installed.
    TypeError, ValueError
        If an argument or a field is unknown, out of range, or does nothing in this call.
    """
    rows = check_methods(methods, protocol)
    described = resolve_teacher(teacher)
    numbers = tuple(whole("seeds", seed) for seed in several(seeds))
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"`seeds={numbers}` must hold each seed once, and at least one.")
    unused = _unused_in_recipe(rows, described)
    if protocol in HEST_PROTOCOLS:  # which has a readout of its own: a recipe brings none
        training = resolve(recipe, Recipe, "recipe", unused=unused)
    else:
        training, readout = resolve_recipe(recipe, readout, unused=unused)
    readouts = _readouts(readout, rows, protocol)
    how = resolve(compute, Compute, "compute", unused=_unused_in_compute(rows))
    device = resolve_device(how.device)
    autocast(device, how.precision)
    found = [resolve_encoder(encoder) for encoder in several(encoders)]
    if not found:
        raise ValueError("`encoders=` is empty: name at least one, or leave it out.")
    if len({row.short for row in found}) < len(found):
        raise ValueError("`encoders=` names one twice; give `key=` to tell them apart: `Encoder(..., key=...)`.")
    if protocol in HEST_PROTOCOLS:
        # as HEST-Bench reads every encoder
        found = [replace(row, pooling="class") if row.pooling == "class+mean" else row for row in found]
    if any(row.reads_teacher for row in rows.values()):
        check_installed(described.name)
    path = None if store is None else folder_path("store", store)
    if path is not None:
        check_no_file("store", path)
    return ComparisonCall(rows, found, described, protocol, numbers, training, readouts, how, device, path)


def _unused_in_recipe(methods: Mapping[str, Rival], teacher: Teacher) -> dict[str, str]:
    trained = [row.trains for row in methods.values() if row.trains is not None]
    if not trained:
        unused = dict.fromkeys(unused_in_recipe(None, teacher), "no method of this comparison is trained")
        if any(row.reads_teacher for row in methods.values()) and teacher.name == "pca":
            del unused["teacher_components"]
        return unused
    per_method = [unused_in_recipe(method, teacher) for method in trained]
    return {name: reason for name, reason in per_method[0].items() if all(name in other for other in per_method)}


def _unused_in_compute(methods: Mapping[str, Rival]) -> dict[str, str]:
    unused = {**UNUSED_IN_COMPARISON, **NOT_STORED}
    if all(row.trains is None for row in methods.values()):
        unused |= {name: reason for name, reason in unused_in_embedding().items() if name != "cache"}
    return unused


def _readouts(readout: Any, methods: Mapping[str, Rival], protocol: str) -> list[Readout]:
    """Resolve the readouts of a comparison, and check that none is given twice."""
    given = list(readout) if isinstance(readout, Sequence) and not isinstance(readout, str) else [readout]
    unused = {}
    if all(row.name != BEST_FROZEN for row in methods.values()):
        unused["n_depths"] = 'only "frozen-best" concatenates several depths'
    if not any(row.reads_image for row in methods.values()):
        unused |= dict.fromkeys(
            ("depth", "selection", "n_depths", "fields_um", "orientations", "stain"), "no method reads the image"
        )
    if protocol in HEST_PROTOCOLS:
        unused |= dict.fromkeys(
            ("head", "head_rank", "members", "selection", "n_components", "n_depths", "depth", "smooth_um"),
            "HEST-Bench has a regression of its own",
        )
        unused |= dict.fromkeys(("fields_um", "orientations", "stain"), "HEST-Bench embeds every tile once, as it is")
        given = [{"context_um": None} if value is None else value for value in given]
    readouts = [
        resolve(value, Readout, "readout", unused={**_unused_depth(value, methods), **unused}) for value in given
    ]
    for value in readouts:
        check_reading(value, frozen=False)
    if protocol in HEST_PROTOCOLS:
        idle = sorted({name for value in readouts for name in value.changed() if name in unused})
        if idle:
            raise ValueError(f'`protocol="{protocol}"` has features and a regression of its own: leave {idle} out.')
        readouts = [
            value.replace(head="ridge", selection="best", depth="own", fields_um=None, context_um=fixed_radius(value))
            for value in readouts
        ]
    if not readouts or len(set(readouts)) < len(readouts):
        raise ValueError(f"`readout={readout!r}` must hold each readout once, and at least one.")
    return readouts


def _unused_depth(readout: Any, methods: Mapping[str, Rival]) -> dict[str, str]:
    """Return the depth with the reason, where it names blocks and no method is read at one."""
    depth = readout.get("depth") if isinstance(readout, Mapping) else getattr(readout, "depth", None)
    read = [row for row in methods.values() if row.reads_image and row.name not in (BEST_FROZEN, LAZY)]
    if depth in (None, "all", "best") or read:
        return {}
    return {"depth": '"frozen-best" reads all depths, or the best'}


def check_methods(methods: Any, protocol: str) -> dict[str, Rival]:
    """Look up the methods of a comparison in the registry of rivals.

    Raises
    ------
    ValueError
        If one is unknown, named twice, or not part of the protocol.
    """
    if protocol not in ("nested", *HEST_PROTOCOLS):
        raise ValueError(f'`protocol={protocol!r}` is not known. Choose "nested", "hest" or "hest-tuned".')
    given = methods if isinstance(methods, Mapping) else {_name(m): m for m in several(methods)}
    if not isinstance(methods, Mapping) and len(given) < len(several(methods)):
        raise ValueError(
            "`methods=` holds two of one name. Give a mapping from names: "
            '`methods={"lora r=8": LoraConfig(r=8), "lora r=64": LoraConfig(r=64)}`.'
        )
    out: dict[str, Rival] = {}
    for name, method in given.items():
        if method is None:
            raise ValueError(
                '`methods=`: None is the frozen encoder of `fit_adapter`; write "frozen" or "frozen-best" here.'
            )
        known = [*RIVALS, *known_methods()]
        if isinstance(method, str) and method not in known:
            raise RIVALS.unknown("methods", method, f"{list(known_methods())}, or a peft.PeftConfig", known_methods())
        row = rival(method)
        if protocol in HEST_PROTOCOLS and row.hest is None:
            raise ValueError(f'`protocol="{protocol}"` chooses nothing inside the fold, so it has no {method!r}.')
        out[str(name)] = row
    if not out:
        raise ValueError("`methods=` is empty: name at least one, or leave it out.")
    return out


def _name(method: Any) -> str:
    return method if isinstance(method, str) else "None" if method is None else method_name(check_method(method))


def several(values: Any) -> list[Any]:
    if values is None:
        raise TypeError("None is no list of methods, encoders or seeds: leave the argument out, or give some.")
    return [values] if isinstance(values, str | Encoder | PeftConfig | Integral) else list(values)
