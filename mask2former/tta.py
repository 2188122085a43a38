"""Test-time augmentation: one result from several sizes of an image and their mirror images.

The semantic result is the mean of the views' results, as published. Panoptic and instance segmentation have no such
mean: the queries of two views do not correspond. So they are matched one-to-one, each match is averaged, and the
ordinary post-processing runs once, on a prediction with as many queries as before.

How matches are averaged, and why:

- Views of one size are joined first, the image with its mirror image, then every size with the one nearest to the
  test image. Nothing depends on which of the two is called the image, so that the result of a mirrored image is the
  mirrored result.
- Probabilities are averaged, of classes and of masks, not logits: a logit has no bound, and one sure view would outvote
  all others.
- Each query counts by its probability of being any object. A view that does not see an object gives one of its spare
  queries to the match, which means nothing. In a plain mean its mask would blur the object's, and its "no object" would
  push the score below thresholds that were chosen for plain predictions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mask2former import config
from mask2former.data.augmentations import shortest_edge_size
from mask2former.data.geometry import resize_image
from mask2former.inference import ImageResult, image_result, predict_image
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import MaskGeometry
from mask2former.modeling.structures import MaskPrediction

_TINY = 1e-6  # least weight and probability: quotients and logarithms stay finite


@dataclass(frozen=True, kw_only=True)
class TestAugmentation:
    """Which views of a test image are predicted from.

    Attributes:
        min_sizes: shorter edges of the resized images.
        max_size: bound for the longer edge, which wins.
        flip: each size also mirrored, left to right.

    Raises:
        ValueError: if there is no size, or one is below 1.
    """

    __test__ = False  # the name is no test class

    min_sizes: Sequence[int]
    max_size: int
    flip: bool

    def __post_init__(self) -> None:
        if not self.min_sizes or min(self.min_sizes) < 1:
            raise ValueError(f"min_sizes must be at least one size of at least 1, got {self.min_sizes}")
        if self.max_size < 1:
            raise ValueError(f"max_size must be at least 1, got {self.max_size}")

    @classmethod
    def from_config(cls, cfg: Any) -> "TestAugmentation | None":
        """What TEST.AUG of a config says; None if it is off."""
        arguments = config.tta_arguments(cfg)
        return cls(**arguments) if arguments.pop("enabled") else None

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of each resized image, the one nearest to the image itself first, the others in order."""
        sizes = [shortest_edge_size((height, width), edge, self.max_size) for edge in self.min_sizes]
        nearest = min(range(len(sizes)), key=lambda place: abs(sizes[place][0] * sizes[place][1] - height * width))
        return [sizes[nearest], *sizes[:nearest], *sizes[nearest + 1 :]]


@torch.no_grad()
def augmented_result(
    model: Mask2Former,
    image: Tensor,
    output_size: tuple[int, int],
    settings: Mapping[str, Any],
    is_thing: Callable[[], Tensor],
    augmentation: TestAugmentation,
) -> ImageResult:
    """Predict from all views of an image and post-process; one view alone gives the plain result, bit for bit.

    Views are added up one by one, so that memory does not grow with their number. It is that of the largest one, and
    about five times its mask logits where there are panoptic or instance results.

    Args:
        model: in evaluation mode.
        image: (3, h, w) uint8, resized as for a plain test; views are resized from it, as published.
        output_size: (height, width) of the result.
        settings: from `mask2former.config.inference_arguments`.
        is_thing: gives (K,) bool; asked only if a result needs it.
        augmentation: the views.
    """
    sizes = augmentation.sizes(image.shape[1], image.shape[2])
    if len(sizes) == 1 and not augmentation.flip:
        return image_result(*predict_image(model, _resized(image, sizes[0]), output_size), settings, is_thing)
    semantic, queries = _SemanticMean(), _QueryMean(largest=max(sizes, key=lambda size: size[0] * size[1]))
    semantic_alone = {**settings, "panoptic_on": False, "instance_on": False}
    without_semantic = {**settings, "semantic_on": False}
    for size in sizes:
        views = _views_of_size(model, _resized(image, size), output_size, with_mirrored=augmentation.flip)
        if settings["semantic_on"]:
            for view in views:
                semantic.add(image_result(view.prediction, view.geometry, semantic_alone, is_thing).semantic, view)
        if settings["panoptic_on"] or settings["instance_on"]:
            queries.add(views)
    if queries.total is None:
        return ImageResult(semantic.mean(), None, None)
    result = image_result(*queries.prediction(output_size), without_semantic, is_thing)
    return result._replace(semantic=semantic.mean() if settings["semantic_on"] else None)


class _View(NamedTuple):
    """What the model sees in one view."""

    prediction: MaskPrediction
    geometry: MaskGeometry
    is_mirrored: bool


def _views_of_size(
    model: Mask2Former, image: Tensor, output_size: tuple[int, int], *, with_mirrored: bool
) -> list[_View]:
    """The image, and its mirror image if that is wanted; each alone, so that neither depends on the other's bits."""
    views = [_View(*predict_image(model, image, output_size), False)]
    if with_mirrored:
        views.append(_View(*predict_image(model, image.flip(2), output_size), True))
    return views


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8 -> (3, *size) uint8."""
    if image.shape[1:] == size:
        return image
    pixels = np.ascontiguousarray(image.cpu().numpy().transpose(1, 2, 0))  # (h, w, 3)
    return torch.from_numpy(resize_image(pixels, *size).transpose(2, 0, 1).copy())


class _SemanticMean:
    """The mean of semantic scores."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, scores: Tensor | None, view: _View) -> None:
        """Add the scores (K, H, W) of a view."""
        assert scores is not None
        upright = scores.flip(2) if view.is_mirrored else scores
        self._sum = upright if self._sum is None else self._sum.add_(upright)  # in place: it can be gigabytes
        self._count += 1

    def mean(self) -> Tensor:
        """(K, H, W)."""
        assert self._sum is not None
        return self._sum.div_(self._count)


class _Votes(NamedTuple):
    """What some views say of the same Q queries, added up, on a grid (h, w) over the upright image.

    Attributes:
        weights: (Q,) probabilities of being any object.
        classes: (Q, K + 1) class probabilities times these.
        masks: (Q, h, w) mask probabilities times these.
    """

    weights: Tensor
    classes: Tensor
    masks: Tensor


class _QueryMean:
    """The mean of predictions whose queries do not correspond, see the top of this file.

    Attributes:
        total: of all views; None before the first one.
    """

    def __init__(self, *, largest: tuple[int, int]) -> None:
        """Set up.

        Args:
            largest: (height, width) of the largest view. The mean has the resolution of its masks.
        """
        self.total: _Votes | None = None
        self._largest = largest
        self._reference: _Votes | None = None

    def add(self, views: Sequence[_View]) -> None:
        """Add the views of one size; that of the first call is the one that all others are matched with."""
        stride = views[0].geometry.canvas[0] / views[0].prediction.mask_logits.shape[1]
        grid = (math.ceil(self._largest[0] / stride), math.ceil(self._largest[1] / stride))
        votes = _votes(views[0], grid)
        for view in views[1:]:
            votes = _joined(votes, _votes(view, grid), votes)
        if self.total is None or self._reference is None:
            self._reference, self.total = votes, votes._replace(masks=votes.masks.clone())
        else:
            self.total = _joined(self.total, votes, self._reference)

    def prediction(self, output_size: tuple[int, int]) -> tuple[MaskPrediction, MaskGeometry]:
        """The mean as a prediction of one image, and its way to the wanted size."""
        assert self.total is not None
        weights, classes, masks = self.total
        class_logits = (classes / weights[:, None]).clamp_min(_TINY**2).log()  # softmax gives the mean back
        mask_logits = (masks / weights[:, None, None]).logit(_TINY)
        grid = (masks.shape[1], masks.shape[2])
        return MaskPrediction(class_logits, mask_logits), MaskGeometry(grid, grid, output_size)


def _votes(view: _View, grid: tuple[int, int]) -> _Votes:
    classes = view.prediction.class_logits.float().softmax(-1)  # (Q, K + 1)
    weights = (1 - classes[:, -1]).clamp_min(_TINY)  # (Q,)
    masks = _upright_masks(view, grid).sigmoid_().mul_(weights[:, None, None])
    return _Votes(weights, classes * weights[:, None], masks)


def _upright_masks(view: _View, grid: tuple[int, int]) -> Tensor:
    """Mask logits (Q, *grid), read bilinearly at the centres of the cells of a grid over the upright image."""
    (canvas_height, canvas_width), (height, width) = view.geometry.canvas, view.geometry.image_size
    logits = view.prediction.mask_logits.float()
    x, y = width / canvas_width, height / canvas_height  # the image is the canvas's upper left part
    # from coordinates in the image, -1 at the left and upper edge and 1 at the others, to those on the canvas
    to_canvas = logits.new_tensor([[-x if view.is_mirrored else x, 0, x - 1], [0, y, y - 1]])
    places = F.affine_grid(to_canvas[None], [1, 1, *grid], align_corners=False)  # (1, h, w, 2)
    return F.grid_sample(logits[None], places, padding_mode="border", align_corners=False)[0]


def _joined(total: _Votes, other: _Votes, reference: _Votes) -> _Votes:
    """Add votes, each query to that of ``reference`` (whose queries are those of ``total``) which it is matched with.

    The masks of ``total`` are changed in place.
    """
    order = _match(reference, other)
    return _Votes(
        total.weights + other.weights[order],
        total.classes + other.classes[order],
        total.masks.add_(other.masks[order]),
    )


def _match(a: _Votes, b: _Votes) -> Tensor:
    """(Q,) the query of b for each of a: the one-to-one assignment of most likeness in class and mask.

    Both are in [0, 1] and 1 for equal ones: of classes the Bhattacharyya coefficient, of masks the dice coefficient of
    probabilities (with squares in the denominator).
    """
    classes_a, classes_b = a.classes / a.weights[:, None], b.classes / b.weights[:, None]  # (Q, K + 1)
    classes = classes_a.sqrt() @ classes_b.sqrt().t()  # (Q, Q)
    flat_a, flat_b = a.masks.flatten(1), b.masks.flatten(1)  # (Q, h * w)
    inner = flat_a @ flat_b.t() / (a.weights[:, None] * b.weights)  # (Q, Q)
    norms_a, norms_b = flat_a.norm(dim=1) / a.weights, flat_b.norm(dim=1) / b.weights  # (Q,)
    masks = 2 * inner / (norms_a[:, None] ** 2 + norms_b**2 + _TINY)
    likeness = torch.nan_to_num(classes + masks).double().cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(likeness, maximize=True)[1]).to(a.masks.device)
