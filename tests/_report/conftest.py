"""Adapters to report on, with names that are markup."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
from spatialdata import SpatialData

import pekasc as pk

MARKUP = (
    "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", '"><svg onload=alert(3)>', "<!--<script>",
    "$x^2$", "&lt;b&gt;", "\u202eevil",
)  # fmt: skip
GROUPS = {"P1": '<script>alert("g")</script>', "P2": "</title><img src=x onerror=alert(6)>", "P3": "$a_b$"}


@pytest.fixture(autouse=True)
def _figures() -> Iterator[None]:
    matplotlib.use("Agg")
    style, before = dict(matplotlib.rcParams), plt.get_fignums()  # figures of other tests
    yield
    assert dict(matplotlib.rcParams) == style
    assert plt.get_fignums() == before


class Page(HTMLParser):
    """What a browser would make of a page: elements with attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "input"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag  # nothing closes what it did not open

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    @property
    def counts(self) -> Counter[str]:
        return Counter(tag for tag, _ in self.elements)

    @property
    def text(self) -> str:
        words = "".join(data for tag, data in self.texts if tag not in {"script", "style"})
        return re.sub(r"\s+", " ", words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page() -> type[Page]:
    """Return the parser of pages."""
    return Page


@pytest.fixture(scope="session")
def _fitted() -> tuple[Any, SpatialData]:
    sdata = pk.datasets.phantom(n_patients=3, size_um=700, mpp=2.0, n_genes=14)
    table = sdata["table"]
    names = list(table.var_names)
    names[: len(MARKUP)] = MARKUP
    table.var_names = names
    table.obs["donor"] = table.obs["patient"].astype(str).map(GROUPS).astype("category")
    table.obs["section"] = table.obs["donor"]
    pk.pp.tile(sdata, tile_px=56, mpp=2.0)
    adapter = pk.tl.fit_adapter(
        sdata, method=None, groups="donor", train=["P1S1_spots", "P2S1_spots"], genes=names, readout="ridge",
        progress=False,
    )  # fmt: skip
    adapter = pk.tl.calibrate(adapter)
    pk.tl.predict_expression(sdata, adapter, progress=False)
    return adapter, sdata


@pytest.fixture
def adapter(_fitted: tuple[Any, SpatialData]) -> Any:
    """Return a calibrated adapter of a frozen encoder, of two groups; names of genes and groups are markup."""
    return _fitted[0]


@pytest.fixture
def sdata(_fitted: tuple[Any, SpatialData]) -> Iterator[SpatialData]:
    """Return three sections with predictions of the adapter, two of them trained on. Reports leave them as they are."""
    sdata = _fitted[1]
    table = sdata["table"]
    before = {name: list(getattr(table, name)) for name in ("obs", "var", "layers", "obsm", "uns")}
    yield sdata
    assert {name: list(getattr(table, name)) for name in before} == before
