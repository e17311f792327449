"""Units of length."""

from __future__ import annotations

import pytest

from pekasc.io._lengths import is_no_length, um_per_unit

# OME schema 2016-06, UnitsLength
OME = {
    "Ym": 1e30, "Zm": 1e27, "Em": 1e24, "Pm": 1e21, "Tm": 1e18, "Gm": 1e15, "Mm": 1e12, "km": 1e9, "hm": 1e8,
    "dam": 1e7, "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "nm": 1e-3, "pm": 1e-6, "fm": 1e-9, "am": 1e-12,
    "zm": 1e-15, "ym": 1e-18, "Å": 1e-4, "ua": 1.495978707e17, "ly": 9.4607304725808e21, "pc": 3.0857e22, "thou": 25.4,
    "li": 2116.6667,
    "in": 25400, "ft": 304800, "yd": 914400, "mi": 1.609344e9, "pt": 352.7778,
}  # fmt: skip
IMAGEJ = {"micron": 1.0, "microns": 1.0, "um": 1.0, "\\u00B5m": 1.0, "μm": 1.0, "inch": 25400, "cm": 1e4, "Micron": 1.0}


@pytest.mark.parametrize(("unit", "um"), (OME | IMAGEJ).items())
def test_units_of_length_in_um(unit: str, um: float) -> None:
    assert um_per_unit(unit) == pytest.approx(um, rel=1e-4) and not is_no_length(unit)


@pytest.mark.parametrize("unit", ["pixel", "reference frame", ""])
def test_what_is_no_length(unit: str) -> None:
    assert um_per_unit(unit) is None and is_no_length(unit)


def test_what_is_not_known() -> None:
    assert um_per_unit("furlong") is None and not is_no_length("furlong")
