"""The transformer decoder with masked attention (paper section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.layers import MLP, Attention, fill_conv_xavier
from mask2former.modeling.position_encoding import sine_position_encoding
from mask2former.modeling.structures import MaskPrediction, PixelFeatures

_NUM_LEVELS = 3


class MaskedAttentionDecoder(nn.Module):
    """Layers of masked cross-attention, self-attention and FFN over learned queries.

    Layer i reads level i mod 3, lowest resolution first. A query looks only where its previous mask is
    foreground (equation 2), or everywhere if that mask is empty.
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

        Raises:
            ValueError: if a number is below one.
        """
        super().__init__()
        positive = {"num_classes": num_classes, "num_queries": num_queries, "num_layers": num_layers}
        for name, number in positive.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.transformer_self_attention_layers = nn.ModuleList()
        self.transformer_cross_attention_layers = nn.ModuleList()
        self.transformer_ffn_layers = nn.ModuleList()
        for _ in range(num_layers):
            attention = (hidden_dim, num_heads, pre_norm)
            self.transformer_self_attention_layers.append(_SelfAttentionLayer(*attention))
            self.transformer_cross_attention_layers.append(_CrossAttentionLayer(*attention))
            self.transformer_ffn_layers.append(_FFNLayer(hidden_dim, dim_feedforward, pre_norm))
        self.decoder_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(_NUM_LEVELS, hidden_dim)
        self.input_proj = nn.ModuleList()
        for _ in range(_NUM_LEVELS):
            if in_channels == hidden_dim and not enforce_input_projection:
                self.input_proj.append(nn.Identity())
            else:
                projection = nn.Conv2d(in_channels, hidden_dim, 1)
                fill_conv_xavier(projection)
                self.input_proj.append(projection)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(in_dim=hidden_dim, hidden_dim=hidden_dim, out_dim=mask_dim, num_layers=3)

    def forward(self, features: PixelFeatures, all_layers: bool | None = None) -> list[MaskPrediction]:
        """Predict.

        Args:
            features: from the pixel decoder.
            all_layers: give the prediction of every layer, the first one from the learned queries alone;
                otherwise only the last. None: as the module is training or not.

        Returns:
            The predictions, the last one final.
        """
        return self._decode(features, self.training if all_layers is None else all_layers)[0]

    def predict_with_queries(self, features: PixelFeatures) -> tuple[MaskPrediction, Tensor]:
        """Predict, and give what the prediction was made from: an embedding of what each query has found.

        Returns:
            The final prediction, and the normalised features (B, Q, C) of the queries.
        """
        predictions, queries = self._decode(features, all_layers=False)
        return predictions[-1], queries

    def _decode(self, features: PixelFeatures, all_layers: bool) -> tuple[list[MaskPrediction], Tensor]:
        """The predictions, the last one final, and the normalised queries (B, Q, C) of the last."""
        memory = [self._flatten_level(index, level) for index, level in enumerate(features.levels)]
        # resizing features or masks gives the same logits (both are linear), and there are fewer features
        constant = features.mask_features.detach()
        resized = [
            F.interpolate(constant, level.shape[-2:], mode="bilinear", align_corners=False)
            for level in features.levels
        ]
        batch = features.mask_features.shape[0]
        query_position = self.query_embed.weight.expand(batch, -1, -1)  # (B, Q, C)
        queries = self.query_feat.weight.expand(batch, -1, -1)  # (B, Q, C)
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        predictions = []
        for index, (cross_attention, self_attention, ffn) in enumerate(layers):
            normed = self.decoder_norm(queries)
            mask_embedding = self.mask_embed(normed)  # (B, Q, C)
            if all_layers:
                predictions.append(self._predict(normed, mask_embedding, features.mask_features))
            level = index % _NUM_LEVELS
            attn_blocked = _blocked_positions(mask_embedding.detach(), resized[level])
            keys, values = memory[level]
            queries = cross_attention(queries, keys, values, query_position, attn_blocked)
            queries = self_attention(queries, query_position)
            queries = ffn(queries)
        normed = self.decoder_norm(queries)
        predictions.append(self._predict(normed, self.mask_embed(normed), features.mask_features))
        return predictions, normed

    def _flatten_level(self, index: int, level: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, C) of one level."""
        tokens = self.input_proj[index](level).flatten(2).transpose(1, 2)  # (B, S, C)
        values = tokens + self.level_embed.weight[index]
        h, w = level.shape[-2:]
        position = sine_position_encoding(h, w, tokens.shape[-1], device=level.device)
        return values + position.flatten(1).t().to(values.dtype), values

    def _predict(self, normed: Tensor, mask_embedding: Tensor, mask_features: Tensor) -> MaskPrediction:
        mask_logits = torch.einsum("bqc,bchw->bqhw", mask_embedding, mask_features)  # (B, Q, H/4, W/4)
        return MaskPrediction(self.class_embed(normed), mask_logits)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # the first releases called the query features `static_query`; the names decide, not a version number
        old, new = prefix + "static_query.weight", prefix + "query_feat.weight"
        if old in state_dict and new not in state_dict:
            state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _CrossAttentionLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.multihead_attn = Attention(dim=dim, num_heads=num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, keys: Tensor, values: Tensor, query_position: Tensor, attn_blocked: Tensor
    ) -> Tensor:
        x = self.norm(queries) if self.pre_norm else queries
        queries = queries + self.multihead_attn(x + query_position, keys, values, attn_blocked)
        return queries if self.pre_norm else self.norm(queries)


class _SelfAttentionLayer(nn.Module):
    def __init__(self, dim: int, num_heads: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.self_attn = Attention(dim=dim, num_heads=num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, query_position: Tensor) -> Tensor:
        x = self.norm(queries) if self.pre_norm else queries
        positioned = x + query_position
        queries = queries + self.self_attn(positioned, positioned, x)
        return queries if self.pre_norm else self.norm(queries)


class _FFNLayer(nn.Module):
    def __init__(self, dim: int, dim_feedforward: int, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, queries: Tensor) -> Tensor:
        x = self.norm(queries) if self.pre_norm else queries
        queries = queries + self.linear2(F.relu(self.linear1(x)))
        return queries if self.pre_norm else self.norm(queries)


def _blocked_positions(mask_embedding: Tensor, level_features: Tensor) -> Tensor:
    """(B, Q, S) bool: where the mask logit is negative, and nowhere for a query whose mask is empty."""
    logits = torch.einsum("bqc,bchw->bqhw", mask_embedding, level_features).flatten(2)  # (B, Q, S)
    blocked = logits < 0
    return blocked & ~blocked.all(-1, keepdim=True)
