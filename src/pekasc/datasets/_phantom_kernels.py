"""Compiled parts of the phantom: hashed noise, glands, fat cells, nuclei, and the loop over pixels.

In one file, since the cache of numba only detects changes in the file of the function that is called.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_jit: Any = numba.njit(cache=True, nogil=True, error_model="numpy")

_C1, _C2, _C3 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0xBF58476D1CE4E5B9)
_C4, _S29, _S32, _S11 = np.uint64(0x94D049BB133111EB), np.uint64(29), np.uint64(32), np.uint64(11)
_S16, _S48, _LOW16 = np.uint64(16), np.uint64(48), np.uint64(0xFFFF)

# states: columns of the fields
TUMOUR, STROMA, IMMUNE, GLAND, FAT, DENSITY, PSI, CHI, DEPTH = range(9)
N_FIELDS = 9
GRID_UM = 8.0  # smooth fields are evaluated on a grid of this step and interpolated
NUCLEUS_CELL_UM = 6.6  # one nucleus at most per cell of this lattice
GLAND_CELL_UM = 106.0
FAT_CELL_UM = 62.0
FAT_BEND = 0.12  # how much the warp of the fibres bends the walls of fat cells
REACH_UM = 20.0  # maximum extent of a nucleus with its cytoplasm beyond its lattice cell
MEAN_FIELD_MPP = 2.0  # coarser pixels show the average of the nuclei instead of each nucleus
# probability of a nucleus in a lattice cell of each state, before crowding and the density field
_P_TUMOUR, _P_STROMA, _P_IMMUNE, _P_GLAND, _P_FAT = 0.36, 0.105, 0.62, 0.10, 0.05


@_jit
def _hash(seed: Any, salt: int, ix: int, iy: int) -> Any:
    h = seed + np.uint64(salt) * _C3
    h ^= np.uint64(ix) * _C1
    h = (h ^ (h >> _S32)) * _C4
    h ^= np.uint64(iy) * _C2
    h = (h ^ (h >> _S29)) * _C3
    return h ^ (h >> _S32)


@_jit
def _unit(h: Any) -> float:
    return np.float64(h >> _S11) * (1.0 / 9007199254740992.0)


@_jit
def _uniform(seed: Any, salt: int, ix: int, iy: int) -> float:
    return _unit(_hash(seed, salt, ix, iy))


@_jit
def _lattice(low: float, high: float, cell: float) -> Any:
    """First and one past the last index of the cells of a lattice between two coordinates."""
    return np.int64(np.floor(low / cell)), np.int64(np.floor(high / cell)) + 1


@_jit
def _span(centre: float, reach: float, mpp: float, start: int, size: int) -> Any:
    """First and one past the last of `size` pixels from `start` on that lie within `reach` of a coordinate."""
    low, high = np.int64(np.floor((centre - reach) / mpp)), np.int64(np.floor((centre + reach) / mpp))
    return max(low - start, 0), min(high - start + 1, size)


@_jit
def _smooth(low: float, high: float, x: float) -> float:
    t = (x - low) / (high - low)
    t = min(max(t, 0.0), 1.0)
    return t * t * (3.0 - 2.0 * t)


@_jit
def _noise(seed: Any, salt: int, x: float, y: float) -> float:
    """Value noise in [0, 1] with period 1 of the lattice."""
    fx, fy = np.floor(x), np.floor(y)
    ix, iy = np.int64(fx), np.int64(fy)
    u, v = x - fx, y - fy
    u = u * u * (3.0 - 2.0 * u)
    v = v * v * (3.0 - 2.0 * v)
    a = _uniform(seed, salt, ix, iy)
    b = _uniform(seed, salt, ix + 1, iy)
    c = _uniform(seed, salt, ix, iy + 1)
    d = _uniform(seed, salt, ix + 1, iy + 1)
    top = a + (b - a) * u
    return top + (c + (d - c) * u - top) * v


@_jit
def _noise_near(seed: Any, salt: int, x: float, y: float, memory: np.ndarray) -> float:
    """:func:`_noise`, caching in `memory` the corners of the last lattice cell, which neighbouring pixels share."""
    fx, fy = np.floor(x), np.floor(y)
    if fx != memory[0] or fy != memory[1]:
        ix, iy = np.int64(fx), np.int64(fy)
        memory[0], memory[1] = fx, fy
        memory[2] = _uniform(seed, salt, ix, iy)
        memory[3] = _uniform(seed, salt, ix + 1, iy)
        memory[4] = _uniform(seed, salt, ix, iy + 1)
        memory[5] = _uniform(seed, salt, ix + 1, iy + 1)
    u, v = x - fx, y - fy
    u = u * u * (3.0 - 2.0 * u)
    v = v * v * (3.0 - 2.0 * v)
    top = memory[2] + (memory[3] - memory[2]) * u
    return top + (memory[4] + (memory[5] - memory[4]) * u - top) * v


@_jit
def _rotated_noise(seed: Any, salt: int, x: float, y: float, scale: float) -> float:
    """Two octaves of noise on a lattice rotated by an angle that depends on `salt`, so that lattices do not show."""
    t = 0.31 * salt - 0.9
    c, s = (1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t)
    p, q = (c * x - s * y) / scale, (s * x + c * y) / scale
    return 0.68 * _noise(seed, salt, p, q) + 0.32 * _noise(seed, salt + 50, 2.3 * p, 2.3 * q)


@_jit
def _warp(k: Any, salt: int, x: float, y: float) -> float:
    return 240.0 * _noise(k.seed, salt, x / 300.0, y / 300.0) + 60.0 * _noise(k.seed, salt + 50, x / 90.0, y / 90.0)


@_jit
def _depth(k: Any, x: float, y: float) -> float:
    if not k.outline:
        return 1000.0
    half = min(k.half_width, k.half_height)
    p, q = (x - k.half_width) / k.half_width, (y - k.half_height) / k.half_height
    p, q = p * p, q * q
    r = np.sqrt(np.sqrt(p * p + q * q))
    slow = _rotated_noise(k.seed, 11, x, y, 0.9 * half) - 0.5
    return (0.87 - r + 0.42 * slow) * half + 24.0 * (_rotated_noise(k.seed, 12, x, y, 55.0) - 0.5)


@_jit
def _fields(k: Any, x: float, y: float, out: np.ndarray) -> None:
    """Fill `out` with membership in the five states, density factor, two warps and depth in tissue."""
    total = 0.0
    for i in range(5):
        v = max(_rotated_noise(k.seed, 1 + i, x, y, k.state_scale) + k.bias[i], 0.05)
        v *= v
        v *= v
        v = v * v * v  # ^12: smooth borders some tens of um wide
        out[i] = v
        total += v
    for i in range(5):
        out[i] /= total
    d = _rotated_noise(k.seed, 7, x, y, k.density_scale)
    out[DENSITY] = k.crowding * (0.25 + 1.5 * _smooth(0.15, 0.85, d))
    out[PSI] = _warp(k, 8, x, y)
    out[CHI] = _warp(k, 9, x, y)
    out[DEPTH] = _depth(k, x, y)


@_jit
def fields_at(k: Any, xy: np.ndarray) -> np.ndarray:
    out = np.empty((xy.shape[0], N_FIELDS))
    for i in range(xy.shape[0]):
        _fields(k, xy[i, 0], xy[i, 1], out[i])
    return out


@_jit
def _grid(k: Any, step: float, ix: int, iy: int, nx: int, ny: int) -> np.ndarray:
    out = np.empty((ny, nx, N_FIELDS))
    for i in range(ny):
        for j in range(nx):
            _fields(k, (ix + j) * step, (iy + i) * step, out[i, j])
    return out


# ---------------------------------------------------------------------------------------------- objects


@_jit
def _cleft(k: Any, x: float, y: float, psi: float, chi: float) -> float:
    """Return the degree of a stromal cleft at a point: long, thin gaps along the fibres."""
    p = (-k.fibre_y * x + k.fibre_x * y + psi) / 24.0
    q = (k.fibre_x * x + k.fibre_y * y + chi) / 190.0
    return _noise(k.seed, 20, p, q)


@_jit
def _fat_centre(k: Any, i: int, j: int, out: np.ndarray, scratch: np.ndarray) -> None:
    """Fill `out` with x, y of the fat cell of a lattice cell, and 1 if it is fat or 0 if other tissue is there."""
    h = _hash(k.seed, 21, i, j)
    out[0] = (i + 0.15 + 0.7 * np.float64(h & _LOW16) / 65536.0) * FAT_CELL_UM
    out[1] = (j + 0.15 + 0.7 * np.float64((h >> _S16) & _LOW16) / 65536.0) * FAT_CELL_UM
    _fields(k, out[0], out[1], scratch)
    chance = _smooth(0.15, 0.6, scratch[FAT])
    out[2] = 1.0 if np.float64(h >> _S48) / 65536.0 < chance else 0.0


@_jit
def _fat_cells(k: Any, i0: int, j0: int, i1: int, j1: int) -> np.ndarray:
    out, scratch = np.empty((j1 - j0, i1 - i0, 3)), np.empty(N_FIELDS)
    for j in range(j0, j1):
        for i in range(i0, i1):
            _fat_centre(k, i, j, out[j - j0, i - i0], scratch)
    return out


@_jit
def _fat_wall(x: float, y: float, cells: np.ndarray, i0: int, j0: int) -> float:
    """Distance to the wall of the fat cell around a point, rounded at the corners; -1 outside fat."""
    gx, gy = np.int64(np.floor(x / FAT_CELL_UM)) - i0, np.int64(np.floor(y / FAT_CELL_UM)) - j0
    best, second, third, fat = 1e18, 1e18, 1e18, 0.0
    for j in range(gy - 1, gy + 2):
        for i in range(gx - 1, gx + 2):
            dx, dy = x - cells[j, i, 0], y - cells[j, i, 1]
            d = dx * dx + dy * dy
            if d < best:
                third, second, best, fat = second, best, d, cells[j, i, 2]
            elif d < second:
                third, second = second, d
            elif d < third:
                third = d
    if fat == 0.0:
        return -1.0
    root = np.sqrt(best)
    a, b = 0.5 * (np.sqrt(second) - root), 0.5 * (np.sqrt(third) - root)
    return a * b / (a + b + 1e-9)


@_jit
def _gland_row_shift(k: Any, gy: int) -> float:
    return _uniform(k.seed, 36, 0, gy)  # so that columns of glands do not line up


@_jit
def _gland(k: Any, gx: int, gy: int, out: np.ndarray, scratch: np.ndarray) -> bool:
    """Fill `out` with x, y, radius, relative radius of the lumen, place on the noise of a cell's gland, if any."""
    u = _uniform(k.seed, 30, gx, gy)
    radius = 18.0 + 27.0 * u * u
    room = GLAND_CELL_UM / 2.0 - 1.13 * radius
    x = (gx + 0.5 + _gland_row_shift(k, gy)) * GLAND_CELL_UM + room * (2.0 * _uniform(k.seed, 31, gx, gy) - 1.0)
    y = (gy + 0.5) * GLAND_CELL_UM + room * (2.0 * _uniform(k.seed, 32, gx, gy) - 1.0)
    _fields(k, x, y, scratch)
    if scratch[DEPTH] < radius or _uniform(k.seed, 33, gx, gy) > _smooth(0.2, 0.6, scratch[GLAND]):
        return False
    out[0], out[1], out[2] = x, y, radius
    out[3] = 0.25 + 0.4 * _uniform(k.seed, 34, gx, gy)
    out[4] = 97.0 * gx + 31.0 * gy
    return True


@_jit
def _gland_radius(k: Any, gland: np.ndarray, ux: float, uy: float) -> float:
    """Radius of a gland in the direction of a unit vector."""
    return gland[2] * (0.82 + 0.3 * _noise(k.seed, 35, gland[4] + 1.1 * ux, 1.1 * uy))


@_jit
def _in_gland(k: Any, x: float, y: float, gland: np.ndarray, scratch: np.ndarray) -> bool:
    gy = np.int64(np.floor(y / GLAND_CELL_UM))
    gx = np.int64(np.floor(x / GLAND_CELL_UM - _gland_row_shift(k, gy)))
    if not _gland(k, gx, gy, gland, scratch):  # a gland stays within its own cell
        return False
    dx, dy = x - gland[0], y - gland[1]
    r = np.sqrt(dx * dx + dy * dy) + 1e-9
    return r < 1.08 * _gland_radius(k, gland, dx / r, dy / r)


# a nucleus: x, y, long and short half axis, unit vector of the long axis, darkness, vesicularity, softness, cytoplasm
NUCLEUS = 10


@_jit
def _shape_nucleus(k: Any, kind: int, ix: int, iy: int, out: np.ndarray) -> None:
    """Fill the shape and look of a nucleus of one state."""
    u = _uniform(k.seed, 44, ix, iy)
    v = _uniform(k.seed, 45, ix, iy)
    t = 2.0 * _uniform(k.seed, 46, ix, iy) - 1.0
    ux, uy = (1.0 - t * t) / (1.0 + t * t), 2.0 * t / (1.0 + t * t)
    dark, vesicle, cyto = 1.0, 0.15, 0.0
    if kind == TUMOUR:
        long, short = 3.6 + 3.2 * u * u, 0.6 + 0.36 * v
        dark, vesicle, cyto = 0.72 + 0.35 * v, 0.25 + 0.3 * u, 1.0
    elif kind == IMMUNE:
        long, short, dark = 2.7 + 0.9 * u, 0.86 + 0.14 * v, 1.05 + 0.35 * v
    elif kind == STROMA:
        long, short, dark = 5.2 + 4.2 * u, 0.22 + 0.16 * v, 0.85 + 0.3 * v
        eps = 6.0
        here = _warp(k, 8, out[0], out[1])
        gx = -k.fibre_y + (_warp(k, 8, out[0] + eps, out[1]) - here) / eps
        gy = k.fibre_x + (_warp(k, 8, out[0], out[1] + eps) - here) / eps
        norm = np.sqrt(gx * gx + gy * gy) + 1e-9
        ux, uy = -gy / norm + 0.25 * (u - 0.5), gx / norm + 0.25 * (v - 0.5)
        norm = np.sqrt(ux * ux + uy * uy)
        ux, uy = ux / norm, uy / norm
    else:
        long, short, dark = 3.6 + 1.8 * u, 0.4 + 0.3 * v, 0.9 + 0.3 * v
    out[2] = long * k.nucleus_scale
    out[3] = out[2] * short
    out[4], out[5], out[6], out[7] = ux, uy, dark, vesicle
    w = _uniform(k.seed, 47, ix, iy)
    out[8] = 0.45 + 0.9 * w * w * w  # most nuclei are in focus
    out[9] = cyto


@_jit
def _nucleus(k: Any, ix: int, iy: int, out: np.ndarray, gland: np.ndarray, scratch: np.ndarray) -> bool:
    """Fill `out` with the nucleus of a lattice cell, if it holds one."""
    x = (ix + 0.12 + 0.76 * _uniform(k.seed, 40, ix, iy)) * NUCLEUS_CELL_UM
    y = (iy + 0.12 + 0.76 * _uniform(k.seed, 41, ix, iy)) * NUCLEUS_CELL_UM
    u = _uniform(k.seed, 42, ix, iy)
    if u > 1.75 * k.crowding * _P_IMMUNE:  # above the highest possible probability: skip the fields
        return False
    _fields(k, x, y, scratch)
    if scratch[DEPTH] < 4.0:
        return False
    p0 = scratch[TUMOUR] * _P_TUMOUR
    p1 = p0 + scratch[STROMA] * _P_STROMA
    p2 = p1 + scratch[IMMUNE] * _P_IMMUNE
    p3 = p2 + scratch[GLAND] * _P_GLAND
    p4 = p3 + scratch[FAT] * _P_FAT
    u /= scratch[DENSITY]
    if u > p4:
        return False
    kind = TUMOUR if u < p0 else STROMA if u < p1 else IMMUNE if u < p2 else GLAND if u < p3 else FAT
    psi, chi, stroma, fat, glandular = scratch[PSI], scratch[CHI], scratch[STROMA], scratch[FAT], scratch[GLAND]
    if stroma > 0.2 and _cleft(k, x, y, psi, chi) > 0.70:
        return False
    if glandular > 0.02 and _in_gland(k, x, y, gland, scratch):
        return False
    if fat > 0.03:
        px, py = x + FAT_BEND * psi, y + FAT_BEND * chi
        gx, gy = np.int64(np.floor(px / FAT_CELL_UM)), np.int64(np.floor(py / FAT_CELL_UM))
        if _fat_wall(px, py, _fat_cells(k, gx - 1, gy - 1, gx + 2, gy + 2), gx - 1, gy - 1) > 1.5:
            return False
    out[0], out[1] = x, y
    _shape_nucleus(k, kind, ix, iy, out)
    return True


@_jit
def _gland_nucleus(k: Any, gland: np.ndarray, i: int, n: int, out: np.ndarray) -> None:
    """Fill `out` with nucleus `i` of `n` around a gland: basal, its long axis towards the lumen."""
    cx, cy = np.int64(gland[4]), i
    angle = (i + 0.5 * _uniform(k.seed, 48, cx, cy)) / n * 2.0 * np.pi
    # rounded: the last bit of sine and cosine differs between machines
    ux, uy = np.round(np.cos(angle) * 1e9) * 1e-9, np.round(np.sin(angle) * 1e9) * 1e-9
    r = _gland_radius(k, gland, ux, uy)
    thick = r * (1.0 - gland[3])
    at = r - min(0.36 * thick, 6.0) - 2.2 * _uniform(k.seed, 49, cx, cy)
    out[0], out[1] = gland[0] + at * ux, gland[1] + at * uy
    u = _uniform(k.seed, 51, cx, cy)
    out[2] = (3.6 + 1.6 * u) * k.nucleus_scale
    out[3] = out[2] * (0.5 + 0.22 * _uniform(k.seed, 52, cx, cy))
    out[4], out[5], out[6], out[7], out[8], out[9] = ux, uy, 0.95 + 0.3 * u, 0.25, 0.5, 0.0


@_jit
def _n_gland_nuclei(k: Any, gland: np.ndarray) -> int:
    return int(2.0 * np.pi * gland[2] * 0.86 / (6.6 * k.nucleus_scale) * min(k.crowding, 1.2))


@_jit
def count_nuclei(k: Any, xy: np.ndarray, side: float) -> np.ndarray:
    """Count nuclei by centre in squares around points."""
    out = np.zeros(xy.shape[0])
    nucleus, gland, scratch = np.empty(NUCLEUS), np.empty(5), np.empty(N_FIELDS)
    for p in range(xy.shape[0]):
        left, top = xy[p, 0] - side / 2.0, xy[p, 1] - side / 2.0
        right, bottom = left + side, top + side
        i0, i1 = _lattice(left, right, NUCLEUS_CELL_UM)
        j0, j1 = _lattice(top, bottom, NUCLEUS_CELL_UM)
        for iy in range(j0, j1):
            for ix in range(i0, i1):
                if _nucleus(k, ix, iy, nucleus, gland, scratch):
                    if left <= nucleus[0] < right and top <= nucleus[1] < bottom:
                        out[p] += 1.0
        j0, j1 = _lattice(top, bottom, GLAND_CELL_UM)
        for gy in range(j0, j1):
            shift = _gland_row_shift(k, gy) * GLAND_CELL_UM
            i0, i1 = _lattice(left - shift, right - shift, GLAND_CELL_UM)
            for gx in range(i0, i1):
                if _gland(k, gx, gy, gland, scratch):
                    n = _n_gland_nuclei(k, gland)
                    for i in range(n):
                        _gland_nucleus(k, gland, i, n, nucleus)
                        if left <= nucleus[0] < right and top <= nucleus[1] < bottom:
                            out[p] += 1.0
    return out


# ---------------------------------------------------------------------------------------------- drawing

# layers that objects draw on: nuclear hematoxylin, nuclear cover, cytoplasm, lumen, epithelium
N_LAYERS = 5


@_jit
def _draw_nucleus(k: Any, nucleus: np.ndarray, x0: int, y0: int, layers: np.ndarray) -> None:
    x, y, long, short, ux, uy = nucleus[0], nucleus[1], nucleus[2], nucleus[3], nucleus[4], nucleus[5]
    soft = max(0.8 * nucleus[8], 0.75 * k.mpp)
    reach = (2.1 * long if nucleus[9] > 0.0 else 1.25 * long) + 2.0 * soft
    _, height, width = layers.shape
    j0, j1 = _span(x, reach, k.mpp, x0, width)
    i0, i1 = _span(y, reach, k.mpp, y0, height)
    for i in range(i0, i1):
        dy = (y0 + i + 0.5) * k.mpp - y
        for j in range(j0, j1):
            dx = (x0 + j + 0.5) * k.mpp - x
            u, v = (dx * ux + dy * uy) / long, (dy * ux - dx * uy) / short
            q = np.sqrt(u * u + v * v)
            far = q > 1.0 + 2.0 * soft / short  # where the deformed outline would intersect itself
            wobble = 1.0 + 0.10 * u * v + 0.07 * u
            if nucleus[9] > 0.0:
                cyto = nucleus[9] * _smooth(2.05, 0.9, np.sqrt(dx * dx + dy * dy) / long)
                layers[2, i, j] = max(layers[2, i, j], cyto)
            cover = 0.0 if far else _smooth(-soft, soft, (1.0 - q * wobble) * short)
            if cover <= 0.0:
                continue
            rim = 1.0 - nucleus[7] * _smooth(0.9, 0.35, q)
            chromatin = 0.78 + 0.44 * _noise(k.seed, 60, (x + dx) / 1.15, (y + dy) / 1.15)
            spot = (u - 0.25) * (u - 0.25) + (v + 0.2) * (v + 0.2)
            nucleolus = 0.5 * nucleus[7] * _smooth(0.09, 0.02, spot)
            h = cover * nucleus[6] * (rim * chromatin + nucleolus)
            layers[0, i, j] = max(layers[0, i, j], h)
            layers[1, i, j] = max(layers[1, i, j], cover)


@_jit
def _draw_gland(k: Any, gland: np.ndarray, x0: int, y0: int, layers: np.ndarray) -> None:
    x, y = gland[0], gland[1]
    reach = 1.2 * gland[2]
    soft = max(1.0, 0.75 * k.mpp)
    _, height, width = layers.shape
    j0, j1 = _span(x, reach, k.mpp, x0, width)
    i0, i1 = _span(y, reach, k.mpp, y0, height)
    for i in range(i0, i1):
        dy = (y0 + i + 0.5) * k.mpp - y
        for j in range(j0, j1):
            dx = (x0 + j + 0.5) * k.mpp - x
            r = np.sqrt(dx * dx + dy * dy) + 1e-9
            if r > reach:
                continue
            outer = _gland_radius(k, gland, dx / r, dy / r)
            inner = outer * gland[3]
            layers[4, i, j] = max(layers[4, i, j], _smooth(-soft, soft, outer - r))
            layers[3, i, j] = max(layers[3, i, j], _smooth(-soft, soft, inner - r))


@_jit
def _draw_objects(k: Any, x0: int, y0: int, layers: np.ndarray) -> None:
    _, height, width = layers.shape
    left, right = x0 * k.mpp, (x0 + width) * k.mpp
    top, bottom = y0 * k.mpp, (y0 + height) * k.mpp
    nucleus, gland, scratch = np.empty(NUCLEUS), np.empty(5), np.empty(N_FIELDS)
    fine = k.mpp <= MEAN_FIELD_MPP
    # the largest value wins wherever objects overlap, so that the order of drawing does not matter
    reach = 9.0 + k.mpp
    j0, j1 = _lattice(top - reach, bottom + reach, GLAND_CELL_UM)
    for gy in range(j0, j1):
        shift = _gland_row_shift(k, gy) * GLAND_CELL_UM
        i0, i1 = _lattice(left - reach - shift, right + reach - shift, GLAND_CELL_UM)
        for gx in range(i0, i1):
            if _gland(k, gx, gy, gland, scratch):
                _draw_gland(k, gland, x0, y0, layers)
                n = _n_gland_nuclei(k, gland) if fine else 0
                for i in range(n):
                    _gland_nucleus(k, gland, i, n, nucleus)
                    _draw_nucleus(k, nucleus, x0, y0, layers)
    if not fine:
        return
    reach = REACH_UM * k.nucleus_scale + k.mpp
    i0, i1 = _lattice(left - reach, right + reach, NUCLEUS_CELL_UM)
    j0, j1 = _lattice(top - reach, bottom + reach, NUCLEUS_CELL_UM)
    for iy in range(j0, j1):
        for ix in range(i0, i1):
            if _nucleus(k, ix, iy, nucleus, gland, scratch):
                _draw_nucleus(k, nucleus, x0, y0, layers)


@_jit
def _mean_nuclei(k: Any, f: np.ndarray) -> float:
    """Share of the area that nuclei cover on average."""
    area = f[TUMOUR] * _P_TUMOUR * 68.0 + f[STROMA] * _P_STROMA * 48.0 + f[IMMUNE] * _P_IMMUNE * 29.0
    area += f[GLAND] * _P_GLAND * 36.0 + f[FAT] * _P_FAT * 36.0
    return min(0.7, area * f[DENSITY] * k.nucleus_scale * k.nucleus_scale / (NUCLEUS_CELL_UM * NUCLEUS_CELL_UM))


@_jit
def _texture(k: Any, salt: int, x: float, y: float, size: float, memory: np.ndarray) -> float:
    """Noise around 0, faded out where pixels are too coarse for it."""
    fade = min(1.0, size / k.mpp - 1.0)
    return 0.0 if fade <= 0.0 else fade * (_noise_near(k.seed, salt, x / size, y / size, memory) - 0.5)


@_jit
def _stains(
    k: Any, x: float, y: float, f: np.ndarray, cell: np.ndarray, wall: float, memory: np.ndarray
) -> tuple[float, float]:
    """Amounts of hematoxylin and eosin at a point, from the fields and the drawn layers."""
    slow = _texture(k, 70, x, y, 7.5, memory[0])
    edge = f[DEPTH] + 10.0 * slow
    tissue = _smooth(-1.5 - k.mpp, 1.5 + k.mpp, edge)
    if tissue <= 0.0:
        return 0.0, 0.0
    fine = _texture(k, 71, x, y, 1.9, memory[1])
    p, q = -k.fibre_y * x + k.fibre_x * y + f[PSI], k.fibre_x * x + k.fibre_y * y + f[CHI]
    fibre, gap = 0.0, 0.0
    loose = f[STROMA] + 0.7 * f[GLAND] + 0.25 * f[IMMUNE]
    if loose > 0.03:
        fade = min(1.0, 3.4 / k.mpp - 0.7)
        if fade > 0.0:
            fibre = fade * (_noise_near(k.seed, 72, p / 3.4, q / 42.0, memory[2]) - 0.5)
        if k.mpp < 11.0:
            fibre += 0.8 * (_noise_near(k.seed, 73, p / 11.0, q / 110.0, memory[3]) - 0.5)
        if f[STROMA] > 0.1 and k.mpp < 24.0:
            cleft = _noise_near(k.seed, 20, p / 24.0, q / 190.0, memory[4])
            gap = _smooth(0.72, 0.80, cleft + 0.06 * fibre) * _smooth(0.15, 0.5, f[STROMA])
    e = 0.44 * f[TUMOUR] + 0.62 * f[STROMA] + 0.34 * f[IMMUNE] + 0.50 * f[GLAND] + 0.45 * f[FAT]
    h = 0.12 * f[TUMOUR] + 0.02 * f[STROMA] + 0.16 * f[IMMUNE] + 0.04 * f[GLAND] + 0.02 * f[FAT]
    e += loose * 0.62 * fibre + 0.34 * slow + 0.22 * fine
    h += 0.10 * slow + 0.05 * fine
    cyto = cell[2] * (0.8 + 0.9 * slow)
    e += 0.16 * cyto
    h += 0.13 * cyto
    if f[TUMOUR] > 0.3:  # gaps between cells without cytoplasm
        gap = max(gap, 0.6 * _smooth(0.3, 0.7, f[TUMOUR]) * (1.0 - cell[2]) * _smooth(0.0, 0.3, slow))
    e += (0.56 + 0.3 * slow - e) * cell[4]
    h += (0.22 + 0.1 * fine - h) * cell[4]
    if wall > 0.0:
        gap = max(gap, 0.97 * _smooth(0.4 - 0.3 * k.mpp, 1.5 + 0.5 * k.mpp, wall))
    gap = max(gap * (1.0 - cell[4]), 0.93 * cell[3])
    e, h = max(e, 0.05) * (1.0 - gap), max(h, 0.0) * (1.0 - gap)
    cover, nuclear = cell[1], cell[0]
    if k.mpp > MEAN_FIELD_MPP:
        cover = _mean_nuclei(k, f) * (1.0 - gap)
        nuclear = 0.8 * cover
    e *= 1.0 - 0.6 * cover
    h += 1.2 * nuclear - h * cover
    # the border of tissue stains more
    rim = 1.0 + 0.35 * _smooth(26.0, 0.0, edge)
    return tissue * h * rim, tissue * e * rim


@_jit
def _light(
    k: Any, x0: int, y0: int, width: int, height: int, stains: np.ndarray, white: np.ndarray, table: np.ndarray
) -> np.ndarray:
    """Return the transmitted light by the Beer-Lambert law, (3, y, x)."""
    layers = np.zeros((N_LAYERS, height, width), np.float32)
    _draw_objects(k, x0, y0, layers)
    step = max(GRID_UM, 2.0 * k.mpp)
    gx, gy = np.int64(np.floor(x0 * k.mpp / step)), np.int64(np.floor(y0 * k.mpp / step))
    nx = np.int64(np.floor((x0 + width) * k.mpp / step)) - gx + 2
    ny = np.int64(np.floor((y0 + height) * k.mpp / step)) - gy + 2
    grid = _grid(k, step, gx, gy, nx, ny)
    margin = 1.5 * FAT_CELL_UM + FAT_BEND * 300.0
    i0, j0 = np.int64((x0 * k.mpp - margin) // FAT_CELL_UM), np.int64((y0 * k.mpp - margin) // FAT_CELL_UM)
    i1 = np.int64(((x0 + width) * k.mpp + margin) // FAT_CELL_UM) + 2
    j1 = np.int64(((y0 + height) * k.mpp + margin) // FAT_CELL_UM) + 2
    fat = _fat_cells(k, i0, j0, i1, j1)
    f, cell, memory = np.empty(N_FIELDS), np.empty(N_LAYERS), np.full((5, 6), np.inf)
    out = np.empty((3, height, width), np.float32)
    last = np.float32(table.size - 1)
    for i in range(height):
        y = (y0 + i + 0.5) * k.mpp
        fy = np.floor(y / step)
        iy, v = np.int64(fy) - gy, y / step - fy
        for j in range(width):
            x = (x0 + j + 0.5) * k.mpp
            fx = np.floor(x / step)
            ix, u = np.int64(fx) - gx, x / step - fx
            for c in range(N_FIELDS):
                a = grid[iy, ix, c] + (grid[iy, ix + 1, c] - grid[iy, ix, c]) * u
                b = grid[iy + 1, ix, c] + (grid[iy + 1, ix + 1, c] - grid[iy + 1, ix, c]) * u
                f[c] = a + (b - a) * v
            for c in range(N_LAYERS):
                cell[c] = layers[c, i, j]
            wall = -1.0
            if f[FAT] > 0.03:
                wall = _fat_wall(x + FAT_BEND * f[PSI], y + FAT_BEND * f[CHI], fat, i0, j0)
            h, e = _stains(k, x, y, f, cell, wall, memory)
            for c in range(3):
                od = min(np.float32(h) * stains[0, c] + np.float32(e) * stains[1, c], last)
                out[c, i, j] = white[c] * table[np.int64(od)]
    return out


@_jit
def render(
    k: Any,
    x0: int,
    y0: int,
    stains: np.ndarray,
    white: np.ndarray,
    table: np.ndarray,
    side: float,
    noise: float,
    out: np.ndarray,
) -> None:
    """Render a rectangle into `out` (3, y, x): light, blur by a 3 x 3 kernel, sensor noise."""
    _, height, width = out.shape
    light = _light(k, x0 - 1, y0 - 1, width + 2, height + 2, stains, white, table)
    mid = 1.0 - 2.0 * side
    unit = noise / 26754.0  # the sum of two uniform 16-bit numbers has this standard deviation
    for i in range(height):
        for j in range(width):
            bits = _hash(k.seed, 80, x0 + j, y0 + i)
            shared = np.float64(bits & _LOW16)
            for c in range(3):
                bits = bits >> _S16
                p = light[c]
                above = side * p[i, j] + mid * p[i, j + 1] + side * p[i, j + 2]
                here = side * p[i + 1, j] + mid * p[i + 1, j + 1] + side * p[i + 1, j + 2]
                below = side * p[i + 2, j] + mid * p[i + 2, j + 1] + side * p[i + 2, j + 2]
                value = side * above + mid * here + side * below
                value += unit * (shared + np.float64(bits & _LOW16) - 65535.0)
                out[c, i, j] = np.uint8(min(max(value + 0.5, 0.0), 255.0))
