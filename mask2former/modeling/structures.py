"""The data contracts of the core, and the glossary of shape letters.

B images, Q queries, K classes without "no object", C channels, S flattened positions, L levels,
P points, M heads, N targets. Sizes are (height, width); coordinates are (x, y) in [0, 1] unless a
name says ``_px``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PixelFeatures(NamedTuple):
    """What a pixel decoder gives (paper section 3.2.1 and 3.2.2).

    Attributes:
        mask_features: (B, C, H/4, W/4), multiplied with the mask embedding of each query.
        levels: three maps (B, C, h, w) at strides 32, 16 and 8, lowest resolution first. A decoder that attends to
            one map attends to the first one.
    """

    mask_features: Tensor
    levels: list[Tensor]


class MaskPrediction(NamedTuple):
    """One prediction of all queries (paper section 3.2), or one of all pixels.

    Attributes:
        class_logits: (B, Q, K + 1), the last class is "no object". (B, K, 0) if pixels are classified instead: query k
            is class k and has none to choose.
        mask_logits: (B, Q, H/4, W/4), before the sigmoid; if pixels are classified (B, K, H/4, W/4), before the
            softmax over the classes.
    """

    class_logits: Tensor
    mask_logits: Tensor

    @property
    def is_per_pixel(self) -> bool:
        """Whether pixels are classified, not masks; also of the prediction of one image, without the batch axis."""
        return self.class_logits.shape[-1] == 0


class QueryPrediction(NamedTuple):
    """A prediction whose masks are not made: the losses read most of them at few points, and need few of them whole.

    Attributes:
        class_logits: as of `MaskPrediction`.
        mask_embeddings: (B, Q, C).
        mask_features: (B, C, H/4, W/4), one and the same tensor in the predictions of all layers.
    """

    class_logits: Tensor
    mask_embeddings: Tensor
    mask_features: Tensor

    @property
    def mask_logits(self) -> Tensor:
        """(B, Q, H/4, W/4), made anew each time: the product of embeddings and features."""
        return torch.einsum("bqc,bchw->bqhw", self.mask_embeddings, self.mask_features)

    @property
    def with_masks(self) -> MaskPrediction:
        """The same with its masks."""
        return MaskPrediction(self.class_logits, self.mask_logits)


def per_pixel_prediction(logits: Tensor) -> MaskPrediction:
    """Class logits of every pixel, (B, K, H/4, W/4), as a prediction."""
    return MaskPrediction(logits.new_zeros(*logits.shape[:2], 0), logits)


class MaskTarget(NamedTuple):
    """The ground truth of one image.

    Attributes:
        labels: (N,) int64 in [0, K).
        masks: (N, H, W) bool, True inside the object; H and W are those of the image before padding.
    """

    labels: Tensor
    masks: Tensor
