"""`datasets.phantom_truth`: expected expression of a phantom at any point of its sections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pekasc._keys import read_uns
from pekasc.datasets._phantom import slide_params
from pekasc.datasets._phantom_counts import expected_shares, patient_effect, plant_genes, surroundings

if TYPE_CHECKING:
    from spatialdata import SpatialData


def phantom_truth(sdata: SpatialData, image_name: str, *, coords_um: np.ndarray) -> pd.DataFrame:
    """Get the expected expression of a :func:`phantom` at any points of a section, between its spots as well.

    Parameters
    ----------
    sdata
        What :func:`phantom` made; its record is in one of the tables.
    image_name
        Image of the section, such as ``"P1S1_he"``.
    coords_um
        Points (x, y) in um from the upper left corner of the slide, (n, 2), as :func:`pekasc.get.expression` gives them
        in ``obsm["spatial"]``.

    Returns
    -------
    log1p(1e4 * share) without noise, points x genes, float32: what ``layers["truth"]`` is at the spots. A point's
    expression depends on the tissue in the 112 um around it.

    Raises
    ------
    KeyError
        If the phantom has no such image.
    ValueError
        If no table has the record of a phantom, or the points are no (n, 2) finite numbers.

    Examples
    --------
    >>> import pekasc as pk
    >>> sdata = pk.datasets.phantom(n_patients=1, size_um=600, n_genes=8)
    >>> pk.datasets.phantom_truth(sdata, "P1S1_he", coords_um=[[300, 300], [325, 300]]).shape
    (2, 8)
    """
    arguments = _arguments(sdata)
    points = np.asarray(coords_um, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all():
        raise ValueError(f"`coords_um` must be (n, 2) finite numbers, x and y in um, got an array of {points.shape}.")
    names = [f"P{p + 1}S{s + 1}_he" for p in range(arguments["n_patients"]) for s in range(arguments["n_sections"])]
    if image_name not in names:
        raise KeyError(f"The phantom has no image {image_name!r}. Its images: {names}.")
    patient, section = (int(number) - 1 for number in re.findall(r"\d+", image_name))
    seed = arguments["random_state"]
    params = slide_params(
        patient, section, random_state=seed, **{name: arguments[name] for name in ("width_um", "height_um", "mpp")}
    )
    genes = plant_genes(arguments["n_genes"], np.random.default_rng([seed, 0]))
    effect = patient_effect(genes, np.random.default_rng([seed, 3, patient]))
    shares = expected_shares(genes, *surroundings(params, points), effect)
    return pd.DataFrame(np.log1p(1e4 * shares).astype(np.float32), columns=genes.var.index)


def _arguments(sdata: SpatialData) -> Mapping[str, Any]:
    for table in sdata.tables.values():
        record = read_uns(table, "phantom")
        if isinstance(record, Mapping):
            return record
    raise ValueError(
        f"No table of {list(sdata.tables)} has the record of a phantom (`uns['pekasc']['phantom']`): the truth is "
        "known for what `pekasc.datasets.phantom` made."
    )
