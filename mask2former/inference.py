"""From the prediction of one image to the results that a config asks for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mask2former import config
from mask2former.checkpoint import TASKS, PredictionSettings
from mask2former.modeling.postprocessing import (
    InstanceResult,
    MaskGeometry,
    PanopticResult,
    instance_segmentation,
    panoptic_segmentation,
    semantic_labels,
    semantic_segmentation,
)
from mask2former.modeling.structures import MaskPrediction


class Forward(Protocol):
    """What prediction needs of a model: a `Mask2Former`, or what stands in for it, in evaluation mode."""

    def batch_images(self, images: Sequence[Tensor]) -> Tensor:
        """See `Mask2Former.batch_images`."""

    def predict(self, batch: Tensor, all_layers: bool | None = None) -> list[MaskPrediction]:
        """See `Mask2Former.predict`."""

    def predict_with_queries(self, batch: Tensor) -> tuple[MaskPrediction, Tensor]:
        """See `Mask2Former.predict_with_queries`."""


class ImageResult(NamedTuple):
    """Results of one image; None for a task that is off.

    Attributes:
        semantic: (K, H, W) scores, or (H, W) labels where only these were asked for.
        panoptic: segments.
        instances: best score first.
    """

    semantic: Tensor | None
    panoptic: PanopticResult | None
    instances: InstanceResult | None

    def semantic_labels(self) -> Tensor:
        """(H, W) labels, those with the best scores; only of results that have ``semantic``."""
        assert self.semantic is not None
        return self.semantic if self.semantic.ndim == 2 else self.semantic.argmax(0)


def prediction_settings(cfg: Any) -> PredictionSettings:
    """How the model of a config predicts outside a training: what MODEL.MASK_FORMER.TEST and INPUT say."""
    inference = config.inference_arguments(cfg)
    tasks = [task for task in TASKS if inference[f"{task}_on"]]
    return PredictionSettings(
        tasks=tuple(tasks),
        object_mask_threshold=inference["object_mask_threshold"],
        overlap_threshold=inference["overlap_threshold"],
        top_k=inference["top_k"],
        score_threshold=inference["score_threshold"],
        matrix_nms_sigma=inference["matrix_nms_sigma"],
        semantic_resize_first=inference["sem_seg_postprocessing_before_inference"],
        **config.test_resize_arguments(cfg),
    )


def predict_image(
    model: Forward, image: Tensor, output_size: tuple[int, int]
) -> tuple[MaskPrediction, MaskGeometry]:
    """Predict from one image alone.

    Args:
        model: in evaluation mode.
        image: (3, h, w) in 0..255, as large as the model is to see it.
        output_size: (height, width) of the wanted result.

    Returns:
        Class logits (Q, K + 1) and mask logits (Q, h', w') of the last layer, and the way to the wanted size.
    """
    return predict_images(model, [image], [output_size])[0]


def predict_images(
    model: Forward, images: Sequence[Tensor], output_sizes: Sequence[tuple[int, int]]
) -> list[tuple[MaskPrediction, MaskGeometry]]:
    """Predict from several images together.

    Images of one size get what `predict_image` gives each of them, up to rounding. If the sizes differ, smaller images
    are padded, which changes their predictions.

    Args:
        model: in evaluation mode.
        images: (3, h_i, w_i) in 0..255, at least one.
        output_sizes: (height, width) of each wanted result.

    Returns:
        For each image what `predict_image` returns.
    """
    batch = model.batch_images(images)
    final = model.predict(batch, all_layers=False)[-1]
    canvas = (batch.shape[2], batch.shape[3])
    geometries = [
        MaskGeometry(canvas, (image.shape[1], image.shape[2]), size)
        for image, size in zip(images, output_sizes, strict=True)
    ]
    predictions = map(MaskPrediction, final.class_logits, final.mask_logits)
    return list(zip(predictions, geometries, strict=True))


def predict_image_with_queries(
    model: Forward, image: Tensor, output_size: tuple[int, int]
) -> tuple[MaskPrediction, MaskGeometry, Tensor]:
    """What `predict_image` returns, and the features (Q, C) of the queries, see `Mask2Former.predict_with_queries`."""
    batch = model.batch_images([image])
    prediction, queries = model.predict_with_queries(batch)
    geometry = MaskGeometry((batch.shape[2], batch.shape[3]), (image.shape[1], image.shape[2]), output_size)
    return MaskPrediction(prediction.class_logits[0], prediction.mask_logits[0]), geometry, queries[0]


def image_result(
    prediction: MaskPrediction,
    geometry: MaskGeometry,
    settings: Mapping[str, Any],
    is_thing: Callable[[], Tensor],
    *,
    with_scores: bool = True,
) -> ImageResult:
    """Post-process one image.

    Args:
        prediction: of the last layer, without the batch axis.
        geometry: the way back to the image's own size.
        settings: from `mask2former.config.inference_arguments`.
        is_thing: gives (K,) bool; asked only if a result needs it.
        with_scores: semantic scores of all classes, which are never there for the whole image if only labels are
            wanted.
    """
    semantic = panoptic = instances = None
    if settings["semantic_on"]:
        resize_first = settings["sem_seg_postprocessing_before_inference"]
        semantic = (semantic_segmentation if with_scores else semantic_labels)(
            *prediction, geometry, resize_first=resize_first
        )
    if settings["panoptic_on"]:
        panoptic = panoptic_segmentation(
            *prediction,
            geometry,
            is_thing=is_thing(),
            object_mask_threshold=settings["object_mask_threshold"],
            overlap_threshold=settings["overlap_threshold"],
        )
    if settings["instance_on"]:
        instances = instance_segmentation(
            *prediction,
            geometry,
            top_k=settings["top_k"],
            is_thing=is_thing() if settings["panoptic_on"] else None,
            score_threshold=settings["score_threshold"],
            matrix_nms_sigma=settings["matrix_nms_sigma"],
        )
    return ImageResult(semantic, panoptic, instances)
