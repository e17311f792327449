"""What an adapter knows of its own errors, in its folder: a record, and arrays by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pekasc.models.trust import EDGES, Calibration, Distance, Faults, HeldOut, Noise, Novelty, no_faults

PARTS = ("held_out", "novelty", "calibration")
_NOISE = ("scale", "spread", "floor")
KIND = "trust"
Trust = tuple[HeldOut | None, Novelty | None, Calibration | None]


def _name(*parts: str) -> str:
    return ".".join((KIND, *parts))


def trust_parts(
    held_out: HeldOut | None, novelty: Novelty | None, calibration: Calibration | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a record of what an adapter knows of its errors, and arrays."""
    record: dict[str, Any] = dict.fromkeys(PARTS)
    arrays: dict[str, np.ndarray] = {}
    for name, part in (("held_out", held_out), ("calibration", calibration)):
        if part is not None:
            arrays |= {_name(name, field): getattr(part.noise, field) for field in _NOISE}
    if held_out is not None:
        record["held_out"] = {"kind": held_out.noise.kind, "groups": list(held_out.groups)}
        arrays |= {_name("held_out", "cumulative"): held_out.cumulative, _name("held_out", "curve"): held_out.curve}
    if novelty is not None:
        depths = [None if depth is None else list(depth) for depth in novelty.depths]
        d = novelty.distance
        record["novelty"] = {
            "depths": depths, "rest": d.rest, "n_tiles": list(novelty.n_tiles), "faults": list(d.faults.names),
            "scale": d.scale,
        }  # fmt: skip
        found = {"centre": d.centre, "axes": d.axes, "sd": d.sd, "reference": novelty.reference}
        if d.faults.names:
            found |= {"weights": d.faults.weights, "offset": d.faults.offset}
        arrays |= {_name("novelty", name): array for name, array in found.items()}
    if calibration is not None:
        record["calibration"] = {
            "kind": calibration.noise.kind, "level": calibration.level, "guarantee": calibration.guarantee,
            "groups": list(calibration.groups), "source": calibration.source,
        }  # fmt: skip
        arrays[_name("calibration", "threshold")] = calibration.threshold
    return record, {name: np.array(array) for name, array in arrays.items()}


def trust_from(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Trust:
    """Return what :func:`trust_parts` took apart."""

    def noise(name: str) -> Noise:
        return Noise(record[name]["kind"], *(arrays[_name(name, field)] for field in _NOISE))

    held_out = novelty = calibration = None
    if (part := record["held_out"]) is not None:
        cumulative, curve = arrays[_name("held_out", "cumulative")], arrays[_name("held_out", "curve")]
        held_out = HeldOut(noise("held_out"), cumulative, curve, tuple(part["groups"]))
    if (part := record["novelty"]) is not None:
        depths = tuple(None if depth is None else tuple(depth) for depth in part["depths"])
        centre, axes, sd, reference = (arrays[_name("novelty", n)] for n in ("centre", "axes", "sd", "reference"))
        faults = no_faults(len(centre))
        if names := tuple(part["faults"]):
            faults = Faults(names, arrays[_name("novelty", "weights")], arrays[_name("novelty", "offset")])
        distance = Distance(centre, axes, sd, part["rest"], faults, part["scale"])
        novelty = Novelty(depths, distance, reference, tuple(part["n_tiles"]))
    if (part := record["calibration"]) is not None:
        calibration = Calibration(
            noise("calibration"), arrays[_name("calibration", "threshold")], part["level"], part["guarantee"],
            tuple(part["groups"]), part["source"],
        )  # fmt: skip
    return held_out, novelty, calibration


def check_trust(record: Mapping[str, Any], n_genes: int, arrays: Mapping[str, Any]) -> None:
    """Check the arrays against the record, whose fields have been checked.

    Raises
    ------
    ValueError
        Naming the array that is wrong.
    """
    values = {name: array.numpy() for name, array in arrays.items() if name.startswith(f"{KIND}.")}
    expected: set[str] = set()

    def check(name: str, shape: tuple[int | None, ...], dtype: str, *, low: float, high: float = np.inf,
              strict: bool = False, nan: bool = False) -> None:  # fmt: skip
        expected.add(name)
        if name not in values:
            raise ValueError(f"{name} is missing")
        array = values[name]
        fits = len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
        if not fits or array.dtype != dtype or not array.size:
            raise ValueError(f"{name} must be {dtype} of shape {shape}, got {array.dtype} of shape {array.shape}")
        known = array[np.isfinite(array)] if nan else array
        if (nan and np.isinf(array).any()) or not np.isfinite(known).all() or (known > high).any():
            finite = "finite or NaN" if nan else "finite"
            raise ValueError(f"{name} must be {finite}" + (f", and at most {high:g}" if np.isfinite(high) else ""))
        if (known < low).any() or (strict and (known <= low).any()):
            raise ValueError(f"{name} must be {'above' if strict else 'at least'} {low:g}")

    for part in ("held_out", "calibration"):
        if record[part] is not None:
            check(_name(part, "scale"), (n_genes,), "float64", low=0, strict=True)
            check(_name(part, "spread"), (n_genes,), "float64", low=0, strict=True)
            check(_name(part, "floor"), (n_genes,), "float64", low=0)
    if record["held_out"] is not None:
        n_groups = len(record["held_out"]["groups"])
        check(_name("held_out", "cumulative"), (n_genes, len(EDGES)), "float32", low=0, high=1 + 1e-5, nan=True)
        check(_name("held_out", "curve"), (n_groups, len(EDGES)), "float32", low=0, high=1 + 1e-5, nan=True)
    if record["calibration"] is not None:
        check(_name("calibration", "threshold"), (n_genes,), "float64", low=0, high=1, nan=True)
    if record["novelty"] is not None:
        check(_name("novelty", "centre"), (None,), "float32", low=-np.inf)
        d = values[_name("novelty", "centre")].shape[0]
        if d % len(record["novelty"]["depths"]):
            n = len(record["novelty"]["depths"])
            raise ValueError(f"{_name('novelty', 'centre')} has {d} features, not a multiple of its {n} depths")
        check(_name("novelty", "sd"), (None,), "float32", low=0, strict=True)
        check(_name("novelty", "axes"), (values[_name("novelty", "sd")].shape[0], d), "float32", low=-np.inf)
        check(_name("novelty", "reference"), (len(record["novelty"]["n_tiles"]), None), "float32", low=0)
        if (np.diff(values[_name("novelty", "reference")]) < 0).any():
            raise ValueError(f"{_name('novelty', 'reference')} must be ascending")
        if n_faults := len(record["novelty"]["faults"]):
            check(_name("novelty", "weights"), (n_faults, d), "float32", low=-np.inf)
            check(_name("novelty", "offset"), (n_faults,), "float32", low=-np.inf)
    if left := sorted(set(values) - expected):
        raise ValueError(f"{left[0]} is not part of an adapter")
