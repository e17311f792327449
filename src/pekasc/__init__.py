"""Predict gene expression from H&E images with adapted pathology encoders, evaluated on held-out patients.

Namespaces follow scanpy: ``pp`` makes tiles and folds, ``tl`` fits, applies and evaluates adapters, ``pl`` plots,
``get`` returns tiles and results, ``io`` reads data, ``datasets`` has examples, ``models`` has encoders, teachers and
adapters; ``report`` writes a page about an adapter. They are imported on first use, so that ``import pekasc`` needs
neither torch nor squidpy.
``settings.verbosity`` sets how much is logged.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pekasc._options import Compute, Readout, Recipe
from pekasc._settings import settings

if TYPE_CHECKING:
    from pekasc import datasets, get, io, models, pl, pp, tl
    from pekasc._report import report
    from pekasc.models import Adapter

__all__ = [
    "Adapter",
    "Compute",
    "Readout",
    "Recipe",
    "__version__",
    "datasets",
    "get",
    "io",
    "models",
    "pl",
    "pp",
    "report",
    "settings",
    "tl",
]

__version__ = version("pekasc")

_NAMESPACES = frozenset({"datasets", "get", "io", "models", "pl", "pp", "tl"})


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return import_module(f"pekasc.{name}")
    if name == "Adapter":
        return import_module("pekasc.models").Adapter
    if name == "report":
        return import_module("pekasc._report").report
    raise AttributeError(f"module 'pekasc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
