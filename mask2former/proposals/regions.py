"""The masks that queries predict before the decoder and after each of its layers, ranked without looking at classes.

A proposal's score says how sure the model is that there is anything, whatever it is: the probability of all classes
together, 1 - P(no object), times the mean probability of the mask's pixels. It is the score of instance segmentation
with all classes made one, so that proposals are ranked as the model would rank instances if it knew only "object".
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.per_pixel import PixelCriterion
from mask2former.modeling.postprocessing import MaskGeometry, instance_segmentation
from mask2former.modeling.transformer_decoders import MaskedAttentionDecoder


class Proposals(NamedTuple):
    """Regions of one image, best first, from one prediction.

    Attributes:
        layer: "queries" if it was made from the learned queries alone, else "layer 1", "layer 2", ...
        queries: (N,) int64, the query of each.
        scores: (N,) float32 in [0, 1].
        masks: (N, H, W) bool, where the mask's probability is above one half. They may overlap, repeat each other
            and be empty.
    """

    layer: str
    queries: Tensor
    scores: Tensor
    masks: Tensor


def check_proposes(model: Mask2Former) -> None:
    """Raise ValueError if the model has no queries that propose, because it classifies pixels."""
    if isinstance(model.criterion, PixelCriterion):
        kind = type(model.sem_seg_head.predictor).__name__
        raise ValueError(f"only a model that predicts masks proposes regions, this one classifies pixels ({kind})")


def propose(
    model: Mask2Former, image: Tensor, output_size: tuple[int, int], *, limit: int = 100
) -> Iterator[Proposals]:
    """The proposals of every prediction, first to last.

    The model runs once, at the call; masks are made prediction by prediction as they are asked for. The first
    prediction is that of the learned queries, or of the first layer where queries start as zeros.

    Args:
        model: in evaluation mode; if it is set to run its first layers only, there are no others.
        image: (3, h, w) in 0..255, as large as the model is to see it.
        output_size: (height, width) of the masks.
        limit: proposals of each prediction, the best ones.

    Raises:
        ValueError: as `check_proposes`, or if ``limit`` is below 1.
    """
    check_proposes(model)
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    with torch.inference_mode():
        batch = model.batch_images([image])
        predictions = model.predict(batch, all_layers=True)
    geometry = MaskGeometry((batch.shape[2], batch.shape[3]), (image.shape[1], image.shape[2]), output_size)
    decoder = model.sem_seg_head.predictor
    first = 0 if isinstance(decoder, MaskedAttentionDecoder) and decoder.learnable_queries else 1
    return (
        _best("queries" if layer == 0 else f"layer {layer}", class_logits[0], mask_logits[0], geometry, limit)
        for layer, (class_logits, mask_logits) in enumerate(predictions, start=first)
    )


def object_logits(class_logits: Tensor) -> Tensor:
    """Logits of "object" and "no object": (Q, K + 1) -> (Q, 2), whose softmax is 1 - P(no object), P(no object)."""
    return torch.stack([class_logits[:, :-1].logsumexp(1), class_logits[:, -1]], dim=1)


def _best(layer: str, class_logits: Tensor, mask_logits: Tensor, geometry: MaskGeometry, limit: int) -> Proposals:
    # all queries, as their order is known only when all masks have been looked at
    found = instance_segmentation(object_logits(class_logits), mask_logits, geometry, top_k=len(class_logits))
    assert found.queries is not None
    return Proposals(layer, found.queries[:limit], found.scores[:limit], found.masks[:limit])
