"""`report`: one HTML file that says what an adapter is, how far to trust it, and what not to use it for."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from os import PathLike
from typing import TYPE_CHECKING

from pekasc import pl
from pekasc._keys import PEKA
from pekasc._paths import folder_path
from pekasc._report import _facts as say
from pekasc._report._facts import About
from pekasc._report._figures import png
from pekasc._report._genes import gene_table
from pekasc._report._html import Content, Markup, block, bullets, document, element, facts, figure, paragraphs
from pekasc._report._predicted import Predicted, chosen, maps, novelty, predicted, sections
from pekasc._settings import get_logger
from pekasc.models import Adapter
from pekasc.models.runtime import profile_text, write_whole

if TYPE_CHECKING:
    from spatialdata import SpatialData

logger = get_logger(__name__)

_PREDICT = """import pekasc as pk

adapter = pk.Adapter.load("adapter")  # the folder of this adapter
pk.tl.predict_expression(sdata, adapter)"""


def report(
    adapter: Adapter,
    path: str | PathLike[str],
    sdata: SpatialData | None = None,
    *,
    genes: Sequence[str] | None = None,
    groups: str | None = None,
    layer: str = PEKA,
    table_name: str = "table",
) -> None:
    """Write a report on an adapter: what it was trained on, how far to trust it, and what not to use it for.

    One HTML file, which opens offline and holds all it needs: use and limits, training data, licences, folds and what
    could have leaked, scores of all genes in a table to search and sort, calibration, novelty, versions and the call.
    With `sdata`, also its scores and coverage there, where something was measured, maps of a few genes with their
    intervals, and the novelty of its tiles.

    Parameters
    ----------
    adapter
        An adapter from :func:`pekasc.tl.fit_adapter`, best a calibrated one (:func:`pekasc.tl.calibrate`).
    path
        The HTML file to write. It must not exist; its folder is created.
    sdata
        Sections or a slide with predictions of this adapter, see :func:`pekasc.tl.predict_expression`. It is not
        changed.
    genes
        Genes to map; None is the three that were predicted best.
    groups
        Column of obs for scores and coverage on `sdata`; by default sections.
    layer
        The predictions in `sdata`.
    table_name
        Name of the table; where there is none of the default name, that of the tiles of a slide.

    Returns
    -------
    None. Writes the file.

    Raises
    ------
    FileExistsError
        If there is something at `path`.
    KeyError
        If `sdata` has no predictions, or lacks a gene, a column or the table.
    TypeError
        If `adapter` is no adapter, `path` no path, or `sdata` no SpatialData.
    ValueError
        If the predictions are of another adapter, or `genes`, `groups` or `layer` are given without `sdata`.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import pekasc as pk
    >>> from tempfile import mkdtemp
    >>> sdata = pk.datasets.phantom(n_patients=3, size_um=700)
    >>> pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    >>> adapter = pk.tl.calibrate(pk.tl.fit_adapter(sdata, method=None, progress=False))
    >>> pk.report(adapter, f"{mkdtemp()}/adapter.html")
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"`adapter` must be a pekasc.Adapter, got {type(adapter).__name__}.")
    file = folder_path("path", path, "file")
    if file.exists():
        raise FileExistsError(
            f"`path={str(file)!r}` exists, and a report replaces nothing: delete it, or give another name."
        )
    given = {"genes": genes, "groups": groups, "layer": None if layer == PEKA else layer}
    useless = [name for name, value in given.items() if value is not None]
    if sdata is None and useless:
        raise ValueError(f"`{useless[0]}=` does nothing without `sdata=`: give sections with predictions.")
    about = About(adapter)
    found = None
    if sdata is not None:
        found = predicted(adapter, sdata, layer=layer, table_name=table_name, groups=groups)
    wanted = None if genes is None else [genes] if isinstance(genes, str) else list(genes)
    page = _page(about, found, wanted)
    write_whole(file, lambda out: out.write(page.encode()), "The report")
    logger.hint("The report is in %s.", file)


def _page(about: About, found: Predicted | None, genes: Sequence[str] | None) -> str:
    title = f"Report on a model of {about.what}"
    header = [
        element("h1", title),
        element("p", "A model that predicts from H&E-stained tissue images, described by what it knows of itself."),
        element("p", f"Encoder {about.adapter.encoder.short}, {_method(about)}. Written by pekasc {version('pekasc')} "
                     f"on {datetime.now(UTC):%Y-%m-%d}."),
    ]  # fmt: skip
    parts: list[tuple[str, str, Content]] = [
        ("short", "In short", say.short(about)),
        ("use", "What it can and cannot be used for", _use(about)),
        ("training", "What it was trained on", say.training(about)),
        ("folds", "How it was tested", say.folds(about)),
        ("trust", f"Which {about.noun} to trust", _trust(about, found)),
        ("intervals", "How far off it may be", _intervals(about)),
        ("novelty", "Tissue unlike the training", _novelty(about, found)),
    ]
    if found is not None:
        shown = maps(about, found, chosen(about, found, genes))
        parts.append(("predicted", "Predictions on these sections", [sections(about, found), *shown]))
    parts += [("made", "How it was made", _made(about)), ("words", "Words", _words())]
    footer = element("p", f"pekasc {version('pekasc')}. This file is complete: it loads nothing, and works offline.")
    return document(title, parts, header, footer)


def _method(about: About) -> str:
    method = about.adapter.method
    return "used as released" if method == "frozen" else f"adapted by {method}"


def _use(about: About) -> list[Markup]:
    can = element("div", element("h3", "It can be used"), say.uses(about), class_="box")
    cannot = element("div", element("h3", "It must not be used for"), say.limits(about), class_="box warn")
    return [can, cannot]


def _trust(about: About, found: Predicted | None) -> list[Markup]:
    parts = [say.levels(about)]
    if about.scored:
        alt = f"The {about.noun} predicted best, with their correlations on held-out sections"
        text = f"The {about.noun} predicted best: mean over held-out sections, a line from the lowest to the highest."
        parts.append(figure(png(partial(pl.trust, about.adapter)), alt, text))
    return [*parts, gene_table(about, None if found is None else found.by_gene)]


def _intervals(about: About) -> list[Markup]:
    parts = [say.intervals(about)]
    if about.adapter.held_out is not None:
        alt = "Share of held-out measurements in intervals, against their nominal level, by group"
        text = (
            "Calibration curve: a group on the diagonal has as many measurements in its intervals as the noise alone "
            "says. Below it, intervals would be too narrow; calibration widens them."
        )
        parts.append(figure(png(partial(pl.calibration, about.adapter)), alt, text))
    return parts


def _novelty(about: About, found: Predicted | None) -> list[Markup]:
    parts, shown = [say.novelty(about)], None if found is None else novelty(found)
    return parts if shown is None else [*parts, shown]


def _made(about: About) -> list[Markup]:
    info = about.adapter.info
    call = info.get("call")
    parts: list[Markup] = [element("h3", "The call that trained it")]
    if call:
        parts.append(block(str(call), "The call that trained it"))
        parts.append(paragraphs("Options that are not written out have their defaults of that version."))
    else:
        parts.append(paragraphs("Not recorded: the adapter is of an earlier version."))
    parts += [element("h3", "To predict with it"), block(_PREDICT, "To predict with it")]
    members = info.get("members", {})
    if len(members) > 1:
        parts.append(element("h3", "What is averaged"))
        lines = [f"{part['weight']:.0%} {name}, alone {_score(part['pearson'])}" for name, part in members.items()]
        parts.append(bullets(lines))
    if not about.adapter.history.empty:
        alt = "Training losses, and error on held-out groups by epoch"
        text = "Training losses, and the error on held-out groups by which the number of epochs was chosen."
        parts.append(figure(png(partial(pl.history, about.adapter)), alt, text))
    parts += [element("h3", "Versions"), say.versions(about)]
    if "profile" in info:
        parts.append(paragraphs(f"The fit took: {profile_text(info['profile'])}."))
    return parts


def _score(value: float | None) -> str:
    return "without a score" if value is None or value != value else f"median Pearson r {value:.2f} on held-out tissue"


def _words() -> Markup:
    return facts(
        [
            ("Spot, tile", "A spot is where expression was measured; a tile is the square of the image around it."),
            ("Group", "What was held out as a whole, such as a patient."),
            (
                "Pearson r",
                "How well predicted and measured expression of a gene agree over the tiles of a section: 1 is perfect, "
                "0 is chance. It says nothing about the level of the values.",
            ),
            ("Held out", "Not seen by the model that is scored, nor by any choice made for it but the settings."),
            ("Interval", "From where to where a value is expected, with the stated probability."),
            ("Novelty", "A p-value: how often held-out training tiles are as unlike the training as this one."),
        ]
    )
