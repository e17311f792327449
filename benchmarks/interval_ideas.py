"""Intervals whose width follows the spot, and CV+, beside those of `tl.calibrate`: what was tried and is not in it.

    python benchmarks/interval_ideas.py --out FOLDER --part phantom
    python benchmarks/interval_ideas.py --her2st PATH --vits PATH --out FOLDER --part her2st
    python benchmarks/interval_ideas.py --out FOLDER --only table

Everything is fitted on training groups and scored on groups that were never seen: synthetic patients (12 train, 8 are
tested, two seeds), and C2 + C3 to C4 and C2-C4 to B4 of her2st; nothing is trained (preset "quick"). Three inner folds
at most, as in a fit. ``plain``: one threshold a gene, as `tl.calibrate` has it, from scores by the noise of other
folds. ``one threshold``: from scores by the noise of all held-out spots, as for the next three. ``by predicted value``,
``by novelty``, ``by spread``: a threshold for every third of the held-out spots, by the predicted value of the gene,
the distance to the training tiles, and the standard deviation between models fitted without another fold (Vovk et al.
2005: Mondrian conformal prediction). ``CV+``: the quantiles of the bounds of every inner fold's model at every held-out
score (Barber et al. 2021). Coverage of measurements at 90 %, randomised (closed for CV+, whose bounds are quantiles of
bounds), of all spots and of the fifth of spots that is covered worst, by predicted value of the gene and by novelty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from spatialdata import SpatialData

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, parsed, quick_parser, vits
from _machine import machine
from pekasc._expression import dense
from pekasc.models.trust import Block, Noise, from_held_out, group_quantiles, held_out

LEVEL, FIFTHS, THIRDS = 0.9, 5, 3
SCORES = np.linspace(0.025, 0.975, 20)  # quantiles of a fold's scores, for CV+


@dataclass
class Predicted:
    """Predictions of all spots by one model, (spots, genes), and how far their tiles are from its training tiles."""

    values: np.ndarray
    distance: np.ndarray


class Spots:
    """Counts, totals and groups of all spots, and models fitted on some groups."""

    def __init__(self, sdata: SpatialData, train: list[str], genes: list[str], fit: dict[str, Any]) -> None:
        self.sdata, self.train, self.fit, self.genes = sdata, train, fit, genes
        table = sdata["table"]
        self.region = table.obs["region"].astype(str).to_numpy()
        counts = dense(table.X)
        self.totals = counts.sum(axis=1)
        self.counts = counts[:, table.var_names.get_indexer(genes)]
        self._known: dict[tuple[str, ...], Predicted] = {}

    def by(self, train: list[str]) -> Predicted:
        """Return what a model fitted on some sections predicts for every spot."""
        if tuple(train) not in self._known:
            adapter = pk.tl.fit_adapter(self.sdata, train=train, genes=self.genes, progress=False, **self.fit)
            adapter = pk.tl.calibrate(adapter)  # which adds the novelty to predictions
            pk.tl.predict_expression(self.sdata, adapter, progress=False)
            table = self.sdata["table"]
            values = np.asarray(table.layers["peka"])[:, table.var_names.get_indexer(self.genes)]
            self._known[tuple(train)] = Predicted(values, 1 - table.obs["peka_novelty"].to_numpy())
            print("fitted on", len(train), "sections", flush=True)
        return self._known[tuple(train)]

    def without(self, folds: list[list[str]], *out: int) -> Predicted:
        return self.by([name for k, fold in enumerate(folds) if k not in out for name in fold])


def thirds_of(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    return (values[None] > edges.reshape(-1, *[1] * (values.ndim - 1), edges.shape[-1])).sum(axis=0)


def scored(noise: Noise, spots: Spots, predicted: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return noise.scores(predicted[rows], spots.counts[rows], spots.totals[rows])


def tried(spots: Spots, test: list[str]) -> list[dict[str, Any]]:
    """Return a row for every kind of interval."""
    folds = [[str(name) for name in part] for part in np.array_split(spots.train, min(3, len(spots.train)))]
    rows_of = [np.flatnonzero(np.isin(spots.region, fold)) for fold in folds]
    tested = np.flatnonzero(np.isin(spots.region, test))
    blocks = []
    for k, fold in enumerate(folds):
        values = spots.without(folds, k).values
        for name in fold:
            at = np.flatnonzero((spots.region == name) & np.isfinite(values).all(axis=1))
            blocks.append(
                Block(
                    name, k, partial(lambda v, part: v[:, part], values[at]),
                    partial(lambda v, part: v[:, part], spots.counts[at]), spots.totals[at],
                    np.ones(len(spots.genes), dtype=bool),
                )
            )  # fmt: skip
    kept = held_out(blocks, len(spots.genes))
    plain = from_held_out(kept, LEVEL)
    full = spots.by(spots.train)
    tested = tested[np.isfinite(full.values[tested]).all(axis=1)]
    ends = scored(plain.noise, spots, full.values, tested)
    found = {"plain": np.broadcast_to(plain.threshold, (tested.size, len(spots.genes)))}

    # by thirds: held-out scores of every group, with what splits them
    at = [block_rows[np.isfinite(spots.without(folds, k).values[block_rows]).all(axis=1)]
          for k, block_rows in enumerate(rows_of)]  # fmt: skip
    random = np.random.default_rng(0)
    drawn = [
        plain.noise.drawn(scored(plain.noise, spots, spots.without(folds, k).values, own), random)
        for k, own in enumerate(at)
    ]
    splits = {
        "one threshold": ([np.zeros_like(one) for one in drawn], np.zeros((tested.size, len(spots.genes)))),
        "by predicted value": ([spots.without(folds, k).values[own] for k, own in enumerate(at)], full.values[tested]),
        "by novelty": (
            [np.repeat(spots.without(folds, k).distance[own, None], len(spots.genes), 1) for k, own in enumerate(at)],
            np.repeat(full.distance[tested, None], len(spots.genes), 1),
        ),
    }
    if len(folds) == 3:
        splits["by spread"] = (
            [np.std([spots.without(folds, k, j).values[own] for j in range(3) if j != k], axis=0)
             for k, own in enumerate(at)],
            np.std([spots.without(folds, k).values[tested] for k in range(3)], axis=0) ,
        )  # fmt: skip
    groups = [spots.region[own] for own in at]
    for name, (inside, outside) in splits.items():
        edges = np.quantile(np.concatenate(inside), [1 / THIRDS, 2 / THIRDS], axis=0)
        threshold = np.empty((tested.size, len(spots.genes)))
        third, of_tested = [thirds_of(values, edges) for values in inside], thirds_of(outside, edges)
        for t in range(THIRDS):
            scores = [
                np.where(third[k] == t, drawn[k], np.nan)[groups[k] == group]
                for k in range(len(folds)) for group in folds[k]
            ]  # fmt: skip
            quantile = group_quantiles(scores, LEVEL, exact=False)
            threshold = np.where(of_tested == t, quantile, threshold)
        found[name] = threshold

    rows = []
    for name, threshold in found.items():
        within = np.stack([plain.noise.take(slice(g, g + 1)).share_within(ends[:, :, [g]], threshold[:, [g]])[:, 0]
                           for g in range(len(spots.genes))], axis=1)  # fmt: skip
        low, high = bounds(plain.noise, full.values[tested], threshold, spots.totals[tested])
        rows.append(row_of(name, within, high - low, full, tested))
        if name == "plain":
            rows.append(row_of("plain, closed", closed(spots, tested, low, high), high - low, full, tested))
    low, high = cv_plus(spots, folds, at, drawn, plain.noise, tested)
    rows.append(row_of("CV+, closed", closed(spots, tested, low, high), high - low, full, tested))
    return rows


def bounds(
    noise: Noise, predicted: np.ndarray, threshold: np.ndarray, totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval of measurements where every spot has its own thresholds, (spots, genes)."""
    low, high = np.empty(predicted.shape), np.empty(predicted.shape)
    for gene in range(predicted.shape[1]):
        one = noise.take(slice(gene, gene + 1))
        for value in np.unique(threshold[:, gene]):
            own = threshold[:, gene] == value
            found = one.measurement_bounds(predicted[own, gene][:, None], np.array([value]), totals[own])
            low[own, gene], high[own, gene] = found[0][:, 0], found[1][:, 0]
    return low, high


def cv_plus(
    spots: Spots,
    folds: list[list[str]],
    at: list[np.ndarray],
    drawn: list[np.ndarray],
    noise: Noise,
    tested: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the quantiles of the bounds of every fold's model at its held-out scores."""
    lows, highs = [], []
    for k in range(len(folds)):
        predicted = spots.without(folds, k).values[tested]
        for threshold in np.quantile(drawn[k], SCORES, axis=0):
            low, high = noise.measurement_bounds(predicted, threshold, spots.totals[tested])
            lows.append(low)
            highs.append(high)
    return (
        np.quantile(lows, 1 - LEVEL, axis=0, method="lower"),
        np.quantile(highs, LEVEL, axis=0, method="higher"),
    )  # fmt: skip


def closed(spots: Spots, tested: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return whether measurements lie within bounds, on the scale of log1p of counts per 10,000."""
    measured = np.log1p(1e4 * spots.counts[tested] / spots.totals[tested, None])
    return ((measured >= low - 1e-5) & (measured <= high + 1e-5)).astype(float)


def row_of(name: str, within: np.ndarray, width: np.ndarray, full: Predicted, tested: np.ndarray) -> dict[str, Any]:
    by_value = np.argsort(np.argsort(full.values[tested], axis=0), axis=0) * FIFTHS // len(tested)
    by_novelty = np.argsort(np.argsort(full.distance[tested])) * FIFTHS // len(tested)
    known = np.isfinite(within)
    return {
        "interval": name, "coverage": float(within[known].mean()), "width": float(np.nanmean(width)),
        "worst fifth by value": min(float(within[(by_value == f) & known].mean()) for f in range(FIFTHS)),
        "worst fifth by novelty": min(float(np.nanmean(within[by_novelty == f])) for f in range(FIFTHS)),
        "error of the five by value": float(
            np.mean([abs(within[(by_value == f) & known].mean() - LEVEL) for f in range(FIFTHS)])
        ),
    }  # fmt: skip


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--part", choices=["phantom", "her2st"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--splits", nargs="+", choices=["C4", "B4"], default=["C4", "B4"])
    arguments = parsed(parser, needs=())
    kept = KeptRows(arguments.out / "interval_ideas.jsonl")
    done = {row["test"] for row in kept.rows}
    if arguments.only != "table" and arguments.part == "phantom":
        for seed in arguments.seeds:
            if f"phantom {seed}" in done:
                continue
            sdata = pk.datasets.phantom(20, size_um=1000.0, mpp=1.0, random_state=seed)
            pk.pp.tile(sdata, tile_px=56, mpp=2.0)
            regions = list(dict.fromkeys(sdata["table"].obs["region"].astype(str)))
            genes = [str(name) for name in sdata["table"].var_names]
            spots = Spots(sdata, regions[:12], genes, {"method": None, "recipe": "quick"})
            kept.add([{"test": f"phantom {seed}", **row} for row in tried(spots, regions[12:])])
    elif arguments.only != "table":
        sdata = pk.datasets.her2st(("B4", "C2", "C3", "C4"), path=arguments.her2st)
        pk.pp.tile(sdata, tile_px=112, mpp=1.0)
        for split in arguments.splits:
            if split in done:
                continue
            train, test = ([f"{section}_spots" for section in side] for side in ALL_FOLDS[split])
            table = sdata["table"]
            own = table[table.obs["region"].isin(train).to_numpy()]
            # the 1,000 genes with the most counts of the training sections
            total = np.asarray(own.X.sum(axis=0)).ravel()
            genes = [str(name) for name in own.var_names[np.sort(np.argsort(-total)[:1000])]]
            fit = {"method": None, "recipe": "quick", "encoder": vits(arguments.vits)}
            kept.add([{"test": split, **row} for row in tried(Spots(sdata, train, genes, fit), test)])
    print(pd.DataFrame(kept.rows).round(3).to_markdown(index=False))
    print(machine())


if __name__ == "__main__":
    main()
