"""What a training step does in every engine: parts of a batch, losses that are not finite, memory."""

import ctypes
import logging
import os
import platform
import resource
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from mask2former.modeling.precision import Precision, float32_products

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 10  # in a row, for a loss that is not finite

Sample = TypeVar("Sample")


def images_per_process(images_per_batch: int, world_size: int, accumulation_steps: int = 1) -> int:
    """How many images of a batch a process gets.

    Raises:
        ValueError: if they cannot be shared out evenly among processes and parts.
    """
    images, rest = divmod(images_per_batch, world_size)
    if rest or images < 1:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the number of processes {world_size}, got {images_per_batch}"
        )
    if images % accumulation_steps:
        raise ValueError(
            f"SOLVER.ACCUMULATION_STEPS must divide the {images} images of a process, got {accumulation_steps}"
        )
    return images


def accumulate_gradients(
    batch: Sequence[Sample],
    parts: int,
    *,
    losses_of: Callable[[Sequence[Sample]], Mapping[str, Tensor]],
    backward: Callable[[Tensor], None],
    without_synchronisation: Callable[[], AbstractContextManager[Any]] = nullcontext,
    precision: Precision | None = None,
) -> dict[str, Tensor]:
    """The mean losses over equal parts of a batch, with their gradients added up in the parameters.

    Args:
        batch: as many samples as ``parts`` divides.
        parts: of the batch, one after the other.
        losses_of: the forward pass of a part.
        backward: of the part's share of the total loss.
        without_synchronisation: a context for all parts but the last, in which processes do not exchange gradients.
        precision: the mode of the model, whose products the backward pass has, too.

    Returns:
        Losses by name, detached.
    """
    size = len(batch) // parts
    total: dict[str, Tensor] = {}
    for index in range(parts):
        with without_synchronisation() if index < parts - 1 else nullcontext(), float32_products(precision):
            losses = losses_of(batch[index * size : (index + 1) * size])
            shares = {name: loss / parts for name, loss in losses.items()}
            backward(sum_of(shares))
        for name, loss in shares.items():
            total[name] = total[name] + loss.detach() if name in total else loss.detach()
    return total


def log_precision(precision: Precision | None) -> None:
    """Say which key decides, if there is a mode: published configs switch on SOLVER.AMP as well."""
    if precision is not None:
        logger.info("MODEL.MASK_FORMER.PRECISION is %s: it decides alone, SOLVER.AMP is not read", precision)


def sum_of(losses: Mapping[str, Tensor]) -> Tensor:
    """The loss that is minimised: the sum in the order of the names."""
    first, *others = losses.values()
    for loss in others:
        first = first + loss
    return first


class SkippedSteps:
    """Counts steps in a row whose loss was not finite."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def skips(self, is_finite: bool, iteration: int, losses: Mapping[str, float]) -> bool:
        """Whether a step must change nothing.

        Args:
            is_finite: the loss is so in every process.
            iteration, losses: for the message.

        Raises:
            FloatingPointError: if it was not finite ten times in a row.
        """
        if is_finite:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        if self.in_a_row >= MAX_SKIPPED_STEPS:
            raise FloatingPointError(
                f"the loss was not finite in {self.in_a_row} iterations in a row, last in iteration "
                f"{iteration}: {dict(losses)}; lower SOLVER.BASE_LR, or set SOLVER.AMP.DTYPE bfloat16"
            )
        return True


def keep_freed_memory() -> bool:
    """Make glibc keep the memory that a training step or a picture on a CPU frees, instead of getting it anew.

    Pages from the system are filled with zeros at their first use. Memory stays at the most that was needed, until
    the process ends. Settings of malloc in the environment stand.

    Returns:
        Whether it was done; elsewhere than on Linux with glibc there is nothing to do.
    """
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    is_set |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if is_set or platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = (  # numbers of <malloc.h>
        (-4, 0),  # M_MMAP_MAX: no block is a mapping of its own
        (-1, -1),  # M_TRIM_THRESHOLD: nothing is given back
        (-2, 256 << 20),  # M_TOP_PAD: what more is fetched at a time
    )
    return all(libc.mallopt(*setting) == 1 for setting in settings)


def peak_memory_mb(device_type: str) -> float:
    """The most memory that was in use: of the GPU, or of the process on a CPU."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # kibibytes on Linux
