"""What the scripts on her2st share: splits, genes that the training sections choose, and how quick looks are run."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spatialdata import SpatialData

import pekasc as pk
from pekasc._expression import dense, expressed_genes, log1p_cp10k
from pekasc.models.comparing import choose_gene_sets
from pekasc.models.selection import pearson

FOLDS = {"C4": (["C2", "C3"], ["C4"]), "B4": (["C2", "C3", "C4"], ["B4"])}
ALL_FOLDS = {
    **FOLDS,
    "C3": (["C2", "C4"], ["C3"]),
    "C2": (["C3", "C4"], ["C2"]),
    "B to C": (["B4"], ["C2", "C3", "C4"]),
}


def chosen_genes(
    log: np.ndarray, names: list[str], coords_um: np.ndarray, sections: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return expressed genes, and 50 spatially variable and 50 highly variable ones: all, and each set's places in it.

    Everything is of the training spots.
    """
    expressed = expressed_genes(log, sections)
    sets = choose_gene_sets({"svg": None, "hvg": None}, names, log, coords_um, sections, expressed, 50)
    union = np.unique(np.concatenate(list(sets.values())))
    return expressed, union, {name: np.searchsorted(union, at) for name, at in sets.items()}


class KeptRows:
    """Rows of results in a file of JSON lines, which an interrupted run goes on from."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file.exists():
            self.rows = [json.loads(line) for line in file.read_text().splitlines()]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows, once all of them are there."""
        new = list(rows)
        with self.file.open("a") as out:
            out.writelines(json.dumps(row) + "\n" for row in new)
        self.rows += new


def quick_parser(description: str | None) -> argparse.ArgumentParser:
    """Return what every quick look takes on its command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, help="folder with B4, C2, C3, C4")
    parser.add_argument("--vits", type=Path, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["table"])
    parser.add_argument("--threads", type=int, default=2)
    return parser


def parsed(parser: argparse.ArgumentParser, needs: tuple[str, ...] = ("her2st", "vits")) -> argparse.Namespace:
    """Return the command line of a quick look, with torch's threads set; `needs` are the files it cannot do without."""
    arguments = parser.parse_args()
    small = getattr(arguments, "small", False)  # needs no data
    if arguments.only != "table" and not small and not all(getattr(arguments, name) for name in needs):
        parser.error(f"{' and '.join(f'--{name}' for name in needs)} are needed")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    return arguments


@dataclass
class Split:
    """Tiled sections of one split, each side an object of its own, and the genes that the training sections choose."""

    name: str
    training: SpatialData
    test: SpatialData
    genes: list[str]
    sets: dict[str, np.ndarray]  # places in `genes`

    def score(self, adapter: pk.Adapter) -> dict[str, float]:
        """Return the mean Pearson correlation of every gene set over the spots of each test section, mean of those."""
        pk.tl.predict_expression(self.test, adapter, progress=False)
        table = pk.get.expression(self.test, layer="peka")
        at = table.var_names.get_indexer(self.genes)
        return self.score_of(np.where(at >= 0, np.asarray(table.X)[:, at], 0))

    def score_of(self, predicted: np.ndarray) -> dict[str, float]:
        """Return the same for predictions of the test spots, spots x ``genes``; a gene that was never seen counts 0."""
        table = self.test["table"]
        at = table.var_names.get_indexer(self.genes)
        measured = np.where(at >= 0, dense(log1p_cp10k(table))[:, at], 0)
        sections = table.obs["section"].astype(str).to_numpy()
        of = [np.nan_to_num(pearson(predicted[sections == s], measured[sections == s])) for s in np.unique(sections)]
        return {name: float(np.mean([r[at].mean() for r in of])) for name, at in self.sets.items()}


def load_split(
    path: Path, name: str, tile_px: int = 112, mpp: float = 1.0,
    folds: dict[str, tuple[list[str], list[str]]] = ALL_FOLDS,
) -> Split:  # fmt: skip
    """Return one of ``ALL_FOLDS``, or of other splits, tiled."""
    sides = []
    for sections in folds[name]:
        sdata = pk.datasets.her2st(tuple(sections), path=path)
        pk.pp.tile(sdata, tile_px=tile_px, mpp=mpp)
        sides.append(sdata)
    return split_of(name, *sides)


def split_of(name: str, training: SpatialData, test: SpatialData) -> Split:
    """Return a split of tiled sections, with the genes that the training sections choose."""
    table = training["table"]
    sections = table.obs["section"].astype(str).to_numpy()
    mpps = table.uns["pekasc"]["image_mpp"]
    scale = np.array([mpps[f"{section}_he"] for section in sections])
    coords = np.asarray(table.obsm["spatial"]) * scale[:, None]
    names = [str(gene) for gene in table.var_names]
    log = dense(log1p_cp10k(table))
    _, union, sets = chosen_genes(log, names, coords, sections)
    return Split(name, training, test, [names[i] for i in union], sets)


def vits(weights: Path) -> pk.models.Encoder:
    """Return the ViT-S/14 of the benchmarks."""
    return pk.models.Encoder("vit_small_patch14_dinov2", weights=str(weights), key="vits14")
