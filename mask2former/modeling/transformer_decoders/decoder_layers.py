"""The layers of the masked decoder: self-attention, FFN, and four ways in which queries gather from the maps.

All take and give queries (B, Q, C). ``pre_norm`` normalises before a step instead of after it; ``dropout`` acts on
attention weights, on what is added to the queries, and inside the FFN, in training only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.layers import MLP, Attention, Linear, at_least_float32

_LEAST_WIDTH = 0.01  # of a Gaussian, as a part of the map: keeps its logarithm finite in float16
_FIRST_WIDTH = 0.5
_LEAST_LOG = -1e4


class _ResidualStep(nn.Module):
    """What all layers share: the order of normalisation, dropout and residual.

    The subclass makes ``norm`` last, as published: the order of parameters is that of an optimizer's state.
    """

    norm: nn.Module

    def __init__(self, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)

    def _before(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.pre_norm else x

    def _after(self, queries: Tensor, change: Tensor) -> Tensor:
        queries = queries + self.dropout(change)
        return queries if self.pre_norm else self.norm(queries)


class CrossAttentionLayer(_ResidualStep):
    """Attention to one memory, masked (paper section 3.2.1) or not."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dropout, pre_norm)
        self.multihead_attn = Attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, query_position: Tensor, attn_blocked: Tensor | None
    ) -> Tensor:
        """Keys and values (B, S, C); ``attn_blocked`` (B, Q, S) bool, None: every query looks everywhere."""
        x = self._before(queries)
        return self._after(queries, self.multihead_attn(x + query_position, keys, values, attn_blocked))


class SpatialAttentionLayer(_ResidualStep):
    """Spatially modulated co-attention (SMCA; Gao et al., "Fast Convergence of DETR", 2021, section 3).

    Each query predicts a centre, and each head an offset to it and the widths of a Gaussian, whose logarithm is added
    to the attention logits. All are parts of the map's width and height, so that they mean the same on every level.
    """

    def __init__(self, *, dim: int, num_heads: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dropout, pre_norm)
        self.multihead_attn = Attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.centre = MLP(in_dim=dim, hidden_dim=dim, out_dim=2, num_layers=2)
        self.heads = nn.Linear(dim, num_heads * 4)  # offset x, y and width x, y
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        with torch.no_grad():
            widths = self.heads.bias.view(num_heads, 4)[:, 2:]
            widths.fill_(math.log(math.expm1(_FIRST_WIDTH - _LEAST_WIDTH)))  # the inverse of softplus
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, query_position: Tensor, cells: Tensor) -> Tensor:
        """Keys and values (B, S, C); ``cells`` (S, 2), (x, y) in [0, 1] of the centre of each cell."""
        x = self._before(queries) + query_position
        bias = log_gaussian(*self.gaussians(x), cells)
        return self._after(queries, self.multihead_attn(x, keys, values, attn_bias=bias))

    def gaussians(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Centre and width of the Gaussian of each head and query: (B, Q, C) -> twice (B, M, Q, 2), x and y."""
        centre = at_least_float32(self.centre(x)).sigmoid().unsqueeze(2)  # (B, Q, 1, 2)
        heads = at_least_float32(self.heads(x)).unflatten(-1, (-1, 4))  # (B, Q, M, 4)
        offset, width = heads.split(2, dim=-1)
        return (centre + offset).transpose(1, 2), (F.softplus(width) + _LEAST_WIDTH).transpose(1, 2)


class MaskPoolingLayer(_ResidualStep):
    """The mean of the features under the mask of each query, instead of attention (as K-Net; Zhang et al., 2021)."""

    def __init__(self, *, dim: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dropout, pre_norm)
        self.pooled_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.pooled_proj.weight)
        nn.init.zeros_(self.pooled_proj.bias)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, query_position: Tensor, attn_blocked: Tensor | None
    ) -> Tensor:
        """Values (B, S, C); ``attn_blocked`` (B, Q, S) bool, True outside of the mask, None: there is no mask yet.

        Neither keys nor positions count: a query is led by its mask alone.
        """
        return self._after(queries, self.pooled_proj(self._before(masked_mean(values, attn_blocked))))


class SelfAttentionLayer(_ResidualStep):
    """Attention among the queries."""

    def __init__(self, *, dim: int, num_heads: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dropout, pre_norm)
        self.self_attn = Attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, query_position: Tensor) -> Tensor:
        x = self._before(queries)
        positioned = x + query_position
        return self._after(queries, self.self_attn(positioned, positioned, x))


class FFNLayer(_ResidualStep):
    """Two linear layers with ReLU between them."""

    def __init__(self, *, dim: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dropout, pre_norm)
        self.linear1 = Linear(dim, dim_feedforward, activation="relu")
        self.linear2 = Linear(dim_feedforward, dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor) -> Tensor:
        hidden = self.dropout(self.linear1(self._before(queries)))
        return self._after(queries, self.linear2(hidden))


def cell_centres(height: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Where the cells of a map are, row by row: (height * width, 2), (x, y) in [0, 1]."""
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1).flatten(0, 1)


def log_gaussian(centre: Tensor, width: Tensor, cells: Tensor) -> Tensor:
    """Logarithm of a Gaussian that is 1 at its centre.

    Args:
        centre, width: (B, M, Q, 2), x and y; the width is the standard deviation.
        cells: (S, 2), x and y.

    Returns:
        (B, M, Q, S), at least -10000.
    """
    x, y = (
        (cells[:, axis] - centre[..., axis, None]) / width[..., axis, None]  # (B, M, Q, S)
        for axis in (0, 1)
    )
    return (-(x.square() + y.square()) / 2).clamp(min=_LEAST_LOG)


def masked_mean(values: Tensor, blocked: Tensor | None) -> Tensor:
    """Mean of the values (B, S, C) at the places that are not blocked, (B, Q, S) bool -> (B, Q, C).

    No row may be all True. None blocks nothing: (B, 1, C).
    """
    if blocked is None:
        return values.mean(1, keepdim=True)
    weight = (~blocked).to(values.dtype)
    return (weight / weight.sum(-1, keepdim=True)) @ values
