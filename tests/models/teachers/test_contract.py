"""What every teacher of the registry promises: it learns from training spots alone, and repeats itself."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from pekasc._expression import log1p_cp10k
from pekasc.models.teachers import TEACHERS, Source, StoredTeacher, Teacher, TeacherModel, check_files, check_finite
from pekasc.models.teachers._pca import PcaTeacher

N, GENES = 60, [f"G{i}" for i in range(25)]
TRAIN, HELD_OUT = np.arange(0, 60, 2), np.arange(1, 60, 2)
Make = Callable[..., TeacherModel]


def counts_of(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(N, 3))
    return rng.poisson(1 + np.exp(state @ rng.normal(size=(3, len(GENES))))).astype(np.float32)


@pytest.fixture(scope="module")
def files(scfoundation: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scfoundation(tmp_path_factory.mktemp("files"), [*GENES[::-1], "OTHER"], dim=8)


@pytest.fixture(params=TEACHERS)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "scvi":
        pytest.importorskip("scvi")
        monkeypatch.setattr("pekasc.models.teachers._scvi.EPOCHS", 2)
    return request.param


@pytest.fixture
def make(name: str, files: Path) -> Make:
    """Return what makes a teacher from counts."""

    def made(counts: Any, random_state: int = 0) -> TeacherModel:
        source = Source(
            expression=log1p_cp10k(AnnData(counts.copy())),
            counts=counts,
            genes=np.array(GENES, dtype=object),
            expressed=np.arange(len(GENES)),
            n_components=4 if TEACHERS[name].fitted else None,
            files=files if TEACHERS[name].files else None,
            random_state=random_state,
        )
        return TEACHERS[name].make(source)

    return made


def test_says_what_it_is(name: str, make: Make) -> None:
    teacher = make(counts_of())
    assert teacher.name == name and teacher.n_spots == N and teacher.n_genes == len(GENES)
    assert teacher.licence
    # weights that were learned elsewhere are known by their digest
    assert (teacher.digest is not None) == bool(TEACHERS[name].files)


def test_embeds_training_and_held_out_spots(make: Make) -> None:
    teacher = make(counts_of())
    seen, unseen = teacher.embed(TRAIN), teacher.embed(TRAIN, HELD_OUT)
    assert seen.dtype == unseen.dtype == np.float32
    assert len(seen) == len(TRAIN) and len(unseen) == len(HELD_OUT) and seen.shape[1] == unseen.shape[1] > 0
    assert np.isfinite(seen).all() and np.isfinite(unseen).all()
    assert (np.ptp(seen, axis=0) > 0).all()
    both = teacher.embed(TRAIN, np.concatenate([HELD_OUT, TRAIN]))
    np.testing.assert_allclose(both, np.concatenate([unseen, seen]), atol=1e-5)


def test_held_out_spots_never_influence_the_fit(make: Make) -> None:
    counts = counts_of()
    expected = make(counts).embed(TRAIN)
    changed = counts.copy()
    changed[HELD_OUT] = counts_of(seed=9)[HELD_OUT] * 50
    changed[HELD_OUT[0]] = 0
    np.testing.assert_array_equal(make(changed).embed(TRAIN), expected)
    # and a change of one training spot is noticed
    changed[TRAIN[0], 0] += 7
    assert (make(changed).embed(TRAIN) != expected).any()


def test_a_fitted_teacher_learns_from_its_training_spots_and_a_frozen_one_from_none(name: str, make: Make) -> None:
    teacher = make(counts_of())
    one, other = teacher.embed(TRAIN, HELD_OUT), teacher.embed(TRAIN[:20], HELD_OUT)
    assert (one == other).all() != TEACHERS[name].fitted


def test_same_seed_same_bits_whatever_was_drawn_before(make: Make) -> None:
    first = make(counts_of(), random_state=3).embed(TRAIN)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    again = make(counts_of(), random_state=3)
    np.testing.assert_array_equal(again.embed(TRAIN), first)
    np.testing.assert_array_equal(again.embed(TRAIN), first)


def test_order_of_rows_changes_nothing(make: Make) -> None:
    teacher = make(counts_of())
    order = np.random.default_rng(0).permutation(len(TRAIN))
    np.testing.assert_allclose(teacher.embed(TRAIN[order]), teacher.embed(TRAIN)[order], atol=1e-5)
    np.testing.assert_allclose(
        teacher.embed(TRAIN[order], HELD_OUT[order]), teacher.embed(TRAIN, HELD_OUT)[order], atol=1e-5
    )


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.int64])
def test_sparse_dense_and_integer_counts_agree(make: Make, kind: Callable[..., Any]) -> None:
    counts = counts_of()
    np.testing.assert_allclose(
        make(kind(counts)).embed(TRAIN, HELD_OUT), make(counts).embed(TRAIN, HELD_OUT), atol=1e-5
    )


def test_leaves_no_trace(make: Make, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    counts = counts_of()
    before = counts.copy()
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]
    filters = list(warnings.filters)
    make(counts).embed(TRAIN, HELD_OUT)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert random.getstate() == states[2]
    np.testing.assert_array_equal(counts, before)
    assert warnings.filters == filters
    assert capfd.readouterr() == ("", "")
    assert not [str(w.message) for w in recwarn]


def test_files_are_asked_for_by_those_that_read_them(name: str) -> None:
    files = TEACHERS[name].files
    if files:
        message = (
            rf"`teacher='{name}'` needs its official files, {', '.join(files)}: give "
            rf"`teacher=pekasc\.models\.Teacher\(\"{name}\", files=FOLDER\)`"
        )
        with pytest.raises(ValueError, match=message):
            check_files(Teacher(name))
    else:
        with pytest.raises(ValueError, match=rf"`teacher='{name}'` reads no files: leave `files=` out .*scfoundation"):
            check_files(Teacher(name, files="folder"))


@pytest.mark.parametrize("value", [0, -1])
def test_dimensions_that_do_not_fit(name: str, files: Path, value: int) -> None:
    if not TEACHERS[name].fitted:
        pytest.skip("has dimensions of its own")
    counts = counts_of()
    source = Source(
        log1p_cp10k(AnnData(counts)), counts, np.array(GENES, dtype=object), np.arange(len(GENES)), n_components=value
    )
    with pytest.raises(ValueError, match=rf"`(n|teacher)_components={value}`"):
        TEACHERS[name].make(source).embed(TRAIN)


def test_a_teacher_that_is_registered_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TEACHERS, "_rows", dict(TEACHERS))
    TEACHERS.register("mine", TEACHERS["pca"])
    check_files(Teacher("mine"))
    with pytest.raises(ValueError, match=r"The teacher 'mine' is there already \(TeacherRow.*: take another name"):
        TEACHERS.register("mine", TEACHERS["scvi"])
    assert TEACHERS["mine"] is TEACHERS["pca"]


def test_a_name_that_is_not_there() -> None:
    known = r"Choose one of \['pca', 'scvi', 'scfoundation'\]\."
    with pytest.raises(ValueError, match=rf"`teacher='scVi'` is not known\. Close names: scvi\. {known}"):
        check_files(Teacher("scVi"))


def test_pca_by_its_sparse_solver_is_that_of_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = sparse.csr_matrix(np.log1p(counts_of()))
    dense = PcaTeacher(x, 3).embed(TRAIN, HELD_OUT)
    monkeypatch.setattr("pekasc.models.teachers._pca.DENSE_VALUES", 0)
    np.testing.assert_allclose(np.abs(PcaTeacher(x, 3).embed(TRAIN, HELD_OUT)), np.abs(dense), rtol=1e-3, atol=1e-4)


def test_a_stored_embedding_is_given_back() -> None:
    x = np.random.default_rng(0).normal(size=(N, 5))
    teacher = StoredTeacher(x, "mine", "CC0", "abc")
    assert (teacher.name, teacher.licence, teacher.digest, teacher.n_spots) == ("mine", "CC0", "abc", N)
    np.testing.assert_array_equal(teacher.embed(TRAIN, HELD_OUT), x[HELD_OUT].astype(np.float32))
    np.testing.assert_array_equal(teacher.embed(TRAIN), x[TRAIN].astype(np.float32))


@pytest.mark.parametrize("x", [np.zeros(5), np.zeros((5, 0)), np.zeros((5, 2, 2)), np.array([["a"], ["b"]])])
def test_a_stored_embedding_that_is_no_matrix_of_numbers(x: np.ndarray) -> None:
    with pytest.raises(ValueError, match="embedding 'mine' must be a matrix of numbers, spots x dimensions"):
        StoredTeacher(x, "mine")


def test_an_embedding_with_holes() -> None:
    x = np.zeros((5, 2), dtype=np.float32)
    x[1, 0], x[3, 1] = np.nan, np.inf
    with pytest.raises(ValueError, match="embedding 'mine' has NaN or infinite values in 2 of 5 spots"):
        StoredTeacher(x, "mine")
    with pytest.raises(ValueError, match="2 of 5"):
        check_finite(x, "mine")


def test_a_teacher_of_another_length_is_refused_before_anything_runs() -> None:
    from pekasc._options import Compute, Readout, Recipe
    from pekasc.models import Encoder
    from pekasc.models.encoders import EncoderNetwork
    from pekasc.models.selection import Data, HeadSpec, Options, fit
    from pekasc.tiling import ArrayTiles, TileSpec

    n = 40
    tiles = ArrayTiles(np.zeros((n, 56, 56, 3), dtype=np.uint8))
    labels = np.repeat(["a", "b"], n // 2)
    data = Data(tiles, np.ones((n, 2)), ["x", "y"], labels, labels, np.zeros((n, 2)))
    options = Options("bone", Recipe(), Readout(), Compute(), torch.device("cpu"))
    teacher = StoredTeacher(np.ones((39, 3)), "mine")
    encoder = EncoderNetwork(Encoder("vit_tiny_patch16_224", weights="random", model_kwargs={"depth": 1}), 32)
    with pytest.raises(ValueError, match="teacher 'mine' has 39 spots, but there are 40 training spots"):
        fit(encoder, TileSpec(32, 2.0), data, teacher, options, [HeadSpec()])
