"""Golden numbers, and the weights that they were computed with."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parent / "data" / "golden"

_LEARNED_QUERIES = ("query_feat.weight", "query_embed.weight", "level_embed.weight")


def load_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of ``<name>.npz``."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def load_tensors(name: str) -> dict[str, Tensor]:
    """The numeric arrays of ``<name>.npz``; texts are left out."""
    return {k: torch.from_numpy(v) for k, v in load_arrays(name).items() if v.dtype.kind != "U"}


def load_shapes(config: str) -> dict[str, tuple[int, ...]]:
    """Shape of every state-dict entry of a published config, by name."""
    text = (GOLDEN / "state_dict_keys.json").read_text()
    return {name: tuple(shape) for name, shape in json.loads(text)[config].items()}


@torch.no_grad()
def fill_weights(model: nn.Module) -> None:
    """Give every floating-point tensor of the state dict a value that follows from its name and shape."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(_value(name, tensor.shape))


def _value(name: str, shape: torch.Size) -> Tensor:
    seed = zlib.crc32(name.encode())
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if name.endswith("running_var"):
        return 1 + normal.abs() / 10
    if name.endswith("running_mean"):
        return normal / 20
    if len(shape) < 2:
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        return centre + normal / 20
    if name.endswith(_LEARNED_QUERIES):
        return normal * 2
    fan_in = shape[1:].numel()
    return normal * (3 if "class_embed" in name else 1) / fan_in**0.5
