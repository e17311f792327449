"""Teachers by name: `tl.embed_expression`, and what `tl.fit_adapter` makes of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from spatialdata import SpatialData

import pekasc as pk
from pekasc._keys import read_uns
from pekasc.models import Teacher
from pekasc.models.teachers import TeacherModel, _scfoundation, _scvi
from pekasc.models.teachers._scfoundation import ScFoundationTeacher

Write = Callable[..., Path]
TRAIN = ["P1S1_spots"]
RIDGE = pk.Readout.preset("ridge").replace(n_depths=None)
QUIET: dict[str, Any] = {"compute": {"device": "cpu"}, "progress": False}
SMALL: dict[str, Any] = {"recipe": {"epochs": 1, "rank": 8}, "readout": RIDGE.replace(depth=2), **QUIET}


@pytest.fixture(scope="session")
def files(_plain: SpatialData, scfoundation: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random scFoundation that knows 20 of the phantom's 24 genes, and 6 others."""
    names = [*_plain["table"].var_names[20:3:-1], *(f"OTHER{i}" for i in range(6)), *_plain["table"].var_names[:3]]
    return scfoundation(tmp_path_factory.mktemp("files"), names)


@pytest.mark.parametrize("teacher", ["pca", "scvi", "scfoundation"])
def test_embeds_every_spot_with_counts(
    tiled: SpatialData, files: Path, tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if teacher == "scvi":
        pytest.importorskip("scvi")
        monkeypatch.setattr(_scvi, "EPOCHS", 2)
    table = tiled["table"]
    values = table.X.toarray()
    values[2] = 0
    table.X = csr_matrix(values)
    frozen = teacher == "scfoundation"
    described = Teacher(teacher, files=files) if frozen else teacher
    pk.tl.embed_expression(tiled, described, n_components=None if frozen else 5, **QUIET)
    table = tiled["table"]
    x = table.obsm[f"X_{teacher}"]
    assert x.dtype == np.float32 and x.shape == (table.n_obs, 64 if frozen else 5)
    assert np.flatnonzero(np.isnan(x).any(axis=1)).tolist() == [2]
    np.testing.assert_array_equal(table.X.toarray(), values)
    record = read_uns(table, f"X_{teacher}")
    assert record is not None
    assert (record["teacher"], record["fitted"], record["n_spots"]) == (teacher, not frozen, table.n_obs - 1)
    assert record["licence"] and (record["digest"] is None) != frozen
    table.write_h5ad(tmp_path / "x.h5ad")
    back = ad.read_h5ad(tmp_path / "x.h5ad")
    assert read_uns(back, f"X_{teacher}") == record
    np.testing.assert_array_equal(back.obsm[f"X_{teacher}"], x)


def test_scfoundation_finds_genes_by_a_column(untiled: SpatialData, files: Path) -> None:
    adata = untiled["table"]
    pk.tl.embed_expression(adata, Teacher("scfoundation", files=files), **QUIET)
    adata.var["symbol"] = adata.var_names
    adata.var_names = [f"ENSG{i}" for i in range(adata.n_vars)]
    with pytest.raises(ValueError, match=r"knows none of the 24 genes of the table: .*`gene_key=`"):
        pk.tl.embed_expression(adata, Teacher("scfoundation", files=files), key_added="X_2", **QUIET)
    assert "X_2" not in adata.obsm
    few = Teacher("scfoundation", files=str(files), max_tokens=40)
    pk.tl.embed_expression(adata, few, gene_key="symbol", key_added="X_2", **QUIET)
    np.testing.assert_allclose(adata.obsm["X_2"], adata.obsm["X_scfoundation"], atol=1e-5)
    with pytest.raises(KeyError, match="`gene_key='symbols'` not found in `var`"):
        pk.tl.embed_expression(adata, Teacher("scfoundation", files=files), gene_key="symbols", **QUIET)


def test_a_spots_scfoundation_does_not_depend_on_others(untiled: SpatialData, files: Path) -> None:
    adata = untiled["table"]
    pk.tl.embed_expression(adata, Teacher("scfoundation", files=files), **QUIET)
    some = adata[5:15].copy()
    del some.obsm["X_scfoundation"], some.uns["pekasc"]
    some.X = some.X.toarray()
    pk.tl.embed_expression(some, Teacher("scfoundation", files=files), **QUIET)
    np.testing.assert_allclose(some.obsm["X_scfoundation"], adata.obsm["X_scfoundation"][5:15], atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "options", "error", "message"),
    [
        (
            "scfoundation",
            {},
            ValueError,
            r'needs its official files, models.ckpt, .*`teacher=pekasc\.models\.Teacher\("scfoundation", files=',
        ),
        (Teacher("scfoundation", files="nowhere"), {}, FileNotFoundError, "'models.ckpt' not found in 'nowhere'"),
        (Teacher("scfoundation", files="x"), {"n_components": 8}, ValueError, "dimensions of its own"),
        (Teacher("pca", files="x"), {}, ValueError, r"reads no files: .*\['scfoundation'\]"),
        ("pca", {"layer": "truth"}, ValueError, r"layers\['truth'\] has values that are no integers"),
        ("pca", {"n_components": 25}, ValueError, "`n_components=25` does not fit"),
        ("pca", {"n_components": 0}, ValueError, "`n_components=0` does not fit"),
        ("pca", {"n_components": "5"}, TypeError, "`n_components='5'` must be a whole number"),
        ("geneformer", {}, ValueError, r"choose one of .*`fit_adapter\(teacher='geneformer'\)` takes it from there"),
    ],
)
def test_what_cannot_be_embedded(
    untiled: SpatialData, teacher: str | Teacher, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pk.tl.embed_expression(untiled, teacher, **options, **QUIET)
    assert not [key for key in untiled["table"].obsm if key.startswith("X_")]


def test_without_scvi_it_says_how_to_install_it(tiled: SpatialData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ImportError, match=r'pip install "pekasc\[scvi\]"'):
        pk.tl.embed_expression(tiled, "scvi", **QUIET)
    with pytest.raises(ImportError, match=r'pip install "pekasc\[scvi\]"'):
        pk.tl.fit_adapter(tiled, teacher="scvi", train=TRAIN, **SMALL)
    # not after an hour of embedding
    monkeypatch.setattr("pekasc.models.features.BatchEncoder.__init__", None)
    with pytest.raises(ImportError, match=r'pip install "pekasc\[scvi\]"'):
        pk.tl.cross_validate(tiled, methods=["frozen", "bone"], teacher="scvi", **QUIET)


class Stop(Exception):
    """Everything was read, nothing was trained yet."""


Lessons = Callable[..., TeacherModel]


@pytest.fixture
def lessons(monkeypatch: pytest.MonkeyPatch) -> Lessons:
    """Return what gives the teacher that `tl.fit_adapter` would train with."""

    def of(sdata: SpatialData, **options: Any) -> TeacherModel:
        found: list[TeacherModel] = []

        def stop(model: Any, spec: Any, data: Any, teacher: TeacherModel, settings: Any, *_: Any) -> None:
            assert teacher.n_spots == data.tiles.n
            found.append(teacher)
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr("pekasc.tl._fit_adapter.fit", stop)
            with pytest.raises(Stop):
                pk.tl.fit_adapter(sdata, **{**SMALL, **options})
        return found[0]

    return of


def test_an_adapter_of_scfoundation_says_so(
    tiled: SpatialData, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tiled["table"]
    values = table.X.toarray()
    test = np.flatnonzero(table.obs["region"] == "P2S1_spots")
    values[test] = np.nan  # whoever reads those fails
    table.X = csr_matrix(values)
    calls: list[np.ndarray] = []
    embed = ScFoundationTeacher.embed

    def counted(self: ScFoundationTeacher, train: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        calls.append(train)
        assert self.n_spots == table.n_obs - len(test)
        return embed(self, train, rows)

    monkeypatch.setattr(ScFoundationTeacher, "embed", counted)
    adapter = pk.tl.fit_adapter(tiled, teacher=Teacher("scfoundation", files=files), train=TRAIN, **SMALL)
    # once, not once a fold, and of training spots alone
    assert [len(call) for call in calls] == [table.n_obs - len(test)]
    assert adapter.info["teacher"] == "scfoundation"
    genes = _scfoundation.load(files)[1]
    assert adapter.info["teacher_digest"] == ScFoundationTeacher(np.ones((1, len(genes))), genes, files).digest
    assert "MODEL_LICENSE" in adapter.info["teacher_licence"] and "MODEL_LICENSE" in repr(adapter)
    assert adapter.weights["projector"]["2.weight"].shape[0] == 64
    adapter.save(tmp_path / "adapter")
    assert pk.Adapter.load(tmp_path / "adapter").info == adapter.info
    assert read_uns(table, "adapter")["teacher_digest"] == adapter.info["teacher_digest"]  # type: ignore[index]


def test_what_was_stored_teaches_as_the_files_do(
    tiled: SpatialData, files: Path, lessons: Lessons, caplog: pytest.LogCaptureFixture
) -> None:
    made = lessons(tiled, teacher=Teacher("scfoundation", files=files))
    rows = np.arange(made.n_spots)
    with pytest.raises(ValueError, match="`teacher='scfoundation'` needs its official files"):
        pk.tl.fit_adapter(tiled, teacher="scfoundation", **SMALL)
    pk.tl.embed_expression(tiled, Teacher("scfoundation", files=files), **QUIET)
    caplog.clear()
    for name in ("scfoundation", "X_scfoundation"):
        stored = lessons(tiled, teacher=name)
        np.testing.assert_array_equal(stored.embed(rows), made.embed(rows))
        assert stored.name == name
        assert stored.licence == made.licence is not None and stored.digest == made.digest is not None
    assert "leaks" not in caplog.text  # it is frozen: nothing of one spot is in another's embedding
    with pytest.raises(ValueError, match=r"is read from `obsm\['X_scfoundation'\]`: leave `files=` out"):
        pk.tl.fit_adapter(tiled, teacher=Teacher("X_scfoundation", files=files), **SMALL)


def test_a_fitted_teacher_that_was_stored_is_warned_of(
    tiled: SpatialData, lessons: Lessons, caplog: pytest.LogCaptureFixture
) -> None:
    pk.tl.embed_expression(tiled, "pca", n_components=5, **QUIET)
    with caplog.at_level(logging.WARNING):
        teacher = lessons(tiled, teacher="X_pca", train=TRAIN)
    assert "expression leaks into the training" in caplog.text
    assert teacher.name == "X_pca" and teacher.digest is None


def test_training_spots_that_scfoundation_cannot_embed(tiled: SpatialData, files: Path, lessons: Lessons) -> None:
    table = tiled["table"]
    values = table.X.toarray()
    values[0] = 0
    values[0, 22] = 5  # a gene that it does not know
    table.X = csr_matrix(values)
    with pytest.raises(ValueError, match=r"'scfoundation' has NaN or infinite values in 1 of .*`train=`"):
        pk.tl.fit_adapter(tiled, teacher=Teacher("scfoundation", files=files), train=TRAIN, **SMALL)
    # the frozen encoder does not ask the teacher
    described = Teacher("scfoundation", files=files)
    adapter = pk.tl.fit_adapter(
        tiled, teacher=described, train=TRAIN, method=None, readout=RIDGE.replace(depth=2), **QUIET
    )
    assert adapter.info["teacher"] is None


def test_counts_are_found_beside_log_data(tiled: SpatialData, files: Path, lessons: Lessons) -> None:
    from pekasc._expression import log1p_cp10k

    table = tiled["table"]
    options = {"teacher": Teacher("scfoundation", files=files)}
    expected = lessons(tiled, **options)
    table.layers["log"] = log1p_cp10k(table)
    got = lessons(tiled, **options, target="as_is", layer="log")
    rows = np.arange(got.n_spots)
    np.testing.assert_array_equal(got.embed(rows), expected.embed(rows))
    # and are missed where there are none
    table.X = table.layers["log"]
    with pytest.raises(ValueError, match="Raw counts are needed"):
        pk.tl.fit_adapter(tiled, **options, target="as_is", layer="log", **SMALL)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((1, 3, 2)), r"must be a matrix of numbers, .* it has shape \(\d+, 3, 2\)"),
        (np.zeros((1, 0)), r"must be a matrix of numbers"),
        (np.full((1, 2), "a"), "must be a matrix of numbers"),
        (np.full((1, 2), np.inf), r"'mine' has NaN or infinite values in (\d+) of \1 spots"),
    ],
)
def test_an_embedding_that_cannot_teach(tiled: SpatialData, value: np.ndarray, message: str) -> None:
    table = tiled["table"]
    table.obsm["mine"] = np.repeat(value, table.n_obs, axis=0)
    with pytest.raises(ValueError, match=message):
        pk.tl.fit_adapter(tiled, teacher="mine", train=TRAIN, **SMALL)


def test_a_sparse_embedding_and_one_with_holes_outside_training(tiled: SpatialData, lessons: Lessons) -> None:
    table = tiled["table"]
    values = np.random.default_rng(0).normal(size=(table.n_obs, 4)).astype(np.float32)
    values[table.obs["region"] == "P2S1_spots"] = np.nan
    table.obsm["mine"] = csr_matrix(values)
    teacher = lessons(tiled, teacher="mine", train=TRAIN)
    rows = np.arange(teacher.n_spots)
    np.testing.assert_array_equal(teacher.embed(rows), values[table.obs["region"] == "P1S1_spots"])


@pytest.mark.parametrize("teacher", [np.zeros((3, 2)), None, ["pca"]])
def test_a_teacher_that_is_no_name(tiled: SpatialData, teacher: Any) -> None:
    with pytest.raises(TypeError, match=r"`teacher` must be a name, a key of `obsm` or a pekasc\.models\.Teacher"):
        pk.tl.fit_adapter(tiled, teacher=teacher, train=TRAIN, **SMALL)


def test_scvi_teaches(tiled: SpatialData, lessons: Lessons, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scvi")
    monkeypatch.setattr(_scvi, "EPOCHS", 2)
    table = tiled["table"]
    values = table.X.toarray()
    values[table.obs["region"] == "P2S1_spots"] = np.nan
    first = lessons(tiled, teacher="scvi", train=TRAIN)
    rows = np.arange(first.n_spots)
    table.X = csr_matrix(values)
    np.testing.assert_array_equal(lessons(tiled, teacher="scvi", train=TRAIN).embed(rows), first.embed(rows))
    with pytest.raises(ValueError, match="'teacher_components' does nothing in this call: .*dimensions of its own"):
        pk.tl.fit_adapter(tiled, teacher="scvi", train=TRAIN, **{**SMALL, "recipe": {"teacher_components": 12}})
    adapter = pk.tl.fit_adapter(
        tiled, teacher="scvi", train=TRAIN, **{**SMALL, "readout": RIDGE.replace(depth=2, n_components=12)}
    )
    assert adapter.info["teacher"] == "scvi"
    assert adapter.weights["projector"]["2.weight"].shape[0] == 10  # latent dimensions are no principal components


def test_a_comparison_asks_a_frozen_teacher_once_and_knows_its_files(
    tiled: SpatialData, scfoundation: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(tiled["table"].var_names)
    asked: list[int] = []
    original = ScFoundationTeacher.embed

    def spy(self: Any, *args: Any) -> np.ndarray:
        asked.append(1)
        return original(self, *args)

    monkeypatch.setattr(ScFoundationTeacher, "embed", spy)

    def compare(seed: int) -> pd.DataFrame:
        return pk.tl.cross_validate(
            tiled, methods=["teacher", "bone"], genes=names[:5], recipe={"epochs": 1, "rank": 8, "blocks": 1},
            teacher=Teacher("scfoundation", files=scfoundation(tmp_path / "files", names, seed=seed)),
            compute={"device": "cpu", "cache": tmp_path / "cache"}, progress=False,
        )  # fmt: skip

    first = compare(1)
    assert len(asked) == 1
    again = compare(2)
    scores = [f.loc[f["method"] == "teacher", "pearson"].to_numpy() for f in (first, again)]
    assert not np.allclose(*scores)


def test_an_embedding_of_another_width_is_not_what_was_written(tiled: SpatialData) -> None:
    pk.tl.embed_expression(tiled)
    tiled["table"].obsm["X_pca"] = np.ones((tiled["table"].n_obs, 2), dtype=np.float32)
    with pytest.raises(ValueError, match="has 2 columns, but .* wrote .* there: it holds something else now"):
        pk.tl.fit_adapter(tiled, teacher="X_pca", **SMALL)
