"""The documentation: code on its pages, tables of options, and the pages that are made of the results of benchmarks."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import pekasc as pk

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if not {"generated", "_build"} & set(path.parts))


def _blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [code for language, code in found if language in languages]


def _calls(code: str) -> Iterator[tuple[list[str], ast.Call | None]]:
    """Yield every dotted name that begins with `pk`, and the call if it is one."""
    called = {id(node.func): node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
    for tree in [node.func for node in called.values()]:
        parts, node = [], tree
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id == "pk":
            yield parts[::-1], called[id(tree)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_calls_on_pages_exist_and_take_their_arguments(page: Path) -> None:
    # Snakemake's rules are no Python
    for code in _blocks(page, "python", "py"):
        if page.name == "clusters.md" and "rule " in code:
            continue
        for parts, call in _calls(code):
            found: Any = pk
            for part in parts:
                found = getattr(found, part)
            known = inspect.signature(found).parameters
            given = [keyword.arg for keyword in call.keywords if keyword.arg is not None] if call else []
            if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
                assert set(given) <= set(known), ".".join(parts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", sorted((DOCS / "concepts").glob("*.md")), ids=lambda page: page.stem)
def test_code_of_the_concepts_runs(page: Path) -> None:
    # what is not meant to run as it stands is marked `py`
    names: dict[str, Any] = {}
    for block in _blocks(page, "python"):
        exec(block, names)
    if page.stem == "data_model":
        assert names["sdata"]["table"].obs["tile_inside"].notna().all()


@pytest.mark.parametrize("options", [pk.Recipe, pk.Readout, pk.Compute])
def test_table_of_options_lists_every_field(options: type) -> None:
    text = (DOCS / "concepts" / "options.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| {{class}}`pekasc.{options.__name__}`"))
    assert {field.name for field in fields(options)} == set(re.findall(r"`(\w+)`", row.split("|")[2]))


def test_files_on_the_map_of_the_house_exist() -> None:
    text = (DOCS / "contributing.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.(?:py|toml))`", "\n".join(re.findall(r"^\| \d+\. .*$", text, flags=re.M)))
    assert len(named) > 30
    assert not [name for name in named if not (ROOT / "src" / "pekasc" / name).is_file()]


def test_results_are_whole_on_their_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx")
    monkeypatch.setattr(sys, "path", [str(DOCS / "_extensions"), *sys.path])
    import benchmark_pages

    results = ROOT / "benchmarks" / "RESULTS.md"
    pages = benchmark_pages.write(results, tmp_path)
    headings = re.findall(r"^## (.*)$", results.read_text(encoding="utf-8"), re.M)
    assert len(pages) == len(headings) == len({page.slug for page in pages}) > 10
    written = " ".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md"))
    lines = [
        line.removeprefix("- ").removeprefix("Read: ") for line in results.read_text(encoding="utf-8").splitlines()
    ]
    # the first letter of an answer is made large, headings change their level, what is above all sections is left out
    lost = [line for line in lines[4:] if line[1:] not in written and not line.startswith("#")]
    assert not lost
    listed = (tmp_path / "list.inc").read_text(encoding="utf-8")
    assert all(f"/generated/benchmarks/{page.slug}>" in listed for page in pages)


def test_a_section_that_nobody_has_grouped_is_a_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx")
    monkeypatch.setattr(sys, "path", [str(DOCS / "_extensions"), *sys.path])
    import benchmark_pages

    results = tmp_path / "RESULTS.md"
    results.write_text(
        "# Results\n\n## New here?\n\n    a command\n\n| a |\n|---|\n\nRead: much faster,\nby far.\n\n### Part\n\nx\n"
    )
    (page,) = benchmark_pages.write(results, tmp_path / "pages")
    text = (tmp_path / "pages" / "new_here.md").read_text()
    assert page.group == "more" and text.startswith("# New here?\n\n:::{admonition} Answer")
    assert text.index("Much faster,\nby far.") < text.index("a command") < text.index("\n## Part\n")
