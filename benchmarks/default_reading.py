"""The default reading beside plain ridge, and the adapter's own share of it, wherever there is data.

Four readings of the same spots, each chosen or averaged on training groups alone: plain ridge on the frozen encoder at
its best depth; the frozen encoder under the default reading (``method=None``); the default, which trains an adapter;
and the default with frozen features in the place of adapted ones (``frozen-best``), so that the difference of the last
two is the adapter's own share. Intervals are paired bootstraps over squares of 1 mm of the test section.

    python benchmarks/default_reading.py --her2st PATH --vits PATH --out results/readings --part her2st
    python benchmarks/default_reading.py --her2st PATH --vits PATH --out results/readings --part adapters
    python benchmarks/default_reading.py --her2st PATH --vits PATH --out results/readings --part shuffled
    python benchmarks/default_reading.py --vits PATH --out results/phantom --part phantom --trained 2 4
    python benchmarks/default_reading.py --vits PATH --bulb PATH --out results/bulb --part bulb
    python benchmarks/default_reading.py --out results/readings --only table

Parts: ``her2st`` (five splits), ``phantom`` (synthetic patients, the last four tested, the first 2, 4, 8 or 16
training), ``bulb`` (mouse olfactory bulb, from animal to animal), ``adapters`` (every adapter at the default's budget
under the default readout), ``shuffled`` (expression permuted within sections: nothing is left to predict).
With the ``--out`` of ``readings.py`` the trainings of that script are used again. Finished fits are kept there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from peft import LoraConfig
from PIL import Image
from scipy.sparse import csr_matrix
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel, TableModel
from spatialdata.transformations import Identity

import pekasc as pk
from _her2st import ALL_FOLDS, FOLDS, parsed, quick_parser
from _machine import machine

PARTS = ["her2st", "phantom", "bulb", "adapters", "shuffled"]
RIDGE, FROZEN, DEFAULT = pk.Readout.preset("ridge"), pk.Readout(head="low-rank"), pk.Readout()
LOW_RANK = FROZEN.replace(context_um=None, fields_um=None)
# the parameters of Block-Affine at rank 64 (on qkv of the ViT-S: 73,728 a block), or a little less; HRA has a third
ADAPTERS: dict[str, Any] = {
    "frozen-best": "frozen-best", "bone": "bone", "lora r=48": LoraConfig(r=48, lora_alpha=96),
    "dora r=47": LoraConfig(r=47, lora_alpha=94, use_dora=True), "bat": "bat", "hra": "hra",
}  # fmt: skip
N_TEST = 4  # patients of the phantom
BULB = {"MOB1": "1", "MOB2": "1", "MOB3": "2", "MOB4": "2"}  # section: animal
BULB_FOLDS = {
    "animal 1 to 2": (["MOB1", "MOB2"], ["MOB3", "MOB4"]),
    "animal 2 to 1": (["MOB3", "MOB4"], ["MOB1", "MOB2"]),
}
BULB_MPP = 4.5  # by the frame of the array; uncertain by 10 %


def spots_of(folds: Any) -> dict[str, tuple[list[str], list[str]]]:
    """Return folds of sections as folds of their spots."""
    return {name: ([f"{s}_spots" for s in a], [f"{s}_spots" for s in b]) for name, (a, b) in folds.items()}


def her2st(path: Path) -> SpatialData:
    """Return B4, C2, C3 and C4, tiled, as `readings.py` reads them."""
    sdata = pk.datasets.her2st(
        tuple(sorted({s for pair in ALL_FOLDS.values() for side in pair for s in side})), path=path
    )
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    return sdata


def bulb(path: Path) -> SpatialData:
    """Return four sections of two mice's olfactory bulbs, in tiles of 144 um, a spot's pitch."""
    images, shapes, tables = {}, {}, []
    for name, animal in BULB.items():
        pixels = np.asarray(Image.open(path / f"{name}.jpg").convert("RGB"))
        at = pd.read_csv(path / f"alignment_table_{name}.tsv.gz", sep="\t")
        at = at[at["selected"] == 1]
        at.index = at["x"].astype(str) + "x" + at["y"].astype(str)
        counts = pd.read_csv(path / f"{name}.tsv.gz", sep="\t", index_col=0)
        at = at.loc[at.index.isin(counts.index)]
        xy = at[["pixel_x", "pixel_y"]].to_numpy(np.float64)
        here = {name: Identity()}
        images[f"{name}_he"] = Image2DModel.parse(
            pixels, dims=("y", "x", "c"), c_coords=["r", "g", "b"], transformations=here
        )
        shapes[f"{name}_spots"] = ShapesModel.parse(xy, geometry=0, radius=50 / BULB_MPP, transformations=here)
        obs = pd.DataFrame({"section": name, "patient": animal, "region": f"{name}_spots"}, index=f"{name}_" + at.index)
        obs["spot_id"] = np.arange(len(at))
        values = csr_matrix(counts.loc[at.index].to_numpy(np.float32))
        tables.append(AnnData(values, obs=obs, var=pd.DataFrame(index=counts.columns), obsm={"spatial": xy}))
    genes = sorted(set.intersection(*(set(part.var_names) for part in tables)))
    rows = pd.concat([part.obs for part in tables])
    rows["region"] = pd.Categorical(rows["region"])
    table = AnnData(
        csr_matrix(np.concatenate([part[:, genes].X.toarray() for part in tables])), obs=rows,
        var=pd.DataFrame(index=genes), obsm={"spatial": np.concatenate([part.obsm["spatial"] for part in tables])},
    )  # fmt: skip
    table = TableModel.parse(table, region=list(shapes), region_key="region", instance_key="spot_id")
    sdata = SpatialData(images=images, shapes=shapes, tables={"table": table})
    pk.pp.tile(sdata, tile_px=112, mpp=144 / 112, image_mpp=BULB_MPP)
    return sdata


def phantoms(n_train: list[int]) -> tuple[SpatialData, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return synthetic patients of 1 mm, tiled, and the folds by number of training patients; the last four test."""
    sdata = pk.datasets.phantom(max(n_train) + N_TEST, size_um=1000.0, mpp=1.0)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    patient = sdata["table"].obs["patient"].astype(str)
    order = list(dict.fromkeys(patient))
    test = patient.isin(order[-N_TEST:]).to_numpy()
    return sdata, {str(n): (patient.isin(order[:n]).to_numpy(), test) for n in n_train}


def compared(sdata: SpatialData, arguments: Any, **what: Any) -> pd.DataFrame:
    """Return the rows of a comparison on the ViT-S/14, with finished fits kept."""
    encoder = pk.models.Encoder("vit_small_patch14_dinov2", weights=arguments.vits)
    out = arguments.out
    return pk.tl.cross_validate(
        sdata, encoders=encoder, store=out / "store", compute={"cache": out / "cache"}, progress=False, **what
    )


def four(sdata: SpatialData, folds: Any, arguments: Any) -> pd.DataFrame:
    """Return the rows of the four readings, of which the default and its stand-in only for the folds ``--trained``."""
    file, frames = arguments.out / f"{arguments.part}-default_reading.csv", []
    for name in folds if arguments.trained is None else arguments.trained:
        one = {"folds": {name: folds[name]}, "seeds": arguments.seeds}
        frames.append(compared(sdata, arguments, methods=["frozen-best", "bone"], readout=DEFAULT, **one))
        pd.concat(frames).to_csv(file, index=False)
        print(name, flush=True)
    frames.append(compared(sdata, arguments, methods=["frozen-best"], readout=[RIDGE, FROZEN], folds=folds))
    pd.concat(frames).to_csv(file, index=False)
    return pd.concat(frames)


def shuffled(sdata: SpatialData, arguments: Any) -> pd.DataFrame:
    """Permute expression within sections, and fit and score the frozen readings anew."""
    table = sdata["table"]
    file, counts, frames = arguments.out / "shuffled-default_reading.csv", table.X.copy(), []
    folds = spots_of({name: ALL_FOLDS[name] for name in arguments.tests})
    for seed in range(arguments.repeats):
        rng, order = np.random.default_rng(seed), np.arange(table.n_obs)
        for section in table.obs["section"].unique():
            at = np.flatnonzero(table.obs["section"] == section)
            order[at] = rng.permutation(at)
        table.X = counts[order]
        found = compared(
            sdata, arguments, methods=["frozen-best"], readout=[LOW_RANK, FROZEN, DEFAULT], folds=folds,
            n_bootstrap=1,
        )  # fmt: skip
        frames.append(found.assign(repeat=seed))
        pd.concat(frames).to_csv(file, index=False)
        print("shuffled", seed, flush=True)
    table.X = counts
    return pd.concat(frames)


def label(row: pd.Series) -> str:
    """Return which of the four readings a row is of."""
    if row["method"] == "bone":
        return "default"
    return {"ridge": "ridge", "low-rank": "method=None", "blend": "stand-in"}[row["head"]]


def percent(value: float) -> str:
    return "" if np.isnan(value) else f"{100 * value:+.1f} %"


def markdown(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return (
        "\n".join(lines + ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]) + "\n"
    )


def four_table(frame: pd.DataFrame) -> str:
    """Return a row per fold, gene set and seed: the readings, the gain over ridge, and the adapter's own share."""
    each = frame[frame["section"] != "pooled"].assign(reading=frame.apply(label, axis=1))
    rows = []
    for (fold, genes), of in each.groupby(["fold", "genes"], sort=False):
        named = of[of["reading"] != "default"].groupby("reading")
        by_section = {name: part.set_index("section")["pearson"] for name, part in named}
        fixed = {name: part.mean() for name, part in by_section.items()}
        ridge, frozen, stand_in = (fixed.get(name, np.nan) for name in ("ridge", "method=None", "stand-in"))
        row = {"test": fold, "genes": genes, "ridge": f"{ridge:.3f}", "method=None": f"{frozen:.3f}"}
        row["to ridge"] = percent(frozen / ridge - 1)
        trained = of[of["reading"] == "default"]
        for seed, part in trained.groupby("seed"):
            own = part.set_index("section")["pearson"]
            more = int((own > by_section["stand-in"].reindex(own.index)).sum())
            rows.append(
                {
                    **row, "seed": int(seed), "default": f"{own.mean():.3f}",
                    "default to ridge": percent(own.mean() / ridge - 1), "stand-in": f"{stand_in:.3f}",
                    "adapter's share": percent(own.mean() / stand_in - 1),
                    "sections with a share above 0": f"{more} of {len(own)}",
                }
            )  # fmt: skip
        if trained.empty:
            rows.append(row)
    # folds that were trained first: they have all columns
    return markdown(sorted(rows, key=len, reverse=True))


def interval_table(frame: pd.DataFrame) -> str:
    """Return a row per test section, gene set and seed: the paired difference of the default to its stand-in."""
    of = frame[(frame["method"] != "frozen-best") & (frame["section"] != "pooled")]
    rows = [
        {
            "test": f"{row.fold}, {row.section}", "genes": row.genes, "method": row.method, "seed": row.seed,
            "pearson": f"{row.pearson:.3f}",
            "difference to frozen-best": f"{row.difference:+.4f}",
            "95 % interval": f"{row.difference_low:+.4f} to {row.difference_high:+.4f}",
        }
        for row in of.itertuples()
    ]  # fmt: skip
    return markdown(rows)


def adapters_table(frame: pd.DataFrame) -> str:
    """Return a row per method: every column, the difference to `frozen-best` with its interval, and the mean change."""
    pooled = frame[frame["section"] == "pooled"]
    best = pooled[pooled["method"] == "frozen-best"].set_index(["fold", "genes"])["pearson"]
    rows = []
    for method, of in pooled.groupby("method", sort=False):
        row: dict[str, Any] = {
            "method": method,
            "parameters": "" if of["n_parameters"].isna().all() else int(of["n_parameters"].max()),
        }
        for one in of.itertuples():
            text = f"{one.pearson:.3f}"
            if method != "frozen-best":
                text += f" ({one.difference_low:+.3f} to {one.difference_high:+.3f})"
            row[f"{one.fold} {one.genes}"] = text
        change = of.set_index(["fold", "genes"])["pearson"] / best - 1
        rows.append({**row, "mean change": percent(float(change.mean())), "worst": percent(float(change.min()))})
    return markdown(rows)


def shuffled_table(frame: pd.DataFrame) -> str:
    pooled = frame[frame["section"] == "pooled"]
    rows = []
    for (readout, fold, genes), of in pooled.groupby(["readout", "fold", "genes"], sort=False):
        r = of["pearson"]
        rows.append(
            {
                "reading": readout, "test": fold, "genes": genes, "repeats": len(r), "mean": f"{r.mean():+.4f}",
                "smallest": f"{r.min():+.3f}", "largest": f"{r.max():+.3f}",
                "mean / standard error": f"{r.mean() / (r.std() / len(r) ** 0.5):+.1f}",
            }
        )  # fmt: skip
    return markdown(rows)


def run(arguments: Any) -> None:
    """Run one part, and write its rows."""
    part, csv = arguments.part, arguments.out / f"{arguments.part}-default_reading.csv"
    if part == "phantom":
        sdata, folds = phantoms(arguments.patients)
        four(sdata, folds, arguments)
    elif part == "bulb":
        four(bulb(arguments.bulb), spots_of(BULB_FOLDS), arguments)
    elif part == "her2st":
        four(her2st(arguments.her2st), spots_of(ALL_FOLDS), arguments)
    elif part == "shuffled":
        shuffled(her2st(arguments.her2st), arguments)
    else:
        sdata, frames = her2st(arguments.her2st), []
        for fold, sides in spots_of(FOLDS).items():
            for method, given in ADAPTERS.items():  # one after the other, so that an interrupted run has whole fits
                pair = {"frozen-best": "frozen-best", method: given}
                frames.append(compared(sdata, arguments, methods=pair, readout=DEFAULT, folds={fold: sides}))
                pd.concat(frames).drop_duplicates(["fold", "section", "genes", "method"]).to_csv(csv, index=False)
                print(fold, method, flush=True)


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--bulb", type=Path, help="folder with MOB1 to MOB4 of STUtility")
    parser.add_argument("--trained", nargs="*", help="tests for which adapters are trained; all of the part by default")
    parser.add_argument("--patients", nargs="+", type=int, default=[2, 4, 8, 16], help="training patients, phantom")
    parser.add_argument("--tests", nargs="+", choices=list(ALL_FOLDS), default=list(FOLDS), help="for shuffled labels")
    parser.add_argument("--repeats", type=int, default=20, help="permutations of shuffled labels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parsed(parser, needs=("vits", "part"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.only != "table":
        run(arguments)
    for part in PARTS:
        file = arguments.out / f"{part}-default_reading.csv"
        if file.exists():
            frame = pd.read_csv(file, dtype={"fold": str})
            if part == "shuffled":
                print(f"{part}\n\n{shuffled_table(frame)}")
            elif part == "adapters":
                print(f"{part}\n\n{adapters_table(frame)}")
            else:
                print(f"{part}\n\n{four_table(frame)}\n{interval_table(frame)}")
    print(machine())


if __name__ == "__main__":
    main()
