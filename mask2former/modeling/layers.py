"""Small parts that several modules share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.ops import attention, fused, trained


def at_least_float32(x: Tensor) -> Tensor:
    """Half types and whole numbers as float32, which sums over many points need; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU gets it from pinned memory, so that the host need not wait for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Linear(nn.Linear):
    """A linear map with an optional activation, in one pass where `mask2former.ops.fused` can do that."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, activation: fused.Activation = "none"
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.activation: fused.Activation = activation

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        added: Tensor | None = None,
        before: nn.LayerNorm | None = None,
        after: nn.LayerNorm | None = None,
    ) -> Tensor:
        """``after(activation(map(before(x + added))) + residual)`` of (…, C), with the parts that are given."""
        if fused.fuses(x):
            norms = {"before": _constants(before), "after": _constants(after)}
            return fused.linear(
                x, self.weight, self.bias, activation=self.activation, residual=residual, added=added, **norms
            )
        x = x if added is None else x + added
        x = x if before is None else before(x)
        if self.activation == "none" and trained.trains(x, self.weight, self.bias):
            out = trained.linear(x, self.weight, self.bias)
            out = out if residual is None else residual + out
        else:
            out = fused.linear(x, self.weight, self.bias, activation=self.activation, residual=residual)
        return out if after is None else after(out)


def feed_forward(
    first: Linear,
    second: Linear,
    x: Tensor,
    residual: Tensor | None = None,
    *,
    before: nn.LayerNorm | None = None,
    after: nn.LayerNorm | None = None,
) -> Tensor:
    """``after(second(first(before(x)), residual))``: (…, C) -> (…, C'), in one pass where that is possible."""
    weights, biases = (first.weight, second.weight), (first.bias, second.bias)
    if fused.fuses(x):
        norms = {"before": _constants(before), "after": _constants(after)}
        return fused.feed_forward(x, weights, biases, activation=first.activation, residual=residual, **norms)
    x = x if before is None else before(x)
    if trained.trains(x, *weights, *biases):
        out = trained.feed_forward(x, weights, biases, activation=first.activation)
        out = out if residual is None else residual + out
    else:
        out = second(first(x), residual)
    return out if after is None else after(out)


def _constants(norm: nn.LayerNorm | None) -> fused.LayerNorm | None:
    return None if norm is None else (norm.weight, norm.bias, norm.eps)


class Conv2d(nn.Conv2d):
    """A convolution without dilation and groups, by `mask2former.ops.fused`."""

    def forward(self, x: Tensor) -> Tensor:
        return trained.convolution(x, self.weight, self.bias, **_place(self))


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast switched off; nothing on the meta device, which has none and for which PyTorch refuses the question."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class ConvNorm(nn.Conv2d):
    """A convolution followed by an optional normalisation ``.norm``, residual and activation.

    The normalisation is a child of the convolution, so that state-dict names are ``conv.weight`` and
    ``conv.norm.weight``, as in Detectron2. If it is an affine map, it becomes part of the convolution where
    `mask2former.ops.fused` computes this one. That is done anew in each call, a fiftieth of its time at most, so that
    there is no copy that could be older than the weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias)
        if norm is not None:
            self.norm = norm
        self._has_norm = norm is not None
        self._activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, *, coarse: Tensor | None = None) -> Tensor:
        """(B, C, H, W), and what is added before the activation, to (B, C', H', W').

        A ``coarse`` map (B, C', h, w) is resized bilinearly first.
        """
        folds = fused.fuses(x) or trained.trains(x, self.weight)  # in training less is kept, and passed over, so, too
        affine = constant_affine(self.norm) if self._has_norm and folds else None
        if affine is not None and coarse is None:
            return self._folded(x, *affine, residual)
        norm = self.norm if self._has_norm else None
        if norm is not None and uses_batch_statistics(norm):
            # statistics of few pixels make rounding larger, and the kernels round more
            x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        else:
            x = trained.convolution(x, self.weight, self.bias, **_place(self))
        if isinstance(norm, nn.GroupNorm) and residual is None and fused.fuses(x):
            relu = self._activation is F.relu_
            x = fused.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, coarse=coarse, relu=relu)
            return x if relu or self._activation is None else self._activation(x)
        if norm is not None:
            x = norm(x)
        if coarse is not None:
            x = x + F.interpolate(coarse, x.shape[-2:], mode="bilinear", align_corners=False).to(x.dtype)
        if residual is not None:
            x = x + residual
        return x if self._activation is None else self._activation(x)

    def _folded(self, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        bias = shift if self.bias is None else shift + self.bias * scale
        place = _place(self)
        if trained.convolves(x, self.weight, **place):
            x = trained.convolution(x, self.weight * scale[:, None, None, None], bias, **place)
            x = x if residual is None else x + residual
            return x if self._activation is None else self._activation(x)
        has_relu = self._activation in (F.relu, F.relu_)
        x = fused.convolution(x, self.weight, bias, residual=residual, relu=has_relu, scale=scale, **place)
        return x if has_relu or self._activation is None else self._activation(x)


def _place(conv: nn.Conv2d) -> dict[str, Any]:
    assert not isinstance(conv.padding, str)  # PyTorch's convolutions take words, too; none is used here
    return {"stride": conv.stride, "padding": conv.padding}


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine parameters are constants (buffers)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = _affine(self)
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether it is a batch normalisation by the statistics of its input."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training


def constant_affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift, (C,) each, of a batch normalisation whose statistics are constant now; None of any other."""
    if isinstance(norm, FrozenBatchNorm2d):
        return _affine(norm)
    is_batch_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return _affine(norm) if is_batch_norm and not norm.training and norm.affine and norm.track_running_stats else None


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


class Attention(nn.Module):
    """Multi-head attention with PyTorch's parameter names (``in_proj_weight``, ``out_proj.weight``, …).

    Differs from `torch.nn.MultiheadAttention` in that the mask says what is *blocked*, is shared by the heads
    without being repeated, and attention weights are never materialised for the caller.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_blocked: Tensor | None = None,
        *,
        attn_bias: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C).
            key, value: (B, S, C).
            attn_blocked: (B, Q, S) bool, True where a query must not look; no row may be all True.
            attn_bias: (B, M, Q, S), added to the logits; instead of ``attn_blocked``.

        Returns:
            (B, Q, C).
        """
        weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        q, k, v = (fused.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        dropout = self.dropout if self.training else 0.0
        if attn_bias is None and dropout == 0 and attention.has_kernels(q):
            return self.out_proj(attention.attention(q, k, v, self.num_heads, attn_blocked))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, M, length, C/M)
        mask = None if attn_bias is None else attn_bias.to(q.dtype)
        if attn_blocked is not None:
            mask = ~attn_blocked.unsqueeze(1)  # (B, 1, Q, S), True = may look
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)  # (B, M, Q, C/M)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def make_norm(name: str, channels: int) -> nn.Module | None:
    """A normalisation of a 2-D map by its Detectron2 name.

    Args:
        name: "FrozenBN", "BN", "SyncBN", "GN" (32 groups) or "" for none.
        channels: channels of the map.

    Raises:
        ValueError: if the name is unknown.
    """
    makers: dict[str, Callable[[int], nn.Module | None]] = {
        "": lambda _: None,
        "FrozenBN": FrozenBatchNorm2d,
        "BN": nn.BatchNorm2d,
        "SyncBN": nn.SyncBatchNorm,
        "GN": lambda c: nn.GroupNorm(32, c),
    }
    if name not in makers:
        raise ValueError(f"name must be one of {sorted(makers)}, got {name!r}")
    return makers[name](channels)


def fill_conv_xavier(conv: nn.Conv2d) -> None:
    """Uniform weights of variance 1 / fan_in and zero bias: the published initialisation of convolutions."""
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
