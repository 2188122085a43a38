"""The program that is exported: raw image in, results of one task out."""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.checkpoint import ModelDescription, Task
from mask2former.export.operators import HalfWeights, PlainAttention, halve_weights
from mask2former.export.postprocessing import (
    InstanceTensors,
    PanopticTensors,
    instance_tensors,
    panoptic_tensors,
    semantic_labels,
)
from mask2former.modeling.mask2former import Mask2Former

OUTPUTS: dict[Task, tuple[str, ...]] = {
    "panoptic": PanopticTensors._fields,
    "instance": InstanceTensors._fields,
    "semantic": ("labels",),
}


class SegmentationGraph(nn.Module):
    """A model for one task, from an RGB image to the results at its size, all in tensors."""

    is_thing: Tensor

    def __init__(
        self, network: Mask2Former, description: ModelDescription, task: Task, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Set up with a copy of the model.

        Args:
            network: the model.
            description: of this model; its settings hold.
            task: what the results are.
            dtype: float32, or float16: weights of convolutions and linear layers are stored in it, and those of
                the backbone and the transformer decoder compute in it. The pixel decoder, attention, normalisation
                and post-processing stay float32.

        Raises:
            ValueError: if the model is not for the task, or dtype is another.
        """
        super().__init__()
        settings = description.settings
        if task not in settings.tasks:
            raise ValueError(f"task must be one of {', '.join(settings.tasks)}, which the model is for, got {task!r}")
        if dtype not in (torch.float32, torch.float16):
            raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
        self.network: Mask2Former = copy.deepcopy(network).cpu().eval().requires_grad_(False)
        self.network.precision = None  # ``dtype`` says what the program computes in
        self._is_half = dtype == torch.float16
        if self._is_half:
            halve_weights(self.network)
        self.task = task
        self._flips_channels = description.image_format == "BGR"
        self._settings = settings
        self.register_buffer("is_thing", torch.tensor([c.is_thing for c in description.categories]))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Segment.

        Args:
            image: (1, 3, H, W) float32 RGB in 0..255, at the size that the model is to see.

        Returns:
            The tensors of `OUTPUTS` of the task, see `mask2former.export.postprocessing`.
        """
        batch = self._padded(image)
        with PlainAttention():
            with self._products(compute_half=True):
                maps = self.network.backbone(batch)
            with self._products(compute_half=False):  # it runs in float32 in mixed precision, too
                features = self._decoders.pixel_decoder(maps)
            with self._products(compute_half=True):
                final = self._decoders.predictor(features, False)[-1]
        return self._results(
            final.class_logits[0],
            final.mask_logits[0],
            (batch.shape[2], batch.shape[3]),
            (image.shape[2], image.shape[3]),
        )

    @property
    def _decoders(self) -> Any:
        return self.network.sem_seg_head

    def _padded(self, image: Tensor) -> Tensor:
        """The same as `Mask2Former.batch_images` of one image."""
        planes = image.flip(1) if self._flips_channels else image
        planes = (planes - self.network.pixel_mean) / self.network.pixel_std
        height, width = (_next_multiple(n, self.network.size_divisibility) for n in image.shape[2:])
        return F.pad(planes, (0, width - image.shape[3], 0, height - image.shape[2]))

    def _products(self, *, compute_half: bool) -> AbstractContextManager[Any]:
        return HalfWeights(compute_half=compute_half) if self._is_half else nullcontext()

    def _results(
        self, class_logits: Tensor, mask_logits: Tensor, canvas: tuple[int, int], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        settings, prediction = self._settings, (class_logits, mask_logits, canvas, size)
        if self.task == "semantic":
            return {"labels": semantic_labels(*prediction)}
        if self.task == "panoptic":
            return panoptic_tensors(
                *prediction,
                is_thing=self.is_thing,
                object_mask_threshold=settings.object_mask_threshold,
                overlap_threshold=settings.overlap_threshold,
            )._asdict()
        return instance_tensors(
            *prediction,
            top_k=settings.top_k,
            is_thing=self.is_thing,  # as `Predictor`: instances are things only
            score_threshold=settings.score_threshold,
            matrix_nms_sigma=settings.matrix_nms_sigma,
        )._asdict()


def _next_multiple(length: int, step: int) -> int:
    """The length rounded up.

    While exporting, the number of steps is taken through a tensor: it is then a number of which nothing is assumed.
    An expression of the length would go into every size of the model, and special cases of its value at the example
    into the exported program.
    """
    steps = (length + step - 1) // step
    if torch.compiler.is_exporting():
        steps = torch.full((), steps, dtype=torch.int64).item()  # type: ignore[assignment]
        torch._check(steps >= 1)
        torch._check(steps * step >= length)
    return steps * step
