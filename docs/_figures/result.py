"""Run the code of docs/index.md and keep its picture: `python docs/_figures/result.py`, some minutes on a CPU.

Writes _static/result_light.png, result_dark.png and result.txt, the sentence below them. Synthetic tissue, seed 0, the
encoder that comes with the package.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image

import pekasc as pk

DOCS = Path(__file__).resolve().parents[1]
STATIC = DOCS / "_static"


def main() -> None:
    """Write the pictures and the sentence."""
    block = re.search(r"^```python\n(.*?)^```", (DOCS / "index.md").read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1], names)
    sdata, best = names["sdata"], names["best"]
    for theme, style, ground in (("light", "default", "white"), ("dark", "dark_background", "#121212")):
        with plt.style.context(style), plt.rc_context({"font.size": 10, "axes.facecolor": ground}):
            figure = pk.pl.expression(sdata, best, section="P3S1")
            path = STATIC / f"result_{theme}.png"
            figure.savefig(path, dpi=150, bbox_inches="tight", facecolor=ground)
        # a palette of 256 colours is a third of the bytes
        Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
    scores = sdata["table"].var["peka_pearson"]
    (STATIC / "result.txt").write_text(
        f"*Synthetic tissue of a patient that was not trained on. Of {scores.notna().sum()} genes, this one is "
        f"predicted best: Pearson {scores.max():.2f}; the median is {scores.median():.2f}. A quarter of the genes "
        "depends on nothing that an image shows.*\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
