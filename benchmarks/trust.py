"""Coverage of intervals on patients that were never seen, beside rivals; how novel spoilt tiles look; what it costs.

    python benchmarks/trust.py --out FOLDER --part phantom
    python benchmarks/trust.py --her2st PATH --vits PATH --out FOLDER --part her2st
    python benchmarks/trust.py --her2st PATH --vits PATH --out FOLDER --part novelty
    python benchmarks/trust.py --bulb PATH --vits PATH --out FOLDER --part bulb
    python benchmarks/trust.py --out FOLDER --part shifted
    python benchmarks/trust.py --out FOLDER --only table

``phantom``: 20 synthetic patients, 16 train and 4 are tested, five draws of the four; the tiny encoder, nothing trained
but the head (preset "quick"). Coverage of measurements at 90 %, closed and randomised, as sequenced and ten times
shallower (binomial thinning). Rivals at the same target: the training mean with a constant width, residuals of log
values on the training spots, and on held-out groups (``target="as_is"``).
``her2st``: the same for intervals of counts and of log residuals on C4, B4 and from B4 to C, all expressed genes.
``bulb``: the same on the mouse olfactory bulb, from animal to animal, as ``default_reading.py`` reads it, all genes.
``novelty``: share of tiles flagged at 5 % of the sections tested: as they are, blurred, folded, marked by a pen, at
other pixel sizes, with other stains; her2st (C4, C3, C2 and B4 by C sections) and 8 synthetic patients (6 to 2, three
draws), ViT-S/14. Seconds are of the processor: of a fit, and of what it keeps for intervals and novelty.
``shifted``: 12 synthetic patients, 9 train and 3 are tested, with haematoxylin and eosin scaled, blurred, with the
spots of one tissue state alone, and with tissue that no training spot shows: share of tiles flagged, and coverage of
all tiles and of those that are not flagged. What novelty costs in a prediction is printed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import spatialdata as sd
from anndata import AnnData
from scipy import sparse
from scipy.ndimage import gaussian_filter
from skimage.color import hed2rgb, rgb2hed
from spatialdata import SpatialData
from spatialdata.models import Image2DModel
from spatialdata.transformations import get_transformation

import pekasc as pk
from _her2st import ALL_FOLDS, KeptRows, parsed, quick_parser, vits
from _machine import machine
from default_reading import BULB_FOLDS, spots_of
from default_reading import bulb as bulb_of
from pekasc.models.selection import _result

LEVEL = 0.9
SIZES = {"0.5": 0.5, "0.67": 0.67, "1.5": 1.5, "2": 2.0}  # of a pixel, and those of the tiles in um
PAIRS = ((7, 8), (1, 2), (4, 5))  # of eight synthetic patients, tested by the others
NOVELTY_SPLITS: dict[str, tuple[str, tuple[list[str], list[str]]]] = {
    **{name: ("her2st", ALL_FOLDS[name]) for name in ("C4", "C3", "C2", "B4")},
    **{
        f"P{a}, P{b}": ("synthetic", ([f"P{i}S1" for i in range(1, 9) if i not in (a, b)], [f"P{a}S1", f"P{b}S1"]))
        for a, b in PAIRS
    },
}
PARTS = ("phantom", "her2st", "bulb", "novelty", "shifted")
QUIET: dict[str, Any] = {"progress": False}


def log_of(table: AnnData) -> np.ndarray:
    """Return log1p(1e4 * count / total)."""
    counts = table.X.toarray()
    return np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))


def thinned(table: AnnData, share: float) -> sparse.csr_matrix:
    """Return counts of which a share is left."""
    counts = sparse.csr_matrix(table.X)
    rng = np.random.default_rng(0)
    left = sparse.csr_matrix(
        (rng.binomial(counts.data.astype(np.int64), share).astype(np.float32), counts.indices, counts.indptr),
        shape=counts.shape,
    )
    left.eliminate_zeros()
    return left


def coverage_of(sdata: SpatialData, adapter: pk.Adapter, test: list[str], depth: str) -> list[dict[str, Any]]:
    """Return rows of coverage and width of an adapter's intervals, one a test section."""
    pk.tl.predict_expression(sdata, adapter, **QUIET)
    scores = pk.tl.evaluate(sdata)
    scores = scores[scores["group"].isin(test)]
    rows = []
    for group, of in scores.groupby("group"):
        genes = of[["coverage", "coverage_randomised", "width"]]
        low, high = of["coverage_randomised"].quantile([0.05, 0.95])
        rows.append({"depth": depth, "group": group, **genes.mean().to_dict(), "low": low, "high": high})
    return rows


def constant(sdata: SpatialData, adapter: pk.Adapter, train: list[str], test: list[str]) -> dict[str, list[Any]]:
    """Return rows of two rivals of constant width: around the training mean, and around predictions."""
    table = sdata["table"]
    region = table.obs["region"].astype(str)
    at = table.var_names.get_indexer(list(adapter.genes))
    y, predicted = log_of(table)[:, at], np.asarray(table.layers["peka"])[:, at]
    training = region.isin(train).to_numpy() & np.isfinite(predicted).all(axis=1)
    out: dict[str, list[Any]] = {}
    for name, centre in (("training mean, constant width", np.broadcast_to(y[training].mean(axis=0), y.shape)),
                         ("residuals on training spots", predicted)):  # fmt: skip
        width = np.quantile(np.abs(y - centre)[training], LEVEL, axis=0)
        rows = []
        for group in test:
            own = (region == group).to_numpy() & np.isfinite(predicted).all(axis=1)
            inside = (np.abs(y - centre)[own] <= width).mean(axis=0)
            low, high = np.quantile(inside, [0.05, 0.95])
            rows.append(
                {
                    "group": group,
                    "coverage": float(inside.mean()),
                    "width": float(2 * width.mean()),
                    "low": low,
                    "high": high,
                }
            )
        out[name] = rows
    return out


def both(sdata: SpatialData, train: list[str], test: list[str], depth_of: dict[str, Any], **fit: Any) -> list[Any]:
    """Return rows of intervals of counts, of log residuals and of the rivals, at every depth."""
    table, rows = sdata["table"], []
    counts = table.X.copy()
    table.layers["log"] = sparse.csr_matrix(log_of(table).astype(np.float32))
    clock = time.process_time()
    adapter = pk.tl.fit_adapter(sdata, train=train, **fit, **QUIET)
    fitted = time.process_time() - clock
    clock = time.process_time()
    calibrated = pk.tl.calibrate(adapter, level=LEVEL)
    print("fit", round(fitted, 1), "s, calibrate", round(time.process_time() - clock, 3), "s", flush=True)
    residual = pk.tl.fit_adapter(
        sdata, train=train, target="as_is", layer="log", genes=list(adapter.genes), **fit, **QUIET
    )
    residual = pk.tl.calibrate(residual, level=LEVEL)
    for depth, left in depth_of.items():
        if left is not None:
            table.X = left
            table.layers["log"] = sparse.csr_matrix(log_of(table).astype(np.float32))
        for name, one in (("counts", calibrated), ("log residuals of held-out groups", residual)):
            rows += [{"interval": name, **row} for row in coverage_of(sdata, one, test, depth)]
            if name == "counts":  # the layer is replaced by the next one
                for rival, of in constant(sdata, adapter, train, test).items():
                    rows += [{"interval": rival, "depth": depth, **row} for row in of]
    table.X = counts
    return rows


def phantom(kept: KeptRows) -> None:
    sdata = pk.datasets.phantom(20, size_um=1000.0, mpp=1.0)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    regions = list(dict.fromkeys(sdata["table"].obs["region"].astype(str)))
    shallow = thinned(sdata["table"], 0.1)
    for draw in range(5):
        if any(row["draw"] == draw for row in kept.rows):
            continue
        test = [str(name) for name in np.random.default_rng(draw).choice(regions, 4, replace=False)]
        train = [name for name in regions if name not in test]
        # training spots keep their depth: only what is tested is shallow
        mixed = sdata["table"].X.copy().tolil()
        at = np.flatnonzero(sdata["table"].obs["region"].isin(test))
        mixed[at] = shallow[at]
        depths = {"as sequenced": None, "ten times shallower": sparse.csr_matrix(mixed)}
        found = both(sdata, train, test, depths, method=None, recipe="quick")
        kept.add([{"draw": draw, "test": "phantom", **row} for row in found])
        print("phantom", draw, flush=True)


def her2st(kept: KeptRows, arguments: Any) -> None:
    sdata = pk.datasets.her2st(("B4", "C2", "C3", "C4"), path=arguments.her2st)
    pk.pp.tile(sdata, tile_px=112, mpp=1.0)
    for split in ("C4", "B4", "B to C"):
        if any(row["test"] == split for row in kept.rows):
            continue
        train, test = ([f"{section}_spots" for section in side] for side in ALL_FOLDS[split])
        found = both(sdata, train, test, {"as sequenced": None}, method=None, encoder=vits(arguments.vits))
        kept.add([{"draw": 0, "test": split, **row} for row in found])
        print("her2st", split, flush=True)


def bulb(kept: KeptRows, arguments: Any) -> None:
    sdata = bulb_of(arguments.bulb)
    for split, (train, test) in spots_of(BULB_FOLDS).items():
        if any(row["test"] == split for row in kept.rows):
            continue
        found = both(sdata, train, test, {"as sequenced": None}, method=None, encoder=vits(arguments.vits))
        kept.add([{"draw": 0, "test": split, **row} for row in found])
        print("bulb", split, flush=True)


def blurred(tiles: np.ndarray, sigma: float) -> np.ndarray:
    return np.rint(gaussian_filter(tiles.astype(np.float32), (0, sigma, sigma, 0))).astype(np.uint8)


def stained(tiles: np.ndarray, factor: float, which: slice = slice(0, 2)) -> np.ndarray:
    """Return tiles whose haematoxylin and eosin are scaled."""
    hed = rgb2hed(tiles)
    hed[..., which] *= factor
    return np.rint(255 * np.clip(hed2rgb(hed), 0, 1)).astype(np.uint8)


def marked(tiles: np.ndarray) -> np.ndarray:
    """Return tiles with a stroke of a pen across each, a quarter of their width."""
    rng, out = np.random.default_rng(0), tiles.copy()
    n = tiles.shape[1]
    y, x = np.mgrid[:n, :n] - n / 2
    for tile in out:
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.25, 0.25) * n
        stroke = np.abs(x * np.cos(angle) + y * np.sin(angle) - offset) < 0.12 * n
        colour = np.array([(20, 40, 140), (20, 110, 50), (25, 25, 25)][rng.integers(3)])
        tile[stroke] = (0.25 * tile[stroke] + 0.75 * colour).astype(np.uint8)
    return out


def ringed(tiles: np.ndarray) -> np.ndarray:
    """Return tiles with a ring of a pen in each, a tenth of their width wide: no fault that a fit shows."""
    rng, out = np.random.default_rng(0), tiles.copy()
    n = tiles.shape[1]
    y, x = np.mgrid[:n, :n] - n / 2
    for tile in out:
        centre, radius = rng.uniform(-0.15, 0.15, 2) * n, rng.uniform(0.2, 0.35) * n
        ring = np.abs(np.hypot(x - centre[0], y - centre[1]) - radius) < 0.05 * n
        tile[ring] = (0.25 * tile[ring] + 0.75 * np.array([20, 40, 140])).astype(np.uint8)
    return out


def folded(tiles: np.ndarray) -> np.ndarray:
    """Return tiles a third of which lies twice under the light: a fold of the tissue across each."""
    rng, out = np.random.default_rng(0), tiles.copy()
    n = tiles.shape[1]
    y, x = np.mgrid[:n, :n] - n / 2
    for tile in out:
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.15, 0.15) * n
        fold = np.abs(x * np.cos(angle) + y * np.sin(angle) - offset) < n / 6
        light = tile.astype(np.float32) * tile[::-1, ::-1] / 245  # densities add up
        tile[fold] = np.rint(np.minimum(light, 255))[fold].astype(np.uint8)
    return out


def novelty(kept: KeptRows, arguments: Any) -> None:
    data = {
        "her2st": lambda: pk.datasets.her2st(("B4", "C2", "C3", "C4"), path=arguments.her2st),
        "synthetic": lambda: pk.datasets.phantom(8, size_um=1200.0, mpp=0.5),
    }
    for name, make in data.items():
        splits = {split: sides for split, (of, sides) in NOVELTY_SPLITS.items() if of == name}
        if splits.keys() <= {row["split"] for row in kept.rows}:
            continue
        sdata = make()
        for mpp in (1.0, *SIZES.values()):
            pk.pp.tile(sdata, tile_px=112, mpp=mpp, key_added=f"tiles{mpp:g}")
        for split, (train, test) in splits.items():
            if any(row["split"] == split for row in kept.rows):
                continue
            kept.add([{"split": split, **row} for row in flagged(sdata, train, test, vits(arguments.vits))])


def flagged(sdata: SpatialData, train: list[str], test: list[str], encoder: pk.models.Encoder) -> list[dict[str, Any]]:
    """Return the share of tiles of the test sections with a p-value below 0.05, by how they look; and what it cost."""
    region = sdata["table"].obs["region"].astype(str)
    train, test = ([f"{section}_spots" for section in sections] for sections in (train, test))
    fit = {"method": None, "encoder": encoder, "recipe": "quick", "key": "tiles1"}
    clock = time.process_time()
    with timed("held_out_of") as held_out, timed("tile_novelty") as looked:
        adapter = pk.tl.fit_adapter(sdata, train=train, **fit, **QUIET)
    seconds = {"fit": time.process_time() - clock, "held-out predictions": sum(held_out), "novelty": sum(looked)}
    rows: list[dict[str, Any]] = [{"look": f"seconds, {name}", "value": value} for name, value in seconds.items()]
    names = sdata["table"].obs_names[region.isin(test)]
    tiles = {m: np.asarray(pk.get.tiles(sdata, key=f"tiles{m:g}").sel(tile=names).compute()) for m in SIZES.values()}
    plain = np.asarray(pk.get.tiles(sdata, key="tiles1").sel(tile=names).compute())
    looks = {
        "as they are": plain, "blur of 2 um": blurred(plain, 2), "blur of 4 um": blurred(plain, 4),
        "pen": marked(plain), "white": np.full_like(plain, 245),
        **{f"pixel size x {size}": tiles[mpp] for size, mpp in SIZES.items()},
        **{f"stain x {factor:g}": stained(plain, factor) for factor in (0.35, 0.5, 0.7, 1.3, 1.6, 2.0)},
        "haematoxylin x 0.4": stained(plain, 0.4, slice(0, 1)), "eosin x 2": stained(plain, 2.0, slice(1, 2)),
        "a ring of a pen": ringed(plain), "a fold": folded(plain),
    }  # fmt: skip
    assert adapter.novelty is not None
    for look, array in looks.items():
        features = embedded(encoder, array, adapter.novelty.depths)
        p = adapter.novelty.p_values(adapter.novelty.distance(features))
        rows.append({"look": look, "value": float((p < 0.05).mean())})
        print(train, test, look, round(rows[-1]["value"], 3), flush=True)
    return [{**row, "n": int(region.isin(test).sum())} for row in rows]


@contextmanager
def timed(name: str) -> Iterator[list[float]]:
    """Give a list to which one of the functions that end a fit adds the seconds of the processor that it takes."""
    function, seconds = getattr(_result, name), list[float]()

    def timing(*args: Any) -> Any:
        clock = time.process_time()
        found = function(*args)
        seconds.append(time.process_time() - clock)
        return found

    with patch.object(_result, name, timing):
        yield seconds


def with_look(sdata: SpatialData, regions: list[str], change: Any) -> SpatialData:
    """Return an object with the images of some sections changed; `change` takes and gives (1, y, x, c) uint8."""
    images = dict(sdata.images)
    for region in regions:
        name = region.replace("_spots", "_he")
        finest = sd.get_pyramid_levels(sdata.images[name], n=0)
        pixels = change(np.asarray(finest.transpose("y", "x", "c").values)[None])[0]
        places = get_transformation(finest, get_all=True)
        images[name] = Image2DModel.parse(
            np.moveaxis(pixels, -1, 0), c_coords=["r", "g", "b"], transformations=places, scale_factors=[2]
        )
    return SpatialData(images=images, shapes=dict(sdata.shapes), tables={"table": sdata["table"].copy()})


def shifted(kept: KeptRows) -> None:
    sdata = pk.datasets.phantom(12, size_um=1000.0, mpp=1.0)
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    table = sdata["table"]
    region, states = table.obs["region"].astype(str), table.obsm["phantom_states"]
    regions = list(dict.fromkeys(region))
    train, test = regions[:9], regions[9:]
    everything = np.ones(table.n_obs, dtype=bool)
    fits: dict[str, tuple[np.ndarray, list[tuple[str, Any, np.ndarray]]]] = {
        "all states": (everything, [
            ("as they are", None, everything),
            *((f"stain x {factor:g}", partial(stained, factor=factor), everything) for factor in (0.35, 0.7, 1.3, 2.0)),
            *((f"blur of {sigma} um", partial(blurred, sigma=sigma), everything) for sigma in (2, 4)),
            *((f"mostly {state}", None, (states[state] > 0.5).to_numpy()) for state in ("tumour", "stroma", "immune")),
        ]),
        "trained without glands and fat": ((states["gland"] + states["fat"] < 0.2).to_numpy(), [
            ("the others", None, (states["gland"] + states["fat"] < 0.2).to_numpy()),
            ("mostly glands or fat, never shown", None, (states["gland"] + states["fat"] > 0.5).to_numpy()),
        ]),
    }  # fmt: skip
    for fit, (shown, looks) in fits.items():
        if any(row["fit"] == fit for row in kept.rows):
            continue
        mask = region.isin(train).to_numpy() & shown
        adapter = pk.tl.calibrate(
            pk.tl.fit_adapter(sdata, train=mask, method=None, recipe="quick", **QUIET), level=LEVEL
        )
        for look, change, rows in looks:
            changed = sdata if change is None else with_look(sdata, test, change)
            pk.tl.predict_expression(changed, adapter, **QUIET)
            of = changed["table"]
            wanted = region.isin(test).to_numpy() & rows
            flagged = of.obs["peka_novelty"].to_numpy() < 0.05
            row = {"fit": fit, "look": look, "tiles": int(wanted.sum()), "flagged": float(flagged[wanted].mean())}
            for name, some in (("all", wanted), ("not flagged", wanted & ~flagged)):
                if some.sum() >= 20:
                    part = of.copy()
                    part.layers["peka"] = np.where(some[:, None], part.layers["peka"], np.nan)
                    part.obs["one"] = "one"
                    scores = pk.tl.evaluate(part, groups="one")
                    row |= {
                        f"coverage, {name}": scores["coverage_randomised"].mean(),
                        f"r, {name}": scores["pearson"].mean(),
                    }
            kept.add([row])
            print(row, flush=True)
    cost(sdata, adapter)


def cost(sdata: SpatialData, adapter: pk.Adapter) -> None:
    """Print seconds of the processor of predictions with and without intervals and novelty, in turn, three rounds."""
    plain = replace(adapter, calibration=None)
    seconds: dict[str, list[float]] = {"plain": [], "calibrated": []}
    for _ in range(3):
        for name, one in (("plain", plain), ("calibrated", adapter)):
            clock = time.process_time()
            pk.tl.predict_expression(sdata, one, **QUIET)
            seconds[name].append(time.process_time() - clock)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    print("seconds of a prediction", seconds, "calibrated / plain", round(medians["calibrated"] / medians["plain"], 3))


def embedded(encoder: pk.models.Encoder, tiles: np.ndarray, depths: Sequence[tuple[int, ...] | None]) -> np.ndarray:
    """Return the features of tiles at some depths side by side, from one pass."""
    from pekasc.models.encoders import EncoderNetwork
    from pekasc.models.features import embed
    from pekasc.models.runtime import resolve_device
    from pekasc.tiling import ArrayTiles

    model = EncoderNetwork(encoder, tiles.shape[1])
    found = embed(model, ArrayTiles(tiles), depths, batch_size=64, device=resolve_device("cpu"), precision="fp32")
    return np.concatenate([found[depth] for depth in depths], axis=1)


def main() -> None:
    parser = quick_parser(__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--bulb", type=Path, help="folder with MOB1 to MOB4 of STUtility")
    arguments = parsed(parser, needs=())
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept = {part: KeptRows(arguments.out / f"trust-{part}.jsonl") for part in PARTS}
    if arguments.only != "table":
        if arguments.part == "phantom":
            phantom(kept["phantom"])
        elif arguments.part == "her2st":
            her2st(kept["her2st"], arguments)
        elif arguments.part == "bulb":
            bulb(kept["bulb"], arguments)
        elif arguments.part == "shifted":
            shifted(kept["shifted"])
        else:
            novelty(kept["novelty"], arguments)
    for part in ("phantom", "her2st", "bulb"):
        if kept[part].rows:
            frame = pd.DataFrame(kept[part].rows)
            by = frame.groupby(["test", "depth", "interval"], sort=False)
            table = by[["coverage", "coverage_randomised", "width", "low", "high"]].mean()
            table["worst section"] = by["coverage_randomised"].min().fillna(by["coverage"].min())
            print(table.round(3).to_string())
    if kept["novelty"].rows:
        print(
            pd.DataFrame(kept["novelty"].rows)
            .pivot_table(index="look", columns="split", values="value", sort=False)
            .round(2)
            .to_string()
        )
    if kept["shifted"].rows:
        print(pd.DataFrame(kept["shifted"].rows).round(3).to_string(index=False))
    print(machine())


if __name__ == "__main__":
    main()
