"""`tl.cross_validate`: compare methods on held-out groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from peft import PeftConfig
from spatialdata import SpatialData
from tqdm.auto import tqdm

from pekasc._expression import gene_columns, gene_names
from pekasc._keys import TILES, check_key
from pekasc._options import Compute, Readout, Recipe, whole
from pekasc._sections import check_table, get_table, tiled_table
from pekasc.models import Encoder, Teacher
from pekasc.models.comparing import (
    CHOSEN,
    HEST,
    HEST_PROTOCOLS,
    check_gene_sets,
    score_fold,
)
from pekasc.models.encoders import EncoderNetwork
from pekasc.tl._bench import make_comparisons
from pekasc.tl._options import resolve_comparison
from pekasc.tl._read import reading


def cross_validate(
    sdata: SpatialData,
    *,
    methods: Sequence[str | PeftConfig] | Mapping[str, str | PeftConfig] = ("mean", "frozen", "frozen-best", "bone"),
    encoders: str | Encoder | Sequence[str | Encoder] = "tiny",
    teacher: str | Teacher = "pca",
    groups: str | None = None,
    folds: str | Mapping[str, tuple[Any, Any]] | None = None,
    genes: Any = ("svg", "hvg"),
    n_genes: int = 50,
    protocol: Literal["nested", "hest", "hest-tuned"] = "nested",
    seeds: int | Sequence[int] = (0,),
    layer: str | None = None,
    gene_key: str | None = None,
    recipe: Recipe | str | Mapping[str, Any] | None = None,
    readout: Readout | str | Mapping[str, Any] | None | Sequence[Readout | str | Mapping[str, Any]] = None,
    compute: Compute | str | Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    per_gene: bool = False,
    block_um: float = 1000.0,
    n_bootstrap: int = 1000,
    table_name: str = "table",
    key: str = TILES,
    progress: bool = True,
) -> pd.DataFrame:
    """Compare methods on held-out groups, with all fitting and selection inside the training folds.

    In each fold one group is held out, and gene sets, teacher, clusters, cluster head, adapter, projector, depth,
    epochs, scaling, PCA and penalty come from the other groups alone, by the rule of :func:`pekasc.tl.fit_adapter`.
    All methods share the readout, the genes and the spots.

    Parameters
    ----------
    sdata
        Sections with tiles (:func:`pekasc.pp.tile`); tiled with its defaults where they have none.
    methods
        Methods to compare, or a mapping from names to methods:

        ``"mean"``
            The mean expression of the training spots.
        ``"coordinates"``
            The head on the spot's coordinates within its section, without the image.
        ``"neighbours"``
            The mean measured expression of the six nearest spots: not a prediction, but what smoothing would give.
        ``"teacher"``
            The head on the teacher's embedding of the test spots' own expression, without context: an upper bound.
        ``"lazy"``
            What anyone would do: the last block's features and scikit-learn's RidgeCV over spots.
        ``"frozen"``
            The head on the features of the frozen encoder's last block (its own output with ``readout.depth="own"``).
        ``"frozen-best"``
            The readout on the frozen encoder: the baseline for every difference. Its depths are those of the readout:
            all, averaged, or the best, up to ``readout.n_depths`` blocks concatenated (``fit_adapter(method=None)``
            takes one, as ``n_depths=1`` does here). In a blend, frozen features at the depth that plain ridge chooses
            take the place of adapted ones, so that the difference is what the adapter itself adds.
        ``"bone"``, ``"bat"``, ``"lora"``, ``"dora"``, ``"adalora"``, ``"hra"``, or a ``peft.PeftConfig``
            PEKA with that adapter.
        ``"frozen+peka"``
            PEKA's features (Block-Affine) concatenated with the frozen ones of the same depth.
    encoders
        One or several encoders, as in :func:`pekasc.tl.fit_adapter`.
    teacher
        As in :func:`pekasc.tl.fit_adapter`. An embedding stored in obsm must not have been fitted on test spots: one
        that `embed_expression` fitted on this table is an error.
    groups
        Column of obs; each of its values is held out once. Selection within the training spots holds them out in turn
        as well. By default ``"patient"``, if there is such a column with two patients or more, else sections, with a
        warning.
    folds
        Folds other than leave-one-group-out: a column of obs with the number of the fold in which a row is held out, as
        :func:`pekasc.pp.split` writes it, or a mapping from names to ``(train, test)``, each a boolean mask, a boolean
        column of obs or a list of sections.
    genes
        Gene sets, selected on the training spots of each fold: ``"svg"`` (highest Moran's I, mean over sections),
        ``"hvg"`` (scanpy's highly variable genes), ``"expressed"`` (detected in at least 10 % of the spots of every
        group). Or a list of genes, or a mapping from names to lists. One fit predicts the genes of all sets, and
        selection minimises the error over all of them.
    n_genes
        Number of genes in each selected set.
    protocol
        ``"nested"``, or ``"hest"``: genes, target, features and regression of HEST-Bench, for comparison with its
        published scores. Its genes are selected on test samples as well. ``"hest-tuned"`` is the same with a penalty
        tuned on the training groups, held out in turn, in place of its fixed one.
    seeds
        Seeds of training and of a teacher such as scVI; deterministic methods run once.
    layer, gene_key
        As in :func:`pekasc.tl.fit_adapter`.
    recipe
        How adapters are trained, as in :func:`pekasc.tl.fit_adapter`. ``"paper"`` also sets ``readout="paper"`` unless
        `readout` is given.
    readout
        Which features are used and how genes are predicted from them, as in :func:`pekasc.tl.fit_adapter`, or a list of
        several: those with the same depths, fields of view and orientations share one training.
    compute
        As in :func:`pekasc.tl.fit_adapter`. ``cache`` is a folder for what several comparisons share and what can be
        computed again: frozen features, gene sets and a frozen teacher's embedding.
    store
        Folder for the predictions of every finished fit, created if it does not exist: a call that was interrupted, or
        an extended comparison, continues from there. Results of other data, weights or settings are never reused.
    per_gene
        Return a row for every gene.
    block_um, n_bootstrap
        Block bootstrap of the intervals: side of the square blocks of tissue in um, and number of bootstrap samples.
    table_name, key, progress
        As in :func:`pekasc.tl.fit_adapter`.

    Returns
    -------
    One row per fold, section, encoder, method, readout, seed and gene set, with

    ``fold``, ``section``
        Name of the fold, and the held-out section, or ``"pooled"`` for all held-out spots of the fold.
    ``whole_groups``
        False if a section, patient or group has spots in training and in test: such scores are inflated.
    ``encoder``, ``method``, ``teacher``, ``head``, ``context_um``, ``fields_um``, ``orientations``, ``readout``, \
    ``seed``, ``genes``
        The settings; ``context_um`` are the radii that were used, empty without context; they and ``fields_um`` are
        joined by ``+``, ``readout`` is the repr of the :class:`pekasc.Readout`.
    ``n_genes``, ``n_undefined``, ``n_constant_train``
        Number of genes of the set; of those constant in the test spots, which have no correlation and are left out of
        the mean; and of those constant in the training spots, which cannot be learned and count as 0, as does every
        gene whose prediction is constant.
    ``n_train``, ``n_test``
        Number of training and test spots.
    ``pearson``, ``pearson_low``, ``pearson_high``, ``rmse``
        Mean Pearson correlation over genes with its 95 % interval, and root mean squared error over spots and genes.
        Intervals reflect variation within the test section, not between patients.
    ``ceiling``, ``reached``
        Mean over genes of the largest correlation that the counting noise of the test spots allows, an upper bound (see
        :func:`pekasc.tl.evaluate`), and ``pearson`` over it: the ratio of the means, not the mean of the ratios. NaN
        with the protocols of HEST-Bench, whose target is not normalised.
    ``difference``, ``difference_low``, ``difference_high``
        Paired difference in correlation to ``"frozen-best"`` of the same encoder and readout, if it is in `methods`.
    ``depth``, ``epochs``, ``alpha``, ``n_parameters``, ``seconds``
        The selected settings, the number of trainable parameters of the adapter, and the seconds of its training.

    With `per_gene`: a row for every gene of every set, with ``gene``, ``pearson`` (NaN where it is undefined),
    ``ceiling``, ``reached``, ``difference`` to ``"frozen-best"`` and ``rmse``.
    :func:`pekasc.get.comparison` summarises the rows.

    Raises
    ------
    KeyError
        If a column, gene, section or the teacher's embedding is not there.
    TypeError
        If an argument or a field of an option has a wrong type.
    ValueError
        If sections measured different genes (``varm["measured"]``). If there is a single group, a group has too few
        spots, a method is unknown, or a field of an option is not known or does nothing here.
    OSError
        If `store` or ``compute.cache`` cannot be written; finished fits stay.
    ImportError
        If the teacher is scVI and it is not installed.

    References
    ----------
    Pan, Chen, Secrier, arXiv:2504.07061; HEST-Bench: Jaume et al., NeurIPS 2024. Adapters: the PEFT library.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=3, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> frame = pk.tl.cross_validate(sdata, methods=["mean", "frozen"], genes=["svg"], n_genes=20, progress=False)
    >>> sorted(frame["method"].unique())
    ['frozen', 'mean']
    """
    check_key(key)
    table_name = tiled_table(sdata, table_name)
    table = get_table(sdata, table_name)
    check_table(table)
    call = resolve_comparison(methods, encoders, teacher, protocol, seeds, recipe, readout, compute, store)
    for name, number in (("n_genes", n_genes), ("n_bootstrap", n_bootstrap)):
        whole(name, number, least=1)
    if not block_um > 0:
        raise ValueError(f"`block_um={block_um}` must be positive.")
    sets = _gene_sets(genes, protocol, gene_names(table, gene_key, gene_columns(table)))
    with reading(sdata, table_name=table_name, key=key, layer=layer, gene_key=gene_key, groups=groups) as spots:
        comparisons = make_comparisons(call, spots, groups, folds, sets, n_genes)
        frames = []
        with tqdm(total=call.n_units(comparisons), desc="cross-validate", unit="fit", disable=not progress) as bar:
            for row in call.encoders:
                model = EncoderNetwork(row, spots.spec.tile_px)
                for comparison in comparisons:
                    frames += [
                        score_fold(fold, found, comparison.bench, per_gene, block_um, n_bootstrap)
                        for fold, found in comparison.on_encoder(model, bar)
                    ]
                del model  # one network at a time
    return pd.concat(frames, ignore_index=True)


def _gene_sets(genes: Any, protocol: str, names: np.ndarray) -> dict[str, list[str] | None]:
    """Return the gene sets by name, checked; None stands for one to be selected in the fold."""
    if genes is None:
        raise ValueError(f"`genes=None`: name sets that are chosen in the fold ({list(CHOSEN)}), or genes.")
    if protocol not in HEST_PROTOCOLS:
        return check_gene_sets(genes, [str(name) for name in names])
    if tuple([genes] if isinstance(genes, str) else genes) != ("svg", "hvg"):
        raise ValueError('`protocol="hest"` has genes of its own: leave `genes=` out.')
    return {HEST: None}
