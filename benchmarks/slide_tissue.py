"""Where tissue is found: the mask over a thumbnail, the share of tiles kept, mean grey of kept and of left-out tiles.

    python benchmarks/slide_tissue.py --slides a.svs b.svs --her2st FOLDER --section C2 --out FOLDER

`pp.tile_grid` with its defaults at 224 px of 0.5 um, and once more without thresholds, for the pixels of the tiles
that it left out. A slide that does not say its pixel size is taken to have `--mpp`. The grey of a tile is the mean of
its pixels over red, green and blue. For every slide a PNG: the thumbnail, with the outline of the mask and its outside
dimmed, and beside it the tiles that were kept.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import pekasc as pk
from _machine import machine
from pekasc._keys import read_uns
from pekasc._sections import slide_section, tissue_of_slide
from pekasc._sections._tissue import coarse_picture

PACKAGES = ("pekasc", "squidpy", "tifffile", "spatialdata", "numpy")


def draw(sdata: Any, image: str, file: Path, mpp: float | None) -> float:
    """Draw the mask over the thumbnail and the tiles that were kept, and return the mask's share of the image."""
    section = slide_section(sdata, image, image_mpp=mpp, um_coordinate_system=None)
    picture, _ = coarse_picture(section)
    found = tissue_of_slide(sdata, section, "detect")
    assert found is not None
    mask = found.mask
    table = sdata["grid"]
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.5 * picture.shape[0] / picture.shape[1] + 0.6))
    axes[0].imshow(np.where(mask[..., None], picture, picture // 3))
    axes[0].contour(mask, levels=[0.5], colors="#11999e", linewidths=1.2)
    axes[0].set_title(f"{image}: mask")
    axes[1].imshow(picture)
    at = table.obsm["spatial"] @ found.px_to_mask[:2, :2].T
    half = 112 / section.mpp / 2 * found.px_to_mask[0, 0]
    for x, y in at:
        axes[1].add_patch(plt.Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, ec="#11999e", lw=0.8))
    axes[1].set_title(f"{table.n_obs} tiles kept")
    for axis in axes:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)
    return float(mask.mean())


def row(sdata: Any, image: str, out: Path, mpp: float | None = None) -> str:
    pk.pp.tile_grid(sdata, image, image_mpp=mpp)
    pk.pp.tile_grid(
        sdata,
        image,
        image_mpp=mpp,
        tissue=False,
        min_tissue=None,
        min_sharpness=None,
        max_pen=None,
        table_added="every",
    )
    share = draw(sdata, image, out / f"{image}.png", mpp)
    kept, every = (sdata[name].obs[["grid_row", "grid_col"]].apply(tuple, axis=1) for name in ("grid", "every"))
    tiles = pk.get.tiles(sdata, table_name="every")
    grey = np.concatenate(
        [np.asarray(tiles[i : i + 256]).mean(axis=(1, 2, 3), dtype=np.float64) for i in range(0, len(every), 256)]
    )
    inside = every.isin(set(kept)).to_numpy()
    record = read_uns(sdata["grid"], "grid")
    assert record is not None
    left_out = ", ".join(f"{n} {reason}" for reason, n in record["left_out"].items() if n)
    outside = f"{grey[~inside].mean():.0f}" if not inside.all() else "-"
    width, height = sdata[image].shape[::-1][:2] if hasattr(sdata[image], "shape") else (0, 0)
    if not width:
        height, width = sdata[image]["scale0"]["image"].shape[1:]
    return (
        f"| {image} | {width} x {height} | {share:.0%} | {inside.sum()} of {inside.size} ({inside.mean():.0%}) | "
        f"{left_out or 'none'} | {grey[inside].mean():.0f} | {outside} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=Path, nargs="+", required=True)
    parser.add_argument("--her2st", type=Path, required=True)
    parser.add_argument("--section", default="C2")
    parser.add_argument("--mpp", type=float, default=0.5, help="of slides that do not say it")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pekasc").setLevel(logging.ERROR)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(
        "| slide | px | mask's share of the image | tiles kept | left out | mean grey, kept | mean grey, left out |\n"
        "|---|---|---|---|---|---|---|"
    )
    for path in arguments.slides:
        sdata = pk.io.read_slide(path)
        image = next(iter(sdata.images))
        unknown = image not in sdata.attrs.get("pekasc", {}).get("image_mpp", {})
        print(row(sdata, image, arguments.out, arguments.mpp if unknown else None), flush=True)
    sdata = pk.datasets.her2st((arguments.section,), path=arguments.her2st)
    print(row(sdata, f"{arguments.section}_he", arguments.out))
    print("\n" + machine(PACKAGES))


if __name__ == "__main__":
    main()
