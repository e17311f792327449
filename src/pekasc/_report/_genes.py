"""The table of genes: values for the page's script, and the frame that it fills."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pekasc._report._facts import About
from pekasc._report._html import Markup, data, element, plain
from pekasc.models.trust import LEVELS, trust_levels


def gene_table(about: About, here: pd.DataFrame | None) -> Markup:
    """Return the searchable and sortable table of genes.

    Parameters
    ----------
    about
        The adapter.
    here
        Scores on the sections of the report, by gene: ``pearson`` and, of a calibrated adapter, ``coverage``.
    """
    scores = about.adapter.gene_scores
    one = about.noun[:-1]
    columns = [
        ("name", one.capitalize(), [plain(gene) for gene in scores.index]),
        ("level", "Trust", list(trust_levels(scores))),
        ("number", "Pearson r, held out", _numbers(scores["pearson"])),
    ]
    ranged = "lowest" in scores  # missing in adapters saved by an earlier version
    ends = ("lowest", "highest") if ranged else ()
    columns += [("number", name.capitalize(), _numbers(scores[name])) for name in ends]
    parts = [_numbers(scores[name]) for name in ("pearson", *ends)]
    spread = [list(row) if ranged else [row[0], None, None] for row in zip(*parts, strict=True)]
    columns.append(("range", "Range (-0.5 to 1)", spread))
    for name, label in (("n_sections", "Sections scored"), ("n_groups", "Groups learned from")):
        if name in scores:
            columns.append(("whole", label, [int(n) for n in scores[name]]))
    if here is not None:
        found = here.reindex(scores.index)
        columns.append(("number", "Pearson r, these sections", _numbers(found["pearson"])))
        if "coverage" in found:
            columns.append(("share", "In the interval, these sections", _numbers(found["coverage"])))
    value = {
        "columns": [{"kind": kind, "label": label} for kind, label, _ in columns],
        "rows": [list(row) for row in zip(*(values for _, _, values in columns), strict=True)],
        "levels": list(LEVELS),
        "sort": 2,
        "what": about.noun,
    }
    options = [element("option", "all", value="")] + [element("option", level, value=level) for level in LEVELS[::-1]]
    controls = element(
        "div",
        element(
            "label", f"Search {about.noun}", element("input", id="genes-search", type="search", autocomplete="off")
        ),
        element("label", "Trust", element("select", options, id="genes-level")),
        class_="controls",
    )
    caption = f"All {about.noun} with their scores on held-out sections of the training data. Click a heading to sort."
    made = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", id="genes-head")),
        element("tbody", id="genes-body"),
    )
    scroll = element("div", made, class_="scroll", tabindex=0, role="region", aria_label=f"Table of {about.noun}")
    status = element("p", id="genes-status", role="status")
    more = element("button", "Show more", id="genes-more", type="button", hidden=True)
    return element(
        "div",
        element("noscript", element("p", "The table needs JavaScript, which this page has in itself.")),
        element("div", controls, status, scroll, element("p", more), id="genes", hidden=True),
        data("genes-data", value),
    )


def _numbers(values: Any) -> list[float | None]:
    found = np.asarray(values, dtype=np.float64)
    return [round(float(value), 4) if np.isfinite(value) else None for value in found]
