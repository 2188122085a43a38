"""Which segment of a video frame is which object of the frames before: pure association, without a network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What a match is worth, beside its similarity. Measured on moved crops of pictures, see docs/video.md.
_NEARNESS_WEIGHT = 0.5  # of being at the same place without overlap; overlap itself counts fully
_MISSED_PENALTY = 0.2  # of a track that the last frame did not show: the ones that it did show have the older right
_OTHER_CLASS_FACTOR = 0.5


@dataclass(frozen=True, eq=False)
class Region:
    """The pixels of a segment.

    Attributes:
        top, left: row and column of the box around them.
        mask: (h, w) bool inside the box; every side of the box has a pixel.
        area: pixels, at least 1.
    """

    top: int
    left: int
    mask: NDArray[np.bool_]
    area: int

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> "Region":
        """From a mask of the whole frame, (H, W) bool.

        Raises:
            ValueError: if it is empty.
        """
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            raise ValueError(f"mask must have a pixel, got an empty one of shape {mask.shape}")
        top, left = int(rows[0]), int(columns[0])
        crop = mask[top : rows[-1] + 1, left : columns[-1] + 1].copy()  # a view would keep the frame
        return cls(top, left, crop, int(np.count_nonzero(crop)))

    @property
    def center(self) -> tuple[float, float]:
        """(y, x) of the middle of the box."""
        return self.top + self.mask.shape[0] / 2, self.left + self.mask.shape[1] / 2

    def overlap(self, other: "Region") -> float:
        """Intersection over union."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = min(self.top + self.mask.shape[0], other.top + other.mask.shape[0])
        right = min(self.left + self.mask.shape[1], other.left + other.mask.shape[1])
        if bottom <= top or right <= left:
            return 0.0
        mine = self.mask[top - self.top : bottom - self.top, left - self.left : right - self.left]
        others = other.mask[top - other.top : bottom - other.top, left - other.left : right - other.left]
        common = int(np.count_nonzero(mine & others))
        return common / (self.area + other.area - common)


def regions_of(ids: NDArray[np.int32], numbers: Sequence[int]) -> list[Region]:
    """The regions of an id map (H, W), one for each of ``numbers``.

    Raises:
        ValueError: if a number has no pixel.
    """
    from scipy.ndimage import find_objects

    windows = find_objects(ids)
    regions = []
    for number in numbers:
        window = windows[number - 1] if 0 < number <= len(windows) else None
        if window is None:
            raise ValueError(f"ids must have pixels of every number, got none of {number}")
        mask = ids[window] == number
        regions.append(Region(window[0].start, window[1].start, mask, int(np.count_nonzero(mask))))
    return regions


@dataclass(eq=False)
class _Track:
    """One object: what it was when it was last seen, ``age`` frames ago, and the mean direction of its features."""

    id: int
    label: int
    region: Region
    embedding: NDArray[np.float32]
    age: int = 0


class Tracker:
    """Gives segments of a video ids that persist.

    Things: tracks and segments are matched one to one so that the sum of their affinities is largest. Affinity is the
    cosine similarity of the features plus the intersection over union with the track's last mask; a track that was not
    seen in the last frame has a little less. A pair may match only if

    - their masks overlap by ``min_overlap`` and their features are similar by ``min_similarity``, or
    - their features are similar by ``min_similarity_apart``, and the middles of their boxes are no further apart than
      ``max_step`` frame diagonals for each frame since the track was seen,
    - and the class is the same. A segment of another class matches only if it overlaps by ``min_overlap_other_class``
      too, and then counts half.

    What matches no track starts one. A track that ``max_age`` frames in a row did not show is forgotten: what is kept
    does not grow with the length of the video. Stuff has one id for each class, from its first frame on. No id is ever
    given twice.
    """

    def __init__(
        self,
        *,
        is_thing: Sequence[bool],
        max_age: int = 30,
        min_overlap: float = 0.1,
        min_similarity: float = 0.5,
        min_similarity_apart: float = 0.7,
        min_overlap_other_class: float = 0.7,
        max_step: float = 0.05,
        memory: float = 0.8,
    ) -> None:
        """Set up.

        Args:
            is_thing: of each class, K.
            max_age: frames that may miss an object before it is forgotten; 0: none.
            min_overlap: intersection over union in (0, 1].
            min_similarity, min_similarity_apart: cosine in [-1, 1].
            min_overlap_other_class: intersection over union; above 1: classes never change.
            max_step: of a thing that does not overlap its last mask, in frame diagonals a frame; 0: it must overlap.
            memory: share in [0, 1) of the old in the running mean of the features.

        Raises:
            ValueError: if a value is out of its range.
        """
        ranges = {
            "min_overlap": (min_overlap, 1e-6, 1.0),
            "min_similarity": (min_similarity, -1.0, 1.0),
            "min_similarity_apart": (min_similarity_apart, -1.0, 1.0),
            "min_overlap_other_class": (min_overlap_other_class, 0.0, math.inf),
            "max_step": (max_step, 0.0, math.inf),
            "memory": (memory, 0.0, 1 - 1e-6),
            "max_age": (max_age, 0, math.inf),
        }
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value}")
        self.is_thing = tuple(is_thing)
        self.max_age = max_age
        self.min_overlap = min_overlap
        self.min_similarity = min_similarity
        self.min_similarity_apart = min_similarity_apart
        self.min_overlap_other_class = min_overlap_other_class
        self.max_step = max_step
        self.memory = memory
        self._last_id = 0
        self.reset()

    def reset(self) -> None:
        """Forget all objects, for a cut or another video; ids go on counting."""
        self._tracks: list[_Track] = []
        self._stuff: dict[int, int] = {}
        self._size: tuple[int, int] | None = None
        self._channels: int | None = None

    def __len__(self) -> int:
        """Things that are remembered."""
        return len(self._tracks)

    def update(
        self,
        regions: Sequence[Region],
        labels: Sequence[int],
        embeddings: NDArray[np.floating],
        size: tuple[int, int],
    ) -> list[int]:
        """Go on by one frame.

        Args:
            regions: of the segments, N; 0 is allowed, and is needed for every frame that shows nothing.
            labels: contiguous class of each, N.
            embeddings: (N, C), features by which each is known again; their length does not matter.
            size: (height, width) of the frame.

        Returns:
            The id of each, from 1. Things have different ones; segments of one stuff class share theirs.

        Raises:
            ValueError: if the numbers of segments disagree, a class is unknown, features are not finite, or the size
                of the frame or of the features is another than before: `reset` is for another video.
        """
        self._check(regions, labels, embeddings, size)
        ids = [0] * len(regions)
        things = [i for i, label in enumerate(labels) if self.is_thing[label]]
        for i, label in enumerate(labels):
            if not self.is_thing[label]:
                ids[i] = self._stuff_id(label)
        directions = _directions(embeddings)
        for track in self._tracks:
            track.age += 1
        matched = self._match([regions[i] for i in things], [labels[i] for i in things], directions[things])
        for i, match in zip(things, matched, strict=True):
            if match is None:
                # a copy, since a view would keep the features of the whole frame
                new = _Track(self._new_id(), labels[i], regions[i], directions[i].copy())
                self._tracks.append(new)
                ids[i] = new.id
            else:
                mean = self.memory * match.embedding + (1 - self.memory) * directions[i]
                match.label, match.region, match.embedding, match.age = labels[i], regions[i], _directions(mean), 0
                ids[i] = match.id
        # a track of this age was missed by as many frames; one frame more, and it would be too many
        self._tracks = [track for track in self._tracks if track.age <= self.max_age]
        return ids

    def _match(
        self, regions: Sequence[Region], labels: Sequence[int], directions: NDArray[np.float32]
    ) -> list[_Track | None]:
        """The track of each thing, None for a new one."""
        from scipy.optimize import linear_sum_assignment

        matched: list[_Track | None] = [None] * len(regions)
        if not regions or not self._tracks:
            return matched
        similarities = np.stack([track.embedding for track in self._tracks]) @ directions.T  # (T, N)
        affinities = np.zeros(similarities.shape)
        for row, column in np.argwhere(similarities >= min(self.min_similarity, self.min_similarity_apart)).tolist():
            similarity = float(similarities[row, column])
            affinities[row, column] = self._affinity(self._tracks[row], regions[column], labels[column], similarity)
        for row, column in zip(*linear_sum_assignment(affinities, maximize=True), strict=True):
            if affinities[row, column] > 0:
                matched[column] = self._tracks[row]
        return matched

    def _affinity(self, track: _Track, region: Region, label: int, similarity: float) -> float:
        """What matching the two is worth, above 0; 0 if they must not match."""
        overlap, same_class = track.region.overlap(region), track.label == label
        if not same_class and overlap < self.min_overlap_other_class:
            return 0.0
        assert self._size is not None
        reach = self.max_step * track.age * math.hypot(*self._size)
        distance = math.dist(track.region.center, region.center)
        overlaps = overlap >= self.min_overlap and similarity >= self.min_similarity
        if not overlaps and (distance > reach or similarity < self.min_similarity_apart):
            return 0.0
        nearness = max(0.0, 1 - distance / reach) if reach > 0 else 0.0
        affinity = similarity + max(overlap, _NEARNESS_WEIGHT * nearness)
        if track.age > 1:
            affinity -= _MISSED_PENALTY
        return max(affinity if same_class else _OTHER_CLASS_FACTOR * affinity, 1e-9)

    def _check(
        self, regions: Sequence[Region], labels: Sequence[int], embeddings: NDArray[np.floating], size: tuple[int, int]
    ) -> None:
        if embeddings.ndim != 2 or not len(regions) == len(labels) == len(embeddings):
            raise ValueError(
                f"regions, labels and embeddings must be of equally many segments, got {len(regions)}, {len(labels)} "
                f"and shape {embeddings.shape}"
            )
        for label in labels:
            if not 0 <= label < len(self.is_thing):
                raise ValueError(f"labels must be in [0, {len(self.is_thing)}), got {label}")
        if not np.isfinite(embeddings).all():
            raise ValueError("embeddings must be finite, got infinite or NaN")
        if self._size not in (None, tuple(size)):
            raise ValueError(f"size must stay {self._size} within a video (call reset() for another), got {size}")
        if len(embeddings) and self._channels not in (None, embeddings.shape[1]):
            raise ValueError(f"embeddings must keep their {self._channels} channels, got {embeddings.shape[1]}")
        self._size = (size[0], size[1])
        self._channels = embeddings.shape[1] if len(embeddings) else self._channels

    def _stuff_id(self, label: int) -> int:
        if label not in self._stuff:
            self._stuff[label] = self._new_id()
        return self._stuff[label]

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id


def _directions(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """(..., C) of length 1; zeros stay zeros."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(length, 1e-12)).astype(np.float32)
