"""The whole training loss: reduction, degenerate targets, bad numbers, settings and checks."""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.criterion import SetCriterion
from mask2former.modeling.losses import dice, sigmoid_cross_entropy
from mask2former.modeling.structures import MaskPrediction, MaskTarget
from tests.tiny import random_target

CANVAS = (32, 48)


def _criterion(**changes: float) -> SetCriterion:
    return SetCriterion(**{"num_classes": 5, "num_points": 50, **changes})  # type: ignore[arg-type]


def _targets(*counts: int) -> list[MaskTarget]:
    return [random_target(n, 30, 41) for n in counts]


def _random_predictions(
    layers: int, batch: int, queries: int, *, num_classes: int = 5, size: tuple[int, int] = (8, 12)
) -> list[MaskPrediction]:
    """Random logits that require a gradient."""
    return [
        MaskPrediction(
            (2 * torch.randn(batch, queries, num_classes + 1)).requires_grad_(),
            (3 * torch.randn(batch, queries, *size)).requires_grad_(),
        )
        for _ in range(layers)
    ]


def _losses(
    criterion: SetCriterion, predictions: list[MaskPrediction], targets: list[MaskTarget], seed: int = 0
) -> dict[str, Tensor]:
    return criterion(predictions, targets, CANVAS, torch.Generator().manual_seed(seed))


def _best_assignment(prediction: MaskPrediction, target: MaskTarget, image: int) -> tuple[int, ...]:
    """The query of each target; logits and masks are constant on the whole canvas, so any point will do."""
    probability = prediction.class_logits[image].softmax(-1)
    logits = prediction.mask_logits[image, :, :1, :1].flatten(1)
    masks = target.masks[:, :1, :1].flatten(1).float()

    def cost(query: int, n: int) -> float:
        pair = logits[query : query + 1], masks[n : n + 1]
        overlap = 2 * (pair[0].sigmoid() * pair[1]).item() * 50 + 1  # 50 points
        dice_cost = 1 - overlap / ((pair[0].sigmoid() + pair[1]).item() * 50 + 1)
        class_cost = -probability[query, target.labels[n]].item()
        return 2 * class_cost + 5 * sigmoid_cross_entropy(*pair).item() + 5 * dice_cost

    choices = itertools.permutations(range(len(logits)), len(masks))
    return min(choices, key=lambda queries: sum(cost(q, n) for n, q in enumerate(queries)))


def test_losses_of_constant_masks_in_closed_form() -> None:
    """Masks and logits that are constant far beyond the canvas give the same loss at any point."""
    criterion = _criterion()
    predictions = [
        MaskPrediction(2 * torch.randn(2, 4, 6), torch.randn(2, 4, 1, 1).expand(-1, -1, 8, 12)) for _ in range(2)
    ]
    # Outside of the canvas is zero, which would reach in half a pixel; so only the interior is sampled.
    targets = [
        MaskTarget(torch.tensor([1, 4, 0]), torch.ones(3, *CANVAS, dtype=torch.bool)),
        MaskTarget(torch.tensor([2]), torch.ones(1, *CANVAS, dtype=torch.bool)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        original = torch.rand
        patch.setattr(torch, "rand", lambda *size, **kw: 0.1 + 0.8 * original(*size, **kw))
        # what the kernel draws by itself
        patch.setattr(
            "mask2former.modeling.point_sampling.drawn_points",
            lambda maps, seed, *, uncertain, others, **_: torch.rand(len(maps), uncertain + others, 2),
        )
        losses = _losses(criterion, predictions, targets)
    for layer, prediction in enumerate(predictions):
        suffix = "_0" if layer == 0 else ""
        wanted = torch.full((2, 4), 5)
        cross_entropy = dice_loss = 0.0
        for image, target in enumerate(targets):
            for n, query in enumerate(_best_assignment(prediction, target, image)):
                wanted[image, query] = target.labels[n]
                logits = prediction.mask_logits[image, query, 0, :1].expand(1, 50)
                cross_entropy += sigmoid_cross_entropy(logits, torch.ones(1, 50)).item()
                dice_loss += dice(logits, torch.ones(1, 50)).item()
        weight = torch.tensor([1.0] * 5 + [0.1])
        expected = F.cross_entropy(prediction.class_logits.flatten(0, 1), wanted.flatten(), weight).item()
        assert losses["loss_ce" + suffix].item() == pytest.approx(expected, rel=1e-5)
        assert losses["loss_mask" + suffix].item() == pytest.approx(cross_entropy / 4, rel=1e-5)
        assert losses["loss_dice" + suffix].item() == pytest.approx(dice_loss / 4, rel=1e-5)


def test_perfect_predictions_cost_nothing() -> None:
    targets = [MaskTarget(torch.tensor([3, 0]), torch.zeros(2, *CANVAS, dtype=torch.bool)) for _ in range(2)]
    for _, masks in targets:
        masks[0, :, :24] = True
        masks[1, :, 24:] = True
    class_logits, mask_logits = torch.full((2, 3, 6), -50.0), torch.full((2, 3, *CANVAS), -50.0)
    for b in range(2):
        class_logits[b, [0, 1, 2], [0, 3, 5]] = 50.0  # query 1 is the first target, query 0 the second one
        mask_logits[b, 1][targets[b].masks[0]] = 50.0
        mask_logits[b, 0][targets[b].masks[1]] = 50.0
    losses = _losses(_criterion(num_points=400), [MaskPrediction(class_logits, mask_logits)], targets)
    assert losses["loss_ce"] < 1e-6
    # Points between the pixels of a border see partial masks (here and in training), so not exactly zero; a
    # wrong assignment would cost about 50.
    assert losses["loss_mask"] < 1.5
    assert losses["loss_dice"] < 0.1


def test_layers_do_not_influence_each_other() -> None:
    predictions, targets = _random_predictions(3, 2, 6), _targets(3, 2)
    losses = _losses(_criterion(), predictions, targets)
    losses["loss_mask_1"].backward(retain_graph=True)
    losses["loss_ce_1"].backward(retain_graph=True)
    assert predictions[1].mask_logits.grad.any()
    assert predictions[1].class_logits.grad.any()
    for other in (0, 2):
        assert all(x.grad is None or not x.grad.any() for x in predictions[other])
    changed = [predictions[0], predictions[1], _random_predictions(1, 2, 6)[0]]
    again = _losses(_criterion(), changed, targets)
    for name in ("loss_ce_0", "loss_ce_1"):
        torch.testing.assert_close(again[name], losses[name], rtol=1e-6, atol=0)
    assert again["loss_ce"] != losses["loss_ce"]


def test_images_share_the_batch_normalisation_only() -> None:
    """The class loss over a batch is the weighted mean of the images' class losses."""
    predictions, targets = _random_predictions(1, 3, 6), _targets(3, 0, 6)
    together = _losses(_criterion(), predictions, targets)["loss_ce"].item()
    weights = [len(t.labels) + 0.1 * (6 - len(t.labels)) for t in targets]
    alone = [
        _losses(_criterion(), [MaskPrediction(*(x[b : b + 1] for x in predictions[0]))], [targets[b]])["loss_ce"].item()
        for b in range(3)
    ]
    assert together == pytest.approx(sum(a * w for a, w in zip(alone, weights, strict=True)) / sum(weights), rel=1e-5)


@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (3, 0), (1, 1), (6, 6)])
@pytest.mark.parametrize("size", [(30, 41), (0, 0)])
def test_empty_images_give_finite_losses_and_gradients(counts: tuple[int, int], size: tuple[int, int]) -> None:
    targets = [random_target(n, *(size if n == 0 else (30, 41))) for n in counts]
    predictions = _random_predictions(3, 2, 6)
    losses = _losses(_criterion(), predictions, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for prediction in predictions:
        for logits in prediction:
            assert logits.grad is not None
            assert logits.grad.isfinite().all()
        assert prediction.class_logits.grad.any()
        assert prediction.mask_logits.grad.any() == (sum(counts) > 0)
    if sum(counts) == 0:
        assert losses["loss_mask"] == losses["loss_dice"] == 0
        wanted = torch.full((2 * 6,), 5)
        expected = F.cross_entropy(predictions[-1].class_logits.flatten(0, 1), wanted)
        torch.testing.assert_close(losses["loss_ce"], expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_warn_and_leave_the_other_images_losses(bad: float) -> None:
    criterion, predictions, targets = _criterion(), _random_predictions(2, 2, 6), _targets(3, 2)
    with torch.no_grad():
        predictions[0].mask_logits[1] = bad
    with pytest.warns(UserWarning, match="not finite.*image 1 of the batch, decoder layer 0"):
        losses = _losses(criterion, predictions, targets)
    assert criterion.matcher.num_nonfinite == 6 * 2
    assert losses["loss_mask"].isfinite()
    assert losses["loss_dice"].isfinite()
    assert not losses["loss_mask_0"].isfinite()  # a gradient scaler sees it and skips the step


def test_persistent_bad_logits_raise() -> None:
    criterion, predictions, targets = _criterion(), _random_predictions(1, 2, 6), _targets(3, 2)
    with torch.no_grad():
        predictions[0].class_logits[0] = float("nan")
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=r"image 0 of the batch.*call 10"):
        warnings.simplefilter("ignore")
        for _ in range(20):
            _losses(criterion, predictions, targets)


def test_more_targets_than_queries() -> None:
    predictions, targets = _random_predictions(2, 2, 3), _targets(7, 1)
    with pytest.warns(UserWarning, match="7 targets but the model only 3 queries"):
        losses = _losses(_criterion(), predictions, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def test_one_query_and_one_class() -> None:
    predictions = _random_predictions(2, 2, 1, num_classes=1)
    targets = [random_target(1, 30, 41, num_classes=1), random_target(0, 30, 41, num_classes=1)]
    losses = _losses(_criterion(num_classes=1), predictions, targets)
    weight = torch.tensor([1.0, 0.1])
    logits, wanted = predictions[-1].class_logits[:, 0], torch.tensor([0, 1])
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, wanted, weight))


def test_deep_supervision_off_looks_at_the_last_prediction_only() -> None:
    predictions, targets = _random_predictions(4, 2, 6), _targets(3, 2)
    criterion = _criterion(deep_supervision=False)
    losses = _losses(criterion, predictions, targets)
    assert set(losses) == {"loss_ce", "loss_mask", "loss_dice"}
    last_alone = _losses(_criterion(), predictions[-1:], targets)
    torch.testing.assert_close(losses, last_alone)
    assert len(_losses(_criterion(), predictions, targets)) == 12


def test_generator_determines_the_losses() -> None:
    predictions, targets = _random_predictions(2, 2, 6), _targets(3, 2)
    first, second = (_losses(_criterion(), predictions, targets, seed=7) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    other = _losses(_criterion(), predictions, targets, seed=8)
    assert other["loss_mask"] != first["loss_mask"]


def test_masks_smaller_than_the_canvas_are_padded_with_zeros() -> None:
    predictions, targets = _random_predictions(2, 2, 6), _targets(3, 2)
    padded = [MaskTarget(t.labels, F.pad(t.masks, (0, 48 - 41, 0, 32 - 30))) for t in targets]
    found, expected = (_losses(_criterion(), predictions, t) for t in (targets, padded))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_bool_and_uint8_masks_give_the_same_and_are_never_converted_whole() -> None:
    predictions, targets = _random_predictions(2, 2, 6), _targets(3, 2)
    as_bytes = [MaskTarget(t.labels, t.masks.to(torch.uint8)) for t in targets]
    torch.testing.assert_close(
        _losses(_criterion(), predictions, targets), _losses(_criterion(), predictions, as_bytes), rtol=0, atol=0
    )


class _LargestFloat(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the number of elements of the largest floating-point tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.is_floating_point():
                self.numel = max(self.numel, x.numel())
        return result


def test_masks_stay_bool() -> None:
    """No float tensor is as large as one target's masks: ground truth is only read at the points."""
    target = MaskTarget(torch.zeros(40, dtype=torch.int64), torch.rand(40, 512, 512) > 0.5)
    predictions = _random_predictions(1, 1, 6)
    with _LargestFloat() as tracker, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _criterion()(predictions, [target], (512, 512))
    assert 0 < tracker.numel < 512 * 512


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_under_autocast_give_float32_losses(dtype: torch.dtype) -> None:
    predictions, targets = _random_predictions(2, 2, 6), _targets(3, 2)
    half = [MaskPrediction(*(x.to(dtype) for x in p)) for p in predictions]
    exact = _losses(_criterion(), [MaskPrediction(*(x.float() for x in p)) for p in half], targets)
    with torch.autocast("cpu", dtype=dtype):
        losses = _losses(_criterion(), half, targets)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    torch.testing.assert_close(losses, exact, rtol=1e-5, atol=1e-6)
    sum(losses.values()).backward()
    assert all(x.grad.isfinite().all() for p in predictions for x in p)


def test_weighted_multiplies_by_kind_not_by_layer() -> None:
    criterion = _criterion(class_weight=2.0, mask_weight=3.0, dice_weight=7.0)
    one = torch.ones(())
    names = ("loss_ce", "loss_mask", "loss_dice", "loss_ce_0", "loss_mask_11", "loss_dice_3")
    weighted = criterion.weighted(dict.fromkeys(names, one))
    assert {n: x.item() for n, x in weighted.items()} == dict(zip(names, (2, 3, 7, 2, 3, 7), strict=True))


def test_no_object_weight_acts() -> None:
    predictions, targets = _random_predictions(1, 2, 6), _targets(0, 2)
    light, heavy = (
        _losses(_criterion(no_object_weight=w), predictions, targets)["loss_ce"].item() for w in (1e-6, 1e6)
    )
    per_query = -predictions[0].class_logits.log_softmax(-1)
    assert heavy > 0
    assert light != pytest.approx(heavy, rel=1e-2)
    assert per_query[..., 5].min().item() <= heavy <= per_query[..., 5].max().item()


def test_config_wins_over_the_no_object_weight_of_a_checkpoint() -> None:
    saved = _criterion(no_object_weight=0.1).state_dict()
    assert list(saved) == ["empty_weight"]
    criterion = _criterion(no_object_weight=0.7)
    criterion.load_state_dict(saved)
    torch.testing.assert_close(criterion.empty_weight, torch.tensor([1, 1, 1, 1, 1, 0.7]))
    torch.testing.assert_close(saved["empty_weight"][-1], torch.tensor(0.1))


def test_no_object_weight_of_another_number_of_classes_is_reported() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for empty_weight"):
        _criterion(num_classes=7).load_state_dict(_criterion().state_dict())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_points": 0}, "num_points must be at least 1, got 0"),
        ({"oversample_ratio": 0.5}, "oversample_ratio must be at least 1, got 0.5"),
        ({"importance_sample_ratio": 1.5}, r"importance_sample_ratio must be in \[0, 1\], got 1.5"),
        ({"importance_sample_ratio": -0.1}, r"importance_sample_ratio must be in \[0, 1\], got -0.1"),
    ],
)
def test_wrong_settings(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _criterion(**wrong)


def _mask_target(labels: list[int], masks: Tensor, dtype: torch.dtype = torch.int64) -> MaskTarget:
    return MaskTarget(torch.tensor(labels, dtype=dtype), masks)


BOOL = torch.ones(2, 8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (_mask_target([0, 5], BOOL), r"targets\[1\].labels must be in \[0, 5\), got \[0, 5\]"),
        (_mask_target([-1, 2], BOOL), r"targets\[1\].labels must be in \[0, 5\), got \[-1, 2\]"),
        (_mask_target([0, 1], BOOL, torch.float32), r"targets\[1\].labels must be int64, got torch.float32"),
        (_mask_target([], BOOL[:0], torch.float32), r"targets\[1\].labels must be int64, got torch.float32"),
        (_mask_target([0, 1], BOOL.float()), r"targets\[1\].masks must be bool or uint8, got torch.float32"),
        (_mask_target([0], BOOL), r"targets\[1\].masks must have shape .* N = 1 labels, got \(2, 8, 8\)"),
        (_mask_target([0, 1], BOOL[:, 0]), r"targets\[1\].masks must have shape .*got \(2, 8\)"),
        (_mask_target([0], torch.ones(1, 33, 8).bool()), r"targets\[1\].masks must fit into the canvas \(32, 48\)"),
        (_mask_target([0], torch.ones(1, 8, 49).bool()), r"targets\[1\].masks must fit .*got \(1, 8, 49\)"),
    ],
)
def test_wrong_targets_are_named(target: MaskTarget, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _losses(_criterion(), _random_predictions(1, 2, 6), [random_target(1, 8, 8), target])


def test_number_of_targets_must_be_that_of_images() -> None:
    with pytest.raises(ValueError, match="targets must hold one entry for each of the 2 images, got 1"):
        _losses(_criterion(), _random_predictions(1, 2, 6), _targets(1))


@pytest.mark.parametrize(("other_rank", "divisor"), [(5, 4.0), (0, 1.5), (200, 101.5)])
def test_mask_losses_are_divided_by_the_mean_number_of_targets_of_all_processes(
    other_rank: int, divisor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions, targets = _random_predictions(1, 2, 6), _targets(1, 2)
    alone = _losses(_criterion(), predictions, targets)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    # the other process has other_rank targets, and as large a sum of class weights as this one
    reduce = lambda total: total.add_(total if total.dim() else other_rank)  # noqa: E731
    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    together = _losses(_criterion(), predictions, targets)
    for name in ("loss_mask", "loss_dice"):
        assert together[name].item() == pytest.approx(alone[name].item() * 3 / divisor, rel=1e-5)
    assert together["loss_ce"] == alone["loss_ce"]


def test_class_losses_of_two_processes_average_to_that_of_one_with_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has three targets, the other none: its class loss counts for as much as its weights are."""
    predictions, targets = _random_predictions(1, 2, 6), _targets(1, 2)
    nothing = [MaskTarget(t.labels[:0], t.masks[:0]) for t in targets]
    twice = [MaskPrediction(*(torch.cat([field, field]) for field in p)) for p in predictions]
    whole = _losses(_criterion(), twice, [*targets, *nothing])["loss_ce"]
    sums = []  # of the class weights in each process
    for part in (targets, nothing):
        found, no_object = sum(len(t.labels) for t in part), _criterion().empty_weight[-1].item()
        sums.append(found + (2 * 6 - found) * no_object)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    losses = []
    for part, other in ((targets, sums[1]), (nothing, sums[0])):
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, other=other: total.add_(other))
        losses.append(_losses(_criterion(), predictions, part)["loss_ce"].item())
    assert sum(losses) / 2 == pytest.approx(whole.item(), rel=1e-5)


def test_the_divisor_is_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    predictions, targets = _random_predictions(1, 1, 6), _targets(1)
    alone = _losses(_criterion(), predictions, targets)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: None)
    together = _losses(_criterion(), predictions, targets)  # one target in eight processes
    assert together["loss_mask"].item() == pytest.approx(alone["loss_mask"].item(), rel=1e-6)
