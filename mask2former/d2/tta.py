"""Test-time augmentation under its published name."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mask2former.config import tta_arguments
from mask2former.d2.meta_arch import MaskFormer, as_detectron2
from mask2former.data.images import read_image
from mask2former.tta import TestAugmentation, augmented_result


class SemanticSegmentorWithTTA(nn.Module):
    """A `MaskFormer` that predicts from the views of TEST.AUG; `mask2former.tta` has the rules.

    Takes and gives what the model does: all results that it has switched on, not only the semantic one.
    """

    def __init__(self, cfg: Any, model: nn.Module) -> None:
        """Set up.

        Args:
            cfg: config; its TEST.AUG counts whether it is enabled or not.
            model: a `MaskFormer`, also one wrapped for several processes.

        Raises:
            ValueError: if TEST.AUG has no size, or one below 1.
        """
        super().__init__()
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        if not isinstance(inner, MaskFormer):
            raise ValueError(f"model must be a MaskFormer, got {type(inner).__name__}")
        self.model = inner
        arguments = tta_arguments(cfg)
        arguments.pop("enabled")
        self.augmentation = TestAugmentation(**arguments)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Results, one image after the other.

        Args:
            batched_inputs: "image" (3, h, w), or "file_name" of an image that is read at its own size; "height" and
                "width" of the wanted result, default those of the image.
        """
        return [self._results(inputs) for inputs in batched_inputs]

    def _results(self, inputs: dict[str, Any]) -> dict[str, Any]:
        image = inputs["image"] if "image" in inputs else self._read(inputs["file_name"])
        size = (inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2]))
        model = self.model
        result = augmented_result(model, image, size, model.inference, lambda: model.is_thing, self.augmentation)
        return as_detectron2(result, size)

    def _read(self, file_name: str) -> Tensor:
        pixels = read_image(file_name, self.model.input_format)  # (h, w, 3)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())
