"""`datasets.her2st`: HER2-positive breast tumours on Spatial Transcriptomics arrays."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pekasc import _assemble
from pekasc._keys import write_uns
from pekasc._settings import get_logger
from pekasc.datasets._download import fetch
from pekasc.datasets._pyramid import jpeg_levels

if TYPE_CHECKING:
    from os import PathLike

    from scipy.sparse import csr_matrix
    from spatialdata import SpatialData

logger = get_logger(__name__)

# the authors' repository, at the commit of the checksums in her2st.tsv
_COMMIT = "85df7411b987a7dec3feff9718b869a7a82091ec"
_BASE_URL = f"https://raw.githubusercontent.com/almaan/her2st/{_COMMIT}/"
_LOCAL_NAMES = {"counts": "counts.tsv.gz", "image": "image.jpg", "spots": "spots.tsv"}
_LABELS = "cluster_labels.tsv.gz"
_MPP = 0.688
_SPOT_UM = 100.0


def her2st(
    sections: str | Iterable[str] = ("B4", "C2", "C3", "C4"), path: str | PathLike[str] | None = None
) -> SpatialData:
    """Load sections of HER2-positive breast tumours: H&E and Spatial Transcriptomics of 8 patients, 36 sections.

    Sections of one patient (A1 to A6, ...) are serial sections of nearly the same tissue: a good score on one of them
    after training on another says little about a new patient.

    Parameters
    ----------
    sections
        Names of the sections; the letter is the patient.
    path
        A folder with the data: either one folder per section with ``counts.tsv.gz``, ``image.jpg``, ``spots.tsv`` and,
        optionally, ``cluster_labels.tsv.gz``, or a copy of the authors' repository. By default, the files are
        downloaded once (about 5 MB per section) into ``pooch.os_cache("pekasc")`` and verified. Images are decoded once
        and cached there as zarr (about 90 MB per section).

    Returns
    -------
    SpatialData. For the section C2: the multi-scale image ``images["C2_he"]``, uint8, about 9270 x 9920 pixels, read
    lazily; the spots ``shapes["C2_spots"]``, circles 100 um wide; both in the coordinate system ``C2``, in pixels. One
    table ``tables["table"]`` of all spots with counts and a position:

    - ``X``: counts, float32 CSR. Genes are the union over the sections; a gene missing in the authors' table of a
      section was not detected there, and is 0
    - ``obs``: section, patient, array_row, array_col (grid indices), region, spot_id, and label (the authors'
      expression cluster, if its file exists; missing for spots without one)
    - ``obsm["spatial"]``: centres in pixels
    - ``uns["pekasc"]["image_mpp"]``: 0.688 um per pixel, the mean of 0.690 along x and 0.686 along y, which follow from
      the pitch of 200 um

    Raises
    ------
    ValueError
        If a section does not exist, a downloaded file is not what the authors published, or an image cannot be read.
    FileNotFoundError
        If a file is missing in `path`.
    OSError
        If the download fails, or the cache cannot be written.

    Notes
    -----
    The authors state no licence in their repository: use the data with a citation, do not redistribute it.

    References
    ----------
    Andersson et al., Spatial deconvolution of HER2-positive breast cancer delineates tumor-associated cell type
    interactions, Nature Communications 12, 6012 (2021).

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.her2st(["C2", "C3"])  # doctest: +SKIP
    """
    from spatialdata import SpatialData

    names = _check_sections(sections)
    images, shapes, obs, counts, centres = {}, {}, [], [], []
    for name in names:
        found = _local(name, Path(path)) if path is not None else _download(name)
        spots, section_counts, genes = _spots(name, found)
        xy = spots[["pixel_x", "pixel_y"]].to_numpy(np.float64)
        images[f"{name}_he"] = _assemble.multiscale(jpeg_levels(found["image"]), name)
        shapes[f"{name}_spots"] = _assemble.spots(xy, _SPOT_UM / 2 / _MPP, name)
        columns = {"section": name, "patient": name[0], "array_row": spots["y"], "array_col": spots["x"]}
        if "label" in spots:
            columns["label"] = spots["label"]
        obs.append(pd.DataFrame(columns))
        counts.append((section_counts, genes))
        centres.append(xy)
    joint = pd.concat(obs, ignore_index=True)
    if "label" in joint:
        joint["label"] = pd.Categorical(joint["label"])
    matrix, genes = _union(counts)
    table = _assemble.table(
        matrix, joint, pd.DataFrame(index=genes), np.concatenate(centres), dict.fromkeys(images, _MPP), images
    )
    write_uns(table, "her2st", {"source": _BASE_URL, "sections": ",".join(names)})
    logger.info("her2st: sections %s, %d spots, %d genes, %g um per pixel.", ", ".join(names), *table.shape, _MPP)
    return SpatialData(images=images, shapes=shapes, tables={"table": table})


def _sources() -> pd.DataFrame:
    """Return the published files: path in the authors' repository and checksums, by section and kind."""
    text = files("pekasc.datasets").joinpath("her2st.tsv")
    with text.open() as handle:
        return pd.read_csv(handle, sep="\t", index_col=["section", "kind"], dtype=str, keep_default_na=False)


def _check_sections(sections: str | Iterable[str]) -> list[str]:
    names = [sections] if isinstance(sections, str) else list(sections)
    known = list(_sources().index.unique("section"))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"Unknown sections {unknown}. Valid sections: {', '.join(known)}.")
    if not names:
        raise ValueError(f"`sections` is empty. Valid sections: {', '.join(known)}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`sections` names {twice} more than once.")
    return names


def _local(section: str, folder: Path) -> dict[str, Path]:
    """Return the files of a section in `folder`, in either layout."""
    if not folder.is_dir():
        raise FileNotFoundError(f"`path={str(folder)!r}` is no folder. Without `path` the data is downloaded.")
    published = _sources().loc[section]["path"]
    if (folder / "data" / "ST-cnts").is_dir():
        found = {kind: folder / published[kind] for kind in _LOCAL_NAMES}
    else:
        found = {kind: folder / section / name for kind, name in _LOCAL_NAMES.items()}
    for kind, file in found.items():
        if not file.is_file():
            raise FileNotFoundError(
                f"Section {section} has no {kind} in `path={str(folder)!r}`: neither {section}/{_LOCAL_NAMES[kind]} "
                f"nor {published[kind]} is there."
            )
    labels = folder / section / _LABELS
    return {**found, "labels": labels} if labels.is_file() else found


def _download(section: str, *, base_url: str = _BASE_URL, cache: Path | None = None) -> dict[str, Path]:
    """Return the published files of a section, downloaded and checked once."""
    found = {}
    for kind, row in _sources().loc[section].iterrows():
        found[str(kind)] = fetch(
            base_url + row["path"],
            folder=f"her2st-{_COMMIT[:8]}",
            path=row["path"],
            git_sha1=row["git_blob_sha1"],
            sha256=row["sha256"],
            cache=cache,
        )
    return found


def _spots(section: str, found: dict[str, Path]) -> tuple[pd.DataFrame, csr_matrix, pd.Index]:
    """Return the spots with counts and a position, in the order of the counts, their counts, and the genes."""
    from scipy.sparse import csr_matrix

    table = pd.read_csv(found["counts"], sep="\t", index_col=0)
    spots = pd.read_csv(found["spots"], sep="\t")
    spots.index = pd.Index(spots["x"].astype(str) + "x" + spots["y"].astype(str))
    for what, names in (("spots", spots.index), ("spots with counts", table.index), ("genes", table.columns)):
        if names.has_duplicates:
            raise ValueError(f"Section {section} names some {what} twice: {list(names[names.duplicated()][:5])}.")
    both = table.index[table.index.isin(spots.index)]
    if not len(both):
        raise ValueError(f"Section {section}: no row of {found['counts']} is a spot of {found['spots']}.")
    missing = len(table.index) + len(spots.index) - 2 * len(both)
    if missing:
        logger.hint("her2st: section %s: %d spots without counts or without a position left out.", section, missing)
    spots = spots.loc[both]
    if "labels" in found:
        labels = pd.read_csv(found["labels"], sep="\t", index_col=0)
        key = labels["x"].astype(str) + "x" + labels["y"].astype(str)
        # some spots have no label; as text, so that clusters are categories
        spots["label"] = pd.Series(labels["label"].astype(str).to_numpy(), index=key).reindex(both)
    return spots, csr_matrix(table.loc[both].to_numpy(np.float32)), table.columns


def _union(counts: list[tuple[csr_matrix, pd.Index]]) -> tuple[csr_matrix, pd.Index]:
    """Concatenate sections over the union of their genes, those of the first section first."""
    from scipy.sparse import coo_matrix, vstack

    genes = pd.Index(list(dict.fromkeys(gene for _, names in counts for gene in names)))
    parts = []
    for matrix, names in counts:
        part = matrix.tocoo()
        column = genes.get_indexer(names)[part.col]
        parts.append(coo_matrix((part.data, (part.row, column)), shape=(matrix.shape[0], len(genes))))
    return vstack(parts, format="csr", dtype=np.float32), genes
