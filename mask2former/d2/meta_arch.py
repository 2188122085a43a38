"""The core's model as a Detectron2 meta-architecture: dicts in, losses or results out."""

from dataclasses import asdict
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_sem_seg_head
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor

from mask2former.build import build_criterion
from mask2former.config import criterion_arguments, inference_arguments, input_arguments, precision_arguments
from mask2former.d2.data import PackedMasks, dataset_metadata, is_thing_of
from mask2former.inference import ImageResult, image_result
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import MaskGeometry
from mask2former.modeling.structures import MaskPrediction, MaskTarget, PackedTarget


@META_ARCH_REGISTRY.register()
class MaskFormer(Mask2Former):
    """`Mask2Former` with post-processing, built from a config.

    Takes and gives what Detectron2's models do: a list of dicts with "image" (3, H, W), "height", "width" and, in
    training, "instances".
    """

    @configurable
    def __init__(self, *, dataset_name: str, inference: dict[str, Any], image_format: str, **parts: Any) -> None:
        """Set up from built parts.

        Args:
            dataset_name: whose metadata say which classes are things; looked up at the first result that needs
                them, so that a model can be built where no data set is registered.
            inference: from `mask2former.config.inference_arguments`.
            image_format: channel order of the images, for callers that prepare them.
            parts: of `Mask2Former`.
        """
        super().__init__(**parts)
        self.dataset_name = dataset_name
        self.inference = inference
        self.input_format = image_format
        self._is_thing: Tensor | None = None

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        backbone = build_backbone(cfg)
        datasets = tuple(cfg.DATASETS.TRAIN) + tuple(cfg.DATASETS.TEST)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "criterion": build_criterion(criterion_arguments(cfg)),
            "dataset_name": datasets[0] if datasets else "",
            "inference": inference_arguments(cfg),
            **input_arguments(cfg),
            **precision_arguments(cfg),
        }

    @property
    def is_thing(self) -> Tensor:
        """(K,) bool, from the metadata of the data set.

        Raises:
            ValueError: if the metadata do not say, or speak of other classes than the model has.
        """
        if self._is_thing is None:
            metadata = dataset_metadata(self.dataset_name)
            self._is_thing = torch.tensor(is_thing_of(metadata, self.criterion.num_classes))
        return self._is_thing

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """Weighted losses in training; otherwise results.

        Args:
            batched_inputs: "image" (3, H, W); "height" and "width" of the wanted result, default those of
                the image; in training "instances" with ``gt_classes`` and ``gt_masks`` (BitMasks, PolygonMasks
                or a tensor). Missing instances or masks mean an image without objects.

        Returns:
            Losses by name, or for each image a dict of "sem_seg" (K, H, W), "panoptic_seg" (ids, segments) and
            "instances", those that MODEL.MASK_FORMER.TEST asks for.
        """
        images = [x["image"] for x in batched_inputs]
        if self.training:
            return self.losses(images, [target_from_instances(x.get("instances")) for x in batched_inputs])
        batch = self.batch_images(images)
        class_logits, mask_logits = self.predict(batch, all_layers=False)[-1]
        results = []
        for index, inputs in enumerate(batched_inputs):
            height, width = inputs["image"].shape[1:]
            geometry = MaskGeometry(
                canvas=(batch.shape[2], batch.shape[3]),
                image_size=(height, width),
                output_size=(inputs.get("height", height), inputs.get("width", width)),
            )
            prediction = MaskPrediction(class_logits[index], mask_logits[index])
            result = image_result(prediction, geometry, self.inference, lambda: self.is_thing)
            results.append(as_detectron2(result, geometry.output_size))
        return results


def as_detectron2(result: ImageResult, output_size: tuple[int, int]) -> dict[str, Any]:
    """The results of one image, (height, width) large, as Detectron2's evaluators and drawing take them."""
    results: dict[str, Any] = {}
    if result.semantic is not None:
        results["sem_seg"] = result.semantic
    if result.panoptic is not None:
        segments = [asdict(s) | {"isthing": s.is_thing} for s in result.panoptic.segments]
        results["panoptic_seg"] = (result.panoptic.ids, segments)
    if result.instances is not None:
        results["instances"] = Instances(
            output_size,
            pred_classes=result.instances.labels,
            scores=result.instances.scores,
            pred_masks=result.instances.masks,
            pred_boxes=Boxes(result.instances.boxes),
            **({} if result.instances.queries is None else {"pred_queries": result.instances.queries}),
        )
    return results


def target_from_instances(instances: Instances | None) -> MaskTarget | PackedTarget:
    """Ground truth of one image from Detectron2's structure, whichever mapper made it.

    Raises:
        ValueError: if ``gt_masks`` has a type that is no mask, or there are classes without masks.
    """
    if instances is None or not instances.get_fields() or len(instances) == 0:
        return MaskTarget(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 1, 1, dtype=torch.bool))
    if not instances.has("gt_masks"):
        raise ValueError(
            f"instances must have gt_masks for its {len(instances)} objects, got {sorted(instances.get_fields())}; "
            "Detectron2's own mapper makes them if MODEL.MASK_ON is True"
        )
    masks = instances.gt_masks
    if isinstance(masks, PackedMasks) and masks.packed is not None:
        objects, maps = masks.packed
        labels = instances.gt_classes.to(objects)  # which somebody may have changed
        return PackedTarget(torch.cat([labels[:, None], objects[:, 1:]], dim=1), maps)
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
    if isinstance(masks, BitMasks):
        masks = masks.tensor
    if not isinstance(masks, Tensor):
        raise ValueError(f"gt_masks must be BitMasks, PolygonMasks or a tensor, got {type(masks).__name__}")
    return MaskTarget(instances.gt_classes.long(), masks if masks.dtype == torch.uint8 else masks.bool())
