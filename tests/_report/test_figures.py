from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from pekasc._report._figures import png


def _axes():
    return plt.subplots()[1]


@pytest.mark.parametrize("draw", [_axes, lambda: plt.figure(), lambda: np.array([_axes()], dtype=object)])
def test_figures_and_axes_become_pictures_and_are_closed(draw) -> None:
    from io import BytesIO

    with plt.style.context("dark_background"):  # of whoever asks for the report
        picture = Image.open(BytesIO(png(draw)))
    assert picture.format == "PNG" and picture.size == (960, 720)
    assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_figures_of_the_caller_stay_open_and_those_of_errors_do_not() -> None:
    own = plt.figure()

    def fails() -> None:
        plt.figure()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        png(fails)
    png(_axes)
    assert plt.get_fignums() == [own.number]
    plt.close(own)
