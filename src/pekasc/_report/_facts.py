"""What an adapter says of itself in plain words: use, limits, training, folds and leakage, intervals, versions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pekasc._report._html import Content, Markup, bullets, code, element, facts, paragraphs, table
from pekasc._text import names, number
from pekasc.models.trust import COUNTS, EDGES, FEW_GROUPS, LEVELS, RULES, percent, trust_levels

if TYPE_CHECKING:
    from pekasc.models import Adapter

_BEST = 8
_UNKNOWN = "not stated: see where its weights come from"
_LEVEL = 0.9  # shown without a calibration


@dataclass(frozen=True, eq=False)
class About:
    """An adapter, and what is derived from it for several parts of the page."""

    adapter: Adapter

    @property
    def noun(self) -> str:
        """What is predicted: genes, or columns."""
        return "genes" if self.adapter.target_key is None else "columns"

    @property
    def what(self) -> str:
        """What is predicted, with its number."""
        n, key = len(self.adapter.genes), self.adapter.target_key
        return f"the expression of {number(n, 'gene')}" if key is None else f"{number(n, 'column')} of {key!r}"

    @property
    def by_level(self) -> dict[str, list[str]]:
        """Genes of every trust level, the best first."""
        scores = self.adapter.gene_scores
        scores = scores.assign(level=np.asarray(trust_levels(scores), dtype=object))
        ranked = scores.sort_values("pearson", ascending=False, kind="stable")
        return {level: [str(gene) for gene in ranked.index[ranked["level"] == level]] for level in reversed(LEVELS)}

    @property
    def scored(self) -> bool:
        """Whether any gene was scored on something held out."""
        return bool(self.adapter.gene_scores["pearson"].notna().any())

    @property
    def groups(self) -> list[str]:
        """Names of the training groups."""
        return [str(group) for group in self.adapter.info["groups"]]

    @property
    def sections(self) -> list[str]:
        """Names of the training sections; empty for adapters of earlier versions."""
        return [str(section) for section in self.adapter.info.get("sections", ())]

    @property
    def groups_are_sections(self) -> bool:
        """Whether every section is a group of its own."""
        return set(self.groups) == set(self.sections)

    @property
    def tile(self) -> str:
        """Size of a tile."""
        spec = self.adapter.spec
        return f"{spec.side_um:g} x {spec.side_um:g} um ({spec.tile_px} px at {spec.mpp:g} um per pixel)"


def short(about: About) -> Markup:
    """Return what a reader must know if they read nothing else."""
    levels = about.by_level
    counts = {level: len(found) for level, found in levels.items()}
    lines: list[Content] = [
        f"It predicts {about.what} from H&E-stained tissue, one value for each tile of {about.tile}.",
        f"It learned from {number(int(about.adapter.info['n_spots']), 'measured spot')} of "
        f"{number(len(about.groups), 'group')}: {names(about.groups)}.",
    ]
    if about.scored:
        lines.append(
            f"On tissue held out in training, {counts['high']} of {len(about.adapter.genes)} {about.noun} can be "
            f"trusted highly, {counts['medium']} somewhat, {counts['low']} hardly or not at all."
        )
        best = [*levels["high"], *levels["medium"]][:_BEST]
        if best:
            lines.append(f"Predicted best: {names(best)}.")
    else:
        lines.append("How well it predicts is unknown: nothing was held out in its training.")
    if about.adapter.calibration is not None:
        made = about.adapter.calibration
        kind = "exact" if made.guarantee == "exact" else "approximate"
        lines.append(
            f"Its predictions have {percent(made.level)} intervals, {kind} ones from "
            f"{number(len(made.groups), 'group')}: {made.source}."
        )
    else:
        lines.append("It has no intervals around its predictions yet.")
    return bullets(lines)


def uses(about: About) -> Markup:
    """Return what the model can be used for."""
    counts = {level: len(found) for level, found in about.by_level.items()}
    lines: list[Content] = []
    if counts["high"]:
        lines.append(
            f"To see where in a section each of the {counts['high']} {about.noun} of high trust is higher and where "
            "lower, in tissue like that of the training."
        )
        lines.append(
            "To find regions that differ in these, to cluster tiles by them, and to choose regions or sections for an "
            "experiment."
        )
    if counts["medium"]:
        lines.append(
            f"As a hint, to be checked by a measurement: the {counts['medium']} {about.noun} of medium trust, averaged "
            "over regions rather than tile by tile."
        )
    if not about.scored:
        lines.append("For nothing yet: evaluate it first on sections that were measured (pekasc.tl.evaluate).")
    elif not lines:
        lines.append(f"For nothing that this report could support: no {about.noun[:-1]} reaches medium trust.")
    return bullets(lines)


def limits(about: About) -> Markup:
    """Return what the model must not be used for."""
    adapter, low = about.adapter, len(about.by_level["low"])
    one = about.noun[:-1]
    lines: list[Content] = [
        f"Comparing {about.noun} with each other within a tile, or ranking them, as markers of a cluster are. Every "
        f"{one} was tested on its own, over the tiles of a section: which of two is higher was never tested.",
        "Tissue that it never saw: other organs, diseases, species, stains, scanners or ways of preparation than those "
        f"of {names(about.groups)}. It will predict something all the same. The file of an adapter does not know which "
        "tissue its groups are: ask who trained it.",
        "Anything that takes it for a measurement. Predictions vary less than measurements, and neighbouring tiles "
        "share their errors: tests of differential expression on them give p-values that are far too small.",
        f"Cells, or anything smaller than a tile of {adapter.spec.side_um:g} um.",
        "Decisions about patients. It is a research tool that nobody has validated for them.",
    ]
    if low:
        lines.insert(2, f"The {low} {about.noun} of low trust. The table below says which these are.")
    if len(about.groups) == 1:
        lines.append("Conclusions about other patients: all training tissue is of one group.")
    elif about.groups_are_sections:
        lines.append(
            "Conclusions about other patients, if several of the training sections are of one patient: sections were "
            "held out, not patients."
        )
    for name, licence in _licences(about):
        if licence is not None and "NC" in licence.upper().replace("_", "-").split("-"):
            lines.append(f"Commercial work: the licence of the {name} ({licence}) excludes it.")
    return bullets(lines)


def _licences(about: About) -> list[tuple[str, str | None]]:
    found = [("encoder", about.adapter.encoder.licence)]
    if about.adapter.info.get("teacher") is not None:
        found.append(("teacher", about.adapter.info.get("teacher_licence")))
    return found


def training(about: About) -> Markup:
    """Return what was trained on what, and by whose licence."""
    adapter, info, encoder = about.adapter, about.adapter.info, about.adapter.encoder
    rows: list[tuple[str, Content]] = [
        ("Groups", f"{len(about.groups)}: {names(about.groups)}"),
        ("Sections", f"{len(about.sections)}: {names(about.sections)}" if about.sections else "not recorded"),
        ("Measured spots", f"{info['n_spots']:,}"),
        ("Tiles", f"{about.tile}, around the spots"),
        ("Predicts", f"{about.what}, as {info['target']}"),
        ("Image encoder", [f"{encoder.short} ({encoder.name}), licence: {encoder.licence or _UNKNOWN}"]),
    ]
    if encoder.citation:
        rows.append(("Cite for it", encoder.citation))
    if adapter.method == "frozen":
        rows.append(("Adaptation", "none: the encoder is used as its authors released it"))
    else:
        epochs = number(int(info["epochs"]), "epoch")
        size = int(info.get("n_parameters", 0))
        rows.append(("Adaptation", f"{adapter.method}, {epochs}" + (f", {size:,} trained weights" if size else "")))
    if info.get("teacher") is not None:
        licence = info.get("teacher_licence") or _UNKNOWN
        rows.append(("Teacher", f"{info['teacher']}, an embedding of measured expression; licence: {licence}"))
    rows.append(("Readout", _readout(about)))
    if adapter.stain is not None:
        text = f"{adapter.stain.method}: the colours of every section are brought to the mean of the training sections"
        rows.append(("Stain normalisation", text))
    n_groups = adapter.gene_scores.get("n_groups")
    if n_groups is not None and (n_groups < len(about.groups)).any():
        some = n_groups[n_groups < len(about.groups)]
        rows.append(("Fewer groups", f"{len(some)} {about.noun} were measured by {some.min()} to {some.max()} groups"))
    more = (
        "Whether the adapter may be passed on depends on the licences of the encoder and the teacher, and on the terms "
        "of the training data, of which the file of an adapter knows nothing."
    )
    return Markup(facts(rows).text + paragraphs(more).text)


def _readout(about: About) -> str:
    adapter = about.adapter
    text = f"{adapter.info['head']}, features of " + ("the encoder's own output" if adapter.depth is None else "block ")
    text += "" if adapter.depth is None else "+".join(str(depth) for depth in adapter.depth)
    radii = [f"{radius:g}" for radius in adapter.reading.use().radii_um]
    if radii:
        text += f", with the neighbours within {' / '.join(radii)} um"
    if adapter.fields_um:
        text += f", wider fields of view of {' / '.join(f'{width:g}' for width in adapter.fields_um)} um"
    return text


def folds(about: About) -> Markup:
    """Return how the model was tested inside its training data, and what could have leaked."""
    found = [str(name) for name in about.adapter.info.get("held_out", ())]
    if not about.scored or not found:
        return paragraphs("Nothing was held out, so nothing is known of how well it predicts.")
    if len(about.groups) > 1:
        header = ["Fold", "Held out", "Trained on"]
        rows = [
            [f"{i + 1}", ", ".join(name.split("+")), names([g for g in about.groups if g not in name.split("+")])]
            for i, name in enumerate(found)
        ]
        shown = table("Folds inside the training data", header, rows, text=header)
        how = (
            "Whole groups were held out in turn: all tiles of a group, together with everything that is chosen (depth, "
            "epochs, penalty, weights), stayed out of the model that was scored on it. No score is of randomly held "
            "out spots, which share tissue, stain and patient with their neighbours and look far better than a new "
            "patient will."
        )
        weak = (
            "The groups are sections. If some are of the same patient, the scores are too good for a new patient."
            if about.groups_are_sections
            else "The groups are those of a column of the training data. If they are patients, the scores are what to "
            "expect of a new patient; the file of an adapter cannot tell."
        )
    else:
        shown = Markup("")
        how = (
            f"There was one group, so {len(found)} contiguous blocks of its tissue were held out in turn, with a "
            "margin as wide as a tile between them and the rest."
        )
        weak = "The scores are of the same tissue, and too good for another patient."
    slightly = (
        "Settings were chosen by the error on the same held-out tissue, which makes the scores slightly too good; no "
        "weight was fitted on it. The last fit, which predicts, has seen all groups, and was not scored itself."
    )
    leaks = element("h3", "What could have leaked")
    return Markup(paragraphs(how).text + shown.text + leaks.text + paragraphs(weak, slightly).text)


def levels(about: About) -> Markup:
    """Return the number of genes of every trust level, with what it means."""
    (high, high_least), (medium, medium_least) = RULES["high"], RULES["medium"]
    meaning = {
        "high": f"Pearson correlation of {high:g} or more on average over two or more held-out sections, "
        f"above {high_least:g} in each",
        "medium": f"{medium:g} or more on average, above {medium_least:g} in each",
        "low": "the others, and those that were never held out",
    }
    rows: list[list[Content]] = [
        [element("span", level, class_=level), len(found), meaning[level]] for level, found in about.by_level.items()
    ]
    header = ["Trust", about.noun.capitalize(), "Meaning"]
    return table("Trust levels, from held-out sections of the training data", header, rows, text=["Meaning"])


def intervals(about: About) -> Markup:
    """Return what the intervals are, and what they promise."""
    adapter = about.adapter
    made, held_out = adapter.calibration, adapter.held_out
    texts: list[Content] = []
    if made is None:
        texts.append(["There are none: the adapter was not calibrated (", code("pekasc.tl.calibrate(adapter)"), ")."])
    else:
        texts.append(f"{made.text}: groups {names(list(made.groups))}.")
        if made.noise.kind == COUNTS:
            texts.append(
                "The interval of the rate says where the expression without counting noise is expected; that is what a "
                "slide that nobody sequenced has. A measurement adds counting noise, and its interval is wider, the "
                "more the fewer counts a spot has."
            )
        else:
            texts.append("An interval says where a measurement is expected, by how far off held-out predictions were.")
        if made.guarantee == "exact":
            texts.append(
                "The level holds on average over new groups that are exchangeable with those of the calibration. It "
                "does not hold for each gene, tile or kind of tissue on its own."
            )
        else:
            texts.append("The level is what these groups showed, and no promise for a new one.")
        if len(made.groups) < FEW_GROUPS:
            texts.append(
                f"{number(len(made.groups), 'group')} say little about how far the next one may differ: take the "
                "intervals as a rough guide."
            )
        texts.append(
            f"An interval is of one {about.noun[:-1]} in one tile. It says nothing of two together, nor of the mean of "
            "a region, whose tiles err alike."
        )
        without = int(np.isnan(made.threshold).sum())
        if without:
            texts.append(f"{without} of {len(adapter.genes)} {about.noun} have no interval.")
    if held_out is None:
        return paragraphs(*texts)
    level = _LEVEL if made is None else made.level
    rows = [
        [group, share(float(np.interp(level, EDGES, curve)))]
        for group, curve in zip(held_out.groups, held_out.curve, strict=True)
    ]
    caption = f"Share of held-out measurements in nominal {percent(level)} intervals, before calibration"
    return Markup(paragraphs(*texts).text + table(caption, ["Held-out group", "Share inside"], rows).text)


def novelty(about: About) -> Markup:
    """Return how tiles that are unlike the training are found."""
    known = about.adapter.novelty
    if known is None:
        return paragraphs(
            "This adapter keeps nothing of its training tiles, so tiles unlike them cannot be found: look at them "
            "yourself."
        )
    faults = known.distance.faults.names
    like = f", or at least as like a tile with a known fault ({names(faults)})" if faults else ""
    return paragraphs(
        [
            "Every predicted tile of a calibrated adapter gets a novelty, ",
            code('obs["peka_novelty"]'),
            f": the share of held-out training tiles (of {sum(known.n_tiles):,}) that are at least as far from the "
            f"training tiles{like}. Small means unlike the training, for example 0.01. It judges single tiles by how "
            "they look, and does not see what a disease changes in the expression of tissue that looks the same.",
        ],
        "Where most tiles of a slide are novel, the slide is: look at its stain and pixel size first.",
        ["Leave novel tiles out with ", code("pekasc.tl.predict_expression(sdata, adapter, abstain=0.01)"), "."],
    )


def share(value: float) -> str:
    """Return a share in percent."""
    return "–" if math.isnan(value) else f"{value:.0%}"


def versions(about: About) -> Markup:
    """Return versions and digests."""
    adapter = about.adapter
    rows: list[tuple[str, Content]] = [(str(name), str(text)) for name, text in adapter.info["versions"].items()]
    rows += [("SHA-256 of the encoder's weights", code(adapter.encoder_digest))]
    digest = adapter.info.get("teacher_digest")
    if digest:
        rows.append(("SHA-256 of the teacher", code(str(digest))))
    seed, precision = adapter.info.get("random_state"), adapter.info.get("precision")
    if seed is not None:
        rows.append(("Seed", f"{seed}"))
    if precision is not None:
        rows.append(("Precision", f"{precision}"))
    return facts(rows)
