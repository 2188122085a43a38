"""Multi-scale deformable attention (Deformable DETR, equation 3; Mask2Former section 3.2.2).

Two public functions, each with a PyTorch reference and a compiled kernel (csrc/): `ms_deform_attn` takes sampling
locations and weights, `ms_deform_attn_fused` the raw offsets and logits of self-attention.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.ops import _extension

SpatialShapes = Sequence[tuple[int, int]]

# Before 2.7 PyTorch cannot tell exporting from compiling; taking the reference for both is right, if slower.
_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


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
        attention_weights: (B, Q, M, L, P); the caller makes them sum to one over (L, P). Both are of the dtype of
            ``value``, or float32 where that is a half type.

    Returns:
        (B, Q, M * D), dtype of ``value``. Half types are summed in float32.

    Raises:
        ValueError: naming the argument, the rule and the value, if shapes, dtypes or devices do not fit.
    """
    _check(value, spatial_shapes, {"sampling_locations": sampling_locations, "attention_weights": attention_weights})
    if not _use_kernel(value):
        return ms_deform_attn_reference(value, spatial_shapes, sampling_locations, attention_weights)
    sums = _sum_dtype(value)
    return torch.ops.mask2former.ms_deform_attn_forward(
        value, _flat(spatial_shapes), sampling_locations.to(sums), attention_weights.to(sums)
    )


def ms_deform_attn_fused(value: Tensor, spatial_shapes: SpatialShapes, offsets: Tensor, logits: Tensor) -> Tensor:
    """Deformable self-attention, in which every cell of every level is a query.

    The query of cell (i, j) of a level of size (h, w) samples each level around ((j + 0.5) / w, (i + 0.5) / h), with
    weights from a softmax over (L, P). The kernel keeps neither locations nor weights, not even for the backward pass.

    Args:
        value, spatial_shapes: as in `ms_deform_attn`.
        offsets: (B, S, M, L, P, 2), (x, y) in pixels of the sampled level.
        logits: (B, S, M, L, P). Both are of the dtype of ``value``, or float32 where that is a half type.

    Returns:
        (B, S, M * D), dtype of ``value``. Half types are summed in float32.

    Raises:
        ValueError: as in `ms_deform_attn`.
    """
    _check(value, spatial_shapes, {"offsets": offsets, "logits": logits})
    if offsets.shape[1] != value.shape[1]:
        raise ValueError(
            f"offsets must have a query a cell of value, S = {value.shape[1]}, got {offsets.shape[1]} queries"
        )
    if not _use_kernel(value):
        return ms_deform_attn_fused_reference(value, spatial_shapes, offsets, logits)
    sums = _sum_dtype(value)
    return torch.ops.mask2former.ms_deform_attn_fused_forward(
        value, _flat(spatial_shapes), offsets.to(sums), logits.to(sums)
    )


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same in plain PyTorch: differentiable, exportable, on any device. Arguments as `ms_deform_attn`."""
    B, _, M, D = value.shape
    Q, P = sampling_locations.shape[1], sampling_locations.shape[4]
    compute = _sum_dtype(value)
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


def ms_deform_attn_fused_reference(
    value: Tensor, spatial_shapes: SpatialShapes, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The same in plain PyTorch, from `ms_deform_attn_reference`. Arguments as `ms_deform_attn_fused`."""
    compute = _sum_dtype(value)
    weights = logits.to(compute).flatten(-2).softmax(-1).view(logits.shape)  # (B, S, M, L, P)
    # one by one: a copy of a list to a GPU makes the host wait, and cannot be part of a CUDA graph
    lengths = [length for h, w in spatial_shapes for length in (w, h)]
    size = torch.stack([torch.full((), n, dtype=compute, device=value.device) for n in lengths]).view(-1, 2)  # (L, 2)
    centres = torch.cat([_cell_centres(h, w, size) for h, w in spatial_shapes])  # (S, 2)
    locations = centres[:, None, None, None] + offsets.to(compute) / size[:, None]  # (B, S, M, L, P, 2)
    return ms_deform_attn_reference(value, spatial_shapes, locations, weights)


def _cell_centres(height: int, width: int, like: Tensor) -> Tensor:
    """(height * width, 2): (x, y) in [0, 1] of each cell's centre, row by row."""
    y = (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) / height
    x = (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) / width
    # expanded, not repeated: the exporter to ONNX has no repetition of numbers so often as a size of the input says
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)


def _use_kernel(value: Tensor) -> bool:
    """An exported or traced program must run where the extension is not, so it gets the plain operators."""
    return (
        not _is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and _extension.kernel_applies(value.device, value.dtype)
    )


def _sum_dtype(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def _flat(spatial_shapes: SpatialShapes) -> list[int]:
    return [size for shape in spatial_shapes for size in shape]


def _check(value: Tensor, spatial_shapes: SpatialShapes, others: dict[str, Tensor]) -> None:
    """`others` are the points, (B, Q, M, L, P, 2), and their scores, (B, Q, M, L, P), under their public names."""
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
    (points_name, points), (scores_name, scores) = others.items()
    if points.dim() != 6 or points.shape[-1] != 2:
        raise ValueError(f"{points_name} must have shape (B, Q, M, L, P, 2), got {tuple(points.shape)}")
    expected, found = (B, M, L), (points.shape[0], *points.shape[2:4])
    if found != expected:
        raise ValueError(
            f"{points_name} must agree with value and spatial_shapes in (B, M, L) = {expected}, got {found}"
        )
    if scores.shape != points.shape[:-1]:
        raise ValueError(
            f"{scores_name} must have shape (B, Q, M, L, P) = {tuple(points.shape[:-1])}, got {tuple(scores.shape)}"
        )
    _check_types(value, others)


def _check_types(value: Tensor, others: dict[str, Tensor]) -> None:
    if not value.is_floating_point():
        raise ValueError(f"value must be floating point, got {value.dtype}")
    allowed = {value.dtype: None, _sum_dtype(value): None}
    for name, tensor in others.items():
        if tensor.device != value.device:
            raise ValueError(f"{name} must be on the device of value, {value.device}, got {tensor.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.dtype not in allowed:
            rule = " or ".join(str(dtype) for dtype in allowed)
            raise ValueError(f"{name} must be {rule}, as value is {value.dtype}, got {tensor.dtype}")


def _register(name: str) -> None:
    """Tell PyTorch shapes and gradients of the operators `name`_forward and `name`_backward of the extension."""
    forward, backward = f"mask2former::{name}_forward", f"mask2former::{name}_backward"
    backward_op = getattr(torch.ops.mask2former, f"{name}_backward")

    def forward_shape(value: Tensor, spatial_shapes: list[int], points: Tensor, scores: Tensor) -> Tensor:
        return value.new_empty((value.shape[0], points.shape[1], value.shape[2] * value.shape[3]))

    def backward_shape(
        grad_output: Tensor, value: Tensor, spatial_shapes: list[int], points: Tensor, scores: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return value.new_empty(value.shape), points.new_empty(points.shape), scores.new_empty(scores.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        value, ctx.spatial_shapes, points, scores = inputs
        ctx.save_for_backward(value, points, scores)

    def differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        value, points, scores = ctx.saved_tensors
        of_value, of_points, of_scores = backward_op(grad_output, value, ctx.spatial_shapes, points, scores)
        return of_value, None, of_points, of_scores

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            f"{name}: the compiled kernel has no second derivatives; MASK2FORMER_KERNEL=0 selects the PyTorch reference"
        )

    torch.library.register_fake(forward, forward_shape)
    torch.library.register_fake(backward, backward_shape)
    torch.library.register_autograd(forward, differentiate, setup_context=save)
    torch.library.register_autograd(backward, refuse)


if _extension.extension.module is not None:
    _register("ms_deform_attn")
    _register("ms_deform_attn_fused")
