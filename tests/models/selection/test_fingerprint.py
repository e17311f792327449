"""What decides the result of a fit is in the settings of its folder, and what does not is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from scipy.sparse import csr_matrix

from pekasc import Compute, Readout, Recipe
from pekasc.models.encoders._network import EncoderNetwork
from pekasc.models.encoders._registry import resolve_encoder
from pekasc.models.selection._fingerprint import settings_of
from pekasc.models.selection._inputs import Data, HeadSpec, Options
from pekasc.models.teachers._pca import PcaTeacher
from pekasc.models.teachers._stored import StoredTeacher
from pekasc.tiling import ArrayTiles

N = 6
RNG = np.random.default_rng(0)
TILES = RNG.integers(0, 256, (N, 28, 28, 3)).astype(np.uint8)
EXPRESSION = RNG.poisson(2, (N, 3)).astype(np.float32)
LABELS = np.repeat(["a", "b"], N // 2)
DATA = Data(ArrayTiles(TILES), EXPRESSION, ["x", "y", "z"], LABELS, LABELS, np.arange(2.0 * N).reshape(N, 2))
OPTIONS = Options("bone", Recipe(), Readout(), Compute(device="cpu"), torch.device("cpu"))
RIDGE = Readout.preset("ridge")
TEACHER = PcaTeacher(EXPRESSION, 2)


@pytest.fixture(scope="module")
def model() -> EncoderNetwork:
    return EncoderNetwork(resolve_encoder("tiny"), 28)


def settings(model: EncoderNetwork, **changes: Any) -> str:
    how: dict[str, Any] = {"data": DATA, "teacher": TEACHER, "options": OPTIONS, "heads": [HeadSpec()], **changes}
    return json.dumps(settings_of(model, **how), sort_keys=True)


def with_options(**fields: Any) -> dict[str, Any]:
    return {"options": replace(OPTIONS, **fields)}


def with_data(**fields: Any) -> dict[str, Any]:
    return {"data": replace(DATA, **fields)}


def changed(array: np.ndarray) -> np.ndarray:
    out = array.copy()
    out.flat[-1] = out.flat[-1] + 1
    return out


OTHERS: dict[str, dict[str, Any]] = {
    "method": with_options(method="lora"),
    "configuration": with_options(method=LoraConfig(r=4)),
    "recipe": with_options(recipe=Recipe(epochs=7)),
    "depth": with_options(readout=Readout(depth=2)),
    "fields": with_options(fields_um=(448.0,)),
    "precision": with_options(compute=Compute(precision="bf16")),
    "accumulate": with_options(compute=Compute(accumulate=2)),
    "batch size of embedding": with_options(compute=Compute(embed_batch_size=3)),
    "cached activations": with_options(compute=Compute(cached_activations=None)),
    "trainer's precision": with_options(trainer={"precision": "bf16-mixed"}),
    "seed": with_options(random_state=1),
    "head": {"heads": [HeadSpec(RIDGE.replace(head="ridge-per-gene"))]},
    "rank of a head": {"heads": [HeadSpec(RIDGE.replace(head="low-rank", head_rank=3))]},
    "members": {"heads": [HeadSpec(RIDGE.replace(head="blend", members=("frozen:ridge", "adapted:ridge")))]},
    "selection": {"heads": [HeadSpec(RIDGE.replace(selection="average"))]},
    "context": {"heads": [HeadSpec(RIDGE.replace(context_um=100.0))]},
    "smoothing": {"heads": [HeadSpec(RIDGE.replace(smooth_um=100.0))]},
    "components": {"heads": [HeadSpec(RIDGE.replace(n_components=3))]},
    "several heads": {"heads": [HeadSpec(), HeadSpec(beside_frozen=True)]},
    "tiles": with_data(tiles=ArrayTiles(changed(TILES))),
    "further tiles": with_data(further=[ArrayTiles(TILES)]),
    "expression": with_data(expression=changed(EXPRESSION)),
    "genes whose components are predicted": with_data(every=EXPRESSION),
    "other such genes": with_data(every=changed(EXPRESSION)),
    "totals": with_data(totals=np.arange(1.0, N + 1)),
    "other totals": with_data(totals=np.arange(2.0, N + 2)),
    "genes": with_data(genes=["x", "y", "w"]),
    "groups": with_data(groups=LABELS[::-1]),
    "places": with_data(coords_um=DATA.coords_um + 1),
    "teacher's genes": {"teacher": PcaTeacher(changed(EXPRESSION), 2)},
    "teacher's size": {"teacher": PcaTeacher(EXPRESSION, 1)},
    "another teacher": {"teacher": StoredTeacher(EXPRESSION, "mine")},
    "no teacher": {"teacher": None},
}
SAME: dict[str, dict[str, Any]] = {
    "again": {},
    "copies": with_data(tiles=ArrayTiles(TILES.copy()), expression=EXPRESSION.copy()),
    "where things lie": with_options(compute=Compute(device="cpu", cache="a", resume="b", max_memory=10)),
    "how often a state is left": with_options(compute=Compute(checkpoint_minutes=1)),
    "bars": with_options(progress=True),
    "what only watches": with_options(trainer={"logger": False, "enable_progress_bar": False}),
}


def test_the_same_call_has_the_same_settings(model: EncoderNetwork) -> None:
    first = settings(model)
    for what, changes in SAME.items():
        assert settings(model, **changes) == first, what


def test_other_results_have_other_settings(model: EncoderNetwork) -> None:
    found = {what: settings(model, **changes) for what, changes in OTHERS.items()}
    assert settings(model) not in found.values()
    assert len(set(found.values())) == len(found)


def test_sparse_matrices_are_known_by_what_they_hold(model: EncoderNetwork) -> None:
    sparse = with_data(expression=csr_matrix(EXPRESSION))
    assert settings(model, **sparse) == settings(model, **with_data(expression=csr_matrix(EXPRESSION.copy())))
    assert settings(model, **sparse) != settings(model, **with_data(expression=csr_matrix(changed(EXPRESSION))))


def test_layers_of_a_configuration_have_no_order(model: EncoderNetwork) -> None:
    one, other = (LoraConfig(target_modules=names) for names in (["attn.qkv", "attn.proj"], ["attn.proj", "attn.qkv"]))
    assert settings(model, **with_options(method=one)) == settings(model, **with_options(method=other))


def test_weights_are_known_by_what_they_are(model: EncoderNetwork) -> None:
    other = EncoderNetwork(replace(resolve_encoder("tiny"), mean=(0.1, 0.2, 0.3)), 28)
    assert settings(other) != settings(model)
