"""HTML in which text is text: whatever is no `Markup` is escaped, so that names from the data never become markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Union

Content = Union["Markup", str, int, Iterable["Content"]]
_VOID = frozenset({"img", "input", "meta"})
# left to right marks and their like would turn the text around a name
_TURNING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


@dataclass(frozen=True)
class Markup:
    """A piece of HTML that this module has made."""

    text: str


def escaped(content: Content) -> str:
    """Return content as HTML: markup as it is, everything else escaped."""
    if isinstance(content, Markup):
        return content.text
    if isinstance(content, str | int):
        return html.escape(plain(content))
    return "".join(escaped(part) for part in content)


def plain(text: object) -> str:
    """Return a text without characters that a page cannot hold, or that turn what stands beside it."""
    return str(text).translate(_TURNING).replace("\0", "\ufffd").encode(errors="replace").decode()


def element(name: str, *content: Content, **attributes: Any) -> Markup:
    """Return an element.

    Parameters
    ----------
    name
        Name of the element.
    content
        What is in it: markup, texts, or lists of these.
    attributes
        Its attributes; ``_`` in a name is ``-``, and one at the end is dropped. None leaves it out, True has no value.
    """
    shown = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        shown.append(f" {key}" if value is True else f' {key}="{html.escape(plain(value))}"')
    start = f"<{name}{''.join(shown)}>"
    return Markup(start if name in _VOID else f"{start}{escaped(content)}</{name}>")


def paragraphs(*texts: Content) -> Markup:
    """Return texts as paragraphs."""
    return Markup("".join(element("p", text).text for text in texts))


def bullets(texts: Iterable[Content]) -> Markup:
    """Return texts as a list."""
    return element("ul", [element("li", text) for text in texts])


def code(text: str) -> Markup:
    """Return a text as code within a line."""
    return element("code", text)


def block(text: str, label: str) -> Markup:
    """Return lines of code, which scroll where they are too long."""
    return element("pre", element("code", text), tabindex=0, role="region", aria_label=label)


def facts(rows: Iterable[tuple[str, Content]]) -> Markup:
    """Return names with what is known of them."""
    return element("dl", [[element("dt", name), element("dd", value)] for name, value in rows])


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Content]], text: Sequence[str] = ()) -> Markup:
    """Return a table whose first column names the rows; columns named in `text` hold words, the others numbers."""
    kinds = ["text" if name in text else None for name in header]
    heads = [element("th", name, scope="col", class_=kind) for name, kind in zip(header, kinds, strict=True)]
    head = element("thead", element("tr", heads))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            [element("td", cell, class_=kind) for cell, kind in zip(row[1:], kinds[1:], strict=True)],
        )
        for row in rows
    ]
    made = element("table", element("caption", caption), head, element("tbody", body))
    return element("div", made, class_="scroll", tabindex=0, role="region", aria_label=caption)


def figure(png: bytes, alt: str, caption: Content, *, wide: bool = False) -> Markup:
    """Return a picture with a text in its place and a caption; on small screens it scrolls, a wide one farther."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    picture = element("img", src=source, alt=alt)
    size = "scroll wide" if wide else "scroll"
    shown = element("div", picture, class_=size, tabindex=0, role="region", aria_label=alt)
    return element("figure", shown, element("figcaption", caption))


def section(identity: str, title: str, *content: Content) -> Markup:
    """Return a part of the page with its heading."""
    return element("section", element("h2", title, id=identity), content, aria_labelledby=identity)


def data(identity: str, value: Any) -> Markup:
    """Return values for the page's script: JSON in which no character can end the element or begin another."""
    text = json.dumps(value, allow_nan=False)  # ASCII only
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(f'<script type="application/json" id="{html.escape(identity)}">{text}</script>')


def document(title: str, parts: Sequence[tuple[str, str, Content]], header: Content, footer: Content) -> str:
    """Return a page that needs nothing else: its style and script are in it, and nothing else may run or load.

    Parameters
    ----------
    title
        Title of the page.
    parts
        Identity, title and content of every section.
    header, footer
        What stands above and below them.
    """
    style, script = _asset("page.css"), _asset("page.js")
    # if a name became markup in spite of all, no script of its own would run, and nothing be fetched
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="generator", content="pekasc"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", title),
        Markup(f"<style>{style}</style>"),
    ]
    links = element(
        "nav", element("ul", [element("li", element("a", name, href=f"#{id_}")) for id_, name, _ in parts]),
        aria_label="Contents",
    )  # fmt: skip
    body = [
        element("header", header),
        links,
        element("main", [section(*part) for part in parts]),
        element("footer", footer),
        Markup(f"<script>{script}</script>"),
    ]
    page = element("html", element("head", head), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page.text}\n"


def _asset(name: str) -> str:
    return files("pekasc._report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
