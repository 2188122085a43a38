"""Photometric distortion of SSD (Liu et al., "SSD: Single Shot MultiBox Detector", section 2.2 and the
released code), in numpy: brightness, contrast, saturation and hue, each with probability one half.

Hue, saturation and value are 8-bit with hue in [0, 180), the convention of the released code.
"""

import numpy as np
from numpy.typing import NDArray

BRIGHTNESS_DELTA = 32.0
CONTRAST_RANGE = (0.5, 1.5)
SATURATION_RANGE = (0.5, 1.5)
HUE_DELTA = 18

_BYTE = np.arange(256, dtype=np.float32)
_FIXED_BITS = 12
_LEVELS = np.maximum(np.arange(256), 1)
# Reciprocals in fixed point: 255 / value and 30 / range, so that the conversion needs no division per pixel.
_SATURATION_SCALE = np.rint((255 << _FIXED_BITS) / _LEVELS).astype(np.int32) * (np.arange(256) > 0)
_HUE_SCALE = np.rint((180 << _FIXED_BITS) / (6.0 * _LEVELS)).astype(np.int32) * (np.arange(256) > 0)


def distort(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """
    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        rng: decides which distortions are made, how strong, and whether contrast comes first or last.

    Returns:
        (H, W, 3) uint8.
    """
    if _coin(rng):
        image = adjust_brightness(image, rng.uniform(-BRIGHTNESS_DELTA, BRIGHTNESS_DELTA))
    contrast_first = _coin(rng)
    if contrast_first and _coin(rng):
        image = adjust_contrast(image, rng.uniform(*CONTRAST_RANGE))
    if _coin(rng):
        image = adjust_saturation(image, rng.uniform(*SATURATION_RANGE))
    if _coin(rng):
        image = adjust_hue(image, int(rng.integers(-HUE_DELTA, HUE_DELTA + 1)))
    if not contrast_first and _coin(rng):
        image = adjust_contrast(image, rng.uniform(*CONTRAST_RANGE))
    return image


def adjust_brightness(image: NDArray[np.uint8], delta: float) -> NDArray[np.uint8]:
    """Adds `delta`, clips to 0..255 and truncates."""
    return _table(1.0, delta)[image]


def adjust_contrast(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Multiplies by `factor`, clips to 0..255 and truncates."""
    return _table(factor, 0.0)[image]


def adjust_saturation(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    """Multiplies the saturation by `factor`; RGB in and out."""
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(hue, _table(factor, 0.0)[saturation], value)


def adjust_hue(image: NDArray[np.uint8], delta: int) -> NDArray[np.uint8]:
    """Turns the hue by `delta` of 180 steps; RGB in and out."""
    hue, saturation, value = rgb_to_hsv(image)
    return hsv_to_rgb(((hue.astype(np.int16) + delta) % 180).astype(np.uint8), saturation, value)


def rgb_to_hsv(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """(H, W, 3) uint8 RGB -> hue in [0, 180), saturation, value, each (H, W) uint8."""
    red, green, blue = (image[..., channel].astype(np.int32) for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    half = 1 << (_FIXED_BITS - 1)
    saturation = (spread * _SATURATION_SCALE[value] + half) >> _FIXED_BITS
    sixths = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sixths * _HUE_SCALE[spread] + half) >> _FIXED_BITS
    hue += 180 * (hue < 0)
    return hue.astype(np.uint8), saturation.astype(np.uint8), value.astype(np.uint8)


def hsv_to_rgb(
    hue: NDArray[np.uint8], saturation: NDArray[np.uint8], value: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """The inverse of `rgb_to_hsv` up to rounding: (H, W) each, hue in [0, 180) -> (H, W, 3) uint8."""
    # A channel is value * (1 - saturation * absence), where absence depends on the hue alone.
    brightest = value.astype(np.float32)
    chroma = brightest * saturation * np.float32(1 / 255)
    return np.rint(brightest[..., None] - chroma[..., None] * _ABSENCE[hue]).astype(np.uint8)


def _absence_by_hue() -> NDArray[np.float32]:
    """(180, 3): how much of red, green and blue a fully saturated colour of that hue lacks."""
    sector = np.arange(180)[:, None] / 30.0
    turned = (np.array([5.0, 3.0, 1.0]) + sector) % 6.0
    return np.clip(np.minimum(turned, 4.0 - turned), 0.0, 1.0).astype(np.float32)


def _table(factor: float, offset: float) -> NDArray[np.uint8]:
    """(256,): a linear map of bytes, clipped and truncated in float32."""
    return np.clip(_BYTE * np.float32(factor) + np.float32(offset), 0, 255).astype(np.uint8)


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.integers(2))


_ABSENCE = _absence_by_hue()
