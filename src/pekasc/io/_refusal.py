"""What a file holds that is not read here, though other programs may."""

from __future__ import annotations


class NotReadHere(ValueError):
    """A file of a format, or with a layout, that is refused by name, not for damage.

    Parameters
    ----------
    why
        The file and what it holds, a sentence.
    advice
        What to do where nothing else reads it.
    """

    def __init__(self, why: str, advice: str) -> None:
        super().__init__(why, advice)  # both, so that it can be pickled
        self.why, self.advice = why, advice

    def __str__(self) -> str:
        return f"{self.why} {self.advice}"
