"""From mask predictions to semantic, panoptic and instance segmentation (MaskFormer section 3.4).

Pure functions of one image's prediction. Queries are chosen before masks are enlarged, and enlarged in
chunks, so that memory does not grow with the number of queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_PIXELS = 1 << 26  # mask logits enlarged at a time: 256 MiB in float32


@dataclass(frozen=True)
class MaskGeometry:
    """How the mask logits of an image get to the output: canvas, crop, output, both resizes bilinear.

    Attributes:
        canvas: (height, width) of the padded batch, which the mask logits cover.
        image_size: (height, width) of the image on the canvas, its upper left part.
        output_size: (height, width) of the result.
    """

    canvas: tuple[int, int]
    image_size: tuple[int, int]
    output_size: tuple[int, int]

    def resize(self, maps: Tensor) -> Tensor:
        """(N, h, w) of the canvas -> (N, *output_size)."""
        return self.from_canvas(_resize(maps, self.canvas))

    def from_canvas(self, maps: Tensor) -> Tensor:
        """(N, *canvas) -> (N, *output_size)."""
        return _resize(maps[:, : self.image_size[0], : self.image_size[1]], self.output_size)


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


@torch.no_grad()
def semantic_segmentation(
    class_logits: Tensor, mask_logits: Tensor, geometry: MaskGeometry, *, resize_first: bool = True
) -> Tensor:
    """Sum over queries of class probability times mask probability.

    Args:
        class_logits: (Q, K + 1).
        mask_logits: (Q, h, w).
        geometry: how to get to the output.
        resize_first: bring mask logits to the output size before the sum; otherwise sum on the padded canvas
            and resize the scores.

    Returns:
        (K, *output_size) float32 scores, not normalised.
    """
    probability = class_logits.float().softmax(-1)[:, :-1]  # (Q, K)
    size = geometry.output_size if resize_first else geometry.canvas
    scores = mask_logits.new_zeros(probability.shape[1], size[0] * size[1], dtype=torch.float32)
    for chunk in _chunks(len(mask_logits), geometry):
        logits = mask_logits[chunk].float()
        logits = geometry.resize(logits) if resize_first else _resize(logits, geometry.canvas)
        scores.addmm_(probability[chunk].t(), logits.sigmoid().flatten(1))  # in place: (K, H, W) can be gigabytes
    scores = scores.unflatten(1, size)  # (K, H, W)
    return scores if resize_first else geometry.from_canvas(scores)


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
        ValueError: if ``is_thing`` has not K entries.
    """
    num_classes = class_logits.shape[-1] - 1
    if is_thing.shape != (num_classes,):
        raise ValueError(f"is_thing must have shape ({num_classes},), got {tuple(is_thing.shape)}")
    scores, labels = class_logits.float().softmax(-1).max(-1)
    kept = ((labels != num_classes) & (scores > object_mask_threshold)).nonzero().squeeze(1)
    height, width = geometry.output_size
    if len(kept) == 0:
        return PanopticResult(torch.zeros(height, width, dtype=torch.int32, device=mask_logits.device), [], [])
    scores, labels, mask_logits = scores[kept], labels[kept], mask_logits[kept]

    winner, winner_is_sure, own_area = _competition(scores, mask_logits, geometry)
    won_area = torch.bincount(winner.flatten(), minlength=len(kept))
    sure_area = torch.bincount(winner[winner_is_sure], minlength=len(kept))
    *numbers, kept_queries = torch.stack([labels, won_area, own_area, sure_area, kept]).tolist()  # one copy to the host
    segments, new_ids = _build_segments(numbers, scores.tolist(), is_thing.tolist(), overlap_threshold)
    lookup = torch.tensor(new_ids, dtype=torch.int32, device=winner.device)
    ids = torch.where(winner_is_sure, lookup[winner], 0)
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

    Returns:
        The instances.

    Raises:
        ValueError: if ``top_k`` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    probability = class_logits.float().softmax(-1)[:, :-1]  # (Q, K)
    num_classes = probability.shape[1]
    class_scores, place = probability.flatten().topk(min(top_k, probability.numel()))
    query, labels = place.div(num_classes, rounding_mode="floor"), place % num_classes
    if is_thing is not None:
        keep = is_thing.to(labels.device)[labels]
        class_scores, query, labels = class_scores[keep], query[keep], labels[keep]
    if score_threshold > 0:  # mask quality is at most 1, so these cannot reach the threshold
        keep = class_scores >= score_threshold
        class_scores, query, labels = class_scores[keep], query[keep], labels[keep]

    unique, row = query.unique(return_inverse=True)  # each mask is enlarged once
    masks, quality = _binary_masks(mask_logits[unique], geometry)
    scores = class_scores * quality[row]
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= score_threshold]
    masks = masks[row[order]]
    return InstanceResult(labels[order], scores[order], masks, masks_to_boxes(masks), query[order])


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Boxes around masks.

    Args:
        masks: (N, H, W) bool.

    Returns:
        (N, 4) float32 x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros for an empty mask.
    """
    N, H, W = masks.shape
    if N == 0:
        return torch.zeros(0, 4, device=masks.device)
    columns, rows = masks.any(1), masks.any(2)  # (N, W), (N, H)
    x0, y0 = columns.int().argmax(1), rows.int().argmax(1)  # argmax gives the first maximum
    x1, y1 = W - columns.flip(1).int().argmax(1), H - rows.flip(1).int().argmax(1)
    boxes = torch.stack([x0, y0, x1, y1], dim=1).float()
    return boxes * rows.any(1, keepdim=True)


def _competition(
    scores: Tensor, mask_logits: Tensor, geometry: MaskGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Winner of each pixel, chunk by chunk with a running maximum.

    Returns:
        winner: (H, W) int64 index of the query with the largest score times mask probability.
        winner_is_sure: (H, W) bool, the winner's mask probability is at least 0.5.
        own_area: (Q,) int64, pixels of each query with mask probability at least 0.5.
    """
    height, width = geometry.output_size
    best = mask_logits.new_full((height, width), -1.0, dtype=torch.float32)
    winner = torch.zeros(height, width, dtype=torch.int64, device=mask_logits.device)
    winner_is_sure = torch.zeros(height, width, dtype=torch.bool, device=mask_logits.device)
    own_areas = []
    for chunk in _chunks(len(mask_logits), geometry):
        probability = geometry.resize(mask_logits[chunk].float()).sigmoid()  # (chunk, H, W)
        sure = probability >= 0.5
        own_areas.append(sure.flatten(1).sum(1))
        value, index = (scores[chunk, None, None] * probability).max(0)
        better = value > best  # strictly: of equal values the first query wins, as in one arg-max
        best = torch.where(better, value, best)
        winner = torch.where(better, index + chunk.start, winner)
        winner_is_sure = torch.where(better, sure.gather(0, index[None])[0], winner_is_sure)
    return winner, winner_is_sure, torch.cat(own_areas)


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


def _binary_masks(mask_logits: Tensor, geometry: MaskGeometry) -> tuple[Tensor, Tensor]:
    """(N, H, W) bool where the logit is positive, and (N,) mean probability inside (0 if empty)."""
    masks = torch.zeros(len(mask_logits), *geometry.output_size, dtype=torch.bool, device=mask_logits.device)
    quality = mask_logits.new_zeros(len(mask_logits), dtype=torch.float32)
    for chunk in _chunks(len(mask_logits), geometry):
        logits = geometry.resize(mask_logits[chunk].float())
        inside = logits > 0
        masks[chunk] = inside
        total = (logits.sigmoid() * inside).flatten(1).sum(1)
        quality[chunk] = total / (inside.flatten(1).sum(1) + 1e-6)
    return masks, quality


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def _chunks(count: int, geometry: MaskGeometry) -> Iterator[slice]:
    largest = max(h * w for h, w in (geometry.canvas, geometry.output_size))
    step = max(1, CHUNK_PIXELS // largest)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
