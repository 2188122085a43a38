"""The plain transformer of DETR (Carion et al., 2020): encoder and decoder with sine and learned positions.

State-dict names of a layer are those of PyTorch's own layers: ``self_attn``, ``multihead_attn``, ``linear1``, ...
"""

import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.layers import Attention
from mask2former.modeling.position_encoding import sine_position_encoding


def tokens_and_positions(level: Tensor) -> tuple[Tensor, Tensor]:
    """A map as a sequence: (B, C, h, w) -> (B, S, C) and its sine positions (S, C), row by row."""
    tokens = level.flatten(2).transpose(1, 2)  # (B, S, C)
    h, w = level.shape[-2:]
    position = sine_position_encoding(h, w, tokens.shape[-1], device=level.device)
    return tokens, position.flatten(1).t().to(tokens.dtype)


class TransformerEncoder(nn.Module):
    """Layers of self-attention and FFN over all cells of one map."""

    def __init__(
        self, *, dim: int, num_layers: int, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        """Build with random weights.

        Args:
            dim: channels.
            num_layers: may be 0, which changes nothing.
            num_heads, dim_feedforward, dropout: of each layer.
            pre_norm: normalise before each step instead of after it, and once more at the end.
        """
        super().__init__()
        self.layers = nn.ModuleList(
            _EncoderLayer(dim, num_heads, dim_feedforward, dropout, pre_norm) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim) if pre_norm and num_layers else nn.Identity()

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """(B, S, C) and positions (S, C) -> (B, S, C)."""
        for layer in self.layers:
            tokens = layer(tokens, position)
        return self.norm(tokens)


class TransformerDecoder(nn.Module):
    """Layers of self-attention among queries, cross-attention to one map without any mask, and FFN."""

    def __init__(
        self, *, dim: int, num_layers: int, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool
    ) -> None:
        """Build with random weights; arguments as of `TransformerEncoder`."""
        super().__init__()
        self.layers = nn.ModuleList(
            _DecoderLayer(dim, num_heads, dim_feedforward, dropout, pre_norm) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, query_position: Tensor, keys: Tensor, values: Tensor) -> list[Tensor]:
        """Decode.

        Args:
            queries, query_position: (B, Q, C).
            keys, values: (B, S, C).

        Returns:
            The normalised queries (B, Q, C) after each layer.
        """
        outputs = []
        for layer in self.layers:
            queries = layer(queries, query_position, keys, values)
            outputs.append(self.norm(queries))
        return outputs


class _FeedForward(nn.Module):
    """What both kinds of layers share: the FFN, dropout, and the order of normalisation and residual."""

    def __init__(self, dim: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def _before(self, x: Tensor, norm: nn.Module) -> Tensor:
        return norm(x) if self.pre_norm else x

    def _after(self, x: Tensor, change: Tensor, norm: nn.Module) -> Tensor:
        x = x + self.dropout(change)
        return x if self.pre_norm else norm(x)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class _EncoderLayer(_FeedForward):
    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dim, dim_feedforward, dropout, pre_norm)
        self.self_attn = Attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        x = self._before(tokens, self.norm1)
        tokens = self._after(tokens, self.self_attn(x + position, x + position, x), self.norm1)
        return self._after(tokens, self._feed_forward(self._before(tokens, self.norm2)), self.norm2)


class _DecoderLayer(_FeedForward):
    def __init__(self, dim: int, num_heads: int, dim_feedforward: int, dropout: float, pre_norm: bool) -> None:
        super().__init__(dim, dim_feedforward, dropout, pre_norm)
        self.self_attn = Attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.multihead_attn = Attention(dim=dim, num_heads=num_heads, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, query_position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        x = self._before(queries, self.norm1)
        queries = self._after(queries, self.self_attn(x + query_position, x + query_position, x), self.norm1)
        x = self._before(queries, self.norm2)
        queries = self._after(queries, self.multihead_attn(x + query_position, keys, values), self.norm2)
        return self._after(queries, self._feed_forward(self._before(queries, self.norm3)), self.norm3)
