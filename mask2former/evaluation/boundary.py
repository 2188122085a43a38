"""Boundary regions of masks and segments (Cheng et al., "Boundary IoU", CVPR 2021, section 4).

The boundary region of a mask is what an erosion by a square of side 2 d + 1 takes away: its pixels within d
pixels, in rows and in columns, of one that is not in the mask. All that lies outside the image is not in the
mask.
"""

import math

import numpy as np
import numpy.typing as npt

DILATION_RATIO = 0.02
BoolArray = npt.NDArray[np.bool_]


def boundary_distance(size: tuple[int, ...], ratio: float = DILATION_RATIO) -> int:
    """The distance d in pixels: a part of the image's diagonal, at least 1.

    Args:
        size: (height, width) of the image.
        ratio: the part.

    Raises:
        ValueError: if the ratio is not above 0.
    """
    if not ratio > 0:
        raise ValueError(f"ratio must be above 0, got {ratio}")
    return max(1, round(math.hypot(*size) * ratio))


def segment_boundaries(ids: npt.NDArray[np.integer], distance: int) -> BoolArray:
    """The boundary regions of all segments of an id map at once; void is a segment like others.

    Args:
        ids: (H, W), equal for the pixels of a segment.
        distance: d in pixels.

    Returns:
        (H, W) bool, True where a pixel within the distance has another id or lies outside the image.
    """
    height, width = ids.shape
    # A square has one id if none of its rows has a change and its middle column has none.
    across = np.ones((height, width + 1), dtype=np.bool_)
    across[:, 1:-1] = ids[:, 1:] != ids[:, :-1]
    down = np.ones((height + 1, width), dtype=np.bool_)
    down[1:-1] = ids[1:] != ids[:-1]
    row_changes = _any_within(across.T, distance, between=True).T  # (H, W)
    return _any_within(row_changes, distance, between=False) | _any_within(down, distance, between=True)


def mask_boundaries(masks: BoolArray, distance: int) -> BoolArray:
    """The boundary region of each mask.

    Args:
        masks: (N, H, W) bool.
        distance: d in pixels.

    Returns:
        (N, H, W) bool, a part of the masks.
    """
    boundaries = np.zeros_like(masks)
    for mask, boundary in zip(masks, boundaries, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size:
            box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            boundary[box] = mask[box] & segment_boundaries(mask[box].view(np.uint8), distance)
    return boundaries


def _any_within(flags: BoolArray, distance: int, *, between: bool) -> BoolArray:
    """Whether any flag along the first axis is True within the distance of a position.

    Args:
        flags: (L, M), or (L + 1, M) where ``between`` says that flag i stands between positions i - 1 and i.
        distance: in positions.
        between: see above.

    Returns:
        (L, M) bool.
    """
    length = len(flags) - between
    sums = np.zeros((len(flags) + 1, flags.shape[1]), dtype=np.int32)
    np.cumsum(flags, axis=0, out=sums[1:])
    positions = np.arange(length)
    first = np.maximum(positions - distance + between, 0)
    last = np.minimum(positions + distance, len(flags) - 1)
    return np.asarray(sums[last + 1] != sums[first])
