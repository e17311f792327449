"""Identity of tissue: are training spots known again in crops, other levels, renamed, joined and turned objects?

    python benchmarks/identity.py --her2st FOLDER --out identity.json

Sections: B4, C2, C3, C4 of her2st (C2 to C4 are serial), three patients of the phantom, and two small pieces of
phantom tissue on large, equally white scans. Every spot of a section is a training spot. In every variant of the same
section all spots have to be known again; in every other section none. Boxes are drawn at random, seed 0, of 1 to 2 mm a
side, with 12 spots or more. Seconds are those of `fit_adapter`'s part (landmarks of a section) and of a prediction's
(the same for the new object, and matching).
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import spatialdata as sd
from geopandas import GeoDataFrame
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, ShapesModel
from spatialdata.transformations import Affine, Scale, Sequence, get_transformation, set_transformation

import pekasc as pk
from _machine import machine
from pekasc._sections import Section, resolve_sections, tissue_of, trained_rows

TILE_UM = 112.0
N_BOXES = 10
PACKAGES = ("pekasc", "scikit-image", "spatialdata", "numpy")


def of_section(sdata: SpatialData, name: str) -> SpatialData:
    """Return one section as an object of its own."""
    table = sdata["table"][sdata["table"].obs["region"] == f"{name}_spots"].copy()
    table.obs["region"] = table.obs["region"].cat.remove_unused_categories()
    table.uns["spatialdata_attrs"]["region"] = f"{name}_spots"
    pixels = np.asarray(sd.get_pyramid_levels(sdata[f"{name}_he"], n=0))  # decoded once
    image = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), scale_factors=[2, 2],
        transformations=get_transformation(sdata[f"{name}_he"], get_all=True),
    )  # fmt: skip
    return SpatialData(
        images={f"{name}_he": image},
        shapes={f"{name}_spots": sdata[f"{name}_spots"].copy()},
        tables={"table": table},
    )


def on_white(sdata: SpatialData, name: str, at: tuple[int, int], side_px: int) -> SpatialData:
    """Return a section whose picture is a small part of a white scan of `side_px` pixels."""
    new = of_section(sdata, name)
    pixels = np.asarray(sd.get_pyramid_levels(new[f"{name}_he"], n=0))
    scan = np.full((3, side_px, side_px), 245, np.uint8)
    scan[:, at[1] : at[1] + pixels.shape[1], at[0] : at[0] + pixels.shape[2]] = pixels
    move(new, name, np.array([[1, 0, at[0]], [0, 1, at[1]], [0, 0, 1.0]]))
    replace_image(new, name, scan, Scale([1.0, 1.0], axes=("x", "y")))
    return new


def replace_image(sdata: SpatialData, name: str, pixels: np.ndarray, transformation: Any) -> None:
    del sdata.images[f"{name}_he"]
    sdata.images[f"{name}_he"] = Image2DModel.parse(
        pixels, dims=("c", "y", "x"), transformations={name: transformation}, scale_factors=[2]
    )


def move(sdata: SpatialData, name: str, matrix: np.ndarray) -> None:
    """Move the spots by a 3 x 3 matrix."""
    spots = sdata.shapes[f"{name}_spots"]
    xy = np.column_stack([spots.geometry.x, spots.geometry.y]) @ matrix[:2, :2].T + matrix[:2, 2]
    frame = GeoDataFrame({"radius": spots["radius"].to_numpy()}, geometry=shapely.points(xy), index=spots.index)
    sdata.shapes[f"{name}_spots"] = ShapesModel.parse(frame, transformations=get_transformation(spots, get_all=True))


def boxes(sdata: SpatialData, name: str, mpp: float, rng: np.random.Generator) -> Iterator[SpatialData]:
    """Yield crops around random boxes of tissue."""
    centres = np.column_stack([sdata[f"{name}_spots"].geometry.x, sdata[f"{name}_spots"].geometry.y])
    found = 0
    while found < N_BOXES:
        side = rng.uniform(1000, 2000, 2) / mpp
        start = centres[rng.integers(len(centres))] - side * rng.uniform(0.2, 0.8, 2)
        if ((centres > start) & (centres < start + side)).all(axis=1).sum() < 12:
            continue
        found += 1
        yield sd.bounding_box_query(
            sdata, axes=("x", "y"), min_coordinate=start, max_coordinate=start + side, target_coordinate_system=name
        )


def coarser(sdata: SpatialData, name: str, level: int) -> SpatialData:
    new = of_section(sdata, name)
    step = 2**level
    pixels = np.asarray(sd.get_pyramid_levels(new[f"{name}_he"], n=0))
    height, width = (n // step * step for n in pixels.shape[1:])
    pixels = pixels[:, :height, :width].reshape(3, height // step, step, width // step, step).mean((2, 4))
    replace_image(new, name, pixels.astype(np.uint8), Scale([step, step], axes=("x", "y")))
    return new


def turned(sdata: SpatialData, name: str, quarters: int, mirrored: bool) -> SpatialData:
    """Return a section scanned in another orientation: pixels and spots turn together."""
    new = of_section(sdata, name)
    pixels = np.asarray(sd.get_pyramid_levels(new[f"{name}_he"], n=0))
    matrix = np.eye(3)
    for _ in range(quarters):
        matrix = np.array([[0, 1, 0], [-1, 0, pixels.shape[2]], [0, 0, 1.0]]) @ matrix
        pixels = np.rot90(pixels, axes=(1, 2))
    if mirrored:
        matrix = np.array([[-1, 0, pixels.shape[2]], [0, 1, 0], [0, 0, 1.0]]) @ matrix
        pixels = pixels[:, :, ::-1]
    move(new, name, matrix)
    replace_image(new, name, np.ascontiguousarray(pixels), Scale([1.0, 1.0], axes=("x", "y")))
    return new


def by_transformation(sdata: SpatialData, name: str, degrees: float) -> SpatialData:
    """Return a section in a coordinate system that is turned, the pixels as they are."""
    new = of_section(sdata, name)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = Affine(np.array([[c, -s, 70], [s, c, -30], [0, 0, 1]]), input_axes=("x", "y"), output_axes=("x", "y"))
    for element in (new[f"{name}_he"], new[f"{name}_spots"]):
        set_transformation(element, Sequence([get_transformation(element, name), turn]), name)
    return new


def renamed(sdata: SpatialData, name: str) -> SpatialData:
    new = of_section(sdata, name)
    new.images["slide_7"] = new.images.pop(f"{name}_he")
    return new


def joined(sdata: SpatialData, name: str, other: SpatialData) -> SpatialData:
    return sd.concatenate([of_section(sdata, name), other], concatenate_tables=True)


def variants(sdata: SpatialData, name: str, mpp: float, other: SpatialData) -> Iterator[tuple[str, SpatialData]]:
    rng = np.random.default_rng(0)
    levels = {level: coarser(sdata, name, level) for level in (1, 2, 3)}
    for crop in boxes(sdata, name, mpp, rng):
        yield "crop", crop
    for crop in boxes(levels[1], name, mpp, rng):
        yield "crop of level 1", crop
    for level, part in levels.items():
        yield f"level {level}", part
    for quarters in (1, 2, 3):
        yield "turned pixels", turned(sdata, name, quarters, False)
    yield "mirror image", turned(sdata, name, 0, True)
    yield "mirror image, turned", turned(sdata, name, 1, True)
    yield "turned by transformation", by_transformation(sdata, name, 30)
    yield "renamed", renamed(sdata, name)
    yield "joined", joined(sdata, name, other)


def section(sdata: SpatialData, name: str, mpp: float) -> Section:
    """Return the section `name` of an object whose finest pixels have `mpp` um by its own transformations."""
    images = {f"{name}_spots": next(k for k in sdata.images if k in (f"{name}_he", "slide_7"))}
    px_per_unit = get_transformation(sdata[images[f"{name}_spots"]], name).to_affine_matrix(("x", "y"), ("x", "y"))
    scale = float(np.sqrt(abs(np.linalg.det(px_per_unit[:2, :2]))))
    regions = [*sdata["table"].obs["region"].cat.categories]
    sizes = {images.get(region, region.replace("_spots", "_he")): mpp for region in regions}
    sizes[images[f"{name}_spots"]] = mpp * scale
    images = {region: images.get(region, region.replace("_spots", "_he")) for region in regions}
    found = resolve_sections(sdata, images=images, image_mpp=sizes, strict=False)
    return next(part for part in found if part.name == f"{name}_spots")


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--her2st", type=Path, required=True, help="folder with B4, C2, C3, C4")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", help="sections whose variants are tried; by default all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pekasc").setLevel(logging.ERROR)
    real = pk.datasets.her2st(path=arguments.her2st)
    phantom = pk.datasets.phantom(n_patients=3, size_um=2000, mpp=1.0, n_genes=4)
    pieces = pk.datasets.phantom(n_patients=2, size_um=900, mpp=1.0, n_genes=4, random_state=7)
    mpps = {"B4": 0.688, "C2": 0.688, "C3": 0.688, "C4": 0.688, "P1S1": 1.0, "P2S1": 1.0, "P3S1": 1.0}
    objects = {name: of_section(real if name[0] != "P" else phantom, name) for name in mpps}
    for i, name in enumerate(("P1S1", "P2S1")):
        objects[f"white {i + 1}"] = on_white(pieces, name, (600 + 500 * i, 900 - 300 * i), 5000)
    result: dict[str, Any] = {"machine": machine(PACKAGES), "variants": [], "pairs": [], "fit_seconds": []}
    sections, trained = {}, {}
    for name, sdata in objects.items():
        region = str(sdata["table"].obs["region"].cat.categories[0]).removesuffix("_spots")
        sections[name] = section(sdata, region, mpps.get(name, 1.0))
        trained[name], seconds = timed(lambda name=name: tissue_of([sections[name]]))
        result["fit_seconds"].append(seconds)
    for name, mpp in mpps.items():
        if arguments.variants and name not in arguments.variants:
            continue
        for kind, variant in variants(objects[name], name, mpp, objects["B4" if name[0] == "P" else "white 2"]):
            part = section(variant, name, mpp)
            rows, seconds = timed(lambda part=part, name=name: trained_rows([part], TILE_UM, trained[name]))
            result["variants"].append(
                {"section": name, "kind": kind, "spots": part.rows.size, "known": rows.size, "seconds": seconds}
            )
            print(result["variants"][-1], flush=True)
    for name in objects:
        for another in objects:
            if name != another:
                rows, seconds = timed(lambda a=another, n=name: trained_rows([sections[a]], TILE_UM, trained[n]))
                result["pairs"].append({"trained": name, "new": another, "known": rows.size, "seconds": seconds})
        arguments.out.write_text(json.dumps(result, indent=1))
    report(result)


def report(result: dict[str, Any]) -> None:
    print(f"\n{result['machine']}\n\n| variant | objects | spots | known again |\n| --- | --- | --- | --- |")
    for kind in dict.fromkeys(row["kind"] for row in result["variants"]):
        rows = [row for row in result["variants"] if row["kind"] == kind]
        spots, known = (sum(row[column] for row in rows) for column in ("spots", "known"))
        print(f"| {kind} | {len(rows)} | {spots} | {known} |")
    pairs = result["pairs"]
    false = [row for row in pairs if row["known"]]
    print(f"\n{len(pairs)} ordered pairs of different sections, with a spot taken as known: {len(false)} {false}")
    fit = np.median(result["fit_seconds"])
    new = np.median([row["seconds"] for row in (*result["variants"], *result["pairs"])])
    print(f"Median seconds a section: {fit:.1f} in a fit, {new:.1f} in a prediction.")


if __name__ == "__main__":
    main()
