"""What was tried to make the adapter transfer better: one change at a time, five splits of real breast tissue.

    python benchmarks/transfer_ideas.py --her2st PATH --vits PATH --out results/ideas
    python benchmarks/transfer_ideas.py --out results/ideas --only table

A quick look, to find out what deserves a place in the training: one fit per idea and split, no inner folds. After 2
and 4 epochs ridge is read off for every penalty, and the best penalty on the test section is taken, for the frozen
encoder as for the adapter: scores are too good by that choice, and only differences between rows count. ViT-S/14
cut at the depth that held-out training sections choose for the frozen encoder, 112 px at 1.0 um/px, bfloat16. Every
finished fit is kept in the folder ``--out``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from sklearn.decomposition import PCA, FactorAnalysis
from torch import nn
from torch.nn import functional

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, chosen_genes, parsed, quick_parser
from _machine import machine
from _ridge import predict
from pekasc._expression import log1p_cp10k
from pekasc._options import Recipe
from pekasc.models.encoders import Depth, EncoderNetwork, candidate_depths, features_at, orient
from pekasc.models.features import embed
from pekasc.models.heads import ALPHAS, fit_ridge, neighbour_means, with_context
from pekasc.models.selection import choose, inner_folds, pearson
from pekasc.models.training import (
    attached,
    cluster_head,
    losses,
    make_config,
    n_clusters_for,
    projector,
    structure_labels,
    target_layers,
    train_cluster_head,
)
from pekasc.models.training._trainer import _plain_attention
from pekasc.tiling import ArrayTiles

CONTEXTS = (None, 300.0)
AFTER = (2, 4)
N_BLOCKS = 7  # up to the depth that is chosen on most splits; deeper ones have rank 48


@dataclass(frozen=True)
class Idea:
    """One way to train; the defaults are those of ``tl.fit_adapter``."""

    blocks: Any = "all"
    clusters: int | None = None
    components: int | None = None  # of the teacher, after all else
    factors: int | None = None  # a factor model's instead: every gene has noise of its own
    ranks: tuple[int, int] | None = None  # LoRA instead of Block-Affine, of the first block's rank to the last's
    smooth: float = 0.0  # weight of the mean of neighbours within 250 um
    centred: bool = False  # the mean of every section taken off the teacher
    kd: float = 0.5
    sa: float = 0.5
    matching: float = 0.0  # mean squared error to the teacher's embedding
    genes: float = 0.0  # mean squared error of a linear map to the genes' expression
    stain: float = 0.0  # jitter of optical density
    ema: float = 0.0  # running mean of the adapter's weights, per step
    relational: float = 0.0  # mean squared error between the similarities of spots
    beside: int = 0  # features of a block so many before are put beside, in training and reading
    orient: bool = True
    learning_rate: float = 3e-4


IDEAS = {
    "as it is": Idea(),
    "32 components of the teacher": Idea(components=32),
    "teacher smoothed, weight 1/4": Idea(smooth=0.25, components=32),
    "teacher smoothed, weight 1/2": Idea(smooth=0.5, components=32),
    "teacher smoothed, weight 4/5": Idea(smooth=0.8, components=32),
    "teacher centred in sections": Idea(centred=True),
    "teacher centred and smoothed": Idea(centred=True, smooth=0.5, components=32),
    "twice as many clusters": Idea(clusters=2),
    "distillation only": Idea(kd=1, sa=0),
    "structure alignment only": Idea(kd=0, sa=1),
    "feature matching beside": Idea(matching=1, components=32),
    "feature matching beside, all components": Idea(matching=0.125),  # as much of the loss as with 32
    "feature matching only": Idea(kd=0, sa=0, matching=1, components=32),
    "gene expression beside": Idea(genes=1),
    "gene expression only": Idea(kd=0, sa=0, genes=1),
    "stain jitter": Idea(stain=0.15),
    "feature matching and stain jitter": Idea(matching=1, components=32, stain=0.15),
    "feature matching, stain jitter, teacher centred": Idea(matching=1, components=32, stain=0.15, centred=True),
    "running mean of weights": Idea(ema=0.95),
    "last 3 blocks": Idea(blocks=3),
    "two depths side by side": Idea(beside=3),
    "relational loss beside": Idea(relational=1),
    "factor model of 32 factors as teacher": Idea(factors=32),
    "LoRA of rank 48": Idea(ranks=(48, 48)),
    "LoRA, rank 16 to 80 from first to last block": Idea(ranks=(16, 80)),
    "LoRA, rank 80 to 16 from first to last block": Idea(ranks=(80, 16)),
    "no turns and flips": Idea(orient=False),
    "learning rate 1e-4": Idea(learning_rate=1e-4),
    "learning rate 1e-3": Idea(learning_rate=1e-3),
}


class Spots:
    """All spots, and the encoder."""

    def __init__(self, her2st: Path, vits: Path) -> None:
        self.sdata = sdata = pk.datasets.her2st(("B4", "C2", "C3", "C4"), path=her2st)
        pk.pp.tile(sdata, tile_px=112, mpp=1.0)
        table = sdata["table"]
        self.tiles = torch.from_numpy(pk.get.tiles(sdata).to_numpy())
        self.log = log1p_cp10k(table, None).toarray().astype(np.float32)
        self.genes = list(table.var_names)
        self.sections = table.obs["section"].astype(str).to_numpy()
        self.coords = np.asarray(pk.get.expression(sdata, layer=None).obsm["spatial"])
        encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=vits)
        self.encoder = EncoderNetwork(encoder, 112)
        self.frozen = self.embed(candidate_depths(self.encoder.n_blocks))

    def embed(self, depths: list[Depth], rows: np.ndarray | None = None) -> dict[Depth, np.ndarray]:
        tiles, cpu = ArrayTiles(self.tiles.numpy()), torch.device("cpu")
        return embed(self.encoder, tiles, depths, batch_size=64, device=cpu, precision="bf16", index=rows)

    def with_context(self, x: np.ndarray, rows: np.ndarray, context: float | None) -> np.ndarray:
        return with_context(x, self.coords[rows], self.sections[rows], context)


def stained(tiles: torch.Tensor, amount: float, generator: torch.Generator) -> torch.Tensor:
    """Return tiles whose optical densities of haematoxylin, eosin and the rest are scaled by up to `amount`."""
    stains = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])  # Ruifrok and Johnston
    density = -torch.log((tiles.float() + 1) / 256) @ torch.linalg.inv(stains)
    factor = 1 + amount * (2 * torch.rand(len(tiles), 1, 1, 3, generator=generator) - 1)
    return (256 * torch.exp(-(density * factor) @ stains) - 1).clamp(0, 255)


def scores(
    spots: Spots,
    genes: tuple[np.ndarray, dict[str, np.ndarray]],
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> list[dict[str, Any]]:
    """Return the mean correlation per gene set and context, at the best penalty for both sets together.

    Parameters
    ----------
    spots, genes
        Everything, and the genes with where each set lies in them.
    train, test
        Numbers of the spots, and their features.
    """
    union, sets = genes
    (rows_train, x_train), (rows_test, x_test) = train, test
    out = []
    for context in CONTEXTS:
        fit = fit_ridge(spots.with_context(x_train, rows_train, context), spots.log[np.ix_(rows_train, union)])
        x, y = spots.with_context(x_test, rows_test, context), spots.log[np.ix_(rows_test, union)]
        best: dict[str, float] = {}
        for alpha in ALPHAS[ALPHAS > 1]:
            r = np.nan_to_num(pearson(predict(fit, alpha, x), y))
            found = {name: float(r[at].mean()) for name, at in sets.items()}
            if not best or sum(found.values()) > sum(best.values()):
                best = found
        out += [{"context": context or 0, "genes": name, "pearson": value} for name, value in best.items()]
    return out


def teacher_embedding(spots: Spots, idea: Idea, rows: np.ndarray, expressed: np.ndarray) -> np.ndarray:
    """Return the teacher's embedding of the training spots, scaled to a standard deviation of 1."""
    x = spots.log[np.ix_(rows, expressed)].astype(np.float64)
    sections = spots.sections[rows]
    if idea.centred:
        for section in np.unique(sections):
            x[sections == section] -= x[sections == section].mean(axis=0)
    if idea.smooth:
        around = neighbour_means(spots.coords[rows], sections, 250.0) @ x
        x = (1 - idea.smooth) * x + idea.smooth * around
    if idea.factors:
        t = FactorAnalysis(idea.factors, max_iter=200, random_state=0).fit_transform(x)
        return np.asarray(t / t.std(), dtype=np.float32)
    t = PCA(idea.components or min(256, len(x) - 1), svd_solver="full").fit_transform(x)
    return np.asarray(t / t.std(), dtype=np.float32)


def run(spots: Spots, idea: Idea, split: str, epochs: int, seed: int) -> list[dict[str, Any]]:
    """Train one adapter; return the scores of the frozen encoder (epoch 0) and after some epochs."""
    train_sections, test_sections = ALL_FOLDS[split]
    rows = np.flatnonzero(np.isin(spots.sections, train_sections))
    test = np.flatnonzero(np.isin(spots.sections, test_sections))
    of = spots.sections[rows]
    expressed, union, sets = chosen_genes(spots.log[rows], spots.genes, spots.coords[rows], of)
    genes = union, sets
    y = spots.log[np.ix_(rows, union)]
    folds = inner_folds(of, spots.coords[rows], of, margin_um=112 * 2**0.5)
    depth = choose({d: x[rows] for d, x in spots.frozen.items()}, y, folds, None).depth
    assert depth is not None
    frozen = features_at(spots.frozen, depth)
    out = [{"epoch": 0, **row} for row in scores(spots, genes, (rows, frozen[rows]), (test, frozen[test]))]

    if idea.beside:
        depth = (max(1, depth[-1] - idea.beside), *depth)
        frozen = features_at(spots.frozen, depth)
    t = torch.from_numpy(teacher_embedding(spots, idea, rows, expressed))
    k = n_clusters_for(len(rows), None) * (idea.clusters or 1)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    labels = torch.from_numpy(structure_labels(t.numpy(), k, seed))
    head = cluster_head(t.shape[1], k)
    recipe = Recipe()
    train_cluster_head(head, t, labels, recipe, generator)
    target = torch.from_numpy((y - y.mean(axis=0)) / y.std())
    width = frozen.shape[1]
    student, linear = projector(width, t.shape[1]), nn.Linear(width, len(union))
    mean, deviation = (torch.from_numpy(v) for v in (frozen[rows].mean(axis=0), frozen[rows].std(axis=0) + 1e-6))
    config = make_config(_method(idea), recipe.rank, target_layers(spots.encoder, depth, idea.blocks))
    with (
        attached(spots.encoder, config, seed) as peft_model,
        _plain_attention(spots.encoder.model, torch.device("cpu")),
    ):
        trained = [p for p in _parameters(peft_model) if p.requires_grad]
        everything = [*trained, *student.parameters(), *linear.parameters()]
        optimiser = torch.optim.AdamW(everything, lr=idea.learning_rate, weight_decay=recipe.weight_decay)
        average = [p.detach().clone() for p in trained]
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(rows), generator=generator).split(recipe.batch_size):
                tiles = spots.tiles[torch.from_numpy(rows)[batch]]
                if idea.orient:
                    views = torch.randint(8, (len(tiles),), generator=generator)
                    tiles = torch.from_numpy(orient(tiles.numpy(), views.numpy()))
                if idea.stain:
                    tiles = stained(tiles, idea.stain, generator)
                with torch.autocast("cpu", torch.bfloat16):
                    features = spots.encoder(spots.encoder.normalise(tiles), list(depth))
                features = torch.cat(features, dim=1).float()
                projected = student(features)
                kd, sa = losses(head, t[batch], projected, labels[batch], recipe.temperature)
                loss = idea.kd * kd + idea.sa * sa
                if idea.relational:
                    similar = [functional.normalize(v - v.mean(dim=0)) for v in (projected, t[batch])]
                    loss = loss + idea.relational * functional.mse_loss(
                        similar[0] @ similar[0].T, similar[1] @ similar[1].T
                    )
                if idea.matching:
                    loss = loss + idea.matching * functional.mse_loss(projected, t[batch]) * t.shape[1] / 8
                if idea.genes:
                    predicted = linear((features - mean) / deviation)
                    loss = loss + idea.genes * functional.mse_loss(predicted, target[batch])
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(everything, recipe.gradient_clip)
                optimiser.step()
                with torch.no_grad():
                    for kept, now in zip(average, trained, strict=True):
                        kept.lerp_(now, 1 - idea.ema)
            if epoch in AFTER:
                live = [p.detach().clone() for p in trained]
                _put(trained, average)
                x = spots.embed([depth], np.concatenate([rows, test]))[depth]
                _put(trained, live)
                out += [
                    {"epoch": epoch, **row}
                    for row in scores(spots, genes, (rows, x[: len(rows)]), (test, x[len(rows) :]))
                ]
    return out


def _method(idea: Idea) -> str | PeftConfig:
    """Return Block-Affine, or LoRA with a rank for every block; its scaling is 2 whatever the rank."""
    if idea.ranks is None:
        return "bone"
    ranks = np.rint(np.linspace(*idea.ranks, N_BLOCKS)).astype(int).tolist()
    names = [rf"blocks\.{i}\.attn\.qkv" for i in range(N_BLOCKS)]
    return LoraConfig(
        r=48, lora_alpha=96, rank_pattern=dict(zip(names, ranks, strict=True)),
        alpha_pattern={name: 2 * rank for name, rank in zip(names, ranks, strict=True)},
    )  # fmt: skip


def _parameters(model: PeftModel) -> list[nn.Parameter]:
    return list(model.parameters())


def _put(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def table(frame: pd.DataFrame) -> str:
    """Return one row per idea: gain over the frozen encoder, mean over gene sets, contexts, epochs and seeds."""
    keys = ["idea", "split", "context", "genes"]
    frozen = frame[frame["epoch"] == 0].groupby(keys)["pearson"].mean()
    late = frame[frame["epoch"] > 0].groupby(keys)["pearson"].mean()
    gain = (late / frozen - 1).rename("gain").reset_index()
    wide = gain.pivot_table(index="idea", columns="split", values="gain")
    wide = wide[[split for split in ALL_FOLDS if split in wide]]  # of those that are done so far
    wide = wide.reindex([idea for idea in IDEAS if idea in wide.index])
    wide["mean"] = wide.mean(axis=1, skipna=False)  # of all splits or of none
    lines = ["| idea | " + " | ".join(wide.columns) + " |", "| --- |" + " --- |" * len(wide.columns)]
    lines += [
        f"| {idea} | " + " | ".join("" if np.isnan(v) else f"{100 * v:+.1f} %" for v in row) + " |"
        for idea, row in wide.iterrows()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--ideas", nargs="+", choices=list(IDEAS), default=list(IDEAS))
    parser.add_argument("--splits", nargs="+", choices=list(ALL_FOLDS), default=list(ALL_FOLDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parsed(parser)
    lines = KeptRows(arguments.out / "ideas.jsonl")
    if arguments.only is None:
        spots = Spots(arguments.her2st, arguments.vits)
        done = {(line["idea"], line["split"], line["seed"]) for line in lines.rows}
        # all ideas on one split before the next, so that an interrupted run has a table
        for seed, split, name in product(arguments.seeds, arguments.splits, arguments.ideas):
            if (name, split, seed) not in done:
                rows = run(spots, IDEAS[name], split, max(AFTER), seed)
                lines.add({"idea": name, "split": split, "seed": seed, **row} for row in rows)
                print(name, split, seed, flush=True)
    print(table(pd.DataFrame(lines.rows)))
    print(machine())


if __name__ == "__main__":
    main()
