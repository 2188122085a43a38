"""Mask2Former: backbone, pixel decoder and transformer decoder (paper section 3)."""

import inspect
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.per_pixel import PixelCriterion
from mask2former.modeling.pixel_decoders import DeformablePixelDecoder
from mask2former.modeling.precision import Precision, check_precision, float32_products, forward_mode
from mask2former.modeling.structures import (
    MaskPrediction,
    MaskTarget,
    PackedTarget,
    PixelFeatures,
    QueryPrediction,
    unpacked,
)

ALL_LEVELS = "multi_scale_pixel_decoder"
"""The transformer decoder gets the levels of the pixel decoder as they are."""
ENCODED = "transformer_encoder"
"""It gets one map, that of the transformer encoder in the pixel decoder, which is the coarsest level."""
PIXEL_EMBEDDING = "pixel_embedding"
"""It gets one map, the mask features."""


class SegmentationHead(nn.Module):
    """The two decoders together, under their published names ``pixel_decoder`` and ``predictor``."""

    def __init__(self, *, pixel_decoder: nn.Module, predictor: nn.Module, in_feature: str = ALL_LEVELS) -> None:
        """Set up.

        Args:
            pixel_decoder: backbone maps by name -> `PixelFeatures`.
            predictor: transformer decoder, ``(PixelFeatures, all_layers)`` -> list of `MaskPrediction`.
            in_feature: which maps it attends to: `ALL_LEVELS`, `ENCODED`, `PIXEL_EMBEDDING`, or the name of a backbone
                map.
        """
        super().__init__()
        self.pixel_decoder = pixel_decoder
        self.predictor = predictor
        self.in_feature = in_feature

    def forward(
        self, features: dict[str, Tensor], all_layers: bool | None = None, *, with_masks: bool = True
    ) -> list[MaskPrediction] | list[QueryPrediction]:
        """Backbone maps to predictions; ``all_layers`` and ``with_masks`` as in the predictor.

        A predictor that does not know the latter makes masks.
        """
        pixels = self.pixel_features(features)
        if with_masks or not can_leave_masks_out(self.predictor):
            return self.predictor(pixels, all_layers)
        return self.predictor(pixels, all_layers, with_masks=False)

    def pixel_features(self, features: dict[str, Tensor]) -> PixelFeatures:
        """Backbone maps to what the transformer decoder takes."""
        return self._attended(self.pixel_decoder(features), features)

    def _attended(self, pixels: PixelFeatures, features: dict[str, Tensor]) -> PixelFeatures:
        """What the pixel decoder gave, with the maps that the transformer decoder is to see as its levels."""
        if self.in_feature in (ALL_LEVELS, ENCODED):
            return pixels
        level = pixels.mask_features if self.in_feature == PIXEL_EMBEDDING else features[self.in_feature]
        return pixels._replace(levels=[level])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # The first releases kept the pixel decoder directly in the head. Only names can tell: version numbers
        # get lost when a state dict is filtered or saved anew, and renaming current names would leave the
        # pixel decoder silently random.
        names = [n for n in state_dict if n.startswith(prefix)]
        decoder = prefix + "pixel_decoder."
        if not any(n.startswith(decoder) for n in names):
            for name in names:
                if not name.startswith(prefix + "predictor."):
                    state_dict[decoder + name[len(prefix) :]] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def can_leave_masks_out(module: nn.Module) -> bool:
    """Whether a head or a transformer decoder knows ``with_masks``; those of others need not."""
    return "with_masks" in inspect.signature(module.forward).parameters


class Mask2Former(nn.Module):
    """The whole model, from raw images to losses or mask predictions."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        sem_seg_head: nn.Module,
        criterion: SetCriterion | PixelCriterion,
        pixel_mean: Sequence[float] = (123.675, 116.28, 103.53),
        pixel_std: Sequence[float] = (58.395, 57.12, 57.375),
        size_divisibility: int = 32,
        precision: Precision | None = None,
    ) -> None:
        """Set up from built parts.

        Args:
            backbone: batch (B, 3, H, W) -> maps by name.
            sem_seg_head: maps by name -> list of `MaskPrediction`.
            criterion: the training loss; a `PixelCriterion` if the head classifies pixels.
            pixel_mean, pixel_std: normalisation, in the channel order of the images and in 0..255.
            size_divisibility: batches are padded to a multiple of it.
            precision: what to compute in, see `mask2former.modeling.precision`; None: as published.

        Raises:
            ValueError: if ``size_divisibility`` is below 1, or ``precision`` is another word.
        """
        super().__init__()
        if size_divisibility < 1:
            raise ValueError(f"size_divisibility must be at least 1, got {size_divisibility}")
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.criterion = criterion
        self.size_divisibility = size_divisibility
        self.precision = precision
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    @property
    def precision(self) -> Precision | None:
        """What `predict` and `losses` compute in, whatever the caller's autocast and settings; None: in those.

        Raises:
            ValueError: if it is set to another word than those of `mask2former.modeling.precision`.
        """
        return self._precision

    @precision.setter
    def precision(self, precision: Precision | None) -> None:
        check_precision("precision", precision)
        self._precision = precision
        for module in self.modules():
            if isinstance(module, DeformablePixelDecoder):
                module.in_bfloat16 = precision == "fast"

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile backbone and head, each as one graph; arguments as of `torch.compile`.

        Not `forward`, as `torch.nn.Module.compile` does: `predict` is what is called, here and by engines, and a
        `precision` is entered outside of the graphs. `torch.compile(model.predict)` is one graph where there is none.
        `predict_with_queries` has the compiled backbone only.
        """
        for part in (self.backbone, self.sem_seg_head):
            part.compile(*args, **kwargs)

    def batch_images(self, images: Sequence[Tensor]) -> Tensor:
        """Normalise images and pad them, bottom and right with zeros, to one size.

        Args:
            images: (3, H_i, W_i) in 0..255, any dtype and device.

        Returns:
            (B, 3, H, W) float32 on the model's device, H and W multiples of ``size_divisibility``.

        Raises:
            ValueError: if there is no image, or one has another shape.
        """
        if not images:
            raise ValueError("images must hold at least one image, got none")
        for index, image in enumerate(images):
            if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
                raise ValueError(f"images[{index}] must have shape (3, H, W), got {tuple(image.shape)}")
        step = self.size_divisibility
        height = -(-max(i.shape[1] for i in images) // step) * step
        width = -(-max(i.shape[2] for i in images) // step) * step
        batch = self.pixel_mean.new_zeros(len(images), 3, height, width)
        for place, image in zip(batch, images, strict=True):
            raw = image.to(self.device, non_blocking=True)
            place[:, : image.shape[1], : image.shape[2]] = (raw - self.pixel_mean) / self.pixel_std
        return batch

    def forward(self, batch: Tensor, all_layers: bool | None = None) -> list[MaskPrediction]:
        """The same as `predict`."""
        return self.predict(batch, all_layers)

    @overload
    def predict(
        self, batch: Tensor, all_layers: bool | None = None, *, with_masks: Literal[True] = True
    ) -> list[MaskPrediction]: ...

    @overload
    def predict(
        self, batch: Tensor, all_layers: bool | None, *, with_masks: Literal[False]
    ) -> list[MaskPrediction] | list[QueryPrediction]: ...

    def predict(
        self, batch: Tensor, all_layers: bool | None = None, *, with_masks: bool = True
    ) -> list[MaskPrediction] | list[QueryPrediction]:
        """Predict from a padded, normalised batch.

        Args:
            batch: (B, 3, H, W), see `batch_images`.
            all_layers: predictions of all decoder layers; None: as the model is training or not.
            with_masks: make the masks. The losses do not want them all; parts that cannot leave them out make them.

        Returns:
            Predictions, the last one final. Padding is not masked, as published. Float32 in evaluation mode if there is
            a `precision`.
        """
        with forward_mode(self.precision, batch.device.type):
            features = self.backbone(batch)
            if not with_masks and can_leave_masks_out(self.sem_seg_head):
                return self.sem_seg_head(features, all_layers, with_masks=False)
            predictions: list[MaskPrediction] = self.sem_seg_head(features, all_layers)
        if self.precision != "fast" or self.training:  # the criterion converts what it samples
            return predictions
        return [MaskPrediction(*(logits.float() for logits in prediction)) for prediction in predictions]

    def predict_with_queries(self, batch: Tensor) -> tuple[MaskPrediction, Tensor]:
        """The final prediction of `predict`, and embeddings of what the queries found.

        They change little while an object moves, so that they tell objects apart from frame to frame.

        Args:
            batch: (B, 3, H, W), see `batch_images`.

        Returns:
            The prediction and the normalised query features (B, Q, C) of the last layer.

        Raises:
            AttributeError: if the transformer decoder is not this project's and has no ``predict_with_queries``.
        """
        head: Any = self.sem_seg_head
        with forward_mode(self.precision, batch.device.type):
            prediction, queries = head.predictor.predict_with_queries(head.pixel_features(self.backbone(batch)))
        if self.precision == "fast":
            prediction, queries = MaskPrediction(*(logits.float() for logits in prediction)), queries.float()
        return prediction, queries

    def losses(
        self,
        images: Sequence[Tensor],
        targets: Sequence[MaskTarget | PackedTarget],
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Weighted training losses of a batch; their sum is what is minimised.

        Args:
            images: (3, H_i, W_i) in 0..255.
            targets: of each image; masks cover the image or, if smaller, its upper left part.
            generator: source of the random points.
        """
        batch = self.batch_images(images)
        wanted = [unpacked(target, self.device) for target in targets]
        canvas = (batch.shape[2], batch.shape[3])
        with float32_products(self.precision):
            predictions = self.predict(batch, all_layers=True, with_masks=False)
            return self.criterion.weighted(self.criterion(predictions, wanted, canvas, generator))
