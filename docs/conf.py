"""Configuration of the documentation: `sphinx-build -W docs docs/_build/html`."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.metadata import metadata
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_extensions"))

info = metadata("pekasc")
# as the package's metadata say it, where they name a repository
repository_url = dict(url.split(", ") for url in info.get_all("Project-URL") or []).get("Source", "")
project = "pekasc"
author = "The pekasc developers"
copyright = f"2026, {author}"
release = version = info["Version"]

extensions = [
    "benchmark_pages",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "sphinxext.opengraph",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_extensions", "_figures", "**.ipynb_checkpoints", "jupyter_execute"]

html_theme = "sphinx_book_theme"
html_title = "pekasc"
html_static_path = ["_static"]
html_css_files = ["pekasc.css"]
html_context = {"default_mode": "auto"}
html_favicon = "_static/favicon.svg"
html_show_sourcelink = False
html_theme_options = {
    "logo": {"image_light": "_static/logo_light.svg", "image_dark": "_static/logo_dark.svg", "alt_text": "pekasc"},
    "repository_url": repository_url,
    "use_repository_button": bool(repository_url),
    "path_to_docs": "docs/",
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navigation_with_keys": False,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    # search is in the sidebar
    "navbar_persistent": [],
    # colours of code that can be read, WCAG 2 AA
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
# what is shown where somebody links to a page; cards with the page's title would be drawn at every build
ogp_site_name = "pekasc"
ogp_site_url = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
ogp_image = "_static/result_light.png"
ogp_social_cards = {"enable": False}

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

# notebooks are shown as they were committed, outputs included
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
# longer signatures have one argument a line
maximum_signature_line_length = 68
autodoc_member_order = "bysource"
# a backtick is code, as in a scverse docstring, not a reference
default_role = "literal"
napoleon_google_docstring = False
# what is returned or written where is free text: paragraphs, lists, slots with their description
napoleon_custom_sections = ["Returns"]
napoleon_use_param = True
# types stand in the signature; the return section says what is written where
typehints_defaults = "comma"
typehints_document_rtype = False
always_use_bars_union = True

nitpicky = True
_PROJECTS = {
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "python": "https://docs.python.org/3/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "spatialdata": "https://spatialdata.scverse.org/en/stable/",
    "squidpy": "https://squidpy.readthedocs.io/en/stable/",
    "timm": "https://huggingface.co/docs/timm/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "xarray": "https://docs.xarray.dev/en/stable/",
}
# Links into other projects need their inventories. Without a network the docs still build, and strictly: then only
# references to our own objects are checked.
if os.environ.get("READTHEDOCS") or os.environ.get("PEKASC_DOCS_ONLINE"):
    intersphinx_mapping = {name: (url, None) for name, url in _PROJECTS.items() if name != "timm"}
nitpick_ignore_regex = [
    # every name that is not ours, dotted or bare: builtins, and modules of which there is no inventory at all
    (r"py:.*", r"(?!pekasc\b).*"),
    # types of arguments that users do not build themselves
    (r"py:class", r"pekasc(\.\w+)*\._\w+(\.\w+)+"),
]


def _copy_notebooks() -> None:
    # Sphinx reads its source folder only; the notebooks live where users look for them
    target = HERE / "generated" / "tutorials"
    target.mkdir(parents=True, exist_ok=True)
    for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        shutil.copyfile(notebook, target / notebook.name)


_copy_notebooks()


def _write_encoders() -> None:
    # the page on encoders is the table that the package itself reads, so that the two cannot differ
    from pekasc.models import list_encoders

    def link(text: str) -> str:
        text = re.sub(r"doi:(10\.\S+[^.\s])", r"[doi:\1](https://doi.org/\1)", text)
        text = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
        return re.sub(r"(?<!/)(huggingface\.co/\S+)", r"[\1](https://\1)", text)

    def lines(header: list[str], rows: list[list[str]]) -> list[str]:
        return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]

    table = list_encoders()
    # what decides whether one may use it stands first
    models = [
        [
            f"[`{row.Index}`](https://huggingface.co/{row.hub})" if row.hub else f"[`{row.Index}`](tiny.md)",
            row.licence,
            "**gated**" if row.gated else "open",
            f"{row.mpp:g}" if row.mpp == row.mpp else "–",
            f"{row.parameters:.0f} M",
            str(row.width),
        ]
        for row in table.itertuples()
    ]
    inputs = [
        [
            f"`{row.Index}`",
            f"`{row.architecture}`",
            f"{row.n_blocks} / {row.patch} / {row.registers}",
            ", ".join(f"`{key}={value}`" for key, value in row.model_kwargs.items()) or "–",
            ", ".join(f"{value:.4g}" for value in row.mean),
            ", ".join(f"{value:.4g}" for value in row.std),
            row.pooling or "–",
            link(row.citation or "[the page on it](tiny.md)"),
        ]
        for row in table.itertuples()
    ]
    for name, header, rows in (
        ("models", ["name", "licence", "access", "um/px", "size", "width"], models),
        (
            "inputs",
            [
                "name",
                "architecture in timm",
                "blocks / patch, px / registers",
                "arguments",
                "mean",
                "std",
                "pooling",
                "cite",
            ],
            inputs,
        ),
    ):
        (HERE / "generated" / f"encoders_{name}.inc").write_text(
            "\n".join(lines(header, rows)) + "\n", encoding="utf-8"
        )


_write_encoders()


def _write_cli() -> None:
    # the reference of the command line is what the command itself says
    from typer.main import get_command
    from typer.testing import CliRunner

    from pekasc.cli import app

    parts = []
    for command in ([], *([name] for name in getattr(get_command(app), "commands", {}))):
        shown = CliRunner().invoke(app, [*command, "--help"], prog_name="pekasc", env={"COLUMNS": "100"})
        parts.append(f"### `{' '.join(['pekasc', *command])}`\n\n```text\n{shown.stdout.strip()}\n```\n")
    (HERE / "generated" / "cli.inc").write_text("\n".join(parts), encoding="utf-8")


_write_cli()


def _free_text_returns(
    app: Sphinx, what: str, name: str, obj: object, options: dict[str, bool] | None, lines: list[str]
) -> None:
    # sphinx_autodoc_typehints marks return sections for napoleon's usual reading of them; ours are read as text
    for i in range(len(lines) - 2):
        if lines[i] == "Returns" and lines[i + 2] == ":":
            del lines[i + 2]
            return


def setup(app: Sphinx) -> None:
    """Run just after the extension that adds the mark, before napoleon (priority 500)."""
    app.connect("autodoc-process-docstring", _free_text_returns, priority=499)
