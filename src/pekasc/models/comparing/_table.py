"""Score the predictions of a comparison, and return its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pekasc._expression import dense
from pekasc._warnings import warn_user
from pekasc.models.comparing._bench import Bench, FoldGenes
from pekasc.models.comparing._comparison import Result
from pekasc.models.comparing._rivals import BEST_FROZEN
from pekasc.models.selection import BlockScores, gene_scores, interval, mean_score, tissue_blocks

POOLED = "pooled"
MIN_TEST = 10
_MIN_BLOCKS = 4


def score_fold(
    genes: FoldGenes,
    found: list[Result],
    bench: Bench,
    per_gene: bool,
    block_um: float,
    n_draws: int,
) -> pd.DataFrame:
    """Score the predictions of one fold and return its rows, see :func:`pekasc.tl.cross_validate`."""
    fold = genes.fold
    sections = bench.sections[fold.test]
    frames = []
    undefined: set[str] = set()
    constant = np.ptp(dense(fold.data.expression[fold.train]), axis=0) == 0
    small: set[str] = set()
    for section in [POOLED, *np.unique(sections)]:
        at = np.arange(len(fold.test)) if section == POOLED else np.flatnonzero(sections == section)
        enough = len(at) >= MIN_TEST
        if not enough:
            small.add(str(section))
        ceilings = genes.ceilings(at) if enough else np.full(genes.measured.shape[1], np.nan)
        for name, columns in genes.sets.items():
            measured = genes.measured[np.ix_(at, columns)]
            if enough:
                undefined |= {fold.data.genes[columns[i]] for i in np.flatnonzero(np.ptp(measured, axis=0) == 0)}
            else:
                measured = np.full_like(measured, np.nan)
            about = {
                "fold": fold.name, "section": str(section), "genes": name, "whole_groups": fold.name not in bench.leaky,
                "n_train": len(fold.train), "n_test": len(at),
                "n_constant_train": int(constant[columns].sum()),
            }  # fmt: skip
            if per_gene:
                frames.append(_gene_rows(genes, found, at, columns, measured, ceilings[columns], about))
                continue
            blocks = tissue_blocks(bench.coords_um[fold.test[at]], sections[at], block_um)
            # too few blocks give no meaningful interval
            draw = None
            if enough and blocks.max() + 1 >= _MIN_BLOCKS:
                draw = BlockScores(measured, blocks, n_draws, random_state=0, strata=sections[at])
            frames.append(_mean_rows(found, at, columns, measured, ceilings[columns], about, draw))
    _warn_of_scores(fold.name, [fold.data.genes[int(i)] for i in np.flatnonzero(constant)], small, undefined)
    return pd.concat(frames, ignore_index=True)


def _warn_of_scores(fold: str, constant: list[str], small: set[str], undefined: set[str]) -> None:
    """Warn of scores of a fold that are 0 or NaN because of the data."""
    problems = []
    if constant:
        problems.append(
            f"{len(constant)} genes are constant among the training spots, so they cannot be learned and count as 0: "
            f"{constant}."
        )
    if small:
        problems.append(
            f"the sections {sorted(small)} have fewer than {MIN_TEST} test spots, too few for a score of their own, "
            "which is NaN."
        )
    if undefined:
        problems.append(
            f"{len(undefined)} genes are constant among the test spots of a section, so they have no score there and "
            f"are left out of its mean: {sorted(undefined)}."
        )
    for problem in problems:
        warn_user(f"Fold {fold!r}: {problem}")


def _identity(f: Result) -> dict[str, Any]:
    r = f.readout
    given = r.context_um if isinstance(r.context_um, str) else "" if r.context_um is None else f"{r.context_um:g}"
    return {
        "encoder": f.encoder, "method": f.method, "teacher": f.teacher, "head": r.head,
        "context_um": f.prediction.about.get("context_um", given),
        "fields_um": "auto" if r.fields_um == "auto" else "+".join(f"{width:g}" for width in r.fields_um or ()),
        "orientations": r.orientations, "readout": repr(r), "seed": f.seed,
    }  # fmt: skip


def _rivals(found: list[Result]) -> list[int | None]:
    """Return for every result the index of "frozen-best" with the same readout, which has run once."""
    best = {f.readout: i for i, f in enumerate(found) if f.rival.name == BEST_FROZEN}
    return [None if f.rival.name == BEST_FROZEN else best.get(f.readout) for f in found]


def _reached(score: Any, ceiling: Any) -> Any:
    """Return the share of a ceiling that is reached; NaN where nothing can be."""
    return score / np.where(ceiling > 0, ceiling, np.nan)


def _gene_rows(
    genes: FoldGenes,
    found: list[Result],
    at: np.ndarray,
    columns: np.ndarray,
    measured: np.ndarray,
    ceilings: np.ndarray,
    about: dict[str, Any],
) -> pd.DataFrame:
    names = [genes.fold.data.genes[i] for i in columns]
    parts = [f.prediction.predicted[np.ix_(at, columns)] for f in found]
    scores = [gene_scores(part, measured) for part in parts]
    frames = []
    for f, part, score, rival in zip(found, parts, scores, _rivals(found), strict=True):
        rmse = np.sqrt(np.square(part - measured).mean(axis=0))
        difference = np.nan if rival is None else score - scores[rival]
        row = {
            **about, **_identity(f), "gene": names, "pearson": score, "ceiling": ceilings,
            "reached": _reached(score, ceilings), "difference": difference, "rmse": rmse,
        }  # fmt: skip
        frames.append(pd.DataFrame(row))
    return pd.concat(frames, ignore_index=True)


def _mean_rows(
    found: list[Result],
    at: np.ndarray,
    columns: np.ndarray,
    measured: np.ndarray,
    ceilings: np.ndarray,
    about: dict[str, Any],
    draw: BlockScores | None,
) -> pd.DataFrame:
    parts = [f.prediction.predicted[np.ix_(at, columns)] for f in found]
    scores = [mean_score(gene_scores(part, measured)) for part in parts]
    draws = [np.full(1, np.nan) if draw is None else draw(part) for part in parts]
    undefined = int((np.ptp(measured, axis=0) == 0).sum())
    ceiling = mean_score(ceilings)
    rows = []
    for i, (f, rival) in enumerate(zip(found, _rivals(found), strict=True)):
        low, high = interval(draws[i])
        row = {
            **about, **_identity(f), "n_genes": len(columns), "n_undefined": undefined, "pearson": scores[i],
            "pearson_low": low, "pearson_high": high, "ceiling": ceiling,
            "reached": float(_reached(scores[i], ceiling)),
            "rmse": float(np.sqrt(np.square(parts[i] - measured).mean())),
        }  # fmt: skip
        difference = (np.nan, np.nan, np.nan)
        if rival is not None:
            difference = (scores[i] - scores[rival], *interval(draws[i] - draws[rival]))
        row |= dict(zip(("difference", "difference_low", "difference_high"), difference, strict=True))
        chosen = f.prediction.about
        rows.append(row | {k: chosen.get(k) for k in ("depth", "epochs", "alpha", "n_parameters", "seconds")})
    return pd.DataFrame(rows)
