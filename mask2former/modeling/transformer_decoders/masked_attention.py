"""The transformer decoder with masked attention (paper section 3.2)."""

from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.layers import MLP, Conv2d, Linear, fill_conv_xavier
from mask2former.modeling.position_encoding import sine_position_encoding
from mask2former.modeling.structures import MaskPrediction, PixelFeatures, QueryPrediction
from mask2former.modeling.transformer_decoders.decoder_layers import (
    CrossAttentionLayer,
    FFNLayer,
    MaskPoolingLayer,
    SelfAttentionLayer,
    SpatialAttentionLayer,
    cell_centres,
)
from mask2former.ops import fused

CROSS_ATTENTIONS = ("masked", "plain", "smca", "mask_pooling")
FEATURE_SCALES: dict[str, tuple[tuple[int, ...], ...]] = {
    "round_robin": ((0,), (1,), (2,)),
    "stride_32": ((0,),),
    "stride_16": ((1,),),
    "stride_8": ((2,),),
    "all": ((0, 1, 2),),
}
"""Layer i reads the levels of entry i mod the number of entries, side by side."""


class _Memory(NamedTuple):
    """What a layer reads.

    Attributes:
        keys, values: (B, S, C).
        places: what decides where to look: mask features (B, C, h, w) or (B, C, 1, S) without gradient where masks
            count, centres of the cells (S, 2) for SMCA, None for plain attention.
    """

    keys: Tensor
    values: Tensor
    places: Tensor | None


class MaskedAttentionDecoder(nn.Module):
    """Layers of masked cross-attention, self-attention and FFN over learned queries.

    Layer i reads level i mod 3, lowest resolution first. A query looks only where its previous mask is
    foreground (equation 2), or everywhere if that mask is empty. The paper's alternatives (Tables 4b to 4d) are
    options.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        hidden_dim: int = 256,
        num_queries: int = 100,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        num_layers: int = 9,
        pre_norm: bool = False,
        mask_dim: int = 256,
        enforce_input_projection: bool = False,
        cross_attention: str = "masked",
        feature_scales: str = "round_robin",
        learnable_queries: bool = True,
        self_attention_first: bool = False,
        dropout: float = 0.0,
        num_test_layers: int | None = None,
    ) -> None:
        """Build with random weights.

        Args:
            in_channels: channels of the pixel decoder's levels.
            num_classes: K, without "no object".
            hidden_dim: channels of the queries.
            num_queries: Q.
            num_heads, dim_feedforward, pre_norm: of each layer.
            num_layers: decoder layers; one prediction more is made, from the learned queries alone.
            mask_dim: channels of the mask features.
            enforce_input_projection: project the levels even when the channels agree.
            cross_attention: one of `CROSS_ATTENTIONS`.
            feature_scales: which levels the layers read, see `FEATURE_SCALES`.
            learnable_queries: otherwise queries start as zeros. As they are all equal then, nothing is predicted from
                them before the first layer, which looks everywhere; learned positions tell them apart.
            self_attention_first: before cross-attention instead of after it.
            dropout: of each layer, in training; published is none.
            num_test_layers: so many layers run in evaluation mode, the first ones; 0 predicts from the learned
                queries alone. None: all.

        Raises:
            ValueError: if a number is out of its range, or a name is unknown.
        """
        super().__init__()
        positive = {"num_classes": num_classes, "num_queries": num_queries, "num_layers": num_layers}
        for name, number in positive.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        _check_name("cross_attention", cross_attention, CROSS_ATTENTIONS)
        _check_name("feature_scales", feature_scales, FEATURE_SCALES)
        self.learnable_queries, self.self_attention_first = learnable_queries, self_attention_first
        self._uses_cells = cross_attention == "smca"
        self._uses_masks = cross_attention in ("masked", "mask_pooling")
        self._levels_of_layers = FEATURE_SCALES[feature_scales]
        self._levels = sorted({level for levels in self._levels_of_layers for level in levels})
        self.transformer_self_attention_layers = nn.ModuleList()
        self.transformer_cross_attention_layers = nn.ModuleList()
        self.transformer_ffn_layers = nn.ModuleList()
        shared: dict[str, Any] = {"dim": hidden_dim, "dropout": dropout, "pre_norm": pre_norm}
        for _ in range(num_layers):
            self.transformer_self_attention_layers.append(SelfAttentionLayer(num_heads=num_heads, **shared))
            self.transformer_cross_attention_layers.append(_cross_attention(cross_attention, num_heads, shared))
            self.transformer_ffn_layers.append(FFNLayer(dim_feedforward=dim_feedforward, **shared))
        self.num_test_layers = num_test_layers
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        if learnable_queries:
            self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(len(self._levels), hidden_dim)
        needs_projection = in_channels != hidden_dim or enforce_input_projection
        self.input_proj = nn.ModuleList(
            _projection(in_channels, hidden_dim) if needs_projection else nn.Identity() for _ in self._levels
        )
        self.class_embed = Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(in_dim=hidden_dim, hidden_dim=hidden_dim, out_dim=mask_dim, num_layers=3)

    @overload
    def forward(self, features: PixelFeatures, all_layers: bool | None = None) -> list[MaskPrediction]: ...

    @overload
    def forward(
        self, features: PixelFeatures, all_layers: bool | None, *, with_masks: Literal[False]
    ) -> list[QueryPrediction]: ...

    def forward(
        self, features: PixelFeatures, all_layers: bool | None = None, *, with_masks: bool = True
    ) -> list[MaskPrediction] | list[QueryPrediction]:
        """Predict.

        Args:
            features: from the pixel decoder.
            all_layers: give the prediction of every layer, the first one from the learned queries alone;
                otherwise only the last. None: as the module is training or not.
            with_masks: make the masks. The losses do not want them all.

        Returns:
            The predictions, the last one final.
        """
        predictions, _ = self._decode(features, self.training if all_layers is None else all_layers)
        return [p.with_masks for p in predictions] if with_masks else predictions

    def predict_with_queries(self, features: PixelFeatures) -> tuple[MaskPrediction, Tensor]:
        """Predict, and give what the prediction was made from: an embedding of what each query has found.

        Returns:
            The final prediction, and the normalised features (B, Q, C) of the queries.
        """
        predictions, queries = self._decode(features, all_layers=False)
        return predictions[-1].with_masks, queries

    @property
    def num_test_layers(self) -> int | None:
        """How many layers run in evaluation mode; None: all.

        Raises:
            ValueError: if it is set to fewer than there must be, or more than there are.
        """
        return self._num_test_layers

    @num_test_layers.setter
    def num_test_layers(self, number: int | None) -> None:
        least, most = 0 if self.learnable_queries else 1, len(self.transformer_ffn_layers)
        if number is not None and not least <= number <= most:
            raise ValueError(f"num_test_layers must be in [{least}, {most}] or None, got {number}")
        self._num_test_layers = number

    def _decode(self, features: PixelFeatures, all_layers: bool) -> tuple[list[QueryPrediction], Tensor]:
        """The predictions, the last one final, and the normalised queries (B, Q, C) of the last."""
        num_layers = len(self.transformer_ffn_layers)
        if not self.training and self.num_test_layers is not None:
            num_layers = self.num_test_layers
        memories = [self._memory(levels, features) for levels in self._levels_of_layers[:num_layers]]
        batch = features.mask_features.shape[0]
        query_position = self.query_embed.weight.expand(batch, -1, -1)  # (B, Q, C)
        queries = torch.zeros_like(query_position)
        if self.learnable_queries:
            queries = self.query_feat.weight.expand(batch, -1, -1)  # (B, Q, C)
        predictions = []
        for index in range(num_layers):
            mask_embedding = None
            if (all_layers or self._uses_masks) and (index > 0 or self.learnable_queries):
                normed = self.decoder_norm(queries)
                mask_embedding = self.mask_embed(normed)  # (B, Q, C)
                if all_layers:
                    predictions.append(self._predict(normed, mask_embedding, features.mask_features))
            queries = self._layer(index, queries, query_position, memories[index % len(memories)], mask_embedding)
        normed = self.decoder_norm(queries)
        predictions.append(self._predict(normed, self.mask_embed(normed), features.mask_features))
        return predictions, normed

    def _layer(
        self, index: int, queries: Tensor, query_position: Tensor, memory: _Memory, mask_embedding: Tensor | None
    ) -> Tensor:
        """One layer; ``mask_embedding`` (B, Q, C) of the queries' masks, None if there are none, or none count."""
        self_attention = self.transformer_self_attention_layers[index]
        where = memory.places
        if self._uses_masks and where is not None:
            where = None if mask_embedding is None else _blocked_positions(mask_embedding.detach(), where)
        if self.self_attention_first:
            queries = self_attention(queries, query_position)
        cross_attention = self.transformer_cross_attention_layers[index]
        queries = cross_attention(queries, memory.keys, memory.values, query_position, where)
        if not self.self_attention_first:
            queries = self_attention(queries, query_position)
        return self.transformer_ffn_layers[index](queries)

    def _memory(self, levels: tuple[int, ...], features: PixelFeatures) -> _Memory:
        """What a layer reads that reads these levels side by side."""
        parts = [self._flatten_level(level, features.levels[level]) for level in levels]
        keys, values = (_side_by_side(part, dim=1) for part in zip(*parts, strict=True))
        sizes = [features.levels[level].shape[-2:] for level in levels]
        places = None
        if self._uses_masks:
            # resizing features or masks gives the same logits (both are linear), and there are fewer features
            constant = features.mask_features.detach()
            resized = [F.interpolate(constant, size, mode="bilinear", align_corners=False) for size in sizes]
            places = resized[0] if len(resized) == 1 else torch.cat([r.flatten(2) for r in resized], -1).unsqueeze(2)
        elif self._uses_cells:
            places = _side_by_side([cell_centres(h, w, device=keys.device) for h, w in sizes], dim=0)
        return _Memory(keys, values, places)

    def _flatten_level(self, level: int, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, C) of one level."""
        place = self._levels.index(level)
        tokens = self.input_proj[place](maps).flatten(2).transpose(1, 2)  # (B, S, C)
        values = tokens + self.level_embed.weight[place]
        h, w = maps.shape[-2:]
        position = sine_position_encoding(h, w, tokens.shape[-1], device=maps.device)
        return values + position.flatten(1).t().to(values.dtype), values

    def _predict(self, normed: Tensor, mask_embedding: Tensor, mask_features: Tensor) -> QueryPrediction:
        return QueryPrediction(self.class_embed(normed), mask_embedding, mask_features)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # the first releases called the query features `static_query`; the names decide, not a version number
        old, new = prefix + "static_query.weight", prefix + "query_feat.weight"
        if old in state_dict and new not in state_dict:
            state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _check_name(argument: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{argument} must be one of {', '.join(known)}, got {name!r}")


def _cross_attention(name: str, num_heads: int, shared: dict[str, Any]) -> nn.Module:
    if name == "mask_pooling":
        return MaskPoolingLayer(**shared)
    layer = SpatialAttentionLayer if name == "smca" else CrossAttentionLayer
    return layer(num_heads=num_heads, **shared)


def _projection(in_channels: int, out_channels: int) -> nn.Module:
    projection = Conv2d(in_channels, out_channels, 1)
    fill_conv_xavier(projection)
    return projection


def _side_by_side(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _blocked_positions(mask_embedding: Tensor, level_features: Tensor) -> Tensor:
    """(B, Q, S) bool: where the mask logit is negative, and nowhere for a query whose mask is empty."""
    logits = fused.product(mask_embedding, level_features).flatten(2)  # (B, Q, S)
    blocked = logits < 0
    return blocked & ~blocked.all(-1, keepdim=True)
