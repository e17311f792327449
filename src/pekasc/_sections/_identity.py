"""Identity of tissue: find spots on tissue that an adapter was trained on, in any object, by what the images show.

Landmarks of the training tissue (SIFT keypoints of a coarse image, on tissue and near training spots) are kept with the
adapter. A picture in which enough of them lie in the same arrangement shows that tissue, whatever its name, crop,
pyramid level, size or orientation. Blank areas have no landmarks, so that they identify nothing.

Source: Lowe, "Distinctive image features from scale-invariant keypoints", IJCV 2004; Fischler and Bolles, "Random
sample consensus", CACM 1981; keypoints as implemented in scikit-image.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from pekasc._sections._overview import coarse, tissue_mask
from pekasc._sections._resolve import Section

_UM = (2.0, 4.0, 8.0, 16.0, 32.0)  # pixel sizes of the coarse image, the finest that is small enough is taken
_PIXELS = 1_500_000
_MARGIN_UM = 150.0  # around training spots
_MOST = 4096  # landmarks per image; 136 bytes each
# attributes of scikit-image's SIFT with one row a keypoint
_OF_KEYPOINTS = ("keypoints", "positions", "sigmas", "scales", "octaves", "orientations")
_RATIO = 0.8  # of the distances to the best and the second best match
_LEAST = 8  # landmarks in the same arrangement
_POINTS, _DESCRIPTORS = ".points", ".descriptors"
_SHARE = 0.15  # of the matching pairs
_TRIALS = 1000  # similarities


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Keypoints of an image.

    Parameters
    ----------
    points
        (n, 3) float32: x, y and size in level-0 pixels.
    descriptors
        (n, 128) uint8, unchanged by rotation and scale.
    """

    points: np.ndarray
    descriptors: np.ndarray


def find_landmarks(section: Section) -> Landmarks:
    """Return the landmarks of a section's image on tissue near its spots."""
    none = Landmarks(np.empty((0, 3), np.float32), np.empty((0, 128), np.uint8))
    if section.pyramid is None:
        return none
    px_per_um = float(np.linalg.norm(section.um_to_px, axis=0).mean())
    margin = _MARGIN_UM * px_per_um
    size = np.array(section.size_px)
    start = np.clip(np.floor(section.centres_px.min(axis=0) - margin), 0, size).astype(int)
    end = np.clip(np.ceil(section.centres_px.max(axis=0) + margin), 0, size).astype(int)
    if (end <= start).any():
        return none
    area = float(np.prod((end - start) / px_per_um))
    um = next((um for um in _UM if area / um**2 <= _PIXELS), max(_UM[-1], np.sqrt(area / _PIXELS)))
    picture, step = coarse(section.pyramid, start, end, um * px_per_um)
    near = cKDTree(section.centres_px)
    at, sizes, descriptors = _keypoints(picture, lambda places: near.query((places + 0.5) * step + start)[0] < margin)
    points = np.column_stack([(at + 0.5) * step + start, sizes * np.mean(step)]).astype(np.float32)
    return Landmarks(points, descriptors)


def _keypoints(
    picture: np.ndarray, wanted: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x, y (n, 2), size (n,) and descriptor (n, 128) of the keypoints of a coarse image that lie on tissue.

    Only those at `wanted` places are described, and at most `_MOST`, drawn at random: that takes half of the time.
    """
    from skimage.feature import SIFT

    sift: Any = SIFT(upsampling=1)
    grey = picture.astype(np.float32).mean(axis=-1) / 255
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of flat areas, which have no keypoint
            sift.detect(grey)
            tissue = tissue_mask(picture)
            row, col = np.clip(np.round(sift.positions).astype(int), 0, np.array(tissue.shape) - 1).T
            keep = np.flatnonzero(tissue[row, col] & wanted(sift.positions[:, ::-1]))
            if keep.size > _MOST:
                keep = np.sort(np.random.default_rng(0).permutation(keep)[:_MOST])
            if not keep.size:
                return np.empty((0, 2)), np.empty(0), np.empty((0, 128), np.uint8)
            for name in _OF_KEYPOINTS:
                setattr(sift, name, getattr(sift, name)[keep])
            sift.extract(grey)
    except (RuntimeError, ValueError):  # what scikit-image raises where there are none, or the image is too small
        return np.empty((0, 2)), np.empty(0), np.empty((0, 128), np.uint8)
    return sift.positions[:, ::-1], sift.sigmas, sift.descriptors.astype(np.uint8)


# the descriptor has 4 x 4 places of 8 orientations; in a mirror image, one axis and the orientations run backwards
_MIRRORED = np.arange(128).reshape(4, 4, 8)[:, ::-1, (-np.arange(8)) % 8].ravel()


def alignment(new: Landmarks, known: Landmarks) -> np.ndarray | None:
    """Return the 3 x 3 matrix from pixels of one image to those of another that shows the same tissue, else None."""
    for mirrored in (False, True):
        pairs = _pairs(new.descriptors[:, _MIRRORED] if mirrored else new.descriptors, known.descriptors)
        flip = np.diag([1.0, -1.0 if mirrored else 1.0, 1.0])
        matrix = _arranged(new.points[pairs[:, 0]], known.points[pairs[:, 1]], flip)
        if matrix is not None:
            return matrix
    return None


def _arranged(new: np.ndarray, known: np.ndarray, flip: np.ndarray) -> np.ndarray | None:
    """Return the similarity under which enough of the pairs of points fall on each other, or None."""
    if len(new) < _LEAST:
        return None
    # a similarity is target = a * source + b of complex numbers
    source = (new[:, :2].astype(np.float64) @ flip[:2, :2]) @ [1, 1j]
    target = known[:, :2].astype(np.float64) @ [1, 1j]
    inliers = _consensus(source, target, 2 * float(np.median(known[:, 2])))
    if inliers is None:
        return None
    places = min(len(np.unique(np.round(points[inliers, :2]), axis=0)) for points in (new, known))
    if places < max(_LEAST, _SHARE * len(new)):
        return None
    start, end = source[inliers], target[inliers]
    centred = start - start.mean()
    a = np.vdot(centred, end) / np.vdot(centred, centred)
    b = end.mean() - a * start.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag], [0, 0, 1]]) @ flip


def _consensus(source: np.ndarray, target: np.ndarray, near: float) -> np.ndarray | None:
    """Return which points fall on each other under the similarity of the two pairs with which most do, or None.

    Of few points all twos of pairs are tried, of many as many drawn at random.
    """
    n = len(source)
    if n * (n - 1) // 2 <= _TRIALS:
        i, j = np.triu_indices(n, 1)
    else:
        i, j = np.random.default_rng(0).integers(n, size=(2, _TRIALS))
    fits = (np.abs(source[i] - source[j]) > 0) & (np.abs(target[i] - target[j]) > near)
    i, j = i[fits], j[fits]
    best = None
    score = (0, 0.0)
    for part in range(0, len(i), 128):
        first, second = i[part : part + 128], j[part : part + 128]
        a = (target[first] - target[second]) / (source[first] - source[second])
        distance = np.abs(a[:, None] * (source - source[first][:, None]) + target[first][:, None] - target)
        on = distance < near
        count, square = on.sum(axis=1), np.where(on, distance**2, 0).sum(axis=1)
        at = int(np.lexsort((square, -count))[0])
        if (int(count[at]), -float(square[at])) > score:
            score, best = (int(count[at]), -float(square[at])), on[at]
        if score[0] == n:
            break
    return best


def _pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the pairs of descriptors, (n, 2), that are each other's best match and clearly better than the second."""
    if len(a) < _LEAST or len(b) < _LEAST:
        return np.empty((0, 2), dtype=np.int64)
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6) for x in (a.astype(np.float32), b)]
    unit = [x.astype(np.float32) for x in unit]
    best_b = np.full(len(b), -1, dtype=np.int64)
    top_b = np.full(len(b), -np.inf, dtype=np.float32)
    found = []
    for start in range(0, len(a), 512):
        cosine = unit[0][start : start + 512] @ unit[1].T
        rows = np.arange(len(cosine))
        here = cosine.argmax(axis=0)
        value = cosine[here, np.arange(len(b))]
        better = value > top_b
        best_b[better], top_b[better] = start + here[better], value[better]
        best = cosine.argmax(axis=1)
        top = cosine[rows, best]
        cosine[rows, best] = -np.inf
        distance, second = (np.sqrt(np.maximum(2 - 2 * x, 0)) for x in (top, cosine.max(axis=1)))
        found.append(np.column_stack([start + rows, best])[distance < _RATIO * second])
    pairs = np.concatenate(found)
    return np.asarray(pairs[best_b[pairs[:, 1]] == pairs[:, 0]])


def places(sections: Iterable[Section]) -> dict[str, np.ndarray]:
    """Return the tile centres of every image, (n, 2) x, y in level-0 pixels, by a digest of what it shows.

    Names and pixel sizes are not part of the digest.
    """
    centres: dict[str, list[np.ndarray]] = {}
    for section in sections:
        for name in section.picture_ids():
            centres.setdefault(name, []).append(section.centres_px)
    return {name: np.concatenate(parts) for name, parts in centres.items()}


def tissue_of(sections: Iterable[Section]) -> dict[str, np.ndarray]:
    """Return what :func:`trained_rows` needs to find the tissue of `sections` again, as arrays by name.

    ``{id}`` are the :func:`places` of an image, ``{id}.points`` and ``{id}.descriptors`` its :class:`Landmarks`.
    """
    sections = list(sections)
    out = places(sections)
    found: dict[str, list[Landmarks]] = {}
    for section in sections:
        if section.pyramid is not None:
            found.setdefault(section.picture_ids()[0], []).append(find_landmarks(section))
    for name, parts in found.items():
        if sum(len(part.points) for part in parts):
            out[f"{name}{_POINTS}"] = np.concatenate([part.points for part in parts])
            out[f"{name}{_DESCRIPTORS}"] = np.concatenate([part.descriptors for part in parts])
    return out


def trained_rows(sections: Iterable[Section], side_um: float, trained_on: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the table rows whose centre is closer than half of `side_um` to that of a training tile."""
    rows = [np.empty(0, dtype=np.int64)]
    for section in sections:
        # with anisotropic pixels, the larger distance: better one spot too many than a leak
        side_px = side_um * np.linalg.norm(section.um_to_px, axis=1).max()
        near = np.zeros(len(section.centres_px), dtype=bool)
        for centres in _known(section, trained_on):
            near |= cKDTree(centres).query(section.centres_px)[0] < side_px / 2
        rows.append(section.rows[near])
    return np.concatenate(rows)


def _known(section: Section, trained_on: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the centres of training tiles on a section's tissue, in its own pixels."""
    same = [name for name in section.picture_ids() if name in trained_on]
    for name in same:
        yield trained_on[name]
    others = [name for name in trained_on if f"{name}{_POINTS}" in trained_on and name not in same]
    landmarks = find_landmarks(section) if others else None
    for name in others:
        assert landmarks is not None  # for the type checker
        known = Landmarks(trained_on[f"{name}{_POINTS}"], trained_on[f"{name}{_DESCRIPTORS}"])
        matrix = alignment(landmarks, known)
        if matrix is not None:
            back = np.linalg.inv(matrix)
            yield trained_on[name] @ back[:2, :2].T + back[:2, 2]
