"""The command ``pekasc``, for clusters and pipelines. What is slow to import, a command imports when it runs."""

from __future__ import annotations

from pekasc.cli._app import app, main

__all__ = ["app", "main"]
