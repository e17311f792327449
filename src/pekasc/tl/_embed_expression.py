"""`tl.embed_expression`: a teacher's embedding of every spot into obsm."""

from __future__ import annotations

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._expression import log1p_cp10k
from pekasc._keys import check_free, check_key, feature_key, write_uns
from pekasc._sections import check_table, get_table, section_labels, writable_table
from pekasc.models._teachers import pca_scores
from pekasc.tl import _inputs


def embed_expression(
    data: SpatialData | AnnData,
    teacher: str = "pca",
    *,
    layer: str | None = None,
    n_components: int | None = None,
    table_name: str = "table",
    key_added: str | None = None,
    random_state: int = 0,
) -> None:
    """Embed every spot's expression with a teacher, to look at it or to hand it to `fit_adapter`.

    It is fitted on all spots of the table, so do not teach with it what is tested on some of them:
    ``fit_adapter(teacher="pca")`` fits its own on the training spots of every fold.

    Parameters
    ----------
    data
        Spots with counts.
    teacher
        ``"pca"``: PCA of log1p(1e4 * count / total) over the genes seen in at least 10 % of spots of every section.
    layer
        Layer with counts. By default ``X`` if it holds counts, else ``layers["counts"]``.
    n_components
        Number of components; by default ``min(256, n - 1, d)``.
    table_name
        Name of the table in a SpatialData.
    key_added
        Key in obsm; by default ``"X_{teacher}"``.
    random_state
        Seed of the solver.

    Returns
    -------
    None, and writes

    ``obsm[key_added]``
        The embedding, float32, NaN in rows without counts.
    ``uns["pekasc"][key_added]``
        Teacher and parameters.

    Raises
    ------
    ValueError
        If the teacher is not known, there are no counts, or `n_components` does not fit.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.tl.embed_expression(sdata, n_components=10)
    >>> sdata["table"].obsm["X_pca"].shape[1]
    10
    """
    if teacher != "pca":
        raise ValueError(
            f'`teacher={teacher!r}` is not known here: choose "pca". An embedding made elsewhere goes into `obsm`, and '
            f"`fit_adapter(teacher={teacher!r})` takes it from there."
        )
    name = feature_key(teacher) if key_added is None else check_key(key_added)
    table = get_table(data, table_name)
    check_table(table)
    check_free(table, name, "features", slot="obsm")
    expression = log1p_cp10k(table, layer)
    rows = np.flatnonzero(np.asarray(expression.sum(axis=1)).ravel() > 0)
    labels = section_labels(table)[rows]
    genes = _inputs.expressed_genes(expression[rows], labels)
    if not genes.size:
        raise ValueError("No gene is seen in at least 10 % of the spots of every section.")
    scores = pca_scores(expression[rows][:, genes], n_components, random_state)
    table = writable_table(data, table_name)
    table.obsm[name] = _inputs.by_row(scores, rows, table.n_obs)
    write_uns(
        table,
        name,
        {"teacher": teacher, "n_components": scores.shape[1], "n_genes": genes.size, "n_spots": rows.size},
        kind="features",
    )
