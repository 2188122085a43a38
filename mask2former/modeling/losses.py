"""Sigmoid cross-entropy and dice, as losses of pairs and as costs between all pairs (paper section 3.3)."""

import torch.nn.functional as F
from torch import Tensor


def sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of each row, mean over its points: (T, P), (T, P) in [0, 1] -> (T,)."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


def dice(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) of each row: (T, P), (T, P) in [0, 1] -> (T,)."""
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + targets.sum(-1) + 1)


def pairwise_sigmoid_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of every row with every target: (..., Q, P), (..., N, P) -> (..., Q, N).

    With softplus(-x) = softplus(x) - x the two terms need one softplus and one matrix product.
    """
    P = logits.shape[-1]
    return (F.softplus(logits).sum(-1, keepdim=True) - logits @ targets.transpose(-1, -2)) / P


def pairwise_dice(logits: Tensor, targets: Tensor) -> Tensor:
    """Dice loss of every row with every target: (..., Q, P), (..., N, P) -> (..., Q, N)."""
    probability = logits.sigmoid()
    overlap = probability @ targets.transpose(-1, -2)  # (..., Q, N)
    total = probability.sum(-1).unsqueeze(-1) + targets.sum(-1).unsqueeze(-2)  # (..., Q, N)
    return 1 - (2 * overlap + 1) / (total + 1)


def pairwise_class_cost(class_logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the softmax probability of each target's class: (..., B, Q, K+1), (B, N) -> (..., B, Q, N)."""
    probability = class_logits.softmax(-1)
    index = labels.unsqueeze(-2).expand(*probability.shape[:-1], -1)  # (..., B, Q, N)
    return -probability.gather(-1, index)
