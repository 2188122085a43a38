"""Agreement with the published implementation, by numbers (tests/data/golden/README.md).

Tolerances are those that float32 supports: a mask logit that is almost exactly 0 may flip one bit of an
attention mask, which moves one query a little.
"""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.build import Architecture, build_model, preset
from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.losses import (
    dice,
    pairwise_class_cost,
    pairwise_mask_costs,
    sigmoid_cross_entropy,
)
from mask2former.modeling.matcher import HungarianMatcher
from mask2former.modeling.position_encoding import sine_position_encoding
from mask2former.modeling.postprocessing import (
    InstanceResult,
    MaskGeometry,
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
)
from mask2former.modeling.structures import MaskPrediction, MaskTarget, PixelFeatures
from mask2former.modeling.transformer_decoders import masked_attention
from tests.golden import fill_weights, load_arrays, load_shapes, load_tensors


def _cityscapes_r50() -> Architecture:
    architecture = preset("r50", num_classes=19)
    architecture["backbone"]["norm"] = "SyncBN"
    return architecture


ARCHITECTURES: dict[str, Architecture] = {
    "r50_coco_panoptic": preset("r50", num_classes=133),
    "r101_coco_panoptic": preset("r101", num_classes=133),
    "swin_tiny_coco_instance": preset("swin_tiny", num_classes=80),
    "swin_base384_coco_panoptic": preset("swin_base_384", num_classes=133),
    "swin_large_ade20k_semantic": preset("swin_large_384", num_classes=150),
    "r50_cityscapes_semantic": _cityscapes_r50(),
}


@pytest.mark.parametrize("config", ARCHITECTURES)
def test_state_dict_has_the_published_names_and_shapes(config: str) -> None:
    found = {n: tuple(t.shape) for n, t in build_model(ARCHITECTURES[config]).state_dict().items()}
    assert found == load_shapes(config)


FORWARDS = {
    "forward_r50_coco_panoptic": "r50_coco_panoptic",
    "forward_swin_tiny_coco_instance_batch2": "swin_tiny_coco_instance",
}


class _Run:
    """One forward of a big model, with what its parts gave.

    One mask logit of the second image file lies 6e-6 from zero, which is what another number of threads or
    another processor changes it by: its bit of the attention mask is a toss-up. So bits of logits that close
    to zero are decided as computed, all one way and all the other way, and the best of the three has to agree.
    """

    TOSS_UP = 1e-5

    def __init__(self, name: str) -> None:
        self.expected = load_tensors(name)
        model = build_model(ARCHITECTURES[FORWARDS[name]]).eval()
        fill_weights(model)
        images = [self.expected[f"image{i}"] for i in range(2) if f"image{i}" in self.expected]
        with torch.no_grad():
            self.features: dict[str, Tensor] = model.backbone(model.batch_images(images))
            self.pixels: PixelFeatures = model.sem_seg_head.pixel_decoder(self.features)
            self.predictor = model.sem_seg_head.predictor
            variants = [self._decode(model.sem_seg_head.predictor, b) for b in (0.0, self.TOSS_UP, -self.TOSS_UP)]
        self.predictions: list[MaskPrediction] = min(variants, key=self._distance)

    def _decode(self, predictor: nn.Module, border: float) -> list[MaskPrediction]:
        def blocked_positions(mask_embedding: Tensor, level_features: Tensor) -> Tensor:
            blocked = torch.einsum("bqc,bchw->bqhw", mask_embedding, level_features).flatten(2) < border
            return blocked & ~blocked.all(-1, keepdim=True)

        with pytest.MonkeyPatch.context() as patch:
            if border:
                patch.setattr(masked_attention, "_blocked_positions", blocked_positions)
            return predictor(self.pixels, all_layers=True)

    def _distance(self, predictions: list[MaskPrediction]) -> float:
        return (predictions[-1].class_logits - self.expected["pred_logits"]).abs().mean().item()


@pytest.fixture(scope="module", params=FORWARDS)
def run(request: pytest.FixtureRequest) -> Iterator[_Run]:
    yield _Run(request.param)


def _assert_logits_agree(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    difference = (found - expected).abs()
    assert difference.median() < 1e-5
    assert (difference < 1e-3).double().mean() >= 0.999


def test_forward_features(run: _Run) -> None:
    found = {
        "feat_res5": run.features["res5"][:, :64],
        "mask_features": run.pixels.mask_features[:, :16],
        **{f"multi_scale{i}": level[:, :64] for i, level in enumerate(run.pixels.levels)},
    }
    assert len(run.pixels.levels) == 3
    for name, tensor in found.items():
        assert (tensor - run.expected[name]).abs().max() < 1e-4, name


def test_forward_final_prediction(run: _Run) -> None:
    _assert_logits_agree(run.predictions[-1].class_logits, run.expected["pred_logits"])
    _assert_logits_agree(run.predictions[-1].mask_logits, run.expected["pred_masks"])


def test_forward_nine_earlier_predictions(run: _Run) -> None:
    assert len(run.predictions) == 10
    earlier = torch.stack([p.class_logits for p in run.predictions[:-1]])
    assert earlier.shape == run.expected["aux_logits"].shape
    for found, expected in zip(earlier, run.expected["aux_logits"], strict=True):
        _assert_logits_agree(found, expected)


@torch.no_grad()
def test_no_bit_of_an_attention_mask_flips(run: _Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with resized features against resized masks; the tokens of a layer are those of one level."""
    used: list[Tensor] = []
    block = masked_attention._blocked_positions
    monkeypatch.setattr(masked_attention, "_blocked_positions", lambda *a: used.append(block(*a)) or used[-1])
    predictions = run.predictor(run.pixels, all_layers=True)
    assert len(used) == 9
    for index, blocked in enumerate(used):
        size = run.pixels.levels[index % 3].shape[-2:]
        logits = F.interpolate(predictions[index].mask_logits, size, mode="bilinear", align_corners=False).flatten(2)
        plain = (logits < 0) & ~(logits < 0).all(-1, keepdim=True)
        is_clear = logits.abs() > _Run.TOSS_UP
        assert is_clear.double().mean() > 0.999
        assert torch.equal(blocked[is_clear], plain[is_clear])


@pytest.mark.parametrize(("name", "height", "width"), [("h6w9", 6, 9), ("h12w16", 12, 16)])
def test_position_encoding(name: str, height: int, width: int) -> None:
    expected = load_tensors("position_encoding")[name]
    torch.testing.assert_close(sine_position_encoding(height, width, 256), expected, rtol=0, atol=1e-6)


class TestMatchingAndLosses:
    """Costs, assignment and losses for given logits at given points."""

    @pytest.fixture(scope="class")
    def golden(self) -> dict[str, Tensor]:
        return load_tensors("matching_and_losses")

    @pytest.fixture
    def matcher(self) -> HungarianMatcher:
        return HungarianMatcher(class_weight=2, mask_weight=5, dice_weight=5)

    def test_costs(self, golden: dict[str, Tensor]) -> None:
        logits, masks = golden["mask_logits_at_points"], golden["target_masks_at_points"]
        classes = pairwise_class_cost(golden["class_logits"][None], golden["target_labels"][None])[0]
        torch.testing.assert_close(classes, golden["cost_class"], rtol=1e-5, atol=1e-6)
        cross_entropy, overlap = pairwise_mask_costs(logits, masks)
        torch.testing.assert_close(cross_entropy, golden["cost_mask"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(overlap, golden["cost_dice"], rtol=1e-5, atol=1e-6)

    def test_total_cost(self, golden: dict[str, Tensor], matcher: HungarianMatcher) -> None:
        names = ("class_logits", "mask_logits_at_points", "target_labels", "target_masks_at_points")
        cost = matcher.cost(*(golden[n][None] for n in names))[0]
        torch.testing.assert_close(cost, golden["total_cost"], rtol=1e-5, atol=1e-5)

    def test_assignment(self, golden: dict[str, Tensor], matcher: HungarianMatcher) -> None:
        class_logits, mask_logits = golden["class_logits"], golden["mask_logits_at_points"]
        matched = matcher.match(
            class_logits[None, None],
            mask_logits[None, None],
            [golden["target_labels"]],
            [golden["target_masks_at_points"]],
        )
        query, target = matched[0][0]
        assert query.tolist() == golden["query_index"].tolist()
        assert target.tolist() == golden["target_index"].tolist()

    def test_mask_losses(self, golden: dict[str, Tensor]) -> None:
        logits = golden["mask_logits_at_points"][golden["query_index"]]
        masks = golden["target_masks_at_points"][golden["target_index"]]
        for found, name in ((sigmoid_cross_entropy, "loss_mask"), (dice, "loss_dice")):
            assert found(logits, masks).sum().item() / 6 == pytest.approx(golden[name].item(), rel=1e-5)

    def test_class_loss(self, golden: dict[str, Tensor]) -> None:
        # The points that the criterion draws do not matter to the class loss as long as the assignment is the
        # golden one, and a map that is constant for each query has the same logit at each point. So each
        # target is a region of its own, and the query that belongs to it is positive there.
        query, target = golden["query_index"], golden["target_index"]
        regions = torch.zeros(6, 6, 8, dtype=torch.bool)
        for i in range(6):
            regions[i, i] = True
        mask_logits = torch.full((20, 6, 8), -10.0)
        mask_logits[query] = torch.where(regions[target], 20.0, -20.0)
        criterion = SetCriterion(num_classes=9, num_points=400)
        prediction = MaskPrediction(golden["class_logits"][None], mask_logits[None])
        losses = criterion([prediction], [MaskTarget(golden["target_labels"], regions)], (6, 8))
        assert losses["loss_ce"].item() == pytest.approx(golden["loss_ce"].item(), rel=1e-5)


def test_criterion_means_over_random_points() -> None:
    golden = load_arrays("criterion")
    predictions = [
        MaskPrediction(torch.from_numpy(golden[f"pred_logits{i}"]), torch.from_numpy(golden[f"pred_masks{i}"]))
        for i in range(3)
    ]
    targets = [
        MaskTarget(torch.from_numpy(golden[f"target_labels{i}"]), torch.from_numpy(golden[f"target_masks{i}"]))
        for i in range(2)
    ]
    criterion = SetCriterion(num_classes=9, num_points=int(golden["num_points"]))
    generator = torch.Generator().manual_seed(0)
    draws, published_draws = 100, int(golden["runs"])
    runs = [criterion(predictions, targets, (128, 192), generator) for _ in range(draws)]
    assert set(runs[0]) == {str(n) for n in golden["loss_names"]}
    for name, mean, deviation in zip(golden["loss_names"], golden["loss_mean"], golden["loss_std"], strict=True):
        losses = np.array([run[str(name)].item() for run in runs])
        if "loss_ce" in str(name):
            np.testing.assert_allclose(losses, mean, rtol=1e-5)
            continue
        standard_error = (deviation**2 / published_draws + losses.var(ddof=1) / draws) ** 0.5
        assert abs(losses.mean() - mean) < 4 * standard_error, name
        assert 0.7 < losses.std(ddof=1) / deviation < 1.4, name


class TestPostprocessing:
    """One made-up prediction through all inference modes."""

    GEOMETRY = MaskGeometry((72, 104), (72, 104), (72, 104))

    @pytest.fixture(scope="class")
    def golden(self) -> dict[str, np.ndarray]:
        return load_arrays("postprocess")

    @pytest.fixture
    def logits(self, golden: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(golden["pred_logits"]), torch.from_numpy(golden["pred_masks"])

    @pytest.fixture
    def is_thing(self, golden: dict[str, np.ndarray]) -> Tensor:
        is_thing = torch.zeros(133, dtype=torch.bool)
        is_thing[torch.from_numpy(golden["thing_classes"])] = True
        return is_thing

    def test_semantic(self, golden: dict[str, np.ndarray], logits: tuple[Tensor, Tensor]) -> None:
        scores = semantic_segmentation(*logits, self.GEOMETRY)
        assert (scores.argmax(0).numpy() == golden["sem_seg_argmax"]).mean() > 0.9999
        np.testing.assert_allclose(scores[5].numpy(), golden["sem_seg_class5"], rtol=1e-5, atol=1e-5)

    def test_panoptic(self, golden: dict[str, np.ndarray], logits: tuple[Tensor, Tensor], is_thing: Tensor) -> None:
        result = panoptic_segmentation(
            *logits, self.GEOMETRY, is_thing=is_thing, object_mask_threshold=0.8, overlap_threshold=0.8
        )
        assert (result.ids.numpy() == golden["panoptic_ids"]).all()
        found = [{"id": s.id, "isthing": s.is_thing, "category_id": s.category_id} for s in result.segments]
        assert found == json.loads(str(golden["panoptic_info"]))
        assert [s.area for s in result.segments] == [int((result.ids == s.id).sum()) for s in result.segments]

    def test_instance_things_of_panoptic(
        self, golden: dict[str, np.ndarray], logits: tuple[Tensor, Tensor], is_thing: Tensor
    ) -> None:
        result = instance_segmentation(*logits, self.GEOMETRY, top_k=100, is_thing=is_thing)
        self._assert_instances_agree(result, golden)

    def test_instance_80_classes(self, logits: tuple[Tensor, Tensor]) -> None:
        class_logits = torch.cat([logits[0][:, :80], logits[0][:, -1:]], dim=1)
        result = instance_segmentation(class_logits, logits[1], self.GEOMETRY, top_k=100)
        self._assert_instances_agree(result, load_arrays("postprocess_instance80"))

    @staticmethod
    def _assert_instances_agree(result: InstanceResult, golden: dict[str, np.ndarray]) -> None:
        np.testing.assert_allclose(result.scores.numpy(), golden["inst_scores"], rtol=1e-5)
        assert (result.labels.numpy() == golden["inst_classes"]).all()
        assert (result.masks.flatten(1).sum(1).numpy() == golden["inst_areas"]).all()


def test_fill_weights_reaches_every_floating_point_tensor() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {n: t.clone() for n, t in module.state_dict().items() if t.is_floating_point()}
    fill_weights(module)
    assert all(not torch.equal(t, before[n]) for n, t in module.state_dict().items() if n in before)
