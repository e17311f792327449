"""Counts of the phantom: dependence of genes on tissue state and nuclear density, and noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from pekasc.datasets._phantom_image import STATES, SlideParams, nuclear_density, tissue_state

FIELD_UM = 112.0  # a spot's expression depends on the tissue in a square of this side around it
# share of all transcripts of each kind of gene; fixed, so that an effect on one kind does not change the others through
# the total
_SHARES = {"state": 0.45, "density": 0.25, "nothing": 0.3}
_LIBRARY, _LIBRARY_SD = 5000.0, 0.4
_PATIENT_SD = 0.1
_DENSITY_MEAN, _DENSITY_SD = 1.5, 0.6  # of log(1 + thousand nuclei per square millimeter), fixed for all slides


@dataclass(frozen=True)
class Genes:
    """Parameters of the genes, one entry per gene."""

    var: pd.DataFrame
    base: np.ndarray  # log rate
    by_state: np.ndarray  # (genes, states), log fold change at full membership
    by_density: np.ndarray  # log fold change per unit of the density score; negative for every second gene
    dispersion: np.ndarray
    dropout: np.ndarray


def plant_genes(n_genes: int, rng: np.random.Generator) -> Genes:
    """Choose what each gene depends on: half on a tissue state, a quarter on density, a quarter on nothing."""
    n_density = n_genes // 4
    n_nothing = n_genes // 4
    n_state = n_genes - n_density - n_nothing
    depends = np.repeat(["state", "density", "nothing"], [n_state, n_density, n_nothing])
    state = np.arange(n_state) % len(STATES)
    names = [f"STATE_{STATES[s].upper()}_{i // len(STATES) + 1:03d}" for i, s in enumerate(state)]
    names += [f"DENSITY_{i + 1:03d}" for i in range(n_density)]
    names += [f"NOISE_{i + 1:03d}" for i in range(n_nothing)]
    by_state = np.zeros((n_genes, len(STATES)))
    by_state[np.arange(n_state), state] = rng.uniform(1.2, 2.8, n_state)
    by_density = np.zeros(n_genes)
    by_density[n_state : n_state + n_density] = rng.uniform(0.4, 0.9, n_density) * (-1.0) ** np.arange(n_density)
    var = pd.DataFrame(
        {
            "phantom_depends_on": pd.Categorical(depends, categories=["state", "density", "nothing"]),
            "phantom_state": pd.Categorical([STATES[s] for s in state] + [""] * (n_genes - n_state)),
            "phantom_effect": by_state.sum(1) + by_density,
        },
        index=pd.Index(names),
    )
    return Genes(
        var=var,
        base=rng.normal(0, 0.7, n_genes),
        by_state=by_state,
        by_density=by_density,
        dispersion=rng.uniform(2, 10, n_genes),
        dropout=rng.uniform(0, 0.4, n_genes),
    )


def surroundings(params: SlideParams, centres_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean tissue state (n, states) and nuclei per square millimeter (n,) in the field around spots."""
    steps = (np.arange(5) - 2) * (FIELD_UM / 5)
    offsets = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    points = (centres_um[:, None] + offsets).reshape(-1, 2)
    states = tissue_state(params, points).reshape(len(centres_um), len(offsets), len(STATES)).mean(1)
    return states, nuclear_density(params, centres_um, FIELD_UM)


def expected_shares(genes: Genes, states: np.ndarray, density: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """Return the share of each gene in a spot's transcripts (n, genes), free of noise; rows sum to 1."""
    z = (np.log1p(density / 1000) - _DENSITY_MEAN) / _DENSITY_SD
    rate = np.exp(genes.base + states @ genes.by_state.T + z[:, None] * genes.by_density)
    for kind, share in _SHARES.items():
        members = (genes.var["phantom_depends_on"] == kind).to_numpy()
        if kind != "nothing":
            rate[:, members] *= np.exp(patient[members])
        rate[:, members] *= share / rate[:, members].sum(1, keepdims=True)
    return rate


def patient_effect(genes: Genes, rng: np.random.Generator) -> np.ndarray:
    """Return the log fold change per gene of a patient, the same in all sections."""
    return rng.normal(0, _PATIENT_SD, len(genes.base))


def draw_counts(genes: Genes, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw negative binomial counts (n, genes) with a library size per spot, and dropout, more for low expression."""
    library = rng.lognormal(np.log(_LIBRARY), _LIBRARY_SD, len(shares))
    mean = library[:, None] * shares
    counts = rng.negative_binomial(genes.dispersion, genes.dispersion / (genes.dispersion + mean))
    counts[rng.random(counts.shape) < genes.dropout / (1 + mean / 3)] = 0
    return counts
