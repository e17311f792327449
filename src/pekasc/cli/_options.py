"""Recipe, Readout and Compute from the command line (``--recipe epochs=3``), and the configuration file."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import typer

from pekasc._options import Compute, Readout, Recipe, resolve
from pekasc._settings import get_logger

logger = get_logger(__name__)

OBJECTS: dict[str, type[Any]] = {"recipe": Recipe, "readout": Readout, "compute": Compute}
TILE = "tile"  # a table for every command that makes tiles
_CONFIG = "pekasc.config"
_OF_A_RUN = ("config", "debug", "help", "json", "verbosity")


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Take defaults of a command's options from a TOML file: the callback of ``--config``, which is read first.

    Raises
    ------
    typer.BadParameter
        If the file cannot be read, or has an unknown table or field.
    """
    if path is None:
        return None
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read: {error}") from None
    commands = getattr(context.parent.command if context.parent else None, "commands", {})
    allowed = {name: _option_names(command) for name, command in commands.items()}
    for name, table in tables.items():
        if name not in {*allowed, *OBJECTS}:
            raise typer.BadParameter(
                _unknown(f"{path} has a table [{name}], which is unknown", name, [*allowed, *OBJECTS])
            )
        if name in OBJECTS and isinstance(table, str):
            continue  # a preset
        if not isinstance(table, dict):
            raise typer.BadParameter(f"{path}: {name!r} must be a table, [{name}], got {table!r}.")
        for field in table if name in allowed else ():
            if field not in allowed[name]:
                raise typer.BadParameter(
                    _unknown(f"{path}: [{name}] has no field {field!r}", field, list(allowed[name]))
                )
    own = _option_names(context.command)
    defaults = {name: value for name, value in tables.get(TILE, {}).items() if name in own}
    idle = [f"{name} of [{TILE}]" for name in tables.get(TILE, {}) if name not in own]
    idle += [f"[{name}]" for name in OBJECTS if name in tables and name not in own]
    if idle:
        logger.hint("%s: %s do nothing in `pekasc %s`.", path, ", ".join(idle), context.info_name)
    defaults |= tables.get(str(context.info_name), {})
    for name in OBJECTS.keys() & defaults.keys():  # in [fit], say; the tables of their own are for them
        raise typer.BadParameter(f"{path}: {name!r} has a table of its own: [{name}].")
    several = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    for name, value in defaults.items():
        if isinstance(value, list) and own[name] not in several:
            raise typer.BadParameter(f"{path}: {name!r} takes one value, got {value!r}.")
        if not isinstance(value, list) and own[name] in several:
            defaults[name] = [value]
    context.default_map = {own[name]: value for name, value in defaults.items()}
    context.meta[_CONFIG] = {name: tables[name] for name in OBJECTS if name in tables}
    return path


def _option_names(command: Any) -> dict[str, str]:
    """Return the options of a command, as a file names them, with the names of their parameters."""
    names = {p.opts[0].lstrip("-").replace("-", "_"): p.name for p in command.params if p.param_type_name == "option"}
    return {name: parameter for name, parameter in names.items() if name not in _OF_A_RUN}


def _unknown(text: str, name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"{text}.{f' Did you mean {near[0]!r}?' if near else ''} Known: {', '.join(known)}."


def option_object(context: typer.Context, label: str, given: Sequence[str] | None) -> Any:
    """Return what a call takes as ``recipe=``, ``readout=`` or ``compute=``.

    Parameters
    ----------
    context
        The context of the command, with the tables of its configuration file.
    label
        Name of the argument.
    given
        What the command line says: ``field=value`` and names of presets. It wins over the file.

    Returns
    -------
    None; the name of a preset; a mapping, in which a call refuses fields that do nothing in it; with a file, which may
    serve several commands, an instance.

    Raises
    ------
    typer.BadParameter
        If a field is unknown or has a wrong value.
    """
    cls = OBJECTS[label]
    file = context.meta.get(_CONFIG, {}).get(label)
    try:
        preset, changes = _parse(given or (), cls)
        of_file = {} if file is None or isinstance(file, str) else dict(file)
        of_file_preset = file if isinstance(file, str) else of_file.pop("preset", None)
        if preset is not None:  # takes the place of the file's table
            of_file, of_file_preset = {}, None
        from_file = {name: _typed(value, _hints(cls).get(name)) for name, value in of_file.items()}
        chosen = preset if preset is not None else of_file_preset
        both = {**from_file, **changes}
        # fields of a preset are checked with it: one alone may contradict the defaults
        found = resolve(both, cls, label) if chosen is None else resolve(chosen, cls, label).replace(**both)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint=f"--{label}") from None
    if chosen is not None and not both:
        return chosen
    if chosen is not None or from_file:
        return found
    return changes or None


def option_objects(context: typer.Context, **given: Sequence[str] | None) -> dict[str, Any]:
    """Return what a call takes, by argument: see :func:`option_object`."""
    return {label: option_object(context, label, texts) for label, texts in given.items()}


def _parse(given: Sequence[str], cls: type[Any]) -> tuple[str | None, dict[str, Any]]:
    preset, changes = None, {}
    for text in given:
        name, equals, value = text.partition("=")
        if equals:
            name = name.strip().replace("-", "_")
            changes[name] = _typed(value.strip(), _hints(cls).get(name))
        else:
            preset = text.strip()
    return preset, changes


def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls, localns={"Client": object})


def _typed(value: Any, hint: Any) -> Any:
    """Return a text as the type that a field has; as it is if it is of none, for the field's own error."""
    if not isinstance(value, str) or hint is None:
        return value
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if type(None) in kinds and value.lower() == "none":
        return None
    for kind in kinds:
        found = _as(value, kind)
        if found is not None:
            return found
    return value


def _as(text: str, kind: Any) -> Any:
    """Return a text as a value of a type, or None."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        return text if text in typing.get_args(kind) else None
    if origin is tuple:
        parts = [_as(part.strip(), typing.get_args(kind)[0]) for part in text.strip("()[]").split(",") if part.strip()]
        return tuple(parts) if parts and None not in parts else None
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower())
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            return None
    if isinstance(origin, type) and issubclass(origin, Mapping):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return None
    return text if kind is str else None
