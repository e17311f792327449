"""How soon a user has an adapter as good as the best that a plain loop over all blocks ever gets.

    python benchmarks/time_to_score.py --her2st PATH --vits PATH --out FOLDER [--threads 2]
    python benchmarks/time_to_score.py --out FOLDER --only table

The plain loop (``_plain_loop.py``: torch, timm, peft) trains all twelve blocks; after every epoch a ridge head is
fitted on the training sections' features and scored on the test section, with the penalty that is best *there*, and the
clock stands still meanwhile: its best epoch is found by looking at the test. "with its head" adds the one embedding of
the training tiles and the one head without which that epoch predicts nothing. pekasc's clock runs from tiles on disk to
the fitted adapter, with all that it chooses by held-out training sections; the test section is scored once, after it.
"context": the head also reads the neighbours' mean features, which the loop's does not: not like for like.
Score: mean Pearson correlation of 50 spatially and 50 highly variable genes that the training sections choose.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import torch

import pekasc as pk
from _her2st import FOLDS, KeptRows, Split, load_split, parsed, quick_parser, vits
from _machine import machine
from _plain_loop import PlainLoop, as_tensors
from _ridge import predict
from pekasc._expression import dense, expressed_genes, log1p_cp10k
from pekasc.models.heads import ALPHAS, fit_ridge
from pekasc.models.teachers import PcaTeacher

SEEDS = (0, 1, 2)
MOST_EPOCHS, GIVE_UP = 20, 4  # the loop ends when no epoch was better for so many
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
QUICKER = {"blocks": 2, "n_views": 1, "epochs": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "quick": {"recipe": "quick"},
    "ridge": {"readout": RIDGE},
    "ridge, two epochs": {"recipe": {"blocks": 2, "n_views": 2, "epochs": 2}, "readout": RIDGE},
    "ridge, one epoch": {"recipe": QUICKER, "readout": RIDGE},
    "ridge, one epoch, context": {"recipe": QUICKER, "readout": RIDGE.replace(context_um=300)},
    "ridge, one block": {"recipe": {"blocks": 1, "n_views": 1, "epochs": 1}, "readout": RIDGE},
    "ridge, frozen": {"method": None, "readout": RIDGE},
}


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = quick_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=["plain", *CONFIGS])
    arguments = parsed(parser)
    kept = KeptRows(arguments.out / "score.jsonl")
    if arguments.only != "table":
        splits = {name: load_split(arguments.her2st, name) for name in FOLDS}
        for seed in SEEDS:
            for name, split in splits.items():
                for label in arguments.methods:
                    if any((r["split"], r["seed"], r["method"]) == (name, seed, label) for r in kept.rows):
                        continue
                    about = {"split": name, "seed": seed, "method": label}
                    if label == "plain":
                        found = plain(split, arguments, seed)
                    else:
                        found = [packaged(split, arguments, seed, CONFIGS[label])]
                    kept.add([{**about, **row} for row in found])
                    print(about, found[-1], flush=True)
    print(f"{machine()}\n{table(pd.DataFrame(kept.rows))}")


def plain(split: Split, arguments: Any, seed: int) -> list[dict[str, float]]:
    """Return the score after every epoch and the seconds of training until then."""
    start = time.perf_counter()
    tiles = np.asarray(pk.get.tiles(split.training).data)
    log = dense(log1p_cp10k(split.training["table"]))
    sections = split.training["table"].obs["section"].astype(str).to_numpy()
    teacher = PcaTeacher(log[:, expressed_genes(log, sections)]).embed(np.arange(len(log)))
    loop = PlainLoop(arguments.vits, tiles, teacher, seed)
    spent = time.perf_counter() - start
    test = as_tensors(np.asarray(pk.get.tiles(split.test).data))
    y = log[:, split.training["table"].var_names.get_indexer(split.genes)]
    rows: list[dict[str, float]] = []
    for epoch in range(1, MOST_EPOCHS + 1):
        start = time.perf_counter()
        loop.epoch()
        spent += time.perf_counter() - start
        start = time.perf_counter()
        fit = fit_ridge(loop.features(loop.tiles), y)
        head = time.perf_counter() - start
        features = loop.features(test)
        scores = [score(split, predict(fit, alpha, features)) for alpha in ALPHAS]
        rows.append({"epoch": epoch, "seconds": spent, "head_seconds": head, "score": max(scores)})
        if epoch - 1 - int(np.argmax([row["score"] for row in rows])) >= GIVE_UP:
            break
    return rows


def score(split: Split, predicted: np.ndarray) -> float:
    """Return the mean over both gene sets."""
    return float(np.mean(list(split.score_of(predicted).values())))


def packaged(split: Split, arguments: Any, seed: int, options: dict[str, Any]) -> dict[str, float]:
    """Return the score and seconds of one call."""
    start = time.perf_counter()
    adapter = pk.tl.fit_adapter(
        split.training, encoder=vits(arguments.vits), genes=split.genes, random_state=seed, progress=False, **options
    )
    seconds = time.perf_counter() - start
    mean = float(np.mean(list(split.score(adapter).values())))
    return {"epoch": adapter.info["epochs"], "seconds": seconds, "score": mean}


def table(rows: pd.DataFrame) -> str:
    """Return for every split and seed the loop's best, and how much sooner a call was as good."""
    lines = ["| split | seed | method | score | epochs | seconds | as good? | times sooner | with its head |"]
    lines += ["|" + " --- |" * 9]
    for (split, seed), of in rows.groupby(["split", "seed"]):
        loop = of[of["method"] == "plain"]
        best = loop.loc[loop["score"].idxmax()]
        epochs = f"{best['epoch']:.0f} of {len(loop)}"
        whole = best["seconds"] + best["head_seconds"]
        lines.append(_line(split, seed, "plain loop, best epoch", best["score"], epochs, best["seconds"], "", "", ""))
        for label in CONFIGS:
            for _, row in of[of["method"] == label].iterrows():
                good = row["score"] >= best["score"]
                sooner = [f"{seconds / row['seconds']:.1f}" if good else "-" for seconds in (best["seconds"], whole)]
                what, epochs = f"`fit_adapter`, {label}", f"{row['epoch']:.0f}"
                answer = "yes" if good else "no"
                lines.append(_line(split, seed, what, row["score"], epochs, row["seconds"], answer, *sooner))
    return "\n".join(lines)


def _line(split: str, seed: int, what: str, score: float, epochs: str, seconds: float, *rest: str) -> str:
    return f"| {split} | {seed} | {what} | {score:.4f} | {epochs} | {seconds:.1f} | {' | '.join(rest)} |"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
