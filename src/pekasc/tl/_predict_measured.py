"""Pull predictions to what was measured at spots: residuals, interpolated to the other tiles of the section."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._digests import sha256
from pekasc._expression import (
    TARGETS,
    count_totals,
    dense,
    dense_layer,
    find_counts,
    gene_columns,
    gene_names,
    log1p_of_totals,
    no_overlap_message,
    target_matrix,
)
from pekasc._keys import kriging_sd_key, packed
from pekasc._measured import prediction_record
from pekasc._options import RESULT_MEMORY, Compute
from pekasc._sections import Section, check_table, get_table, present_table
from pekasc._settings import get_logger
from pekasc.models import Adapter
from pekasc.models.kriging import LEAST_SPOTS, Kriging, TooFewSpots, fit_kriging
from pekasc.models.runtime import array_parts, tensor_parts
from pekasc.tiling import TileSpec
from pekasc.tl._panels import measured_entries
from pekasc.tl._predict_checks import check_size
from pekasc.tl._predict_genes import columns_of, columns_of_totals
from pekasc.tl._predict_rows import LayerSpec, layer_parts, tile_scores, trained_on
from pekasc.tl._predict_trust import left_out
from pekasc.tl._read import ensure_tiles

logger = get_logger(__name__)

_SAME_MPP = 0.02
_SAME_PLACE_UM = 1.0


@dataclass(frozen=True, eq=False)
class Pull:
    """What measured spots add to the predictions of tiles.

    Parameters
    ----------
    sections
        Sections of the table that is predicted.
    kriging
        By number of the section, the residuals to interpolate and their genes, as places in `columns`.
    columns
        Columns of the layer for the genes that are predicted; -1: none.
    log
        Whether values are logarithms of rates, which are never below 0.
    at_spots
        Rows where one of the spots was measured, whose prediction has seen its own measurement.
    record
        What the record of the prediction says of it.
    """

    sections: Sequence[Section]
    kriging: Mapping[int, tuple[Kriging, np.ndarray]]
    columns: np.ndarray
    log: bool
    at_spots: np.ndarray
    record: Mapping[str, Any]

    def apply(self, part: slice, values: np.ndarray) -> np.ndarray:
        """Pull a part of the rows of a layer, in place, and return the standard deviation, float32."""
        sd = np.full_like(values, np.nan)
        for number, (kriging, genes) in self.kriging.items():
            section = self.sections[number]
            index = np.flatnonzero((section.rows >= part.start) & (section.rows < part.stop))
            if not index.size:
                continue
            there = self.columns[genes] >= 0
            at = np.ix_(section.rows[index] - part.start, self.columns[genes[there]])
            pull, found = (array[:, there] for array in kriging.at(places_um(section, section)[index]))
            plain = values[at]
            pulled = np.maximum(plain + pull, np.minimum(plain, 0)) if self.log else plain + pull
            values[at] = pulled
            sd[at] = np.where(np.isnan(plain), np.nan, found)
        return sd

    def parts(self) -> Iterator[str | np.ndarray]:
        """Yield what values depend on, for a digest."""
        for kriging, genes in self.kriging.values():
            yield from array_parts((kriging, genes))


def adapter_digest(adapter: Adapter) -> str:
    """Return a digest of what an adapter predicts with, by which its predictions are known again."""
    weights = [adapter.weights.get("adapter", {}), *(weights for _, weights in adapter.others)]
    of_weights = [part for tensors in weights for part in tensor_parts(tensors)]
    rest = repr((adapter.encoder_digest, adapter.genes, adapter.depth, adapter.orientations, adapter.fields_um))
    return sha256(rest, *of_weights, *array_parts(adapter.reading))[:32]


def places_um(section: Section, frame: Section) -> np.ndarray:
    """Return the centres of a section in um along the axes of another on the same image, (n, 2)."""
    return np.asarray(section.centres_px @ np.linalg.inv(frame.um_to_px).T)


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
    spots = _Spots.read(table, measured_table, adapter, layer.wanted, gene_key)
    check_size(table.n_obs, layer.wanted.size, compute.memory(RESULT_MEMORY))
    tiled, spec = ensure_tiles(sdata, table_name=measured_table, key=key, spec=adapter.spec)
    adapter.check_tiles(spec.tile_px, spec.mpp)
    pairs = _on_same_image(sections, tiled, table_name, measured_table)
    used = [section for section in tiled if any(section in pair for pair in pairs.values())]
    predicted = _predicted(
        table, adapter, layer.wanted, spots.columns, used, spec, key_added=key_added, store=store, abstain=abstain,
        compute=compute, progress=progress,
    )  # fmt: skip
    trained = trained_on(adapter, used, spec, table.n_obs)
    fitted: dict[int, tuple[Kriging, np.ndarray]] = {}
    facts: dict[str, dict[str, Any]] = {}
    at_spots = np.zeros(layer.shape[0], dtype=bool)
    for number, own in pairs.items():
        section = sections[number]
        found = spots.fitted(own, section, predicted)
        if isinstance(found, str):
            warnings.warn(
                f"Section {section.name!r} is predicted without a pull: of its {sum(s.rows.size for s in own)} spots "
                f"in {measured_table!r}, {found}.",
                UserWarning,
                stacklevel=3,
            )
            continue
        fitted[number] = found
        far = found[0].distance(places_um(section, section))
        facts[section.name] = {
            **_facts(*found, far), "n_trained": int(trained[np.concatenate([s.rows for s in own])].sum()),
        }  # fmt: skip
        if not layer.grid:
            at_spots[section.rows[far < _SAME_PLACE_UM]] = True
    _report(sections, facts, table_name, measured_table, layer.wanted.size, key_added)
    record = {"method": "kriging", "table": measured_table, "sections": facts}
    log = adapter.info["target"] == TARGETS["log1p"]
    return Pull(sections, fitted, layer.columns, log, at_spots, {"measured": packed(record)})


@dataclass(frozen=True, eq=False)
class _Spots:
    """What was measured at the spots of a table.

    Parameters
    ----------
    table
        The table.
    columns
        Its columns of the genes that are predicted; -1: none.
    values
        Measured values on the scale of the predictions, (n_obs, n_vars).
    totals
        Total of every row; None if values are no counts.
    """

    table: AnnData
    columns: np.ndarray
    values: Any
    totals: np.ndarray | None

    @classmethod
    def read(
        cls, table: AnnData, name: str, adapter: Adapter, wanted: np.ndarray, gene_key: str | None
    ) -> _Spots:  # fmt: skip
        """Return what a table measured of the genes that an adapter predicts."""
        layer = adapter.info.get("layer") or None
        where = f"`measured_table={name!r}`"
        if table.n_vars == 0 or (table.X is None and not {key for key in table.layers if key is not None}):
            raise ValueError(
                f"{where} has no measurements to pull predictions to: it holds no genes. Name the table of the spots."
            )
        gene_of = gene_columns(table)
        names = gene_names(table, gene_key, gene_of)
        genes = [adapter.genes[i] for i in wanted]
        columns = columns_of(names, genes, gene_of)
        if (columns < 0).all():
            raise ValueError(f"{where}: {no_overlap_message(names, genes, table)}")
        try:
            if adapter.info["target"] == TARGETS["as_is"]:
                return cls(table, columns, target_matrix(table, layer, "as_is"), None)
            raw, _ = find_counts(table, layer if layer in table.layers else None)
        except (KeyError, ValueError) as error:
            what = "values on the scale of its training" if adapter.info["target"] == TARGETS["as_is"] else "counts"
            raise ValueError(
                f"{where}: the adapter's predictions are pulled to {what}, which are not there. {error.args[0]}"
            ) from error
        over = columns_of_totals(adapter, names, gene_of)
        totals = count_totals(raw, gene_of if over is None else over)
        return cls(table, columns, log1p_of_totals(raw, totals), totals)

    def fitted(
        self, own: Sequence[Section], section: Section, predicted: np.ndarray
    ) -> tuple[Kriging, np.ndarray] | str:
        """Return the residuals of the spots on a section's image, and their genes; or what is missing.

        Parameters
        ----------
        own
            Sections of the spots.
        section
            Section that is predicted, along whose axes positions are taken.
        predicted
            Predictions for the rows of the table, (n_obs, wanted genes).
        """
        rows = np.concatenate([part.rows for part in own])
        places = np.concatenate([places_um(part, section) for part in own])
        known = np.isfinite(predicted[rows]).any(axis=1)
        if self.totals is not None:
            known &= self.totals[rows] > 0
        rows, places = rows[known], places[known]
        genes = np.flatnonzero(self.columns >= 0)
        entries = measured_entries(self.table, rows, self.columns[genes]) if rows.size else None
        if entries is not None:
            genes = genes[entries.all(axis=0)]
        if not rows.size or not genes.size:
            return "none has measurements and a prediction"
        residuals = dense(self.values[rows][:, self.columns[genes]]) - predicted[np.ix_(rows, genes)]
        noise = np.ones(rows.size)
        if self.totals is not None:  # the variance of counting, on a logarithmic scale, goes with 1 / total
            noise = np.median(self.totals[rows]) / self.totals[rows]
        try:
            return fit_kriging(places, residuals, noise), genes
        except TooFewSpots as error:
            return f"with measurements and a prediction, {error}"


def _on_same_image(
    sections: Sequence[Section], tiled: Sequence[Section], table_name: str, measured_table: str
) -> dict[int, list[Section]]:
    """Return the sections of the spots for every section that has some on its image, by number.

    Raises
    ------
    ValueError
        If none has, or the pixel size of an image is not the same for both.
    """
    pairs = {}
    for number, section in enumerate(sections):
        own = [part for part in tiled if part.image_name == section.image_name]
        for part in own:
            if abs(part.mpp / section.mpp - 1) > _SAME_MPP:
                raise ValueError(
                    f"The image {section.image_name!r} has {section.mpp:.4g} um per pixel for the tiles of "
                    f"{table_name!r} and {part.mpp:.4g} for those of {measured_table!r}: tile both with the right one "
                    "(`image_mpp=`)."
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
    spec: TileSpec, *, key_added: str, abstain: float | None, **how: Any,
) -> np.ndarray:  # fmt: skip
    """Return the adapter's own predictions for the spots, (n_obs, wanted genes), NaN in other rows."""
    record = prediction_record(table, key_added)
    same = record.get("adapter_digest") == adapter_digest(adapter) and record.get("abstain") == abstain
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


def _facts(kriging: Kriging, genes: np.ndarray, far: np.ndarray) -> dict[str, Any]:
    return {
        "range_um": kriging.range_um, "n_spots": len(kriging.coords_um), "n_measured": int(genes.size),
        "n_pulled": int(kriging.pulled.sum()), "n_beyond": int((far > kriging.range_um).sum()), "n_tiles": far.size,
        "nearest_um": float(far.min()),
    }  # fmt: skip


def _report(
    sections: Sequence[Section], facts: Mapping[str, Mapping[str, Any]], table_name: str, measured_table: str,
    n_wanted: int, key: str,
) -> None:  # fmt: skip
    """Log what is pulled and what is not; raise if nothing can be."""
    if not facts:
        raise ValueError(
            f"No section of {table_name!r} has {LEAST_SPOTS} spots with measurements in `measured_table="
            f"{measured_table!r}`, and range and noise are chosen on held-out blocks of them: predict without "
            "`measured=`."
        )
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
            "spots and %d that the section did not measure are not; %d of %d tiles are farther from all spots.",
            name, fact["n_pulled"], n_wanted, fact["n_spots"], fact["range_um"], fact["n_measured"] - fact["n_pulled"],
            n_wanted - fact["n_measured"], fact["n_beyond"], fact["n_tiles"],
        )  # fmt: skip
    if without := [section.name for section in sections if section.name not in facts]:
        logger.hint("Without measured spots, and not pulled: %s.", ", ".join(without))
    if n := sum(fact["n_trained"] for fact in facts.values()):
        warnings.warn(
            f"The adapter was trained on {n} of the {sum(fact['n_spots'] for fact in facts.values())} spots that its "
            "predictions are pulled to: its errors are smaller there than on tissue that it has not seen, so that the "
            f"pull is too weak and layers[{kriging_sd_key(key)!r}] too small. Hold the section out "
            "(`fit_adapter(train=...)`) for a pull that does not know it.",
            UserWarning,
            stacklevel=4,
        )
