"""The training loss: matching, class loss and mask losses with deep supervision (paper section 3.3)."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.layers import at_least_float32
from mask2former.modeling.losses import dice, losses_of_sums, sigmoid_cross_entropy
from mask2former.modeling.matcher import HungarianMatcher
from mask2former.modeling.point_sampling import sample_masks, sample_uncertain_points
from mask2former.modeling.predicted_masks import Pairs, PredictedMasks, make_pairs, predicted_masks
from mask2former.modeling.structures import MaskPrediction, MaskTarget, QueryPrediction
from mask2former.modeling.whole_masks import whole_logits, whole_masks
from mask2former.ops.mask_points import mask_loss_sums

MaskPart = Literal["points", "masks"]
MASK_PARTS: tuple[MaskPart, ...] = get_args(MaskPart)


_ACCELERATOR_LOGITS = 1 << 26  # read at points at a time: 256 MiB; on a CPU one layer, which stays in its cache


class SetCriterion(nn.Module):
    """Losses of a set of predictions against a set of targets.

    All layers and images go through the same few operations; targets stay bool, are never padded and are only
    read at the sampled points, unless whole masks are asked for. Of predictions without masks only the matched ones
    are made.
    """

    empty_weight: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        no_object_weight: float = 0.1,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        deep_supervision: bool = True,
        match_on: MaskPart = "points",
        loss_on: MaskPart = "points",
    ) -> None:
        """Set up.

        Args:
            num_classes: K, without "no object".
            no_object_weight: weight of "no object" in the class loss.
            class_weight, mask_weight, dice_weight: weights in the sum of losses and in the matching cost.
            num_points: points a mask, for matching and for the losses.
            oversample_ratio, importance_sample_ratio: see `sample_uncertain_points`.
            deep_supervision: supervise every prediction, not only the last.
            match_on, loss_on: what matching and mask losses look at: "points", or "masks", which is every pixel of
                the canvas and takes several times the memory (Table 5).

        Raises:
            ValueError: if a number is out of its range, or ``match_on`` or ``loss_on`` is another word.
        """
        super().__init__()
        for name, part in (("match_on", match_on), ("loss_on", loss_on)):
            if part not in MASK_PARTS:
                raise ValueError(f"{name} must be one of {', '.join(MASK_PARTS)}, got {part!r}")
        if num_points < 1:
            raise ValueError(f"num_points must be at least 1, got {num_points}")
        if oversample_ratio < 1:
            raise ValueError(f"oversample_ratio must be at least 1, got {oversample_ratio}")
        if not 0 <= importance_sample_ratio <= 1:
            raise ValueError(f"importance_sample_ratio must be in [0, 1], got {importance_sample_ratio}")
        self.num_classes = num_classes
        self.weights = {"loss_ce": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.deep_supervision = deep_supervision
        self.match_on, self.loss_on = match_on, loss_on
        self.matcher = HungarianMatcher(class_weight=class_weight, mask_weight=mask_weight, dice_weight=dice_weight)
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = no_object_weight
        self.register_buffer("empty_weight", empty_weight)

    def forward(
        self,
        predictions: Sequence[MaskPrediction | QueryPrediction],
        targets: Sequence[MaskTarget],
        canvas: tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses, not weighted.

        Args:
            predictions: of each layer, the last one final.
            targets: of each image of the batch.
            canvas: (height, width) that images were padded to, and that the mask logits cover.
            generator: source of the random points, on the device of the predictions.

        Returns:
            "loss_ce", "loss_mask" and "loss_dice" of the last prediction, and of prediction i before it with
            the suffix ``_i``. Scalars.

        Raises:
            ValueError: if targets and batch do not fit, or a label is out of range.
        """
        if not self.deep_supervision:
            predictions = predictions[-1:]
        images = len(predictions[-1].class_logits)
        check_targets(targets, images=images, canvas=canvas, num_classes=self.num_classes)
        class_logits = torch.stack([at_least_float32(p.class_logits) for p in predictions])  # (layers, B, Q, K+1)
        masks = predicted_masks(predictions)
        pairs = self._match(masks, class_logits, targets, canvas, generator)
        class_loss = self._class_loss(class_logits, targets, pairs)
        mask_loss, dice_loss = self._mask_losses(masks, targets, canvas, pairs, generator)
        losses = {}
        for layer in range(len(predictions)):
            suffix = "" if layer == len(predictions) - 1 else f"_{layer}"
            losses["loss_ce" + suffix] = class_loss[layer]
            losses["loss_mask" + suffix] = mask_loss[layer]
            losses["loss_dice" + suffix] = dice_loss[layer]
        return losses

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each loss times its weight; the sum is what is minimised."""
        return {name: self.weights["_".join(name.split("_")[:2])] * loss for name, loss in losses.items()}

    @torch.no_grad()
    def _match(
        self,
        predicted: PredictedMasks,
        class_logits: Tensor,
        targets: Sequence[MaskTarget],
        canvas: tuple[int, int],
        generator: torch.Generator | None,
    ) -> Pairs:
        B, Q, device = *class_logits.shape[1:3], class_logits.device
        if self.match_on == "masks":
            matched = self.matcher.assign(
                self._whole_costs(predicted, class_logits, targets, canvas), [len(t.labels) for t in targets]
            )
        else:
            points = torch.rand(B, self.num_points, 2, device=device, generator=generator)
            labels, masks = [t.labels for t in targets], [t.masks for t in targets]
            sums = predicted.pair_sums(points, masks, canvas)
            if sums is not None:
                matched = self.matcher.match_sums(class_logits, sums, self.num_points, labels)
            else:
                layers = 1 if device.type == "cpu" else max(1, _ACCELERATOR_LOGITS // (B * Q * self.num_points))
                wanted = [sample_masks(m, points[b], canvas) for b, m in enumerate(masks)]  # (N_b, P)
                matched = self.matcher.match(class_logits, predicted.at_points(points, layers), labels, wanted)
        return make_pairs(matched, [len(t.labels) for t in targets], device)

    def _whole_costs(
        self,
        predicted: PredictedMasks,
        class_logits: Tensor,
        targets: Sequence[MaskTarget],
        canvas: tuple[int, int],
    ) -> Tensor:
        """(layers, B, Q, widest): costs on whole masks, one layer and image at a time, which bounds the memory."""
        widest = max((len(t.labels) for t in targets), default=0)
        costs = class_logits.new_zeros(*class_logits.shape[:3], widest)
        for image, (labels, masks) in enumerate(targets):
            if len(labels) == 0:
                continue
            wanted = whole_masks(masks, canvas)  # (N, H * W)
            for layer in range(len(class_logits)):
                logits = whole_logits(predicted.of_image(layer, image), canvas)  # (Q, H * W)
                found = self.matcher.cost(
                    class_logits[layer, image][None], logits[None], labels[None], wanted[None]
                )  # (1, Q, N)
                costs[layer, image, :, : len(labels)] = found[0]
        return costs

    def _class_loss(self, class_logits: Tensor, targets: Sequence[MaskTarget], pairs: Pairs) -> Tensor:
        """(layers,): weighted cross-entropy over all queries, divided by the sum of the weights.

        The sum is the mean over all processes, so that several processes give the gradient that one gives with all
        their images, whatever the number of targets in each.
        """
        layers, B, Q = class_logits.shape[:3]
        wanted = torch.full((layers * B * Q,), self.num_classes, dtype=torch.int64, device=class_logits.device)
        wanted[(pairs.layer * B + pairs.image) * Q + pairs.query] = torch.cat([t.labels for t in targets])[pairs.label]
        loss = F.cross_entropy(class_logits.flatten(0, 2), wanted, self.empty_weight, reduction="none")
        weight = self.empty_weight[wanted]
        return loss.view(layers, -1).sum(1) / average_over_ranks(weight.view(layers, -1).sum(1))

    def _mask_losses(
        self,
        predicted: PredictedMasks,
        targets: Sequence[MaskTarget],
        canvas: tuple[int, int],
        pairs: Pairs,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """((layers,), (layers,)): sums over the matched pairs, divided by the number of targets."""
        mask_logits = predicted.of_pairs(pairs)  # (T, H/4, W/4)
        masks = [t.masks for t in targets]
        if self.loss_on == "masks":
            chosen = zip(masks, pairs.target.split(pairs.counts), strict=True)
            wanted = torch.cat([whole_masks(m[index], canvas) for m, index in chosen])
            logits = whole_logits(mask_logits, canvas)  # (T, P), with P = H * W
            wanted = wanted.to(logits.dtype)  # of float32 targets and float64 logits the loss would be float32
            cross_entropy, overlap = sigmoid_cross_entropy(logits, wanted), dice(logits, wanted)  # (T,)
        else:
            points = self._points(mask_logits, generator)  # (T, P, 2)
            with torch.autocast(mask_logits.device.type, enabled=False):
                sums = mask_loss_sums(
                    at_least_float32(mask_logits),
                    points,
                    masks,
                    counts=pairs.counts,
                    index=pairs.target,
                    canvas=canvas,
                )
                cross_entropy, overlap = losses_of_sums(sums, self.num_points)  # (T,)
        count = float(sum(len(t.labels) for t in targets))
        num_masks = average_over_ranks(torch.full((), count, device=mask_logits.device)).clamp(min=1)
        zeros = cross_entropy.new_zeros(pairs.layers)
        return (
            zeros.index_add(0, pairs.layer, cross_entropy) / num_masks,
            zeros.index_add(0, pairs.layer, overlap) / num_masks,
        )

    @torch.no_grad()
    def _points(self, mask_logits: Tensor, generator: torch.Generator | None) -> Tensor:
        return sample_uncertain_points(
            mask_logits,
            num_points=self.num_points,
            oversample_ratio=self.oversample_ratio,
            importance_sample_ratio=self.importance_sample_ratio,
            generator=generator,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # The weight stands in checkpoints under its published name, but it is a setting: the config wins. A
        # checkpoint for another number of classes is left as it is, for the shape to be reported.
        saved = state_dict.get(prefix + "empty_weight")
        if saved is not None and saved.shape == self.empty_weight.shape:
            state_dict[prefix + "empty_weight"] = self.empty_weight.detach().clone()
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_targets(targets: Sequence[MaskTarget], *, images: int, canvas: tuple[int, int], num_classes: int) -> None:
    """Raise ValueError unless there is one target an image, of the right types, within canvas and classes."""
    if len(targets) != images:
        raise ValueError(f"targets must hold one entry for each of the {images} images, got {len(targets)}")
    for image, (labels, masks) in enumerate(targets):
        if labels.dtype != torch.int64:
            raise ValueError(f"targets[{image}].labels must be int64, got {labels.dtype}")
        if masks.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"targets[{image}].masks must be bool or uint8, got {masks.dtype}")
        if masks.dim() != 3 or len(masks) != len(labels):
            raise ValueError(
                f"targets[{image}].masks must have shape (N, H, W) with N = {len(labels)} labels, got "
                f"{tuple(masks.shape)}"
            )
        if masks.shape[1] > canvas[0] or masks.shape[2] > canvas[1]:
            raise ValueError(f"targets[{image}].masks must fit into the canvas {canvas}, got {tuple(masks.shape)}")
        # on a GPU the check would wait for it; there the mapper has checked
        if labels.device.type == "cpu" and not all(0 <= x < num_classes for x in labels.tolist()):
            raise ValueError(f"targets[{image}].labels must be in [0, {num_classes}), got {labels.tolist()}")


def average_over_ranks(values: Tensor) -> Tensor:
    """Mean of numbers without gradient over all processes, without a copy to the host."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()
