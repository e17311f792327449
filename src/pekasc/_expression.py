"""Counts and targets: find the matrix with counts, and log1p of counts per 10,000."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from anndata import AnnData
from scipy import sparse

from pekasc._panels import Panels
from pekasc._settings import get_logger
from pekasc._warnings import warn_user

logger = get_logger(__name__)

SCALE = 1e4
# the scale of predictions by `target=`, as their record says it
TARGETS = {"log1p": "log1p(counts per 10,000)", "as_is": "as stored"}
GENE_EXPRESSION = "Gene Expression"  # as 10x Genomics names it in var["feature_types"]
_TYPES = "feature_types"
_WEIGHT_SCALE = 0.1  # of the median total
MIN_FRACTION = 0.1  # of the spots of every group in which a gene must be detected by default
# np.ndarray or scipy.sparse.csr_matrix; scipy has no type annotations
Matrix: TypeAlias = Any


def _matrix(adata: AnnData, layer: str | None, columns: np.ndarray | None = None) -> Matrix:
    if layer is not None and layer not in adata.layers:
        present = [name for name in adata.layers if name is not None]
        raise KeyError(f"Layer {layer!r} not found. Available layers: {present}.")
    if adata.is_view:
        check_structures(adata, [layer])
    matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        raise ValueError(
            "The table has no `X`: if nothing was measured, as on a slide's grid, there is nothing to compare with or "
            "to train on. Otherwise name a layer: `layer=`."
        )
    check_structure(matrix, "`X`" if layer is None else f"layers[{layer!r}]")
    if columns is not None:
        matrix = matrix[:, columns]
    # one type of sparse matrix downstream; a backed, lazy or array-API matrix is read here
    for read in ("to_memory", "compute"):
        if hasattr(matrix, read):
            matrix = getattr(matrix, read)()
    if not sparse.issparse(matrix):
        dense = np.asarray(matrix)
        if sparse.issparse(dense.flat[0] if dense.dtype == object and dense.size else None):
            dense = dense.flat[0].toarray()
        if dense.dtype.kind not in "biuf":
            raise ValueError(
                f"A matrix of the table (`X` or a layer) has dtype {dense.dtype}: numbers are needed. Convert it, "
                "`.astype(float)`."
            )
        return dense
    out = sparse.csr_matrix(matrix)
    if not out.data.all():
        # explicit zeros would count as detected
        out = out.copy()
        out.eliminate_zeros()
    return out


def check_structure(matrix: Any, where: str) -> None:
    """Check that the index arrays of a sparse matrix fit its shape and its values.

    scipy trusts them, and reads or writes beyond its memory if they do not.

    Raises
    ------
    ValueError
        If they do not.
    """
    if not sparse.issparse(matrix) or matrix.format not in ("csr", "csc"):
        return
    indptr, indices = matrix.indptr, matrix.indices
    n_major, n_minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    sound = (
        indptr.dtype.kind == indices.dtype.kind == "i"
        and indptr.shape == (n_major + 1,)
        and indptr[0] == 0
        and bool((indptr[1:] >= indptr[:-1]).all())
        and indptr[-1] <= min(indices.size, matrix.data.size)
        and (indices.size == 0 or bool(indices.min() >= 0 and indices.max() < n_minor))
    )
    if not sound:
        raise ValueError(
            f"{where} is a damaged sparse matrix: its `indptr` and `indices` do not fit its shape {matrix.shape} and "
            f"its {matrix.data.size} values. Read or make it again (`matrix.check_format()` says more)."
        )


def check_structures(adata: AnnData, layers: Sequence[str | None] | None = None) -> None:
    """Check the sparse matrices of a view's parent, of which the view takes rows: ``X`` (None) and layers, or all.

    Raises
    ------
    ValueError
        If the index arrays of one do not fit.
    """
    parent = adata._adata_ref if adata.is_view else adata
    for layer in [None, *(name for name in parent.layers if name is not None)] if layers is None else layers:
        check_structure(
            parent.X if layer is None else parent.layers[layer], "`X`" if layer is None else f"layers[{layer!r}]"
        )


def dense(matrix: Matrix) -> np.ndarray:
    """Return a matrix as an array."""
    return matrix if isinstance(matrix, np.ndarray) else matrix.toarray()


def dense_layer(adata: AnnData, layer: str | None, columns: np.ndarray | None = None) -> np.ndarray:
    """Return a layer, or ``X`` for None, or some columns of it, as a new float32 array, whatever it is stored as."""
    return np.array(dense(_matrix(adata, layer, columns)), dtype=np.float32)


def _values(matrix: Matrix) -> np.ndarray:
    return matrix.data if sparse.issparse(matrix) else np.asarray(matrix).ravel()


def _is_counts(matrix: Matrix) -> bool:
    values = _values(matrix)
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values == np.rint(values)).all())


def _describe(matrix: Matrix) -> str:
    values = _values(matrix)
    if not np.isfinite(values).all():
        return f"{int((~np.isfinite(values)).sum())} values that are NaN or infinite"
    if (values < 0).any():
        return f"negative values (smallest {values.min():.4g})"
    return f"values that are no integers (such as {values[values != np.rint(values)][0]:.4g})"


def counts(adata: AnnData, layer: str | None = None, *, argument: str = "layer", otherwise: str = "") -> Matrix:
    """Return raw counts, spots x genes: `layer`, else ``X`` if it holds integers, else ``layers["counts"]``.

    Raises
    ------
    KeyError
        If `layer` is not there.
    ValueError
        If the matrix holds negative, NaN or fractional values, so cannot be counts.
    """
    return find_counts(adata, layer, argument=argument, otherwise=otherwise)[0]


def find_counts(
    adata: AnnData, layer: str | None = None, *, argument: str = "layer", otherwise: str = "", advice: str = ""
) -> tuple[Matrix, str]:
    """Return raw counts as :func:`counts` does, and the layer that holds them; ``""`` is ``X``.

    `advice` is what an error says to do, for a call without an argument for the layer.
    """
    advice = advice or f"Name the layer with counts (`{argument}=`){otherwise}."
    matrix = _matrix(adata, layer)
    if _is_counts(matrix):
        return matrix, layer or ""
    if layer is None and "counts" in adata.layers:
        stored = _matrix(adata, "counts")
        if _is_counts(stored):
            logger.hint('`X` holds no counts: taking layers["counts"].')
            return stored, "counts"
        raise ValueError(
            f'Neither `X` nor layers["counts"] holds counts: found {_describe(stored)} in the latter. {advice}'
        )
    where = "`X`" if layer is None else f"layers[{layer!r}]"
    raise ValueError(f"Raw counts are needed, but {where} has {_describe(matrix)}. {advice}")


def gene_columns(adata: AnnData) -> np.ndarray:
    """Return the indices of the columns that are gene expression, by ``var["feature_types"]`` where there is one.

    Antibody counts, guides, controls and peaks are no genes: they belong neither into totals nor among targets.
    """
    everything = np.arange(adata.n_vars)
    if _TYPES not in adata.var:
        return everything
    types = np.array([str(value) for value in adata.var[_TYPES]], dtype=object)  # missing ones as text in any pandas
    is_gene = types == GENE_EXPRESSION
    if is_gene.all():
        return everything
    if not is_gene.any():
        warn_user(
            f'None of the {adata.n_vars} features is "{GENE_EXPRESSION}" by `var["{_TYPES}"]`, which has '
            f"{sorted(set(types))[:5]}: all are taken as genes."
        )
        return everything
    return np.flatnonzero(is_gene)


def report_no_genes(adata: AnnData, columns: np.ndarray) -> None:
    """Log which features are left out since they are no gene expression."""
    if columns.size == adata.n_vars:
        return
    others = adata.var[_TYPES].astype(str).drop(adata.var_names[columns]).value_counts()
    logger.hint(
        '%d features are no gene expression by `var["%s"]` and are left out, of totals too: %s.',
        adata.n_vars - columns.size, _TYPES, ", ".join(f"{n} {name}" for name, n in others.items()),
    )  # fmt: skip


def of_genes(matrix: Matrix, columns: np.ndarray) -> Matrix:
    """Return the columns that are genes, without a copy if all are."""
    return matrix if columns.size == matrix.shape[1] else matrix[:, columns]


def count_totals(raw: Matrix, columns: np.ndarray) -> np.ndarray:
    """Return the total of every spot over the columns that are genes, (n,) float64; sums of small types overflow."""
    return np.asarray(of_genes(raw, columns).sum(axis=1, dtype=np.float64)).ravel()


def log1p_cp10k(
    adata: AnnData, layer: str | None = None, *, otherwise: str = "",
    total_columns: np.ndarray | None = None,
) -> Matrix:  # fmt: skip
    """Return log1p(1e4 * count / total of the spot), spots x genes, float32; a spot without counts is all 0.

    The total is over the genes of the table (see :func:`gene_columns`), or over `total_columns`. `otherwise`
    is an alternative to naming the layer, for errors.
    """
    raw = counts(adata, layer, otherwise=otherwise)
    return log1p_of_totals(raw, count_totals(raw, gene_columns(adata) if total_columns is None else total_columns))


def log1p_of_totals(raw: Matrix, total: np.ndarray) -> Matrix:
    """Return log1p(1e4 * count / total), float32; 0 where a total is 0."""
    factor = np.divide(SCALE, total, out=np.zeros_like(total), where=total > 0)
    if sparse.issparse(raw):
        out = raw.astype(np.float64)
        out.data = np.log1p(out.data * np.repeat(factor, np.diff(out.indptr)))
        return out.astype(np.float32)
    return np.log1p(raw * factor[:, None]).astype(np.float32)


def target_matrix(
    adata: AnnData, layer: str | None = None, target: Any = "log1p", total_columns: np.ndarray | None = None
) -> Matrix:
    """Return expression: ``"log1p"`` of counts per 10,000, or the matrix ``"as_is"``.

    With a target that is no gene (a mapping), teachers see log1p of the counts. Totals are over the genes of the table,
    or over `total_columns`.
    """
    if isinstance(target, Mapping):
        return log1p_cp10k(adata, layer, total_columns=total_columns)
    if target == "log1p":
        as_is = ', or, if the data are log-normalised already and the counts are lost, give `target="as_is"`'
        return log1p_cp10k(adata, layer, otherwise=as_is, total_columns=total_columns)
    if target == "as_is":
        matrix = _matrix(adata, layer)
        if not np.isfinite(_values(matrix)).all():
            raise ValueError(
                f'`target="as_is"` needs finite values, found {_describe(matrix)}. Correct them, or leave these '
                "spots or genes out."
            )
        return matrix.astype(np.float32)
    raise ValueError(
        f'`target={target!r}` is not known. Choose "log1p" (from counts), "as_is" (log data as stored) or '
        '{"obsm": key} (the columns of an obsm).'
    )


def gene_names(adata: AnnData, gene_key: str | None = None, columns: np.ndarray | None = None) -> np.ndarray:
    """Return the names of the genes: ``var_names``, or the column `gene_key` of ``var``; of `columns`, if given."""
    columns = np.arange(adata.n_vars) if columns is None else columns
    if gene_key is None:
        return adata.var_names.to_numpy(dtype=object)[columns]
    if gene_key not in adata.var:
        raise KeyError(f"`gene_key={gene_key!r}` not found in `var`. Available columns: {list(adata.var.columns)}.")
    names = adata.var[gene_key].astype(str).to_numpy(dtype=object)[columns]
    unique, n = np.unique(names, return_counts=True)
    if (n > 1).any():
        raise ValueError(
            f"`var[{gene_key!r}]` names {int((n > 1).sum())} genes more than once "
            f"(such as {list(unique[n > 1][:3])}): drop or join the duplicates first."
        )
    return names


def gene_positions(names: np.ndarray, genes: Sequence[str]) -> np.ndarray:
    """Return the index of each of `genes` in `names`; -1 if it is missing."""
    position = {name: i for i, name in enumerate(names)}
    return np.array([position.get(gene, -1) for gene in genes], dtype=np.int64)


def named_columns(adata: AnnData, genes: str | Sequence[str]) -> np.ndarray:
    """Return the column of each of `genes`, a name or several, in a table; each once.

    Raises
    ------
    KeyError
        If one is not in ``var_names``.
    ValueError
        If there are none.
    """
    wanted = [genes] if isinstance(genes, str) else list(dict.fromkeys(genes))
    if not wanted:
        raise ValueError("`genes=` is empty: name at least one gene.")
    names = adata.var_names.to_numpy(dtype=object)
    columns = gene_positions(names, wanted)
    missing = [gene for gene, at in zip(wanted, columns, strict=True) if at < 0]
    if missing:
        raise KeyError(f"`genes=`: {missing[:5]} not found in `var_names`.{close_genes(str(missing[0]), names)}")
    return columns


def no_overlap_message(names: np.ndarray, genes: Sequence[str], adata: AnnData) -> str:
    """Return the error text for a table none of whose genes is among `genes`."""
    columns = list(adata.var.columns)
    return (
        f"None of the {len(genes)} genes asked for is in the table: asked for {list(genes[:3])}, "
        f"the table has {list(names[:3])}. If these are symbols against Ensembl ids, name the column of `var` "
        f"that holds the other kind with `gene_key=` (columns there: {columns})."
    )


def did_you_mean(name: str, known: Iterable[Any]) -> str:
    """Return ' Did you mean ...?' for a misspelt name of a column, or ''."""
    close = difflib.get_close_matches(str(name), [str(other) for other in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def close_genes(gene: str, names: np.ndarray) -> str:
    """Return ' Did you mean ...?' for a misspelt gene, or ''."""
    folded = {str(name).casefold(): str(name) for name in names}  # Erbb2 and ERBB2 are of two species
    close = [folded[name] for name in difflib.get_close_matches(gene.casefold(), list(folded), n=3)]
    return f" Did you mean {' or '.join(close)}?" if close else ""


def spot_weights(totals: np.ndarray) -> np.ndarray:
    """Return N / (N + c) for the total count N of every spot, c a tenth of the median: what its counts know.

    Spots with next to no counts are outliers of log expression, and weigh little.
    """
    return totals / (totals + _WEIGHT_SCALE * np.median(totals))


def expressed_fraction(expression: Matrix) -> np.ndarray:
    """Return the fraction of rows in which each column is above 0."""
    counts = (expression > 0).sum(axis=0)  # explicit zeros do not count
    return np.asarray(counts).ravel() / expression.shape[0]


def expressed_genes(expression: Matrix, groups: np.ndarray, panels: Panels | None = None) -> np.ndarray:
    """Return the indices of genes detected in at least 10 % of the rows of every group.

    With `panels`, of the rows that measured a gene, in every group with such rows, of which there must be one;
    `expression` is 0 where a gene was not measured.
    """
    keep = np.ones(expression.shape[1], dtype=bool)
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        fraction = expressed_fraction(expression[rows])
        if panels is not None:
            n = panels.n_spots(rows)
            fraction = np.where(n > 0, np.rint(fraction * rows.size) / np.maximum(n, 1), 1.0)
        keep &= fraction >= MIN_FRACTION
    if panels is not None:
        keep &= panels.n_spots() > 0
    return np.flatnonzero(keep)
