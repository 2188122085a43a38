"""The masked-attention decoder: attention masks, outputs, variants and names of the first releases."""


import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.structures import PixelFeatures
from mask2former.modeling.transformer_decoders import MaskedAttentionDecoder
from mask2former.modeling.transformer_decoders import masked_attention as module
from tests.modeling.small_decoder import SIZES, small_decoder


def _features(channels: int = 16, mask_dim: int = 12, batch: int = 2) -> PixelFeatures:
    levels = [torch.randn(batch, channels, h, w, requires_grad=True) for h, w in SIZES]
    return PixelFeatures(torch.randn(batch, mask_dim, 16, 24, requires_grad=True), levels)


def test_blocked_positions_equal_naive_loop() -> None:
    embedding, features = torch.randn(2, 5, 3), torch.randn(2, 3, 2, 4)
    features[:, 0] = 1
    embedding[0, 2] = torch.tensor([-1e4, 0.0, 0.0])  # an empty mask
    embedding[1, 4] = torch.tensor([1e4, 0.0, 0.0])  # a full mask
    found = module._blocked_positions(embedding, features)
    assert found.shape == (2, 5, 8)
    for b in range(2):
        for q in range(5):
            logits = [
                sum(embedding[b, q, c].item() * features[b, c, i, j].item() for c in range(3))
                for i in range(2)
                for j in range(4)
            ]
            foreground = [1 / (1 + 2.718281828459045 ** -min(max(x, -50), 50)) >= 0.5 for x in logits]
            expected = [not f for f in foreground] if any(foreground) else [False] * 8
            assert found[b, q].tolist() == expected
    assert not found[0, 2].any()
    assert not found[1, 4].any()


def test_a_logit_of_zero_is_foreground() -> None:
    features = torch.tensor([0.0, -1.0]).view(1, 1, 1, 2)
    assert module._blocked_positions(torch.ones(1, 1, 1), features).tolist() == [[[False, True]]]


def test_resized_features_block_as_resized_masks_do() -> None:
    embedding, features = torch.randn(2, 50, 12), torch.randn(2, 12, 16, 24)
    for size in SIZES:
        resized = F.interpolate(features, size, mode="bilinear", align_corners=False)
        found = module._blocked_positions(embedding, resized)
        masks = torch.einsum("bqc,bchw->bqhw", embedding, features)
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False).flatten(2)
        blocked = masks.sigmoid() < 0.5
        blocked[blocked.all(-1)] = False
        decided = masks.abs() > 1e-5
        assert decided.double().mean() > 0.99
        assert torch.equal(found[decided], blocked[decided])


def test_empty_masks_give_no_nan() -> None:
    decoder, features = small_decoder(), _features()
    with torch.no_grad():
        decoder.mask_embed.layers[-1].weight.zero_()
        decoder.mask_embed.layers[-1].bias.copy_(torch.tensor([-5.0] + [0.0] * 11))
        features.mask_features[:, 0] = 1  # every mask logit is -5
    predictions = decoder(features, all_layers=True)
    assert all((p.mask_logits < 0).all() for p in predictions)
    sum(p.class_logits.sum() for p in predictions).backward()
    assert all(p.class_logits.isfinite().all() for p in predictions)
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)


def test_a_query_reads_only_the_foreground_of_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, features = small_decoder(num_layers=1), _features(batch=1)
    kept: list[Tensor] = []
    original = module._blocked_positions
    monkeypatch.setattr(module, "_blocked_positions", lambda *a: kept.append(original(*a)) or kept[-1])
    before = decoder(features)[-1].class_logits
    position = int((kept[0][0].sum(0) > 0).nonzero()[0])  # blocked for some query
    changed = [x.detach().clone() for x in features.levels]
    changed[0].flatten(2)[..., position] += 5
    layer = decoder.transformer_self_attention_layers[0].self_attn
    with torch.no_grad():
        layer.out_proj.weight.zero_()  # queries no longer see each other
    before = decoder(features)[-1].class_logits
    after = decoder(PixelFeatures(features.mask_features, changed))[-1].class_logits
    moved = (after - before).abs().amax(-1)[0] > 0
    assert torch.equal(moved, ~kept[0][0, :, position])
    assert moved.any()
    assert not moved.all()


@pytest.mark.parametrize("num_layers", [1, 4])
def test_all_layers_changes_the_list_but_not_the_last_prediction(num_layers: int) -> None:
    decoder, features = small_decoder(num_layers=num_layers), _features()
    all_predictions, last = decoder(features, all_layers=True), decoder(features, all_layers=False)
    assert len(all_predictions) == num_layers + 1
    assert len(last) == 1
    torch.testing.assert_close(last[0], all_predictions[-1], rtol=0, atol=0)
    assert len(decoder.train()(features)) == num_layers + 1
    assert len(decoder.eval()(features)) == 1
    for prediction in all_predictions:
        assert prediction.class_logits.shape == (2, 7, 6)
        assert prediction.mask_logits.shape == (2, 7, 16, 24)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_query_features_are_those_that_the_last_prediction_is_made_from(pre_norm: bool, training: bool) -> None:
    decoder, features = small_decoder(pre_norm=pre_norm).train(training), _features()
    prediction, queries = decoder.predict_with_queries(features)
    assert queries.shape == (2, 7, 16)
    torch.testing.assert_close(prediction, decoder(features)[-1], rtol=0, atol=0)
    torch.testing.assert_close(decoder.class_embed(queries), prediction.class_logits)
    masks = torch.einsum("bqc,bchw->bqhw", decoder.mask_embed(queries), features.mask_features)
    torch.testing.assert_close(masks, prediction.mask_logits)


def test_first_prediction_comes_from_the_learned_queries_alone() -> None:
    decoder, features = small_decoder(), _features()
    first = decoder(features, all_layers=True)[0]
    normed = decoder.decoder_norm(decoder.query_feat.weight)
    torch.testing.assert_close(first.class_logits[1], decoder.class_embed(normed))
    expected = torch.einsum("qc,chw->qhw", decoder.mask_embed(normed), features.mask_features[1])
    torch.testing.assert_close(first.mask_logits[1], expected, rtol=1e-4, atol=1e-4)


def test_layers_read_the_levels_round_and_round() -> None:
    decoder, features = small_decoder(num_layers=5), _features()
    lengths: list[int] = []
    for layer in decoder.transformer_cross_attention_layers:
        layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[1].shape[1]))
    decoder(features)
    assert lengths == [6, 24, 96, 6, 24]


def test_no_gradient_through_the_attention_mask() -> None:
    decoder, features = small_decoder(num_layers=1), _features()
    decoder(features)[-1].class_logits.sum().backward()
    assert features.mask_features.grad is None or not features.mask_features.grad.any()
    assert all(p.grad is None for p in decoder.mask_embed.parameters())


@pytest.mark.parametrize("pre_norm", [False, True])
def test_every_parameter_gets_a_gradient(pre_norm: bool) -> None:
    decoder, features = small_decoder(pre_norm=pre_norm, enforce_input_projection=True), _features()
    predictions = decoder(features, all_layers=True)
    sum((x * torch.randn_like(x)).sum() for p in predictions for x in p).backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(x.grad is not None and x.grad.any() for x in (features.mask_features, *features.levels))


def test_pre_norm_differs_and_leaves_the_residual_stream_unnormed() -> None:
    features = _features()
    post, pre = small_decoder(), small_decoder(pre_norm=True)
    assert set(post.state_dict()) == set(pre.state_dict())
    assert not torch.allclose(post(features)[-1].class_logits, pre(features)[-1].class_logits)
    ffn_outputs: list[Tensor] = []
    pre.transformer_ffn_layers[-1].register_forward_hook(lambda *a: ffn_outputs.append(a[2]))
    prediction = pre(features)[-1]
    assert prediction.class_logits.isfinite().all()
    normed = pre.decoder_norm(ffn_outputs[0])
    torch.testing.assert_close(prediction.class_logits, pre.class_embed(normed))
    assert ffn_outputs[0].mean(-1).abs().max() > 0.1  # a LayerNorm would have centred it


def test_one_query_and_one_class() -> None:
    prediction = small_decoder(num_queries=1, num_classes=1)(_features())[-1]
    assert prediction.class_logits.shape == (2, 1, 2)
    assert prediction.mask_logits.shape == (2, 1, 16, 24)
    assert prediction.mask_logits.isfinite().all()


def test_input_projection_exists_only_when_needed() -> None:
    def projections(decoder: MaskedAttentionDecoder) -> set[str]:
        return {n for n in decoder.state_dict() if n.startswith("input_proj")}

    expected = {f"input_proj.{i}.{n}" for i in range(3) for n in ("weight", "bias")}
    assert projections(small_decoder()) == set()
    assert projections(small_decoder(enforce_input_projection=True)) == expected
    other = small_decoder(in_channels=10)  # hidden size 16
    assert projections(other) == expected
    assert other(_features(channels=10))[-1].class_logits.shape == (2, 7, 6)


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    decoder, (mask_features, levels) = small_decoder(), _features(batch=3)
    together = decoder(PixelFeatures(mask_features, levels))[-1]
    alone = decoder(PixelFeatures(mask_features[2:], [x[2:] for x in levels]))[-1]
    torch.testing.assert_close(alone.class_logits[0], together.class_logits[2], rtol=1e-4, atol=1e-4)


def test_static_query_of_the_first_releases_is_renamed() -> None:
    decoder, expected = small_decoder(), small_decoder().state_dict()
    old = {n.replace("query_feat", "static_query"): t.clone() for n, t in expected.items()}
    assert "static_query.weight" in old
    decoder.query_feat.weight.data.zero_()
    given = dict(old)
    decoder.load_state_dict(given)
    torch.testing.assert_close(decoder.query_feat.weight.data, expected["query_feat.weight"])
    assert set(given) == set(old)  # the caller's dict is left alone


def test_static_query_beside_query_feat_is_not_taken() -> None:
    decoder, state = small_decoder(), small_decoder().state_dict()
    state["static_query.weight"] = torch.zeros(7, 16)
    expected = state["query_feat.weight"].clone()
    with pytest.raises(RuntimeError, match="static_query"):
        decoder.load_state_dict(state)
    decoder.load_state_dict(state, strict=False)
    torch.testing.assert_close(decoder.query_feat.weight.data, expected)


@pytest.mark.parametrize("name", ["num_classes", "num_queries", "num_layers"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        small_decoder(**{name: 0})
