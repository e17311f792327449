"""Numbers and lists of names in sentences."""

from __future__ import annotations

from collections.abc import Sequence


def number(n: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def names(found: Sequence[str], most: int = 12) -> str:
    """Return names in a line, the first of many."""
    return ", ".join(found) if len(found) <= most else f"{', '.join(found[:most])} and {len(found) - most} more"
