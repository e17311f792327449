"""`pekasc info`: what a slide, a SpatialData, an adapter or a store is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pekasc._text import number
from pekasc.cli import _arguments as arguments
from pekasc.cli._output import finish, working
from pekasc.cli._predict import adapter_folder
from pekasc.cli._sources import open_zarr

if TYPE_CHECKING:
    from pekasc.models import Adapter


def info(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Slides, zarr folders, adapters, stores of features.")
    ],
    as_json: arguments.Json = False,
    debug: arguments.Debug = False,
    verbosity: arguments.Verbosity = None,
) -> None:
    """Say what a slide, a SpatialData, an adapter or a store is."""
    with working(as_json=as_json, debug=debug, verbosity=verbosity) as output:
        failures: dict[str, str] = {}
        for path in paths:
            try:
                record, text = _describe(path)
            except Exception as error:  # noqa: BLE001 (one path must not stop the others; all that failed are named)
                failures[str(path)] = output.reason(error)
                output.result({"source": str(path), "status": "failed", "reason": failures[str(path)]}, "")
                continue
            output.result({"source": str(path), "status": "done", **record}, f"{path}: {text}")
        finish(output, failures, len(paths) - len(failures))


def _describe(path: Path) -> tuple[dict[str, Any], str]:
    path = adapter_folder(path)
    if (path / "pekasc.json").is_file():
        from pekasc.models import Adapter

        adapter = Adapter.load(path)
        return describe_adapter(adapter), str(adapter)
    if not path.is_dir():
        return _describe_slide(path)
    attributes = _attributes(path)
    if "spatialdata_attrs" in attributes:
        return _describe_spatialdata(path)
    if any(name.startswith("pekasc") for name in attributes):
        return _describe_store(path)
    raise ValueError(f"{path} is neither a SpatialData, an adapter nor a store of pekasc.")


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Return what there is to say of an adapter."""
    scores = adapter.gene_scores["pearson"]
    return {
        "kind": "adapter",
        "encoder": adapter.encoder.short,
        "method": adapter.method,
        "depth": adapter.depth,
        "tile_px": adapter.spec.tile_px,
        "mpp": adapter.spec.mpp,
        "context_um": list(adapter.reading.use().radii_um),
        "fields_um": list(adapter.fields_um),
        "target": adapter.info["target"],
        "n_genes": len(adapter.genes),
        "n_spots": adapter.info["n_spots"],
        "pearson_median": None if scores.dropna().empty else scores.median(),
    }


def _describe_slide(path: Path) -> tuple[dict[str, Any], str]:
    from pekasc.io import read_slide

    sdata = read_slide(path)
    ((name, image),) = sdata.images.items()
    levels = [next(iter(level.values())) for level in image.values()] if hasattr(image, "children") else [image]
    sizes = [[int(n) for n in reversed(level.shape[1:])] for level in levels]
    mpp = sdata.attrs.get("pekasc", {}).get("image_mpp", {}).get(name)
    record = {"kind": "slide", "size_px": sizes[0], "levels_px": sizes, "mpp": mpp}
    known = "of unknown pixel size" if mpp is None else f"at {mpp:.4g} um/px"
    width, height = sizes[0]
    return record, f"slide of {width} x {height} px {known}, {number(len(levels), 'level')}"


def _describe_spatialdata(path: Path) -> tuple[dict[str, Any], str]:
    from pekasc._keys import UNS

    sdata = open_zarr(path)
    tables = {
        name: {
            "n_obs": table.n_obs,
            "n_vars": table.n_vars,
            "layers": [layer for layer in table.layers if layer is not None],
            "pekasc": sorted(table.uns.get(UNS, {})),
        }
        for name, table in sdata.tables.items()
    }
    record = {"kind": "spatialdata", "images": [*sdata.images], "shapes": [*sdata.shapes], "tables": tables}
    lines = [
        f"  table {name!r}: {table['n_obs']} x {table['n_vars']}, layers {table['layers']}, "
        f"records of pekasc: {', '.join(table['pekasc']) or 'none'}"
        for name, table in tables.items()
    ]
    return record, "\n".join([str(sdata), *lines])


def _describe_store(path: Path) -> tuple[dict[str, Any], str]:
    import zarr

    arrays: list[dict[str, Any]] = []
    for name, array in sorted(zarr.open_group(path, mode="r").arrays()):
        about = {key: value for key, value in dict(array.attrs).items() if key.startswith("pekasc")}
        arrays.append({"name": name, "shape": list(array.shape), "dtype": str(array.dtype), **about})
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    record = {"kind": "store", "bytes": size, "arrays": arrays}
    lines = [f"  {array['name']}: {' x '.join(map(str, array['shape']))} {array['dtype']}" for array in arrays]
    return record, "\n".join([f"store of {len(arrays)} arrays, {size / 2**20:.1f} MiB", *lines])


def _attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a zarr group, of either version."""
    try:
        if (path / "zarr.json").is_file():
            return dict(json.loads((path / "zarr.json").read_text()).get("attributes", {}))
        if (path / ".zattrs").is_file():
            return dict(json.loads((path / ".zattrs").read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is a damaged zarr folder: {error}") from None
    return {}
