from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pekasc as pk
from pekasc._options import Readout, Recipe
from pekasc.tl._call import fit_call
from pekasc.tl._options import resolve_fit


def _call(method: Any = "bone", encoder: Any = "tiny", recipe: Any = None, **given: Any) -> str:
    call = resolve_fit(encoder, "pca", method, recipe, {"fields_um": None}, {"device": "cpu"}, 3, False)
    return fit_call(call, {"encoder": encoder, "method": method, **given})


def test_the_call_can_be_typed_again() -> None:
    text = _call(recipe={"epochs": 1}, train=["A", "B"], groups="patient", target={"obsm": "x"}, genes=None)
    assert text == (
        "pk.tl.fit_adapter(sdata, encoder='tiny', teacher='pca', method='bone', train=['A', 'B'], groups='patient', "
        "target={'obsm': 'x'}, recipe=pk.Recipe(epochs=1), readout=pk.Readout(fields_um=None), random_state=3)"
    )
    seen: dict[str, Any] = {}
    names = {"sdata": None, "pk": type("pk", (), {"Recipe": Recipe, "Readout": Readout})}
    names["pk"].tl = type("tl", (), {"fit_adapter": staticmethod(lambda _, **given: seen.update(given))})
    eval(text, names)
    assert seen["recipe"] == Recipe(epochs=1) and seen["readout"] == Readout(fields_um=None)


def test_a_frozen_encoder_has_neither_teacher_nor_recipe() -> None:
    text = _call(method=None)
    assert "method=None" in text and "teacher" not in text and "recipe" not in text


def test_what_is_long_or_of_this_machine_is_not_written_out() -> None:
    encoder = pk.models.Encoder("vit_tiny_patch16_224", weights="/home/me/secret.pth", key="own")
    mask = np.arange(10) < 4
    text = _call(encoder=encoder, train=mask, genes=[f"G{i}" for i in range(100)], panels={"A": ["x"], "B": mask})
    assert "secret" not in text and "encoder='own'" in text
    assert "train=<mask, 4 of 10>" in text and "genes=<100 names>" in text
    assert "panels={'A': ['x'], 'B': <mask, 4 of 10>}" in text


def test_a_configuration_of_peft_is_named() -> None:
    peft = pytest.importorskip("peft")
    assert "method=<LoraConfig>" in _call(method=peft.LoraConfig(target_modules=["attn.qkv"]))
