"""All keys that pekasc writes, and the rules for names."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pekasc._digests import sha256

UNS = "pekasc"
TILES = "tiles"
TILE_INSIDE = "tile_inside"
IMAGE_MPP = "image_mpp"
IMAGE_MPP_SOURCE = "image_mpp_source"
OBJECTIVE_POWER = "objective_power"
GRID = "grid"
IMAGE_SIZE = "image_size"
IMAGE_SYSTEM = "image_system"
FOLD = "fold"
PEKA = "peka"
ADAPTER = "adapter"
SECTION = "section"
PATIENT = "patient"
BARCODE = "barcode"
PATCHES = "patches"
# endings that say what a file is, the longer ones first
SLIDE_ENDINGS = (
    ".ome.tiff", ".ome.tif", ".ome.btf", ".ome.tf2", ".ome.tf8", ".qptiff", ".svslide", ".dicom", ".tiff", ".tif",
    ".btf", ".tf2", ".tf8", ".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms", ".vmu", ".czi", ".dcm", ".jpeg", ".jpg",
    ".png",
)  # fmt: skip
_DIGEST = 8  # characters

_JSON = "json:"


def check_key(key: str, *, argument: str = "key_added") -> str:
    """Return `key` if SpatialData can store an element of that name, else raise.

    Raises
    ------
    TypeError
        If `key` is no string.
    ValueError
        If `key` is empty or holds anything but letters, digits, ``_``, ``.`` and ``-``.
    """
    if not isinstance(key, str):
        raise TypeError(f"`{argument}` must be a string, got {type(key).__name__}: {key!r}.")
    # SpatialData's rule, which takes letters of any script
    valid = key != "" and all(c.isalnum() or c in "_.-" for c in key)
    if not valid or key in {".", ".."} or key.startswith("__"):
        raise ValueError(
            f"`{argument}={key!r}` cannot be stored: only letters, digits, '_', '.' and '-' are allowed, "
            "and names must not start with '__'."
        )
    return key


def short_name(name: str) -> str:
    """Return the last part of a hub name or path with all but letters, digits, ``_``, ``.``, ``-`` replaced.

    Examples
    --------
    >>> short_name("hf-hub:MahmoodLab/UNI2-h")
    'UNI2-h'
    """
    last = PurePosixPath(name.rsplit(":", 1)[-1].replace("\\", "/")).name
    return re.sub(r"[^A-Za-z0-9_.\-]+", "_", last).strip("._") or "encoder"


def slide_stem(file_name: str) -> str:
    """Return the name of a slide's file without the ending that says what it is: ``a.1`` of ``a.1.ome.tif``."""
    ending = next((ending for ending in SLIDE_ENDINGS if file_name.lower().endswith(ending)), "")
    return file_name[: len(file_name) - len(ending)]


def element_name(text: str) -> str:
    """Return a text as the name of an element; with a digest of it where characters were replaced.

    So two texts have two names.

    Examples
    --------
    >>> element_name("S1.2"), element_name("S1 (2)")
    ('S1.2', 'S1_2_05194c67')
    """
    try:
        if not check_key(text).startswith("."):  # which spatialdata leaves out when it reads
            return text
    except ValueError:
        pass
    kept = "".join(c if c.isalnum() or c in "_.-" else " " for c in unicodedata.normalize("NFC", text))
    digest = sha256(text.encode(errors="surrogateescape"))[:_DIGEST]
    return "_".join([*kept.split(), digest]).lstrip("._")


def feature_key(name: str) -> str:
    """Return the `obsm` key of an encoder's, teacher's or adapter's features."""
    return check_key(f"X_{short_name(name)}")


def target_key(key_added: str, key: str) -> str:
    """Return the `obsm` key of predictions of a target that is no gene, the columns of ``obsm[key]``."""
    return check_key(f"X_{key_added}_{key}")


def tile_shapes_name(region: str, key: str = TILES) -> str:
    """Return the name of the shapes element with the tiles of `region`."""
    return check_key(f"{region}_{key}")


def score_key(layer: str, metric: str) -> str:
    """Return the `var` column of `metric` for `layer`."""
    return check_key(f"{layer}_{metric}")


def total_key(key: str) -> str:
    """Return the `obs` column with the totals that were measured where `key` was predicted."""
    return f"{key}_total"


def total_check_key(key: str) -> str:
    """Return the `obsm` key of some counts of every row, by which totals are known to be of the counts at hand."""
    return f"{key}_total_check"


def _encode(value: Any) -> Any:
    # AnnData writes scalars, strings, homogeneous arrays, DataFrames and dicts of those with string keys. Lists of
    # dicts, None in lists, tuples, paths and integer keys are changed or rejected, so they are stored as JSON.
    if isinstance(value, Mapping) and value and all(isinstance(k, str) and "/" not in k for k in value):
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, str | bool | int | float | np.bool_ | np.integer | np.floating | pd.DataFrame):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.size:
        return value
    return packed(value)


def packed(value: Any) -> str:
    """Return a value as one JSON string, which :func:`read_uns` decodes; what it holds is a file each otherwise."""
    return _JSON + json.dumps(value, default=_json_default)


def _json_default(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | set | frozenset):
        return list(value)
    return str(value)


def _decode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _decode(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str) and value.startswith(_JSON):
        return json.loads(value[len(_JSON) :])
    return value


def bound_keys(key: str) -> tuple[str, str]:
    """Return the names of the lower and upper ends of the intervals around predictions."""
    return f"{key}_lower", f"{key}_upper"


def kriging_sd_key(key: str) -> str:
    """Return the name of the layer with the uncertainty of what measured spots pull predictions by."""
    return f"{key}_kriging_sd"


def novelty_key(key: str) -> str:
    """Return the column of obs with the novelty of every row."""
    return f"{key}_novelty"


def trust_key(key: str) -> str:
    """Return the column of var that says how far a gene's predictions can be trusted."""
    return f"{key}_trust"


def write_uns(adata: AnnData, key: str, value: Mapping[str, Any], *, kind: str | None = None) -> None:
    """Store `value` under ``uns["pekasc"][key]`` in a form that AnnData writes and reads back unchanged.

    `kind` is the kind of the record, for :func:`check_free`.
    """
    record = dict(value) if kind is None else {**value, "kind": kind}
    # a new dict, so that an AnnData that shares the old one (a shallow copy) keeps its state
    adata.uns[UNS] = {**records(adata), check_key(key): _encode(record)}


def check_free(adata: AnnData, key: str, kind: str, *, slot: str | None = None) -> None:
    """Check, before any work, that writing `key` would overwrite nothing but an earlier result of the same kind.

    Parameters
    ----------
    adata
        The table.
    key
        Key in ``uns["pekasc"]``, and in `slot`.
    kind
        What will be written: ``"tiles"``, ``"features"``, ``"prediction"``, ``"adapter"``, ``"split"``.
    slot
        ``"layers"``, ``"obsm"`` or ``"obs"``, if something is written there too.

    Raises
    ------
    ValueError
        If something else is there.
    """
    record = read_uns(adata, key)
    found = record.get("kind") if isinstance(record, Mapping) else None
    if record is not None and found != kind:
        what = found if isinstance(found, str) and found else "something else"
        raise ValueError(
            f'`key_added`: `uns["pekasc"][{key!r}]` holds {what}, which a {kind} must not replace. Take another key.'
        )
    if slot is not None and record is None and key in getattr(adata, slot):
        raise ValueError(
            f"`key_added`: `{slot}[{key!r}]` is there and was not made by this call, so it is not replaced. "
            "Take another `key_added=`, or delete it."
        )


def records(adata: AnnData) -> Mapping[str, Any]:
    """Return ``uns["pekasc"]``, as it is stored; empty if there is none.

    Raises
    ------
    ValueError
        If it is no dict.
    """
    found = adata.uns.get(UNS, {})
    if not isinstance(found, Mapping):
        raise ValueError(
            f"`table.uns[{UNS!r}]` must be a dict, in which pekasc keeps its records, but is {type(found).__name__}. "
            f"Delete it: `del table.uns[{UNS!r}]`."
        )
    return found


def read_uns(adata: AnnData, key: str) -> Any:
    """Return what :func:`write_uns` stored under `key`, a dict if nobody has changed it since, or None.

    Raises
    ------
    ValueError
        If ``uns["pekasc"]`` is no dict, or JSON in it is damaged.
    """
    value = records(adata).get(key)
    try:
        return None if value is None else _decode(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`table.uns[{UNS!r}][{key!r}]` is damaged: {error}. Delete it: `del table.uns[{UNS!r}][{key!r}]`."
        ) from error
