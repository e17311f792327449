"""`pk.models.Teacher`: which teacher, from which files; a name, a key of `obsm` and a Teacher stand in one place."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pekasc as pk
from pekasc.models import Teacher
from pekasc.models.teachers import resolve_teacher


def test_fields() -> None:
    teacher = Teacher("scfoundation", files=Path("folder"), max_tokens=np.int64(10))  # type: ignore[arg-type]
    assert (teacher.name, teacher.files, teacher.max_tokens) == ("scfoundation", Path("folder"), 10)
    assert type(teacher.max_tokens) is int
    assert Teacher("pca") == Teacher("pca", files=None, max_tokens=None) != Teacher("scvi")
    assert {Teacher("pca"), Teacher("pca")} == {Teacher("pca")}
    with pytest.raises(FrozenInstanceError):
        teacher.name = "pca"  # type: ignore[misc]
    assert replace(teacher, max_tokens=None).max_tokens is None


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": 3}, TypeError, "`name` of a Teacher must be a string, got int"),
        ({"name": "scfoundation", "files": 3}, TypeError, "`files=3` of a Teacher must be the path of a folder"),
        ({"name": "scfoundation", "max_tokens": 1e4}, TypeError, "`max_tokens=10000.0` must be a whole number"),
        ({"name": "scfoundation", "max_tokens": True}, TypeError, "`max_tokens=True` must be a whole number"),
        ({"name": "scfoundation", "max_tokens": 0}, ValueError, "`max_tokens=0` must be a whole number, at least 1"),
    ],
)
def test_fields_that_do_not_fit(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Teacher(**fields)


def test_a_name_and_a_teacher_are_the_same() -> None:
    described = Teacher("scfoundation", files="folder")
    assert resolve_teacher(described) is described
    assert resolve_teacher("pca") == Teacher("pca")
    for value in (None, 3, ["pca"], {"name": "pca"}):
        with pytest.raises(
            TypeError, match=r"`teacher` must be a name, a key of `obsm` or a pekasc\.models\.Teacher, got"
        ):
            resolve_teacher(value)


@pytest.mark.parametrize("call", ["fit_adapter", "cross_validate", "leakage_audit", "embed_expression"])
def test_it_goes_wherever_a_teacher_stands(call: str) -> None:
    # what is missing is told before an object is looked at closely, by every call in the same words
    sdata = pk.datasets.phantom(n_patients=2, size_um=400, mpp=2.0, n_genes=12)
    options: dict[str, Any] = {} if call in ("fit_adapter", "embed_expression") else {"methods": ["frozen", "bone"]}
    if call != "embed_expression":
        pk.pp.tile(sdata, tile_px=28, mpp=4.0)
    for teacher in ("scfoundation", Teacher("scfoundation")):
        with pytest.raises(
            ValueError,
            match=r"`teacher='scfoundation'` needs its official files, models\.ckpt, .*: give "
            r"`teacher=pekasc\.models\.Teacher\(\"scfoundation\", files=FOLDER\)`",
        ):
            getattr(pk.tl, call)(sdata, teacher=teacher, progress=False, **options)
    with pytest.raises(ValueError, match=r"`teacher='pca'` reads no files: leave `files=` out"):
        getattr(pk.tl, call)(sdata, teacher=Teacher("pca", files="folder"), progress=False, **options)
