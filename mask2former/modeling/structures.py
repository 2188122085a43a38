"""The data contracts of the core, and the glossary of shape letters.

B images, Q queries, K classes without "no object", C channels, S flattened positions, L levels,
P points, M heads, N targets. Sizes are (height, width); coordinates are (x, y) in [0, 1] unless a
name says ``_px``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mask2former.ops import fused


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
        return fused.product(self.mask_embeddings, self.mask_features)

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


class PackedTarget(NamedTuple):
    """The ground truth of one image in little memory, as it goes from process to process and to a device.

    Objects that do not overlap share a map: all segments of panoptic data have one map, (H, W) bytes, instead of (N, H,
    W).

    Attributes:
        objects: (N, 3) int64: label in [0, K), number of the map, value of the object's pixels in that map.
        maps: (L, H, W) uint8. Pixels with a value that no object of the map has belong to none; 0 is such a value.
    """

    objects: Tensor
    maps: Tensor

    @property
    def labels(self) -> Tensor:
        """(N,) int64 in [0, K)."""
        return self.objects[:, 0]

    @property
    def masks(self) -> Tensor:
        """(N, H, W) bool, True inside the object; made anew at each access."""
        maps = self.maps if len(self.maps) == 1 else self.maps[self.objects[:, 1]]
        return maps == self.objects[:, 2].to(torch.uint8)[:, None, None]


def unpacked(target: MaskTarget | PackedTarget, device: torch.device) -> MaskTarget:
    """The target on a device. A packed one is unpacked there: less is to be copied."""
    ahead = device.type == "cuda"  # from pinned memory the host need not wait; to the host it must
    parts = [part.to(device, non_blocking=ahead) for part in target]
    if isinstance(target, PackedTarget):
        packed = PackedTarget(*parts)
        return MaskTarget(packed.labels, packed.masks)
    return MaskTarget(*parts)
