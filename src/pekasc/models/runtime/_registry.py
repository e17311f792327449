"""What is known by a name: teachers, encoders, methods and heads are looked up, listed and added to in one way."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Registry(Mapping[str, Row], Generic[Row]):
    """Rows of one kind by their names, in the order in which they were registered.

    Parameters
    ----------
    kind
        What a row is, for errors: ``"teacher"``.
    rows
        Those that are there from the start.
    """

    def __init__(self, kind: str, rows: Mapping[str, Row] | None = None) -> None:
        self.kind = kind
        self._rows: dict[str, Row] = {}
        for name, row in (rows or {}).items():
            self.register(name, row)

    def register(self, name: str, row: Row) -> None:
        """Add a row under a name that is free.

        Raises
        ------
        ValueError
            If the name is taken: whoever asked for it so far would get another row without a word.
        """
        if name in self._rows:
            there = self._rows[name]
            what = getattr(there, "__qualname__", None) or repr(there)
            raise ValueError(f"The {self.kind} {name!r} is there already ({what[:120]}): take another name.")
        self._rows[name] = row

    def find(self, argument: str, value: object, others: str = "", more: Iterable[str] = ()) -> Row:
        """Return the row of the name that a user gave.

        Parameters
        ----------
        argument
            The user's argument, for the error.
        value
            What was given there.
        others, more
            See :meth:`unknown`.

        Raises
        ------
        ValueError
            If there is no row of that name.
        """
        if not isinstance(value, str) or value not in self._rows:
            raise self.unknown(argument, value, others, more)
        return self._rows[value]

    def unknown(self, argument: str, value: object, others: str = "", more: Iterable[str] = ()) -> ValueError:
        """Return the error for a name that is not there: the value, what may have been meant, and what there is.

        Parameters
        ----------
        argument
            The user's argument.
        value
            What was given there.
        others
            What the argument takes besides: ``"a peft.PeftConfig, or None"``.
        more
            Names that it takes besides, to look for close ones among.
        """
        known = f"Choose one of {list(self._rows)}{f', {others}' if others else ''}."
        return ValueError(f"`{argument}={value!r}` is not known.{self._close(value, more)} {known}")

    def _close(self, value: object, more: Iterable[str]) -> str:
        """Return the part of the error that names what may have been meant; rows first, whatever their case."""
        text = str(value)
        rows = difflib.get_close_matches(text.lower().replace("_", "-"), self._rows, n=3)
        close = [*rows, *difflib.get_close_matches(text, more, n=3)][:4]
        return f" Close names: {', '.join(close)}." if close else ""

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)
