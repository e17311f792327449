"""Draw the figures of the concepts: `python docs/_figures/draw.py` writes the SVG files beside this script.

The pages include them as part of the HTML, so that colours are those of docs/_static/pekasc.css, light or dark. Figures
are 540 wide and their letters 14 high, so that they can be read on a phone.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np
from scipy import stats

HERE = Path(__file__).parent
WIDTH = 540


def text(x: float, y: float, *lines: str, css: str = "", anchor: str = "middle", leading: float = 17) -> str:
    """Return lines of text; those that begin with a backtick are code."""
    parts = []
    for i, line in enumerate(lines):
        style = f"{css} pk-code" if line.startswith("`") else css
        parts.append(
            f'<text x="{x:g}" y="{y + i * leading:g}" text-anchor="{anchor}" class="{style.strip()}">'
            f"{escape(line.removeprefix('`'), quote=False)}</text>"
        )
    return "\n".join(parts)


def box(x: float, y: float, w: float, h: float, *lines: str, css: str = "pk-plain", small: str = "") -> str:
    """Return a box with lines in its middle, the last of them small."""
    n = len(lines) + bool(small)
    top = y + h / 2 - (n - 1) * 8.5 + 5
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" class="{css}"/>']
    parts.append(text(x + w / 2, top, *lines))
    if small:
        parts.append(text(x + w / 2, top + len(lines) * 17, small, css="pk-muted"))
    return "\n".join(parts)


def arrow(*points: tuple[float, float], css: str = "pk-line") -> str:
    """Return a line through points with a head at its end."""
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="{path}" class="{css}" marker-end="url(#pk-head)"/>'


def line(*points: tuple[float, float], css: str = "pk-line") -> str:
    """Return a line through points."""
    return f'<path d="M{"L".join(f"{x:g} {y:g}" for x, y in points)}" class="{css}"/>'


def spots(cx: float, cy: float, css: list[str], radius: float = 5.2, pitch: float = 15) -> str:
    """Return a hexagon of 19 spots, like those of a section; `css` is taken in turn."""
    parts = []
    for row, n in enumerate((3, 4, 5, 4, 3)):
        for i in range(n):
            x, y = cx + (i - (n - 1) / 2) * pitch, cy + (row - 2) * pitch * 0.87
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css[len(parts) % len(css)]}"/>')
    return "\n".join(parts)


def tissue(cx: float, cy: float) -> str:
    """Return the outline of a section around 19 spots."""
    return f'<ellipse cx="{cx:g}" cy="{cy:g}" rx="52" ry="43" class="pk-tissue"/>'


def write(name: str, height: int, title: str, *parts: str) -> None:
    """Write one figure; `title` is what a screen reader says."""
    head = (
        f'<svg class="pk-figure" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg">\n'
        '<defs><marker id="pk-head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" class="pk-head"/></marker></defs>\n'
    )
    (HERE / f"{name}.svg").write_text(head + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


def data_model() -> None:
    """Draw what a section is made of, and what is written beside it."""
    left, right, w = 8, 292, 240
    rows = {"image": 44, "shapes": 158, "table": 272}
    write(
        "data_model",
        446,
        "A section is an image, shapes and rows of a table. The image and the shapes share a coordinate system; the "
        "table and the shapes share region and instance id. pekasc writes squares of tiles beside the shapes, and "
        "columns, layers and embeddings into the table; pixels are not copied.",
        text(left + w / 2, 24, "a section, as you have it", css="pk-title"),
        text(right + w / 2, 24, "what pekasc writes", css="pk-title"),
        box(left, rows["image"], w, 70, '`images["C2_he"]', css="pk-he", small="H&E, with its pyramid"),
        box(right, rows["image"], w, 70, "nothing", css="pk-empty", small="pixels stay where they are"),
        box(left, rows["shapes"], w, 70, '`shapes["C2_spots"]', css="pk-plain", small="spots, bins or cells"),
        box(right, rows["shapes"], w, 70, '`shapes["C2_spots_tiles"]', css="pk-ours", small="squares in um"),
        box(left, rows["table"], w, 160, '`tables["table"]', '`.X', css="pk-ex", small="counts; one row per spot"),
        box(
            right, rows["table"], w, 160, '`obs["tile_inside"]', '`layers["peka"]', '`obsm["X_peka"]',
            '`obs["peka_train"]', '`var["peka_pearson"]', '`uns["pekasc"]', css="pk-ours",
        ),
        line((left + 60, 114), (left + 60, 158)),
        text(left + 70, 141, "one coordinate system", css="pk-muted", anchor="start"),
        line((left + 60, 228), (left + 60, 272)),
        text(left + 70, 255, "region and instance id", css="pk-muted", anchor="start"),
        *(arrow((left + w, y), (right, y)) for y in (193, 352)),
    )  # fmt: skip


def tile() -> None:
    """Draw what a tile is: a square in micrometers, whatever the image's own pixels."""
    parts = [
        text(92, 22, "around a spot", css="pk-title"),
        text(290, 22, "whatever the scan", css="pk-title"),
        text(470, 22, "at the edge", css="pk-title"),
        '<rect x="16" y="40" width="152" height="152" rx="6" class="pk-he"/>',
        '<rect x="43" y="67" width="98" height="98" class="pk-tile"/>',
        '<circle cx="92" cy="116" r="24" class="pk-spot"/>',
        text(92, 121, "55 um", css="pk-muted"),
        line((43, 180), (141, 180), css="pk-measure"),
        text(92, 212, "112 um", "224 px of 0.5 um"),
    ]
    for y, mpp, how in (
        (40, "0.25 um/px", "averaged"),
        (104, "0.5 um/px", "as it is"),
        (168, "0.9 um/px", "interpolated"),
    ):
        parts += [
            box(202, y, 88, 48, mpp, css="pk-he"),
            arrow((290, y + 24), (336, 128)),
            text(246, y + 61, how, css="pk-muted"),
        ]
    parts += [
        '<rect x="338" y="104" width="48" height="48" class="pk-tile"/>',
        text(362, 170, "224 px", css="pk-muted"),
        '<rect x="424" y="40" width="100" height="152" rx="6" class="pk-empty"/>',
        '<path d="M430 40H490V192H430A6 6 0 0 1 424 186V46A6 6 0 0 1 430 40z" class="pk-he"/>',
        '<rect x="438" y="80" width="74" height="74" class="pk-tile"/>',
        '<circle cx="475" cy="117" r="15" class="pk-spot"/>',
        text(474, 212, "white outside", css="pk-muted"),
        text(470, 229, "`tile_inside = 0.7"),
    ]
    write(
        "tile",
        242,
        "A tile is a square of 112 um around a spot of 55 um: 224 pixels of 0.5 um. A finer image is averaged down, a "
        "coarser one is interpolated. Outside of the image a tile is white, and tile_inside is the fraction inside.",
        *parts,
    )


def folds() -> None:
    """Draw random spots, held-out patients, and the folds inside the training patients."""
    train, test = "pk-train", "pk-test"
    columns = (80, 215, 350)
    parts = [text(8, 22, "random spots", css="pk-title", anchor="start")]
    for i, cx in enumerate(columns):
        mixed = [train, train, test, train, test, train, train][i:] + [train]
        parts += [tissue(cx, 82), spots(cx, 82, mixed)]
    parts += [
        text(420, 68, "neighbours on", "both sides:", "the score is", "too good", anchor="start", css="pk-warn-text"),
        text(8, 162, "patients held out", css="pk-title", anchor="start"),
    ]
    for cx, css in zip(columns, (train, train, test), strict=True):
        parts += [tissue(cx, 222), spots(cx, 222, [css])]
    parts += [
        *(
            text(cx, 285, name, css="pk-muted")
            for cx, name in zip(columns, ("patient 1", "patient 2", "patient 3"), strict=True)
        ),
        text(420, 208, "what you can", "expect of a", "new patient", anchor="start"),
        line((24, 300), (24, 308), (271, 308), (271, 300)),
        arrow((148, 308), (148, 334)),
        box(8, 336, 300, 64, "one of these held out, in turn:", "depth, epochs, penalty, radius", css="pk-plain"),
        arrow((308, 368), (350, 368), (350, 296)),
        text(362, 352, "fit once on all", "training patients,", "then score", anchor="start", css="pk-muted"),
        '<circle cx="18" cy="424" r="6" class="pk-train"/>',
        text(30, 429, "trained on", anchor="start", css="pk-muted"),
        '<circle cx="128" cy="424" r="6" class="pk-test"/>',
        text(140, 429, "scored", anchor="start", css="pk-muted"),
    ]
    write(
        "folds",
        440,
        "With random spots, training and test spots are neighbours in every section and the score is too good. With "
        "patients held out, whole patients are on one side. Settings are chosen by holding out one training patient in "
        "turn; then one fit on all training patients is scored on the others.",
        *parts,
    )


def training() -> None:
    """Draw how an adapter is trained."""
    write(
        "training",
        400,
        "A tile goes through the frozen blocks of the encoder, whose activations are computed once, then through the "
        "last four blocks with the adapter, and a projector. A spot's counts go through the teacher to an embedding, "
        "whose k-means clusters a cluster head has learned. The frozen cluster head judges both embeddings: knowledge "
        "distillation and structure alignment train adapter and projector.",
        text(8, 22, "image", css="pk-title", anchor="start"),
        '<rect x="8" y="48" width="62" height="62" class="pk-he"/>',
        text(39, 84, "tile"),
        arrow((70, 79), (92, 79)),
        box(94, 40, 128, 78, "first blocks", css="pk-plain", small="frozen, run once"),
        arrow((222, 79), (244, 79)),
        box(246, 40, 128, 78, "last 4 blocks", "+ adapter", css="pk-ours", small="trained"),
        arrow((374, 79), (396, 79)),
        box(398, 40, 134, 78, "projector", css="pk-ours", small="trained"),
        arrow((465, 118), (465, 156)),
        text(8, 182, "expression", css="pk-title", anchor="start"),
        '<rect x="8" y="200" width="62" height="62" class="pk-ex"/>',
        text(39, 236, "spot"),
        arrow((70, 231), (92, 231)),
        box(94, 192, 128, 78, "teacher", css="pk-te", small="PCA, scVI, ..."),
        arrow((222, 231), (244, 231)),
        box(246, 192, 128, 78, "embedding,", "k-means clusters", css="pk-te"),
        arrow((374, 231), (396, 231)),
        box(398, 158, 134, 112, "cluster head", css="pk-te", small="learned, then frozen"),
        arrow((465, 270), (465, 306)),
        box(246, 308, 286, 78, "distillation + structure alignment", css="pk-warn", small="the loss of the adapter"),
        arrow((246, 347), (160, 347)),
        text(8, 335, "adapted encoder,", "a plain timm model", "after merge()", anchor="start"),
    )  # fmt: skip


def readout() -> None:
    """Draw how features become genes."""
    bars = [
        f'<rect x="{172 + i * 17}" y="{84 - h}" width="12" height="{h}" rx="2" class="pk-bar"/>'
        for i, h in enumerate((12, 20, 34, 44, 40, 26))
    ]
    write(
        "readout",
        372,
        "The frozen encoder is read at all depths, each with a head, and the heads are averaged with weights from "
        "their held-out error. The adapted encoder is read at its depth by a ridge and a low-rank head. Frozen heads "
        "have half of the weight, the two adapted heads a quarter each. The mean features of neighbours and a wider "
        "field of view are read beside the tile.",
        '<rect x="8" y="20" width="62" height="62" class="pk-empty"/>',
        '<rect x="31" y="43" width="16" height="16" class="pk-he"/>',
        text(39, 100, "wider field", css="pk-muted"),
        arrow((70, 51), (124, 51)),
        '<rect x="8" y="126" width="62" height="62" class="pk-he"/>',
        text(39, 162, "tile"),
        '<circle cx="39" cy="246" r="31" class="pk-empty"/>',
        spots(39, 246, ["pk-spot"], radius=3.6, pitch=12),
        text(39, 296, "neighbours", css="pk-muted"),
        line((70, 157), (92, 157)),
        line((70, 246), (92, 246)),
        line((92, 110), (92, 263)),
        arrow((92, 110), (124, 110)),
        arrow((92, 263), (124, 263)),
        box(126, 24, 190, 112, css="pk-plain"),
        *bars,
        text(221, 108, "frozen, all depths"),
        text(221, 126, "bars: weights by held-out error", css="pk-tiny"),
        box(126, 222, 190, 82, "adapted, one depth", css="pk-ours", small="the trained blocks"),
        arrow((316, 80), (346, 80)),
        arrow((316, 246), (346, 214)),
        arrow((316, 280), (346, 312)),
        box(348, 54, 96, 52, "low-rank", css="pk-plain"),
        box(348, 186, 96, 52, "ridge", css="pk-plain"),
        box(348, 286, 96, 52, "low-rank", css="pk-plain"),
        arrow((444, 80), (488, 80), (488, 152)),
        arrow((444, 212), (456, 196)),
        arrow((444, 312), (488, 312), (488, 196)),
        box(446, 154, 86, 40, "genes", css="pk-ex"),
        text(458, 72, "1/2", anchor="start", css="pk-muted"),
        text(458, 304, "1/4", anchor="start", css="pk-muted"),
        text(462, 219, "1/4", anchor="start", css="pk-muted"),
    )  # fmt: skip


def trust() -> None:
    """Draw a prediction, the interval of its rate, and intervals of measurements at two depths, to scale."""
    rate, dispersion = 40, 0.12  # counts per 10,000; the gene's own
    left, right, top = 196, 526, 5.6

    def at(value: float) -> float:
        return left + (right - left) * value / top

    def interval(y: float, low: float, high: float) -> str:
        caps = [line((at(value), y - 6), (at(value), y + 6), css="pk-tile") for value in (low, high)]
        return "\n".join([line((at(low), y), (at(high), y), css="pk-tile"), *caps])

    def counted(y: float, total: int) -> list[str]:
        mean, size = rate * total / 1e4, 1 / dispersion
        counts = stats.nbinom(size, size / (size + mean))
        kept = np.arange(int(counts.ppf(0.999)) + 1)
        values, heights = np.log1p(1e4 * kept / total), counts.pmf(kept)
        wide = 5 if total < 1000 else 1.2
        bars = [
            f'<rect x="{at(v) - wide / 2:.1f}" y="{y - 8 - 44 * h:.1f}" width="{wide}" height="{44 * h:.1f}" '
            'class="pk-bar"/>'
            for v, h in zip(values, heights / heights.max(), strict=True)
            if h > 0.01
        ]
        return [*bars, interval(y, *np.log1p(1e4 * counts.ppf([0.05, 0.95]) / total))]

    rates = stats.gamma(1 / dispersion, scale=dispersion * rate)
    x = np.linspace(np.log1p(rates.ppf(0.0005)), np.log1p(rates.ppf(0.9995)), 60)
    density = rates.pdf(np.expm1(x)) * np.exp(x)  # on the logarithmic axis
    curve = " ".join(f"{at(a):.1f} {132 - 44 * b:.1f}" for a, b in zip(x, density / density.max(), strict=True))
    middle = at(np.log1p(rate))
    rows = (140, 236, 332)
    write(
        "trust",
        398,
        "On an axis of log counts per 10,000: a prediction is one point. The interval of its rate says how far off "
        "predictions of held-out patients were. Counting adds to it: the interval of a measurement is a little wider "
        "at 10,000 counts a spot, and reaches down to 0 at 650.",
        line((middle, 40), (middle, 352), css="pk-empty"),
        text(8, 36, "prediction", css="pk-title", anchor="start"),
        f'<circle cx="{middle:.1f}" cy="31" r="7" class="pk-test"/>',
        arrow((18, 46), (18, 104)),
        text(30, 71, "how far off held-out", "patients were", css="pk-muted", anchor="start"),
        text(8, 122, "interval of the rate", css="pk-title", anchor="start"),
        text(8, 140, "a slide nobody sequenced", css="pk-muted", anchor="start"),
        f'<polygon points="{curve}" class="pk-te"/>',
        interval(rows[0], *np.log1p(rates.ppf([0.05, 0.95]))),
        arrow((18, 150), (18, 200)),
        text(30, 179, "+ counting", css="pk-muted", anchor="start"),
        text(8, 218, "of a measurement", css="pk-title", anchor="start"),
        text(8, 236, "10,000 counts a spot", css="pk-muted", anchor="start"),
        *counted(rows[1], 10_000),
        text(8, 314, "of a measurement", css="pk-title", anchor="start"),
        text(8, 332, "650 counts a spot", css="pk-muted", anchor="start"),
        *counted(rows[2], 650),
        arrow((left - 6, 354), (right + 8, 354)),
        *(line((at(v), 350), (at(v), 358)) for v in range(6)),
        *(text(at(v), 373, str(v), css="pk-muted") for v in range(6)),
        text((left + right) / 2, 391, "log1p(counts per 10,000)", css="pk-muted"),
    )  # fmt: skip


if __name__ == "__main__":
    for draw in (data_model, tile, folds, training, readout, trust):
        draw()
