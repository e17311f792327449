"""Make one page of every section of benchmarks/RESULTS.md, the answer first, and the list of them by group.

A section whose heading is not named below is a page under its own heading, in the last group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
RESULTS = DOCS.parent / "benchmarks" / "RESULTS.md"
PAGES = DOCS / "generated" / "benchmarks"

# heading: (group, question, how the paragraph begins that answers it)
SECTIONS = {
    "Adapter against the frozen encoder on real tissue": ("accuracy", "What does an adapter gain?", "Read:"),
    "The paper's comparison without leaks": ("accuracy", "Which adaptation method is best, without leaks?", "Read:"),
    "What reads the features": ("accuracy", "How much is in the readout?", "The adapter's own contribution"),
    "Reading the frozen encoder better: views and scales": ("accuracy", "Do views and scales help?", "Read:"),
    "Reading an adapter: scales and orientations": ("accuracy", "Do they help an adapter, too?", "Read:"),
    "Stain maps": ("accuracy", "Does a stain map help?", "Read:"),
    "Heads": ("accuracy", "Which head?", "Read:"),
    "More patients, more gain?": ("accuracy", "Do more patients mean more gain?", "Read:"),
    "What was tried for better transfer": ("accuracy", "What was tried for other patients?", "Read:"),
    "Blocks, views and patience": ("accuracy", "How many blocks, views and epochs?", "So `blocks"),
    "The encoder `tiny` against the frozen ViT-S/14": ("accuracy", "How good is the encoder `tiny`?", "`tiny` reaches"),
    "What folds of random spots would have claimed": ("trust", "What would random spots claim?", "Read:"),
    "Shuffled labels, every method": ("trust", "Does any method score on shuffled labels?", "Read:"),
    "Shuffled control": ("trust", "Does the whole fit score on shuffled labels?", "Every mean lies"),
    "Intervals, novelty and their coverage": ("trust", "Do intervals cover what they say?", "Read:"),
    "Maps between spots and in gaps": ("accuracy", "Do measured spots help a map between them?", "Read:"),
    "Noise ceilings": ("trust", "How good could a score be?", "Read:"),
    "Identity of tissue": ("trust", "Is training tissue known again?", "72 ordered pairs"),
    "A grid at the spots": ("trust", "Does a slide's grid predict what spots predict?", ""),
    "Where tissue is found": ("trust", "Is tissue found where it is?", "Looked at:"),
    "Damaged and hostile inputs": ("trust", "What happens with damaged files?", "No error other"),
    "A store after twenty kills, and on a full disk": ("trust", "Does a store survive kills and a full disk?", ""),
    "A hundred kills in a save": ("trust", "Does an adapter survive a killed save?", ""),
    "Two processes, and a fit that was killed": ("trust", "Do two processes, or a kill, change a fit?", ""),
    "Time to score": ("speed", "How soon is an adapter good?", "Bold:"),
    "Seconds of training: a plain loop, all blocks, the last four behind a frozen prefix": (
        "speed", "How long does training take?", "Bars:",
    ),
    "Tiles per second from zarr": ("speed", "How fast are tiles read?", "Read:"),
    "Tiles and features of a slide, against LazySlide": ("speed", "How fast is a slide, beside LazySlide?", "Read:"),
    "An adapter in LazySlide and in pekasc": ("trust", "Does an adapter predict the same in LazySlide?", "Read:"),
    "Predicting a slide: speed": ("speed", "How fast is a slide predicted?", "Two runs of five"),
    "Does the encoder wait for tiles?": ("speed", "Does the encoder wait for tiles?", "Both bars"),
    "Ridge with a penalty tuned on held-out groups": ("speed", "How fast is the head?", ""),
    "Memory of a large slide": ("memory", "What does a large slide take?", "The peaks differ"),
    "Predictions of slides in a store": ("memory", "How much memory do predictions take?", ""),
    "206,123 tiles of HEST-1k's layout in little memory": ("memory", "Does HEST-1k fit in memory?", "The bar, 4 GB"),
    "The expression head of 206,123 tiles and 18,000 genes": ("memory", "How much memory does the head take?", ""),
    "Memory after thirty fits": ("memory", "Does memory grow from fit to fit?", ""),
    "`pekasc predict` on lists": ("archive", "Do lists of slides survive failures?", ""),
    "11,000 slides on paper": ("archive", "What would 11,000 slides take?", "Hours on a GPU"),
    "The house": ("code", "How large is the code?", ""),
}  # fmt: skip
GROUPS = {
    "accuracy": "How well are genes predicted?",
    "trust": "Can it be trusted?",
    "speed": "How fast is it?",
    "memory": "How much memory does it need?",
    "archive": "Does it work on an archive?",
    "code": "The code itself",
    "more": "More",
}


@dataclass(frozen=True)
class Page:
    """One section of the results: where it goes, and what it says first."""

    slug: str
    group: str
    question: str
    answer: str
    rest: str


def _pages(text: str) -> list[Page]:
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    return [_page(*section.split("\n", 1)) for section in sections]


def _page(heading: str, body: str) -> Page:
    group, question, begins = SECTIONS.get(heading, ("more", heading, "Read:"))
    paragraphs = body.strip("\n").split("\n\n")
    answer = ""
    if begins:
        found = [p for p in paragraphs if p.removeprefix("- ").startswith(begins)]
        if found:
            answer = found[0].removeprefix("- ").removeprefix("Read: ")
            paragraphs.remove(found[0])
    # subsections have the level of a section on a page of their own
    rest = "\n\n".join(re.sub(r"^#(##+ )", r"\1", p) for p in paragraphs)
    slug = re.sub(r"[^a-z0-9]+", "_", heading.lower()).strip("_")[:60]
    return Page(slug, group, question, answer[:1].upper() + answer[1:], rest)


def write(results: Path = RESULTS, folder: Path = PAGES) -> list[Page]:
    """Write the pages and `list.inc`, and return the pages."""
    pages = _pages(results.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    for page in pages:
        answer = f":::{{admonition}} Answer\n:class: tip\n\n{page.answer}\n:::\n\n" if page.answer else ""
        _replace(folder / f"{page.slug}.md", f"# {page.question}\n\n{answer}{page.rest}\n")
    for old in folder.glob("*.md"):
        if old.stem not in {page.slug for page in pages}:
            old.unlink()
    parts = []
    for group, title in GROUPS.items():
        # titles in a toctree are plain text
        entries = [
            f"{page.question.replace('`', '')} </generated/benchmarks/{page.slug}>"
            for page in pages
            if page.group == group
        ]
        if entries:
            parts.append(f"## {title}\n\n```{{toctree}}\n:maxdepth: 1\n\n" + "\n".join(entries) + "\n```\n")
    _replace(folder / "list.inc", "\n".join(parts))
    return pages


def _replace(path: Path, text: str) -> None:
    """Write a file unless it says so already: Sphinx reads again what is newer."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages before Sphinx looks for its sources."""
    app.connect("builder-inited", lambda app: write() and None)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
