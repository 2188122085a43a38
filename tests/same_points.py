"""Random points that do not depend on what else is in a batch, for tests that share one out in several ways."""

from typing import Any

import torch
from torch import Tensor

_rand = torch.rand


def _same_points(*size: Any, device: Any = None, generator: Any = None, **rest: Any) -> Tensor:
    size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    one = _rand(size[-2:], generator=torch.Generator().manual_seed(size[-2]))
    return one.expand(size).clone()


def use_same_points() -> None:
    """From now on in this process every image and every object gets the same points from `torch.rand`."""
    torch.rand = _same_points  # type: ignore[assignment]
