"""The training loss written down plainly: what `SetCriterion` is timed and tested against.

One layer, one image and one pair after the other; ground truth as float masks that are padded to the canvas and read by
``F.grid_sample``. Nothing is shared with the project's own loss, not even the sampling of points.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mask2former.modeling.structures import MaskPrediction, MaskTarget


class Points(Protocol):
    """Where random points come from: new ones for a benchmark, those of another criterion for a test."""

    def matching(self, layer: int, image: int, count: int) -> Tensor:
        """(count, 2): points for all masks of an image, (x, y) in [0, 1]."""
        ...

    def candidates(self, layer: int, image: int, pairs: int, count: int) -> Tensor:
        """(pairs, count, 2): of which the uncertain ones are taken."""
        ...

    def uniform(self, layer: int, image: int, pairs: int, count: int) -> Tensor:
        """(pairs, count, 2): the others."""
        ...


class NewPoints:
    """Uniform points from PyTorch's own generator."""

    def matching(self, layer: int, image: int, count: int) -> Tensor:
        """(count, 2)."""
        return torch.rand(count, 2)

    def candidates(self, layer: int, image: int, pairs: int, count: int) -> Tensor:
        """(pairs, count, 2)."""
        return torch.rand(pairs, count, 2)

    def uniform(self, layer: int, image: int, pairs: int, count: int) -> Tensor:
        """(pairs, count, 2)."""
        return torch.rand(pairs, count, 2)


class PlainCriterion:
    """Matching, point sampling and losses of the paper's section 3.3, for each layer by itself."""

    def __init__(
        self,
        *,
        num_classes: int,
        num_points: int,
        no_object_weight: float = 0.1,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ) -> None:
        """Set up; arguments as of `mask2former.modeling.criterion.SetCriterion`."""
        self.num_classes, self.num_points = num_classes, num_points
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(num_points * importance_sample_ratio)
        self.weights = torch.ones(num_classes + 1)
        self.weights[-1] = no_object_weight

    def __call__(
        self,
        predictions: Sequence[MaskPrediction],
        targets: Sequence[MaskTarget],
        canvas: tuple[int, int],
        points: Points,
    ) -> dict[str, Tensor]:
        """Losses by name, not weighted, under the names of `SetCriterion`."""
        padded = [pad_masks(t.masks, canvas) for t in targets]
        losses = {}
        for layer, prediction in enumerate(predictions):
            suffix = "" if layer == len(predictions) - 1 else f"_{layer}"
            pairs = self.match(layer, prediction, targets, padded, points)
            losses[f"loss_ce{suffix}"] = self.class_loss(prediction.class_logits, targets, pairs)
            mask, dice = self.mask_losses(layer, prediction.mask_logits, padded, pairs, points)
            losses[f"loss_mask{suffix}"], losses[f"loss_dice{suffix}"] = mask, dice
        return losses

    @torch.no_grad()
    def match(
        self,
        layer: int,
        prediction: MaskPrediction,
        targets: Sequence[MaskTarget],
        padded: Sequence[Tensor],
        points: Points,
    ) -> list[tuple[Tensor, Tensor]]:
        """The cheapest pairs of (query, target) of each image."""
        pairs = []
        for image, (target, masks) in enumerate(zip(targets, padded, strict=True)):
            where = points.matching(layer, image, self.num_points)
            logits = sample(prediction.mask_logits[image], where.expand(len(prediction.mask_logits[image]), -1, -1))
            wanted = sample(masks, where.expand(len(masks), -1, -1))  # (N, P)
            probability = prediction.class_logits[image].softmax(-1)
            cost = (
                -self.class_weight * probability[:, target.labels]
                + self.mask_weight * cross_entropy_cost(logits, wanted)
                + self.dice_weight * dice_cost(logits, wanted)
            )  # (Q, N)
            query, found = linear_sum_assignment(cost.numpy())
            pairs.append((torch.as_tensor(query), torch.as_tensor(found)))
        return pairs

    def class_loss(
        self, class_logits: Tensor, targets: Sequence[MaskTarget], pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Weighted cross-entropy of all queries."""
        wanted = torch.full(class_logits.shape[:2], self.num_classes)
        for image, (query, found) in enumerate(pairs):
            wanted[image, query] = targets[image].labels[found]
        return F.cross_entropy(class_logits.transpose(1, 2), wanted, self.weights)

    def mask_losses(
        self,
        layer: int,
        mask_logits: Tensor,
        padded: Sequence[Tensor],
        pairs: Sequence[tuple[Tensor, Tensor]],
        points: Points,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice of the pairs at their own points, over the number of targets."""
        cross_entropy = dice = mask_logits.new_zeros(())
        for image, (query, found) in enumerate(pairs):
            matched = mask_logits[image, query]  # (N, h, w)
            where = self.uncertain_points(layer, image, matched, points)  # (N, P, 2)
            logits, wanted = sample(matched, where), sample(padded[image][found], where)  # (N, P)
            losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            cross_entropy = cross_entropy + losses.mean(1).sum()
            probability = logits.sigmoid()
            overlap = 2 * (probability * wanted).sum(1) + 1
            dice = dice + (1 - overlap / (probability.sum(1) + wanted.sum(1) + 1)).sum()
        count = max(1, sum(len(masks) for masks in padded))
        return cross_entropy / count, dice / count

    @torch.no_grad()
    def uncertain_points(self, layer: int, image: int, matched: Tensor, points: Points) -> Tensor:
        """(N, P, 2): the candidates closest to the border of the mask, and uniform points."""
        candidates = points.candidates(layer, image, len(matched), self.num_candidates)
        certainty = sample(matched, candidates).abs()
        chosen = certainty.topk(self.num_uncertain, largest=False).indices
        uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
        others = points.uniform(layer, image, len(matched), self.num_points - self.num_uncertain)
        return torch.cat([uncertain, others], 1)


def pad_masks(masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(N, H, W) bool -> float32 with zeros up to the canvas."""
    return F.pad(masks.float(), (0, canvas[1] - masks.shape[2], 0, canvas[0] - masks.shape[1]))


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """(N, h, w) at (N, P, 2) -> (N, P)."""
    return F.grid_sample(maps[:, None], 2 * points[:, None] - 1, align_corners=False)[:, 0, 0]


def cross_entropy_cost(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy of (Q, P) with (N, P) -> (Q, N)."""
    positive = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits), reduction="none")
    negative = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none")
    return (positive @ wanted.T + negative @ (1 - wanted).T) / logits.shape[1]


def dice_cost(logits: Tensor, wanted: Tensor) -> Tensor:
    """Dice loss of (Q, P) with (N, P) -> (Q, N)."""
    probability = logits.sigmoid()
    total = probability.sum(1)[:, None] + wanted.sum(1)
    return 1 - (2 * probability @ wanted.T + 1) / (total + 1)
