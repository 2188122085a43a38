"""The decoder without masks: what it attends to, where its queries start, what each layer predicts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.mask2former import ALL_LEVELS, ENCODED, PIXEL_EMBEDDING, SegmentationHead
from mask2former.modeling.position_encoding import sine_position_encoding
from mask2former.modeling.structures import PixelFeatures
from mask2former.modeling.transformer_decoders import StandardDecoder
from tests.golden import fill_weights

K, Q = 5, 7


def make(**changes: Any) -> StandardDecoder:
    arguments = {
        "in_channels": 16,
        "num_classes": K,
        "num_queries": Q,
        "hidden_dim": 16,
        "num_heads": 4,
        "dim_feedforward": 24,
        "num_layers": 3,
        "mask_dim": 12,
    }
    decoder = StandardDecoder(**{**arguments, **changes})
    fill_weights(decoder)
    return decoder


def features(channels: int = 16, batch: int = 2, dtype: torch.dtype = torch.float32) -> PixelFeatures:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    levels = [random(batch, channels, *size) for size in ((2, 3), (4, 6), (8, 12))]
    return PixelFeatures(random(batch, 12, 16, 24), levels)


def test_one_prediction_a_layer_in_training_and_the_last_one_otherwise() -> None:
    decoder, pixels = make(), features()
    every = decoder.train()(pixels)
    (last,) = decoder.eval()(pixels)
    assert [p.class_logits.shape for p in every] == [(2, Q, K + 1)] * 3
    assert [p.mask_logits.shape for p in every] == [(2, Q, 16, 24)] * 3
    torch.testing.assert_close(every[-1], last, rtol=0, atol=0)
    assert len(decoder(pixels, all_layers=True)) == 3
    assert not torch.equal(every[0].mask_logits, every[1].mask_logits)


def test_features_of_the_queries_are_what_the_prediction_was_made_of() -> None:
    decoder, pixels = make().eval(), features()
    prediction, queries = decoder.predict_with_queries(pixels)
    torch.testing.assert_close(prediction, decoder(pixels)[0], rtol=0, atol=0)
    torch.testing.assert_close(decoder.class_embed(queries), prediction.class_logits)


@pytest.mark.parametrize("changes", [{}, {"pre_norm": True, "num_encoder_layers": 2}, {"in_channels": 8}], ids=str)
def test_gradients(changes: dict[str, Any]) -> None:
    """Every parameter has one; queries that start as zeros make one in the first layer zero, but for rounding."""
    decoder, pixels = make(**changes).double(), features(changes.get("in_channels", 16), dtype=torch.float64)
    predictions = decoder(pixels)
    sum((x * torch.randn_like(x)).sum() for p in predictions for x in p).backward()
    names = dict(decoder.named_parameters())
    assert [n for n, p in names.items() if p.grad is None] == []
    first = "norm1.weight" if changes.get("pre_norm") else "self_attn.in_proj_weight"
    without = {n for n, p in names.items() if p.grad.abs().max() < 1e-9}
    assert without == {f"transformer.decoder.layers.0.{first}"}
    assert pixels.mask_features.grad.any() and pixels.levels[0].grad.any()
    assert pixels.levels[1].grad is None and pixels.levels[2].grad is None  # one map is attended to


def test_it_equals_pytorchs_decoder_layer_with_positions() -> None:
    decoder, pixels = make(num_layers=1), features()
    layer = decoder.transformer["decoder"].layers[0]
    attentions = []
    for ours in (layer.self_attn, layer.multihead_attn):
        attention = nn.MultiheadAttention(16, 4, batch_first=True)
        attention.load_state_dict(ours.state_dict())
        attentions.append(attention)
    memory = pixels.levels[0].flatten(2).transpose(1, 2)
    keys = memory + sine_position_encoding(2, 3, 16).flatten(1).t()
    position = decoder.query_embed.weight.expand(2, -1, -1)
    x = layer.norm1(attentions[0](position, position, torch.zeros(2, Q, 16))[0])
    x = layer.norm2(x + attentions[1](x + position, keys, memory)[0])
    x = layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))
    x = decoder.transformer["decoder"].norm(x)
    (found,) = decoder(pixels)
    torch.testing.assert_close(found.class_logits, decoder.class_embed(x))
    expected = torch.einsum("bqc,bchw->bqhw", decoder.mask_embed(x), pixels.mask_features)
    torch.testing.assert_close(found.mask_logits, expected, rtol=1e-4, atol=1e-5)


def test_queries_start_as_zeros_and_their_positions_alone_tell_them_apart() -> None:
    decoder, pixels = make(), features()
    with torch.no_grad():
        decoder.query_embed.weight.copy_(decoder.query_embed.weight[:1].expand(Q, -1).clone())
    last = decoder(pixels)[-1]
    torch.testing.assert_close(last.mask_logits, last.mask_logits[:, :1].expand(-1, Q, -1, -1))
    assert "query_feat.weight" not in decoder.state_dict()


def test_the_order_of_the_queries_is_the_order_of_the_predictions() -> None:
    decoder, pixels = make(), features()
    before, order = decoder(pixels)[-1], torch.randperm(Q)
    with torch.no_grad():
        decoder.query_embed.weight.copy_(decoder.query_embed.weight[order].clone())
    after = decoder(pixels)[-1]
    torch.testing.assert_close(after.class_logits, before.class_logits[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.mask_logits, before.mask_logits[:, order], rtol=1e-4, atol=1e-4)


def test_no_attention_is_masked() -> None:
    """Masks that are negative everywhere change nothing for the queries."""
    decoder, pixels = make(), features()
    before = decoder(pixels)[-1].class_logits
    after = decoder(pixels._replace(mask_features=-100 * pixels.mask_features.abs()))[-1].class_logits
    assert torch.equal(before, after)


def test_dropout_acts_in_training_only() -> None:
    decoder, pixels = make(dropout=0.5), features()
    assert not torch.equal(decoder.train()(pixels)[-1].mask_logits, decoder(pixels)[-1].mask_logits)
    assert torch.equal(decoder.eval()(pixels)[-1].mask_logits, decoder(pixels)[-1].mask_logits)


def test_projection_only_where_needed_or_asked_for() -> None:
    assert "input_proj.weight" not in make().state_dict()
    assert make(in_channels=8).state_dict()["input_proj.weight"].shape == (16, 8, 1, 1)
    assert "input_proj.weight" in make(enforce_input_projection=True).state_dict()


def test_without_mask_classification_queries_are_classes() -> None:
    decoder, pixels = make(num_queries=K, mask_classification=False), features()
    predictions = decoder(pixels)
    assert all(p.is_per_pixel and p.class_logits.shape == (2, K, 0) for p in predictions)
    assert not [n for n in decoder.state_dict() if n.startswith("class_embed")]
    other = make(num_queries=K)
    torch.testing.assert_close(predictions[-1].mask_logits, other(pixels)[-1].mask_logits)
    with pytest.raises(ValueError, match="num_queries must be num_classes = 5 without mask classification, got 7"):
        make(mask_classification=False)


@pytest.mark.parametrize("name", ["num_classes", "num_queries", "num_layers"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make(**{name: 0})


class Pixels(nn.Module):
    def __init__(self, pixels: PixelFeatures) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, maps: dict[str, Tensor]) -> PixelFeatures:
        return self.pixels


@pytest.mark.parametrize("in_feature", [ALL_LEVELS, ENCODED, PIXEL_EMBEDDING, "res5"])
def test_the_head_chooses_the_map(in_feature: str) -> None:
    pixels, maps = features(), {"res5": torch.randn(2, 10, 2, 3)}
    attended = {PIXEL_EMBEDDING: pixels.mask_features, "res5": maps["res5"]}.get(in_feature, pixels.levels[0])
    decoder = make(in_channels=attended.shape[1])
    found = SegmentationHead(pixel_decoder=Pixels(pixels), predictor=decoder, in_feature=in_feature)(maps)
    torch.testing.assert_close(found, decoder(pixels._replace(levels=[attended])), rtol=0, atol=0)
