"""The multi-scale deformable attention pixel decoder (paper section 3.2.2 and 4.1)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mask2former.modeling.layers import (
    Conv2d,
    ConvNorm,
    Linear,
    at_least_float32,
    feed_forward,
    fill_conv_xavier,
    make_norm,
    without_autocast,
)
from mask2former.modeling.position_encoding import sine_position_encoding
from mask2former.modeling.structures import PixelFeatures
from mask2former.ops import fused, ms_deform_attn_fused

_NUM_OUTPUT_LEVELS = 3


class DeformablePixelDecoder(nn.Module):
    """Deformable attention over the low-resolution maps, then an FPN up to the mask features.

    Attributes:
        in_bfloat16: compute products in bfloat16; sampling coordinates, softmax and statistics of normalisations stay
            float32. False: everything in float32, also in the caller's autocast, as published.
    """

    def __init__(
        self,
        *,
        in_channels: Mapping[str, int],
        in_strides: Mapping[str, int],
        transformer_in_features: Sequence[str] = ("res3", "res4", "res5"),
        conv_dim: int = 256,
        mask_dim: int = 256,
        norm: str = "GN",
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        dim_feedforward: int = 1024,
        dropout: float = 0.0,
        common_stride: int = 4,
        checkpoint_activations: bool = False,
    ) -> None:
        """Build with random weights.

        Args:
            in_channels, in_strides: channels and stride of each input map, by name.
            transformer_in_features: the maps that deformable attention works on; the others feed the FPN.
            conv_dim: channels inside and of the three output levels.
            mask_dim: channels of the mask features.
            norm: normalisation of the FPN's convolutions.
            num_layers, num_heads, num_points, dim_feedforward, dropout: of the deformable encoder.
            common_stride: stride of the mask features.
            checkpoint_activations: recompute each encoder layer in the backward pass to save memory.

        Raises:
            ValueError: if a feature is unknown, or the strides leave fewer than three output levels.
        """
        super().__init__()
        self.in_bfloat16 = False
        unknown = set(transformer_in_features) - set(in_channels)
        if unknown:
            raise ValueError(
                f"transformer_in_features must be among {sorted(in_channels)}, got {sorted(unknown)}"
            )
        by_stride = sorted(in_channels, key=lambda name: in_strides[name])
        # lowest resolution first, as in every list of levels
        self._encoder_inputs = [n for n in reversed(by_stride) if n in transformer_in_features]
        finest = min(in_strides[n] for n in self._encoder_inputs)
        self._fpn_inputs = [n for n in by_stride if common_stride <= in_strides[n] < finest]
        if len(self._encoder_inputs) + len(self._fpn_inputs) < _NUM_OUTPUT_LEVELS:
            raise ValueError(
                f"in_strides must leave at least {_NUM_OUTPUT_LEVELS} levels for the transformer decoder, "
                f"got {dict(in_strides)}"
            )
        if not self._fpn_inputs or in_strides[self._fpn_inputs[0]] != common_stride:
            raise ValueError(
                f"in_strides must hold common_stride = {common_stride} below the transformer's inputs, got "
                f"{dict(in_strides)}"
            )
        self.input_proj = nn.ModuleList(
            _input_projection(in_channels[name], conv_dim) for name in self._encoder_inputs
        )
        self.transformer = _DeformableTransformer(
            dim=conv_dim,
            num_levels=len(self._encoder_inputs),
            num_layers=num_layers,
            num_heads=num_heads,
            num_points=num_points,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            checkpoint_activations=checkpoint_activations,
        )
        self.mask_features = Conv2d(conv_dim, mask_dim, 1)
        fill_conv_xavier(self.mask_features)
        for number, name in enumerate(self._fpn_inputs, start=1):
            lateral = ConvNorm(
                in_channels[name], conv_dim, 1, bias=norm == "", norm=make_norm(norm, conv_dim)
            )
            output = ConvNorm(
                conv_dim,
                conv_dim,
                3,
                padding=1,
                bias=norm == "",
                norm=make_norm(norm, conv_dim),
                activation=F.relu_,
            )
            fill_conv_xavier(lateral)
            fill_conv_xavier(output)
            self.add_module(f"adapter_{number}", lateral)
            self.add_module(f"layer_{number}", output)

    def forward(self, features: Mapping[str, Tensor]) -> PixelFeatures:
        """Decode.

        Args:
            features: maps (B, C, h, w) by name.

        Returns:
            Mask features at ``common_stride`` and the three coarsest levels, lowest resolution first; bfloat16 if it
            computes in that, otherwise float32 or float64.
        """
        with self._autocast(next(iter(features.values())).device):
            maps = [
                self._own_type(project(self._own_type(features[name])))
                for name, project in zip(self._encoder_inputs, self.input_proj, strict=True)
            ]
            levels = self.transformer(maps)
            finest = levels[-1]
            for number, name in reversed(list(enumerate(self._fpn_inputs, 1))):
                merged = getattr(self, f"adapter_{number}")(self._own_type(features[name]), coarse=finest)
                finest = self._own_type(getattr(self, f"layer_{number}")(self._own_type(merged)))
                levels.append(finest)
            return PixelFeatures(self.mask_features(finest), levels[:_NUM_OUTPUT_LEVELS])

    def _autocast(self, device: torch.device) -> AbstractContextManager[None]:
        """To bfloat16 if it computes in that, otherwise none, whatever the caller's."""
        if self.in_bfloat16:
            return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        return without_autocast(device)

    def _own_type(self, x: Tensor) -> Tensor:
        """What the decoder computes in; on some devices autocast gives float32 for what is no product."""
        return x.to(torch.bfloat16) if self.in_bfloat16 else at_least_float32(x)


class _DeformableTransformer(nn.Module):
    def __init__(
        self,
        *,
        dim: int,
        num_levels: int,
        num_layers: int,
        num_heads: int,
        num_points: int,
        dim_feedforward: int,
        dropout: float,
        checkpoint_activations: bool,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.level_embed = nn.Parameter(torch.randn(num_levels, dim))
        self.encoder = _Encoder(
            _EncoderLayer(dim, num_levels, num_heads, num_points, dim_feedforward, dropout)
            for _ in range(num_layers)
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Maps (B, C, h, w), lowest resolution first, to maps of the same shapes."""
        shapes = [(m.shape[2], m.shape[3]) for m in maps]
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1)  # (B, S, C)
        C, device = tokens.shape[-1], tokens.device
        position = torch.cat(
            [
                sine_position_encoding(h, w, C, device=device).flatten(1).t() + embed
                for (h, w), embed in zip(shapes, self.level_embed, strict=True)
            ]
        )  # (S, C)
        for layer in self.encoder.layers:
            if self.checkpoint_activations and self.training:
                tokens = checkpoint(layer, tokens, position, shapes, use_reentrant=False)
            else:
                tokens = layer(tokens, position, shapes)
        split = tokens.split([h * w for h, w in shapes], dim=1)
        return [
            # (B, C, h, w); in this order its strides say "channels last" also where there is one image alone
            t.unflatten(1, shape).permute(0, 3, 1, 2)
            for t, shape in zip(split, shapes, strict=True)
        ]


class _Encoder(nn.Module):
    """Only gives the layers their published names."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class _EncoderLayer(nn.Module):
    def __init__(
        self, dim: int, num_levels: int, num_heads: int, num_points: int, dim_feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = MSDeformAttn(
            dim=dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = Linear(dim, dim_feedforward, activation="relu")
        self.linear2 = Linear(dim_feedforward, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, tokens: Tensor, position: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        dtype = tokens.dtype  # on some devices autocast gives float32 for normalisations
        if self.training and self.dropout.p > 0:
            tokens = self.norm1(tokens + self.dropout(self.self_attn(tokens, position, shapes))).to(dtype)
            hidden = self.dropout(self.linear1(tokens))
            return self.norm2(tokens + self.dropout(self.linear2(hidden))).to(dtype)
        tokens = self.self_attn(tokens, position, shapes, residual=tokens, norm=self.norm1).to(dtype)
        return feed_forward(self.linear1, self.linear2, tokens, residual=tokens, after=self.norm2).to(dtype)


class MSDeformAttn(nn.Module):
    """Projections around `mask2former.ops.ms_deform_attn_fused`."""

    def __init__(self, *, dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        """Build; the offsets start as one direction a head, one to ``num_points`` pixels long.

        Raises:
            ValueError: if ``dim`` is no multiple of ``num_heads``.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {num_heads}, got {dim}")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = Linear(dim, samples * 2)
        self.attention_weights = Linear(dim, samples)
        self.value_proj = Linear(dim, dim)
        self.output_proj = Linear(dim, dim)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(_initial_offsets(num_heads, num_levels, num_points).flatten())

    def forward(
        self,
        value: Tensor,
        position: Tensor,
        shapes: list[tuple[int, int]],
        residual: Tensor | None = None,
        norm: nn.LayerNorm | None = None,
    ) -> Tensor:
        """Attend from every cell of every level.

        Args:
            value: (B, S, C).
            position: (S, C); the queries are the values plus their positions.
            shapes: (h, w) of each level.
            residual: (B, S, C), added to the result.
            norm: normalises the sum.

        Returns:
            (B, S, C).
        """
        B, S, _ = value.shape
        M, L, P = self.num_heads, self.num_levels, self.num_points
        values = self._values(value)
        query, added = (value, position) if fused.fuses(value) else (value + position, None)
        with without_autocast(value.device):  # bfloat16 has steps of 1/16 pixel from 8 pixels on
            offsets_px = self.sampling_offsets(at_least_float32(query), added=added).view(B, S, M, L, P, 2)
        logits = self.attention_weights(query, added=added).view(B, S, M, L, P)
        sampled = ms_deform_attn_fused(values, shapes, offsets_px, logits)
        return self.output_proj(sampled, residual, after=norm)

    def _values(self, value: Tensor) -> Tensor:
        """(B, S, M, D)."""
        if fused.fuses(value):
            return fused.heads_first(value, self.value_proj.weight, self.value_proj.bias, self.num_heads)
        return self.value_proj(value).unflatten(-1, (self.num_heads, -1))


def _input_projection(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = Conv2d(in_channels, out_channels, 1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(32, out_channels))


def _initial_offsets(num_heads: int, num_levels: int, num_points: int) -> Tensor:
    """(M, L, P, 2): head m looks in direction 2 pi m / M, point p at p + 1 pixels (in the maximum norm)."""
    angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (M, 2)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    length = torch.arange(1, num_points + 1, dtype=torch.float32)
    offsets = direction[:, None, None] * length[:, None]  # (M, 1, P, 2)
    return offsets.expand(-1, num_levels, -1, -1)
