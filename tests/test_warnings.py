"""Warnings point to the user's own line."""

from __future__ import annotations

import inspect
import warnings

import pytest

import pekasc as pk
from pekasc._warnings import warn_user
from pekasc.tl._read import reading


def test_the_line_of_the_caller() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = inspect.currentframe().f_lineno + 1
        warn_user("what is said")
    (warning,) = caught
    assert (warning.filename, warning.lineno, str(warning.message)) == (__file__, line, "what is said")


@pytest.mark.parametrize("implicit", [True, False])
def test_the_line_above_all_of_the_package(implicit: bool) -> None:
    sdata = pk.datasets.phantom(n_patients=1, size_um=600, mpp=2.0, n_genes=8)
    spots = sdata["P1S1_spots"]
    spots.geometry = spots.translate(40, 0)  # some off the tissue
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if implicit:  # tiles that a call makes by itself, inside a block of `with`
            line = inspect.currentframe().f_lineno + 1
            with reading(sdata, table_name="table", key="tiles", layer=None, gene_key=None, groups=None):
                pass
        else:
            line = inspect.currentframe().f_lineno + 1
            pk.pp.tile(sdata)
    (warning,) = (w for w in caught if "tiles show no tissue" in str(w.message))
    assert (warning.filename, warning.lineno) == (__file__, line)
