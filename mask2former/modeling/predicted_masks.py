"""The masks of all layers' predictions as the training loss reads them: all at a few points, few of them whole."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mask2former.modeling.layers import at_least_float32
from mask2former.modeling.point_sampling import sample_logits
from mask2former.modeling.structures import MaskPrediction, QueryPrediction
from mask2former.ops import ms_deform_attn
from mask2former.ops.matching import PairSums, has_pair_sums, pair_sums


class Pairs(NamedTuple):
    """Matched pairs of all layers and images, sorted by image, then layer; (T,) int64 on the device of the masks.

    Attributes:
        layer, image, query: which prediction.
        target: which target of the image.
        label: the target's place among the targets of all images, one image after the other.
        counts: pairs of each image.
        layers: how many there are.
    """

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor
    label: Tensor
    counts: list[int]
    layers: int


def make_pairs(
    matched: Sequence[Sequence[tuple[Tensor, Tensor]]], numbers: Sequence[int], device: torch.device
) -> Pairs:
    """What a matcher gave, in one copy to the device that the host does not wait for.

    Args:
        matched: of each layer and image (query indices, target indices) on the CPU.
        numbers: of targets of each image.
        device: of the masks.
    """
    columns, counts, first = [], [], 0
    for b, number in enumerate(numbers):
        of_image = [of_layer[b] for of_layer in matched]
        lengths = torch.tensor([len(part) for part, _ in of_image])
        queries, chosen = (torch.cat(parts) for parts in zip(*of_image, strict=True))
        place = torch.arange(len(matched)).repeat_interleave(lengths)
        columns.append(torch.stack([place, torch.full_like(place, b), queries, chosen, first + chosen]))
        counts.append(len(queries))
        first += number
    table = torch.cat(columns, dim=1)  # (5, T)
    if device.type == "cuda":
        table = table.pin_memory()
    layer, image, query, target, label = table.to(device, non_blocking=True).unbind(0)
    return Pairs(layer, image, query, target, label, counts, len(matched))


class PredictedMasks(ABC):
    """Mask logits of all layers and images."""

    @abstractmethod
    def at_points(self, points: Tensor, layers: int) -> Iterator[Tensor]:
        """Read all masks at points of their image, without gradient.

        Args:
            points: (B, P, 2), (x, y) in [0, 1].
            layers: so many at a time.

        Yields:
            (layers or the rest, B, Q, P) float32 or, of float64 logits, float64.
        """

    def pair_sums(
        self, points: Tensor, masks: Sequence[Tensor], canvas: tuple[int, int]
    ) -> list[PairSums | None] | None:
        """What the costs are made of, where they need no logits at points: None elsewhere.

        Args:
            points: (B, P, 2), (x, y) in [0, 1].
            masks: (N_b, H_b, W_b) bool or uint8 of each image, the upper left part of the canvas.
            canvas: (height, width).

        Returns:
            Of each image, with R = layers * Q; None of one without masks.
        """
        return None

    @abstractmethod
    def of_image(self, layer: int, image: int) -> Tensor:
        """(Q, H/4, W/4)."""

    @abstractmethod
    def of_pairs(self, pairs: Pairs) -> Tensor:
        """(T, H/4, W/4), in the order of the pairs."""


class _Masks(PredictedMasks):
    """Of predictions with masks."""

    def __init__(self, predictions: Sequence[MaskPrediction | QueryPrediction]) -> None:
        self._logits = [p.mask_logits for p in predictions]  # (B, Q, H/4, W/4) each

    def at_points(self, points: Tensor, layers: int) -> Iterator[Tensor]:
        for start in range(0, len(self._logits), layers):
            chunk = self._logits[start : start + layers]
            yield torch.stack([sample_logits(logits.detach(), points) for logits in chunk])

    def of_image(self, layer: int, image: int) -> Tensor:
        return self._logits[layer][image]

    def of_pairs(self, pairs: Pairs) -> Tensor:
        # a layer at a time, without a dense stack of them all; a layer has a pair for each that another one has
        places = torch.arange(len(pairs.layer), device=pairs.layer.device).split(pairs.counts)
        of_layers = torch.cat([rows.view(pairs.layers, -1) for rows in places], dim=1)  # (layers, T / layers)
        parts = [
            logits[pairs.image[rows], pairs.query[rows]] for logits, rows in zip(self._logits, of_layers, strict=True)
        ]
        return torch.cat(parts)[of_layers.flatten().argsort()]


class _Queries(PredictedMasks):
    """Of predictions without masks.

    Reading features bilinearly and multiplying by embeddings gives what reading the products gives (both are linear),
    for a fraction of the reading; and masks that are not matched are never made.
    """

    def __init__(self, predictions: Sequence[QueryPrediction]) -> None:
        self._embeddings = torch.stack([p.mask_embeddings for p in predictions])  # (layers, B, Q, C)
        self._features = predictions[0].mask_features  # (B, C, h, w)

    def at_points(self, points: Tensor, layers: int) -> Iterator[Tensor]:
        # as deformable attention with one head and one sample: it reads all channels of a cell side by side
        value = self._features.detach().flatten(2).transpose(1, 2).unsqueeze(2)  # (B, h * w, 1, C)
        where = points.to(torch.promote_types(value.dtype, points.dtype))[:, :, None, None, None]  # (B, P, 1, 1, 1, 2)
        height, width = self._features.shape[2:]
        features = at_least_float32(ms_deform_attn(value, [(height, width)], where, torch.ones_like(where[..., 0])))
        embeddings = self._embeddings.detach().to(features.dtype)
        for chunk in embeddings.split(layers):
            with torch.autocast(points.device.type, enabled=False):
                logits = chunk @ features.transpose(1, 2)  # (layers, B, Q, P)
            yield logits

    def pair_sums(
        self, points: Tensor, masks: Sequence[Tensor], canvas: tuple[int, int]
    ) -> list[PairSums | None] | None:
        if not has_pair_sums(self._features):
            return None
        features, embeddings = (at_least_float32(x.detach()) for x in (self._features, self._embeddings))
        return [
            pair_sums(embeddings[:, b].flatten(0, 1), features[b], points[b], m, canvas) if len(m) else None
            for b, m in enumerate(masks)
        ]

    def of_image(self, layer: int, image: int) -> Tensor:
        return torch.einsum("qc,chw->qhw", self._embeddings[layer, image], self._features[image])

    def of_pairs(self, pairs: Pairs) -> Tensor:
        embeddings = self._embeddings[pairs.layer, pairs.image, pairs.query]  # (T, C)
        if embeddings.dtype == self._features.dtype and not torch.is_autocast_enabled(embeddings.device.type):
            return _Products.apply(embeddings, self._features, pairs.counts)
        parts = zip(embeddings.split(pairs.counts), self._features.flatten(2), strict=True)
        maps = [e @ f for e, f in parts]  # (T_b, h * w) each
        return torch.cat(maps).unflatten(1, self._features.shape[2:])


class _Products(torch.autograd.Function):
    """Embeddings times the features of their image: (T, C), (B, C, h, w), T_b of each image -> (T, h, w).

    Maps and gradients of all images are written into one tensor, and not made one by one and copied.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, features: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(embeddings, features)
        ctx.counts = counts
        out = embeddings.new_empty(len(embeddings), features[0, 0].numel())
        for e, f, o in zip(embeddings.split(counts), features.flatten(2), out.split(counts), strict=True):
            torch.mm(e, f, out=o)
        return out.unflatten(1, features.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        embeddings, features = ctx.saved_tensors
        of_embeddings = torch.empty_like(embeddings)
        of_features = features.new_empty(features.shape)
        parts = (x.split(ctx.counts) for x in (embeddings, gradient.flatten(1), of_embeddings))
        for e, g, oe, f, of in zip(*parts, features.flatten(2), of_features.flatten(2), strict=True):
            torch.mm(g, f.T, out=oe)
            torch.mm(e.T, g, out=of)
        return of_embeddings, of_features, None


def predicted_masks(predictions: Sequence[MaskPrediction | QueryPrediction]) -> PredictedMasks:
    """The masks of predictions of all layers."""
    queries = [p for p in predictions if isinstance(p, QueryPrediction)]
    if len(queries) == len(predictions) and all(p.mask_features is queries[0].mask_features for p in queries):
        return _Queries(queries)
    return _Masks(predictions)
