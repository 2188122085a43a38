"""Draws panoptic, instance and semantic results over a picture. Needs numpy and OpenCV only.

Every kind of result becomes one map of segment numbers (0 is nothing), so that fill, outlines and labels
cost a few passes over the picture however many segments there are.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, cast

import cv2
import numpy as np
import numpy.typing as npt

from mask2former.evaluation.panoptic_quality import SegmentLike
from mask2former.label_drawing import Box, Color, Image, draw_label, mixed, place

Index = npt.NDArray[np.uint16]  # (H, W), n for the n-th segment and 0 for none
_ID_LIMIT = 1 << 24  # what a panoptic PNG holds; bounds the look-up table


class CategoryLike(Protocol):
    """What drawing needs to know of a category; ``color`` is (r, g, b) in 0..255."""

    @property
    def name(self) -> str: ...
    @property
    def color(self) -> Sequence[int]: ...
    @property
    def is_thing(self) -> bool: ...


class _Part(NamedTuple):
    """One segment to draw: its colour, the text of its label and its score."""

    color: Color
    text: str
    score: float | None


class Visualizer:
    """Paints segments in their category's colour, with outlines and labels inside the segments.

    Instances of one category get clearly different shades, in an order that is always the same; of all hues where
    there is a single category, whose name then says nothing, so that there are no labels either. Every
    method returns a new (H, W, 3) uint8 RGB array and leaves its inputs alone; pixels without a segment
    stay as they are, except under labels and frames. A wrong dtype is a TypeError, a wrong shape or value
    (a grey picture, an id not listed, a category out of range) a ValueError; both name the argument.

    Args:
        categories: the contiguous categories; their position is the category id.
        alpha: opacity of the fill, 0 to 1.
        label_scale: size of the labels relative to the normal one, which grows with the picture; 0: none. None: 1, or
            0 with a single category.
    """

    def __init__(self, categories: Sequence[CategoryLike], *, alpha: float = 0.5, label_scale: float | None = None):
        if not categories:
            raise ValueError("categories must hold at least one category, got none")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if label_scale is None:
            label_scale = 0.0 if len(categories) == 1 else 1.0
        if not 0 <= label_scale < float("inf"):
            raise ValueError(f"label_scale must be finite and not negative, got {label_scale}")
        for i, category in enumerate(categories):
            if len(category.color) != 3 or not all(0 <= c <= 255 for c in category.color):
                raise ValueError(f"categories[{i}].color must be (r, g, b) in 0..255, got {category.color}")
        self.categories = tuple(categories)
        self.alpha = float(alpha)
        self.label_scale = float(label_scale)

    def draw_panoptic(
        self,
        image: Image,
        ids: npt.ArrayLike,
        segments: Sequence[Mapping[str, Any] | SegmentLike],
        *,
        tracked: bool = False,
    ) -> Image:
        """Draws a panoptic result.

        Args:
            image: (H, W, 3) uint8 RGB.
            ids: (H, W) integers below 2**24, 0 is void.
            segments: mappings or objects with ``id``, ``category_id`` and, optionally, ``score``.
            tracked: ids persist over the frames of a video: the shade of a thing follows from its id, so that it
                stays the same, and its label shows the id instead of the score.
        """
        canvas = _checked_copy(image)
        id_map = _checked_map("ids", ids, canvas)
        if id_map.size and (int(id_map.min()) < 0 or int(id_map.max()) >= _ID_LIMIT):
            raise ValueError(f"ids must be in [0, 2**24), got {id_map.min()} to {id_map.max()}")
        table = np.zeros(_ID_LIMIT, np.uint16)  # the system gives zero pages only where it is touched
        listed, categories, scores = [], [], []
        for number, segment in enumerate(segments, start=1):
            segment_id, score = int(_field(segment, "id")), _field(segment, "score", None)
            if not 0 < segment_id < _ID_LIMIT:
                raise ValueError(f"segments: ids must be in [1, 2**24) since 0 is void, got {segment_id}")
            if table[segment_id]:
                raise ValueError(f"segments: every id may be listed once, got {segment_id} twice")
            table[segment_id] = number
            listed.append(segment_id)
            categories.append(int(_field(segment, "category_id")))
            scores.append(None if score is None else float(score))
        index = table[id_map]
        if (unlisted := (index == 0) & (id_map != 0)).any():
            raise ValueError(f"ids: segments does not list {np.unique(id_map[unlisted])[:10].tolist()}")
        return self._paint_map(canvas, index, self._parts("segments", categories, scores, listed if tracked else None))

    def draw_instances(
        self,
        image: Image,
        labels: npt.ArrayLike,
        scores: npt.ArrayLike | None,
        masks: npt.ArrayLike,
        boxes: npt.ArrayLike | None = None,
    ) -> Image:
        """Draws instances, large ones below small ones and, at equal size, the best on top.

        Args:
            image: (H, W, 3) uint8 RGB.
            labels: (N,) categories.
            scores: (N,) shown in the labels, or None.
            masks: (N, H, W) bool.
            boxes: (N, 4) x1, y1, x2, y2 in pixels, drawn as thin frames, or None.
        """
        canvas, mask_array = _checked_copy(image), np.ascontiguousarray(masks)
        if mask_array.dtype != np.bool_:
            raise TypeError(f"masks must be bool, got dtype {mask_array.dtype}")
        count = len(mask_array)
        _check_shape("masks", mask_array, (count, *canvas.shape[:2]))
        label_array = np.asarray(labels, dtype=None if count else np.int64)
        _check_shape("labels", label_array, (count,))
        if label_array.dtype.kind not in "iu":
            raise TypeError(f"labels must be integers, got dtype {label_array.dtype}")
        score_list: list[float | None] = [None] * count
        if scores is not None:
            score_list = _checked_floats("scores", scores, (count,)).tolist()
        parts = self._parts("labels", label_array.tolist(), score_list)
        index = self._paint_instances(canvas, mask_array, parts)
        if boxes is not None:
            for part, box in zip(parts, _checked_floats("boxes", boxes, (count, 4)), strict=True):
                _frame(canvas, box, part.color)
        self._label(canvas, index, parts)
        return canvas

    def draw_semantic(self, image: Image, label_map: npt.ArrayLike, *, ignore_label: int = 255) -> Image:
        """Draws a semantic result, with one label per class.

        Args:
            image: (H, W, 3) uint8 RGB.
            label_map: (H, W) integers in [0, K), or ``ignore_label``, which is left unpainted.
            ignore_label: the value that means "no class".
        """
        canvas = _checked_copy(image)
        labels = _checked_map("label_map", label_map, canvas)
        painted = labels != ignore_label
        present = np.unique(labels[painted])
        parts = self._parts("label_map", present.tolist(), [None] * len(present))
        table = np.zeros(len(self.categories), np.uint16)
        table[present] = np.arange(1, len(present) + 1)
        index = table[np.where(painted, labels, 0)] * painted.astype(np.uint16)
        return self._paint_map(canvas, index, parts)

    def _parts(
        self, name: str, categories: Sequence[int], scores: Sequence[float | None], tracks: Sequence[int] | None = None
    ) -> list[_Part]:
        """Colour and label text of each segment.

        The n-th segment of a category gets its n-th shade, and the track n of things as well.
        """
        if len(categories) > np.iinfo(np.uint16).max:
            raise ValueError(f"{name}: at most 65535 segments can be drawn, got {len(categories)}")
        occurrences: dict[int, int] = {}
        parts = []
        for i, (category_id, score) in enumerate(zip(categories, scores, strict=True)):
            if not 0 <= category_id < len(self.categories):
                limit = len(self.categories)
                raise ValueError(f"{name}: categories must be in [0, {limit}), got {category_id}")
            category = self.categories[category_id]
            number = occurrences.get(category_id, 0)
            occurrences[category_id] = number + 1
            shades = _shades(cast(Color, tuple(int(c) for c in category.color)), len(self.categories) == 1)
            text = category.name
            if tracks is not None and category.is_thing:
                number, text = tracks[i] - 1, f"{text} {tracks[i]}"
            elif score is not None and category.is_thing:
                text = f"{text} {score:.0%}"
            parts.append(_Part(shades[number % len(shades)], text, score))
        return parts

    def _paint_map(self, canvas: Image, index: Index, parts: list[_Part]) -> Image:
        colors = _palette(parts)
        _fill(canvas, index, colors, self.alpha)
        _outline(canvas, index, colors, _thickness(canvas))
        self._label(canvas, index, parts)
        return canvas

    def _paint_instances(self, canvas: Image, masks: npt.NDArray[np.bool_], parts: list[_Part]) -> Index:
        """Fills and outlines instances; returns the map of what is visible of each."""
        index = np.zeros(canvas.shape[:2], np.uint16)
        areas = [np.count_nonzero(mask) for mask in masks]
        order = sorted(range(len(masks)), key=lambda i: (-areas[i], parts[i].score or 0.0))
        crops: dict[int, tuple[slice, slice]] = {}
        colors, thickness = _palette(parts), _thickness(canvas)
        for i in order:
            x, y, width, height = cv2.boundingRect(masks[i].view(np.uint8))
            # With a margin, for an outline needs to see both of its sides.
            rows = slice(max(0, y - thickness), y + height + thickness)
            crops[i] = rows, slice(max(0, x - thickness), x + width + thickness)
            index[crops[i]][masks[i][crops[i]]] = i + 1
        _fill(canvas, index, colors, self.alpha)
        for i in order:  # also where something covers the instance
            own = np.where(masks[i][crops[i]], np.uint16(i + 1), np.uint16(0))
            _outline(canvas[crops[i]], own, colors, thickness)
        return index

    def _label(self, canvas: Image, index: Index, parts: list[_Part]) -> None:
        """Puts labels on the segments, large segments first."""
        height, width = index.shape
        text_height = self.label_scale * max(9.0, 0.0185 * (height * width) ** 0.5)
        if not parts or text_height < 4:
            return
        stride = max(1, min(height, width) // 200)
        small = np.ascontiguousarray(index[::stride, ::stride])
        areas = np.bincount(small.reshape(-1), minlength=len(parts) + 1)[1:]
        placed: list[Box] = []
        for i in np.argsort(-areas, kind="stable")[: np.count_nonzero(areas)].tolist():
            mask = (small == i + 1).view(np.uint8)
            found = place(mask, stride, parts[i].text, text_height, index.shape, placed)
            if found is not None:
                x, y, ink = found
                placed.append((x, y, ink.shape[1], ink.shape[0]))
                draw_label(canvas, x, y, ink, parts[i].color)


def _checked_copy(image: Image) -> Image:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = f"dtype {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"image must be a uint8 array, got {kind}")
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 1):
        advice = "repeat its channel, as cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) does"
        raise ValueError(f"image must be (H, W, 3) RGB, got a grey picture {image.shape}; {advice}")
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be (H, W, 3) RGB with at least one pixel, got {image.shape}")
    return np.array(image, order="C")


def _checked_map(name: str, values: npt.ArrayLike, canvas: Image) -> npt.NDArray[np.integer]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got dtype {array.dtype}")
    _check_shape(name, array, canvas.shape[:2])
    return array


def _check_shape(name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def _checked_floats(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).reshape(shape if 0 in shape else np.shape(values))
    _check_shape(name, array, shape)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    return array


def _field(segment: Mapping[str, Any] | SegmentLike, name: str, *default: Any) -> Any:
    if isinstance(segment, Mapping):
        return segment.get(name, *default) if default else segment[name]
    return getattr(segment, name, *default)


@lru_cache(maxsize=1024)
def _shades(color: Color, all_hues: bool = False) -> tuple[Color, ...]:
    """The colour itself, then variations, each as far as possible from all before it (in CIELAB)."""
    lab = cv2.cvtColor(np.array([[color]], np.float32) / 255, cv2.COLOR_RGB2LAB)[0, 0].astype(float)
    chroma, hue = float(np.hypot(lab[1], lab[2])), float(np.arctan2(lab[2], lab[1]))
    keeps_hue = chroma > 12 and not all_hues  # a grey has none to keep
    turns = [-30, -15, 0, 15, 30] if keeps_hue else [-144, -72, 0, 72, 144]
    light, turn, strength = np.meshgrid(
        np.clip(min(max(lab[0], 50), 70) + np.array([-18, 0, 18, 32]), 35, 88),
        hue + np.radians(turns),
        max(chroma, 30) * np.array([0.75, 1.1]),
    )
    candidates = np.stack([light, strength * np.cos(turn), strength * np.sin(turn)], -1)
    rgb = cv2.cvtColor(candidates.reshape(1, -1, 3).astype(np.float32), cv2.COLOR_LAB2RGB)
    rgb = np.clip(np.rint(rgb * 255), 0, 255)
    points = cv2.cvtColor((rgb / 255).astype(np.float32), cv2.COLOR_RGB2LAB)[0]  # after clipping to RGB
    chosen, distance = [color], np.linalg.norm(points - lab, axis=-1)
    while distance.max() > 8:
        best = int(distance.argmax())
        chosen.append(cast(Color, tuple(int(c) for c in rgb[0, best])))
        distance = np.minimum(distance, np.linalg.norm(points - points[best], axis=-1))
    return tuple(chosen)


def _palette(parts: Sequence[_Part]) -> Image:
    return np.array([(0, 0, 0), *(part.color for part in parts)], np.uint8)


def _fill(canvas: Image, index: Index, colors: Image, alpha: float) -> None:
    overlay = np.take(colors, index, axis=0)
    blended = cv2.addWeighted(canvas, 1 - alpha, overlay, alpha, 0)
    cv2.copyTo(blended, (index > 0).view(np.uint8), canvas)


def _thickness(canvas: Image) -> int:
    """Of the outline, on each side of a border."""
    return max(1, round((canvas.shape[0] * canvas.shape[1]) ** 0.5 / 900))


def _outline(canvas: Image, index: Index, colors: Image, thickness: int) -> None:
    """Draws along the inner side of every segment's border, in a light shade of its colour."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * thickness + 1,) * 2)
    border = cv2.dilate(index, kernel) != cv2.erode(index, kernel)
    border &= index > 0
    light = np.rint(colors + (255 - colors.astype(np.float32)) * 0.45).astype(np.uint8)
    canvas[border] = light[index[border]]


def _frame(canvas: Image, box: npt.NDArray[np.float64], color: Color) -> None:
    x0, y0, x1, y1 = np.clip(np.rint(box), 0, canvas.shape[1::-1] * 2).astype(int).tolist()
    if x1 > x0 and y1 > y0:
        cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), mixed(color, 255, 0.3), _thickness(canvas))
