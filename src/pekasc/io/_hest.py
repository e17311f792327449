"""`io.read_hest`: read samples of HEST-1k."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pekasc import _assemble
from pekasc._keys import BARCODE, check_key, write_uns
from pekasc._sections import (
    ARRAYS,
    array_pixel_size,
    check_mpp,
    check_patches,
    describe_patches,
    examples,
    grid_index,
    in_tissue,
    join_patches,
    patch_side_px,
    write_patch_records,
)
from pekasc._settings import get_logger
from pekasc._warnings import warn_user
from pekasc.io._h5ad import Expression, read_h5ad
from pekasc.io._tiff import tiff_levels
from pekasc.tiling import PatchFile

if TYPE_CHECKING:
    from os import PathLike

    import dask.array as da
    from scipy.sparse import csr_matrix
    from spatialdata import SpatialData

logger = get_logger(__name__)

_ARRAY_OF = {"visium": "visium", "spatial transcriptomics": "st", "st": "st"}
_SPOT_UM = {"visium": 55.0, "st": 100.0}
_TOLERANCE = 0.02


@dataclass
class _Sample:
    name: str
    metadata: dict[str, Any]
    counts: csr_matrix
    genes: pd.Index
    obs: pd.DataFrame
    centres_px: np.ndarray
    radius_px: float
    mpp: float
    levels: list[da.Array]
    patches: dict[str, Any] | None

    @property
    def region(self) -> str:
        return f"{self.name}_spots"

    @property
    def image_name(self) -> str:
        return f"{self.name}_he"


def read_hest(
    path: str | PathLike[str],
    sample_id: str | Iterable[str],
    *,
    genes: Sequence[str] | None = None,
    patient: Mapping[str, str] | None = None,
    strict: bool = True,
) -> SpatialData:
    """Read one or several samples of HEST-1k from the download folder: image, spots, counts, stored patches.

    Images and stored patches are read lazily; only the counts are in memory (and twice while samples are
    concatenated). A sample can have an image, patches, or both: :func:`pekasc.pp.tile` reads tiles from the image if
    there is one, and else, or with ``patches=True``, from the patches. Patches are joined to spots by barcode.

    Parameters
    ----------
    path
        The folder with ``st/{id}.h5ad``, ``metadata/{id}.json``, and ``wsis/{id}.tif`` or ``patches/{id}.h5``.
    sample_id
        Name of a sample, or several.
    genes
        Genes to keep; fewer need less memory. By default the genes that all samples have, since a gene that was not
        measured in a sample is not 0 there.
    patient
        Patient of each sample, if it is missing or wrong in the metadata: ``{"TENX95": "A"}``.
    strict
        Whether a pixel size in the metadata that differs by more than 2 % from the pitch of the spots, the image's size
        or the patches is an error. With False it is a warning, and that of the metadata is used.

    Returns
    -------
    SpatialData. For the sample TENX95: the multi-scale image ``images["TENX95_he"]``, uint8, if it is there; the spots
    ``shapes["TENX95_spots"]``, circles; both in the coordinate system ``TENX95``, in full-resolution pixels. One table
    ``tables["table"]`` of the spots of all samples:

    - ``X``: counts, float32 CSR
    - ``obs``: section (the sample), patient, barcode, region, spot_id; array_row, array_col and in_tissue where a
      sample has them. Names are ``{sample}_{barcode}``
    - ``obsm["spatial"]``: centres in pixels
    - ``uns["pekasc"]``: image_mpp (the metadata's ``pixel_size_um_estimated``), patches (where stored patches are),
      hest (the metadata of every sample, as JSON)

    Raises
    ------
    KeyError
        If a sample or a gene does not exist.
    FileNotFoundError
        If a sample lacks its metadata, or both image and patches.
    ValueError
        If a file is damaged or has another format, barcodes are not unique, patches do not belong to the spots, the
        samples have no gene in common, or the pixel size is missing or contradictory.

    Notes
    -----
    The pixel size is checked against the pitch of Visium and Spatial Transcriptomics spots, from ``array_row``,
    ``array_col`` and ``inter_spot_dist`` of the metadata. Binned data (Xenium, Visium HD) have no such indices; their
    bins lie on an exact square grid, which is found from the centres. Pixel sizes that cannot be checked are logged.

    HEST-1k is licensed CC BY-NC-SA 4.0; pekasc contains neither its data nor its code.

    References
    ----------
    Jaume et al., HEST-1k: a dataset for spatial transcriptomics and histology image analysis, arXiv:2406.16192 (2024).

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.io.read_hest("hest_data", ["TENX95", "TENX99"])  # doctest: +SKIP
    >>> pk.pp.tile(sdata, tile_px=224, mpp=0.5)  # doctest: +SKIP
    """
    from scipy.sparse import vstack
    from spatialdata import SpatialData

    folder = Path(path).expanduser()
    names = _check_names(folder, sample_id)
    unknown = sorted(set(patient or {}) - set(names))
    if unknown:
        raise KeyError(f"`patient` names {unknown}, the samples are {names}.")
    unnamed = [sample for sample, label in (patient or {}).items() if pd.isna(label) or not str(label).strip()]
    if unnamed:
        raise ValueError(f"`patient` is empty for {unnamed}: give a name, or leave the sample out.")
    wanted = None if genes is None else _check_genes(genes)
    samples = [_read_sample(folder, name, wanted, strict) for name in names]
    kept = _common_genes(samples) if wanted is None else wanted
    patients = _patients(samples, patient or {})
    images, shapes, obs, counts = {}, {}, [], []
    for sample in samples:
        if sample.levels:
            images[sample.image_name] = _assemble.multiscale(sample.levels, sample.name)
        shapes[sample.region] = _assemble.spots(sample.centres_px, sample.radius_px, sample.name)
        obs.append(sample.obs.assign(section=sample.name, patient=patients[sample.name]))
        order = sample.genes.get_indexer(kept)
        counts.append(sample.counts[:, order])
        del sample.counts  # free the memory of the sample's own matrix
    table = _assemble.table(
        vstack(counts, format="csr"),
        _joint(obs),
        pd.DataFrame(index=pd.Index(kept)),
        np.concatenate([sample.centres_px for sample in samples]),
        {sample.image_name: sample.mpp for sample in samples},
        images,
    )
    records = {sample.region: sample.patches for sample in samples if sample.patches is not None}
    if records:
        write_patch_records(table, records)
    write_uns(table, "hest", {sample.name: json.dumps(sample.metadata) for sample in samples})
    logger.info(
        "HEST-1k: %d samples, %d spots, %d genes; %d with an image, %d with stored patches.",
        len(samples), *table.shape, len(images), len(records),
    )  # fmt: skip
    return SpatialData(images=images, shapes=shapes, tables={"table": table})


def _joint(obs: list[pd.DataFrame]) -> pd.DataFrame:
    joint = pd.concat(obs, ignore_index=True)
    if "in_tissue" in joint:
        joint["in_tissue"] = joint["in_tissue"].fillna(1).astype(np.int64)  # samples without the column: all on tissue
    return joint


def _check_names(folder: Path, sample_id: str | Iterable[str]) -> list[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"`path={str(folder)!r}` is no folder.")
    names = [sample_id] if isinstance(sample_id, str) else list(sample_id)
    there = sorted(file.stem for file in (folder / "st").glob("*.h5ad"))
    if not there:
        raise FileNotFoundError(f"No file st/*.h5ad in `path={str(folder)!r}`: it is not laid out like HEST-1k.")
    if not names:
        raise ValueError(f"`sample_id` is empty. Samples there: {there}.")
    missing = [name for name in names if name not in there]
    if missing:
        raise KeyError(f"Samples {missing} not found in {str(folder / 'st')!r}. Samples there: {there}.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"`sample_id` names {twice} more than once.")
    for name in names:
        check_key(name, argument="sample_id")
    return names


def _check_genes(genes: Sequence[str]) -> pd.Index:
    wanted = pd.Index([genes] if isinstance(genes, str) else list(genes))
    if not len(wanted) or not wanted.is_unique:
        raise ValueError("`genes=` must name at least one gene, and each once.")
    return wanted


def _read_sample(folder: Path, name: str, wanted: pd.Index | None, strict: bool) -> _Sample:
    metadata = _metadata(folder / "metadata" / f"{name}.json", name)
    image, stored = folder / "wsis" / f"{name}.tif", folder / "patches" / f"{name}.h5"
    if not image.is_file() and not stored.is_file():
        raise FileNotFoundError(
            f"Sample {name!r} has neither an image, {str(image)!r}, nor patches, {str(stored)!r}: one is needed."
        )
    found = read_h5ad(folder / "st" / f"{name}.h5ad", ("array_row", "array_col", "in_tissue"))
    barcodes, centres, obs = pd.Index(found.rows), found.spatial, found.obs
    if not barcodes.is_unique:
        raise ValueError(
            f"Sample {name!r} has duplicate barcodes: {examples(barcodes[barcodes.duplicated()].unique())}. Download "
            "it again, or leave it out."
        )
    if bad := int((~np.isfinite(centres).all(axis=1)).sum()):
        raise ValueError(
            f"Sample {name!r}: {bad} of {len(centres)} spot centres are NaN or infinite. Download it again, or leave "
            "it out."
        )
    counts, genes = _counts(found, name, wanted)
    obs.insert(0, BARCODE, found.rows)
    if "in_tissue" in obs:
        obs["in_tissue"] = in_tissue(obs["in_tissue"], name).astype(np.int64)

    if _known(metadata, "pixel_size_um_estimated") is None:
        raise ValueError(
            f"The metadata of sample {name!r} has no pixel size ('pixel_size_um_estimated'): write it there if you "
            "know it, or leave the sample out."
        )
    mpp = check_mpp(metadata["pixel_size_um_estimated"], f"`pixel_size_um_estimated` of sample {name!r}")
    kind = _ARRAY_OF.get(str(_known(metadata, "st_technology") or "").strip().lower())
    _check_pitch(name, metadata, mpp, kind, obs, centres, strict)
    levels = tiff_levels(image) if image.is_file() else []
    size_px = _size_px(name, metadata, levels, strict)
    patches = None
    if stored.is_file():
        patches = _patches(stored, name, obs[BARCODE], centres, mpp, size_px, strict)
    diameter_um = (
        _number(metadata, "spot_diameter", name)
        or _number(metadata, "inter_spot_dist", name)
        or _SPOT_UM.get(kind or "")
    )
    if diameter_um is None:
        diameter_um = 100.0
        logger.hint("sample %s: the metadata has no spot diameter; drawn as %g um.", name, diameter_um)
    return _Sample(
        name, metadata, counts, genes, obs, centres, diameter_um / 2 / mpp, mpp, levels, patches
    )  # fmt: skip


def _metadata(file: Path, name: str) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(
            f"Sample {name!r} has no metadata: {str(file)!r} is not there. Download it, it has the pixel size."
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The metadata {str(file)!r} is no JSON: {error}. Download it again.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"The metadata {str(file)!r} must be a JSON object, got {type(found).__name__}. Download it again."
        )
    return found


def _known(metadata: Mapping[str, Any], key: str) -> Any:
    """Return a value of the metadata, None if it is missing, empty or NaN."""
    value = metadata.get(key)
    return None if value is None or value == "" or (isinstance(value, float) and np.isnan(value)) else value


def _number(metadata: Mapping[str, Any], key: str, name: str) -> float | None:
    """Return a positive number of the metadata; None if it is missing or 0, which stands for unknown."""
    value = _known(metadata, key)
    try:
        number = 0.0 if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"The metadata of sample {name!r}: {key!r} must be a positive number, got {value!r}.")
    return number or None


def _counts(found: Expression, name: str, wanted: pd.Index | None) -> tuple[csr_matrix, pd.Index]:
    from anndata.utils import make_index_unique

    genes = pd.Index(found.genes)
    if not genes.is_unique:
        logger.hint("sample %s: %d duplicate gene names, made unique with numbers.", name, genes.duplicated().sum())
        genes = make_index_unique(genes)
    if wanted is None:
        return found.counts, genes
    missing = wanted[~wanted.isin(genes)]
    if len(missing):
        raise KeyError(
            f"{len(missing)} of {len(wanted)} genes asked for are not in sample {name!r}: {examples(missing)}. "
            f"Genes there: {examples(genes)}."
        )
    return found.counts[:, genes.get_indexer(wanted)], wanted


def _check_pitch(
    name: str,
    metadata: Mapping[str, Any],
    mpp: float,
    kind: str | None,
    obs: pd.DataFrame,
    centres: np.ndarray,
    strict: bool,
) -> None:
    """Check the metadata's pixel size against the distance of the spots."""
    pitch = _number(metadata, "inter_spot_dist", name) or (ARRAYS[kind][2] if kind else None)
    if pitch is None:
        logger.hint("sample %s: the metadata names no pitch; its pixel size is not checked.", name)
        return
    if kind is None:
        index = _bins(centres)
    elif {"array_row", "array_col"} <= set(obs):
        try:
            index = np.column_stack([grid_index(obs[c], c, name) for c in ("array_col", "array_row")])
        except ValueError as error:
            _unchecked(name, error, strict)
            return
    else:
        logger.hint("sample %s: no array_row and array_col; its pixel size is not checked.", name)
        return
    if index is None or np.linalg.matrix_rank(index - index.mean(axis=0)) < 2:
        logger.hint("sample %s: its spots lie on no grid, or on one line; its pixel size is not checked.", name)
        return
    grid = kind or "st"  # a square one
    try:
        found = array_pixel_size(grid, index[:, 0], index[:, 1], centres, name) * float(pitch) / ARRAYS[grid][2]
    except ValueError as error:
        if kind is None:
            logger.hint("sample %s: its spots lie on no square grid; its pixel size is not checked.", name)
            return
        _unchecked(name, error, strict)
        return
    if abs(mpp / found - 1) > _TOLERANCE:
        _contradiction(
            f"Sample {name!r}: pixel sizes disagree: {mpp:.4g} um from the metadata (pixel_size_um_estimated), "
            f"{found:.4g} um from the pitch of the spots ({float(pitch):g} um).",
            strict,
        )


def _unchecked(name: str, error: ValueError, strict: bool) -> None:
    _contradiction(f"Sample {name!r}: the pixel size cannot be checked against the spots' pitch. {error}", strict)


def _contradiction(message: str, strict: bool) -> None:
    if strict:
        raise ValueError(f"{message} Correct what is wrong; `strict=False` goes on with the metadata's pixel size.")
    warn_user(f"{message} The metadata's pixel size is taken.")


def _bins(centres: np.ndarray) -> np.ndarray | None:
    """Return the grid indices (column, row) of bins on an exact square grid along the axes, or None."""
    from scipy.spatial import cKDTree

    if len(centres) < 3:
        return None
    pitch = float(np.median(cKDTree(centres).query(centres, k=2)[0][:, 1]))
    if pitch <= 0:
        return None
    # from one bin to the next, so that a small error of the pitch does not accumulate
    index = np.empty_like(centres)
    for axis in (0, 1):
        places, inverse = np.unique(np.round(centres[:, axis] / pitch, 1), return_inverse=True)
        steps = np.round(np.diff(places, prepend=places[:1]))
        index[:, axis] = np.cumsum(steps)[inverse]
    return index


def _size_px(name: str, metadata: Mapping[str, Any], levels: list[da.Array], strict: bool) -> tuple[int, int]:
    """Return width and height of the image at full resolution, (0, 0) if unknown."""
    stated = tuple(int(_number(metadata, f"fullres_px_{side}", name) or 0) for side in ("width", "height"))
    if not levels:
        return stated[0], stated[1]
    size = (int(levels[0].shape[2]), int(levels[0].shape[1]))
    if min(stated) > 0 and max(abs(a / b - 1) for a, b in zip(size, stated, strict=True)) > _TOLERANCE:
        _contradiction(
            f"Sample {name!r}: its image has {size[0]} x {size[1]} px, by the metadata {stated[0]} x {stated[1]} px at "
            "full resolution, to which the pixel size and the spots belong.",
            strict,
        )
    return size


def _patches(
    file: Path,
    name: str,
    barcodes: pd.Series,
    centres: np.ndarray,
    mpp: float,
    size_px: tuple[int, int],
    strict: bool,
) -> dict[str, Any]:
    patches = PatchFile(file)
    strange = pd.Index(patches.barcodes)[~pd.Index(patches.barcodes).isin(barcodes)]
    if len(strange):
        raise ValueError(
            f"Sample {name!r}: {len(strange)} of {patches.n} patches have a barcode that no spot has: "
            f"{examples(strange)}; spots have barcodes like {examples(barcodes, 1)}."
        )
    region = f"{name}_spots"
    rows = join_patches(patches, barcodes, region)
    side_px = patch_side_px(patches, rows, centres, region)
    check_patches(patches, rows, centres, side_px, region)
    if "pixel_size" in patches.attrs:
        patch_mpp = patches.attrs["pixel_size"]
        if abs(mpp / patch_mpp - 1) > _TOLERANCE:
            _contradiction(
                f"Sample {name!r}: pixel sizes disagree: {mpp:.4g} um from the metadata (pixel_size_um_estimated), "
                f"{patch_mpp:.4g} um from the patches.",
                strict,
            )
    logger.hint(
        "sample %s: %d of %d spots have a stored patch of %d px (%.4g um).",
        name, (rows >= 0).sum(), rows.size, patches.side, side_px * mpp,
    )  # fmt: skip
    return describe_patches(
        patches, image_name=f"{name}_he", coordinate_system=name, side_px=side_px, size_px=size_px
    )  # fmt: skip


def _common_genes(samples: list[_Sample]) -> pd.Index:
    first = samples[0]
    kept = first.genes[np.all([first.genes.isin(sample.genes) for sample in samples], axis=0)]
    if not len(kept):
        listed = "; ".join(f"{s.name} ({_known(s.metadata, 'species')}): {examples(s.genes)}" for s in samples[:4])
        raise ValueError(f"No gene is in all samples. Genes there: {listed}. Read samples of one kind together.")
    dropped = {sample.name: len(sample.genes) - len(kept) for sample in samples}
    if any(dropped.values()):
        listed = ", ".join(f"{n} of {name}" for name, n in dropped.items() if n)
        logger.hint("%d genes are in all samples; left out: %s.", len(kept), listed)
    return kept


def _patients(samples: list[_Sample], given: Mapping[str, str]) -> dict[str, str]:
    """Return the patient of each sample; names used by several studies are made unique with the study's title."""
    named = {s.name: (str(_known(s.metadata, "patient")), str(_known(s.metadata, "dataset_title"))) for s in samples}
    titles = defaultdict(set)
    for label, title in named.values():
        titles[label].add(title)
    patients, unknown = {}, []
    for sample in samples:
        label, title = named[sample.name]
        if sample.name in given:
            patients[sample.name] = str(given[sample.name])
        elif _known(sample.metadata, "patient") is None:
            patients[sample.name] = sample.name
            unknown.append(sample.name)
        else:
            patients[sample.name] = label if len(titles[label]) == 1 else f"{label} ({title})"
    if unknown:
        logger.warning(
            "The metadata of %s name no patient: each counts as a patient of its own. If some are of one patient, give "
            "`patient=`, or groups of patients will leak.", ", ".join(unknown),
        )  # fmt: skip
    return patients
