"""The whole model: batching, losses with gradients, learning, names of the first releases."""

import pytest
import torch
from torch import Tensor, nn

from mask2former.modeling.mask2former import Mask2Former, SegmentationHead
from mask2former.modeling.structures import MaskTarget, PackedTarget
from tests.tiny import BACKBONES, K, Q, random_image, random_target, tiny_model


@pytest.fixture(scope="module")
def model() -> Mask2Former:
    """Shared by tests that do not change it."""
    return tiny_model().eval()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int64])
def test_batch_images_normalises_and_pads_with_zeros(model: Mask2Former, dtype: torch.dtype) -> None:
    images = [random_image(30, 41).to(dtype), random_image(64, 5).to(dtype)]
    batch = model.batch_images(images)
    assert batch.shape == (2, 3, 64, 64)
    assert batch.dtype == torch.float32
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    expected = torch.zeros(2, 3, 64, 64)
    for b, image in enumerate(images):
        for c in range(3):
            expected[b, c, : image.shape[1], : image.shape[2]] = (image[c].float() - mean[c]) / std[c]
    torch.testing.assert_close(batch, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "divisibility", "padded"),
    [
        ([(1, 1)], 32, (32, 32)),
        ([(32, 64)], 32, (32, 64)),
        ([(33, 64)], 32, (64, 64)),
        ([(8, 512)], 32, (32, 512)),
        ([(5, 9), (7, 3)], 1, (7, 9)),
    ],
)
def test_batch_size(sizes: list[tuple[int, int]], divisibility: int, padded: tuple[int, int]) -> None:
    empty = nn.Identity()
    model = Mask2Former(backbone=empty, sem_seg_head=empty, criterion=empty, size_divisibility=divisibility)  # type: ignore[arg-type]
    assert model.batch_images([random_image(*s) for s in sizes]).shape == (len(sizes), 3, *padded)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images must hold at least one image, got none"),
        ([torch.zeros(3, 4, 4), torch.zeros(4, 4, 4)], r"images\[1\] must have shape \(3, H, W\), got \(4, 4, 4\)"),
        ([torch.zeros(4, 4)], r"images\[0\] must have shape \(3, H, W\), got \(4, 4\)"),
        ([torch.zeros(1, 3, 4, 4)], r"images\[0\] must have shape"),
        ([torch.zeros(3, 0, 4)], r"images\[0\] must have shape .*got \(3, 0, 4\)"),
    ],
)
def test_wrong_images_are_named(model: Mask2Former, images: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.batch_images(images)


def test_size_divisibility_below_one_is_refused() -> None:
    empty = nn.Identity()
    with pytest.raises(ValueError, match="size_divisibility must be at least 1, got 0"):
        Mask2Former(backbone=empty, sem_seg_head=empty, criterion=empty, size_divisibility=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("sizes", [[(8, 512)], [(1, 1)], [(512, 8), (3, 40)]])
def test_extreme_images(backbone: str, sizes: list[tuple[int, int]]) -> None:
    model = tiny_model(backbone=backbone).eval()
    batch = model.batch_images([random_image(*s) for s in sizes])
    (prediction,) = model(batch)
    assert prediction.class_logits.shape == (len(sizes), Q, K + 1)
    assert prediction.mask_logits.shape == (len(sizes), Q, batch.shape[2] // 4, batch.shape[3] // 4)
    assert prediction.class_logits.isfinite().all()
    assert prediction.mask_logits.isfinite().all()


def test_images_of_one_size_do_not_influence_each_other(model: Mask2Former) -> None:
    images = [random_image(40, 50) for _ in range(3)]
    together = model(model.batch_images(images))[-1]
    alone = model(model.batch_images(images[1:2]))[-1]
    torch.testing.assert_close(alone.class_logits[0], together.class_logits[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(alone.mask_logits[0], together.mask_logits[1], rtol=1e-3, atol=1e-3)


def test_evaluation_is_deterministic_and_gives_one_prediction(model: Mask2Former) -> None:
    batch = model.batch_images([random_image(40, 50)])
    first, second = model(batch), model(batch)
    assert len(first) == 1
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert len(model(batch, all_layers=True)) == 4


def test_prediction_with_queries_is_the_prediction(model: Mask2Former) -> None:
    batch = model.batch_images([random_image(40, 50), random_image(33, 60)])
    prediction, queries = model.predict_with_queries(batch)
    torch.testing.assert_close(prediction, model(batch)[-1], rtol=0, atol=0)
    torch.testing.assert_close(model.sem_seg_head.predictor.class_embed(queries), prediction.class_logits)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("counts", [(3, 2), (0, 0), (0, 4)])
def test_losses_give_every_parameter_a_gradient(backbone: str, counts: tuple[int, int]) -> None:
    model = tiny_model(backbone=backbone).train()
    images = [random_image(64, 96), random_image(70, 64)]
    targets = [random_target(n, 64, 64) for n in counts]
    losses = model.losses(images, targets)
    assert len(losses) == 3 * 4
    total = sum(losses.values())
    assert total.isfinite()
    total.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert [n for n, g in gradients.items() if g is None or not g.isfinite().all()] == []
    zero = {n for n, g in gradients.items() if not g.any()}
    if sum(counts) == 0:  # mask losses are 0, and so is the gradient of what only masks depend on
        only_masks = ("mask_features", "adapter_1", "layer_1", "mask_embed", "backbone.norm0", "levels.res2")
        zero = {n for n in zero if not any(part in n for part in only_masks)}
    assert zero == set()


def test_losses_are_those_of_the_criterion_times_their_weights() -> None:
    model = tiny_model(class_weight=2.0, mask_weight=3.0, dice_weight=7.0)
    images, targets = [random_image(64, 96), random_image(40, 64)], [random_target(2, 40, 64) for _ in range(2)]
    weighted = model.losses(images, targets, torch.Generator().manual_seed(1))
    predictions = model(model.batch_images(images), all_layers=True)
    plain = model.criterion(predictions, targets, (64, 96), torch.Generator().manual_seed(1))
    factors = {"loss_ce": 2.0, "loss_mask": 3.0, "loss_dice": 7.0}
    assert set(weighted) == set(plain)
    for name, loss in plain.items():
        factor = next(f for prefix, f in factors.items() if name.startswith(prefix))
        torch.testing.assert_close(weighted[name], factor * loss)


def test_packed_targets_give_the_same_losses(model: Mask2Former) -> None:
    """Two maps: two objects side by side in the first, a third over both in the second; and an image without any."""
    maps = torch.zeros(2, 40, 60, dtype=torch.uint8)
    maps[0, :, :30], maps[0, :, 30:50], maps[1, 10:30, 20:40] = 1, 7, 255
    packed = PackedTarget(torch.tensor([[2, 0, 1], [0, 1, 255], [1, 0, 7]]), maps)
    assert packed.labels.tolist() == [2, 0, 1]
    plain = MaskTarget(packed.labels, torch.stack([maps[0] == 1, maps[1] == 255, maps[0] == 7]))
    assert torch.equal(packed.masks, plain.masks)
    empty = PackedTarget(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(1, 40, 60, dtype=torch.uint8))
    assert empty.masks.shape == (0, 40, 60)
    images = [random_image(40, 60) for _ in range(2)]
    found, expected = (
        model.losses(images, targets, torch.Generator().manual_seed(3))
        for targets in ([packed, empty], [plain, MaskTarget(empty.labels, empty.masks)])
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_losses_in_eval_mode_supervise_all_layers_too(model: Mask2Former) -> None:
    assert len(model.losses([random_image(32, 32)], [random_target(1, 32, 32)])) == 3 * 4


def test_bfloat16_autocast_gives_finite_float32_losses() -> None:
    model = tiny_model().train()
    images, targets = [random_image(64, 64)], [random_target(2, 64, 64)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model.losses(images, targets)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_learns_a_random_image_with_two_objects(backbone: str) -> None:
    model = tiny_model(backbone=backbone, num_points=256).train()
    image = torch.randint(0, 60, (3, 64, 64), dtype=torch.uint8)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 8:40, 4:30] = True
    masks[1, 30:60, 36:60] = True
    image[:, masks[0]] += 150
    image[0, masks[1]] += 190
    target = MaskTarget(torch.tensor([1, 3]), masks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    history = []
    for _ in range(40):
        optimizer.zero_grad()
        losses = model.losses([image], [target])
        total = sum(losses.values())
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(total.item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5])


# ------------------------------------------------------------------------------ names of the first releases


def _first_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the first releases."""
    names = {n: n.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.") for n in state}
    names = {n: m.replace("query_feat", "static_query") for n, m in names.items()}
    assert sum(n != m for n, m in names.items()) > 20
    return {names[n]: t.clone() for n, t in state.items()}


def _blank_model() -> Mask2Former:
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_a_checkpoint_of_the_first_releases_loads(order: str) -> None:
    expected = tiny_model().state_dict()
    old = _first_release(expected)
    given = old if order == "forwards" else dict(reversed(old.items()))
    names = list(given)
    model = _blank_model()
    model.load_state_dict(given, strict=True)
    assert list(given) == names  # the caller's dict is left alone
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_current_names_in_a_plain_dict_load_unchanged(order: str) -> None:
    """A dict without `_metadata`, as filtering or saving anew makes it, is not taken for an old one."""
    expected = tiny_model().state_dict()
    plain = dict(expected) if order == "forwards" else dict(reversed(expected.items()))
    assert not hasattr(plain, "_metadata")
    model = _blank_model()
    model.load_state_dict(plain, strict=True)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


def test_predictor_alone_is_not_renamed() -> None:
    state = tiny_model().state_dict()
    predictor = {n: t for n, t in state.items() if n.startswith("sem_seg_head.predictor.")}
    result = _blank_model().load_state_dict(predictor, strict=False)
    assert result.unexpected_keys == []
    assert not any(n.startswith("sem_seg_head.predictor.") for n in result.missing_keys)


def test_a_strange_name_beside_current_ones_is_reported() -> None:
    state = dict(tiny_model().state_dict())
    state["sem_seg_head.adapter_1.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*sem_seg_head\.adapter_1\.weight"):
        _blank_model().load_state_dict(state)


def test_head_alone_loads_old_names() -> None:
    model = tiny_model()
    head = model.sem_seg_head
    assert isinstance(head, SegmentationHead)
    old = {n.replace("pixel_decoder.", ""): t.clone() for n, t in head.state_dict().items()}
    fresh = _blank_model().sem_seg_head
    fresh.load_state_dict(old)
    torch.testing.assert_close(dict(fresh.state_dict()), dict(head.state_dict()), rtol=0, atol=0)


def test_statistics_of_the_input_are_no_part_of_checkpoints(model: Mask2Former) -> None:
    assert {n.split(".")[0] for n in model.state_dict()} == {"backbone", "sem_seg_head", "criterion"}


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_gradient_of_a_float64_model_is_that_of_finite_differences(backbone: str) -> None:
    """Nothing in the model or its losses falls back to float32, whose rounding such small steps would not survive."""
    torch.manual_seed(0)
    model = tiny_model(backbone=backbone).double()
    images, targets = [random_image(64, 64)], [random_target(2, 64, 64)]

    def total() -> Tensor:
        losses = model.losses(images, targets, torch.Generator().manual_seed(0))
        return torch.stack(list(losses.values())).sum()

    total().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) * p.detach().std().nan_to_num() for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True) if p.grad is not None)
    values, step = [], 1e-7
    for factor in (step, -2 * step):  # the second goes back and as far to the other side
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter += factor * along
            values.append(total().item())
    assert total().dtype == torch.float64
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)
