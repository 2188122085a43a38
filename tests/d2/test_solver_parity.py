"""The core's schedules and clipping against Detectron2's and DeepLab's."""

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.projects.deeplab.build_solver import build_lr_scheduler as build_deeplab_scheduler
from detectron2.solver import build_lr_scheduler
from detectron2.solver.build import maybe_add_gradient_clipping

from mask2former.config import scaled_to_processes, schedule_arguments, value_of
from mask2former.d2.config import add_maskformer2_config
from mask2former.solver import clip_gradients, lr_factor


def _cfg(**solver: Any) -> Any:
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.SOLVER.merge_from_other_cfg(type(cfg)({**cfg.SOLVER, **solver}))
    return cfg


def _rates(scheduler: Any, optimizer: torch.optim.Optimizer, iterations: int) -> list[float]:
    rates = []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _compare(cfg: Any, iterations: int, first: int = 0) -> None:
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR) for _ in range(2)]
    build = build_lr_scheduler if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupPolyLR" else build_deeplab_scheduler
    theirs = _rates(build(cfg, optimizers[0]), optimizers[0], iterations)
    factor = lr_factor(**schedule_arguments(cfg))
    ours = _rates(torch.optim.lr_scheduler.LambdaLR(optimizers[1], factor), optimizers[1], iterations)
    assert len(set(theirs)) > 1
    assert ours[first:] == pytest.approx(theirs[first:], rel=1e-9, abs=1e-15)


MULTI_STEP = {"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "BASE_LR": 1e-4, "MAX_ITER": 3000, "STEPS": (2000, 2600)}
POLY = {"LR_SCHEDULER_NAME": "WarmupPolyLR", "BASE_LR": 1e-4, "MAX_ITER": 3000}


@pytest.mark.parametrize(
    "warmup",
    [
        {"WARMUP_ITERS": 10, "WARMUP_FACTOR": 1.0},  # as published for COCO
        {"WARMUP_ITERS": 0, "WARMUP_FACTOR": 1.0},
        {"WARMUP_ITERS": 100, "WARMUP_FACTOR": 0.01},
        {"WARMUP_ITERS": 100, "WARMUP_FACTOR": 0.3, "WARMUP_METHOD": "constant"},
    ],
)
def test_multi_step(warmup: dict[str, Any]) -> None:
    _compare(_cfg(**MULTI_STEP, **warmup), 3000)


@pytest.mark.parametrize(
    "changes",
    [
        {"WARMUP_ITERS": 0, "WARMUP_FACTOR": 1.0},  # as published for ADE20K and Cityscapes
        {"WARMUP_ITERS": 100, "WARMUP_FACTOR": 0.01},
        {"WARMUP_ITERS": 100, "WARMUP_FACTOR": 0.3, "WARMUP_METHOD": "constant"},
        {"WARMUP_ITERS": 0, "POLY_LR_POWER": 2.0, "POLY_LR_CONSTANT_ENDING": 0.1},
    ],
)
def test_poly(changes: dict[str, Any]) -> None:
    _compare(_cfg(**POLY, **changes), 3000)


def test_published_coco_schedule_at_its_steps() -> None:
    """Every iteration near the steps of the 368,750 iterations."""
    cfg = _cfg(
        LR_SCHEDULER_NAME="WarmupMultiStepLR",
        BASE_LR=1e-4,
        MAX_ITER=368750,
        STEPS=(327778, 355092),
        WARMUP_ITERS=10,
        WARMUP_FACTOR=1.0,
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-4)
    theirs = build_lr_scheduler(cfg, optimizer)
    factor = lr_factor(**schedule_arguments(cfg))
    places = [*range(20), *range(327770, 327790), *range(355085, 355100), 368749]
    for iteration in places:
        assert factor(iteration) == pytest.approx(theirs._multiplier(iteration / 368750)), iteration


def test_cosine_after_warm_up() -> None:
    """Detectron2 grows linearly to where the cosine is at the end of warm-up; here the two are multiplied."""
    cfg = _cfg(LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR=1e-4, MAX_ITER=3000, WARMUP_ITERS=100)
    _compare(cfg, 3000, first=100)


@pytest.mark.parametrize("clip_type", ["norm", "value"])
def test_clipping_in_the_optimizer(clip_type: str) -> None:
    cfg = _cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    gradients = [torch.randn(5), torch.randn(3, 2) * 0.1]
    ours, theirs = ([nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2))
    for parameters in (ours, theirs):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
    maybe_add_gradient_clipping(cfg, torch.optim.SGD)(theirs, lr=1.0).step()
    clip_gradients(ours, type=clip_type, value=0.5, norm_type=2.0)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, -other.data)


@pytest.mark.parametrize("processes", [1, 3, 8, 16])
def test_scaling_to_other_numbers_of_processes(processes: int) -> None:
    changes = {"REFERENCE_WORLD_SIZE": 8, "IMS_PER_BATCH": 16, "BASE_LR": 3e-4, "MAX_ITER": 4999, "STEPS": (3001, 4001)}
    cfg = _cfg(**changes, WARMUP_ITERS=11, CHECKPOINT_PERIOD=777)
    cfg.TEST.EVAL_PERIOD = 1003
    expected = DefaultTrainer.auto_scale_workers(cfg, processes)
    found = scaled_to_processes(cfg, processes)
    assert bool(found) == (processes != 8)
    for key, value in found.items():
        cfg.merge_from_list([key, value])
        assert value_of(cfg, key) == value_of(expected, key), key
    assert cfg == expected
