from __future__ import annotations

from pekasc._text import names, number


def test_names() -> None:
    assert names(["a", "b"]) == "a, b"
    assert names(list("abcd"), 2) == "a, b and 2 more"
    assert names([str(i) for i in range(13)]).endswith("11 and 1 more")


def test_numbers() -> None:
    assert [number(n, "group") for n in (0, 1, 2000)] == ["0 groups", "1 group", "2,000 groups"]
