"""Text labels on pictures: drawn, and put where a segment has room for them. Needs numpy and OpenCV only."""

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]
Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # x, y, width, height in pixels
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_LABEL_SIZES = (1.0, 0.88, 0.78)  # of the normal text size, tried in this order


def mixed(color: Sequence[int], other: int, amount: float) -> Color:
    """The colour moved towards grey level ``other`` by ``amount`` in [0, 1]."""
    return cast(Color, tuple(round(c + (other - c) * amount) for c in color))


@lru_cache(maxsize=1024)
def text_mask(text: str, height: float) -> Image:
    """The label's text (h, w) in 0..255 with its margin; ``height`` is that of a capital letter in pixels.

    Drawn twice as large and shrunk: OpenCV 4 has stroke fonts that look ragged at label size.
    """
    scale = 2 * height / cv2.getTextSize("H", _FONT, 1.0, 1)[0][1]
    width = cv2.getTextSize(text, _FONT, scale, 1)[0][0]
    room, baseline = round(2 * height), round(4 * height)
    large = np.zeros((2 * baseline, width + 2 * room), np.uint8)
    cv2.putText(large, text, (room, baseline), _FONT, scale, 255, max(1, round(height / 5)), cv2.LINE_AA)
    columns = np.flatnonzero(large.any(0))
    left, right = (int(columns[0]), int(columns[-1]) + 1) if columns.size else (0, 1)
    above, below = round(1.35 * height), round(0.55 * height)  # of the baseline, in the final size
    ink = large[baseline - 2 * above : baseline + 2 * below, left:right]
    size = (max(1, round((right - left) / 2)), above + below)
    shrunk = np.asarray(cv2.resize(ink, size, interpolation=cv2.INTER_AREA), np.uint8)
    mask = np.pad(shrunk, ((0, 0), (max(2, round(height * 0.55)),) * 2))
    mask.flags.writeable = False  # it is cached
    return mask


def place(
    mask: Image, stride: int, text: str, text_height: float, shape: tuple[int, ...], placed: list[Box]
) -> tuple[int, int, Image] | None:
    """Finds where a label has most room inside the largest part of a segment, clear of other labels.

    ``mask`` (h, w) holds every ``stride``-th pixel of the picture of size ``shape``. Returns the left and
    upper end of the label and its text mask, or None if there is too little room.
    """
    component, left, top = _largest_component(mask)
    area = cv2.countNonZero(component) * stride * stride
    for relative in _LABEL_SIZES:
        ink = text_mask(text, round(text_height * relative, 1))
        h, w = ink.shape
        hides = h * w > 0.6 * area and relative > _LABEL_SIZES[-1]
        if hides or h > shape[0] or w > shape[1]:
            continue
        step = max(1, round(w / h))
        squeezed = np.pad(component[:, ::step], 1)  # in it a label is a square
        room = np.asarray(cv2.distanceTransform(squeezed, cv2.DIST_C, 3))[1:-1, 1:-1]  # half its side
        ys = np.clip((top + np.arange(room.shape[0])) * stride - h // 2, 0, shape[0] - h)
        xs = np.clip((left + np.arange(room.shape[1]) * step) * stride - w // 2, 0, shape[1] - w)
        for x, y, width, height in placed:
            free_x, free_y = (xs > x + width) | (xs + w < x), (ys > y + height) | (ys + h < y)
            if not (free_x.all() or free_y.all()):
                room = room * (free_x | free_y[:, None])
        row, column = divmod(int(room.argmax()), room.shape[1])
        if 2 * room[row, column] * stride >= 0.45 * h:
            return int(xs[column]), int(ys[row]), ink
    return None


def _largest_component(mask: Image) -> tuple[Image, int, int]:
    """Crops the largest connected part of a mask; also returns the crop's left and upper end."""
    left, top, width, height = cv2.boundingRect(mask)
    crop = mask[top : top + height, left : left + width]
    count, numbers, stats, _ = cv2.connectedComponentsWithStats(crop)
    if count <= 2:
        return crop, left, top
    best = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    x, y, w, h = stats[best, :4].tolist()
    part = numbers[y : y + h, x : x + w] == best
    return np.asarray(part, np.uint8), left + x, top + y


@lru_cache(maxsize=256)
def _rounded(height: int, width: int) -> npt.NDArray[np.float32]:
    """Coverage (h, w) in 0..1 of a rectangle with round corners."""
    radius = 0.28 * height
    y = np.maximum(np.abs(np.arange(height) + 0.5 - height / 2) - height / 2 + radius, 0)
    x = np.maximum(np.abs(np.arange(width) + 0.5 - width / 2) - width / 2 + radius, 0)
    return np.clip(radius + 0.5 - np.hypot(y[:, None], x), 0, 1).astype(np.float32)


def draw_label(canvas: Image, x: int, y: int, ink: Image, color: Color) -> None:
    """Draw a text mask from `place` with its left and upper end at (x, y): light on a dark tint of the colour."""
    view = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
    dark, light = (np.array(c, np.float32) for c in (mixed(color, 12, 0.84), mixed(color, 255, 0.92)))
    blended = view + (dark - view) * (_rounded(*ink.shape)[..., None] * np.float32(0.78))
    blended += (light - blended) * (ink[..., None] * np.float32(1 / 255))
    view[:] = np.rint(blended).astype(np.uint8)
