"""Better readouts of an adapter: test-time augmentation, tiles at two scales, spatial context.

    python benchmarks/adapter_reading.py --her2st PATH --vits PATH --out results/reading
    python benchmarks/adapter_reading.py --out results/reading --only table

What ``frozen_reading.py`` shows for the frozen encoder, with the adapter trained on tiles of 112 px at 1.0 um/px as
always: five epochs on all training spots, one seed. The tile of twice the field (112 px at 2.0 um/px) is read by the
frozen encoder or with the adapter in it; ``views``: test-time augmentation over eight orientations. A quick look as in
``transfer_ideas.py``: the best penalty on the test section is taken in every row, so only differences between rows
count. ViT-S/14 cut at the depth that held-out training sections choose, bfloat16. Finished splits stay in ``--out``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, chosen_genes, parsed, quick_parser
from _machine import machine
from frozen_reading import plain_and_views
from pekasc._options import Recipe
from pekasc.models.features import TileInputs
from pekasc.models.selection import choose, inner_folds
from pekasc.models.training import Engine, make_config, target_layers, train_student
from pekasc.tiling import ArrayTiles
from transfer_ideas import Idea, Spots, scores, teacher_embedding

EPOCHS = 5
CPU = torch.device("cpu")


def run(spots: Spots, far_tiles: np.ndarray, split: str) -> list[dict[str, Any]]:
    """Train one adapter; return the scores of every way to read it and the frozen encoder."""
    train_sections, test_sections = ALL_FOLDS[split]
    rows = np.flatnonzero(np.isin(spots.sections, train_sections))
    test = np.flatnonzero(np.isin(spots.sections, test_sections))
    of = spots.sections[rows]
    expressed, union, sets = chosen_genes(spots.log[rows], spots.genes, spots.coords[rows], of)
    folds = inner_folds(of, spots.coords[rows], of, margin_um=224 * 2**0.5)
    depth = choose({d: x[rows] for d, x in spots.frozen.items()}, spots.log[np.ix_(rows, union)], folds, None).depth
    assert depth is not None
    at = np.concatenate([rows, test])

    def features() -> dict[str, np.ndarray]:
        out = {}
        for name, tiles in (("near", spots.tiles.numpy()), ("far", far_tiles)):
            plain, mean = plain_and_views(spots.encoder, tiles[at], [depth])
            out[name], out[f"{name} views"] = plain[depth], mean[depth]
        return out

    frozen, adapted = features(), {}
    recipe = Recipe()
    config = make_config("bone", recipe.rank, target_layers(spots.encoder, depth, "all"))

    def after(epoch: int) -> float:
        if epoch == EPOCHS:
            adapted.update(features())
        return float("nan")

    train_student(
        spots.encoder, depth, config, TileInputs(ArrayTiles(spots.tiles.numpy())), rows,
        teacher_embedding(spots, Idea(), rows, expressed), recipe=recipe, epochs=EPOCHS,
        engine=Engine(CPU, "bf16", progress=False), random_state=0, local=np.ones(len(spots.tiles), dtype=bool),
        on_epoch=after,
    )  # fmt: skip
    out = []
    for views in ("", " views"):
        ways = {
            f"frozen{views}": [frozen[f"near{views}"]],
            f"frozen{views}, two scales": [frozen[f"near{views}"], frozen[f"far{views}"]],
            f"adapter{views}": [adapted[f"near{views}"]],
            f"adapter{views}, wide tile frozen": [adapted[f"near{views}"], frozen[f"far{views}"]],
            f"adapter{views}, wide tile adapted": [adapted[f"near{views}"], adapted[f"far{views}"]],
        }
        for way, parts in ways.items():
            x = np.concatenate(parts, axis=1)
            found = scores(spots, (union, sets), (rows, x[: len(rows)]), (test, x[len(rows) :]))
            out += [{"split": split, "way": way, **row} for row in found]
    return out


def table(frame: pd.DataFrame) -> str:
    """Return one row per way and context: scores, and the mean change to the frozen encoder read the plain way."""
    wide = frame.pivot_table(index=["way", "context"], columns=["split", "genes"], values="pearson")
    ways = list(dict.fromkeys(frame["way"]))
    columns = [(s, g) for s in ALL_FOLDS if s in set(frame["split"]) for g in ("svg", "hvg")]
    lines = [
        "| way | context | "
        + " | ".join(" ".join(c) for c in columns)
        + " | mean change to frozen | to frozen, read alike |"
    ]
    lines.append("| --- " * (len(columns) + 4) + "|")
    for way in ways:
        alike = (
            "frozen"
            + (" views" if "views" in way else "")
            + (", two scales" if "wide" in way or "scales" in way else "")
        )
        for context in sorted(set(frame["context"])):
            row = wide.loc[(way, context)]
            change = [100 * float((row / wide.loc[(to, context)] - 1).mean()) for to in ("frozen", alike)]
            cells = " | ".join(f"{row[c]:.3f}" for c in columns)
            lines.append(f"| {way} | {context:g} um | {cells} | {change[0]:+.1f} % | {change[1]:+.1f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    arguments = parsed(quick_parser(__doc__))
    lines = KeptRows(arguments.out / "reading.jsonl")
    if arguments.only is None:
        spots = Spots(arguments.her2st, arguments.vits)
        far = pk.get.tiles(spots.sdata, field_um=224).to_numpy()
        for split in ALL_FOLDS:
            if split not in {line["split"] for line in lines.rows}:
                lines.add(run(spots, far, split))
                print(split, flush=True)
    print(table(pd.DataFrame(lines.rows)))
    print(machine())


if __name__ == "__main__":
    main()
