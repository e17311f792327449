"""`tl.leakage_audit`: how much folds of random spots inflate scores, compared with held-out groups."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pandas as pd
from peft import PeftConfig
from spatialdata import SpatialData

from pekasc._keys import TILES
from pekasc._options import Compute, Readout, Recipe, resolve
from pekasc._sections import check_table, get_table
from pekasc._settings import get_logger
from pekasc.get import comparison
from pekasc.models import Encoder, Teacher
from pekasc.tl._cross_validate import cross_validate

logger = get_logger(__name__)

MAX_FOLDS = 5


def leakage_audit(
    sdata: SpatialData,
    *,
    methods: Sequence[str | PeftConfig] | Mapping[str, str | PeftConfig] = ("frozen-best", "bone"),
    encoders: str | Encoder | Sequence[str | Encoder] = "tiny",
    teacher: str | Teacher = "pca",
    groups: str | None = None,
    genes: Any = ("svg", "hvg"),
    n_genes: int = 50,
    protocol: Literal["nested", "hest"] = "nested",
    seeds: int | Sequence[int] = (0,),
    layer: str | None = None,
    gene_key: str | None = None,
    recipe: Recipe | str | Mapping[str, Any] | None = None,
    readout: Readout | str | Mapping[str, Any] | None | Sequence[Readout | str | Mapping[str, Any]] = None,
    compute: Compute | str | Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    table_name: str = "table",
    key: str = TILES,
    random_state: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure how much folds of random spots inflate the scores of methods, compared with held-out groups.

    Neighbouring spots share tissue and, where tiles overlap, pixels; sections of one patient share the tumour. With
    random spots as folds, this leaks from training to test, and scores are higher than on a new patient. Gene sets such
    as ``"svg"`` are selected separately for the two kinds of folds, and with random spots `context_um` averages only
    over neighbours on the same side of the fold: for an exact comparison, name the genes and use no context.

    Parameters
    ----------
    sdata
        Sections with tiles.
    methods, encoders, teacher, groups, genes, n_genes, protocol, seeds, layer, gene_key, recipe, readout, compute
        As in :func:`pekasc.tl.cross_validate`; ``compute.cache`` keeps the features that both comparisons share.
    store
        As in :func:`pekasc.tl.cross_validate`: the finished fits of both comparisons.
    table_name, key
        As in :func:`pekasc.tl.cross_validate`.
    random_state
        Seed of the random folds, of which there are as many as groups, at most 5.
    progress
        Show progress bars.

    Returns
    -------
    Indexed as :func:`pekasc.get.comparison` does: ``grouped`` and ``random_spots``, the mean Pearson correlation
    over genes within sections, averaged over sections and folds; ``inflation``, the difference; and
    ``inflation_relative``, the difference divided by the grouped score.

    Raises
    ------
    KeyError, OSError, TypeError, ValueError
        As :func:`pekasc.tl.cross_validate`.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=2, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> audit = pk.tl.leakage_audit(sdata, methods=["frozen"], genes="svg", n_genes=20, progress=False)
    >>> list(audit.columns)
    ['grouped', 'random_spots', 'inflation', 'inflation_relative']
    """
    how = resolve(compute, Compute, "compute")
    with TemporaryDirectory(prefix="pekasc-audit-") as folder:
        # both comparisons use the same embedded tiles; a mapping stays one: what does nothing in it is an error
        cache = {"cache": how.cache or folder}
        compare = partial(
            cross_validate, sdata, methods=methods, encoders=encoders, teacher=teacher, groups=groups, genes=genes,
            n_genes=n_genes, protocol=protocol, seeds=seeds, layer=layer, gene_key=gene_key, recipe=recipe,
            readout=readout, store=store, n_bootstrap=1, table_name=table_name, key=key, progress=progress,
            compute={**compute, **cache} if isinstance(compute, Mapping) else how.replace(**cache),
        )  # fmt: skip
        honest = compare()
        table = get_table(sdata, table_name)
        check_table(table)
        n_folds = min(MAX_FOLDS, honest["fold"].nunique())
        number = np.random.default_rng(random_state).permutation(table.n_obs) % n_folds
        folds = {f"random{i + 1}": (number != i, number == i) for i in range(n_folds)}
        with warnings.catch_warnings():
            # these folds leak on purpose
            warnings.filterwarnings("ignore", message="Folds .* have spots of one (section|patient|group)")
            leaky = compare(folds=folds)
    out = pd.DataFrame({"grouped": _scores(honest), "random_spots": _scores(leaky)})
    out["inflation"] = out["random_spots"] - out["grouped"]
    out["inflation_relative"] = out["inflation"] / out["grouped"].where(out["grouped"] > 0)
    for key, row in out.iterrows():
        logger.hint(
            "%s: mean Pearson %.3f with folds of random spots, %.3f with held-out groups: inflated by %+.3f.",
            " ".join(str(part) for part in key), row["random_spots"], row["grouped"], row["inflation"],
        )  # fmt: skip
    return out


def _scores(frame: pd.DataFrame) -> pd.Series:
    # scores do not depend on the rival; the first method is always there
    return comparison(frame, rival=frame["method"].iloc[0], n_bootstrap=1)["pearson"]
