"""HEST-Bench's documented protocol written out once more, without pekasc; as a script it makes hest_fixture.json.

python tests/models/comparing/data/hest_fixture.py
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HERE = Path(__file__).parent
SEED = 7


def score(features: np.ndarray, y: np.ndarray, test: np.ndarray) -> list[float]:
    """Return the Pearson correlation of every gene on the spots of the mask `test`."""
    embed = make_pipeline(StandardScaler(), PCA(256, random_state=1)).fit(features[~test])
    a, b = embed.transform(features[~test]), embed.transform(features[test])
    reg = Ridge(
        alpha=100 / (a.shape[1] * y.shape[1]), fit_intercept=False, solver="lsqr", max_iter=1000, random_state=0
    )
    predicted = reg.fit(a, y[~test]).predict(b)
    return [float(pearsonr(predicted[:, i], y[test][:, i]).statistic) for i in range(y.shape[1])]


def main() -> None:
    spec = importlib.util.spec_from_file_location("data_of_test", HERE.parent / "test_hest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    counts, features, names, samples, patients = module.make_data(np.random.default_rng(SEED))

    # genes: per sample those in at least ceil(0.1 n) spots, in common, without BLANK and Control
    common = None
    parts = []
    for sample in ["s1", "s2", "s3", "s4"]:
        part = ad.AnnData(counts[samples == sample].copy(), var=pd.DataFrame(index=names))
        sc.pp.filter_genes(part, min_cells=math.ceil(0.1 * part.n_obs))
        kept = [g for g in part.var_names if "BLANK" not in g and "Control" not in g]
        common = set(kept) if common is None else common & set(kept)
        parts.append(part)
    order = [g for g in names if g in (common or set())]
    stacked = ad.concat([part[:, order] for part in parts], index_unique="-")
    sc.pp.log1p(stacked)
    sc.pp.highly_variable_genes(stacked, n_top_genes=50)
    genes = [g for g in order if stacked.var.loc[g, "highly_variable"]]

    y = np.log1p(pd.DataFrame(counts, columns=names)[genes].to_numpy())
    scores = {patient: score(features, y, patients == patient) for patient in ["p1", "p2", "p3"]}
    (HERE / "hest_fixture.json").write_text(json.dumps({"seed": SEED, "genes": genes, "pearson": scores}, indent=1))


if __name__ == "__main__":
    main()
