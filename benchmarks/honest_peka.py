"""PEKA against its rivals, leak-free, on real breast tissue: adapters of equal rank or equal budget, both splits.

    python benchmarks/honest_peka.py --her2st PATH --vits PATH --out results/honest

Sections C2 and C3 train and C4 tests (same patient), or C2, C3, C4 train and B4 tests (another patient). ViT-S/14 on
tiles of 112 px at 1.0 um/px, bfloat16. Everything goes through ``tl.cross_validate``: genes (50 spatially variable, 50
highly variable), teacher, depth, epochs and penalty come from the training sections alone. Finished pieces are kept in
the folder ``--out``; a run that was interrupted goes on from them, and ``--only tables`` prints what is there.

Parts: ``rank`` (all methods at rank 64), ``budget`` (at most as many parameters as Block-Affine at rank 64), ``heads``
(ridge, ridge per gene), ``reading`` (a field of view of twice the width, and test-time augmentation over eight
orientations),
``matching`` (feature matching in the loss, five splits), ``audit`` (folds of random spots beside sections and
patients), ``shuffled`` (expression permuted within sections).
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft import AdaLoraConfig, LoraConfig

import pekasc as pk
from _her2st import ALL_FOLDS, FOLDS
from _machine import machine

READOUTS = ["mean", "coordinates", "neighbours", "teacher", "frozen", "frozen-best"]
ADAPTERS: dict[str, Any] = {
    **{name: name for name in ("bone", "frozen+peka", "lora", "dora", "bat")},
    "adalora": AdaLoraConfig(init_r=96, target_r=64, lora_alpha=128, total_step=1),  # LoRA's alpha
    "hra": "hra",
}
# on the ViT-S's qkv (384 to 1152), Block-Affine at rank 64 has 64 * 1152 = 73,728 parameters a block. PEFT multiplies
# HRA's reflections out one by one at every step: 192 would fill the budget and take half a day, 64 has a third of it.
# AdaLoRA's update is a product of three small numbers, which at the usual alpha hardly moves: here it is 64 times that
BUDGET: dict[str, Any] = {
    **{name: name for name in ("teacher", "frozen", "frozen-best", "bone", "frozen+peka", "bat", "hra")},
    "lora r=48": LoraConfig(r=48, lora_alpha=96),
    "dora r=47": LoraConfig(r=47, lora_alpha=94, use_dora=True),
    "adalora r=48, alpha x 64": AdaLoraConfig(init_r=72, target_r=48, lora_alpha=96 * 64, total_step=1),
}
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
COMPUTE = pk.Compute(device="cpu", precision="bf16")  # twice as fast as float32 on CPUs that have it
PARTS = ["readouts", "heads", "rank", "budget", "reading", "matching", "audit", "shuffled", "tables"]
N_SHUFFLED = 20
MATCHING = (0.0, 4.0)


def load(path: Path, sections: tuple[str, ...] = ("B4", "C2", "C3", "C4")) -> Any:
    sdata = pk.datasets.her2st(sections, path=path)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    return sdata


def with_context(*readouts: pk.Readout) -> list[pk.Readout]:
    """Return every readout without and with spatial context."""
    return [readout.replace(context_um=radius) for readout in readouts for radius in (None, 300)]


def run(
    sdata: Any, encoder: Any, out: Path, seeds: list[int], methods: Any, *, folds: Any = FOLDS,
    recipe: pk.Recipe | None = None, readouts: tuple[pk.Readout, ...] = (RIDGE,),
) -> pd.DataFrame:  # fmt: skip
    return pk.tl.cross_validate(
        sdata, encoders=encoder, methods=methods, folds=folds, seeds=seeds, recipe=recipe,
        readout=with_context(*readouts), compute=COMPUTE.replace(cache=out / "cache"), store=out / "store",
    )  # fmt: skip


def run_audit(her2st: Path, encoder: Any, out: Path) -> pd.DataFrame:
    """Random spots, beside holding out a section of one patient (C2, C3, C4), and a patient (B4, and those)."""
    parts = []
    for groups, sections in (("section", ("C2", "C3", "C4")), ("patient", ("B4", "C2", "C3", "C4"))):
        audit = pk.tl.leakage_audit(
            load(her2st, sections), methods=["coordinates", "frozen", "frozen-best", "bone"], encoders=encoder,
            groups=groups, readout=with_context(RIDGE), compute=COMPUTE.replace(cache=out / "cache"),
            store=out / "store",
        )  # fmt: skip
        parts.append(audit.reset_index().assign(held_out=groups))
    return pd.concat(parts)


def run_shuffled(sdata: Any, encoder: Any, out: Path) -> pd.DataFrame:
    """Permute expression within sections: what is left of every method's score.

    Readouts on the ViT-S/14; adapters, which are three trainings each, on the encoder ``tiny`` and for one epoch.
    """
    table = sdata["table"]
    counts = table.X.copy()
    parts = []
    for seed in range(N_SHUFFLED):
        rng = np.random.default_rng(seed)
        order = np.arange(table.n_obs)
        for section in table.obs["section"].unique():
            at = np.flatnonzero(table.obs["section"] == section)
            order[at] = rng.permutation(at)
        table.X = counts[order]
        for used, methods in ((encoder, READOUTS), ("tiny", {"frozen-best": "frozen-best", **ADAPTERS})):
            found = run(sdata, used, out, [0], methods, folds={"C4": FOLDS["C4"]}, recipe=pk.Recipe(epochs=1))
            parts.append(found.assign(repeat=seed))
            parts[-1].to_csv(out / "shuffled_so_far.csv")
    table.X = counts
    return pd.concat(parts)


def run_heads(sdata: Any, encoder: Any, out: Path) -> pd.DataFrame:
    """Put every head on the frozen encoder."""
    readouts = (RIDGE, RIDGE.replace(head="ridge-per-gene"))
    return run(sdata, encoder, out, [0], ["frozen", "frozen-best"], folds=ALL_FOLDS, readouts=readouts)


def run_reading(sdata: Any, encoder: Any, out: Path) -> pd.DataFrame:
    """Compare readouts of encoder and adapter: the tile, a wider field, both with test-time augmentation over 8."""
    wide = RIDGE.replace(fields_um=(224,))
    readouts = (RIDGE, wide, wide.replace(orientations=8))
    return run(sdata, encoder, out, [0], ["frozen-best", "bone"], readouts=readouts)


def run_matching(sdata: Any, encoder: Any, out: Path, seeds: list[int]) -> pd.DataFrame:
    """Train the default adapter without and with feature matching, on five splits; a seed of both before the next."""
    parts: list[pd.DataFrame] = []
    for seed in seeds:
        for weight in MATCHING:
            recipe = pk.Recipe(matching_weight=weight)
            found = run(sdata, encoder, out, [seed], ["frozen-best", "bone"], folds=ALL_FOLDS, recipe=recipe)
            parts.append(found.assign(matching_weight=weight))
        pd.concat(parts).to_csv(out / "matching_so_far.csv")
    return pd.concat(parts)


def matching_table(frame: pd.DataFrame) -> str:
    pooled = frame[frame["section"] == "pooled"]
    scores = pooled.groupby(["method", "matching_weight", "seed", "fold", "genes", "context_um"])["pearson"].mean()
    gain = (scores["bone"] / scores["frozen-best"] - 1).unstack(["fold", "genes", "context_um"])
    rows = gain.groupby(level="matching_weight").mean()
    rows.columns = [f"{fold} {genes}{' +ctx' if context else ''}" for fold, genes, context in rows.columns]
    rows.insert(0, "seeds", gain.groupby(level="matching_weight").size())
    rows["mean"] = rows.drop(columns="seeds").mean(axis=1)
    each = gain.mean(axis=1).unstack("seed")
    rows["mean of each seed"] = [", ".join(f"{100 * v:+.1f} %" for v in values) for values in each.to_numpy()]
    percent = [column for column in rows if column not in ("seeds", "mean of each seed")]
    rows[percent] = rows[percent].map(lambda v: f"{100 * v:+.1f} %")
    return markdown(rows.reset_index())


def reading_table(frame: pd.DataFrame) -> str:
    pooled = frame[frame["section"] == "pooled"].assign(fields_um=frame["fields_um"].fillna("").astype(str))
    by = ["fields_um", "orientations", "method"]
    table = pooled.pivot_table(index=by, columns=["fold", "genes", "context_um"], values="pearson")
    plain = table.loc[("", 1, "frozen-best")]
    alike = table.xs("frozen-best", level="method").reindex(table.index.droplevel("method")).to_numpy()
    changes = {
        "to frozen-best, tile alone": table.div(plain, axis=1).sub(1).mean(axis=1),
        "to frozen-best, read alike": (table / alike - 1).mean(axis=1),
    }
    table.columns = [f"{fold} {genes}{' +ctx' if context else ''}" for fold, genes, context in table.columns]
    table = table.round(3).assign(**{name: [f"{100 * v:+.1f} %" for v in values] for name, values in changes.items()})
    return markdown(table.reset_index())


def heads_table(frame: pd.DataFrame) -> str:
    of = frame[(frame["section"] == "pooled") & (frame["method"] == "frozen-best")]
    table = of.pivot_table(index=["genes", "context_um", "head"], columns="fold", values="pearson")[list(ALL_FOLDS)]
    table["mean"] = table.mean(axis=1)
    return markdown(table.round(3).reset_index())


def markdown(frame: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(map(str, frame.columns)) + " |", "| " + " | ".join("---" for _ in frame) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False)]) + "\n"


def score_table(frame: pd.DataFrame) -> str:
    """One row per method: mean over seeds per split, gene set and context; difference to frozen-best of the means."""
    pooled = frame[frame["section"] == "pooled"]
    rows = []
    for method in pooled["method"].unique():
        of = pooled[pooled["method"] == method]
        seeds = of["seed"].nunique()
        parameters = of["n_parameters"].dropna()
        row: dict[str, Any] = {
            "method": method, "seeds": seeds, "parameters": int(parameters.median()) if len(parameters) else 0
        }  # fmt: skip
        gains = []
        for fold in FOLDS:
            for genes in ("svg", "hvg"):
                for context in (0.0, 300.0):
                    at = (pooled["fold"] == fold) & (pooled["genes"] == genes) & (pooled["context_um"] == context)
                    own = of.loc[at, "pearson"].mean()
                    best = pooled.loc[at & (pooled["method"] == "frozen-best"), "pearson"].mean()
                    gains.append(own / best - 1)
                    row[f"{fold} {genes}{' +ctx' if context else ''}"] = f"{own:.3f}"
        row["mean gain over frozen-best"] = f"{100 * np.mean(gains):+.1f} %"
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def difference_table(frame: pd.DataFrame, method: str = "bone") -> str:
    """One row per column of the score table: the default's paired difference to frozen-best, and over frozen last."""
    pooled = frame[frame["section"] == "pooled"]
    rows = []
    for (fold, genes, context), of in pooled.groupby(["fold", "genes", "context_um"], sort=False):
        own, mean = of[of["method"] == method], of.groupby("method")["pearson"].mean()
        low, high = own["difference_low"].mean(), own["difference_high"].mean()
        each = ", ".join(f"{value:+.3f}" for value in own["difference"])
        rows.append(
            {
                "test": f"{fold} {genes}{' +ctx' if context else ''}",
                "difference to frozen-best": f"{own['difference'].mean():+.3f} ({each})",
                "95 % interval, mean of the seeds' ends": f"{low:+.3f} to {high:+.3f}",
                "relative": f"{100 * (mean[method] / mean['frozen-best'] - 1):+.1f} %",
                "relative to frozen last": f"{100 * (mean[method] / mean['frozen'] - 1):+.0f} %",
            }
        )
    return markdown(pd.DataFrame(rows))


def audit_table(frame: pd.DataFrame) -> str:
    first = ["held_out", "genes", "context_um", "method"]
    return markdown(frame.set_index(first).drop(columns="encoder").round(3).reset_index())


def shuffled_table(frame: pd.DataFrame) -> str:
    pooled = frame[frame["section"] == "pooled"]
    by = ["encoder", "method", "genes", "context_um"]
    table = pooled.groupby(by)["pearson"].agg(["count", "mean", "std", "max"]).reset_index()
    table["mean / se"] = table["mean"] / (table["std"] / table["count"] ** 0.5)
    return markdown(table.round(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, help="folder with B4, C2, C3, C4")
    parser.add_argument("--vits", type=Path, help="weights of the ViT-S/14")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.only != "tables" and not (arguments.her2st and arguments.vits):
        parser.error("--her2st and --vits are needed")
    warnings.filterwarnings("ignore")
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    only = arguments.only
    if only != "tables":
        sdata = load(arguments.her2st)
        encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
        if only in (None, "readouts"):
            run(sdata, encoder, out, [0], READOUTS).to_csv(out / "readouts.csv")
        if only in (None, "heads"):
            run_heads(sdata, encoder, out).to_csv(out / "heads.csv")
        if only in (None, "reading"):
            run_reading(sdata, encoder, out).to_csv(out / "reading.csv")
        if only in (None, "matching"):
            run_matching(sdata, encoder, out, arguments.seeds).to_csv(out / "matching.csv")
        if only in (None, "audit"):
            run_audit(arguments.her2st, encoder, out).to_csv(out / "audit.csv", index=False)
        if only in (None, "shuffled"):
            run_shuffled(sdata, encoder, out).to_csv(out / "shuffled.csv")
        for i in range(1, len(arguments.seeds) + 1):
            # a seed of all methods before the next, so that an interrupted run has whole tables
            for part, methods in (
                ("rank", {**{name: name for name in READOUTS}, **ADAPTERS}),
                ("budget", BUDGET),
            ):
                if only in (None, part):
                    run(sdata, encoder, out, arguments.seeds[:i], methods).to_csv(out / f"{part}.csv")
    for part, table in (
        ("readouts", score_table), ("rank", score_table), ("rank", difference_table), ("budget", score_table),
        ("audit", audit_table), ("heads", heads_table), ("reading", reading_table), ("matching", matching_table),
        ("shuffled", shuffled_table),
    ):  # fmt: skip
        if (out / f"{part}.csv").exists():
            print(f"{part}\n\n{table(pd.read_csv(out / f'{part}.csv'))}")
    print(machine())


if __name__ == "__main__":
    main()
