"""One training step on all processes: accumulation, mixed precision, clipping, and losses that are not finite."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import Tensor, nn

from mask2former import config, solver, training
from mask2former.data import MappedSample
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.structures import MaskTarget, PackedTarget

logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What a step gave.

    Attributes:
        losses: means over all processes, by name.
        skipped: the loss was not finite somewhere, and nothing was changed.
        stops: a process was asked to stop.
    """

    losses: dict[str, float]
    skipped: bool
    stops: bool


class _Losses(nn.Module):
    """The model with its losses as the forward pass, which is what engines wrap."""

    def __init__(self, model: Mask2Former) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Sequence[Tensor], targets: Sequence[MaskTarget | PackedTarget]) -> dict[str, Tensor]:
        return self.model.losses(images, targets)


class TrainingStep:
    """Steps of a training; the same in every engine, see `mask2former.training`."""

    def __init__(self, cfg: Any, fabric: Fabric, model: Mask2Former, optimizer: torch.optim.Optimizer) -> None:
        """Set up; the model goes to its device.

        Raises:
            ValueError: if the batch cannot be shared out among processes and parts.
        """
        step = config.step_arguments(cfg)
        self.accumulation_steps, self.precision = step["accumulation_steps"], step["precision"]
        training.log_precision(self.precision)
        training.images_per_process(cfg.SOLVER.IMS_PER_BATCH, fabric.world_size, self.accumulation_steps)
        self.clip = config.clip_arguments(cfg)
        self.clips = self.clip.pop("enabled")
        self.fabric = fabric
        self.optimizer = optimizer
        precision = fabric.strategy.precision
        self.scaler = precision.scaler if isinstance(precision, MixedPrecision) else None
        self.module, self._step = fabric.setup(_Losses(model), optimizer)
        self.skipped = training.SkippedSteps()

    def run(self, batch: Sequence[MappedSample], iteration: int, *, seed: int, stop: bool = False) -> StepResult:
        """Add up the gradients of the batch's parts, clip, step.

        Args:
            batch: of this process.
            iteration, seed: decide everything random in the step.
            stop: this process was asked to stop.

        Raises:
            FloatingPointError: if the loss was not finite ten times in a row; single ones are skipped.
        """
        solver.seed_step(seed, iteration, self.fabric.global_rank)
        self.optimizer.zero_grad()
        losses = training.accumulate_gradients(
            batch,
            self.accumulation_steps,
            losses_of=lambda part: self.module([s.image for s in part], [s.target for s in part]),
            backward=self.fabric.backward,
            without_synchronisation=self._without_synchronisation,
            precision=self.precision,
        )
        values, is_finite, stops = self._agreed(losses, stop)
        skips = self.skipped.skips(is_finite, iteration, values)
        if skips:
            logger.warning("Iteration %d is skipped, its loss is not finite: %s", iteration, values)
        else:
            self._update()
        return StepResult(values, skips, stops)

    def _without_synchronisation(self) -> Any:
        return self.fabric.no_backward_sync(self.module) if self.fabric.world_size > 1 else nullcontext()

    def _update(self) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clips:
            solver.clip_gradients(self.module.parameters(), **self.clip)
        self._step.step()

    def _agreed(self, losses: dict[str, Tensor], stop: bool) -> tuple[dict[str, float], bool, bool]:
        """Mean losses, whether all are finite, and whether any process stops: one exchange and one wait for all."""
        total = training.sum_of(losses)
        flags = [~torch.isfinite(total), torch.full_like(total, stop)]  # filled, not copied from the host
        row = torch.stack([*losses.values(), *(flag.to(total.dtype) for flag in flags)])
        if self.fabric.world_size > 1:
            dist.all_reduce(row)
        *sums, bad, stops = row.tolist()
        values = {name: value / self.fabric.world_size for name, value in zip(losses, sums, strict=True)}
        return values, bad == 0, stops > 0
