"""The model card of an adapter, from its record: what it was trained on, scores on held-out groups, limits."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub import ModelCardData

from pekasc._text import names, number
from pekasc.models.trust import LEVELS, trust_levels

if TYPE_CHECKING:
    from pekasc.models.adapter._adapter import Adapter

MARK = "<!-- This card was made by pekasc; without this line it is yours, and stays. -->"
_MOST = 20  # genes in the table, and groups by name
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>])")
_LICENCES = re.compile(r"(apache-2\.0|mit|bsd-\d-clause|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-\d\.\d|other)$", re.IGNORECASE)


def model_card(adapter: Adapter, name: str, licence: str) -> str:
    """Return the text of a model card in Markdown, with the hub's metadata before it.

    Names of genes, groups and so on are escaped: they are data, and never markup.

    Parameters
    ----------
    adapter
        The adapter.
    name
        Its repository, ``owner/name``.
    licence
        The licence that its user gives to it.
    """
    info, encoder = adapter.info, adapter.encoder
    licence_of: dict[str, Any] = {"license": licence.lower()}
    if not _LICENCES.match(licence):
        licence_of = {"license": "other", "license_name": licence}
    base = encoder.hub or (encoder.name.split(":", 1)[1] if encoder.name.startswith(("hf-hub:", "hf_hub:")) else None)
    data = ModelCardData(
        library_name="pekasc", base_model=base, tags=["pathology", "spatial-transcriptomics", "gene-expression"],
        **licence_of,
    )  # fmt: skip
    n, of = len(adapter.genes), adapter.target_key
    what = number(n, "gene") if of is None else f"{number(n, 'column')} of {_plain(of)}"
    groups = [_plain(group) for group in info["groups"]]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        MARK,
        f"# {_plain(name)}",
        f"Predicts {what} ({_plain(info['target'])}) from H&E, one value for each tile of "
        f"{adapter.spec.side_um:g} um ({adapter.spec.tile_px} px at {adapter.spec.mpp:g} um per pixel). It holds an "
        "adapter and an expression head, not the encoder's weights.",
        "```python\nimport pekasc as pk\n\n"
        f'adapter = pk.Adapter.load("hf-hub:{name}")\nprint(adapter)\n'
        "pk.tl.predict_expression(sdata, adapter)\npk.report(adapter, \"report.html\")\n```",
        "## What it was made with",
        "\n".join([
            f"- Encoder: {_plain(encoder.short)}, licence: {_plain(encoder.licence or 'not stated, see its source')}"
            + (f". {_plain(encoder.citation)}" if encoder.citation else ""),
            *([f"- Teacher: {_plain(info['teacher'])}, licence: {_plain(info.get('teacher_licence') or 'not stated')}"]
              if info.get("teacher") is not None else []),
            f"- Method: {_plain(adapter.method)}; head: {_plain(info['head'])}",
            f"- Trained on {number(int(info['n_spots']), 'spot')} of {number(len(groups), 'group')}: "
            f"{names(groups, _MOST)}",
            f"- Versions: {_plain(', '.join(f'{k} {v}' for k, v in info['versions'].items()))}",
        ]),
        "## How well it predicts",
        _scores(adapter),
        "## What it must not be used for",
        "\n".join([
            "- For a decision about a patient: it is a research tool.",
            "- To compare genes with one another within a tile: each was judged by itself, over tiles.",
            "- For tissue, stains, scanners or diseases that it was not trained on, without measured sections to check "
            "it. `obs[\"peka_novelty\"]` of a calibrated adapter says which tiles are unlike those of the training.",
            "- As a measurement: predicted maps are smoother than measured ones.",
        ]),
    ]  # fmt: skip
    return "\n\n".join(lines) + "\n"


def _scores(adapter: Adapter) -> str:
    """Return what held-out groups say, as a paragraph and a table of the best genes."""
    scores = adapter.gene_scores
    if scores["pearson"].isna().all():
        return "Unknown: no group was held out in its training. Evaluate it on measured sections first."
    levels = np.asarray(trust_levels(scores), dtype=object)
    counts = ", ".join(f"{int((levels == level).sum())} {level}" for level in reversed(LEVELS))
    text = (
        f"Trust by gene, from groups that were held out in training: {counts}. Median Pearson correlation within "
        f"held-out sections {scores['pearson'].median():.2f}; the settings were chosen on the same groups, so that "
        "scores in new patients are a little lower."
    )
    intervals = adapter.calibration.text if adapter.calibration is not None else "none"
    best = scores.assign(level=levels).sort_values("pearson", ascending=False, kind="stable").head(_MOST)
    spread = {"lowest", "highest"} <= set(scores)
    rows = [
        f"| {_plain(gene)} | {row['pearson']:.2f} | "
        + (f"{row['lowest']:.2f} to {row['highest']:.2f}" if spread else "")
        + f" | {row['level']} |"
        for gene, row in best.iterrows()
        if np.isfinite(row["pearson"])
    ]
    head = ["| gene | Pearson r, held out | lowest to highest section | trust |", "|---|---|---|---|"]
    return "\n\n".join([text, f"Intervals: {_plain(intervals)}.", "\n".join([*head, *rows])])


def _plain(text: Any) -> str:
    """Return a text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(r"\\\1", html.escape(" ".join(str(text).split()), quote=False))
