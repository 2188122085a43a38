"""Input and output files of the scripts `datasets/prepare_*.py`: checked reading, writing that spoils nothing.

An output file appears under its name only when it is complete. One that is there already is kept if its content is
the same (the same pixels or the same JSON values, however they are encoded), and otherwise replaced only on demand.
"""

import filecmp
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mask2former.data import images

T = TypeVar("T")

PARTIAL_SUFFIX = ".partial"
_SHOWN = 8
_IMAGE_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jpg": ("JPEG", {}),
    ".png": ("PNG", {}),
    ".tif": ("TIFF", {"compression": "tiff_adobe_deflate"}),
}


class PreparationError(Exception):
    """A file is wrong, missing or in the way; the text names it and says what is the matter."""


def read_labels(path: Path) -> NDArray[Any]:
    """A map of whole numbers, (H, W).

    Raises:
        PreparationError: there is no such file, it is damaged, or it has several channels.
    """
    return _or_fault(images.read_label_map, path)


def read_colors(path: Path) -> NDArray[np.uint8]:
    """An image of three 8-bit channels, (H, W, 3).

    Raises:
        PreparationError: there is no such file, it is damaged, or it has more than 8 bits a channel.
    """
    return _or_fault(images.read_panoptic_colors, path)


def read_segment_ids(path: Path) -> NDArray[np.int32]:
    """The segment ids R + 256 G + 65536 B of a COCO panoptic PNG, (H, W).

    Raises:
        PreparationError: as `read_colors`.
    """
    colors = read_colors(path).astype(np.int32)
    return colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2]


def read_json(path: Path) -> Any:
    """
    Raises:
        PreparationError: there is no such file, or it holds no JSON.
    """
    return _or_fault(lambda file: json.loads(file.read_text(encoding="utf-8")), path)


def read_lines(path: Path) -> list[str]:
    """The lines of a text without white space around them; empty ones are left out.

    Raises:
        PreparationError: there is no such file, it has no lines, or it is no text.
    """
    lines = [line.strip() for line in _or_fault(lambda file: file.read_text(encoding="utf-8"), path).splitlines()]
    if not any(lines):
        raise PreparationError(f"{path}: has no lines")
    return [line for line in lines if line]


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) from the header, as stored.

    Raises:
        PreparationError: there is no such file, or it is no image.
    """
    return _or_fault(_header_size, path)


def require_size(path: Path, size: tuple[int, ...], expected: tuple[int, int], reference: object) -> None:
    """
    Args:
        path: the file that is checked.
        size: its (height, width), with or without channels.
        expected: what (height, width) should be.
        reference: where `expected` comes from, for the message.

    Raises:
        PreparationError: they differ.
    """
    if size[:2] != expected:
        height, width = expected
        raise PreparationError(
            f"{path}: is {size[1]} wide and {size[0]} high, but {reference} is {width} wide and {height} high"
        )


def require_values(path: Path, values: NDArray[Any], highest: int, what: str) -> None:
    """
    Args:
        path: the file that is checked.
        values: whole numbers.
        highest: they must be in 0..highest.
        what: what the values are, for the message.

    Raises:
        PreparationError: there are others; the message shows the first of them.
    """
    wrong = np.unique(values[(values < 0) | (values > highest)])
    if wrong.size:
        raise PreparationError(f"{path}: {what} must be in 0..{highest}, got {listed(wrong.tolist())}")


def listed(values: Iterable[object]) -> str:
    """The first of the values in one line."""
    shown = [str(value) for value in values]
    rest = len(shown) - _SHOWN
    return ", ".join(shown[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def put_image(path: Path, pixels: NDArray[Any], *, overwrite: bool) -> bool:
    """Writes an image whose format is that of the suffix: .png, .tif (compressed without loss) or .jpg.

    Args:
        path: the file.
        pixels: (H, W) uint8 or uint16, or (H, W, 3) uint8.
        overwrite: replace a file with other pixels.

    Returns:
        whether the file was written; False if one with these pixels was there.

    Raises:
        PreparationError: a file with other content is there and must not be replaced.
    """
    image_format, options = _IMAGE_FORMATS[path.suffix]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=image_format, **options)
    return _put(path, stream.getvalue(), overwrite, _same_pixels)


def put_json(path: Path, content: Any, *, overwrite: bool) -> bool:
    """Writes JSON; arguments, result and errors as of `put_image`."""
    return _put(path, json.dumps(content, separators=(",", ":")).encode(), overwrite, _same_json)


def put_link(path: Path, source: Path, *, overwrite: bool) -> bool:
    """Makes a hard link to `source`, or a copy where there can be none; the rest as `put_image`."""
    if path.exists():
        if path.samefile(source) or filecmp.cmp(path, source, shallow=False):
            return False
        _require_replaceable(path, overwrite)
    partial = _partial(path)
    try:
        try:
            os.link(source.resolve(), partial)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _put(path: Path, data: bytes, overwrite: bool, same: Callable[[bytes, bytes], bool]) -> bool:
    if path.exists():
        there = path.read_bytes()
        if there == data or same(there, data):
            return False
        _require_replaceable(path, overwrite)
    partial = _partial(path)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _partial(path: Path) -> Path:
    """The name until the file is complete; what a killed run left there goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.unlink(missing_ok=True)
    return partial


def _require_replaceable(path: Path, overwrite: bool) -> None:
    if not overwrite:
        raise PreparationError(f"{path}: is there with different content; --overwrite would replace it")


def _same_pixels(there: bytes, data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(there)) as old, Image.open(io.BytesIO(data)) as new:
            return np.array_equal(np.asarray(old), np.asarray(new))
    except images.READ_ERRORS:  # what is there is damaged
        return False


def _same_json(there: bytes, data: bytes) -> bool:
    try:
        return bool(json.loads(there) == json.loads(data))
    except ValueError:
        return False


def _header_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise
    except images.READ_ERRORS as error:
        raise ValueError(f"cannot read the image: {error}") from error


def _or_fault(read: Callable[[Path], T], path: Path) -> T:
    try:
        return read(path)
    except FileNotFoundError as error:
        raise PreparationError(f"{path}: there is no such file") from error
    except (ValueError, OSError) as error:
        text = str(error)
        raise PreparationError(text if str(path) in text else f"{path}: {text}") from error
