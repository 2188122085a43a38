"""Class-agnostic average recall of region proposals, COCO's AR: how many objects they find."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
THRESHOLDS: FloatArray = np.linspace(0.5, 0.95, 10)  # as pycocotools makes them, to the last bit
_PIXELS = 1 << 15  # compared at a time
_UNMATCHED = np.iinfo(np.int64).max  # the rank of no proposal


class ProposalRecall:
    """Average recall over the images given to ``update``.

    An object is found at an IoU threshold if a proposal is matched to it: proposals choose in the order of their rank,
    each the free object that it overlaps most, if that is at least the threshold. Recall is the part of all objects of
    all images that is found, and average recall its mean over the thresholds 0.5, 0.55, ... 0.95. This is COCOeval
    with ``useCats = 0`` for objects of all sizes. Crowds must be left out of the objects: COCO ignores what matches
    them, which changes no recall.

    Args:
        limits: numbers of proposals, the best ones of each image, to give the recall for.

    Attributes:
        count: objects so far.

    Raises:
        ValueError: if a limit is below 1 or there is none.
    """

    def __init__(self, *, limits: Sequence[int] = (10, 100)) -> None:
        if not limits or min(limits) < 1:
            raise ValueError(f"limits must be numbers from 1, got {tuple(limits)}")
        self.limits = tuple(limits)
        self.count = 0
        self._found = np.zeros((len(self.limits), len(THRESHOLDS)), dtype=np.int64)

    def update(self, ious: npt.ArrayLike) -> None:
        """Adds an image.

        Args:
            ious: (P, N) of each proposal, best first, with each object, see `mask_ious`; P and N may be 0.

        Raises:
            ValueError: if the shape is another one.
        """
        array = np.asarray(ious, dtype=np.float64)
        if array.ndim != 2:
            raise ValueError(f"ious must have shape (P, N), got {array.shape}")
        ranks = _matching_ranks(array)
        self.count += array.shape[1]
        self._found += np.array([(ranks < limit).sum(1) for limit in self.limits])

    def merge(self, other: "ProposalRecall") -> None:
        """Adds the images that ``other`` has seen.

        Raises:
            ValueError: if the two have other limits.
        """
        if self.limits != other.limits:
            raise ValueError(f"other must have the limits {self.limits}, got {other.limits}")
        self.count += other.count
        self._found += other._found

    def compute(self) -> dict[str, float]:
        """For each limit ``AR@<limit>`` in percent; nan if there was no object."""
        total = self.count or float("nan")
        recalls = 100 * self._found.mean(1) / total
        return {f"AR@{limit}": float(recall) for limit, recall in zip(self.limits, recalls, strict=True)}


def mask_ious(proposals: npt.NDArray[np.bool_], objects: npt.NDArray[np.bool_]) -> FloatArray:
    """Pixels in common over pixels in either, 0 where both masks are empty.

    Args:
        proposals: (P, H, W) bool.
        objects: (N, H, W) bool.

    Returns:
        (P, N), exact counts divided once.

    Raises:
        ValueError: if sizes differ.
        TypeError: if masks are not bool.
    """
    for name, masks in (("proposals", proposals), ("objects", objects)):
        if masks.dtype != np.bool_:
            raise TypeError(f"{name} must be bool, got {masks.dtype}")
        if masks.ndim != 3 or masks.shape[1:] != proposals.shape[1:]:
            raise ValueError(f"{name} must have shape (N, H, W), the same H and W for both, got {masks.shape}")
    pixels = proposals.shape[1] * proposals.shape[2]
    a, b = proposals.reshape(len(proposals), pixels), objects.reshape(len(objects), pixels)
    common = np.zeros((len(a), len(b)))
    for start in range(0, pixels, _PIXELS):
        part = slice(start, start + _PIXELS)
        common += a[:, part].astype(np.float32) @ b[:, part].astype(np.float32).T  # exact: counts below 2 ** 24
    either = a.sum(1)[:, None] + b.sum(1) - common
    return common / np.maximum(either, 1)


def _matching_ranks(ious: FloatArray) -> npt.NDArray[np.int64]:
    """(T, N): the rank, from 0, of the proposal that is matched to each object at each threshold, or `_UNMATCHED`.

    Ranks make one matching serve all limits: what the first proposals take does not depend on those after them.
    """
    N = ious.shape[1]
    ranks = np.full((len(THRESHOLDS), N), _UNMATCHED, dtype=np.int64)
    if N == 0:
        return ranks
    each = np.arange(len(THRESHOLDS))
    for rank, row in enumerate(ious):
        free = np.where(ranks == _UNMATCHED, row, -1.0)  # (T, N)
        best = N - 1 - free[:, ::-1].argmax(1)  # of equal ones the last, as COCOeval
        taken = free[each, best] >= THRESHOLDS
        ranks[each[taken], best[taken]] = rank
    return ranks
