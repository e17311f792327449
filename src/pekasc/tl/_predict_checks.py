"""Checks before predictions are written, and what their record says of the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData
from spatialdata.transformations import get_transformation

from pekasc._expression import no_overlap_message
from pekasc._keys import (
    bound_keys,
    kriging_sd_key,
    novelty_key,
    packed,
    tile_shapes_name,
    total_check_key,
    total_key,
    trust_key,
)
from pekasc._measured import prediction_record, was_trained_on
from pekasc._obsm import recorded_targets
from pekasc._sections import Section
from pekasc._warnings import warn_user
from pekasc.models import Adapter
from pekasc.models.heads import coarse_stride


def check_columns(table: AnnData, key: str) -> None:
    """Check that columns of obs, layers and an array of obsm that will be written are not the user's own."""
    columns = (f"{key}_train", total_key(key), novelty_key(key))
    theirs = [f"obs[{name!r}]" for name in columns if name in table.obs]
    theirs += [f"layers[{name!r}]" for name in (*bound_keys(key), kriging_sd_key(key)) if name in table.layers]
    theirs += [f"var[{name!r}]" for name in (trust_key(key),) if name in table.var]
    theirs += [f"obsm[{name!r}]" for name in (total_check_key(key),) if name in table.obsm]
    ours = bool(prediction_record(table, key)) or key in table.layers or any(recorded_targets(table, key))
    if theirs and not ours:
        raise ValueError(
            f"`key_added={key!r}` would replace `{theirs[0]}`, which was not written by this call. Choose "
            "another key, or rename it."
        )


def check_trained(
    table: AnnData, key: str, target: str | None, trained: np.ndarray, pulled: np.ndarray | None = None
) -> None:
    """Check that the spots an adapter was trained on are those of the other predictions under `key`.

    Genes and targets in obsm share ``obs["{key}_train"]``, by which training spots are left out of scores.

    Parameters
    ----------
    target
        What is predicted: None for genes, else the key of the target.
    trained
        Whether the adapter was trained on a row.
    pulled
        Whether a row's prediction is pulled to what was measured there; None: there is no pull.
    """
    others = [f"obsm[{name!r}]" for name, _ in recorded_targets(table, key) if name != target]
    if target is not None and key in table.layers and prediction_record(table, key):
        others.append("genes")
    column = f"{key}_train"
    if not others or column not in table.obs:
        return
    before = was_trained_on(table, key)
    left_out = trained if pulled is None else trained | pulled
    if not np.array_equal(before, left_out):
        more = int(left_out.sum() - trained.sum())
        also = f" with {more} more pulled to what was measured there" if more else ""
        raise ValueError(
            f"The adapter that predicted {others[0]} under `key_added={key!r}` was trained on {int(before.sum())} of "
            f"these rows (obs[{column!r}]), this one on {int(trained.sum())}{also}, and these are not the same rows: "
            'scores would leave out the wrong spots. Take another key, such as `key_added="peka2"`.'
        )


def check_stride(adapter: Adapter, sections: Sequence[Section]) -> None:
    """Warn of a grid so coarse that a tile's context is not where a training spot's was."""
    for section in sections:
        found = coarse_stride(section.centres_um, adapter.info.get("pitch_um"), adapter.context_um)
        if found is not None:
            warn_user(f"Tiles of {section.name!r} {found}")


def check_size(
    n_obs: int, n_columns: int, max_memory: int | None, target: str | None = None, n_layers: int = 1
) -> None:  # fmt: skip
    """Check that predictions in memory, of genes or of a target in obsm, are no larger than `max_memory` bytes."""
    size = 4 * n_obs * n_columns * n_layers
    if max_memory is not None and size > max_memory:
        less = "Keep them on disk with `store=`, predict fewer genes (`genes=[...]`), or raise the limit."
        what = "genes" if target is None else f"columns of {target}"
        raise ValueError(
            f"Predictions of {n_columns} {what} for {n_obs} rows would take {size / 2**30:.1f} GiB, more than "
            f"`Compute.max_memory` ({max_memory / 2**30:.1f} GiB). {less if target is None else 'Raise the limit.'}"
        )


def adapter_record(adapter: Adapter) -> dict[str, Any]:
    """Return what the record of a prediction says of its adapter."""
    return {
        "encoder": packed(adapter.encoder.to_dict()),
        "encoder_digest": adapter.encoder_digest,
        "method": adapter.method,
        "depth": adapter.info["depth"],
        "orientations": adapter.orientations,
        "stain": "" if adapter.stain is None else adapter.stain.method,
        "context_um": list(adapter.reading.use().radii_um),
        "head": adapter.info["head"],
        "target": adapter.info["target"],
        "groups": adapter.info["groups"],
        "versions": packed(adapter.info["versions"]),
    }


def check_layer(
    table: AnnData,
    names: np.ndarray,
    target_genes: list[str],
    columns: np.ndarray,
    max_memory: int | None,
    n_layers: int = 1,
) -> None:
    """Warn of genes that the table lacks; raise if it has none of them, or the layer would be too large."""
    missing = [gene for gene, at in zip(target_genes, columns, strict=True) if at < 0]
    if len(missing) == len(target_genes):
        raise ValueError(
            no_overlap_message(names, target_genes, table)
            + ' To keep predictions of other genes, give `table_added="..."`.'
        )
    size = 4 * table.n_obs * table.n_vars * n_layers
    what = "A layer" if n_layers == 1 else f"{n_layers} layers"
    if max_memory is not None and size > max_memory:
        raise ValueError(
            f"{what} of {table.n_obs} x {table.n_vars} would take {size / 2**30:.1f} GiB, more than "
            f"`Compute.max_memory` ({max_memory / 2**30:.1f} GiB). Keep it on disk with `store=`, predict fewer genes "
            'into a table of their own (`genes=[...], table_added="predicted"`), or raise the limit.'
        )
    if missing:
        warn_user(
            f"Genes that are not in the table are left out: {len(missing)} of the adapter's {len(target_genes)} "
            f'(such as {missing[:3]}). `table_added="..."` keeps them in a table of their own.'
        )


def other_sections(sdata: SpatialData, sections: Sequence[Section], seen: Sequence[str], key: str) -> str:
    """Return the line that leaves the sections `seen` out of an object, for an error; nothing if there are no others.

    `key` is the name of the tiles, which are kept.
    """
    others = [section for section in sections if section.name not in seen]
    if not others:
        return ""
    theirs = [sdata.shapes[section.shapes_name] for section in sections if section.name in seen]
    systems = list(dict.fromkeys(section.coordinate_system for section in others))
    line = f"filter_by_coordinate_system({systems!r})"
    if set(systems) & {name for shapes in theirs for name in get_transformation(shapes, get_all=True)}:
        names = [(other.shapes_name, other.image_name, tile_shapes_name(other.name, key)) for other in others]
        line = f"subset({list(dict.fromkeys(name for part in names for name in part))!r})"
    return f" alone (`calibrate(adapter, sdata.{line})`)"
