"""Pull predictions to what was measured at spots: residuals, interpolated to the other tiles of the section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from anndata import AnnData
from scipy.spatial import cKDTree
from spatialdata import SpatialData

from pekasc import _text
from pekasc._digests import sha256
from pekasc._expression import TARGETS, dense_layer
from pekasc._keys import kriging_sd_key, packed
from pekasc._measured import prediction_record
from pekasc._options import RESULT_MEMORY, Compute
from pekasc._sections import Section, check_table, get_table, present_table
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.models import Adapter
from pekasc.models.runtime import array_parts, tensor_parts
from pekasc.tiling import TileSpec
from pekasc.tl._predict_checks import check_size
from pekasc.tl._predict_rows import LayerSpec, layer_parts, tile_scores, trained_on
from pekasc.tl._predict_spots import Fitted, MeasuredSpots, places_um
from pekasc.tl._predict_trust import left_out
from pekasc.tl._read import ensure_tiles

logger = get_logger(__name__)

_SAME_MPP = 0.02
_SAME_PLACE_UM = 1.0


@dataclass(frozen=True, eq=False)
class Piece:
    """Tiles of a section that are pulled to the spots of one region.

    Parameters
    ----------
    section
        The section.
    index
        Its tiles, as indices of the section's.
    places
        Their centres in um, (tiles, 2).
    fitted
        Residuals of the spots.
    """

    section: Section
    index: np.ndarray
    places: np.ndarray
    fitted: Fitted


@dataclass(frozen=True, eq=False)
class Pull:
    """What measured spots add to the predictions of tiles.

    Parameters
    ----------
    pieces
        Tiles and spots that belong together.
    columns
        Columns of the layer for the genes that are predicted; -1: none.
    log
        Whether values are logarithms of rates, which are never below 0.
    at_spots
        Rows where one of the spots was measured, whose prediction has seen its own measurement.
    record
        What the record of the prediction says of it.
    """

    pieces: Sequence[Piece]
    columns: np.ndarray
    log: bool
    at_spots: np.ndarray
    record: Mapping[str, Any]

    def apply(self, part: slice, values: np.ndarray) -> np.ndarray:
        """Pull a part of the rows of a layer, in place, and return the standard deviation, float32."""
        sd = np.full_like(values, np.nan)
        for piece in self.pieces:
            genes, rows = piece.fitted.genes, piece.section.rows[piece.index]
            inside = (rows >= part.start) & (rows < part.stop)
            if not inside.any():
                continue
            there = self.columns[genes] >= 0
            at = np.ix_(rows[inside] - part.start, self.columns[genes[there]])
            pull, found = (array[:, there] for array in piece.fitted.kriging.at(piece.places[inside]))
            plain = values[at]
            pulled = np.maximum(plain + pull, np.minimum(plain, 0)) if self.log else plain + pull
            values[at] = pulled
            sd[at] = np.where(np.isnan(plain), np.nan, found)
        return sd

    def parts(self) -> Iterator[str | np.ndarray]:
        """Yield what values depend on, for a digest."""
        for piece in self.pieces:
            yield from array_parts((piece.index, piece.fitted.kriging, piece.fitted.genes))


def adapter_digest(adapter: Adapter) -> str:
    """Return a digest of what an adapter predicts with, by which its predictions are known again."""
    weights = [adapter.weights.get("adapter", {}), *(weights for _, weights in adapter.others)]
    of_weights = [part for tensors in weights for part in tensor_parts(tensors)]
    rest = repr((adapter.encoder_digest, adapter.genes, adapter.depth, adapter.orientations, adapter.fields_um))
    stain = () if adapter.stain is None else array_parts(adapter.stain)
    return sha256(rest, *of_weights, *array_parts(adapter.reading), "stain", *stain)[:32]


def prediction_inputs_digest(sections: Sequence[Section], spec: TileSpec, precision: str) -> str:
    """Return a digest of the tiles that are predicted and of the numbers that features are kept in.

    Predictions of a table are known by it to be of the tiles that it has now.
    """
    parts: list[str | np.ndarray] = [repr(spec), precision]
    for section in sections:
        parts += [repr((section.name, section.image_name, section.mpp, section.patches is None, section.patches_id))]
        parts += list(array_parts((section.rows, section.centres_px, section.um_to_px, section.patch_rows)))
    return sha256(*parts)[:32]


def measured_pull(
    sdata: SpatialData, adapter: Adapter, sections: Sequence[Section], layer: LayerSpec, *, table_name: str,
    measured_table: str, key_added: str, key: str, gene_key: str | None, store: Any, abstain: float | None,
    compute: Compute, progress: bool,
) -> Pull:  # fmt: skip
    """Return the pull of what was measured at the spots of a table towards the tiles of `sections`.

    Parameters
    ----------
    sections
        Tiled sections of the table that is predicted.
    layer
        Its layer.
    measured_table
        Name of the table with the spots, which are tiled if they are not.

    Raises
    ------
    KeyError, ValueError
        If the table has no measurements or none of the genes, its spots lie on other images, are too few or too far.
    """
    table = get_table(sdata, measured_table)
    measured_table = present_table(sdata, measured_table)
    check_table(table)
    spots = MeasuredSpots.read(table, measured_table, adapter, layer.wanted, gene_key)
    check_size(table.n_obs, layer.wanted.size, compute.memory(RESULT_MEMORY))
    tiled, spec = ensure_tiles(sdata, table_name=measured_table, key=key, spec=adapter.spec)
    adapter.check_tiles(spec.tile_px, spec.mpp)
    pairs = _on_same_image(sections, tiled, table_name, measured_table)
    used = [section for section in tiled if any(section in pair for pair in pairs.values())]
    digest = prediction_inputs_digest(tiled, spec, "float32" if store is None else compute.stored_precision)
    predicted = _predicted(
        table, adapter, layer.wanted, spots.columns, used, spec, digest, key_added=key_added, store=store,
        abstain=abstain, compute=compute, progress=progress,
    )  # fmt: skip
    trained = trained_on(adapter, used, spec, table.n_obs)
    pieces: list[Piece] = []
    facts: dict[str, dict[str, Any]] = {}
    without: dict[str, str] = {}
    at_spots = np.zeros(layer.shape[0], dtype=bool)
    for number, own in pairs.items():
        section = sections[number]
        places = places_um(section, section)
        for part, index in _nearest(section, places, own):
            found = spots.fitted(part, section, predicted)
            if isinstance(found, str):
                who = repr(section.name) if len(own) == 1 else f"{section.name!r} around {part.name!r}"
                without[who] = f"of its {_text.number(part.rows.size, 'spot')} in {measured_table!r}, {found}"
                continue
            if found.left_out:
                warn_user(f"Spots of {part.name!r}: {found.left_out}.")
            pieces.append(Piece(section, index, places[index], found))
            far = found.kriging.distance(places[index])
            name = section.name if len(own) == 1 else f"{section.name}, {part.name}"
            facts[name] = {**_facts(found, far), "n_trained": int(trained[found.rows].sum())}
            if not layer.grid:
                at_spots[section.rows[index[far < _SAME_PLACE_UM]]] = True
    if not pieces:
        reasons = "; ".join(f"{who}: {why}" for who, why in without.items())
        raise ValueError(
            f"No section of {table_name!r} can be pulled to `measured_table={measured_table!r}`: {reasons}. Predict "
            "without `measured=`."
        )
    unmeasured = [section.name for number, section in enumerate(sections) if number not in pairs]
    _report(unmeasured, facts, table_name, measured_table, layer.wanted.size, key_added)
    for who, why in without.items():
        warn_user(f"Section {who} is predicted without a pull: {why}.")
    record = {"method": "kriging", "table": measured_table, "sections": facts}
    log = adapter.info["target"] == TARGETS["log1p"]
    return Pull(pieces, layer.columns, log, at_spots, {"measured": packed(record)})


def _nearest(section: Section, places: np.ndarray, own: Sequence[Section]) -> Iterator[tuple[Section, np.ndarray]]:
    """Yield regions of spots with the tiles of a section, as indices, whose nearest spot is one of theirs."""
    if len(own) == 1:
        yield own[0], np.arange(section.rows.size)
        return
    region = np.argmin([cKDTree(places_um(part, section)).query(places)[0] for part in own], axis=0)
    for number, part in enumerate(own):
        index = np.flatnonzero(region == number)
        if index.size:
            yield part, index


def _on_same_image(
    sections: Sequence[Section], tiled: Sequence[Section], table_name: str, measured_table: str
) -> dict[int, list[Section]]:
    """Return the sections of the spots for every section that has some on its image, by number.

    A section whose own region was measured has that one alone; the spots of a region pull no other of the table.

    Raises
    ------
    ValueError
        If none has, or the pixel size of an image is not the same for both.
    """
    pairs = {}
    names = {section.name for section in sections}
    for number, section in enumerate(sections):
        there = [part for part in tiled if part.image_name == section.image_name]
        own = [part for part in there if part.name == section.name] or [p for p in there if p.name not in names]
        for part in own:
            if abs(part.mpp / section.mpp - 1) > _SAME_MPP:
                raise ValueError(
                    f"The image {section.image_name!r} has {section.mpp:.4g} um per pixel for the tiles of "
                    f"{table_name!r} and {part.mpp:.4g} for those of {measured_table!r}: tile both with the right "
                    "pixel size (`image_mpp=`)."
                )
        if own:
            pairs[number] = own
    if not pairs:
        theirs = {part.image_name: part.coordinate_system for part in tiled}
        ours = {part.image_name: part.coordinate_system for part in sections}
        raise ValueError(
            f"No spots of `measured_table={measured_table!r}` lie on an image of the tiles of {table_name!r}: they are "
            f"on {_say(theirs)}, the tiles on {_say(ours)}. Make the grid on the image of the spots, such as "
            f"`pekasc.pp.tile_grid(sdata, {next(iter(theirs))!r}, ...)`."
        )
    return pairs


def _say(images: Mapping[str, str]) -> str:
    return ", ".join(f"{image!r} (coordinate system {system!r})" for image, system in images.items())


def _predicted(
    table: AnnData, adapter: Adapter, wanted: np.ndarray, columns: np.ndarray, sections: Sequence[Section],
    spec: TileSpec, digest: str, *, key_added: str, abstain: float | None, **how: Any,
) -> np.ndarray:  # fmt: skip
    """Return the adapter's own predictions for the spots, (n_obs, wanted genes), NaN in other rows."""
    record = prediction_record(table, key_added)
    same = record.get("adapter_digest") == adapter_digest(adapter) and record.get("abstain") == abstain
    same = same and record.get("prediction_inputs_digest") == digest
    there = columns >= 0
    values = np.full((table.n_obs, wanted.size), np.nan, dtype=np.float32)
    if same and "measured" not in record and key_added in table.layers:
        values[:, there] = dense_layer(table, key_added, columns[there])
        rows = np.concatenate([section.rows for section in sections])
        if np.isfinite(values[np.ix_(rows, there)]).any(axis=0).all():
            logger.hint("Predictions at the spots are those of layers[%r].", key_added)
            return values
    scores, _ = tile_scores(adapter, sections, spec, n_obs=table.n_obs, **how)
    used = replace(adapter, reading=scores.reading)
    novel = left_out(scores.p_values(table.n_obs, sections), abstain)
    layer = LayerSpec((table.n_obs, wanted.size), wanted, np.arange(wanted.size), False, novel)
    ((_, found),) = layer_parts(used, scores, sections, layer, [slice(0, table.n_obs)])
    return found


def _facts(found: Fitted, far: np.ndarray) -> dict[str, Any]:
    kriging = found.kriging
    return {
        "range_um": kriging.range_um, "n_spots": len(kriging.coords_um), "n_measured": int(found.genes.size),
        "n_pulled": int(kriging.pulled.sum()), "n_beyond": int((far > kriging.range_um).sum()), "n_tiles": far.size,
        "nearest_um": float(far.min()),
    }  # fmt: skip


def _report(
    unmeasured: Sequence[str], facts: Mapping[str, Mapping[str, Any]], table_name: str, measured_table: str,
    n_wanted: int, key: str,
) -> None:  # fmt: skip
    """Log what is pulled and what is not; raise if all tiles are too far."""
    if all(fact["n_beyond"] == fact["n_tiles"] for fact in facts.values()):
        nearest, name = min((fact["nearest_um"], name) for name, fact in facts.items())
        raise ValueError(
            f"No tile of {table_name!r} lies within the range of a spot of `measured_table={measured_table!r}`: the "
            f"nearest is {nearest:.4g} um away, in {name!r}, whose range is {facts[name]['range_um']:.4g} um. "
            "Predict without `measured=`."
        )
    for name, fact in facts.items():
        logger.hint(
            "section %s: %d of %d genes are pulled to %d spots, range %.4g um; %d genes without structure between "
            "spots and %d that the section did not measure are not; %d of %d tiles are farther than the range from "
            "every spot.",
            name, fact["n_pulled"], n_wanted, fact["n_spots"], fact["range_um"], fact["n_measured"] - fact["n_pulled"],
            n_wanted - fact["n_measured"], fact["n_beyond"], fact["n_tiles"],
        )  # fmt: skip
    if unmeasured:
        logger.hint("Sections without measured spots, which are not pulled: %s.", _text.names(unmeasured))
    if n := sum(fact["n_trained"] for fact in facts.values()):
        warn_user(
            f"The adapter was trained on {n} of the {sum(fact['n_spots'] for fact in facts.values())} spots that its "
            "predictions are pulled to: its errors are smaller there than on tissue that it has not seen, so that the "
            f"pull is too weak and layers[{kriging_sd_key(key)!r}] too small. Hold the section out "
            "(`fit_adapter(train=...)`), so that the residuals are those of unseen tissue."
        )
