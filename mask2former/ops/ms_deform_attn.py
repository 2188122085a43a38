"""Multi-scale deformable attention (Deformable DETR, equation 3; Mask2Former section 3.2.2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SpatialShapes = Sequence[tuple[int, int]]


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample ``value`` bilinearly at a few locations a query and sum with weights.

    Outside of a map the value is zero; pixel (i, j) has its centre at ((j + 0.5) / w, (i + 0.5) / h). This is
    the single entry point: a native kernel is chosen here, and nowhere else.

    Args:
        value: (B, S, M, D), all levels flattened row by row and concatenated, S = sum of h * w.
        spatial_shapes: (h, w) of each of the L levels, Python ints.
        sampling_locations: (B, Q, M, L, P, 2), (x, y) in [0, 1] of the level; values outside are legal.
        attention_weights: (B, Q, M, L, P); the caller makes them sum to one over (L, P).

    Returns:
        (B, Q, M * D), dtype of ``value``. Half types are summed in float32.

    Raises:
        ValueError: naming the argument, the rule and the value, if shapes, dtypes or devices do not fit.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same in plain PyTorch: differentiable, exportable, on any device. Arguments as `ms_deform_attn`."""
    B, _, M, D = value.shape
    Q, P = sampling_locations.shape[1], sampling_locations.shape[4]
    compute = torch.promote_types(value.dtype, torch.float32)
    maps = value.to(compute).permute(0, 2, 3, 1).flatten(0, 1)  # (B*M, D, S)
    # grid_sample counts from -1 to 1
    grids = (2 * sampling_locations.to(compute) - 1).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P, 2)
    weights = attention_weights.to(compute).transpose(1, 2).flatten(0, 1)  # (B*M, Q, L, P)

    output = maps.new_zeros(B * M, D, Q)
    start = 0
    for level, (h, w) in enumerate(spatial_shapes):
        level_map = maps[..., start : start + h * w].reshape(B * M, D, h, w)
        sampled = F.grid_sample(level_map, grids[:, :, level], align_corners=False)  # (B*M, D, Q, P)
        output = output + (sampled * weights[:, None, :, level, :P]).sum(-1)
        start += h * w
    return output.reshape(B, M * D, Q).transpose(1, 2).to(value.dtype)  # (B, Q, M*D)


def _check(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> None:
    if value.dim() != 4:
        raise ValueError(f"value must have shape (B, S, M, D), got {tuple(value.shape)}")
    B, S, M, _ = value.shape
    L = len(spatial_shapes)
    if L == 0 or any(h < 1 or w < 1 for h, w in spatial_shapes):
        raise ValueError(f"spatial_shapes must be L >= 1 pairs (h, w) of at least 1, got {spatial_shapes}")
    total = sum(h * w for h, w in spatial_shapes)
    if total != S:
        raise ValueError(
            f"spatial_shapes must add up to the sequence length of value, S = {S}, got {spatial_shapes} "
            f"with sum {total}"
        )
    expected = (B, M, L)
    if sampling_locations.dim() != 6 or sampling_locations.shape[-1] != 2:
        raise ValueError(
            f"sampling_locations must have shape (B, Q, M, L, P, 2), got {tuple(sampling_locations.shape)}"
        )
    found = (sampling_locations.shape[0], *sampling_locations.shape[2:4])
    if found != expected:
        raise ValueError(
            f"sampling_locations must agree with value and spatial_shapes in (B, M, L) = {expected}, got "
            f"{found}"
        )
    if attention_weights.shape != sampling_locations.shape[:-1]:
        raise ValueError(
            f"attention_weights must have shape (B, Q, M, L, P) = {tuple(sampling_locations.shape[:-1])}, "
            f"got {tuple(attention_weights.shape)}"
        )
    others = {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    for name, tensor in others.items():
        if tensor.device != value.device:
            raise ValueError(f"{name} must be on the device of value, {value.device}, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if not value.is_floating_point():
        raise ValueError(f"value must be floating point, got {value.dtype}")
