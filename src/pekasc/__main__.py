"""``python -m pekasc``: the command ``pekasc`` where it is not on the path."""

from __future__ import annotations

from pekasc.cli import main

if __name__ == "__main__":
    main()
