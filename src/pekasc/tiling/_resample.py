"""Kernels that resample a window of image pixels to one tile.

A window is a C-contiguous (3, height, width) uint8 array clipped to the image, so that pixels outside of the window are
outside of the image and white. Positions are in window pixels: pixel ``i`` covers ``[i, i + 1)``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

WHITE = 255
# edges this close to a pixel border are on it: absorbs rounding of coordinates, far below a grey level
SNAP_PX = 1e-6
# 0.5 to round to the nearest grey level, and a little more, since ties would be rounded down in single precision
HALF = np.float32(0.5 + 5e-5)


@njit(nogil=True, cache=True)
def _snap(value: float) -> float:
    nearest = math.floor(value + 0.5)
    return nearest if abs(value - nearest) < SNAP_PX else value


@njit(nogil=True, cache=True)
def _axis_weights(first, step, n_out, size):  # type: ignore[no-untyped-def]
    """Weights of the window's pixels along one axis, per output pixel.

    Output pixel ``k`` covers ``first + k * step`` to ``first + (k + 1) * step`` (``step`` < 0 for a flip). Steps of one
    pixel or more: overlap lengths. Shorter steps: the two taps of linear interpolation at the pixel's centre, clamped
    to the image. ``inside`` is the sum of the weights: 1, or less where a part lies outside of the image.
    """
    length = abs(step)
    start = np.zeros(n_out, np.int64)
    count = np.zeros(n_out, np.int64)
    weight = np.zeros((n_out, int(length) + 3), np.float32)
    inside = np.zeros(n_out, np.float64)
    for k in range(n_out):
        if length >= 1 - 2 * SNAP_PX:
            low = _snap(first + k * step)
            high = _snap(first + (k + 1) * step)
            if low > high:
                low, high = high, low
            share = 1 / (high - low)
            low = max(low, 0.0)
            high = min(high, float(size))
            if high <= low:
                continue
            inside[k] = (high - low) * share if high - low < length - SNAP_PX else 1.0
            start[k] = int(math.floor(low))
            count[k] = int(math.ceil(high)) - start[k]
            for t in range(count[k]):
                pixel = start[k] + t
                weight[k, t] = (min(pixel + 1.0, high) - max(float(pixel), low)) * share
        else:
            centre = first + (k + 0.5) * step
            if centre < 0 or centre >= size:
                continue
            inside[k] = 1.0
            left = int(math.floor(centre - 0.5))
            fraction = centre - 0.5 - left
            if left < 0:
                left, fraction = 0, 0.0
            if left + 1 >= size:
                left, fraction = size - 1, 0.0
            start[k] = left
            weight[k, 0] = 1.0 - fraction
            count[k] = 1
            if fraction > 0:
                weight[k, 1] = fraction
                count[k] = 2
    return start, count, weight, inside


@njit(nogil=True, cache=True)
def _widen(window, y, x_start, x_count, x_weight, line):  # type: ignore[no-untyped-def]
    """Interpolate one row of the window along x into ``line``, with interleaved channels."""
    red, green, blue = window[0, y], window[1, y], window[2, y]
    for m in range(x_start.size):
        left = x_start[m]
        right = left + max(x_count[m] - 1, 0)
        w0, w1 = x_weight[m, 0], x_weight[m, 1]
        line[3 * m] = w0 * np.float32(red[left]) + w1 * np.float32(red[right])
        line[3 * m + 1] = w0 * np.float32(green[left]) + w1 * np.float32(green[right])
        line[3 * m + 2] = w0 * np.float32(blue[left]) + w1 * np.float32(blue[right])


@njit(nogil=True, cache=True)
def _interpolate_axes(window, x_first, x_step, y_first, y_step, swapped, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` if both axes are upscaled: rows of the window are interpolated along x once, then along y.

    Rows have interleaved channels, which vectorises best.
    """
    n_out = out.shape[0]
    _, height, width = window.shape
    x_start, x_count, x_weight, x_inside = _axis_weights(x_first, x_step, n_out, width)
    y_start, y_count, y_weight, y_inside = _axis_weights(y_first, y_step, n_out, height)
    inside = np.repeat(x_inside.astype(np.float32), 3)
    # the two window rows around an output row: one is even, the other odd
    lines = np.zeros((2, 3 * n_out), np.float32)
    held = np.full(2, -1, np.int64)
    rows = out.reshape(n_out, 3 * n_out)
    swapped_row = np.empty(3 * n_out, np.uint8)
    full = np.float32(WHITE) + HALF
    for k in range(n_out):
        upper = y_start[k]
        lower = upper + max(y_count[k] - 1, 0)
        for y in (upper, lower):
            if held[y % 2] != y:
                _widen(window, y, x_start, x_count, x_weight, lines[y % 2])
                held[y % 2] = y
        a, b = lines[upper % 2], lines[lower % 2]
        w0, w1 = y_weight[k, 0], y_weight[k, 1]
        known = np.float32(WHITE * y_inside[k])
        row = swapped_row if swapped else rows[k]
        for i in range(3 * n_out):
            row[i] = np.uint8(w0 * a[i] + w1 * b[i] + (full - known * inside[i]))
        if swapped:
            for m in range(n_out):
                for c in range(3):
                    out[m, k, c] = row[3 * m + c]


@njit(nogil=True, cache=True)
def resample_axes(window, x_first, x_step, y_first, y_step, swapped, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` (n, n, 3) for a tile aligned with the image's axes, which are resampled independently.

    ``swapped``: the tile's rows run along the image's x axis.
    """
    if abs(x_step) < 1 - 2 * SNAP_PX and abs(y_step) < 1 - 2 * SNAP_PX:
        _interpolate_axes(window, x_first, x_step, y_first, y_step, swapped, out)
        return
    n_out = out.shape[0]
    _, height, width = window.shape
    x_start, x_count, x_weight, x_inside = _axis_weights(x_first, x_step, n_out, width)
    y_start, y_count, y_weight, y_inside = _axis_weights(y_first, y_step, n_out, height)
    lines = np.empty((3, width), np.float32)
    for k in range(n_out):
        lines[:] = 0
        for t in range(y_count[k]):
            factor = y_weight[k, t]
            for c in range(3):
                row = window[c, y_start[k] + t]
                for x in range(width):
                    lines[c, x] += factor * np.float32(row[x])
        for m in range(n_out):
            white = np.float32(WHITE * (1.0 - y_inside[k] * x_inside[m]))
            red, green, blue = white, white, white
            for t in range(x_count[m]):
                x = x_start[m] + t
                factor = x_weight[m, t]
                red += factor * lines[0, x]
                green += factor * lines[1, x]
                blue += factor * lines[2, x]
            i, j = (m, k) if swapped else (k, m)
            out[i, j, 0] = np.uint8(red + HALF)
            out[i, j, 1] = np.uint8(green + HALF)
            out[i, j, 2] = np.uint8(blue + HALF)


@njit(nogil=True, cache=True)
def split_channels(pixels, out):  # type: ignore[no-untyped-def]
    """Copy red, green and blue of C-contiguous pixels (height, width, 3) into ``out`` (3, height, width).

    Flat arrays let the compiler vectorise it, which takes a tenth of numpy's time.
    """
    n = out.shape[1] * out.shape[2]
    flat = pixels.reshape(3 * n)
    channels = out.reshape(3, n)
    red, green, blue = channels[0], channels[1], channels[2]
    for i in range(n):
        red[i] = flat[3 * i]
        green[i] = flat[3 * i + 1]
        blue[i] = flat[3 * i + 2]


@njit(nogil=True, cache=True)
def copy_axes(window, x_first, x_step, y_first, y_step, swapped, out):  # type: ignore[no-untyped-def]
    """Copy pixels into ``out`` (n, n, 3): whole-pixel shifts at scale 1, flips and rotations by 90 degrees.

    ``x_first`` and ``y_first`` are the window pixel of the first output pixel, the steps are 1 or -1.
    """
    n_out = out.shape[0]
    _, height, width = window.shape
    for k in range(n_out):
        y = y_first + k * y_step
        for m in range(n_out):
            x = x_first + m * x_step
            known = 0 <= y < height and 0 <= x < width
            for c in range(3):
                grey = window[c, y, x] if known else np.uint8(WHITE)
                if swapped:
                    out[m, k, c] = grey
                else:
                    out[k, m, c] = grey


@njit(nogil=True, cache=True)
def resample_affine(window, origin_x, origin_y, matrix, samples_x, samples_y, box, out):  # type: ignore[no-untyped-def]
    """Fill ``out`` (n, n, 3) under any affine by the mean of ``samples_x * samples_y`` samples per output pixel.

    A sample is the exact mean of the image over an axis-aligned square of side ``box`` <= 1: bilinear interpolation for
    ``box = 1``. If ``box`` is the distance of the samples, their squares tile the output pixel, so that the mean
    approximates the area average, and equals it without rotation.
    """
    n_out = out.shape[0]
    _, height, width = window.shape
    share = np.float32(1 / (samples_x * samples_y))
    white = np.float32(WHITE)
    one = np.float32(1)
    half = box / 2
    per_box = 1 / box
    r, g, b = window[0], window[1], window[2]
    for i in range(n_out):
        for j in range(n_out):
            red = np.float32(0)
            green = np.float32(0)
            blue = np.float32(0)
            for q in range(samples_y):
                v = i + (q + 0.5) / samples_y
                for p in range(samples_x):
                    u = j + (p + 0.5) / samples_x
                    x = origin_x + matrix[0, 0] * u + matrix[0, 1] * v
                    y = origin_y + matrix[1, 0] * u + matrix[1, 1] * v
                    if x < 0 or y < 0 or x >= width or y >= height:
                        red += white
                        green += white
                        blue += white
                        continue
                    left = math.floor(x - half)
                    upper = math.floor(y - half)
                    right_part = np.float32(max(x + half - left - 1, 0.0) * per_box)
                    lower_part = np.float32(max(y + half - upper - 1, 0.0) * per_box)
                    # unsigned, so that numba does not check for negative indices
                    x0 = np.uint64(max(left, 0))
                    x1 = np.uint64(min(left + 1, width - 1))
                    y0 = np.uint64(max(upper, 0))
                    y1 = np.uint64(min(upper + 1, height - 1))
                    w11 = right_part * lower_part
                    w01 = right_part - w11
                    w10 = lower_part - w11
                    w00 = one - right_part - w10
                    red += w00 * r[y0, x0] + w01 * r[y0, x1] + w10 * r[y1, x0] + w11 * r[y1, x1]
                    green += w00 * g[y0, x0] + w01 * g[y0, x1] + w10 * g[y1, x0] + w11 * g[y1, x1]
                    blue += w00 * b[y0, x0] + w01 * b[y0, x1] + w10 * b[y1, x0] + w11 * b[y1, x1]
            out[i, j, 0] = np.uint8(red * share + HALF)
            out[i, j, 1] = np.uint8(green * share + HALF)
            out[i, j, 2] = np.uint8(blue * share + HALF)
