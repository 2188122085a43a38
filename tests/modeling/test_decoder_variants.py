"""The paper's alternatives to parts of the masked decoder (Tables 4b to 4d), and decoding with the first layers."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mask2former.modeling.structures import MaskPrediction, PixelFeatures
from mask2former.modeling.transformer_decoders import decoder_layers
from mask2former.modeling.transformer_decoders import masked_attention as module
from tests.golden import fill_weights
from tests.modeling.small_decoder import SIZES, small_decoder

NO_QUERIES: dict[str, Any] = {"learnable_queries": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"cross_attention": "plain"},
    "smca": {"cross_attention": "smca"},
    "mask_pooling": {"cross_attention": "mask_pooling"},
    **{scales: {"feature_scales": scales} for scales in ("stride_32", "stride_16", "stride_8", "all")},
    "all, smca": {"feature_scales": "all", "cross_attention": "smca"},
    "all, mask_pooling": {"feature_scales": "all", "cross_attention": "mask_pooling"},
    "no queries": NO_QUERIES,
    "no queries, smca": {**NO_QUERIES, "cross_attention": "smca"},
    "no queries, mask_pooling": {**NO_QUERIES, "cross_attention": "mask_pooling"},
    "no queries, self first": {**NO_QUERIES, "self_attention_first": True},
    "self first": {"self_attention_first": True},
    "dropout": {"dropout": 0.1},
}


def _features(batch: int = 2, seed: int = 0) -> PixelFeatures:
    torch.manual_seed(seed)
    levels = [torch.randn(batch, 16, h, w, requires_grad=True) for h, w in SIZES]
    return PixelFeatures(torch.randn(batch, 12, 16, 24, requires_grad=True), levels)


def _assert_same(found: MaskPrediction, expected: MaskPrediction) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name: str, pre_norm: bool) -> None:
    decoder = small_decoder(pre_norm=pre_norm, enforce_input_projection=True, **VARIANTS[name]).train()
    features = _features()
    predictions = decoder(features)
    assert len(predictions) == 4 + decoder.learnable_queries
    assert all(x.isfinite().all() for prediction in predictions for x in prediction)
    sum((x * torch.randn_like(x)).sum() for p in predictions for x in p).backward()
    assert [n for n, p in decoder.named_parameters() if p.grad is None] == []
    without = {n for n, p in decoder.named_parameters() if not p.grad.any()}
    # A normalised zero is zero, whatever its weight; and what equal queries give to each other is one and the same,
    # whatever the attention: but for rounding.
    kind = "self" if decoder.self_attention_first else "cross"
    first = f"transformer_{kind}_attention_layers.0"
    zero = not decoder.learnable_queries and pre_norm and name != "no queries, mask_pooling"
    assert without - {f"{first}.self_attn.in_proj_weight"} == ({f"{first}.norm.weight"} if zero else set())
    assert features.mask_features.grad.any()
    read = {"stride_32": [0], "stride_16": [1], "stride_8": [2]}.get(name, [0, 1, 2])
    assert [i for i, level in enumerate(features.levels) if level.grad is not None and level.grad.any()] == read


@pytest.mark.parametrize("name", VARIANTS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(name: str) -> None:
    decoder, (mask_features, levels) = small_decoder(**VARIANTS[name]).eval(), _features(batch=3)
    together = decoder(PixelFeatures(mask_features, levels))[-1]
    alone = decoder(PixelFeatures(mask_features[2:], [x[2:] for x in levels]))[-1]
    _assert_same(alone, MaskPrediction(*(x[2:] for x in together)))


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_is_finite(name: str) -> None:
    decoder = small_decoder(**VARIANTS[name])
    with torch.autocast("cpu", dtype=torch.float16):
        predictions = decoder.train()(_features())
    sum(x.float().sum() for p in predictions for x in p).backward()
    assert all(x.isfinite().all() for p in predictions for x in p)
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)


def test_the_default_has_no_other_names_than_the_published_ones() -> None:
    parts = {name.split(".")[0] for name in small_decoder().state_dict()}
    layers = {f"transformer_{kind}_layers" for kind in ("self_attention", "cross_attention", "ffn")}
    assert parts == {*layers, "decoder_norm", "query_feat", "query_embed", "level_embed", "class_embed", "mask_embed"}
    for name in ("self first", "dropout", "plain", "all"):
        assert small_decoder(**VARIANTS[name]).state_dict().keys() == small_decoder().state_dict().keys()


class TestCrossAttention:
    def test_plain_attention_never_makes_a_mask(self, monkeypatch: pytest.MonkeyPatch) -> None:
        masked, plain, features = small_decoder(), small_decoder(cross_attention="plain").eval(), _features()
        expected = plain(features)[-1]
        monkeypatch.setattr(module, "_blocked_positions", lambda *_: None)  # nothing is blocked
        _assert_same(masked(features, all_layers=False)[-1], expected)
        monkeypatch.setattr(module, "_blocked_positions", None)
        calls: list[int] = []
        plain.mask_embed.register_forward_hook(lambda *_: calls.append(1))
        plain(features)
        assert calls == [1]  # for the final prediction

    def test_a_gaussian_in_closed_form(self) -> None:
        centre, width = torch.tensor([0.5, 0.25]), torch.tensor([0.25, 0.5])
        cells = torch.tensor([[0.5, 0.25], [0.75, 0.25], [0.5, 0.75], [0.75, 0.75]])
        found = decoder_layers.log_gaussian(centre.view(1, 1, 1, 2), width.view(1, 1, 1, 2), cells)
        assert found.flatten().tolist() == [0, -0.5, -0.5, -1]

    def test_gaussians_equal_naive_loops(self) -> None:
        torch.manual_seed(0)
        layer = decoder_layers.SpatialAttentionLayer(dim=16, num_heads=4, dropout=0.0, pre_norm=False)
        fill_weights(layer)
        queries = torch.randn(2, 3, 16)
        h, w = 4, 6
        found = decoder_layers.log_gaussian(*layer.gaussians(queries), decoder_layers.cell_centres(h, w))
        assert found.shape == (2, 4, 3, 24)
        centre, heads = layer.centre(queries).sigmoid(), layer.heads(queries)
        for b in range(2):
            for q in range(3):
                for m in range(4):
                    dx, dy, wx, wy = heads[b, q, 4 * m : 4 * m + 4].tolist()
                    cx, cy = centre[b, q, 0].item() + dx, centre[b, q, 1].item() + dy
                    wx, wy = (math.log1p(math.exp(width)) + 0.01 for width in (wx, wy))
                    for i in range(h):
                        for j in range(w):
                            x, y = (j + 0.5) / w, (i + 0.5) / h
                            expected = -((x - cx) ** 2 / wx**2 + (y - cy) ** 2 / wy**2) / 2
                            assert found[b, m, q, i * w + j].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)

    def test_smca_is_a_softmax_of_logits_times_the_gaussian(self) -> None:
        torch.manual_seed(0)
        layer = decoder_layers.SpatialAttentionLayer(dim=4, num_heads=1, dropout=0.0, pre_norm=False)
        fill_weights(layer)
        queries, position = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
        keys, values, cells = torch.randn(1, 6, 4), torch.randn(1, 6, 4), decoder_layers.cell_centres(2, 3)
        attention, x = layer.multihead_attn, queries + position
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        q, k, v = (a @ w.t() + b for a, w, b in zip((x, keys, values), weights, biases, strict=True))
        gaussian = decoder_layers.log_gaussian(*layer.gaussians(x), cells)[:, 0].exp()  # (1, Q, S)
        weight = ((q @ k.transpose(1, 2)) / 2).exp() * gaussian
        pooled = weight / weight.sum(-1, keepdim=True) @ v
        expected = layer.norm(queries + attention.out_proj(pooled))
        torch.testing.assert_close(layer(queries, keys, values, position, cells), expected, rtol=1e-4, atol=1e-5)

    def test_new_gaussians_are_half_a_map_wide_and_equal_for_all_heads(self) -> None:
        layer = decoder_layers.SpatialAttentionLayer(dim=16, num_heads=4, dropout=0.0, pre_norm=False)
        centre, width = layer.gaussians(torch.randn(2, 3, 16))
        torch.testing.assert_close(width, torch.full((2, 4, 3, 2), 0.5))
        assert torch.equal(centre, centre[:, :1].expand(-1, 4, -1, -1))

    def test_far_away_cells_leave_finite_attention(self) -> None:
        layer = decoder_layers.SpatialAttentionLayer(dim=16, num_heads=4, dropout=0.0, pre_norm=False)
        with torch.no_grad():  # centres far outside of the map, and the least width
            layer.heads.bias.copy_(torch.tensor([500.0, -500.0, -90.0, -90.0]).repeat(4))
        values = torch.randn(1, 24, 16)
        arguments = (torch.randn(1, 3, 16), values, values, torch.zeros(1, 3, 16), decoder_layers.cell_centres(4, 6))
        assert layer(*arguments).isfinite().all()
        with torch.autocast("cpu", dtype=torch.float16):
            assert layer(*arguments).isfinite().all()

    def test_cell_centres(self) -> None:
        found = decoder_layers.cell_centres(2, 3)
        expected = [(x, y) for y in (0.25, 0.75) for x in (1 / 6, 0.5, 5 / 6)]
        torch.testing.assert_close(found, torch.tensor(expected))

    def test_mask_pooling_equals_the_mean_over_the_mask(self) -> None:
        values, blocked = torch.randn(2, 10, 4), torch.rand(2, 3, 10) > 0.4
        blocked[0, 0], blocked[1, 2] = False, True
        blocked[1, 2, 7] = False  # a single cell
        found = decoder_layers.masked_mean(values, blocked)
        for b in range(2):
            for q in range(3):
                inside = [values[b, s] for s in range(10) if not blocked[b, q, s]]
                torch.testing.assert_close(found[b, q], sum(inside, torch.zeros(4)) / len(inside))
        torch.testing.assert_close(found[1, 2], values[1, 7])
        torch.testing.assert_close(decoder_layers.masked_mean(values, None)[0, 0], values[0].mean(0))

    def test_the_mask_that_is_pooled_is_that_of_the_prediction_before(self) -> None:
        decoder, features = small_decoder(cross_attention="mask_pooling", num_layers=1), _features(batch=1)
        pooled: list[Tensor] = []
        layer = decoder.transformer_cross_attention_layers[0]
        layer.pooled_proj.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
        decoder.train()(features)
        embedding = decoder.mask_embed(decoder.decoder_norm(decoder.query_feat.weight))
        smaller = torch.nn.functional.interpolate(
            features.mask_features, SIZES[0], mode="bilinear", align_corners=False
        )
        inside = torch.einsum("qc,chw->qhw", embedding, smaller[0]).flatten(1) >= 0
        assert 0 < inside.sum() < inside.numel()
        values = (features.levels[0][0].flatten(1) + decoder.level_embed.weight[0][:, None]).t()  # (S, C)
        for q in range(7):
            expected = values[inside[q]].mean(0) if inside[q].any() else values.mean(0)
            torch.testing.assert_close(pooled[0][0, q], expected, rtol=1e-4, atol=1e-5)

    def test_an_empty_mask_pools_everything(self) -> None:
        decoder, features = small_decoder(cross_attention="mask_pooling", num_layers=1), _features(batch=1)
        with torch.no_grad():
            decoder.mask_embed.layers[-1].weight.zero_()
            decoder.mask_embed.layers[-1].bias.copy_(torch.tensor([-5.0] + [0.0] * 11))
            features.mask_features[:, 0] = 1  # every mask logit is -5
        pooled: list[Tensor] = []
        layer = decoder.transformer_cross_attention_layers[0]
        layer.pooled_proj.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0]))
        decoder.train()(features)
        everything = features.levels[0].flatten(2).mean(2) + decoder.level_embed.weight[0]
        torch.testing.assert_close(pooled[0], everything[:, None].expand(-1, 7, -1), rtol=1e-4, atol=1e-5)


class TestFeatureScales:
    @pytest.mark.parametrize("level", [0, 1, 2])
    @pytest.mark.parametrize("cross_attention", module.CROSS_ATTENTIONS)
    def test_a_single_scale_is_all_that_is_read(self, level: int, cross_attention: str) -> None:
        scales = f"stride_{32 >> level}"
        decoder, features = small_decoder(feature_scales=scales, cross_attention=cross_attention).eval(), _features()
        before = decoder(features)[-1]
        others = [x if i == level else torch.randn(2, 16, 5, 7) for i, x in enumerate(features.levels)]
        torch.testing.assert_close(decoder(features._replace(levels=others))[-1], before, rtol=0, atol=0)
        same = [torch.randn_like(x) if i == level else x for i, x in enumerate(features.levels)]
        assert not torch.allclose(decoder(features._replace(levels=same))[-1].class_logits, before.class_logits)
        assert decoder.level_embed.weight.shape == (1, 16)

    def test_naive_multi_scale_reads_everything_in_each_layer(self) -> None:
        decoder = small_decoder(feature_scales="all")
        lengths: list[int] = []
        for layer in decoder.transformer_cross_attention_layers:
            layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[1].shape[1]))
        decoder(_features())
        assert lengths == [6 + 24 + 96] * 4

    def test_naive_multi_scale_equals_attention_over_the_concatenation(self) -> None:
        """One layer, its masked attention written as sums over all cells of all levels."""
        decoder, features = small_decoder(feature_scales="all", num_layers=1, num_heads=1), _features(batch=1)
        attention = decoder.transformer_cross_attention_layers[0].multihead_attn
        found: list[Tensor] = []
        attention.register_forward_hook(lambda *a: found.append(a[2]))
        decoder.train()(features)
        queries, embedding = decoder.query_feat.weight, decoder.decoder_norm(decoder.query_feat.weight)
        embedding = decoder.mask_embed(embedding)
        keys, values, inside = [], [], []
        for level, maps in enumerate(features.levels):
            h, w = maps.shape[-2:]
            position = module.sine_position_encoding(h, w, 16)
            smaller = torch.nn.functional.interpolate(
                features.mask_features, (h, w), mode="bilinear", align_corners=False
            )
            for i in range(h):
                for j in range(w):
                    values.append(maps[0, :, i, j] + decoder.level_embed.weight[level])
                    keys.append(values[-1] + position[:, i, j])
                    inside.append(embedding @ smaller[0, :, i, j] >= 0)
        visible = torch.stack(inside, 1)  # (Q, S)
        visible = visible | ~visible.any(1, keepdim=True)
        wq, wk, wv = attention.in_proj_weight.chunk(3)
        bq, bk, bv = attention.in_proj_bias.chunk(3)
        k, v = torch.stack(keys) @ wk.t() + bk, torch.stack(values) @ wv.t() + bv
        for query in range(7):
            q = (queries[query] + decoder.query_embed.weight[query]) @ wq.t() + bq
            weight = torch.where(visible[query], (k @ q) / 4, -math.inf).softmax(0)
            expected = attention.out_proj(weight @ v)
            torch.testing.assert_close(found[0][0, query], expected, rtol=1e-3, atol=1e-4)

    def test_smca_has_a_grid_of_its_own_on_each_level(self) -> None:
        decoder = small_decoder(feature_scales="all", cross_attention="smca")
        cells = decoder._memory((0, 1, 2), _features()).places
        expected = torch.cat([decoder_layers.cell_centres(h, w) for h, w in SIZES])
        torch.testing.assert_close(cells, expected)


class TestQueries:
    def test_zero_queries_are_zero_and_no_parameter(self) -> None:
        decoder, features = small_decoder(learnable_queries=False), _features()
        assert decoder.state_dict().keys() == small_decoder().state_dict().keys() - {"query_feat.weight"}
        started: list[Tensor] = []
        decoder.transformer_cross_attention_layers[0].register_forward_pre_hook(lambda _, x: started.append(x[0]))
        decoder(features)
        assert torch.equal(started[0], torch.zeros(2, 7, 16))
        assert not started[0].requires_grad

    @pytest.mark.parametrize("cross_attention", ["masked", "mask_pooling"])
    def test_nothing_is_predicted_or_masked_before_the_first_layer(self, cross_attention: str) -> None:
        decoder, features = small_decoder(learnable_queries=False, cross_attention=cross_attention), _features()
        blocked: list[Tensor | None] = []
        for layer in decoder.transformer_cross_attention_layers:
            layer.register_forward_pre_hook(lambda _, inputs: blocked.append(inputs[4]))
        predictions = decoder(features, all_layers=True)
        assert [x is None for x in blocked] == [True, False, False, False]
        assert len(predictions) == 4
        assert len(small_decoder()(features, all_layers=True)) == 5

    def test_weights_with_learned_queries_are_reported(self) -> None:
        with pytest.raises(RuntimeError, match="query_feat"):
            small_decoder(learnable_queries=False).load_state_dict(small_decoder().state_dict())


class TestOrderAndDropout:
    @pytest.mark.parametrize("self_attention_first", [False, True])
    def test_order_of_attention(self, self_attention_first: bool) -> None:
        decoder = small_decoder(self_attention_first=self_attention_first, num_layers=2)
        order: list[str] = []
        for kind in ("self_attention", "cross_attention", "ffn"):
            for layer in getattr(decoder, f"transformer_{kind}_layers"):
                layer.register_forward_hook(lambda *_, kind=kind: order.append(kind))
        decoder(_features())
        first = ["self_attention", "cross_attention"]
        assert order == [*(first if self_attention_first else first[::-1]), "ffn"] * 2

    def test_self_attention_first_uses_the_mask_of_the_last_prediction(self) -> None:
        """The mask is that of the queries as they were before the layer."""
        decoder, features = small_decoder(self_attention_first=True, num_layers=1), _features(batch=1)
        blocked: list[Tensor] = []
        decoder.transformer_cross_attention_layers[0].register_forward_pre_hook(lambda _, x: blocked.append(x[4]))
        first = decoder(features, all_layers=True)[0]
        masks = torch.nn.functional.interpolate(
            first.mask_logits, SIZES[0], mode="bilinear", align_corners=False
        ).flatten(2)
        expected = (masks < 0) & (masks >= 0).any(-1, keepdim=True)
        assert torch.equal(blocked[0], expected)

    def test_dropout_acts_in_training_only_and_not_by_default(self) -> None:
        features = _features()
        plain, dropping = small_decoder(), small_decoder(dropout=0.5)
        _assert_same(dropping.eval()(features)[-1], plain.eval()(features)[-1])
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = plain.train()(features)[-1].class_logits
        assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
        assert torch.equal(plain(features)[-1].class_logits, first)
        assert not torch.equal(dropping.train()(features)[-1].class_logits, dropping(features)[-1].class_logits)

    def test_dropout_reaches_each_step_of_each_layer(self) -> None:
        decoder = small_decoder(dropout=0.25)
        steps = [m.p for m in decoder.modules() if isinstance(m, torch.nn.Dropout)]
        attentions = [m.dropout for m in decoder.modules() if isinstance(m, decoder_layers.Attention)]
        assert steps == [0.25] * 12
        assert attentions == [0.25] * 8


class TestLayersInTests:
    @pytest.mark.parametrize("name", ["round_robin", *VARIANTS])
    def test_n_layers_give_the_nth_auxiliary_prediction(self, name: str) -> None:
        variant, features = VARIANTS.get(name, {}), _features()
        whole = small_decoder(**variant).eval()(features, all_layers=True)
        least = 0 if len(whole) == 5 else 1
        for number in range(least, 5):
            decoder = small_decoder(num_test_layers=number, **variant).eval()
            expected = whole[number - least]
            (found,) = decoder(features)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            torch.testing.assert_close(decoder.predict_with_queries(features)[0], expected, rtol=0, atol=0)
            assert len(decoder(features, all_layers=True)) == number + 1 - least

    def test_other_layers_are_not_run_and_training_is_as_before(self) -> None:
        decoder, features = small_decoder(num_test_layers=2), _features()
        calls: list[int] = []
        for index, layer in enumerate(decoder.transformer_ffn_layers):
            layer.register_forward_hook(lambda *_, index=index: calls.append(index))
        decoder.eval()(features)
        assert calls == [0, 1]
        assert len(decoder.train()(features)) == 5

    def test_levels_that_no_layer_reads_are_not_needed(self) -> None:
        features = _features()
        with pytest.raises(IndexError):
            small_decoder(num_test_layers=3).eval()(features._replace(levels=features.levels[:2]))
        small_decoder(num_test_layers=2).eval()(features._replace(levels=features.levels[:2]))

    @pytest.mark.parametrize(("number", "learnable", "least"), [(-1, True, 0), (5, True, 0), (0, False, 1)])
    def test_numbers_of_layers_out_of_range(self, number: int, learnable: bool, least: int) -> None:
        message = rf"num_test_layers must be in \[{least}, 4\] or None, got {number}"
        with pytest.raises(ValueError, match=message):
            small_decoder(num_test_layers=number, learnable_queries=learnable)
        decoder = small_decoder(learnable_queries=learnable)
        with pytest.raises(ValueError, match=message):
            decoder.num_test_layers = number
        assert decoder.num_test_layers is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cross_attention": "dense"}, "cross_attention must be one of masked, plain, smca, mask_pooling, got 'dense'"),
        ({"feature_scales": "1/4"}, "feature_scales must be one of round_robin, stride_32, .*, all, got '1/4'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
    ],
)
def test_unknown_variants_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_decoder(**wrong)
