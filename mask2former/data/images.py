"""Pictures in any form, and the images of data sets, to arrays."""

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

ImageFormat = Literal["RGB", "BGR"]
T = TypeVar("T")
Picture = NDArray[Any] | Image.Image | str | os.PathLike[str]
"""An array, a Pillow image or a file; `as_rgb` says which of them."""

_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise for damaged files, apart from FileNotFoundError, which says enough.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def as_rgb(image: Picture) -> NDArray[np.uint8]:
    """A picture in any accepted form as RGB.

    Accepted are arrays, uint8 or uint16 of any strides: (H, W, 3) RGB, (H, W) or (H, W, 1) grey, (H, W, 4) RGB with
    alpha; and images and files of all modes but floating point. An image gives the frame that it stands at, a file
    its first frame.

    Grey becomes three equal channels, transparency is dropped, CMYK is converted without colour profiles. 16 bits
    are scaled to 8 so that 65535 becomes 255, rounded; Pillow itself cuts off the low bits of coloured files with 16
    bits a channel. Images and files are turned upright as their EXIF data say.

    Returns:
        (H, W, 3) uint8, a new array in C order.

    Raises:
        FileNotFoundError: if ``image`` names no file.
        ValueError: if a file is no image or is damaged, or type, shape or values are others.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if not isinstance(image, Image.Image):
        return _array_pixels(image)
    if 0 in image.size:
        raise ValueError(f"image must have at least one pixel, got width and height {image.size}")
    try:
        return _rgb_pixels(image)
    except READ_ERRORS as error:  # Pillow decodes at the first use
        raise ValueError(f"image cannot be read: {error}") from error


def read_image(path: str | os.PathLike[str], format: ImageFormat = "RGB") -> NDArray[np.uint8]:
    """Reads a photo of any mode, as `as_rgb` does.

    Args:
        path: the file.
        format: order of the channels.

    Returns:
        (H, W, 3) uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, is damaged, or has pixels that are no 8 or 16-bit numbers.
    """
    if format not in ("RGB", "BGR"):
        raise ValueError(f"format must be 'RGB' or 'BGR', got {format!r}")
    pixels = _read(path, _rgb_pixels)
    return pixels if format == "RGB" else np.ascontiguousarray(pixels[..., ::-1])


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """As `read_image`, as a decoded Pillow image of mode RGB.

    Raises:
        FileNotFoundError, ValueError: as `read_image`.
    """
    return _read(path, _upright_rgb)


def read_label_map(path: str | Path) -> NDArray[Any]:
    """Reads a map of whole numbers: 8 or 16 bits, or palette (whose indices are taken).

    Returns:
        (H, W) integers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, is damaged, or has several channels.
    """
    return _read(path, _label_pixels)


def read_panoptic_colors(path: str | Path) -> NDArray[np.uint8]:
    """Reads a COCO panoptic PNG: (H, W, 3) uint8, also where the file is stored with a palette or grey.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, is damaged, or has more than 8 bits a channel.
    """
    return _read(path, _color_pixels)


def read_binary_mask(path: str | Path) -> NDArray[np.bool_]:
    """Reads a mask of one object: (H, W), True where any channel but transparency is not 0 (of a palette: the index).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image or is damaged.
    """
    return _read(path, _mask_pixels)


def read_panoptic_ids(path: str | Path) -> NDArray[np.int32]:
    """Reads the segment ids R + 256 G + 65536 B of a COCO panoptic PNG: (H, W) int32.

    Raises:
        FileNotFoundError, ValueError: as `read_panoptic_colors`.
    """
    return _read(path, _segment_ids)


def _read(path: str | os.PathLike[str], convert: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            return convert(image)
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def _rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.array(_upright_rgb(image))


def _upright_rgb(image: Image.Image) -> Image.Image:
    transpose = _TRANSPOSE_BY_ORIENTATION.get(_orientation(image))
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it goes to RGB at once
    image = _rgb(image)
    return image if transpose is None else image.transpose(transpose)


def _array_pixels(image: Any) -> NDArray[np.uint8]:
    if not isinstance(image, np.ndarray) or image.dtype.kind != "u" or image.dtype.itemsize > 2:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a uint8 or uint16 array, a PIL image or a path, got {kind}")
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or pixels.size == 0:
        raise ValueError(f"image must be (H, W) or (H, W, C) with C of 1, 3 or 4, got shape {image.shape}")
    pixels = pixels[..., :3]
    if pixels.shape[2] == 1:
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    return np.array(_scaled(pixels) if pixels.dtype.itemsize == 2 else pixels, np.uint8, order="C")


def _label_pixels(image: Image.Image) -> NDArray[Any]:
    labels = np.array(image)
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise ValueError(f"a label map must have one channel of whole numbers, got mode {image.mode}")
    return labels.astype(np.uint8) if labels.dtype == np.bool_ else labels


def _mask_pixels(image: Image.Image) -> NDArray[np.bool_]:
    pixels = np.array(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        pixels = pixels[..., :-1]
    covered: NDArray[np.bool_] = (pixels if pixels.ndim == 2 else pixels.any(axis=2)) != 0
    return covered


def _segment_ids(image: Image.Image) -> NDArray[np.int32]:
    image = _in_colors(image)
    # Pillow keeps four bytes a pixel; an array of three would have to be taken apart again.
    words = np.frombuffer(image.tobytes("raw", "RGBX"), dtype="<i4").reshape(image.height, image.width)
    return words & np.int32(0xFFFFFF)


def _color_pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.array(_in_colors(image))


def _in_colors(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"a panoptic image must have 8 bits a channel, got mode {image.mode}")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    """Decoded, so that it outlives its file; a conversion from RGB to RGB would be a copy."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image (which Pillow may hold in 32 bits) scaled to 8."""
    values = np.asarray(image)
    whole = values.dtype.kind in "iu"
    if not whole or values.min() < 0 or values.max() > 65535:
        found = f"{values.min()} to {values.max()}" if whole else values.dtype
        raise ValueError(f"pixels of mode {image.mode} must be whole numbers in 0..65535, got {found}")
    return Image.fromarray(_scaled(values))


def _scaled(values: NDArray[Any]) -> NDArray[np.uint8]:
    """0..65535 to 0..255, rounded."""
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if there is none or the EXIF data are damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return 1
