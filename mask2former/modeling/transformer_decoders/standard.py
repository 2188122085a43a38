"""The transformer decoder of MaskFormer (Cheng et al., 2021, section 3.3): DETR's, with a mask for each query."""

from typing import Any

import torch
from torch import Tensor, nn

from mask2former.modeling.layers import MLP, fill_conv_xavier
from mask2former.modeling.structures import MaskPrediction, PixelFeatures, per_pixel_prediction
from mask2former.modeling.transformer_layers import TransformerDecoder, TransformerEncoder, tokens_and_positions


class StandardDecoder(nn.Module):
    """Layers of self-attention, cross-attention to one map and FFN over queries that start as zeros.

    No attention is masked. Learned positions tell the queries apart.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        mask_classification: bool = True,
        hidden_dim: int = 256,
        num_queries: int = 100,
        num_heads: int = 8,
        dim_feedforward: int = 2048,
        num_encoder_layers: int = 0,
        num_layers: int = 6,
        dropout: float = 0.0,
        pre_norm: bool = False,
        mask_dim: int = 256,
        enforce_input_projection: bool = False,
    ) -> None:
        """Build with random weights.

        Args:
            in_channels: channels of the map that is attended to.
            num_classes: K, without "no object".
            mask_classification: predict a class for each mask. Otherwise query k stands for class k, and its mask
                logits are the class's logits of every pixel.
            hidden_dim: channels of the queries.
            num_queries: Q; must be K without mask classification.
            num_heads, dim_feedforward, dropout, pre_norm: of each layer.
            num_encoder_layers: layers of self-attention over the map before it is attended to.
            num_layers: decoder layers, each of which gives a prediction.
            mask_dim: channels of the mask features.
            enforce_input_projection: project the map even when the channels agree.

        Raises:
            ValueError: if a number is below one, or classes and queries differ without mask classification.
        """
        super().__init__()
        positive = {"num_classes": num_classes, "num_queries": num_queries, "num_layers": num_layers}
        for name, number in positive.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not mask_classification and num_queries != num_classes:
            raise ValueError(
                f"num_queries must be num_classes = {num_classes} without mask classification, got {num_queries}"
            )
        layers: dict[str, Any] = {
            "dim": hidden_dim,
            "num_heads": num_heads,
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "pre_norm": pre_norm,
        }
        self.input_proj: nn.Module = nn.Identity()
        if in_channels != hidden_dim or enforce_input_projection:
            projection = nn.Conv2d(in_channels, hidden_dim, 1)
            fill_conv_xavier(projection)
            self.input_proj = projection
        self.transformer = nn.ModuleDict(
            {
                "encoder": TransformerEncoder(num_layers=num_encoder_layers, **layers),
                "decoder": TransformerDecoder(num_layers=num_layers, **layers),
            }
        )
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1) if mask_classification else None
        self.mask_embed = MLP(in_dim=hidden_dim, hidden_dim=hidden_dim, out_dim=mask_dim, num_layers=3)

    def forward(self, features: PixelFeatures, all_layers: bool | None = None) -> list[MaskPrediction]:
        """Predict.

        Args:
            features: from the pixel decoder; the first level is attended to.
            all_layers: give the prediction of every layer; otherwise only the last. None: as the module is training
                or not.

        Returns:
            The predictions, the last one final.
        """
        if all_layers is None:
            all_layers = self.training
        decoded = self._decode(features)
        return [self._predict(x, features.mask_features) for x in (decoded if all_layers else decoded[-1:])]

    def predict_with_queries(self, features: PixelFeatures) -> tuple[MaskPrediction, Tensor]:
        """Predict, and give what the prediction was made from: an embedding of what each query has found.

        Returns:
            The final prediction, and the normalised features (B, Q, C) of the queries.
        """
        queries = self._decode(features)[-1]
        return self._predict(queries, features.mask_features), queries

    def _decode(self, features: PixelFeatures) -> list[Tensor]:
        """The normalised queries (B, Q, C) after each layer."""
        tokens, position = tokens_and_positions(self.input_proj(features.levels[0]))
        memory = self.transformer["encoder"](tokens, position)  # (B, S, C)
        query_position = self.query_embed.weight.expand(len(memory), -1, -1)  # (B, Q, C)
        queries = torch.zeros_like(query_position)
        return self.transformer["decoder"](queries, query_position, memory + position, memory)

    def _predict(self, decoded: Tensor, mask_features: Tensor) -> MaskPrediction:
        mask_logits = torch.einsum("bqc,bchw->bqhw", self.mask_embed(decoded), mask_features)  # (B, Q, H/4, W/4)
        if self.class_embed is None:
            return per_pixel_prediction(mask_logits)
        return MaskPrediction(self.class_embed(decoded), mask_logits)
