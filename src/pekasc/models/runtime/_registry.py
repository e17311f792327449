"""A registry with names, for encoders, teachers, methods, heads and rivals."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

Row = TypeVar("Row")


class Registry(Mapping[str, Row], Generic[Row]):
    """Registered rows by name, in order of registration.

    Parameters
    ----------
    kind
        Kind of the rows, for errors: ``"teacher"``.
    rows
        Initial rows.
    """

    def __init__(self, kind: str, rows: Mapping[str, Row] | None = None) -> None:
        self.kind = kind
        self._rows: dict[str, Row] = {}
        for name, row in (rows or {}).items():
            self.register(name, row)

    def register(self, name: str, row: Row) -> None:
        """Add a row under a new name.

        Raises
        ------
        ValueError
            If the name is taken: replacing a row silently would change the results of existing code.
        """
        if name in self._rows:
            there = self._rows[name]
            what = getattr(there, "__qualname__", None) or repr(there)
            raise ValueError(f"The {self.kind} {name!r} is there already ({what[:120]}): take another name.")
        self._rows[name] = row

    def find(self, argument: str, value: object, others: str = "", more: Iterable[str] = ()) -> Row:
        """Return the row of a name given by the user.

        Parameters
        ----------
        argument
            The user's argument, for the error.
        value
            Its value.
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
        """Return the error for an unknown name, with close and available names.

        Parameters
        ----------
        argument
            The user's argument.
        value
            Its value.
        others
            Other values that the argument takes: ``"a peft.PeftConfig, or None"``.
        more
            Other names that it takes, for finding close ones.
        """
        known = f"Choose one of {list(self._rows)}{f', {others}' if others else ''}."
        return ValueError(f"`{argument}={value!r}` is not known.{self._close(value, more)} {known}")

    def _close(self, value: object, more: Iterable[str]) -> str:
        """Return the part of the error with close names, those of the registry first, ignoring case."""
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
