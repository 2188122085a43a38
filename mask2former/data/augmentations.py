"""Training augmentations of the published configs, and the resize of their inference.

An augmentation is called with an image and a random generator and gives a `View`; targets follow through
`View.gather`. Images are RGB here, whatever the model's channel order is.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mask2former.data import color
from mask2former.data.geometry import View, resize_image

Flip = Literal["horizontal", "vertical", "none"]
CropType = Literal["absolute", "absolute_range", "relative", "relative_range"]
AnyImage = NDArray[np.uint8] | Image.Image
LabelSource = Callable[[], NDArray[np.int32]]
"""Gives the (H, W) categories of an image, -1 where there is none; called only when they are needed."""

_CROP_ATTEMPTS = 10


class Augmentation(Protocol):
    """What the mapper asks of an augmentation."""

    def __call__(self, image: AnyImage, rng: np.random.Generator, labels: LabelSource | None = None) -> View:
        """
        Args:
            image: (H, W, 3) uint8 RGB, or of Pillow's mode RGB, which is what the mapper has; not changed.
            rng: the only source of randomness.
            labels: categories of the pixels, for augmentations that look at them.
        """
        ...


def whole_image(image: AnyImage, rng: np.random.Generator, labels: LabelSource | None = None) -> View:
    """No augmentation: the image as it is."""
    return View.of(image)


class LargeScaleJitter:
    """Large-scale jittering (Ghiasi et al., "Simple Copy-Paste"): random flip, random scale, then a crop or
    padding to a fixed size.

    Args:
        image_size: side of the square result.
        min_scale: smallest factor; at 1 the image just fits into the square.
        max_scale: largest factor.
        flip: direction of the flip that half of the images get.
    """

    def __init__(self, *, image_size: int, min_scale: float, max_scale: float, flip: Flip = "horizontal") -> None:
        _check_positive("image_size", image_size)
        if not 0 < min_scale <= max_scale:
            raise ValueError(f"min_scale and max_scale must be 0 < min <= max, got {min_scale}, {max_scale}")
        self.image_size = image_size
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.flip = _checked_flip(flip)

    def __call__(self, image: AnyImage, rng: np.random.Generator, labels: LabelSource | None = None) -> View:
        """A view of (image_size, image_size); see `Augmentation`."""
        view = random_flip(View.of(image), self.flip, rng)
        scale = rng.uniform(self.min_scale, self.max_scale)
        view = view.resize(*scaled_size(view.size, (self.image_size, self.image_size), scale))
        top, left = jitter_offset(view.size, self.image_size, rng.uniform())
        view = view.crop(top, left, self.image_size, self.image_size)
        return view.pad(self.image_size, self.image_size)


class ResizeCropColor:
    """The recipe of the ADE20K, Cityscapes and Mapillary configs: random resize, random crop, colour
    distortion, random flip.

    Args:
        min_sizes: lengths of the shorter edge; one is chosen ("choice"), or two bounds of a range of whole
            numbers ("range"). 0 leaves the image's size.
        max_size: bound for the longer edge.
        sampling: how `min_sizes` is read.
        crop_type: how `crop_size` is read, see `crop_size_for`.
        crop_size: two numbers; None for no crop.
        single_category_max_area: below 1, and with labels given, up to ten crops are tried until no
            category has this share of the labelled pixels and there are at least two categories; the tenth
            is taken anyway.
        color_aug: whether to distort colours.
        flip: direction of the flip that half of the images get.
    """

    def __init__(
        self,
        *,
        min_sizes: Sequence[int],
        max_size: int,
        sampling: Literal["choice", "range"] = "choice",
        crop_type: CropType = "absolute",
        crop_size: tuple[float, float] | None = None,
        single_category_max_area: float = 1.0,
        color_aug: bool = True,
        flip: Flip = "horizontal",
    ) -> None:
        if sampling not in ("choice", "range"):
            raise ValueError(f"sampling must be 'choice' or 'range', got {sampling!r}")
        if not min_sizes or min(min_sizes) < 0 or (sampling == "range" and len(min_sizes) != 2):
            raise ValueError(
                "min_sizes must hold sizes >= 0, and exactly two when sampling is 'range'; "
                f"got {list(min_sizes)} with {sampling!r}"
            )
        _check_positive("max_size", max_size)
        if crop_size is not None:
            _check_crop(crop_type, crop_size)
        if not 0 < single_category_max_area <= 1:
            raise ValueError(f"single_category_max_area must be in (0, 1], got {single_category_max_area}")
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.sampling = sampling
        self.crop_type: CropType = crop_type
        self.crop_size = crop_size
        self.single_category_max_area = single_category_max_area
        self.color_aug = color_aug
        self.flip = _checked_flip(flip)

    def __call__(self, image: AnyImage, rng: np.random.Generator, labels: LabelSource | None = None) -> View:
        """A view of the crop's size, or smaller where the resized image is; see `Augmentation`."""
        view = View.of(image)
        if shortest := self._shortest(rng):
            view = view.resize(*shortest_edge_size(view.size, shortest, self.max_size))
        if self.crop_size is not None:
            view = view.crop(*self._window(view, self.crop_size, rng, labels))
        if self.color_aug:
            view = view.with_image(color.distort(view.image, rng))
        return random_flip(view, self.flip, rng)

    def _shortest(self, rng: np.random.Generator) -> int:
        if self.sampling == "range":
            return int(rng.integers(self.min_sizes[0], self.min_sizes[1] + 1))
        return int(rng.choice(self.min_sizes))

    def _window(
        self, view: View, crop_size: tuple[float, float], rng: np.random.Generator, labels: LabelSource | None
    ) -> tuple[int, int, int, int]:
        if self.single_category_max_area >= 1 or labels is None:
            return random_window(view.size, self.crop_type, crop_size, rng)
        category = view.gather(labels(), fill=-1)
        for _ in range(_CROP_ATTEMPTS):
            window = random_window(view.size, self.crop_type, crop_size, rng)
            top, left, height, width = window
            if is_mixed(category[top : top + height, left : left + width], self.single_category_max_area):
                break
        return window


class ResizeShortestEdge:
    """The resize of inference.

    Args:
        shortest: length of the shorter edge; 0 leaves the image's size.
        longest: bound for the longer edge, which wins.
    """

    def __init__(self, *, shortest: int, longest: int) -> None:
        if shortest < 0:
            raise ValueError(f"shortest must be >= 0, got {shortest}")
        _check_positive("longest", longest)
        self.shortest = shortest
        self.longest = longest

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize."""
        if not self.shortest:
            return height, width
        return shortest_edge_size((height, width), self.shortest, self.longest)

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 -> (h, w, 3) uint8, bilinear."""
        size = self.output_size(*image.shape[:2])
        return image if size == image.shape[:2] else resize_image(image, *size)


def scaled_size(size: tuple[int, int], target: tuple[int, int], scale: float) -> tuple[int, int]:
    """The largest (height, width) of the same proportions inside `scale` times the target, at least 1."""
    factor = min(target[0] * scale / size[0], target[1] * scale / size[1])
    return max(round(size[0] * factor), 1), max(round(size[1] * factor), 1)


def shortest_edge_size(size: tuple[int, int], shortest: int, longest: int) -> tuple[int, int]:
    """(height, width) with the shorter edge `shortest`, or less if the longer would exceed `longest`;
    halves are rounded up; at least 1.
    """
    factor = float(shortest) / min(size)
    height, width = (shortest, factor * size[1]) if size[0] < size[1] else (factor * size[0], shortest)
    if max(height, width) > longest:
        cap = longest / max(height, width)
        height, width = height * cap, width * cap
    return max(int(height + 0.5), 1), max(int(width + 0.5), 1)


def jitter_offset(size: tuple[int, int], crop: int, fraction: float) -> tuple[int, int]:
    """(top, left) of a square crop: the same fraction in [0, 1) of the room that each axis leaves."""
    return round(max(size[0] - crop, 0) * fraction), round(max(size[1] - crop, 0) * fraction)


def crop_size_for(
    size: tuple[int, int], crop_type: CropType, crop_size: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int]:
    """(height, width) of a crop, within 1 and the image's size.

    Args:
        size: (height, width) of the image.
        crop_type: how `crop_size` is read. "absolute": (height, width) in pixels. "absolute_range": (lowest,
            highest) in pixels, drawn per axis. "relative": parts of height and width in (0, 1].
            "relative_range": the lowest such parts, drawn per axis up to 1.
        crop_size: two numbers.
        rng: used by the two ranges.
    """
    if crop_type == "absolute":
        wanted = [int(edge) for edge in crop_size]
    elif crop_type == "absolute_range":
        low, high = (int(edge) for edge in crop_size)
        wanted = [int(rng.integers(min(edge, low), min(edge, high) + 1)) for edge in size]
    else:
        parts = np.asarray(crop_size, dtype=np.float64)
        if crop_type == "relative_range":
            parts = parts + rng.random(2) * (1 - parts)
        wanted = [int(edge * part + 0.5) for edge, part in zip(size, parts, strict=True)]
    return min(max(wanted[0], 1), size[0]), min(max(wanted[1], 1), size[1])


def random_window(
    size: tuple[int, int], crop_type: CropType, crop_size: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop; arguments as in `crop_size_for`."""
    height, width = crop_size_for(size, crop_type, crop_size, rng)
    top = int(rng.integers(size[0] - height + 1))
    left = int(rng.integers(size[1] - width + 1))
    return top, left, height, width


def is_mixed(category: NDArray[np.int32], max_area: float) -> bool:
    """Whether there are two categories or more and each has less than `max_area` of the labelled pixels.

    Args:
        category: (H, W), -1 where there is no label.
        max_area: share in (0, 1].
    """
    pixels = np.bincount(category.ravel() + 1)[1:]
    return bool(np.count_nonzero(pixels) > 1 and pixels.max() < pixels.sum() * max_area)


def random_flip(view: View, flip: Flip, rng: np.random.Generator) -> View:
    """Flips with probability one half."""
    if flip == "none" or rng.random() >= 0.5:
        return view
    return view.flip_horizontal() if flip == "horizontal" else view.flip_vertical()


def _checked_flip(flip: Flip) -> Flip:
    if flip not in ("horizontal", "vertical", "none"):
        raise ValueError(f"flip must be 'horizontal', 'vertical' or 'none', got {flip!r}")
    return flip


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_crop(crop_type: CropType, crop_size: tuple[float, float]) -> None:
    if crop_type not in ("absolute", "absolute_range", "relative", "relative_range"):
        raise ValueError(
            f"crop_type must be 'absolute', 'absolute_range', 'relative' or 'relative_range', got {crop_type!r}"
        )
    low, high = min(crop_size), max(crop_size)
    if crop_type.startswith("relative") and not (low > 0 and high <= 1):
        raise ValueError(f"crop_size must be in (0, 1] when crop_type is {crop_type!r}, got {crop_size}")
    if crop_type.startswith("absolute") and low < 1:
        raise ValueError(f"crop_size must be at least 1 when crop_type is {crop_type!r}, got {crop_size}")
    if crop_type == "absolute_range" and crop_size[0] > crop_size[1]:
        raise ValueError(f"crop_size must be (lowest, highest) for 'absolute_range', got {crop_size}")
