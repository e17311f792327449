"""Teach a pathology encoder to predict gene expression from H&E, honestly.

Namespaces follow scanpy: ``pp`` prepares tiles and folds, ``tl`` fits, applies and scores adapters,
``pl`` draws, ``get`` reads results, ``io`` reads data, ``datasets`` brings examples, ``models`` holds
the encoders. They load on first use, so that ``import pekasc`` needs neither torch nor squidpy.
``settings.verbosity`` says how much calls log.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pekasc._options import Compute, Readout, Recipe
from pekasc._settings import settings

if TYPE_CHECKING:
    from pekasc import datasets, get, io, models, pl, pp, tl
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
    raise AttributeError(f"module 'pekasc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
