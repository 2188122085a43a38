"""Parameter groups, clipping, schedules and the random state of a step."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from mask2former.build import build_model, preset
from mask2former.solver import clip_gradients, lr_factor, make_optimizer, parameter_groups, seed_step
from tests.tiny import random_image, random_target, tiny_model

PUBLISHED = {
    "base_lr": 1e-4,
    "weight_decay": 0.05,
    "weight_decay_norm": 0.0,
    "weight_decay_embed": 0.0,
    "backbone_multiplier": 0.1,
}


def _sizes(groups: list[dict[str, Any]]) -> dict[tuple[float, float], int]:
    return {(round(g["lr"], 12), g["weight_decay"]): len(g["params"]) for g in groups}


# ------------------------------------------------------------------------------------------ parameter groups


def test_groups_of_the_published_r50() -> None:
    """345 groups of one tensor there; by learning rate and weight decay they are these three."""
    groups = parameter_groups(build_model(preset("r50", num_classes=133)), **PUBLISHED)
    assert _sizes(groups) == {(1e-5, 0.05): 53, (1e-4, 0.05): 199, (1e-4, 0.0): 93}
    counts = {(round(g["lr"], 12), g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in groups}
    assert counts[1e-5, 0.05] == pytest.approx(23.45e6, rel=1e-3)
    assert counts[1e-4, 0.05] == pytest.approx(20.45e6, rel=1e-3)
    assert counts[1e-4, 0.0] == pytest.approx(0.075e6, rel=2e-2)


def test_groups_of_the_published_swin_tiny() -> None:
    model = build_model(preset("swin_tiny", num_classes=80))
    groups = parameter_groups(model, **PUBLISHED)
    assert _sizes(groups) == {(1e-5, 0.05): 101, (1e-5, 0.0): 76, (1e-4, 0.05): 199, (1e-4, 0.0): 93}
    undecayed = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in undecayed}
    assert {n for n, _ in model.named_parameters() if "relative_position_bias_table" in n} <= names
    assert "sem_seg_head.predictor.level_embed.weight" in names
    assert "sem_seg_head.pixel_decoder.transformer.level_embed" not in names  # a bare parameter: published decay


class _Parts(nn.Module):
    """One parameter of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.conv = nn.Conv2d(2, 2, 1)
        self.backbone.norm = nn.LayerNorm(2)
        self.backbone.absolute_pos_embed = nn.Parameter(torch.zeros(2))
        self.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(2))
        self.head = nn.Linear(2, 2)
        self.group_norm = nn.GroupNorm(1, 2)
        self.batch_norm = nn.SyncBatchNorm(2)
        self.embedding = nn.Embedding(2, 2)
        self.shared = self.head
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.head.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_each_kind_of_parameter_has_its_own_settings() -> None:
    model = _Parts()
    settings = {"weight_decay": 0.1, "weight_decay_norm": 0.2, "weight_decay_embed": 0.3}
    groups = parameter_groups(model, base_lr=1.0, backbone_multiplier=0.5, **settings)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    names = {n: found.get(id(p)) for n, p in model.named_parameters()}
    assert names == {
        "backbone.absolute_pos_embed": (0.5, 0.0),
        "backbone.relative_position_bias_table": (0.5, 0.0),
        "backbone.conv.weight": (0.5, 0.1),
        "backbone.conv.bias": (0.5, 0.1),
        "backbone.norm.weight": (0.5, 0.2),
        "backbone.norm.bias": (0.5, 0.2),
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.1),
        "group_norm.weight": (1.0, 0.2),
        "group_norm.bias": (1.0, 0.2),
        "batch_norm.weight": (1.0, 0.2),
        "batch_norm.bias": (1.0, 0.2),
        "embedding.weight": (1.0, 0.3),
        "frozen.weight": None,
        "frozen.bias": None,
    }
    assert len(groups) == 6
    assert sum(len(g["params"]) for g in groups) == 13  # shared ones once


def test_merged_groups_update_as_one_group_for_each_parameter_does() -> None:
    merged_model = tiny_model().train()
    single_model = copy.deepcopy(merged_model)
    merged = torch.optim.AdamW(parameter_groups(merged_model, **PUBLISHED), lr=1e-4)
    single_groups = [
        {**g, "params": [p]} for g in parameter_groups(single_model, **PUBLISHED) for p in g["params"]
    ]
    single = torch.optim.AdamW(single_groups, lr=1e-4)
    assert len(merged.param_groups) == 4 < len(single.param_groups)
    images, targets = [random_image(64, 64)], [random_target(2, 64, 64)]
    start = copy.deepcopy(merged_model.state_dict())
    for step in range(3):
        for model, optimizer in ((merged_model, merged), (single_model, single)):
            seed_step(0, step)
            optimizer.zero_grad()
            sum(model.losses(images, targets).values()).backward()
            optimizer.step()
    state = merged_model.state_dict()
    torch.testing.assert_close(dict(state), dict(single_model.state_dict()), rtol=0, atol=0)
    assert all(not torch.equal(start[n], state[n]) for n, _ in merged_model.named_parameters())


def test_make_optimizer() -> None:
    adamw = make_optimizer(_Parts(), optimizer="ADAMW", momentum=0.9, **PUBLISHED)
    assert type(adamw) is torch.optim.AdamW
    settings = sorted((round(g["lr"], 12), g["weight_decay"]) for g in adamw.param_groups)
    assert settings == [(1e-5, 0.0), (1e-5, 0.05), (1e-4, 0.0), (1e-4, 0.05)]
    assert all(g["betas"] == (0.9, 0.999) and g["eps"] == 1e-8 for g in adamw.param_groups)
    sgd = make_optimizer(_Parts(), optimizer="SGD", momentum=0.7, **PUBLISHED)
    assert type(sgd) is torch.optim.SGD
    assert {g["momentum"] for g in sgd.param_groups} == {0.7}
    with pytest.raises(ValueError, match="optimizer must be 'ADAMW' or 'SGD', got 'ADAM'"):
        make_optimizer(_Parts(), optimizer="ADAM", momentum=0.9, **PUBLISHED)


def test_fused_adamw_updates_as_plain_adamw_does_and_continues_its_state() -> None:
    settings = PUBLISHED | {"base_lr": 1e-3}
    torch.manual_seed(3)
    fused_model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    plain_model = copy.deepcopy(fused_model)
    fused = make_optimizer(fused_model, optimizer="ADAMW", momentum=0.9, **settings)
    plain = torch.optim.AdamW(parameter_groups(plain_model, **settings), lr=1e-3)
    for step in range(6):
        if step == 3:  # a checkpoint of plain AdamW
            fused = make_optimizer(fused_model, optimizer="ADAMW", momentum=0.9, **settings)
            fused.load_state_dict(copy.deepcopy(plain.state_dict()))
        assert all(group["fused"] for group in fused.param_groups)
        inputs = torch.randn(3, 5)
        for model, optimizer in ((fused_model, fused), (plain_model, plain)):
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(dict(fused_model.state_dict()), dict(plain_model.state_dict()), rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------- clipping


def _with_gradients() -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (3, 4, 2)]
    parameters[0].grad = torch.tensor([3.0, 0.0, 4.0])  # norm 5
    parameters[1].grad = torch.tensor([0.0, -12.0, 0.0, 0.0])  # norm 12, so 13 together
    return parameters


def _clipped(type: str, value: float, norm_type: float = 2.0) -> list[list[float]]:
    parameters = _with_gradients()
    clip_gradients(iter(parameters), type=type, value=value, norm_type=norm_type)
    assert parameters[2].grad is None
    return [p.grad.tolist() for p in parameters[:2]]  # type: ignore[union-attr]


def test_full_model_clipping_scales_all_gradients_alike() -> None:
    first, second = _clipped("full_model", 1.3)
    assert first == pytest.approx([0.3, 0, 0.4], rel=1e-4)
    assert second == pytest.approx([0, -1.2, 0, 0], rel=1e-4)


def test_full_model_clipping_uses_the_norm_type() -> None:
    first, _ = _clipped("full_model", 1.2, math.inf)  # the largest value is 12
    assert first == pytest.approx([0.3, 0, 0.4], rel=1e-4)


def test_norm_clipping_scales_each_tensor() -> None:
    first, second = _clipped("norm", 1.0)
    assert first == pytest.approx([0.6, 0, 0.8], rel=1e-4)
    assert second == pytest.approx([0, -1, 0, 0], rel=1e-4)


def test_value_clipping_cuts_each_value() -> None:
    assert _clipped("value", 3.5) == [[3, 0, 3.5], [0, -3.5, 0, 0]]


@pytest.mark.parametrize("type", ["full_model", "norm", "value"])
def test_small_gradients_are_left_alone(type: str) -> None:
    assert _clipped(type, 100.0) == [[3, 0, 4], [0, -12, 0, 0]]


def test_unknown_clipping() -> None:
    with pytest.raises(ValueError, match="type must be 'full_model', 'norm' or 'value', got 'model'"):
        clip_gradients([], type="model", value=1.0, norm_type=2.0)


# ------------------------------------------------------------------------------------------------- schedules


def test_multi_step_schedule() -> None:
    factor = lr_factor(name="WarmupMultiStepLR", max_iter=100, steps=(60, 80), gamma=0.1)
    expected = {0: 1, 59: 1, 60: 0.1, 79: 0.1, 80: 0.01, 99: 0.01}
    assert {i: factor(i) for i in expected} == {i: pytest.approx(x) for i, x in expected.items()}


def test_poly_schedule() -> None:
    factor = lr_factor(name="WarmupPolyLR", max_iter=100, poly_power=0.9)
    for i in (0, 1, 50, 99):
        assert factor(i) == pytest.approx((1 - i / 100) ** 0.9)
    assert factor(100) == factor(101) == 0
    ending = lr_factor(name="WarmupPolyLR", max_iter=100, poly_power=1.0, poly_constant_ending=0.25)
    assert [ending(i) for i in (0, 50, 75, 90, 100)] == [1, 0.5, 0.25, 0.25, 0.25]


def test_cosine_schedule() -> None:
    factor = lr_factor(name="WarmupCosineLR", max_iter=60)
    assert [factor(i) for i in (0, 20, 30, 40, 60, 61)] == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupPolyLR", "WarmupCosineLR"])
def test_warm_up_multiplies_the_schedule(name: str) -> None:
    plain = lr_factor(name=name, max_iter=100, steps=(60,))
    linear = lr_factor(name=name, max_iter=100, steps=(60,), warmup_iters=10, warmup_factor=0.2)
    constant = lr_factor(
        name=name, max_iter=100, steps=(60,), warmup_iters=10, warmup_factor=0.2, warmup_method="constant"
    )
    for i in range(100):
        assert linear(i) == pytest.approx(plain(i) * min(1, 0.2 + 0.08 * i))
        assert constant(i) == pytest.approx(plain(i) * (0.2 if i < 10 else 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "StepLR"}, "name must be one of .*got 'StepLR'"),
        ({"steps": (80, 60)}, r"steps must grow, got \[80, 60\]"),
        ({"warmup_method": "burnin"}, "warmup_method must be 'linear' or 'constant', got 'burnin'"),
    ],
)
def test_wrong_schedule(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lr_factor(**{"name": "WarmupMultiStepLR", "max_iter": 100, **wrong})


# ---------------------------------------------------------------------------------------------- random state


def _draw(seed: int, iteration: int, rank: int = 0) -> tuple[float, ...]:
    seed_step(seed, iteration, rank)
    return tuple(torch.rand(4).tolist())


def test_seed_step_determines_the_random_numbers() -> None:
    expected = _draw(3, 17, 1)
    torch.rand(1000)
    assert _draw(3, 17, 1) == expected


def test_seed_step_gives_every_step_and_rank_its_own_stream() -> None:
    streams = {_draw(s, i, r) for s in range(3) for i in range(100) for r in range(8)}
    assert len(streams) == 3 * 100 * 8


def test_streams_of_neighbouring_steps_are_not_correlated() -> None:
    first = torch.tensor([_draw(0, i)[0] for i in range(2000)])
    assert first.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 2000) ** 0.5)
    centred = first - first.mean()
    correlation = (centred[1:] * centred[:-1]).mean() / centred.square().mean()
    assert abs(correlation) < 4 / 2000**0.5
