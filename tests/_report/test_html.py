from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pekasc._report._html import (
    Markup,
    block,
    bullets,
    data,
    document,
    element,
    escaped,
    facts,
    figure,
    paragraphs,
    plain,
    table,
)

NAME = "<b onclick='x()'>&amp;\"</b></script><!--"


@pytest.mark.parametrize(
    "made",
    [
        element("p", NAME),
        element("p", [NAME, ["a", 3]], title=NAME),
        paragraphs(NAME),
        bullets([NAME]),
        facts([(NAME, NAME)]),
        table(NAME, [NAME, "b"], [[NAME, NAME]]),
        figure(b"\x89PNG", NAME, NAME),
        block(NAME, NAME),
        data("some-data", {NAME: NAME}),
    ],
    ids=["p", "attribute", "paragraphs", "bullets", "facts", "table", "figure", "block", "data"],
)
def test_text_never_becomes_markup(made: Markup, page: Any) -> None:
    found = page(made.text)
    assert not {"b", "!--"} & set(found.counts)
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert "<!--" not in made.text


def test_texts_and_attributes_are_the_same_when_they_are_read(page: Any) -> None:
    found = page(element("p", NAME, title=NAME, aria_label="a", class_="b", hidden=True, id=None).text)
    assert found.texts == [("p", NAME)]
    assert found.elements == [("p", {"title": NAME, "aria-label": "a", "class": "b", "hidden": None})]
    assert escaped(["a<", Markup("<i>"), 2]) == "a&lt;<i>2"


def test_data_is_the_same_when_it_is_read(page: Any) -> None:
    value = {"rows": [[NAME, 0.5, None], ["\u2028 ü \ud800", 1, True]]}
    text = data("some-data", value).text
    assert text.isascii() and "</" not in text.removesuffix("</script>")
    ((_, found),) = page(text).texts
    assert json.loads(found) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        data("x", float("nan"))


def test_characters_that_a_page_cannot_hold() -> None:
    assert plain("a\0b\ud800\u202ec\u2066") == "a\ufffdb?\ufffdc\ufffd"


def test_tables_have_headings_with_scope(page: Any) -> None:
    found = page(table("What", ["a", "b"], [["x", 1], ["y", "z"]], text=["b"]).text)
    assert [cell["scope"] for cell in found.all("th")] == ["col", "col", "row", "row"]
    assert found.counts["caption"] == 1 and found.all("td")[0]["class"] == "text"
    with pytest.raises(ValueError, match="zip"):
        table("What", ["a", "b"], [["x", 1, 2]])


def test_a_document_runs_and_loads_nothing_else(page: Any) -> None:
    text = document(NAME, [("one", NAME, paragraphs(NAME))], NAME, NAME)
    found = page(text)
    assert ("title", NAME) in found.texts
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    assert found.counts["script"] == found.counts["style"] == found.counts["main"] == 1
    assert [link["href"] for link in found.all("a")] == ["#one"]
    assert found.all("html")[0]["lang"] == "en"
    style = "".join(data for tag, data in found.texts if tag == "style")
    assert "prefers-color-scheme: dark" in style and not re.search(r"url\(|@import", style)


def test_the_policy_names_the_style_and_the_script_that_are_there(page: Any) -> None:
    from base64 import b64encode
    from hashlib import sha256

    found = page(document("a", [], "b", "c"))
    policy = next(m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    for tag in ("style", "script"):
        content = "".join(data for name, data in found.texts if name == tag)
        assert f"{tag}-src 'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'" in policy


def test_the_script_sets_names_as_text_only(page: Any) -> None:
    script = "".join(data for tag, data in page(document("a", [], "b", "c")).texts if tag == "script")
    assert "textContent" in script
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|XMLHttp", script)
