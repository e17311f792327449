"""Readers for data formats."""

from __future__ import annotations

from pekasc.io._hest import read_hest

__all__ = ["read_hest"]
