"""The deformable pixel decoder: which map goes where, initial offsets, precision, gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mask2former.modeling.pixel_decoders import DeformablePixelDecoder
from mask2former.modeling.pixel_decoders.deformable import MSDeformAttn
from tests.golden import fill_weights

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
CHANNELS = {"res2": 6, "res3": 8, "res4": 10, "res5": 12}


def _decoder(**changes: Any) -> DeformablePixelDecoder:
    arguments = {
        "in_channels": CHANNELS,
        "in_strides": STRIDES,
        "conv_dim": 32,
        "mask_dim": 20,
        "num_layers": 2,
        "num_heads": 4,
        "num_points": 2,
        "dim_feedforward": 40,
    }
    return DeformablePixelDecoder(**{**arguments, **changes})


def _features(height: int = 64, width: int = 96, batch: int = 2) -> dict[str, Tensor]:
    return {
        n: torch.randn(batch, CHANNELS[n], -(-height // s), -(-width // s), requires_grad=True)
        for n, s in STRIDES.items()
    }


@pytest.mark.parametrize("inputs", [("res3", "res4", "res5"), ("res4", "res5"), ("res5",)])
@pytest.mark.parametrize("size", [(64, 96), (36, 100), (1, 1)])
def test_levels_are_the_three_coarsest_lowest_resolution_first(
    inputs: tuple[str, ...], size: tuple[int, int]
) -> None:
    features = _features(*size)
    mask_features, levels = _decoder(transformer_in_features=inputs)(features)
    assert mask_features.shape == (2, 20, *features["res2"].shape[2:])
    assert [x.shape for x in levels] == [(2, 32, *features[n].shape[2:]) for n in ("res5", "res4", "res3")]
    assert all(x.isfinite().all() for x in (mask_features, *levels))


def test_order_of_the_feature_dict_and_names_does_not_matter() -> None:
    decoder, features = _decoder(), _features()
    fill_weights(decoder)
    shuffled = dict(reversed(features.items()))
    torch.testing.assert_close(decoder(features), decoder(shuffled), rtol=0, atol=0)
    other = _decoder(transformer_in_features=["res5", "res3", "res4"])
    fill_weights(other)
    torch.testing.assert_close(decoder(features), other(features), rtol=0, atol=0)


def test_every_parameter_and_input_gets_a_gradient() -> None:
    decoder, features = _decoder(), _features()
    fill_weights(decoder)
    mask_features, levels = decoder(features)
    sum((x * torch.randn_like(x)).sum() for x in (mask_features, *levels)).backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(x.grad is not None and x.grad.any() for x in features.values())


def test_autocast_leaves_the_decoder_in_float32() -> None:
    decoder, features = _decoder(), _features()
    plain = decoder(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = decoder(features)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    rounded = {n: x.bfloat16() for n, x in features.items()}
    assert decoder(rounded).mask_features.dtype == torch.float32


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    decoder, features = _decoder(), _features(batch=3)
    fill_weights(decoder)
    together = decoder(features)
    alone = decoder({n: x[1:2] for n, x in features.items()})
    torch.testing.assert_close(alone.mask_features[0], together.mask_features[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.levels[2][0], together.levels[2][1], rtol=1e-4, atol=1e-5)


def test_no_norm_gives_convolutions_a_bias() -> None:
    names = set(_decoder(norm="").state_dict())
    assert {"adapter_1.bias", "layer_1.bias"} <= names
    assert "adapter_1.norm.weight" not in names
    assert "adapter_1.bias" not in _decoder().state_dict()


def test_dropout_acts_in_training_only() -> None:
    decoder, features = _decoder(dropout=0.5), _features()
    assert not torch.equal(decoder.train()(features).mask_features, decoder(features).mask_features)
    assert torch.equal(decoder.eval()(features).mask_features, decoder(features).mask_features)


def test_initial_offsets_are_directions_times_one_to_p() -> None:
    attention = MSDeformAttn(dim=16, num_levels=3, num_heads=8, num_points=4)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    offsets = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    for m in range(8):
        x, y = math.cos(math.pi / 4 * m), math.sin(math.pi / 4 * m)
        length = max(abs(x), abs(y))
        for p in range(4):
            expected = torch.tensor([x, y]) / length * (p + 1)
            for level in range(3):
                torch.testing.assert_close(offsets[m, level, p], expected, rtol=0, atol=1e-5)


def test_offsets_are_pixels_of_each_level() -> None:
    """One head looking one pixel to the right from the centre of a cell reads the right neighbour."""
    attention = MSDeformAttn(dim=4, num_levels=1, num_heads=1, num_points=1)
    with torch.no_grad():
        for projection in (attention.value_proj, attention.output_proj):
            projection.weight.copy_(torch.eye(4))
            projection.bias.zero_()
    height, width = 3, 5
    value = torch.randn(1, height * width, 4)
    output = attention(value, torch.randn(height * width, 4), [(height, width)])
    found, cells = output.view(height, width, 4), value.view(height, width, 4)
    torch.testing.assert_close(found[:, :-1], cells[:, 1:], rtol=1e-4, atol=1e-5)
    assert found[:, -1].abs().max() < 1e-5  # outside is zero


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"transformer_in_features": ["res3", "p7"]}, r"transformer_in_features must be among .*got \['p7'\]"),
        ({"in_strides": {**STRIDES, "res2": 2}}, "in_strides must .*common_stride = 4"),
        ({"transformer_in_features": ["res2", "res3", "res4", "res5"]}, "in_strides must hold common_stride = 4"),
        (
            {"in_channels": {"res4": 10, "res5": 12}, "transformer_in_features": ["res5"], "common_stride": 16},
            "in_strides must leave at least 3 levels",
        ),
        ({"num_heads": 5}, "dim must be a multiple of num_heads = 5, got 32"),
    ],
)
def test_wrong_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _decoder(**wrong)


# ---- activation checkpointing


def _trained(checkpoint_activations: bool) -> tuple[int, dict[str, Tensor | None], Tensor]:
    """Bytes that are kept for the backward pass, gradients, and a result, with the same weights and random numbers."""
    torch.manual_seed(5)
    features = _features()
    decoder = _decoder(dropout=0.3, num_layers=3, checkpoint_activations=checkpoint_activations).train()
    fill_weights(decoder)
    torch.manual_seed(6)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        pixels = decoder(features)
        loss = sum(x.square().mean() for x in (pixels.mask_features, *pixels.levels))
    loss.backward()
    gradients = {n: p.grad for n, p in decoder.named_parameters()}
    return sum(kept.values()), gradients | {n: x.grad for n, x in features.items()}, pixels.mask_features.detach()


def test_activation_checkpointing_keeps_less_and_changes_neither_numbers_nor_gradients() -> None:
    plain, gradients, result = _trained(False)
    less, others, other = _trained(True)
    assert torch.equal(result, other)
    torch.testing.assert_close(others, gradients, rtol=0, atol=0)
    # a layer keeps its input, and no longer at least two tensors of the hidden width, 40 of the 32 channels' 1.25 times
    tokens = 2 * (2 * 3 + 4 * 6 + 8 * 12) * 4  # bytes a channel
    assert plain - less > 3 * 2 * 40 * tokens


def test_activation_checkpointing_is_for_training() -> None:
    """In evaluation it is inactive, so that exports and compiled graphs are those without it."""
    decoder = _decoder(checkpoint_activations=True)
    calls: list[int] = []
    decoder.transformer.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for training, expected in ((True, 2), (False, 1)):
        calls.clear()
        decoder.train(training)(_features())[0].sum().backward()
        assert len(calls) == expected
    exported = torch.export.export(decoder.eval(), ({n: x.detach() for n, x in _features().items()},))
    assert not any("checkpoint" in str(node.target) for node in exported.graph.nodes)
