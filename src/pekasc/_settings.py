"""Settings of the package, and its logging: handler, levels and the level HINT."""

from __future__ import annotations

import builtins
import logging
import os
import sys
from typing import Any, TextIO

HINT = 25  # choices and omissions of a call; between logging's INFO and WARNING
_LEVELS = {"warning": logging.WARNING, "hint": HINT, "info": logging.INFO, "debug": logging.DEBUG}
_PACKAGE = "pekasc"


class Settings:
    """Settings of the package, as ``pekasc.settings``.

    Examples
    --------
    >>> import pekasc as pk
    >>> pk.settings
    Settings(verbosity='hint')
    """

    __slots__ = ("_verbosity",)  # setting a misspelt name raises

    def __init__(self) -> None:
        self._verbosity = "hint"

    @property
    def verbosity(self) -> str:
        """How much is logged: ``"warning"``, ``"hint"``, ``"info"`` or ``"debug"``, each including those before it.

        ``"hint"``, the default, shows warnings and what a call chose or left out, a line each; ``"info"`` adds its
        progress.
        """
        return self._verbosity

    @verbosity.setter
    def verbosity(self, value: str) -> None:
        name = value.lower() if isinstance(value, str) else value
        if name not in _LEVELS:
            raise ValueError(f"`verbosity={value!r}` is unknown. Valid levels: {', '.join(_LEVELS)}.")
        self._verbosity = name
        # an explicit level also applies with the user's own handlers
        logging.getLogger(_PACKAGE).setLevel(_LEVELS[name])
        _handler.level_is_default = False

    def __repr__(self) -> str:
        return f"Settings(verbosity={self._verbosity!r})"


class _Handler(logging.Handler):
    """Write lines as scanpy does: without prefix, except for warnings; to stdout in notebooks, else to stderr."""

    level_is_default = False  # whether the package's level was set with this handler and not by the user

    def emit(self, record: logging.LogRecord) -> None:
        # with several processes, only the first logs
        if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) not in ("", "0"):
            return
        try:
            # looked up each time, since notebooks and tests replace the streams
            stream: TextIO | None = sys.stdout if getattr(builtins, "__IPYTHON__", False) else sys.stderr
            if stream is not None:  # None in programs without a console
                mark = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
                stream.write(f"{mark}{self.format(record)}\n")
                stream.flush()
        except Exception:  # noqa: BLE001 (as logging's own handlers: a log must not stop what it tells of)
            self.handleError(record)


class PackageLogger(logging.LoggerAdapter):
    """A logger that sets up the package's handler before the first line, unless the user has set up logging.

    Nothing is logged on import, so importing the package has no side effects on logging.
    """

    def isEnabledFor(self, level: int) -> bool:
        _set_up()
        return super().isEnabledFor(level)

    def hint(self, message: str, *args: Any) -> None:
        """Log what a call chose or left out."""
        self.log(HINT, message, *args, stacklevel=2)


def get_logger(name: str) -> PackageLogger:
    """Return the logger of a module, to be used instead of :func:`logging.getLogger`.

    Parameters
    ----------
    name
        The module's ``__name__``.
    """
    return PackageLogger(logging.getLogger(name))


def _set_up() -> None:
    """Add the package's handler, unless the user has set up logging; remove it if they have done so since.

    Once the root logger or the package's logger has another handler, that one shows the lines, in its format and at its
    level, so that no line is shown twice.
    """
    package = logging.getLogger(_PACKAGE)
    if logging.getLogger().handlers or any(handler is not _handler for handler in package.handlers):
        package.removeHandler(_handler)
        if _handler.level_is_default:
            _handler.level_is_default = False
            package.setLevel(logging.NOTSET)
    elif _handler not in package.handlers:
        if package.level == logging.NOTSET:
            _handler.level_is_default = True
            package.setLevel(_LEVELS[settings.verbosity])
        package.addHandler(_handler)  # last, so that another thread never finds it without its level
    else:
        return
    _name_level()


def _name_level() -> None:
    known = logging.getLevelNamesMapping().get("HINT", HINT)
    logging.addLevelName(HINT, "HINT")
    # scanpy looks up its own level HINT, below INFO, by that name: restore it
    logging.addLevelName(known, "HINT")


_handler = _Handler()
settings = Settings()
