"""Optimal assignment of targets to queries (paper section 3.3)."""

import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mask2former.modeling.layers import at_least_float32
from mask2former.modeling.losses import costs_of_sums, pairwise_class_cost, pairwise_mask_costs
from mask2former.ops.matching import PairSums

_REPLACEMENT = 1e6  # larger than any real cost, small enough to add up without overflow


class HungarianMatcher:
    """Matches every prediction layer of every image from one batched cost and one copy to the CPU.

    Costs that are not finite are replaced by a large number and counted; training goes on, because one bad
    half-precision step must not end a run. If they persist the matcher raises.

    Attributes:
        num_calls: how often it matched, in training the iteration.
        num_nonfinite: cost entries replaced so far.
    """

    def __init__(
        self, *, class_weight: float, mask_weight: float, dice_weight: float, max_nonfinite_calls: int = 10
    ) -> None:
        """Set up.

        Args:
            class_weight, mask_weight, dice_weight: weights of the three costs.
            max_nonfinite_calls: raise after so many calls in a row with a non-finite cost.

        Raises:
            ValueError: if all weights are 0.
        """
        if class_weight == mask_weight == dice_weight == 0:
            raise ValueError("class_weight, mask_weight and dice_weight must not all be 0")
        self.class_weight, self.mask_weight, self.dice_weight = class_weight, mask_weight, dice_weight
        self.max_nonfinite_calls = max_nonfinite_calls
        self.num_calls = 0
        self.num_nonfinite = 0
        self._nonfinite_calls_in_a_row = 0
        self._warned_too_many = False

    @torch.no_grad()
    def cost(self, class_logits: Tensor, mask_logits: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        """Weighted cost of every query with every target of its image, in float32 or, of float64 logits, float64.

        Args:
            class_logits: (..., B, Q, K + 1).
            mask_logits: (..., B, Q, P), at the points of each image.
            labels: (B, N) int64.
            masks: (B, N, P) in [0, 1], at the same points.

        Returns:
            (..., B, Q, N).
        """
        with torch.autocast(class_logits.device.type, enabled=False):
            logits = at_least_float32(mask_logits)
            targets = masks.to(logits.dtype)
            classes = pairwise_class_cost(at_least_float32(class_logits), labels)
            return self._weighted(classes, *pairwise_mask_costs(logits, targets))

    @torch.no_grad()
    def match(
        self,
        class_logits: Tensor,
        mask_logits: Tensor | Iterable[Tensor],
        labels: Sequence[Tensor],
        masks: Sequence[Tensor],
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Match all layers of all images.

        Args:
            class_logits: (layers, B, Q, K + 1).
            mask_logits: (layers, B, Q, P), at the points of each image; or parts of it with some layers each, in order.
            labels: (N_b,) int64 of each image.
            masks: (N_b, P) of each image, at the same points.

        Returns:
            As `assign`.

        Raises:
            FloatingPointError: as `assign`.
        """
        counts = [len(x) for x in labels]
        if not any(counts):
            return self.assign(class_logits.new_zeros(*class_logits.shape[:3], 0), counts)
        # padded to the widest image, so that one product serves all; `assign` cuts the surplus columns off
        padded_labels = pad_sequence(list(labels), batch_first=True)  # (B, widest)
        padded_masks = pad_sequence(list(masks), batch_first=True)  # (B, widest, P)
        costs, first = [], 0
        for part in [mask_logits] if isinstance(mask_logits, Tensor) else mask_logits:
            classes = class_logits[first : first + len(part)]
            costs.append(self.cost(classes, part, padded_labels, padded_masks))
            first += len(part)
        return self.assign(torch.cat(costs), counts)

    @torch.no_grad()
    def match_sums(
        self, class_logits: Tensor, sums: Sequence[PairSums | None], num_points: int, labels: Sequence[Tensor]
    ) -> list[list[tuple[Tensor, Tensor]]]:
        """Match all layers of all images, whose mask logits have been summed up.

        Args:
            class_logits: (layers, B, Q, K + 1).
            sums: of each image, with R = layers * Q and N_b; None of one without targets.
            num_points: that the sums are over.
            labels: (N_b,) int64 of each image.

        Returns:
            As `assign`.

        Raises:
            FloatingPointError: as `assign`.
        """
        layers, _, Q = class_logits.shape[:3]
        counts = [len(x) for x in labels]
        logits = at_least_float32(class_logits)
        costs = logits.new_zeros(*class_logits.shape[:3], max(counts, default=0))
        for image, (of_image, label) in enumerate(zip(sums, labels, strict=True)):
            if of_image is not None:
                classes = pairwise_class_cost(logits[:, image], label.expand(layers, -1))  # (layers, Q, N_b)
                masks = (cost.unflatten(0, (layers, Q)) for cost in costs_of_sums(of_image, num_points))
                costs[:, image, :, : len(label)] = self._weighted(classes, *masks)
        return self.assign(costs, counts)

    def _weighted(self, classes: Tensor, cross_entropy: Tensor, dice: Tensor) -> Tensor:
        return self.class_weight * classes + self.mask_weight * cross_entropy + self.dice_weight * dice

    def assign(self, costs: Tensor, counts: Sequence[int]) -> list[list[tuple[Tensor, Tensor]]]:
        """The cheapest assignment of each layer and image.

        Args:
            costs: (layers, B, Q, N), see `cost`; of image b the first ``counts[b]`` columns count.
            counts: N_b, targets of each image, at most N.

        Returns:
            For each layer and image (query indices, target indices), int64 on the CPU, min(Q, N_b) each, in
            the order of the queries.

        Raises:
            FloatingPointError: if costs were not finite in ``max_nonfinite_calls`` calls in a row; names
                image and layer of the first one, and the iteration.
        """
        self.num_calls += 1
        num_layers, num_images, num_queries = costs.shape[:3]
        widest = max(counts, default=0)
        if widest > num_queries and not self._warned_too_many:
            self._warned_too_many = True
            warnings.warn(
                f"an image has {widest} targets but the model only {num_queries} queries: the surplus "
                "targets are not learned from; raise MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
                stacklevel=2,
            )
        if widest == 0:
            empty = torch.zeros(0, dtype=torch.int64)
            return [[(empty, empty)] * num_images for _ in range(num_layers)]
        finite = self._make_finite(costs.cpu().numpy(), counts)
        return [
            [_assign(finite[layer, image, :, :count]) for image, count in enumerate(counts)]
            for layer in range(num_layers)
        ]

    def _make_finite(self, costs: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        real = np.arange(costs.shape[-1])[None, None, None, :] < np.array(counts)[None, :, None, None]
        bad = ~np.isfinite(costs) & real
        if not bad.any():
            self._nonfinite_calls_in_a_row = 0
            return costs
        self.num_nonfinite += int(bad.sum())
        self._nonfinite_calls_in_a_row += 1
        layer, image = (int(i[0]) for i in np.nonzero(bad)[:2])
        where = f"image {image} of the batch, decoder layer {layer}, matcher call {self.num_calls}"
        if self._nonfinite_calls_in_a_row >= self.max_nonfinite_calls:
            raise FloatingPointError(
                f"matching costs were not finite in {self._nonfinite_calls_in_a_row} iterations in a row, "
                f"last in {where}: the model gives NaN or Inf; lower SOLVER.BASE_LR, or train in bfloat16 or "
                "float32"
            )
        warnings.warn(f"{int(bad.sum())} matching costs are not finite and were replaced: {where}", stacklevel=3)
        return np.where(np.isfinite(costs), costs, _REPLACEMENT)


def _assign(cost: np.ndarray) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linear_sum_assignment  # takes a seventh of the time to import this package; for training

    queries, targets = linear_sum_assignment(cost)
    return torch.as_tensor(queries, dtype=torch.int64), torch.as_tensor(targets, dtype=torch.int64)
