"""From mask predictions to semantic, panoptic and instance segmentation (MaskFormer section 3.4).

Pure functions of one image's prediction. Queries are chosen before masks are enlarged, and enlarged in bands of rows
and a few at a time, so that besides the result only a bounded number of pixels is in memory, however large the picture
is and however many queries there are; semantic segmentation takes all queries of a band. Bands change nothing but the
rounding of sums (docs/huge_images.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mask2former.modeling.bands import MaskGeometry
from mask2former.modeling.competition import competition
from mask2former.modeling.layers import to_device
from mask2former.modeling.mask_measures import masks_to_boxes, measure_masks
from mask2former.modeling.matrix_nms import matrix_nms_decay
from mask2former.modeling.structures import MaskPrediction
from mask2former.ops.pixels import class_labels, class_scores, largest

__all__ = [
    "CompactInstances",
    "InstanceResult",
    "MaskGeometry",
    "PanopticResult",
    "PanopticSegment",
    "compact_instance_segmentation",
    "instance_segmentation",
    "masks_to_boxes",
    "panoptic_segmentation",
    "semantic_labels",
    "semantic_segmentation",
]


@dataclass(frozen=True)
class PanopticSegment:
    """One segment of a panoptic result.

    Attributes:
        id: its value in the id map, from 1.
        category_id: contiguous class index.
        is_thing: a countable object; otherwise stuff.
        score: class probability of its query; the largest one if several stuff queries were merged.
        area: pixels.
    """

    id: int
    category_id: int
    is_thing: bool
    score: float
    area: int


@dataclass(frozen=True)
class PanopticResult:
    """Panoptic segmentation.

    Attributes:
        ids: (H, W) int32, 0 where nothing is.
        segments: in the order of their ids.
        queries: of each segment the queries that it was made from, in their order; several only for merged stuff.
            None if the result does not come from queries.
    """

    ids: Tensor
    segments: list[PanopticSegment]
    queries: list[list[int]] | None = None


@dataclass(frozen=True)
class InstanceResult:
    """Instances, best score first.

    Attributes:
        labels: (N,) int64 contiguous class index.
        scores: (N,) float32, class probability times mean mask probability.
        masks: (N, H, W) bool.
        boxes: (N, 4) float32 x0, y0, x1, y1 in pixels around the mask, x1 and y1 exclusive; 0 if it is empty.
        queries: (N,) int64, the query of each; None if the result does not come from queries.
    """

    labels: Tensor
    scores: Tensor
    masks: Tensor
    boxes: Tensor
    queries: Tensor | None = None


@dataclass(frozen=True, eq=False)
class CompactInstances:
    """Instances whose masks are made one at a time, as all of them can be gigabytes. Best score first.

    Attributes:
        labels, scores, boxes: as of `InstanceResult`.
        areas: (N,) int64 pixels.
        queries: (N,) int64 place in ``mask_logits``.
        mask_logits: (Q', h, w) of the queries that became instances.
        geometry: how they get to the output.
    """

    labels: Tensor
    scores: Tensor
    boxes: Tensor
    areas: Tensor
    queries: Tensor
    mask_logits: Tensor
    geometry: MaskGeometry

    @torch.no_grad()
    def mask(self, instance: int) -> Tensor:
        """The mask (H, W) bool of an instance: the one that `InstanceResult` has."""
        mask = torch.empty(1, *self.geometry.output_size, dtype=torch.bool, device=self.mask_logits.device)
        query = self.queries[instance].view(1)  # a single number would be read by the host
        measure_masks(self.mask_logits[query], self.geometry, mask)
        return mask[0]


@torch.no_grad()
def semantic_segmentation(
    class_logits: Tensor, mask_logits: Tensor, geometry: MaskGeometry, *, resize_first: bool = True
) -> Tensor:
    """Sum over queries of class probability times mask probability.

    Args:
        class_logits: (Q, K + 1); (K, 0) if pixels were classified.
        mask_logits: (Q, h, w).
        geometry: how to get to the output.
        resize_first: bring mask logits to the output size before the sum; otherwise sum on the padded canvas
            and resize the scores.

    Returns:
        (K, *output_size) float32 scores, not normalised. If pixels were classified, their class probabilities: the
        softmax of the resized logits.
    """
    is_per_pixel = MaskPrediction(class_logits, mask_logits).is_per_pixel
    num_classes = len(mask_logits) if is_per_pixel else class_logits.shape[1] - 1
    scores = mask_logits.new_empty(num_classes, *geometry.output_size, dtype=torch.float32)
    for rows, band in _semantic_bands(class_logits, mask_logits, geometry, resize_first, as_labels=False):
        scores[:, rows] = band
    return scores


@torch.no_grad()
def semantic_labels(
    class_logits: Tensor, mask_logits: Tensor, geometry: MaskGeometry, *, resize_first: bool = True
) -> Tensor:
    """The class with the largest score of each pixel; scores of all classes are never there for the whole picture.

    Args:
        class_logits, mask_logits, geometry, resize_first: as of `semantic_segmentation`.

    Returns:
        (*output_size) int32, the arg-max of `semantic_segmentation`.
    """
    labels = torch.empty(geometry.output_size, dtype=torch.int32, device=mask_logits.device)
    for rows, band in _semantic_bands(class_logits, mask_logits, geometry, resize_first, as_labels=True):
        labels[rows] = band
    return labels


@torch.no_grad()
def panoptic_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    geometry: MaskGeometry,
    *,
    is_thing: Tensor,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> PanopticResult:
    """Give each pixel to the query with the largest score times mask probability; drop what overlaps badly.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        geometry: how to get to the output.
        is_thing: (K,) bool.
        object_mask_threshold: a query needs a class score above it.
        overlap_threshold: a segment needs so large a part of its own mask (probability >= 0.5) among the
            pixels that it won.

    Returns:
        The segments; segments of one stuff class are merged.

    Raises:
        ValueError: if ``is_thing`` has not K entries, or pixels were classified.
    """
    _check_has_masks(class_logits, mask_logits)
    num_classes = class_logits.shape[-1] - 1
    if is_thing.shape != (num_classes,):
        raise ValueError(f"is_thing must have shape ({num_classes},), got {tuple(is_thing.shape)}")
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = ((labels != num_classes) & (scores > object_mask_threshold)).nonzero().squeeze(1)
    height, width = geometry.output_size
    if len(kept) == 0:
        return PanopticResult(torch.zeros(height, width, dtype=torch.int32, device=mask_logits.device), [], [])
    scores, labels, mask_logits = scores[kept], labels[kept], mask_logits[kept]

    ids, areas = competition(scores, mask_logits, geometry)
    # one copy to the host, of scores as whole numbers with the same bits
    table = torch.stack([labels, *areas, kept, scores.view(torch.int32).long()]).cpu()
    *numbers, kept_queries = table[:-1].tolist()
    host_scores = table[-1].int().view(torch.float32).tolist()
    segments, new_ids = _build_segments(numbers, host_scores, is_thing.tolist(), overlap_threshold)
    lookup = to_device(torch.tensor([0, *new_ids], dtype=torch.int32), ids.device)
    for rows in geometry.bands(mask_logits).bands(1):
        ids[rows] = lookup[ids[rows].long()]
    queries: list[list[int]] = [[] for _ in segments]
    for query, new_id in zip(kept_queries, new_ids, strict=True):
        if new_id:
            queries[new_id - 1].append(query)
    return PanopticResult(ids, segments, queries)


@torch.no_grad()
def instance_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    geometry: MaskGeometry,
    *,
    top_k: int,
    is_thing: Tensor | None = None,
    score_threshold: float = 0.0,
    matrix_nms_sigma: float = 0.0,
) -> InstanceResult:
    """Take the best (query, class) pairs as instances; one query may appear with several classes.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        geometry: how to get to the output.
        top_k: pairs at most, clamped to Q x K.
        is_thing: (K,) bool; other classes are left out after the top k were taken, as published. None: keep
            all.
        score_threshold: keep instances whose final score is at least this; 0 keeps all.
        matrix_nms_sigma: above 0, lower the scores of masks that repeat better ones, see `matrix_nms_decay`; overlaps
            are those of the mask logits' own size. 0, as published: leave them.

    Returns:
        The instances.

    Raises:
        ValueError: if ``top_k`` is below 1, or pixels were classified.
    """
    _check_has_masks(class_logits, mask_logits)
    found = _candidates(class_logits, top_k, is_thing, score_threshold)
    queries, place = _distinct(found.queries, len(class_logits))  # each mask is enlarged once
    masks = torch.empty(len(place), *geometry.output_size, dtype=torch.bool, device=mask_logits.device)
    mask_logits = mask_logits[queries]
    measures = measure_masks(mask_logits, geometry, masks[: len(queries)])
    found = found._replace(scores=found.scores * measures.quality[place])
    scores, order = _final_scores(found, mask_logits, place, score_threshold, matrix_nms_sigma)
    place = place[order]
    for rows in geometry.bands(mask_logits).bands(len(place)):  # put in order within their memory: it can be gigabytes
        masks[: len(place), rows] = masks[place, rows]
    return InstanceResult(
        found.labels[order], scores, masks[: len(place)], measures.boxes[place], found.queries[order]
    )


@torch.no_grad()
def compact_instance_segmentation(
    class_logits: Tensor,
    mask_logits: Tensor,
    geometry: MaskGeometry,
    *,
    top_k: int,
    is_thing: Tensor | None = None,
    score_threshold: float = 0.0,
    matrix_nms_sigma: float = 0.0,
) -> CompactInstances:
    """The same instances as `instance_segmentation`, without their masks, which can be asked for one by one.

    Args:
        class_logits, mask_logits, geometry, top_k, is_thing, score_threshold, matrix_nms_sigma: as of
            `instance_segmentation`.

    Raises:
        ValueError: if ``top_k`` is below 1, or pixels were classified.
    """
    _check_has_masks(class_logits, mask_logits)
    found = _candidates(class_logits, top_k, is_thing, score_threshold)
    queries, place = _distinct(found.queries, len(class_logits))
    mask_logits = mask_logits[queries]
    measures = measure_masks(mask_logits, geometry)
    found = found._replace(scores=found.scores * measures.quality[place])
    scores, order = _final_scores(found, mask_logits, place, score_threshold, matrix_nms_sigma)
    place = place[order]
    return CompactInstances(
        found.labels[order], scores, measures.boxes[place], measures.areas[place], place, mask_logits, geometry
    )


def _check_has_masks(class_logits: Tensor, mask_logits: Tensor) -> None:
    if MaskPrediction(class_logits, mask_logits).is_per_pixel:
        raise ValueError("class_logits must be those of masks, got classified pixels, which have no objects")


class _Candidates(NamedTuple):
    """Pairs of query and class, best first, (N,) each."""

    scores: Tensor
    queries: Tensor
    labels: Tensor


def _candidates(class_logits: Tensor, top_k: int, is_thing: Tensor | None, score_threshold: float) -> _Candidates:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    probability = class_logits.float().softmax(-1)[:, :-1]  # (Q, K)
    num_classes = probability.shape[1]
    scores, place = probability.flatten().topk(min(top_k, probability.numel()))
    found = _Candidates(scores, place.div(num_classes, rounding_mode="floor"), place % num_classes)
    keep = None if is_thing is None else to_device(is_thing, place.device)[found.labels]
    if score_threshold > 0:  # mask quality is at most 1, so others cannot reach the threshold
        reaches = found.scores >= score_threshold
        keep = reaches if keep is None else keep & reaches
    if keep is None:
        return found
    chosen = keep.nonzero().squeeze(1)
    return _Candidates(*(part[chosen] for part in found))


def _distinct(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What ``queries.unique(return_inverse=True)`` gives of numbers below ``count``, with one wait for a GPU."""
    is_there = torch.zeros(count, dtype=torch.int64, device=queries.device).index_fill_(0, queries, 1)
    return is_there.nonzero().squeeze(1), (is_there.cumsum(0) - 1)[queries]


def _final_scores(
    found: _Candidates, mask_logits: Tensor, place: Tensor, score_threshold: float, matrix_nms_sigma: float
) -> tuple[Tensor, Tensor]:
    """Scores of at least the threshold, best first, and which candidates have them; ``place`` of mask logits (N,)."""
    scores = found.scores
    if matrix_nms_sigma > 0:
        scores = scores * matrix_nms_decay(scores, found.labels, mask_logits[place] > 0, matrix_nms_sigma)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= score_threshold]
    return scores[order], order


def _semantic_bands(
    class_logits: Tensor, mask_logits: Tensor, geometry: MaskGeometry, resize_first: bool, *, as_labels: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the result, and their scores (K, number of rows, W) or labels (number of rows, W)."""
    if MaskPrediction(class_logits, mask_logits).is_per_pixel:
        pixels = geometry.bands(mask_logits)
        for rows in pixels.bands(len(mask_logits)):
            scores = pixels.band(mask_logits, rows).softmax(0)
            yield rows, largest(scores)[1] if as_labels else scores
        return
    probability = class_logits.float().softmax(-1)[:, :-1]  # (Q, K)
    if resize_first:
        resizer = geometry.bands(mask_logits)
        for rows in resizer.bands(max(probability.shape)):
            logits = resizer.band(mask_logits, rows)
            yield rows, class_labels(logits, probability) if as_labels else class_scores(logits, probability)
        return
    to_canvas, from_canvas = geometry.canvas_bands(mask_logits)
    for rows in from_canvas.bands(max(probability.shape)):
        logits = to_canvas.band(mask_logits, from_canvas.source_rows(rows))
        scores = from_canvas(class_scores(logits, probability), rows)
        yield rows, largest(scores)[1] if as_labels else scores


def _build_segments(
    numbers: list[list[int]], scores: list[float], is_thing: list[bool], overlap_threshold: float
) -> tuple[list[PanopticSegment], list[int]]:
    """Segments, and the segment id of each query (0 if dropped), from plain numbers on the host."""
    segments: list[PanopticSegment] = []
    stuff_place: dict[int, int] = {}
    new_ids = []
    for label, won, own, sure, score in zip(*numbers, scores, strict=True):
        if won == 0 or own == 0 or sure == 0 or won / own < overlap_threshold:
            new_ids.append(0)
            continue
        if not is_thing[label] and label in stuff_place:
            old = segments[stuff_place[label]]
            segments[stuff_place[label]] = PanopticSegment(
                old.id, label, False, max(old.score, score), old.area + sure
            )
            new_ids.append(old.id)
            continue
        if not is_thing[label]:
            stuff_place[label] = len(segments)
        segments.append(PanopticSegment(len(segments) + 1, label, is_thing[label], score, sure))
        new_ids.append(len(segments))
    return segments, new_ids
