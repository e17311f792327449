"""`tl.embed_expression`: embed the expression of every spot with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from anndata import AnnData
from spatialdata import SpatialData

from pekasc._expression import counts, expressed_genes, gene_columns, gene_names, log1p_cp10k, of_genes, report_no_genes
from pekasc._keys import check_free, check_key, feature_key, write_uns
from pekasc._options import Compute, resolve, unused_in_embedding, whole
from pekasc._sections import by_row, check_table, get_table, section_labels, writable_table
from pekasc.models import Teacher
from pekasc.models.heads import n_components_for
from pekasc.models.runtime import autocast, resolve_device
from pekasc.models.teachers import TEACHERS, check_files, resolve_teacher
from pekasc.tl._teachers import make_teacher

_UNUSED = unused_in_embedding() | dict.fromkeys(("client", "embed_batch_size", "max_memory"), "no tiles are embedded")


def embed_expression(
    data: SpatialData | AnnData,
    teacher: str | Teacher = "pca",
    *,
    layer: str | None = None,
    n_components: int | None = None,
    gene_key: str | None = None,
    compute: Compute | str | Mapping[str, Any] | None = None,
    table_name: str = "table",
    key_added: str | None = None,
    random_state: int = 0,
    progress: bool = True,
) -> None:
    """Embed the expression of every spot with a teacher, to inspect it or to use it in `fit_adapter`.

    ``"pca"`` and ``"scvi"`` are fitted on all spots of the table, so do not use their embedding as the teacher of an
    adapter that is tested on some of these spots: ``fit_adapter(teacher="pca")`` fits one on the training spots of
    every fold. ``"scfoundation"`` is a frozen model that embeds each spot from its own counts alone: its embedding can
    be stored and used as the teacher of any fold.

    Parameters
    ----------
    data
        A SpatialData, or an AnnData, with counts.
    teacher
        ``"pca"``: PCA of log1p(1e4 * count / total). ``"scvi"``: latent means of scVI, 100 epochs on the counts (needs
        ``pip install "pekasc[scvi]"``). Both use the genes detected in at least 10 % of the spots of every section.
        ``Teacher("scfoundation", files=...)``: scFoundation's cell embedding; see :class:`pekasc.models.Teacher`.
    layer
        Layer with counts. By default ``X`` if it holds counts, else ``layers["counts"]``.
    n_components
        Number of principal components, by default ``min(256, n - 1, d)``, or of latent dimensions of scVI, by default
        10. That of scFoundation is fixed.
    gene_key
        Column of var with gene symbols, as scFoundation names genes; by default ``var_names``.
    compute
        A :class:`pekasc.Compute`, or a mapping of its fields: ``device`` and, for scFoundation, ``precision``.
    table_name
        Name of the table in a SpatialData.
    key_added
        Key in obsm; by default ``"X_{teacher}"``.
    random_state
        Seed of PCA and of scVI.
    progress
        Show a progress bar.

    Returns
    -------
    None, and writes

    ``obsm[key_added]``
        The embedding, (n_obs, n_components) float32; NaN in rows without counts (scFoundation: with counts of fewer
        than two of its genes).
    ``uns["pekasc"][key_added]``
        Teacher, parameters, and the licence and digest of its weights.

    Raises
    ------
    KeyError
        If `layer` or `gene_key` is not there.
    ValueError
        If the teacher is unknown, there are no counts, `n_components` is too large, the checkpoint has another
        architecture, or almost none of the genes is known to scFoundation.
    OSError
        If a file of the checkpoint is missing or cannot be read.
    ImportError
        If the teacher is scVI and it is not installed.

    References
    ----------
    scVI: Lopez et al., Nature Methods 2018, doi:10.1038/s41592-018-0229-2. scFoundation: Hao et al., Nature Methods
    2024, doi:10.1038/s41592-024-02305-7.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600)
    >>> pk.tl.embed_expression(sdata, n_components=10)
    >>> sdata["table"].obsm["X_pca"].shape[1]
    10
    """
    described = resolve_teacher(teacher)
    how = resolve(compute, Compute, "compute", unused=_UNUSED)
    table = get_table(data, table_name)
    if described.name not in TEACHERS:
        raise ValueError(
            f"`teacher={described.name!r}` is not known here: choose one of {list(TEACHERS)}. An embedding made "
            f"elsewhere goes into `obsm`, and `fit_adapter(teacher={described.name!r})` takes it from there."
        )
    row = TEACHERS[described.name]
    check_files(described)
    if n_components is not None and not row.fitted:
        raise ValueError(f"`teacher={described.name!r}` has dimensions of its own: leave `n_components=` out.")
    n_components = None if n_components is None else whole("n_components", n_components)
    name = feature_key(described.name) if key_added is None else check_key(key_added)
    device = resolve_device(how.device)
    autocast(device, how.precision)
    check_table(table)
    check_free(table, name, "features", slot="obsm")
    columns = gene_columns(table)
    report_no_genes(table, columns)
    names = gene_names(table, gene_key, columns)
    raw = of_genes(counts(table, layer), columns)
    rows = np.flatnonzero(np.asarray(raw.sum(axis=1)).ravel() > 0)
    if not rows.size:
        raise ValueError(
            f"None of the {raw.shape[0]} spots has counts in any of {raw.shape[1]} genes: name the layer with counts "
            "(`layer=`), or give a table with genes."
        )
    genes = expressed_genes(raw[rows], section_labels(table)[rows])
    if row.fitted and not genes.size:
        raise ValueError(
            f"None of {raw.shape[1]} genes is detected in at least 10 % of the spots of every section, and only such "
            "are embedded: leave sections that share no genes with others, or are too shallow, out."
        )
    if described.name == "pca":
        n_components_for(rows.size, genes.size, n_components)  # an error names the argument of this call
    made = make_teacher(
        described, expression=None if row.counts else of_genes(log1p_cp10k(table, layer), columns)[rows],
        counts=raw[rows] if row.counts else None, genes=names, expressed=genes, n_components=n_components,
        device=device, precision=how.precision, random_state=random_state, progress=progress,
    )  # fmt: skip
    embedding = made.embed(np.arange(rows.size))
    record = {
        "teacher": described.name,
        "fitted": row.fitted,
        "licence": made.licence,
        "digest": made.digest,
        "n_components": embedding.shape[1],
        "n_genes": made.n_genes,
        "n_spots": rows.size,
    }
    table = writable_table(data, table_name)
    table.obsm[name] = by_row(embedding, rows, table.n_obs)
    write_uns(table, name, record, kind="features")
