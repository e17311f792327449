"""What a user's arguments say about how to train, checked: shared by the calls that fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any

import numpy as np

from pekasc.models._choose import Depth
from pekasc.models._embed import ORIENTATIONS
from pekasc.models._encoders import depth_tuple
from pekasc.models._peka import PAPER, Recipe
from pekasc.models._prefix import KINDS
from pekasc.tiling import TileSpec


def make_recipe(preset: str | None, **changes: Any) -> Recipe:
    """Return the numbers of the training: the default ones or a preset, with single ones changed."""
    if preset not in (None, "paper"):
        raise ValueError(f'`preset={preset!r}` is not known: give "paper" or None.')
    given = {k: v for k, v in changes.items() if v is not None}
    for name in given.keys() & {"rank", "n_clusters", "epochs", "n_views", "patience"}:
        given[name] = whole(name, given[name])
    recipe = replace(PAPER if preset else Recipe(), **given)
    for name in ("rank", "epochs", "learning_rate", "temperature"):
        if getattr(recipe, name) <= 0 and not (name == "epochs" and recipe.epochs == 0):
            raise ValueError(f"`{name}={getattr(recipe, name)}` must be positive.")
    if not 0 <= recipe.matching_weight < float("inf"):
        raise ValueError(f"`matching_weight={recipe.matching_weight}` must be 0 or a positive number.")
    if recipe.n_views not in ORIENTATIONS:
        raise ValueError(f"`n_views={recipe.n_views}` must be one of {list(ORIENTATIONS)}.")
    if recipe.patience is not None and recipe.patience < 1:
        raise ValueError(f"`patience={recipe.patience}` must be positive, or None to run all epochs.")
    if not 0 <= recipe.kd_weight <= 1:
        raise ValueError(f"`kd_weight={recipe.kd_weight}` must lie between 0 and 1.")
    return recipe


def whole(name: str, value: Any) -> int:
    """Return a whole number, whatever its type."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
    return int(value)


def wanted_blocks(blocks: Any) -> Any:
    """Return a number of blocks as an int, whatever its type; anything else as it is."""
    return int(blocks) if isinstance(blocks, Integral) and not isinstance(blocks, bool) else blocks


def check_engine(prefix: Any, accumulate: Any, checkpoint_minutes: Any) -> None:
    """Check how a training is to run."""
    if prefix is not None and prefix not in KINDS:
        raise ValueError(f"`prefix={prefix!r}` is not known: give one of {list(KINDS)}, or None to keep nothing.")
    if whole("accumulate", accumulate) < 1:
        raise ValueError(f"`accumulate={accumulate}` must be positive.")
    if not isinstance(checkpoint_minutes, Real) or not 0 <= float(checkpoint_minutes) < float("inf"):
        raise ValueError(f"`checkpoint_minutes={checkpoint_minutes!r}` must be a number of minutes, 0 or more.")


def check_context(context_um: Any) -> None:
    """Check that a radius is None or a positive number; whether it finds neighbours is seen when spots are read."""
    if context_um is not None and not (isinstance(context_um, Real) and 0 < float(context_um) < float("inf")):
        raise ValueError(f"`context_um={context_um!r}` must be a positive radius in um, or None.")


def check_scales(scales: Any) -> tuple[float, ...]:
    """Return the multiples of a tile's pixel size at which it is read: 1, the tile itself, and further ones."""
    values = list(scales) if isinstance(scales, Sequence | np.ndarray) and not isinstance(scales, str) else []
    good = all(isinstance(v, Real) and not isinstance(v, bool) and 0 < float(v) < float("inf") for v in values)
    if not good or values[:1] != [1] or len(set(values)) < len(values):
        raise ValueError(
            f"`scales={scales!r}` must be multiples of the tile's pixel size, 1 (the tile itself) before the others, "
            "each once: `scales=(1, 2)` also reads tiles of twice the field of view."
        )
    return tuple(float(value) for value in values)


def check_batch_size(batch_size: Any) -> int:
    """Return the number of tiles at once."""
    number = whole("batch_size", batch_size)
    if number < 1:
        raise ValueError(f"`batch_size={number}` must be positive.")
    return number


def check_memory(max_memory: Any) -> int:
    """Return a number of bytes."""
    number = whole("max_memory", max_memory)
    if number < 1:
        raise ValueError(f"`max_memory={number}` must be a positive number of bytes.")
    return number


def check_client(client: Any) -> None:
    """Check that a cluster is reached by a client that can be asked now."""
    if client is None:
        return
    from distributed import Client

    if not isinstance(client, Client):
        raise TypeError(
            f"`client` must be a distributed.Client, got {type(client).__name__}: `client=Client(cluster)` of "
            "`dask.distributed`, or leave it out to work in this process."
        )
    if client.asynchronous:
        raise ValueError("`client` is asynchronous: give a `distributed.Client` made without `asynchronous=True`.")
    if client.status != "running":
        raise ValueError(f"`client` is {client.status}: give a `distributed.Client` that is connected to its cluster.")


def check_orientations(orientations: Any) -> int:
    """Return how many turns and flips of a tile its features are the mean of."""
    if isinstance(orientations, bool) or not isinstance(orientations, Integral) or orientations not in ORIENTATIONS:
        raise ValueError(f"`orientations={orientations!r}` must be one of {list(ORIENTATIONS)}.")
    return int(orientations)


def wanted_spec(tile_px: int | None, mpp: float | None) -> TileSpec | None:
    """Return the tiles that were asked for, None if neither number was given."""
    if tile_px is None and mpp is None:
        return None
    return TileSpec(224 if tile_px is None else tile_px, 0.5 if mpp is None else mpp)


def wanted_depth(depth: int | tuple[int, ...] | None, preset: str | None) -> Depth | str:
    """Return the depth to take, or `"choose"`."""
    if depth is None:
        return None if preset == "paper" else "choose"
    return depth_tuple(depth)
