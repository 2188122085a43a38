"""Photometric distortion: closed forms, the standard library's conversion, OpenCV's where it is installed."""

import colorsys
from itertools import product

import numpy as np
import pytest

from mask2former.data import color

GRID = np.array(list(product((0, 1, 30, 64, 127, 128, 200, 254, 255), repeat=3)), np.uint8).reshape(27, 27, 3)
MANY = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)


def test_primaries():
    names = ("f00", "ff0", "0f0", "0ff", "00f", "f0f")
    image = np.array([[[int(c, 16) * 17 for c in name] for name in names]], np.uint8)
    hue, saturation, value = color.rgb_to_hsv(image)
    assert hue.tolist() == [[0, 30, 60, 90, 120, 150]]
    assert (saturation == 255).all()
    assert (value == 255).all()
    np.testing.assert_array_equal(color.hsv_to_rgb(hue, saturation, value), image)
    np.testing.assert_array_equal(color.adjust_hue(image, 30), np.roll(image, -1, axis=1))


def test_hsv_is_the_textbook_one():
    hue, saturation, value = color.rgb_to_hsv(GRID)
    expected = np.array([[colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in row] for row in GRID])
    # Half a step of rounding, and up to 5 * 255 times the rounding of a reciprocal, half of 1 / 4096.
    turn = np.abs(hue - expected[..., 0] * 180)
    assert np.minimum(turn, 180 - turn).max() < 0.66
    assert np.abs(saturation - expected[..., 1] * 255).max() < 0.54
    assert np.abs(value - expected[..., 2] * 255).max() < 1e-6


def test_rgb_is_the_textbook_one():
    triples = np.array(list(product(range(0, 180, 7), (0, 3, 100, 255), (0, 5, 128, 255))), np.uint8)
    got = color.hsv_to_rgb(*(triples[None, :, n] for n in range(3)))[0]
    expected = [colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in triples.tolist()]
    assert np.abs(got - np.array(expected) * 255).max() <= 0.51


@pytest.mark.parametrize("image", [GRID, MANY], ids=["grid", "noise"])
def test_conversions_are_opencvs(image):
    cv2 = pytest.importorskip("cv2")
    hsv = np.dstack(color.rgb_to_hsv(image))
    np.testing.assert_array_equal(hsv, cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    back = color.hsv_to_rgb(*(hsv[..., n] for n in range(3)))
    assert np.abs(back.astype(int) - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)).max() <= 1
    # OpenCV's vector path truncates where its path for single pixels rounds; rounding is what we do.
    singles = [cv2.cvtColor(pixel[None, None], cv2.COLOR_HSV2RGB)[0, 0] for pixel in hsv[:20].reshape(-1, 3)]
    # Products of float32 that lie on a half differ in the last bit.
    assert (back[:20].reshape(-1, 3) != singles).mean() < 0.01


def test_brightness_and_contrast_clip_and_truncate():
    image = np.array([[[0, 100, 250]]], np.uint8)
    assert color.adjust_brightness(image, 10.7).tolist() == [[[10, 110, 255]]]
    assert color.adjust_brightness(image, -10.7).tolist() == [[[0, 89, 239]]]
    assert color.adjust_contrast(image, 1.5).tolist() == [[[0, 150, 255]]]
    assert color.adjust_contrast(image, 0.505).tolist() == [[[0, 50, 126]]]


def test_saturation():
    image = np.array([[[200, 100, 100], [50, 50, 50]]], np.uint8)
    grey = color.adjust_saturation(image, 0.0)
    assert grey.tolist() == [[[200, 200, 200], [50, 50, 50]]]
    # 100 of 200 is 127 of 255; it becomes 190, and 200 * (1 - 190 / 255) = 50.98.
    assert color.adjust_saturation(image, 1.5)[0, 0].tolist() == [200, 51, 51]
    assert color.adjust_saturation(image, 9.0)[0, 0].tolist() == [200, 0, 0]


def test_a_whole_turn_of_the_hue_changes_nothing():
    turned = color.adjust_hue(MANY, 180)
    np.testing.assert_array_equal(turned, color.adjust_hue(MANY, 0))
    assert np.abs(turned.astype(int) - MANY).max() <= 5  # 180 hues are coarse


def test_grey_stays_grey():
    grey = np.repeat(MANY[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(color.adjust_hue(grey, 17), grey)
    np.testing.assert_array_equal(color.adjust_saturation(grey, 1.4), grey)


def test_each_distortion_has_probability_one_half(monkeypatch):
    calls = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(
            color, f"adjust_{name}", lambda image, amount, name=name: calls.append((name, amount)) or image
        )
    rng = np.random.default_rng(0)
    orders = []
    for _ in range(2000):
        calls.append(("start", 0))
        color.distort(MANY, rng)
        orders.append([name for name, _ in calls[len(calls) - 1 - calls[::-1].index(("start", 0)) + 1 :]])
    limits = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-18, 18)}
    for name, (low, high) in limits.items():
        amounts = np.array([amount for called, amount in calls if called == name])
        assert abs(len(amounts) - 1000) < 120
        assert low <= amounts.min() < low + (high - low) * 0.02
        assert high - (high - low) * 0.02 < amounts.max() <= high
        assert abs(amounts.mean() - (low + high) / 2) < (high - low) * 0.05
    both = [o.index("contrast") < o.index("hue") for o in orders if {"contrast", "hue"} <= set(o)]
    assert 0.4 < np.mean(both) < 0.6
    assert all(order[0] == "brightness" for order in orders if "brightness" in order)


def test_input_is_left_alone():
    image = MANY.copy()
    for seed in range(8):
        assert color.distort(image, np.random.default_rng(seed)).dtype == np.uint8
    np.testing.assert_array_equal(image, MANY)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3)])
def test_odd_sizes(shape):
    for seed in range(16):
        assert color.distort(np.full(shape, 77, np.uint8), np.random.default_rng(seed)).shape == shape
