"""Sigmoid cross-entropy and dice, as losses of pairs and as costs between all pairs (paper section 3.3)."""

import torch.nn.functional as F
from torch import Tensor

from mask2former.ops.mask_points import sigmoid_and_softplus_sum
from mask2former.ops.matching import PairSums


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each row, mean over its points: (T, P), (T, P) in [0, 1] -> (T,)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) of each row: (T, P), (T, P) in [0, 1] -> (T,)."""
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + targets.sum(-1) + 1)


def losses_of_sums(sums: Tensor, num_points: int) -> tuple[Tensor, Tensor]:
    """What `sigmoid_cross_entropy` and `dice` give, from the (T, 4) of `mask_loss_sums`: (T,) each."""
    cross_entropy, overlap, predicted, wanted = sums.unbind(-1)
    return cross_entropy / num_points, 1 - (2 * overlap + 1) / (predicted + wanted + 1)


def pairwise_mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean binary cross-entropy and dice loss of every row with every target, without gradient.

    With softplus(-x) = softplus(x) - x the two terms of the cross-entropy need one softplus and one matrix product.

    Args:
        logits: (..., Q, P) float32 or float64.
        targets: (..., N, P) in [0, 1], of the same type.

    Returns:
        (..., Q, N) each.
    """
    probability, softplus = sigmoid_and_softplus_sum(logits)
    columns = targets.transpose(-1, -2)  # (..., P, N)
    sums = PairSums(softplus, probability.sum(-1), logits @ columns, probability @ columns, targets.sum(-1))
    return costs_of_sums(sums, logits.shape[-1])


def costs_of_sums(sums: PairSums, num_points: int) -> tuple[Tensor, Tensor]:
    """What `pairwise_mask_costs` gives, from sums over so many points: (..., Q, N) each."""
    cross_entropy = (sums.softplus.unsqueeze(-1) - sums.inner) / num_points
    total = sums.predicted.unsqueeze(-1) + sums.wanted.unsqueeze(-2)  # (..., Q, N)
    return cross_entropy, 1 - (2 * sums.overlap + 1) / (total + 1)


def pairwise_class_cost(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the softmax probability of each target's class: (..., B, Q, K+1), (B, N) -> (..., B, Q, N)."""
    probability = class_logits.softmax(-1)
    index = labels.unsqueeze(-2).expand(*probability.shape[:-1], -1)  # (..., B, Q, N)
    return -probability.gather(-1, index)
