"""Segmentation of a video, frame by frame, with ids that stay with their objects.

    segmenter = VideoSegmenter(mask2former.load("model.safetensors", device="cuda"))
    with read_video("street.mp4") as video:
        for frame in video:
            result = segmenter(frame)
            print([(segment.id, segment.name) for segment in result.segments])
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mask2former.checkpoint import Task, check_threshold
from mask2former.data.images import Picture
from mask2former.predictor import Predictor
from mask2former.results import InstancePicture, PanopticPicture, Segment
from mask2former.tracking import Tracker, regions_of

INSTANCE_THRESHOLD = 0.5
"""Score of instances in a video where the model's settings have none: without it 100 guesses would be tracked."""


class VideoSegmenter:
    """Gives the panoptic segmentation of each frame; an object keeps its id while it can be followed.

    Each frame is segmented as a picture of its own; only the ids come from the frames before. What is remembered
    does not grow with the length of the video. Frames come one after the other: one segmenter serves one video, and
    no two threads at a time.

    Attributes:
        tracker: decides the ids.
    """

    def __init__(
        self, predictor: Predictor, *, task: Task | None = None, threshold: float | None = None, **gates: Any
    ) -> None:
        """Set up.

        Args:
            predictor: segments the frames.
            task: "panoptic" or "instance"; None: the first of these that the predictor's settings name. The instances
                of a frame become the segments of an id map, the one with the best score on top.
            threshold: in [0, 1], as for the predictor. None: its own, for instances `INSTANCE_THRESHOLD` if it has
                none.
            **gates: of the `Tracker`: max_age, min_overlap, min_similarity and others.

        Raises:
            ValueError: if the model is not for the task or tells no features of its queries, or a value is out of its
                range.
            TypeError: if there is no such gate.
        """
        possible = [name for name in predictor.settings.tasks if name != "semantic"]
        task = possible[0] if task is None and possible else task
        if task is None or task not in possible:
            raise ValueError(f"task must be one of {possible or 'none'} for videos with this model, got {task!r}")
        if threshold is not None:
            check_threshold("threshold", threshold)
        elif task == "instance":
            threshold = predictor.settings.score_threshold or INSTANCE_THRESHOLD
        decoder = predictor.model.sem_seg_head.predictor
        if not hasattr(decoder, "predict_with_queries"):
            raise ValueError(
                f"predictor must have a transformer decoder with predict_with_queries, got {type(decoder).__name__}"
            )
        self.tracker = Tracker(is_thing=[category.is_thing for category in predictor.categories], **gates)
        self._predictor = predictor
        self._task: Task = task
        self._threshold = threshold

    def __call__(self, frame: Picture) -> PanopticPicture:
        """Segment the next frame.

        Args:
            frame: of the same size as all frames before, in any form that `as_rgb` takes.

        Returns:
            The segments at the frame's own size. The id of a thing is that of the same object in earlier frames; the
            one of stuff belongs to the class. Ids count from 1 over the whole video, so that they are not contiguous
            in a frame.

        Raises:
            FileNotFoundError: if ``frame`` names no file.
            ValueError: if it cannot be read, or its size is another than before: see `reset`.
        """
        result, features = self._predictor.with_queries(frame, self._task, threshold=self._threshold)
        picture = _laid_out(result) if isinstance(result, InstancePicture) else result
        assert isinstance(picture, PanopticPicture)
        assert picture.queries is not None
        segments = picture.segments
        rows = [features[list(queries)].mean(0) for queries in picture.queries]
        embeddings = np.stack(rows) if rows else np.zeros((0, features.shape[1]), np.float32)
        height, width = picture.ids.shape
        regions = regions_of(picture.ids, [segment.id for segment in segments])
        ids = self.tracker.update(regions, [s.category_id for s in segments], embeddings, (height, width))
        return _with_ids(picture, ids)

    def reset(self) -> None:
        """Forget all objects: for a cut, another video, or frames of another size. Ids go on counting."""
        self.tracker.reset()


def _with_ids(picture: PanopticPicture, ids: list[int]) -> PanopticPicture:
    """The same segments under other ids, in the order of these."""
    table = np.zeros(len(ids) + 1, np.int32)  # by the number of the segment in its frame, from 1
    table[1:] = ids
    order = sorted(range(len(ids)), key=ids.__getitem__)
    assert picture.queries is not None
    return replace(
        picture,
        ids=table[picture.ids],
        segments=tuple(replace(picture.segments[i], id=ids[i]) for i in order),
        queries=tuple(picture.queries[i] for i in order),
    )


def _laid_out(instances: InstancePicture) -> PanopticPicture:
    """One id map of instances, the best score on top; those of which nothing is seen are left out."""
    assert instances.queries is not None
    stacked = np.zeros(instances.masks.shape[1:], np.int32)
    for place in reversed(range(len(instances.masks))):
        stacked[instances.masks[place]] = place + 1
    areas: NDArray[np.int64] = np.bincount(stacked.ravel(), minlength=len(instances.masks) + 1)
    segments: list[Segment] = []
    queries: list[tuple[int, ...]] = []
    table = np.zeros(len(areas), np.int32)
    for place, label in enumerate(instances.labels.tolist()):
        area = int(areas[place + 1])
        if area == 0:
            continue
        number = table[place + 1] = len(segments) + 1
        category = instances.categories[label]
        score = float(instances.scores[place])
        segments.append(Segment(number, label, category.name, category.is_thing, score, area))
        queries.append((int(instances.queries[place]),))
    return PanopticPicture(table[stacked], tuple(segments), instances.categories, tuple(queries))
