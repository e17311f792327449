"""Settings that hold for the whole package, and its log: who shows it, and from which level on."""

from __future__ import annotations

import builtins
import logging
import os
import sys
from typing import Any, TextIO

HINT = 25  # what a call chose or left out; between logging's INFO and WARNING
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

    __slots__ = ("_verbosity",)  # a name that is mistyped is an error

    def __init__(self) -> None:
        self._verbosity = "hint"

    @property
    def verbosity(self) -> str:
        """How much is logged: one of ``"warning"``, ``"hint"``, ``"info"`` and ``"debug"``, each with those before it.

        ``"hint"``, the default, shows what a call chose or left out, a line each; ``"info"`` its progress too.
        """
        return self._verbosity

    @verbosity.setter
    def verbosity(self, value: str) -> None:
        name = value.lower() if isinstance(value, str) else value
        if name not in _LEVELS:
            raise ValueError(f"`verbosity={value!r}` is unknown. Valid levels: {', '.join(_LEVELS)}.")
        self._verbosity = name
        # asked for, so it holds whoever shows the lines
        logging.getLogger(_PACKAGE).setLevel(_LEVELS[name])
        _handler.level_is_default = False

    def __repr__(self) -> str:
        return f"Settings(verbosity={self._verbosity!r})"


class _Handler(logging.Handler):
    """Show lines as scanpy does: plain, warnings marked; in notebooks on stdout, elsewhere on stderr."""

    level_is_default = False  # the package's level is the one that came with this handler

    def emit(self, record: logging.LogRecord) -> None:
        # of several processes that train together, the first speaks for all
        if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) not in ("", "0"):
            return
        try:
            # looked up each time: notebooks and tests put others in their place
            stream: TextIO | None = sys.stdout if getattr(builtins, "__IPYTHON__", False) else sys.stderr
            if stream is not None:  # as in programs without a console
                mark = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
                stream.write(f"{mark}{self.format(record)}\n")
                stream.flush()
        except Exception:  # noqa: BLE001 (as logging's own handlers: a log must not stop what it tells of)
            self.handleError(record)


class PackageLogger(logging.LoggerAdapter):
    """A logger that makes sure, before every line, that somebody shows it.

    Lines are logged by calls, never by imports, so that nothing is set up before the first call.
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
    """Show the package's lines unless the user has set up logging, now or since the last line.

    Whoever gives the root logger or the package's a handler shows the lines from then on, in their form and at their
    level: ours goes, so that no line is shown twice.
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
        package.addHandler(_handler)  # last: another thread that finds it finds its level too
    else:
        return
    _name_level()


def _name_level() -> None:
    known = logging.getLevelNamesMapping().get("HINT", HINT)
    logging.addLevelName(HINT, "HINT")
    # scanpy has a level of that name below INFO, which it looks up by name
    logging.addLevelName(known, "HINT")


_handler = _Handler()
settings = Settings()
