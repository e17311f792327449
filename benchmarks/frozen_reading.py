"""Better readouts of the frozen encoder: test-time augmentation, tiles at two scales, spatial context.

    python benchmarks/frozen_reading.py --her2st PATH --vits PATH

Five splits of her2st (C4 from C2 and C3, C3, C2, B4 from C2 to C4, C2 to C4 from B4); 50 spatially variable and 50
highly variable genes. Tiles of 112 px at 1.0 um/px; ``views``: test-time augmentation over eight orientations, of
training and test tiles alike; ``scales``: features of tiles of 112 px at 2.0 um/px (twice the field) beside. Depth and
penalty by the held-out error of training sections, one depth for both scales. ViT-S/14,
bfloat16; no random numbers.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import pekasc as pk
from _her2st import ALL_FOLDS, chosen_genes
from _machine import machine
from _ridge import predict
from pekasc._expression import log1p_cp10k
from pekasc.models.encoders import Depth, EncoderNetwork, candidate_depths, features_at
from pekasc.models.features import embed
from pekasc.models.heads import fit_ridge, with_context
from pekasc.models.selection import choose, gene_scores, inner_folds, mean_score
from pekasc.tiling import ArrayTiles

CONTEXTS = (None, 300.0)


def plain_and_views(encoder: EncoderNetwork, tiles: np.ndarray, depths: list[Depth]) -> list[dict[Depth, np.ndarray]]:
    """Return features by depth: of the tiles as they are, and the mean over eight orientations."""
    how: dict[str, Any] = {"batch_size": 32, "device": torch.device("cpu"), "precision": "bf16"}
    return [embed(encoder, ArrayTiles(tiles), depths, orientations=n, **how) for n in (1, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True, help="folder with B4, C2, C3, C4")
    parser.add_argument("--vits", type=Path, required=True, help="weights of the ViT-S/14")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    sdata = pk.datasets.her2st(("B4", "C2", "C3", "C4"), path=arguments.her2st)
    encoder = EncoderNetwork(pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits), 112)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    depths = candidate_depths(encoder.n_blocks)
    near, far = (
        plain_and_views(encoder, pk.get.tiles(sdata, field_um=width).to_numpy(), depths) for width in (None, 224)
    )
    both = [{d: np.concatenate([n[d], f[d]], axis=1) for d in n} for n, f in zip(near, far, strict=True)]
    ways = {"tile": near[0], "views": near[1], "scales": both[0], "views and scales": both[1]}
    table = sdata["table"]
    log = log1p_cp10k(table, None).toarray().astype(np.float32)
    sections = table.obs["section"].astype(str).to_numpy()
    coords = np.asarray(pk.get.expression(sdata, layer=None).obsm["spatial"])
    rows: list[dict[str, Any]] = []
    for split, (train_sections, test_sections) in ALL_FOLDS.items():
        train, test = (np.flatnonzero(np.isin(sections, part)) for part in (train_sections, test_sections))
        _, union, sets = chosen_genes(log[train], list(table.var_names), coords[train], sections[train])
        y = log[np.ix_(train, union)]
        folds = inner_folds(sections[train], coords[train], sections[train], margin_um=224 * 2**0.5)
        for way, features in ways.items():
            for context in CONTEXTS:

                def read(
                    x: np.ndarray, fold: Any = None, context: float | None = context, at: np.ndarray = train
                ) -> Any:
                    return with_context(x, coords[at], sections[at], context, fold)

                training = {d: x[train] for d, x in features.items()}
                chosen = choose(training, y, folds, None, None if context is None else read)
                fit = fit_ridge(read(features_at(training, chosen.depth)), y)
                predicted = predict(fit, chosen.alpha, read(features_at(features, chosen.depth)[test], at=test))
                r = gene_scores(predicted, log[np.ix_(test, union)])
                for name, at in sets.items():
                    score = mean_score(r[at])
                    rows.append({"way": way, "context": context or 0, "split": split, "genes": name, "pearson": score})
    frame = pd.DataFrame(rows)
    wide = frame.pivot_table(index=["way", "context"], columns=["split", "genes"], values="pearson")
    wide = wide.loc[[(way, context or 0) for way in ways for context in CONTEXTS]]
    relative = (wide / wide.loc["tile"].reindex(wide.index, level="context") - 1).mean(axis=1)
    columns = [(split, name) for split in ALL_FOLDS for name in ("svg", "hvg")]
    print("| way | context | " + " | ".join(" ".join(c) for c in columns) + " | mean change to tile |")
    print("| --- " * (len(columns) + 3) + "|")
    for (way, context), row in wide.iterrows():
        cells = " | ".join(f"{row[c]:.3f}" for c in columns)
        print(f"| {way} | {context:g} um | {cells} | {100 * relative[way, context]:+.1f} % |")
    print(f"\n{arguments.threads} threads. {machine()}")


if __name__ == "__main__":
    main()
