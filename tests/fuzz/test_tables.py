"""Odd and damaged tables: every call gives a result, or an error that we raise, after which the object is as it was."""

from __future__ import annotations

import linecache
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import spatialdata as sd
from anndata import AnnData
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

import pekasc as pk
from pekasc._expression import check_structures

SOURCE = str(Path(pk.__file__).parent)
LAYERS = [None, "counts", "peka"]
# what obs, var and records may hold elsewhere, and what they never do
VALUES: st.SearchStrategy[Any] = st.sampled_from([
    None, True, 0, 1, -1, 10**6, 10**30, 0.5, -2.0, float("nan"), float("inf"), "", "a", "json:{", "json:[1]", "table",
    [], [1], [None], ["a", "a"], [[1]], {}, {"a": 1}, np.zeros(2), np.zeros((2, 2, 2)), np.array(["a"]),
    pd.DataFrame({"a": [1]}),
])  # fmt: skip
COLUMNS: dict[str, Callable[[int], Any]] = {
    "none": lambda n: [None] * n,
    "nan": lambda n: np.full(n, np.nan),
    "nan in one row": lambda n: np.where(np.arange(n) == n // 2, np.nan, 1.0),
    "infinite": lambda n: np.full(n, np.inf),
    "zeros": lambda n: np.zeros(n, int),
    "float32": lambda n: np.linspace(0, 1, n, dtype=np.float32),
    "float32 beyond 1": lambda n: np.linspace(-1, 2, n, dtype=np.float32),
    "fractions": lambda n: np.arange(n) + 0.5,
    "whole floats": lambda n: np.arange(n, dtype=float),
    "huge": lambda n: np.arange(n) + 2**62,
    "negative": lambda n: -np.arange(n) - 1,
    "bool": lambda n: np.arange(n) % 2 == 0,
    "nullable bool": lambda n: pd.array([None, *[True, False] * n][:n], dtype="boolean"),
    "nullable int": lambda n: pd.array([None, *range(n)][:n], dtype="Int64"),
    "complex": lambda n: np.arange(n) + 1j,
    "strings": lambda n: [f"a{i % 3}" for i in range(n)],
    "strings of numbers": lambda n: [str(i % 24) for i in range(n)],
    "nullable strings": lambda n: pd.array([None, *["a", "b"] * n][:n], dtype="string"),
    "empty strings": lambda n: [""] * n,
    "categories": lambda n: pd.Categorical([f"a{i % 3}" for i in range(n)], categories=["a2", "a1", "a0", "unused"]),
    "categories of numbers": lambda n: pd.Categorical(np.arange(n) % 4),
    "categories with gaps": lambda n: pd.Categorical([None, *["a"] * n][:n]),
    "mixed": lambda n: [[1, "a", 2.5, None, True, (1, 2)][i % 6] for i in range(n)],
    "lists": lambda n: [[i] for i in range(n)],
    "dates": lambda n: pd.date_range("2024-01-01", periods=n),
    "intervals": lambda n: pd.interval_range(0, n, periods=n) if n else [],
    "bytes": lambda n: [b"a"] * n,
}
DTYPES = ["?", "i1", "u1", "u2", "i8", "f2", "f4", "f8", "g", "c8", "O", "U3", "S2", "M8[s]", "m8[s]"]
SLOW = [pytest.mark.slow, pytest.mark.timeout(7200)]
N = pytest.mark.parametrize("n", [50, pytest.param(2000, marks=SLOW)])


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def whole() -> tuple[sd.SpatialData, pk.Adapter]:
    """Return an object of two sections with tiles, an embedding and predictions, and the adapter behind them."""
    sdata = pk.datasets.phantom(n_patients=2, size_um=700, mpp=2.0, n_genes=12, n_spots=24)
    table = sdata["table"]
    del table.layers["truth"]
    table.layers["counts"] = table.X.copy()
    table.var["feature_types"] = "Gene Expression"
    table.var["symbol"] = [f"g{i}" for i in range(table.n_vars)]
    pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    how: dict[str, Any] = {"readout": {"depth": 2, "n_components": 4}, "compute": {"device": "cpu"}, "progress": False}
    adapter = pk.tl.fit_adapter(sdata, method=None, **how)
    pk.tl.embed_expression(sdata, n_components=3, progress=False)
    pk.tl.predict_expression(sdata, adapter, progress=False)
    return sdata, adapter


def copied(sdata: sd.SpatialData, tiled: bool) -> sd.SpatialData:
    """Return a copy that shares the pixels; without tiles and what came of them, if not `tiled`."""
    shapes = {name: frame.copy() for name, frame in sdata.shapes.items() if tiled or not name.endswith("_tiles")}
    table = sdata["table"].copy()
    if not tiled:
        table.obs = table.obs.drop(columns=["tile_inside", "peka_train", "peka_total"])
        del table.layers["peka"], table.obsm["X_pca"], table.obsm["X_peka"]
        for name in ("tiles", "adapter", "peka", "X_pca", "X_peka"):
            del table.uns["pekasc"][name]
    return sd.SpatialData(images=dict(sdata.images), shapes=shapes, tables={"table": table})


def put(sdata: sd.SpatialData, table: AnnData) -> None:
    # past the checks of SpatialData, as a change in place is
    sdata.tables.data["table"] = table


def state(value: Any) -> Any:
    """Return all that a value holds in a form that can be compared, without a call that a damaged matrix breaks."""
    if isinstance(value, sd.SpatialData):
        return {
            "elements": {f"{kind} {name}": id(part) for kind, name, part in value.gen_elements() if kind == "images"},
            "shapes": {
                name: state(pd.DataFrame(frame.drop(columns="geometry"))) for name, frame in value.shapes.items()
            },
            "attrs": state(value.attrs),
            "table": state(value.tables.data["table"]),
        }
    if isinstance(value, AnnData):
        if value.is_view:
            return ("view", id(value._adata_ref), state(value.obs), state(value.var), list(value.obsm))
        parts = {name: {k: state(v) for k, v in getattr(value, name).items()} for name in ("layers", "obsm", "uns")}
        return {**parts, "X": state(value.X), "obs": state(value.obs), "var": state(value.var)}
    if isinstance(value, pd.DataFrame):
        columns = [(str(name), str(column.dtype), repr(list(column))) for name, column in value.items()]
        return (repr(list(value.index)), columns)
    if sparse.issparse(value):
        return (
            type(value),
            value.shape,
            *(state(getattr(value, name, None)) for name in ("data", "indices", "indptr")),
        )
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, repr(value.tolist()) if value.dtype == object else value.tobytes())
    if isinstance(value, Mapping):
        return {str(name): state(part) for name, part in value.items()}
    return repr(value)


# --- what is changed


def a_matrix(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Replace counts or predictions by values, types or sparse formats that they never have."""
    table = sdata.tables.data["table"]
    layer = data.draw(st.sampled_from([name for name in LAYERS if name is None or name in table.layers]))
    value = table.X if layer is None else table.layers[layer]
    dense = value.toarray() if sparse.issparse(value) else np.array(value)
    if not dense.size or dense.dtype.kind not in "biuf" or table.is_view:
        return
    kind = data.draw(st.sampled_from(["value", "value", "dtype", "none", "row", "column", "sparse", "masked"]))
    if kind == "value":
        dense = dense.astype(float)
        number = data.draw(st.sampled_from([np.nan, np.inf, -np.inf, -1, 0.5, 1e300, 2.0**70, 0]))
        rows = data.draw(st.sampled_from([slice(None), slice(0, 1), slice(0, dense.shape[0] // 2)]))
        dense[rows, data.draw(st.sampled_from([slice(None), slice(0, 1)]))] = number
    elif kind == "row":
        dense[data.draw(st.integers(0, len(dense) - 1))] = 0
    elif kind == "column":
        dense[:, 0] = 0
    elif kind == "dtype":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dtype = data.draw(st.sampled_from(DTYPES))
            dense = np.nan_to_num(dense).astype("i8").astype(dtype) if dtype[0] in "Mm" else dense.astype(dtype)
    new: Any = dense
    if kind == "masked":
        new = np.ma.masked_array(dense, dense > 1)
    if kind == "none":
        new = None if layer is None else dense
    if kind == "sparse" or (kind != "none" and new.dtype.kind in "biuf" and data.draw(st.booleans())):
        make = data.draw(st.sampled_from([sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array]))
        new = make(np.asarray(new, dtype="f4") if new.dtype.char in "egO" else new)
    if layer is None:
        table.X = new
    else:
        table.layers[layer] = new
    if kind == "sparse" and new.nnz:
        damage_sparse(data, new)


def damage_sparse(data: st.DataObject, new: Any) -> None:
    """Damage the structure of a sparse matrix in place."""
    kind = data.draw(st.sampled_from(["indptr", "order", "indices", "negative", "short data", "float"]))
    if kind == "indptr":
        at = data.draw(st.integers(0, new.indptr.size - 1))
        new.indptr[at] = data.draw(st.sampled_from([-1, 0, new.nnz + 5, 2**30]))
    elif kind == "order":
        new.indptr[1:-1] = new.indptr[1:-1][::-1].copy()
    elif kind == "indices":
        new.indices[data.draw(st.integers(0, new.indices.size - 1))] = data.draw(st.sampled_from([99, 2**30]))
    elif kind == "negative":
        new.indices[0] = -1
    elif kind == "short data":
        new.data = new.data[:-1]
    else:
        new.indices = new.indices.astype(float)


def obs(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Replace a column of obs, or leave it out."""
    table = sdata.tables.data["table"]
    usual = ["region", "spot_id", "patient", "section", "tile_inside", "in_tissue", "array_row", "array_col"]
    name = data.draw(st.sampled_from([*usual, "peka_train", "peka_total", "mine"]))
    kind = data.draw(st.sampled_from([*COLUMNS, "drop", "one", "shuffled", "as strings", "as floats", "repeated"]))
    frame, n = table.obs.copy(), table.n_obs
    if kind in COLUMNS:
        frame[name] = pd.Series(COLUMNS[kind](n), index=frame.index)
    elif name not in frame:
        return
    elif kind == "drop":
        frame = frame.drop(columns=name)
    elif kind == "one" and n:
        frame[name] = frame[name].astype(object)
        frame.iloc[0, frame.columns.get_loc(name)] = data.draw(st.sampled_from([None, "other", -5, 1.5, float("nan")]))
    elif kind == "shuffled":
        frame[name] = frame[name].to_numpy()[::-1]
    elif kind == "as strings":
        frame[name] = frame[name].astype(str)
    elif kind == "as floats":
        frame[name] = pd.to_numeric(frame[name], errors="coerce").astype(float)
    elif kind == "repeated":
        frame[name] = frame[name].iloc[[0] * n].to_numpy() if n else frame[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table._obs = frame


def var(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Replace a column of var, or leave it out."""
    table = sdata.tables.data["table"]
    name = data.draw(st.sampled_from(["feature_types", "feature_types", "symbol", "peka_pearson"]))
    if data.draw(st.booleans()) and name in table.var and table.n_vars:
        values = table.var[name].astype(object)
        values.iloc[0] = data.draw(st.sampled_from(["Antibody Capture", None, float("nan"), 3, ""]))
        table.var[name] = values
    else:
        column = COLUMNS[data.draw(st.sampled_from(sorted(COLUMNS)))](table.n_vars)
        table.var[name] = pd.Series(column, index=table.var.index)


def names(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Repeat or replace names of rows or genes."""
    table = sdata.tables.data["table"]
    of_rows = data.draw(st.booleans())
    frame = table.obs if of_rows else table.var
    kind = data.draw(st.sampled_from(["twice", "all alike", "numbers", "none", "nan", "odd", "case"]))
    n, old = len(frame), list(frame.index)
    new: dict[str, list[Any]] = {
        "twice": [*old[:1], *old[:1], *old[2:]] if n > 1 else old, "all alike": ["a"] * n,
        "numbers": [str(i) for i in range(n)],
        "none": [None, *old[1:]] if n else old, "nan": [float("nan"), *old[1:]] if n else old,
        "odd": [f"{name}/\0 ü" for name in old], "case": [str(name).swapcase() for name in old],
    }  # fmt: skip
    if not table.is_view:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            setattr(table, "obs_names" if of_rows else "var_names", pd.Index(new[kind]))


def attributes(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Damage what says which elements the rows annotate."""
    uns = sdata.tables.data["table"].uns
    there = uns.get("spatialdata_attrs")
    part = data.draw(st.sampled_from(["all", "region", "region_key", "instance_key", "drop", "drop all"]))
    if part == "drop all":
        uns.pop("spatialdata_attrs", None)
    elif part == "all" or not isinstance(there, dict):
        uns["spatialdata_attrs"] = data.draw(VALUES)
    elif part == "drop":
        there.pop(data.draw(st.sampled_from(["region", "region_key", "instance_key"])), None)
    else:
        own = st.sampled_from(["patient", "mine", "P1S1_spots", ["P1S1_spots"], np.array(["P1S1_spots", "P2S1_spots"])])
        there[part] = data.draw(own | VALUES)


def places(value: Any, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths to all parts of nested dicts."""
    found = [before] if before else []
    for name, part in value.items() if isinstance(value, dict) else ():
        found += places(part, (*before, name))
    return found


def record(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Damage what the calls recorded."""
    uns = sdata.tables.data["table"].uns
    if data.draw(st.integers(0, 9)) == 0 or not places(uns.get("pekasc")):
        uns["pekasc"] = data.draw(VALUES)
        return
    *path, last = data.draw(st.sampled_from(places(uns["pekasc"])))
    part = uns["pekasc"]
    for name in path:
        part = part[name]
    if data.draw(st.booleans()):
        part[last] = data.draw(VALUES)
    elif data.draw(st.booleans()):
        del part[last]
    else:
        part[f"{last}_"] = part.pop(last)


def matrices_of_rows(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Replace positions or an embedding."""
    table = sdata.tables.data["table"]
    name = data.draw(st.sampled_from(["spatial", "X_pca", "X_peka"]))
    shape = (table.n_obs, data.draw(st.integers(0, 3)))
    kind = data.draw(st.sampled_from(["nan", "zeros", "strings", "frame", "sparse", "one axis", "drop"]))
    made: dict[str, Callable[[], Any]] = {
        "nan": lambda: np.full(shape, np.nan), "zeros": lambda: np.zeros(shape, int),
        "strings": lambda: np.full(shape, "a"), "one axis": lambda: np.zeros(table.n_obs),
        "frame": lambda: pd.DataFrame(np.ones(shape), index=table.obs_names).add_prefix("c"),
        "sparse": lambda: sparse.csr_matrix(np.ones(shape)),
    }  # fmt: skip
    if table.is_view:
        return
    table.obsm.pop(name, None) if kind == "drop" else table.obsm.update({name: made[kind]()})


def rows(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Take some rows or genes, in another order, as a copy or as a view."""
    table = sdata.tables.data["table"]
    n, n_vars = table.n_obs, table.n_vars
    kind = data.draw(st.sampled_from(["shuffled", "few", "some", "none", "twice", "genes", "no genes"]))
    order = np.random.default_rng(data.draw(st.integers(0, 9))).permutation(n)
    chosen = {
        "shuffled": order, "few": order[: data.draw(st.integers(1, 5))], "some": np.sort(order[: 2 * n // 3]),
        "none": order[:0], "twice": np.r_[order, order[:1]],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in chosen:
            table = table[chosen[kind]]
        else:
            table = table[
                :,
                np.arange(n_vars if kind == "no genes" else data.draw(st.integers(1, 3)))[: n_vars * (kind == "genes")],
            ]
        put(sdata, table if data.draw(st.booleans()) else table.copy())


def elements(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Rename, drop or renumber shapes."""
    spots = [name for name in sdata.shapes if not name.endswith("_tiles")]
    name = data.draw(st.sampled_from(spots)) if spots else ""
    kind = data.draw(st.sampled_from(["drop", "numbers", "strings", "repeated", "fewer", "none", "tiles"]))
    if kind == "tiles" or not name:
        sdata.shapes.data.pop("P1S1_spots_tiles", None)
        return
    frame = sdata.shapes[name]
    if kind == "drop":
        del sdata.shapes[name]
    elif kind == "fewer":
        sdata.shapes.data[name] = frame.iloc[:3]
    elif kind == "none":
        sdata.shapes.data[name] = frame.iloc[:0]
    else:
        new = {"numbers": np.arange(len(frame)) + 100, "strings": frame.index.astype(str), "repeated": [0] * len(frame)}
        frame.index = pd.Index(new[kind])


def change(data: st.DataObject, sdata: sd.SpatialData) -> None:
    """Change one part, unless a matrix is so damaged already that scipy would read beyond its memory here."""
    try:
        check_structures(sdata.tables.data["table"])
    except ValueError:
        return
    data.draw(st.sampled_from(CHANGES))(data, sdata)


CHANGES = [
    *[a_matrix] * 3, *[obs] * 3, *[rows] * 2, *[record] * 2, attributes, var, names, matrices_of_rows, elements,
]  # fmt: skip


# --- what is called


def calls(data: st.DataObject, sdata: sd.SpatialData, adapter: pk.Adapter) -> tuple[str, Callable[[], Any]]:
    """Return one call of the package with drawn arguments, and its name."""
    given_data: Any = data.draw(st.sampled_from([sdata, sdata, sdata.tables.data["table"]]))
    how: dict[str, Any] = {"progress": False, "compute": {"device": "cpu"}}
    layer = data.draw(st.sampled_from([None, None, None, "counts", "counts", "peka", "gone"]))
    groups = data.draw(st.sampled_from([None, "patient", "patient", "section", "mine"]))
    gene_key = data.draw(st.sampled_from([None, None, "symbol"]))
    target: Any = data.draw(st.sampled_from(["log1p", "log1p", "as_is"]))
    genes = data.draw(st.sampled_from([None, None, ["STATE_FAT_001"], "mine"]))
    train = data.draw(st.sampled_from([None, None, ["P1S1_spots"], "peka_train", "mine"]))
    truth = data.draw(st.sampled_from([None, None, "counts"]))
    readout = {"depth": 2, "n_components": 2}
    one: dict[str, Callable[[], Any]] = {
        "tile": lambda: pk.pp.tile(sdata, tile_px=28, mpp=4.0),
        "tile again": lambda: pk.pp.tile(sdata, tile_px=14, mpp=4.0, key_added="small", image_mpp=2.0),
        "split": lambda: pk.pp.split(given_data, groups=groups or "patient", n_folds=2 if target == "as_is" else None),
        "embed": lambda: pk.tl.embed_expression(given_data, n_components=2, layer=layer, gene_key=gene_key, **how),
        "fit": lambda: pk.tl.fit_adapter(
            sdata, method=None, readout=readout, layer=layer, groups=groups, gene_key=gene_key, target=target,
            genes=genes, train=train, **how,
        ),
        "predict": lambda: pk.tl.predict_expression(sdata, adapter, **how),
        "evaluate": lambda: pk.tl.evaluate(given_data, include_train=train is None, truth=truth, groups=groups),
        "get": lambda: pk.get.expression(given_data, layer=layer, genes=genes),
        "get peka": lambda: pk.get.expression(given_data),
        "get tiles": lambda: pk.get.tiles(sdata),
    }  # fmt: skip
    name = data.draw(st.sampled_from(sorted(one)))
    return name, one[name]


def raised_by_us(error: BaseException) -> bool:
    """Tell whether an error comes from a `raise` in the package, not from what numpy or pandas made of a value."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, int(last.lineno or 0)).strip()
    return last.filename.startswith(SOURCE) and line.startswith("raise ")


def tried(sdata: sd.SpatialData, name: str, call: Callable[[], Any]) -> str:
    """Call; return how it ended."""
    before = state(sdata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", RuntimeWarning)
        try:
            call()
        except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
            if not raised_by_us(error):
                raise
            assert 20 < len(str(error)) < 3000, error
            assert state(sdata) == before, error
            return type(error).__name__
    if name.startswith("get"):
        assert state(sdata) == before
    return "a result"


@N
def test_odd_tables(whole: tuple[sd.SpatialData, pk.Adapter], n: int) -> None:
    sdata, adapter = whole
    results: list[str] = []

    @settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data: st.DataObject) -> None:
        copy = copied(sdata, data.draw(st.booleans()))
        for _ in range(data.draw(st.integers(1, 3))):
            change(data, copy)
        results.append(tried(copy, *calls(data, copy, adapter)))

    run()
    print({name: results.count(name) for name in sorted(set(results))})  # noqa: T201 (shown with -s, for the slow job)
    assert results.count("ValueError") > n // 10 and results.count("a result") > n // 10


@pytest.mark.parametrize("name", ["tile", "tile again", "split", "embed", "fit", "predict", "evaluate", "get tiles"])
def test_what_is_not_damaged_works(whole: tuple[sd.SpatialData, pk.Adapter], name: str) -> None:
    sdata, adapter = whole

    class First:
        """Draws the first of everything, and the call of this name."""

        def draw(self, strategy: Any) -> Any:
            options = list(strategy.elements)
            return name if any(isinstance(one, str) and one == name for one in options) else options[0]

    copy = copied(sdata, True)
    assert tried(copy, *calls(First(), copy, adapter)) == "a result"  # type: ignore[arg-type]
