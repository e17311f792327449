"""Does more than the class token and the mean patch token of a tile help the frozen encoder? Other ways to pool.

For five splits of her2st: nothing is trained (``method=None``), the default reading otherwise; mean Pearson within test
sections over 50 spatially variable and 50 highly variable genes that the training sections choose.

``class, mean``: as in pekasc. ``+ sd``: the standard deviation of the patch tokens beside them. ``+ quarters``: the
mean of the patch tokens in each quarter of the tile. ``+ centre``: their mean in the middle, half as wide.

    python benchmarks/pooling.py --her2st PATH --vits PATH --out FOLDER --threads 1
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pandas as pd
import torch
from torch import Tensor

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, load_split, parsed, quick_parser, vits
from _machine import machine
from pekasc.models.encoders import EncoderNetwork


def grid_of(patches: Tensor) -> Tensor:
    side = round(patches.shape[1] ** 0.5)
    return patches.reshape(len(patches), side, side, -1)


def quarters(patches: Tensor) -> list[Tensor]:
    grid = grid_of(patches)
    half = grid.shape[1] // 2
    return [part.mean(dim=(1, 2)) for rows in (grid[:, :half], grid[:, half:])
            for part in (rows[:, :, :half], rows[:, :, half:])]  # fmt: skip


def centre(patches: Tensor) -> list[Tensor]:
    grid = grid_of(patches)
    edge = grid.shape[1] // 4
    return [grid[:, edge:-edge, edge:-edge].mean(dim=(1, 2))]


MORE: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "class, mean": lambda patches: [],
    "+ sd": lambda patches: [patches.std(dim=1)],
    "+ quarters": quarters,
    "+ centre": centre,
}


def pooling(more: Callable[[Tensor], list[Tensor]]) -> Callable[..., Tensor]:
    def pooled(self: EncoderNetwork, prefix: Tensor | None, patches: Tensor) -> Tensor:
        assert prefix is not None  # the ViT-S/14 has a class token
        return torch.cat([prefix[:, 0], patches.mean(dim=1), *more(patches)], dim=1)

    return pooled


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--splits", nargs="+", choices=list(ALL_FOLDS), default=list(ALL_FOLDS))
    arguments = parsed(parser)
    kept = KeptRows(arguments.out / "pooling.jsonl")
    done = {(row["split"], row["pooling"]) for row in kept.rows}
    for name in arguments.splits if arguments.only != "table" else ():
        split = None
        for pooled, more in MORE.items():
            if (name, pooled) in done:
                continue
            split = split or load_split(arguments.her2st, name)
            with patch.object(EncoderNetwork, "_class_and_mean", pooling(more)):
                adapter = pk.tl.fit_adapter(
                    split.training, encoder=vits(arguments.vits), method=None, genes=split.genes, progress=False
                )
                scores = split.score(adapter)
            kept.add([{"split": name, "pooling": pooled, **scores}])
            print(kept.rows[-1], flush=True)
    frame = pd.DataFrame(kept.rows)
    if len(frame):
        wide = frame.set_index(["pooling", "split"])[["svg", "hvg"]].unstack("split")
        wide = wide.swaplevel(axis=1).sort_index(axis=1)
        change = 100 * (wide / wide.loc["class, mean"] - 1)
        print(wide.round(3).to_string(), change.mean(axis=1).round(1).to_string(), sep="\n\n")
    print(machine())


if __name__ == "__main__":
    main()
