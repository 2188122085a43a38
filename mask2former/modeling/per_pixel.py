"""Semantic segmentation by classifying pixels, the baselines of MaskFormer (Cheng et al., 2021, section 4)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.criterion import average_over_ranks, check_targets
from mask2former.modeling.layers import at_least_float32, fill_conv_xavier
from mask2former.modeling.structures import MaskPrediction, MaskTarget, PixelFeatures, per_pixel_prediction

_IGNORED = -1  # of a pixel that no mask covers; no class has this number


class PixelClassifier(nn.Module):
    """A linear classifier of the mask features' pixels, in the place of a transformer decoder."""

    def __init__(self, *, num_classes: int, mask_dim: int = 256) -> None:
        """Build with random weights.

        Args:
            num_classes: K.
            mask_dim: channels of the mask features.

        Raises:
            ValueError: if there is no class.
        """
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        super().__init__()
        classifier = nn.Conv2d(mask_dim, num_classes, 1)
        fill_conv_xavier(classifier)
        # its parameters are those of this module, so that their published names come out: predictor.weight
        self.weight, self.bias = classifier.weight, classifier.bias

    def forward(self, features: PixelFeatures, all_layers: bool | None = None) -> list[MaskPrediction]:
        """One prediction, whatever ``all_layers`` says: there is one layer."""
        return [per_pixel_prediction(F.conv2d(features.mask_features, self.weight, self.bias))]


class PixelCriterion(nn.Module):
    """Cross-entropy of pixels; those that no target covers are ignored."""

    def __init__(self, *, num_classes: int, loss_weight: float = 1.0, deep_supervision: bool = True) -> None:
        """Set up.

        Args:
            num_classes: K.
            loss_weight: what `weighted` multiplies with.
            deep_supervision: supervise every prediction, not only the last.
        """
        super().__init__()
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.deep_supervision = deep_supervision

    def forward(
        self,
        predictions: Sequence[MaskPrediction],
        targets: Sequence[MaskTarget],
        canvas: tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses, not weighted.

        Args:
            predictions: per pixel, of each layer, the last one final.
            targets: of each image of the batch. The label of a pixel is that of the last mask that covers it.
            canvas: (height, width) that images were padded to, and that logits are resized to.
            generator: not needed; nothing here is random.

        Returns:
            "loss_sem_seg" of the last prediction, and of prediction i before it with the suffix ``_i``. Means over the
            pixels that have a label; 0 if none has one. Like all criteria, this one gives several processes the
            gradient that one would have: the number of pixels is the mean over the processes.

        Raises:
            ValueError: if targets and batch do not fit, or a label is out of range.
        """
        if not self.deep_supervision:
            predictions = predictions[-1:]
        logits = [at_least_float32(p.mask_logits) for p in predictions]  # (B, K, H/4, W/4) each
        check_targets(targets, images=len(logits[-1]), canvas=canvas, num_classes=self.num_classes)
        labels = torch.stack([label_map(t, canvas) for t in targets])  # (B, *canvas)
        count = average_over_ranks((labels != _IGNORED).sum().to(logits[-1].dtype)).clamp(min=1)
        losses = {}
        for layer, small in enumerate(logits):
            suffix = "" if layer == len(logits) - 1 else f"_{layer}"
            large = F.interpolate(small, canvas, mode="bilinear", align_corners=False)
            total = F.cross_entropy(large, labels, ignore_index=_IGNORED, reduction="sum")
            losses["loss_sem_seg" + suffix] = total / count
        return losses

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss times its weight; the sum is what is minimised."""
        return {name: self.loss_weight * loss for name, loss in losses.items()}


def label_map(target: MaskTarget, canvas: tuple[int, int]) -> Tensor:
    """(*canvas) int64: the label of the last mask that covers a pixel, -1 where there is none."""
    labels, masks = target
    height, width = masks.shape[-2:]
    result = torch.full(canvas, _IGNORED, dtype=torch.int64, device=labels.device)
    part = result[:height, :width]
    for label, mask in zip(labels, masks, strict=True):
        torch.where(mask.bool(), label, part, out=part)
    return result
