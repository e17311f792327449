"""HEST-Bench's protocol against figures of an independent pipeline (see data/hest_fixture.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

from pekasc.models.comparing._hest import STRENGTHS, hest_genes, hest_predict, tuned_strength
from pekasc.models.selection._scores import pearson

FIXTURE = Path(__file__).parent / "data" / "hest_fixture.json"
# lsqr stops before it has converged, so another processor's rounding shows in the third digit
OTHER_MACHINES = 3e-3


def test_equals_the_independent_pipeline() -> None:
    want = json.loads(FIXTURE.read_text())
    rng = np.random.default_rng(want["seed"])
    counts, features, names, samples, patients = make_data(rng)
    at = hest_genes(counts, names, samples)
    assert [names[i] for i in at] == want["genes"]
    y = np.log1p(counts[:, at])
    score = independent_score()
    for patient, scores in want["pearson"].items():
        test = patients == patient
        predicted = pearson(hest_predict(features[~test], y[~test], features[test]), y[test])
        np.testing.assert_allclose(predicted, score(features, y, test), atol=1e-6)
        np.testing.assert_allclose(predicted, scores, atol=OTHER_MACHINES)


def test_a_tuned_penalty_is_the_best_on_training_groups_held_out() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(["a", "b", "c"], 30)
    x = rng.normal(size=(90, 40))
    y = x[:, :3] + 2 * rng.normal(size=(90, 3))
    errors = []
    for strength in STRENGTHS:
        parts = [hest_predict(x[groups != g], y[groups != g], x[groups == g], strength) - y[groups == g] for g in "abc"]
        errors.append(sum(np.square(part).sum() for part in parts))
    assert tuned_strength(x, y, groups) == STRENGTHS[int(np.argmin(errors))] > 1
    assert tuned_strength(x, y, np.repeat("a", 90)) == 1.0  # nothing can be held out
    np.testing.assert_array_equal(hest_predict(x, y, x[:5]), hest_predict(x, y, x[:5], 1.0))


def independent_score() -> Any:
    spec = importlib.util.spec_from_file_location("hest_fixture", FIXTURE.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.score


def make_data(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray, np.ndarray]:
    n, n_genes, d = 660, 160, 300
    state = rng.normal(size=(n, 8))
    rate = np.exp(0.4 * state @ rng.normal(size=(8, n_genes)) + rng.normal(-0.5, 1.2, size=n_genes))
    counts = rng.poisson(rate).astype(np.float64)
    features = (state @ rng.normal(size=(8, d)) + rng.normal(size=(n, d))).astype(np.float32)
    names = [f"BLANK_{i}" if i % 40 == 0 else f"Control{i}" if i % 40 == 1 else f"G{i}" for i in range(n_genes)]
    samples = np.repeat(["s1", "s2", "s3", "s4"], [200, 120, 180, 160])
    patients = np.repeat(["p1", "p2", "p3"], [200, 300, 160])
    return counts, features, names, samples, patients
