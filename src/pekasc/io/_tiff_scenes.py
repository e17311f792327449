"""Scenes of a TIFF: its large pictures, of which one is read; labels, macros and thumbnails are none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pekasc._settings import get_logger
from pekasc.io._tiff_directories import read_directories
from pekasc.io._tiff_layout import main_series, open_tiff
from pekasc.io._tiff_mpp import tiff_mpp

logger = get_logger(__name__)

# names that scanners, tifffile and Bio-Formats give to pictures of the whole glass, its label, and copies
_BESIDE = re.compile(
    r"(?<![a-z])(label|macro|thumbnail|overview|map|preview|barcode|probability)(?![a-z])|^resolution$", re.IGNORECASE
)


@dataclass(frozen=True)
class Scene:
    """One picture that may be the slide: its number among those of the file, name, and size in pixels."""

    number: int
    name: str
    width: int
    height: int


def choose_scene(path: Path, scene: int | str | None) -> int:
    """Return the number of the picture that is read, and log what there is beside it.

    Parameters
    ----------
    path
        The file.
    scene
        Index or name of a scene; None is the largest.

    Raises
    ------
    TypeError
        If `scene` is neither.
    ValueError
        If the file cannot be read, or has no such scene, or several of that name.
    """
    read_directories(path)
    with open_tiff(str(path)) as file:
        largest = main_series(file, str(path))
        try:
            found = [_scene(number, series) for number, series in enumerate(file.series)]
            number = file.series.index(largest)
            copies = {i for i, s in enumerate(file.series) if s.keyframe.is_reduced or s.keyframe.is_subifd}
        except Exception as error:
            raise ValueError(f"The image {str(path)!r} cannot be read as TIFF: {error}") from error
    scenes = [s for s in found if s.number == number or not (s.number in copies or _BESIDE.search(s.name))]
    beside = [f"{s.name or s.number} ({s.width} x {s.height} px)" for s in found if s not in scenes]
    several = len(scenes) > 1
    words = [describe(i, s, _pixel_size(path, s)) for i, s in enumerate(scenes)] if several or scene is not None else []
    chosen = number if scene is None else scenes[find_scene([s.name for s in scenes], scene, path.name, words)].number
    left_out = f" Left out: {', '.join(beside)}." if beside else ""
    if several:
        index = next(i for i, s in enumerate(scenes) if s.number == chosen)
        why = ", the largest (`scene=` takes another)" if scene is None else ""
        logger.hint(
            "slide %s: has %d scenes: %s. Scene %d is read%s.%s",
            path.name, len(scenes), "; ".join(words), index, why, left_out,
        )  # fmt: skip
    elif beside:
        logger.hint("slide %s: the largest picture is read.%s", path.name, left_out)
    return chosen


def find_scene(names: Sequence[str], scene: int | str, file_name: str, words: Sequence[str] = ()) -> int:
    """Return the index of a scene, which is given by it or by a name; `words` describe the scenes of the error.

    Raises
    ------
    TypeError
        If `scene` is neither.
    ValueError
        If there is no such scene, or several of that name.
    """
    if isinstance(scene, bool) or not isinstance(scene, int | str):
        raise TypeError(f"`scene` must be the index or the name of a scene, got {type(scene).__name__}: {scene!r}.")
    same = [scene] if isinstance(scene, int) else [i for i, name in enumerate(names) if name == scene]
    if len(same) == 1 and 0 <= same[0] < len(names):
        return same[0]
    there = f"it has {'; '.join(words)}" if words else "it has one, 0"
    if len(same) > 1:
        raise ValueError(
            f"`scene={scene!r}`: {len(same)} scenes of {file_name!r} have that name. Give an index: {there}."
        )
    raise ValueError(f"`scene={scene!r}`: the slide {file_name!r} has no such scene; {there}.")


def describe(index: int, scene: Scene, mpp: float | None) -> str:
    """Return index, name, size and pixel size of a scene in words."""
    name = f" {scene.name!r}" if scene.name else ""
    size = f"at {mpp:.4g} um per pixel" if mpp is not None else "of unknown pixel size"
    return f"{index}{name} {scene.width} x {scene.height} px {size}"


def _pixel_size(path: Path, scene: Scene) -> float | None:
    try:
        return tiff_mpp(path, scene.number).mpp
    except ValueError:  # of two sources that disagree: an error once this scene is read
        return None


def _scene(number: int, series: Any) -> Scene:
    sizes = dict(zip(series.axes, series.shape, strict=True))
    return Scene(number, str(series.name or ""), sizes.get("X", 0), sizes.get("Y", 0))
