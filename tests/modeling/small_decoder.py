"""The small masked decoder that the tests of the decoder share."""

from typing import Any

from mask2former.modeling.transformer_decoders import MaskedAttentionDecoder
from tests.golden import fill_weights

SIZES = ((2, 3), (4, 6), (8, 12))  # of the three levels


def small_decoder(**changes: Any) -> MaskedAttentionDecoder:
    """4 layers, 7 queries, 5 classes; changes are its arguments."""
    arguments = {
        "in_channels": 16,
        "num_classes": 5,
        "hidden_dim": 16,
        "num_queries": 7,
        "num_heads": 4,
        "dim_feedforward": 24,
        "num_layers": 4,
        "mask_dim": 12,
    }
    decoder = MaskedAttentionDecoder(**{**arguments, **changes})
    fill_weights(decoder)
    return decoder
