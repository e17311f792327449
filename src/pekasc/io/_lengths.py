"""Units of length, as OME metadata, ImageJ and TIFF write them."""

from __future__ import annotations

_PREFIXES = {
    "Y": 24, "Z": 21, "E": 18, "P": 15, "T": 12, "G": 9, "M": 6, "k": 3, "h": 2, "da": 1, "": 0, "d": -1, "c": -2,
    "m": -3, "µ": -6, "u": -6, "n": -9, "p": -12, "f": -15, "a": -18, "z": -21, "y": -24,
}  # fmt: skip
INCH_UM = 25400.0
_OTHERS = {
    "Å": 1e-4, "thou": INCH_UM / 1000, "mil": INCH_UM / 1000, "pt": INCH_UM / 72, "li": INCH_UM / 12, "in": INCH_UM,
    "ft": 12 * INCH_UM, "yd": 36 * INCH_UM, "mi": 63360 * INCH_UM, "ua": 1.495978707e17, "ly": 9.4607304725808e21,
    "pc": 3.0856775814913673e22,
}  # fmt: skip
_WORDS = {
    "micron": "µm", "microns": "µm", "micrometer": "µm", "micrometre": "µm", "micrometers": "µm", "micrometres": "µm",
    "nanometer": "nm", "nanometre": "nm", "nanometers": "nm", "nanometres": "nm", "angstrom": "Å", "millimeter": "mm",
    "millimetre": "mm", "millimeters": "mm", "millimetres": "mm", "centimeter": "cm", "centimetre": "cm",
    "centimeters": "cm", "centimetres": "cm", "meter": "m", "metre": "m", "meters": "m", "metres": "m", "inch": "in",
    "inches": "in", '"': "in", "foot": "ft", "feet": "ft", "point": "pt", "points": "pt",
}  # fmt: skip
_NO_LENGTHS = {"", "pixel", "pixels", "px", "reference frame", "referenceframe", "none", "null"}
_UM = {f"{prefix}m": 10.0 ** (power + 6) for prefix, power in _PREFIXES.items()} | _OTHERS


def um_per_unit(unit: str) -> float | None:
    """Return the length of a unit in um; None if it is not known, or no length.

    Case counts in symbols ("mm" and "Mm"), not in words.
    """
    # escaped as ImageJ does; the sign of micro and the Greek letter, the sign of angstrom and the letter
    text = unit.strip().replace("\\u00B5", "µ").replace("\\u00b5", "µ").replace("μ", "µ").replace("\u212b", "Å")
    if text in _UM:
        return _UM[text]
    known = _WORDS.get(text.lower())
    return None if known is None else _UM[known]


def is_no_length(unit: str) -> bool:
    """Tell whether a unit is one that is written where there is no length: pixels, or a frame of reference."""
    return unit.strip().lower() in _NO_LENGTHS
