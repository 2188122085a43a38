"""Deformable convolution (Dai et al., 2017): torchvision's where it is installed, otherwise plain PyTorch."""

from importlib.machinery import PathFinder

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.ops.ms_deform_attn import _is_exporting

_HAS_TORCHVISION = PathFinder.find_spec("torchvision") is not None  # installed; it is imported where it is used


def deform_conv2d(x: Tensor, offsets_px: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution of stride 1 whose samples are shifted, each by an offset of its own.

    Outside of the map the value is zero; the output has the size of the input. This is the single entry point:
    torchvision's operator is chosen here, and nowhere else.

    Args:
        x: (B, C, h, w).
        offsets_px: (B, 2 * k * k, h, w), for each tap of the kernel, row by row, (y, x) in pixels.
        weight: (D, C, k, k), k odd.
        bias: (D,).

    Returns:
        (B, D, h, w), dtype of ``x``. Half types are computed in float32.

    Raises:
        ValueError: naming the argument, the rule and the value, if shapes do not fit.
    """
    _check(x, offsets_px, weight, bias)
    compute = torch.promote_types(x.dtype, torch.float32)
    arguments = (x.to(compute), offsets_px.to(compute), weight.to(compute), bias.to(compute))
    if not _use_torchvision():
        return deform_conv2d_reference(*arguments).to(x.dtype)
    from torchvision.ops import deform_conv2d as torchvision_deform_conv2d

    values, offsets, kernel, shift = arguments
    return torchvision_deform_conv2d(values, offsets, kernel, shift, padding=weight.shape[-1] // 2).to(x.dtype)


def _use_torchvision() -> bool:
    """An exported or traced program must run where torchvision is not, so it gets the plain operators."""
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined]
    return not _is_exporting() and not is_traced and _HAS_TORCHVISION


def deform_conv2d_reference(x: Tensor, offsets_px: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in plain PyTorch: differentiable, exportable, on any device. Arguments as `deform_conv2d`."""
    h, w = x.shape[-2:]
    k = int(weight.shape[-1])  # a traced program has a tensor there
    rows = torch.arange(h, dtype=x.dtype, device=x.device)[:, None]  # (h, 1)
    columns = torch.arange(w, dtype=x.dtype, device=x.device)  # (w,)
    output = bias[:, None, None].expand(x.shape[0], -1, h, w)
    for tap in range(k * k):
        i, j = divmod(tap, k)
        y_px = rows + (i - k // 2) + offsets_px[:, 2 * tap]  # (B, h, w)
        x_px = columns + (j - k // 2) + offsets_px[:, 2 * tap + 1]  # (B, h, w)
        # grid_sample counts from -1 to 1, between the outer edges of the map
        grid = torch.stack([(2 * x_px + 1) / w - 1, (2 * y_px + 1) / h - 1], dim=-1)  # (B, h, w, 2)
        sampled = F.grid_sample(x, grid, align_corners=False)  # (B, C, h, w)
        output = output + torch.einsum("bchw,dc->bdhw", sampled, weight[:, :, i, j])
    return output


def _check(x: Tensor, offsets_px: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x must have shape (B, C, h, w), got {tuple(x.shape)}")
    B, C, h, w = x.shape
    if weight.dim() != 4 or weight.shape[1] != C or weight.shape[2] != weight.shape[3] or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight must have shape (D, {C}, k, k) with an odd k, got {tuple(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    wanted = (B, 2 * weight.shape[2] ** 2, h, w)
    if offsets_px.shape != wanted:
        raise ValueError(f"offsets_px must have shape {wanted}, got {tuple(offsets_px.shape)}")
