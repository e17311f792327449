"""The report on an adapter: a self-contained HTML page."""

from pekasc._report._report import report

__all__ = ["report"]
