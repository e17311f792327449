"""`io.write_geojson`: clusters, genes and annotations for QuPath."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pekasc._expression import dense_layer, named_columns
from pekasc._keys import PEKA, TILES, tile_shapes_name
from pekasc._layers import missing_layer, no_values
from pekasc._paths import folder_path
from pekasc._sections import (
    Section,
    check_spatialdata,
    examples,
    get_table,
    images_of,
    px_of_shapes,
    tiled_sections,
    tiled_table,
)
from pekasc._settings import get_logger
from pekasc._text import number
from pekasc.io._geojson_features import OBJECT_TYPES, features, merged, outlines, write_collection

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = get_logger(__name__)

_ENDINGS = (".geojson", ".json", ".geojson.gz", ".json.gz")
_ROWS = 4096  # of a layer, read at once
_MOST_CLASSES = 1000
_OUTLINES = ("shapes", "tiles")


def write_geojson(
    sdata: SpatialData,
    path: str | PathLike[str],
    *,
    classes: str | None = None,
    genes: str | Sequence[str] | None = None,
    layer: str = PEKA,
    shapes: str | None = None,
    image_name: str | None = None,
    region: str | None = None,
    outline: str = "shapes",
    merge: bool = False,
    colors: Mapping[str, Any] | None = None,
    object_type: str | None = None,
    table_name: str = "grid",
    key: str = TILES,
    overwrite: bool = False,
) -> None:
    """Write clusters, predicted genes or annotations as GeoJSON, which QuPath opens on the slide.

    In QuPath, drop the file on the open image, or take *File, Import objects from file*.

    Parameters
    ----------
    sdata
        A slide with tiles or spots, or with shapes.
    path
        The file: ``.geojson`` or ``.json``, with ``.gz`` compressed, which QuPath reads from version 0.4 on.
    classes
        Column with the class of every tile, spot or shape, such as ``"leiden"``: of ``obs``, or of the shapes with
        `shapes=`. Rows without a class get none.
    genes
        A gene, or several, as measurements.
    layer
        Layer with their values.
    shapes
        Write these shapes, such as a pathologist's annotations, instead of the tiles or spots of a table.
    image_name
        With `shapes=`: the image in whose pixels they are written, if it shares a coordinate system with several.
    region
        Section of the table to write, if it has several: a file belongs to one image.
    outline
        ``"shapes"``: the cells of a grid, which fill the plane, or the spots. ``"tiles"``: the squares of pixels that
        were read, which may overlap.
    merge
        Join all tiles of a class into one object, whose measurements are means over its tiles.
    colors
        Colour of each class, as matplotlib takes them. By default, those of ``uns["{classes}_colors"]``, as scanpy
        writes them, else those that scanpy would choose.
    object_type
        ``"annotation"``, ``"detection"`` or ``"tile"``. By default, detections, which QuPath colours by a measurement;
        with `merge` or `shapes=`, annotations, which can be edited.
    table_name
        Name of the table.
    key
        Name of the tiles.
    overwrite
        Replace an existing file.

    Returns
    -------
    None, and writes a FeatureCollection (RFC 7946) with a feature for each tile, in pixels of the finest level of the
    image, x to the right and y down as QuPath has them, with ``objectType``, ``classification`` (``name``, ``color``)
    and ``measurements``. Circles are polygons. Tiles with neither a class nor a value are left out.

    Raises
    ------
    FileExistsError
        If there is a file, and `overwrite` is not said.
    KeyError
        If the table, its tiles, the layer, a gene, a column, the shapes or the image is not there.
    OSError
        If the file cannot be written; an earlier one stays.
    TypeError
        If `classes` names a column of numbers with fractions.
    ValueError
        If there is nothing to write, an option is not known, arguments contradict one another, or there are several
        sections or images and none is named.

    References
    ----------
    Butler et al., The GeoJSON Format, RFC 7946, 2016. Bankhead et al., QuPath, Scientific Reports 2017.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> gene = sdata["table"].var_names[0]
    >>> pk.io.write_geojson(  # doctest: +SKIP
    ...     sdata, "spots.geojson", genes=gene, layer="truth", table_name="table"
    ... )
    """
    check_spatialdata(sdata)
    file = _file(path, overwrite)
    if outline not in _OUTLINES:
        raise ValueError(f"`outline={outline!r}` must be one of {list(_OUTLINES)}.")
    if object_type is not None and object_type not in OBJECT_TYPES:
        raise ValueError(f"`object_type={object_type!r}` must be one of {list(OBJECT_TYPES)}.")
    if merge and classes is None:
        raise ValueError("`merge=True` joins the tiles of a class: name the column with `classes=`.")
    if colors is not None and classes is None:
        raise ValueError("`colors=` are of classes: name their column with `classes=`.")
    if genes is not None and not len(genes):
        raise ValueError("`genes=` is empty: name at least one, or leave it out.")
    if shapes is None:
        if image_name is not None:
            raise ValueError("`image_name=` goes with `shapes=`: tiles of a table lie on the image they were cut from.")
        found = _of_table(sdata, classes, genes, layer, region, outline, table_name, key)
    else:
        of_table = {
            "genes": genes is not None, "region": region is not None, "layer": layer != PEKA,
            "outline": outline != "shapes", "table_name": table_name != "grid", "key": key != TILES,
        }  # fmt: skip
        given = [name for name, said in of_table.items() if said]
        if given:
            raise ValueError(
                f"`{given[0]}=` applies to a table and does nothing with `shapes={shapes!r}`: leave one of them out."
            )
        found = _of_shapes(sdata, shapes, image_name, classes)
    found.write(file, merge, colors, object_type or ("annotation" if merge or shapes is not None else "detection"))


class _Objects:
    """Outlines with their classes and measurements, before they are written."""

    def __init__(
        self, name: str, polygons: np.ndarray, ids: Sequence[Any], classes: pd.Categorical | None,
        colors_key: str = "", table: Any = None, rows: np.ndarray | None = None, layer: str = PEKA,
        columns: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.name, self.polygons, self.ids = name, polygons, [str(i) for i in ids]
        self.classes, self.colors_key = classes, colors_key
        self.table, self.rows, self.layer = table, rows, layer
        self.columns = np.zeros(0, dtype=np.int64) if columns is None else columns

    @property
    def genes(self) -> list[str]:
        return [] if self.table is None else [str(name) for name in self.table.var_names[self.columns]]

    def write(self, file: Path, merge: bool, colors: Mapping[str, Any] | None, object_type: str) -> None:
        from pekasc.models.runtime import write_whole  # loads torch

        codes = np.full(len(self.polygons), -1) if self.classes is None else np.asarray(self.classes.codes)
        uns = {} if self.table is None else self.table.uns
        groups = [] if self.classes is None else _groups(self.classes, uns, self.colors_key, colors)
        what = f"{self.name}, {object_type}, {self.layer}, {self.genes}, {groups}"
        if merge:
            polygons, names, members = merged(self.polygons, codes)
            sums, counts = self._sums(codes, len(groups))
            with np.errstate(invalid="ignore"):
                values: Any = (sums / counts)[names]
            ids, of_class = [f"{what}, {groups[i]['name']}" for i in names], [groups[i] for i in names]
            left_out = len(codes) - sum(map(len, members))
            parts = iter([features(polygons, ids, object_type, of_class, self.genes, values)])
        else:
            known = self._known(codes)
            left_out = int((~known).sum())
            parts = self._parts(known, codes, groups, what, object_type)
        if left_out == len(codes):
            has = "a class (`classes=`)" if merge else "a class (`classes=`) or a value (`genes=`)"
            raise ValueError(f"There is nothing to write: no object of {self.name!r} has {has}.")
        if left_out:
            why = "without a class" if merge else "with neither a class nor a value"
            logger.hint("Left out: %d of %d objects, %s.", left_out, len(codes), why)

        def write(out: Any) -> None:
            packed = gzip.GzipFile("", "wb", fileobj=out, mtime=0) if file.suffix == ".gz" else out
            n = write_collection(packed, (feature for part in parts for feature in part))
            if packed is not out:
                packed.close()
            logger.hint("%s: %s.", file.name, number(n, "object"))

        write_whole(file, write, "The GeoJSON")

    def _values(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield parts of the objects with their measurements: a layer in a store is read by and by."""
        for start in range(0, len(self.polygons), _ROWS):
            part = slice(start, min(start + _ROWS, len(self.polygons)))
            if self.rows is None or not self.columns.size:
                yield part, np.zeros((part.stop - start, 0))
            else:
                yield part, dense_layer(self.table[self.rows[part]], self.layer, self.columns)

    def _known(self, codes: np.ndarray) -> np.ndarray:
        if self.classes is None and not self.columns.size:  # outlines alone
            return np.ones(len(codes), dtype=bool)
        return (codes >= 0) | np.concatenate([np.isfinite(values).any(axis=1) for _, values in self._values()])

    def _sums(self, codes: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        sums, counts = np.zeros((2, n, self.columns.size))
        for part, values in self._values():
            has = codes[part] >= 0
            finite = np.isfinite(values[has])
            np.add.at(sums, codes[part][has], np.where(finite, values[has], 0))
            np.add.at(counts, codes[part][has], finite)
        return sums, counts

    def _parts(
        self, known: np.ndarray, codes: np.ndarray, groups: Sequence[Mapping[str, Any]], what: str, object_type: str
    ) -> Iterator[Iterator[str]]:
        for part, values in self._values():
            at = np.flatnonzero(known[part])
            index = part.start + at
            of_class = [groups[code] if code >= 0 else None for code in codes[index]]
            ids = [f"{what}, {self.ids[i]}" for i in index]
            yield features(self.polygons[index], ids, object_type, of_class, self.genes, values[at])


def _file(path: Any, overwrite: bool) -> Path:
    file = folder_path("path", path, "file")
    if not file.name.lower().endswith(_ENDINGS):
        raise ValueError(f"`path={str(file)!r}` must end in one of {list(_ENDINGS)}, by which QuPath knows the format.")
    if file.is_dir():
        raise ValueError(f"`path={str(file)!r}` is a folder: give a file.")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{str(file)!r} exists: take another name, or replace it with `overwrite=True`.")
    return file


def _of_table(
    sdata: SpatialData, classes: str | None, genes: str | Sequence[str] | None, layer: str, region: str | None,
    outline: str, table_name: str, key: str,
) -> _Objects:  # fmt: skip
    table_name = tiled_table(sdata, table_name)
    table = get_table(sdata, table_name)
    if genes is not None and layer not in table.layers:
        raise missing_layer(table, layer, table_name)
    columns = None if genes is None else named_columns(table, genes)
    column = None if classes is None else _column(table.obs, classes, f"`obs` of table {table_name!r}")
    section = _section(tiled_sections(sdata, table_name=table_name, key=key)[0], region)
    name = section.shapes_name if outline == "shapes" else tile_shapes_name(section.name, key)
    frame = sdata.shapes[name].loc[section.shape_ids if outline == "shapes" else section.ids]
    radius = frame["radius"].to_numpy() if "radius" in frame else None
    made = _Objects(
        section.name, outlines(frame.geometry.to_numpy(), radius, section.shapes_to_px), section.ids.tolist(),
        None if column is None else column[section.rows], f"{classes}_colors", table, section.rows, layer, columns,
    )  # fmt: skip
    if columns is not None:
        _check_values(made)
    return made


def _check_values(made: _Objects) -> None:
    found = np.zeros(made.columns.size, dtype=bool)
    for _, values in made._values():
        found |= np.isfinite(values).any(axis=0)
        if found.all():
            return
    missing = [gene for gene, has in zip(made.genes, found, strict=True) if not has]
    raise no_values(made.layer, missing, repr(made.name))


def _section(sections: Sequence[Section], region: str | None) -> Section:
    names = [section.name for section in sections]
    if region is None and len(sections) > 1:
        raise ValueError(
            f"The table has several sections, and a file belongs to one image: choose one with `region=`, of {names}."
        )
    if region is not None and region not in names:
        raise KeyError(f"`region={region!r}` not found. Available regions with tiles: {names}.")
    return sections[0 if region is None else names.index(region)]


def _of_shapes(sdata: SpatialData, shapes: str, image_name: str | None, classes: str | None) -> _Objects:
    if shapes not in sdata.shapes:
        raise KeyError(f"`shapes={shapes!r}` not found. Available shapes: {list(sdata.shapes)}.")
    if image_name is not None and image_name not in images_of(sdata):
        raise KeyError(f"`image_name={image_name!r}` not found. Available images: {list(images_of(sdata))}.")
    frame = sdata.shapes[shapes]
    column = None if classes is None else _column(frame, classes, f"the shapes {shapes!r}")
    radius = frame["radius"].to_numpy() if "radius" in frame else None
    polygons = outlines(frame.geometry.to_numpy(), radius, px_of_shapes(sdata, shapes, image_name))
    return _Objects(shapes, polygons, list(frame.index), column)


def _column(frame: pd.DataFrame, name: str, where: str) -> pd.Categorical:
    if name not in frame:
        raise KeyError(f"`classes={name!r}` not found in {where}. Available columns: {examples(frame.columns, 20)}.")
    column = frame[name]
    if pd.api.types.is_float_dtype(column):
        raise TypeError(
            f"`classes={name!r}` is a column of floats, and classes are categories: bin it first (`pandas.cut`), or "
            "give genes as measurements with `genes=`."
        )
    found = pd.Categorical(column if isinstance(column.dtype, pd.CategoricalDtype) else column.astype("category"))
    if len(found.categories) > _MOST_CLASSES:
        raise ValueError(
            f"`classes={name!r}` has {len(found.categories)} classes, more than {_MOST_CLASSES}: name a column of "
            "categories, such as clusters."
        )
    return found


def _groups(
    classes: pd.Categorical, uns: Mapping[str, Any], key: str, colors: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Return name and colour of every class, as QuPath writes them; of ``uns[key]``, if these are as many."""
    from matplotlib.colors import is_color_like, to_rgb
    from scanpy.plotting.palettes import default_20, default_28, default_102

    names = [str(name) for name in classes.categories]
    if colors is not None:
        unknown = [name for name in colors if str(name) not in names]
        wrong = [f"{name!r}: {color!r}" for name, color in colors.items() if not is_color_like(color)]
        if unknown or wrong:
            raise ValueError(
                f"`colors=`: {unknown[:3]} not found among the classes {examples(names, 10)}." if unknown
                else f"`colors=`: {wrong[0]} is no colour that matplotlib knows."
            )  # fmt: skip
    palette = uns.get(key)
    if palette is None or len(palette) != len(names):
        default = next((p for p in (default_20, default_28) if len(p) >= len(names)), default_102)
        palette = [default[i % len(default)] for i in range(len(names))]
    own = dict(zip(names, palette, strict=True)) | {str(name): color for name, color in (colors or {}).items()}
    if wrong := [color for color in own.values() if not is_color_like(color)]:
        raise ValueError(
            f"`uns[{key!r}]`: {wrong[0]!r} is no colour that matplotlib knows. Correct it, or name colours with "
            "`colors=`."
        )
    return [{"name": name, "color": [round(255 * part) for part in to_rgb(own[name])]} for name in names]
