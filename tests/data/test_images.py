"""Image files of every mode to arrays."""

import io

import numpy as np
import pytest
from PIL import Image

from mask2former.data import read_image, read_label_map, read_panoptic_colors, read_panoptic_ids
from mask2former.data.targets import panoptic_ids

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def mode(path):
    with Image.open(path) as image:
        return image.mode


def test_channel_order(tmp_path):
    path = saved(tmp_path, RGB)
    np.testing.assert_array_equal(read_image(path), RGB)
    np.testing.assert_array_equal(read_image(str(path), "BGR"), RGB[..., ::-1])
    with pytest.raises(ValueError, match="'RGB' or 'BGR', got 'YUV'"):
        read_image(path, "YUV")


def test_result_is_writable_and_contiguous(tmp_path):
    for order in ("RGB", "BGR"):
        pixels = read_image(saved(tmp_path, RGB), order)
        assert pixels.flags.writeable
        assert pixels.flags.c_contiguous


def test_grey(tmp_path):
    expected = np.stack([GREY] * 3, axis=-1)
    np.testing.assert_array_equal(read_image(saved(tmp_path, GREY)), expected)
    alpha = np.dstack([GREY, np.full_like(GREY, 9)])
    np.testing.assert_array_equal(read_image(saved(tmp_path, alpha)), expected)


def test_alpha_is_dropped(tmp_path):
    rgba = np.dstack([RGB, np.zeros_like(GREY)])
    np.testing.assert_array_equal(read_image(saved(tmp_path, rgba)), RGB)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"transparency": bytes([0, 255, 7])}])
def test_palette(tmp_path, options):
    indices = Image.fromarray(GREY % 3)
    indices.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    path = saved(tmp_path, indices, **options)
    assert mode(path) == "P"
    table = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    np.testing.assert_array_equal(read_image(path), table[GREY % 3])
    np.testing.assert_array_equal(read_label_map(path), GREY % 3)
    np.testing.assert_array_equal(read_panoptic_colors(path), table[GREY % 3])


def test_segment_ids_of_every_mode(tmp_path):
    palette = Image.fromarray(GREY % 3)
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for image in (RGB, GREY, palette, np.dstack([RGB, GREY]), np.full((2, 3, 3), 255, np.uint8)):
        path = saved(tmp_path, image)
        ids = read_panoptic_ids(path)
        np.testing.assert_array_equal(ids, panoptic_ids(read_panoptic_colors(path)))
        assert ids.dtype == np.int32
    assert ids.max() == 2**24 - 1
    with pytest.raises(ValueError, match="8 bits a channel"):
        read_panoptic_ids(saved(tmp_path, GREY.astype(np.uint16)))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_grey_is_scaled(tmp_path, name):
    deep = np.array([[0, 257, 65535], [128, 129, 32896]], dtype=np.uint16)
    path = saved(tmp_path, deep, name)
    expected = np.array([[0, 1, 255], [0, 1, 128]])
    np.testing.assert_array_equal(read_image(path), np.stack([expected] * 3, axis=-1))
    np.testing.assert_array_equal(read_label_map(path), deep)
    with pytest.raises(ValueError, match=rf"{name}.*8 bits a channel"):
        read_panoptic_colors(path)


def test_one_bit(tmp_path):
    bits = GREY > 100
    path = saved(tmp_path, bits)
    assert mode(path) == "1"
    np.testing.assert_array_equal(read_image(path)[..., 1], bits * 255)
    np.testing.assert_array_equal(read_label_map(path), bits)
    assert read_label_map(path).dtype == np.uint8


def test_cmyk(tmp_path):
    cmyk = Image.fromarray(RGB).convert("CMYK")
    path = saved(tmp_path, cmyk, "print.tif")
    assert mode(path) == "CMYK"
    np.testing.assert_array_equal(read_image(path), RGB)


def test_float_and_32_bit_images_are_refused(tmp_path):
    for pixels in (GREY.astype(np.float32), GREY.astype(np.int32) + 70000):
        path = saved(tmp_path, pixels, "odd.tif")
        with pytest.raises(ValueError, match=r"odd.tif.*0..65535"):
            read_image(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """What is stored is the upright image under the inverse of the orientation."""
    stored = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB), 7: np.rot90(RGB, 2).swapaxes(0, 1), 8: np.rot90(RGB, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_ignored(tmp_path):
    path = saved(tmp_path, RGB, "bad.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage", quality=100)
    assert read_image(path).shape == RGB.shape


def test_unreadable_files_are_named(tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for image_format in ("PNG", "JPEG"):
        whole = io.BytesIO()
        Image.fromarray(noise).save(whole, image_format)
        for content in (whole.getvalue()[: len(whole.getvalue()) // 2], b"no image", b""):
            path = tmp_path / "broken.bin"
            path.write_bytes(content)
            for reader in (read_image, read_label_map, read_panoptic_colors):
                with pytest.raises(ValueError, match=r"cannot read the image .*broken.bin"):
                    reader(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match=r"image.png.*one channel.*RGB"):
        read_label_map(saved(tmp_path, RGB))


def test_panoptic_colors_of_a_grey_file(tmp_path):
    """An optimised PNG is stored grey if all its colours are; the colours are the same."""
    np.testing.assert_array_equal(read_panoptic_colors(saved(tmp_path, GREY)), np.stack([GREY] * 3, -1))
