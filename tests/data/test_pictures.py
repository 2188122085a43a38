"""A picture in any form to RGB: hand-made expectations, and the same from file, image and array."""

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mask2former.data.images import as_rgb, read_image

RGB = np.array([[[250, 10, 20], [0, 0, 0], [7, 100, 200]], [[255, 255, 255], [1, 2, 3], [60, 50, 40]]], np.uint8)
GREY = np.array([[0, 1, 128], [254, 255, 77]], np.uint8)
GREY_RGB = np.stack([GREY] * 3, axis=-1)
DEEP = np.array([[0, 128, 129], [32896, 65406, 65535]], np.uint16)
DEEP_RGB = np.stack([np.array([[0, 0, 1], [128, 254, 255]], np.uint8)] * 3, axis=-1)  # x / 257, rounded
ALPHA = np.array([[0, 255, 100], [5, 0, 255]], np.uint8)


def assert_reads(path: Path, expected: np.ndarray, mode: str) -> None:
    """The file has that mode, and path, text and image give the same."""
    with Image.open(path) as image:
        assert image.mode == mode
        from_image = as_rgb(image)
    for found in (as_rgb(path), as_rgb(str(path)), from_image, read_image(path)):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.uint8
        assert found.flags.c_contiguous
        assert found.flags.writeable


# ---- arrays


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (RGB, RGB),
        (np.dstack([RGB, ALPHA]), RGB),
        (GREY, GREY_RGB),
        (GREY[..., None], GREY_RGB),
        (DEEP, DEEP_RGB),
        (DEEP.astype(">u2"), DEEP_RGB),
        (np.dstack([DEEP, DEEP, DEEP, DEEP]), DEEP_RGB),
        (RGB[:1, :1], RGB[:1, :1]),
        (GREY[1:, 2:], GREY_RGB[1:, 2:]),
        (RGB[::-1, ::-1], [[[60, 50, 40], [1, 2, 3], [255, 255, 255]], [[7, 100, 200], [0, 0, 0], [250, 10, 20]]]),
        (np.asfortranarray(RGB), RGB),
        (np.dstack([RGB, RGB])[..., ::2], RGB[..., [0, 2, 1]]),
        (np.broadcast_to(np.uint8(9), (2, 2, 3)), np.full((2, 2, 3), 9)),
        (np.zeros((1, 30_000), np.uint8), np.zeros((1, 30_000, 3))),
    ],
)
def test_arrays(array: np.ndarray, expected: Any) -> None:
    array = array.view()
    array.setflags(write=False)
    before = array.copy()
    found = as_rgb(array)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    found[:] = 99  # its own memory
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), bool), "uint8 or uint16 array, a PIL image or a path, got bool"),
        (np.zeros((4, 4, 3), np.float32), "got float32"),
        (np.zeros((4, 4, 3), np.int16), "got int16"),
        (np.zeros((4, 4, 3), np.uint64), "got uint64"),
        (np.zeros((4, 4, 2), np.uint8), r"C of 1, 3 or 4, got shape \(4, 4, 2\)"),
        (np.zeros((3, 4, 5), np.uint8), r"got shape \(3, 4, 5\)"),
        (np.zeros((0, 5), np.uint16), r"got shape \(0, 5\)"),
        (np.uint8(3), "got uint8"),
        ([[[1, 2, 3]]], "got list"),
        (b"picture.png", "got bytes"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "got Tensor"),
        (Image.new("RGB", (0, 4)), r"at least one pixel, got width and height \(0, 4\)"),
    ],
)
def test_other_things_are_refused(image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"image must .*{message}"):
        as_rgb(image)


# ---- modes of images and files


def test_rgb_and_grey(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.bmp")
    assert_reads(tmp_path / "a.bmp", RGB, "RGB")
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert_reads(tmp_path / "a.png", GREY_RGB, "L")


def test_alpha_is_dropped(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "rgba.png")
    assert_reads(tmp_path / "rgba.png", RGB, "RGBA")
    Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]).save(tmp_path / "la.png")
    assert_reads(tmp_path / "la.png", GREY_RGB, "LA")


def with_palette(mode: str) -> Image.Image:
    """The pixels of RGB as indices 0 to 5 of a palette."""
    image = Image.frombytes("P", (3, 2), bytes(range(6)))
    image.putpalette(RGB.tobytes())
    if mode == "P":
        return image
    image = image.convert("PA")
    image.putalpha(Image.fromarray(ALPHA))
    return image


@pytest.mark.parametrize("transparency", [None, 2, b"\x00\x80\xff\x00\x00\x01"])
def test_palette(tmp_path: Path, transparency: Any) -> None:
    options = {} if transparency is None else {"transparency": transparency}
    with_palette("P").save(tmp_path / "p.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_reads(tmp_path / "p.png", RGB, "P")


def test_palette_with_alpha() -> None:
    image = with_palette("PA")
    assert image.mode == "PA"
    np.testing.assert_array_equal(as_rgb(image), RGB)


def test_one_bit(tmp_path: Path) -> None:
    bits = np.array([[True, False, True], [False, False, True]])
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert_reads(tmp_path / "bits.png", np.stack([bits * 255] * 3, axis=-1), "1")


def test_sixteen_bit_grey(tmp_path: Path) -> None:
    Image.fromarray(DEEP).save(tmp_path / "deep.tif")
    assert_reads(tmp_path / "deep.tif", DEEP_RGB, "I;16")
    big_endian = Image.frombytes("I;16B", (3, 2), DEEP.astype(">u2").tobytes())
    np.testing.assert_array_equal(as_rgb(big_endian), DEEP_RGB)
    Image.fromarray(DEEP.astype(np.int32)).save(tmp_path / "wide.tif")
    assert_reads(tmp_path / "wide.tif", DEEP_RGB, "I")


def png(pixels: np.ndarray) -> bytes:
    """A PNG of (H, W, 3) uint16, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_sixteen_bit_colours(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (5, 6, 3), dtype=np.uint16)
    (tmp_path / "deep.png").write_bytes(png(deep))
    found = as_rgb(tmp_path / "deep.png").astype(int)
    assert np.abs(found - deep / 257).max() <= 1  # Pillow cuts off what an array gets rounded
    assert np.abs(as_rgb(deep) - deep / 257).max() <= 0.5


@pytest.mark.parametrize("values", [GREY.astype(np.float32), DEEP.astype(np.int32) + 1, DEEP.astype(np.int32) - 1])
def test_floats_and_larger_numbers_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "odd.tif")
    message = r"pixels of mode [FI] must be whole numbers in 0\.\.65535, got (float32|1 to 65536|-1 to 65534)"
    with pytest.raises(ValueError, match=rf"odd\.tif: {message}"):
        as_rgb(tmp_path / "odd.tif")
    with pytest.raises(ValueError, match=f"image cannot be read: {message}"):
        as_rgb(Image.fromarray(values))


# ---- CMYK


def cmyk_as_rgb(ink: tuple[int, int, int, int]) -> list[float]:
    """What is left of white after the ink and the black."""
    return [(255 - c) * (255 - ink[3]) / 255 for c in ink[:3]]


INKS = [(0, 0, 0, 0), (255, 0, 0, 0), (30, 200, 90, 60), (0, 0, 0, 255), (120, 10, 250, 20)]


@pytest.mark.parametrize("ink", INKS)
def test_cmyk_tiff(tmp_path: Path, ink: tuple[int, int, int, int]) -> None:
    Image.new("CMYK", (8, 8), ink).save(tmp_path / "print.tif")
    found = as_rgb(tmp_path / "print.tif")
    assert np.abs(found - cmyk_as_rgb(ink)).max() <= 1
    assert_reads(tmp_path / "print.tif", found, "CMYK")


@pytest.mark.parametrize("transform", [0, 2])
@pytest.mark.parametrize("ink", INKS)
def test_cmyk_jpeg_of_adobe(tmp_path: Path, ink: tuple[int, int, int, int], transform: int) -> None:
    """Adobe stores inverted ink (transform 0), or the inverted black with the others as YCbCr (transform 2, YCCK)."""
    stored = (*(255 - c for c in ink),)
    if transform == 2:
        y, cb, cr = Image.new("RGB", (1, 1), ink[:3]).convert("YCbCr").getpixel((0, 0))
        stored = (y, cb, cr, 255 - ink[3])
    path = tmp_path / "print.jpg"
    # Pillow stores the inverse of what it is given, with transform 0
    Image.new("CMYK", (16, 16), (*(255 - value for value in stored),)).save(path, quality=100)
    data = bytearray(path.read_bytes())
    marker = data.index(b"Adobe")
    assert data[marker + 11] == 0
    data[marker + 11] = transform
    path.write_bytes(data)
    found = as_rgb(path)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - cmyk_as_rgb(ink)).max() <= 4  # JPEG and YCbCr round
    assert_reads(path, found, "CMYK")


# ---- EXIF, frames, damage


@pytest.mark.parametrize(
    ("orientation", "steps"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
        (0, lambda a: a),
        (9, lambda a: a),
    ],
)
def test_orientation(tmp_path: Path, orientation: int, steps: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    assert_reads(tmp_path / "turned.png", steps(RGB), "RGB")


@pytest.mark.parametrize("name", ["frames.gif", "frames.tif", "frames.png", "frames.webp"])
def test_first_frame(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    expected = np.broadcast_to(np.uint8([200, 0, 0]), (6, 8, 3))
    np.testing.assert_array_equal(as_rgb(tmp_path / name), expected)
    with Image.open(tmp_path / name) as image:
        assert image.n_frames == 3
        np.testing.assert_array_equal(as_rgb(image), expected)
        image.seek(1)  # where an image stands is its owner's choice
        np.testing.assert_array_equal(as_rgb(image), expected[..., [1, 0, 2]])


def test_damaged_and_absent_files(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("cut.png", "text.jpg", "."):
        with pytest.raises(ValueError, match="cannot read the image"):
            as_rgb(tmp_path / name)
    with Image.open(tmp_path / "cut.png") as image, pytest.raises(ValueError, match="image cannot be read: "):
        as_rgb(image)
    with pytest.raises(FileNotFoundError):
        as_rgb(tmp_path / "none.png")
