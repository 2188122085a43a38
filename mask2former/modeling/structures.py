"""The data contracts of the core, and the glossary of shape letters.

B images, Q queries, K classes without "no object", C channels, S flattened positions, L levels,
P points, M heads, N targets. Sizes are (height, width); coordinates are (x, y) in [0, 1] unless a
name says ``_px``.
"""

from typing import NamedTuple

from torch import Tensor


class PixelFeatures(NamedTuple):
    """What a pixel decoder gives (paper section 3.2.1 and 3.2.2).

    Attributes:
        mask_features: (B, C, H/4, W/4), multiplied with the mask embedding of each query.
        levels: three maps (B, C, h, w) at strides 32, 16 and 8, lowest resolution first.
    """

    mask_features: Tensor
    levels: list[Tensor]


class MaskPrediction(NamedTuple):
    """One prediction of all queries (paper section 3.2).

    Attributes:
        class_logits: (B, Q, K + 1), the last class is "no object".
        mask_logits: (B, Q, H/4, W/4), before the sigmoid.
    """

    class_logits: Tensor
    mask_logits: Tensor


class MaskTarget(NamedTuple):
    """The ground truth of one image.

    Attributes:
        labels: (N,) int64 in [0, K).
        masks: (N, H, W) bool, True inside the object; H and W are those of the image before padding.
    """

    labels: Tensor
    masks: Tensor
