"""Figures of `pekasc.pl` as PNG, whatever style and backend the caller has."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

_DPI = 150


def png(draw: Callable[[], Any]) -> bytes:
    """Return what a function of ``pekasc.pl`` draws as the content of a PNG file, and close the figure.

    Parameters
    ----------
    draw
        Returns a figure, or Axes of one.
    """
    known = set(plt.get_fignums())
    try:
        # white and in the default fonts, as the page around it expects
        with plt.style.context("default"):
            drawn = draw()
            shown = drawn if isinstance(drawn, Figure) else getattr(drawn, "flat", [drawn])[0].figure
            out = BytesIO()
            shown.savefig(out, format="png", dpi=_DPI, metadata={"Software": None})
    finally:
        for number in set(plt.get_fignums()) - known:  # of an error as well
            plt.close(number)
    return out.getvalue()
