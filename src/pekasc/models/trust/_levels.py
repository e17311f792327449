"""How far a gene's predictions can be trusted, in three levels, from its scores on held-out groups."""

from __future__ import annotations

import numpy as np
import pandas as pd

LEVELS = ("low", "medium", "high")
# mean Pearson correlation over held-out sections, and the least in any of them
RULES = {"high": (0.4, 0.2), "medium": (0.2, 0.0)}


def trust_levels(scores: pd.DataFrame) -> pd.Categorical:
    """Return the level of every gene.

    ``"high"``: a Pearson correlation of at least 0.4 on held-out sections, and above 0.2 in each of them.
    ``"medium"``: at least 0.2, and above 0 in each. ``"low"``: the others, and those that were never held out. A score
    in a single section is at most ``"medium"``.

    Parameters
    ----------
    scores
        Scores on held-out groups, an adapter's ``gene_scores``: ``pearson`` and, but for adapters of earlier versions,
        ``lowest``.
    """
    mean = scores["pearson"].to_numpy(dtype=np.float64)
    least = scores.get("lowest", scores["pearson"]).to_numpy(dtype=np.float64)
    n_sections = scores["n_sections"].to_numpy() if "n_sections" in scores else np.full(len(scores), 2)
    codes = np.zeros(len(scores), dtype=np.int64)
    for code, level in ((1, "medium"), (2, "high")):
        enough, everywhere = RULES[level]
        codes[(mean >= enough) & (least > everywhere) & (n_sections >= code)] = code
    return pd.Categorical.from_codes(codes, categories=list(LEVELS), ordered=True)
