"""Stain maps: held-out error and scores on her2st, scores kept on patients stained otherwise, and tiles per second.

`her2st`: C4 (C2 and C3 train) and B4 (C2, C3, C4 train), 112 px at 1.0 um/px, frozen ViT-S/14 (`method=None`), 50
spatially variable and 50 highly variable genes that the training sections choose. `phantom`: six synthetic patients,
three train, three are tested as they are and with haematoxylin and eosin of their images scaled in optical density; 50
spatially variable genes of the training patients. Both also give the held-out error inside the training data, by which
a default would be chosen. `speed`: reading the tiles of C2 at 112 and 224 px with and without a map, each the median of
seven passes, taking turns; the first pass, in which colours are computed, on its own.

    python benchmarks/stain.py --her2st PATH --vits PATH --out results/stain --part her2st
    python benchmarks/stain.py --vits PATH --out results/stain --part phantom
    python benchmarks/stain.py --her2st PATH --out results/stain --part speed
    python benchmarks/stain.py --out results/stain --only table

Finished pieces are kept in the folder ``--out``, so that a run that was interrupted goes on.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pekasc as pk
from _her2st import FOLDS, KeptRows, load_split, parsed, quick_parser, split_of, vits
from _machine import machine
from pekasc._sections import reference_stain, section_readers, tiled_sections, with_stain
from pekasc.tiling import TileSpec

STAINS = (None, "reinhard", "macenko")
# factors on haematoxylin and eosin
SCALED = ((1.0, 1.0), (0.7, 0.7), (1.3, 1.3), (0.7, 1.3), (1.3, 0.7))
VECTORS = np.array([[0.65, 0.70, 0.29], [0.16, 0.92, 0.35]])  # those of the phantom, before each patient's own shift
N_TRAIN, N_TEST = 3, 3
VITS = "vits14"


def fitted(
    training: SpatialData, genes: list[str], method: str | None, arguments: Any, stain: str | None, encoder: str = VITS
) -> Any:
    """Return an adapter, with a small error on held-out training groups among its settings."""
    return pk.tl.fit_adapter(
        training, encoder=vits(arguments.vits) if encoder == VITS else encoder, method=method, genes=genes,
        readout={"stain": stain}, random_state=arguments.seed, progress=False,
        compute={"cache": arguments.out / "cache"},
    )  # fmt: skip


def held_out(adapter: Any) -> dict[str, float]:
    """Return the weighted error of the readout's settings on held-out training groups, and the mean correlation."""
    table = adapter.selection
    table = table[(table["stage"] == "reading") & (table["weight"] > 0)]
    error = float(np.average(table["error"], weights=table["weight"]))
    return {"error": error, "held_out": float(adapter.gene_scores["pearson"].mean())}


def on_her2st(arguments: Any, kept: KeptRows) -> None:
    done = {(row["fold"], row["stain"], row["method"], row["seed"]) for row in kept.rows}
    stains = [None if stain == "none" else stain for stain in arguments.stains]
    for fold in FOLDS:
        split = None
        for stain in stains:
            for method in arguments.methods:
                name = None if method == "none" else method
                if (fold, stain, method, arguments.seed) in done:
                    continue
                split = split or load_split(arguments.her2st, fold)
                start = time.perf_counter()
                adapter = fitted(split.training, split.genes, name, arguments, stain)
                row = {"fold": fold, "stain": stain, "method": method, **held_out(adapter), **split.score(adapter)}
                kept.add([{**row, "seed": arguments.seed, "seconds": time.perf_counter() - start}])
                print(kept.rows[-1], flush=True)


def rescaled(sdata: SpatialData, factors: tuple[float, float]) -> SpatialData:
    """Return sections whose haematoxylin and eosin are multiplied in optical density."""
    third = np.cross(*VECTORS)
    basis = np.vstack([VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True), third / np.linalg.norm(third)])
    operator = np.linalg.inv(basis) @ np.diag([*factors, 1.0]) @ basis
    images = {}
    for name, image in sdata.images.items():
        level = image["scale0"]["image"] if hasattr(image, "children") and image.children else image
        rgb = np.moveaxis(np.asarray(level), 0, -1).astype(np.float64)
        density = -np.log((rgb + 1) / 256) @ operator
        out = np.clip(np.round(256 * np.exp(-density) - 1), 0, 255).astype(np.uint8)
        images[name] = Image2DModel.parse(
            np.moveaxis(out, -1, 0), dims=("c", "y", "x"), c_coords=["r", "g", "b"],
            transformations=get_transformation(image, get_all=True),
        )  # fmt: skip
    return SpatialData(images=images, shapes=dict(sdata.shapes), tables={"table": sdata["table"].copy()})


def some(sdata: SpatialData, patients: list[str]) -> SpatialData:
    """Return the sections of some patients."""
    table = sdata["table"]
    table = table[table.obs["patient"].isin(patients).to_numpy()].copy()
    regions = list(dict.fromkeys(table.obs["region"].astype(str)))
    table.obs["region"] = table.obs["region"].astype(str).astype("category")
    table.uns["spatialdata_attrs"] = {**table.uns["spatialdata_attrs"], "region": regions}
    return SpatialData(
        images={f"{r[:-6]}_he": sdata.images[f"{r[:-6]}_he"] for r in regions},
        shapes={r: sdata.shapes[r] for r in regions}, tables={"table": table},
    )  # fmt: skip


def on_phantom(arguments: Any, kept: KeptRows) -> None:
    name, scaled = arguments.encoder, SCALED[: arguments.n_scaled]
    done = {(row["encoder"], row["seed"], row["stain"], tuple(row["factors"])) for row in kept.rows}
    for seed in arguments.phantom_seeds:
        sdata = pk.datasets.phantom(N_TRAIN + N_TEST, size_um=arguments.size_um, mpp=1.0, random_state=seed)
        patients = list(dict.fromkeys(sdata["table"].obs["patient"]))
        training, test = some(sdata, patients[:N_TRAIN]), some(sdata, patients[N_TRAIN:])
        pk.pp.tile(training, tile_px=112, mpp=1.0)
        pk.pp.tile(test, tile_px=112, mpp=1.0)
        split = split_of("phantom", training, test)
        for stain in STAINS:
            if all((name, seed, stain, factors) in done for factors in scaled):
                continue
            adapter = fitted(training, split.genes, None, arguments, stain, name)
            for factors in scaled:
                if (name, seed, stain, factors) in done:
                    continue
                split.test = rescaled(test, factors)
                pk.pp.tile(split.test, tile_px=112, mpp=1.0)
                row = {"encoder": name, "seed": seed, "stain": stain, "factors": factors}
                kept.add([{**row, **held_out(adapter), **split.score(adapter)}])
                print(kept.rows[-1], flush=True)


def speed(arguments: Any, kept: KeptRows) -> None:
    sdata = pk.datasets.her2st(("C2",), path=arguments.her2st)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    sections, spec = tiled_sections(sdata)
    for tile_px, mpp in ((112, 1.0), (224, 0.5)):
        read = TileSpec(tile_px, mpp)
        passes: dict[str, list[float]] = {}
        first: dict[str, float] = {}
        readers = {"none": section_readers(sections, read)[0]}
        measured = {}
        for stain in STAINS[1:]:
            start = time.perf_counter()
            reference, own = reference_stain(sections, spec, str(stain))
            measured[str(stain)] = time.perf_counter() - start
            readers[str(stain)] = section_readers(with_stain(sections, spec, reference, own), read)[0]
        for name, reader in readers.items():
            # once, so that what numba compiles is compiled; then colours are forgotten again
            reader.read(reader.reading_order[:32])
            reader.release()
            start = time.perf_counter()
            reader.read(reader.reading_order)
            first[name] = time.perf_counter() - start
        for _ in range(7):
            for name, reader in readers.items():
                start = time.perf_counter()
                reader.read(reader.reading_order)
                passes.setdefault(name, []).append(time.perf_counter() - start)
        n = readers["none"].n
        kept.add(
            {
                "tile_px": tile_px, "stain": name, "n": n, "per_second": n / float(np.median(passes[name])),
                "first": n / first[name], "measured_seconds": measured.get(name, 0.0), "machine": machine(),
            }
            for name in readers
        )  # fmt: skip


def show(her2st: KeptRows, phantom: KeptRows, timed: KeptRows) -> None:
    for row in sorted(her2st.rows, key=lambda r: (r["fold"] != "C4", r["method"], r["seed"], str(r["stain"]))):
        print(
            f"| {row['fold']} | {row['method']} | {row['seed']} | {row['stain']} | {row['error']:.4f} | "
            f"{row['held_out']:.3f} | {row['svg']:.3f} | {row['hvg']:.3f} |"
        )
    print()
    names = [str(factors) for factors in SCALED]
    print(
        "| encoder | stain | held-out error | held-out Pearson | "
        + " | ".join(f"H, E x {name}" for name in names) + " |"
    )  # fmt: skip
    for encoder in dict.fromkeys(row["encoder"] for row in phantom.rows):
        of_encoder = [row for row in phantom.rows if row["encoder"] == encoder]
        base = {
            row["seed"]: row["svg"] for row in of_encoder if row["stain"] is None and tuple(row["factors"]) == SCALED[0]
        }
        for stain in STAINS:
            own = [row for row in of_encoder if row["stain"] == stain]
            cells = []
            for factors in SCALED:
                at = [row for row in own if tuple(row["factors"]) == factors]
                if at:
                    score = np.mean([row["svg"] for row in at])
                    share = np.mean([row["svg"] / base[row["seed"]] for row in at])
                    cells.append(f"{score:.3f} ({share:.0%})")
            if own:
                error, known = (np.mean([row[name] for row in own]) for name in ("error", "held_out"))
                print(f"| {encoder} | {stain} | {error:.4f} | {known:.3f} | " + " | ".join(cells) + " |")
    print()
    for row in timed.rows:
        base_rate = next(r["per_second"] for r in timed.rows if r["tile_px"] == row["tile_px"] and r["stain"] == "none")
        print(
            f"| {row['tile_px']} px | {row['stain']} | {row['per_second']:.0f} | {row['per_second'] / base_rate:.2f} | "
            f"{row['first']:.0f} | {row['measured_seconds']:.2f} |"
        )


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--part", choices=["her2st", "phantom", "speed"])
    parser.add_argument("--methods", nargs="+", default=["none"], help='"none" is the frozen encoder')
    parser.add_argument("--stains", nargs="+", default=["none", *STAINS[1:]], help="of the part her2st")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phantom-seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--encoder", choices=["tiny", VITS], default=VITS, help="of the part phantom")
    parser.add_argument("--n-scaled", type=int, default=len(SCALED), help="how many of the ways to stain otherwise")
    parser.add_argument("--size-um", type=float, default=800.0)
    arguments = parsed(parser, needs=())
    files = [KeptRows(arguments.out / f"{part}.jsonl") for part in ("her2st", "phantom", "speed")]
    if arguments.only != "table":
        for part, run, kept in zip(("her2st", "phantom", "speed"), (on_her2st, on_phantom, speed), files, strict=True):
            if arguments.part in (None, part):
                run(arguments, kept)
    show(*files)


if __name__ == "__main__":
    main()
