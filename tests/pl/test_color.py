"""What `color=` names, with limits, colours and the scale: on tables alone."""

from __future__ import annotations

import logging
from typing import Any

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.colors import to_hex, to_rgba
from scipy import sparse

from pekasc._keys import write_uns
from pekasc.pl._color import Map, color_maps, color_names

N = 40


@pytest.fixture
def table() -> AnnData:
    rng = np.random.default_rng(0)
    table = AnnData(obs=pd.DataFrame(index=[f"t{i}" for i in range(N)]), var=pd.DataFrame(index=list("ABCDEF")))
    table.layers["peka"] = rng.normal(1, 1, (N, 6)).astype(np.float32)
    table.obs["count"] = pd.array([None, *range(1, N)], dtype="Int64")
    table.obs["leiden"] = pd.Categorical(np.arange(N) % 3, categories=[2, 0, 3, 1])
    table.obs["text"] = np.where(np.arange(N) < 10, "tumour", "stroma")
    table.obs["flag"] = np.arange(N) < 5
    table.obs["nothing"] = np.nan
    return table


def _maps(table: AnnData, *names: str, layer: str = "peka", rows: Any = None, limits: Any = (None, None)) -> list[Map]:
    rows = np.arange(N) if rows is None else rows
    cmap = plt.get_cmap("viridis")
    return color_maps(table, list(names), rows, layer=layer, table_name="grid", cmap=cmap, limits=limits)


@pytest.mark.parametrize("kind", ["dense", "sparse", "dask", "dask of sparse"])
def test_genes_of_any_layer(table: AnnData, kind: str) -> None:
    values = table.layers["peka"].copy()
    matrix: Any = sparse.csr_matrix(values) if "sparse" in kind else values
    if kind == "dask of sparse":
        matrix = da.from_array(matrix, chunks=(N, 2), asarray=False)
    elif kind == "dask":
        matrix = da.from_array(matrix, chunks=(7, 2))
    table.layers["peka"] = matrix
    rows = np.arange(3, N, 2)
    maps = _maps(table, "E", "B", "E", rows=rows)
    assert [m.title for m in maps] == ["E", "B", "E"] and all(m.italic for m in maps)
    for found, column in zip(maps, (4, 1, 4), strict=True):
        np.testing.assert_array_equal(found.values, values[rows, column])
        expected = np.percentile(values[rows, column].astype(float), (1, 99))
        np.testing.assert_allclose((found.norm.vmin, found.norm.vmax), expected)
    (found,) = _maps(table, "A", limits=(None, 7.0))
    assert found.norm.vmax == 7 and found.norm.vmin == pytest.approx(np.percentile(values[:, 0].astype(float), 1))


def test_only_the_wanted_genes_are_computed(table: AnnData) -> None:
    values, read = table.layers["peka"], []

    def load(block: np.ndarray, block_info: Any = None) -> np.ndarray:
        read.append(block_info[0]["chunk-location"])
        return block

    lazy = da.from_array(values, chunks=(20, 1)).map_blocks(load, dtype=values.dtype, meta=np.empty((0, 0), np.float32))
    table.layers["peka"] = lazy
    maps = _maps(table, "D", "B")
    np.testing.assert_array_equal(maps[0].values, values[:, 3])
    assert sorted(read) == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert isinstance(table.layers["peka"], da.Array)


@pytest.mark.parametrize(
    ("record", "unit"),
    [
        ({"target": "log1p(counts per 10,000)"}, "log1p(counts per 10k)"),
        ({"target": "as stored", "layer": "z"}, "expression, as stored"),
        (None, "peka"),
    ],
)
def test_scale_by_the_record_of_the_prediction(table: AnnData, record: dict[str, Any] | None, unit: str) -> None:
    if record:
        write_uns(table, "peka", record, kind="prediction")
    gene, column = _maps(table, "A", "count")
    assert gene.unit == unit and column.unit == ""


def test_training_tissue_is_marked(table: AnnData) -> None:
    table.obs["peka_train"] = np.arange(N) < 2
    assert _maps(table, "A")[0].title == "A (trained on)"
    assert _maps(table, "A", rows=np.arange(5, N))[0].title == "A"


def test_a_column_of_another_target(table: AnnData) -> None:
    values = pd.DataFrame({"T cell": np.arange(N), "B": np.nan}, index=table.obs_names)
    table.obsm["X_peka_types"] = values
    write_uns(table, "X_peka_types", {"obsm": "types", "key_added": "peka"}, kind="prediction")
    rows = np.arange(3, 20)
    found, gene = _maps(table, "types:T cell", "A", rows=rows)
    assert (found.title, found.unit, found.italic) == ("types:T cell", "types", False) and gene.italic
    np.testing.assert_array_equal(found.values, rows)
    with pytest.raises(ValueError, match="Column 'types:B' was not predicted in these rows"):
        _maps(table, "types:B")
    with pytest.raises(KeyError, match="has no column 'T'"):
        _maps(table, "types:T")
    table.obs["types:T cell"] = 1.0  # a column of `obs` first, as for genes
    assert (_maps(table, "types:T cell")[0].values == 1).all()


def test_numeric_column_with_missing_values(table: AnnData) -> None:
    (found,) = _maps(table, "count")
    assert np.isnan(found.values[0]) and found.legend is None and not found.italic
    np.testing.assert_array_equal(found.values[1:], np.arange(1, N))


def _shown(found: Map) -> list[str]:
    """Return the colour that is drawn for each tile."""
    return [to_hex(found.cmap(found.norm(value))) for value in found.values]


def test_categories_have_scanpys_stored_colours(table: AnnData) -> None:
    table.uns["leiden_colors"] = np.array(["#ff0000", "#00ff00", "#0000ff", "#ffff00"], dtype=object)
    (found,) = _maps(table, "leiden")
    of = {2: "#ff0000", 0: "#00ff00", 1: "#ffff00"}
    assert _shown(found) == [of[i % 3] for i in range(N)]
    # in the order of the categories, without those that no tile has
    assert [(name, to_hex(colour)) for name, colour in found.legend] == [
        ("2", of[2]), ("0", of[0]), ("1", of[1]),
    ]  # fmt: skip
    table.uns["leiden_colors"] = ["#ff0000"]  # of other categories
    assert _maps(table, "leiden")[0].legend[0][1] != "#ff0000"


@pytest.mark.parametrize("n", [3, 15, 25, 38])
def test_other_categories_have_the_colours_that_scanpy_chooses(table: AnnData, n: int) -> None:
    import scanpy as sc

    table.obs["cluster"] = pd.Categorical((np.arange(N) % n).astype(str))
    (found,) = _maps(table, "cluster")
    assert "cluster_colors" not in table.uns
    table.obsm["X_umap"] = np.zeros((N, 2))
    sc.pl.umap(table, color="cluster", show=False)
    theirs = dict(zip(table.obs["cluster"].cat.categories, table.uns["cluster_colors"], strict=True))
    assert {name: to_rgba(colour) for name, colour in found.legend} == {k: to_rgba(v) for k, v in theirs.items()}
    assert _shown(found) == [to_hex(theirs[name]) for name in table.obs["cluster"]]


def test_text_and_booleans_are_categories(table: AnnData) -> None:
    text, flag = _maps(table, "text", "flag")
    assert [name for name, _ in text.legend] == ["stroma", "tumour"]
    assert text.values.tolist() == [1.0] * 10 + [0.0] * 30
    assert [name for name, _ in flag.legend] == ["False", "True"] and flag.values[:6].tolist() == [1] * 5 + [0]
    (part,) = _maps(table, "text", rows=np.array([9, 10, 30]))
    assert part.values.tolist() == [1, 0, 0]
    table.obs.loc["t3", "text"] = None
    assert np.isnan(_maps(table, "text")[0].values[3])


def test_column_before_gene_of_the_same_name(table: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    table.obs["A"] = np.arange(N)
    with caplog.at_level(logging.INFO, logger="pekasc"):
        (found,) = _maps(table, "A")
    assert found.values[7] == 7 and "A: columns of `obs` are drawn, not the genes" in caplog.text


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "counts",
            KeyError,
            r"'counts' is neither a column of `obs` of the table 'grid' \(\['count', .* Did you mean co",
        ),
        ("nothing", ValueError, r"`obs\['nothing'\]` has no values"),
        ("names", ValueError, r"`obs\['names'\]` has 103 categories, and no more than 102 have"),
    ],
)
def test_bad_names(table: AnnData, name: str, error: type[Exception], message: str) -> None:
    table.obs["names"] = pd.Categorical(["0"] * N, categories=[str(i) for i in range(103)])
    with pytest.raises(error, match=message):
        _maps(table, name)


def test_genes_before_they_are_predicted(table: AnnData) -> None:
    predict_first = r"`pekasc\.tl\.predict_expression\(sdata, adapter, table_name='grid'\)`"
    predict = r"`pk\.tl\.predict_expression\(sdata, adapter, table_name='grid'\)`"
    with pytest.raises(KeyError, match=f"nor a gene: it has none until {predict}"):
        _maps(table[:, []].copy(), "ERBB2")
    with pytest.raises(
        KeyError, match=rf"Layer 'own' not found\. Available layers: \['peka'\]\. Predict first: {predict_first}"
    ):
        _maps(table, "A", layer="own")
    table.layers["peka"][:, 1] = np.nan
    with pytest.raises(ValueError, match=r"Gene 'B' was not predicted: layers\['peka'\] holds only NaN"):
        _maps(table, "B")


def test_names() -> None:
    assert color_names(None) == [] and color_names("A") == ["A"] and color_names(pd.Index(["A", "B"])) == ["A", "B"]
    with pytest.raises(ValueError, match="`color` is an empty list"):
        color_names([])
    for wrong in (3, ["A", 3], {"A": 1}):
        with pytest.raises(TypeError, match="`color` must be the name of a gene or of a column of `obs`"):
            color_names(wrong)
