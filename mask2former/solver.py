"""Parameter groups, gradient clipping, schedules and the random state of a step (paper section 4.1).

Whatever decides a number in training and is not the model stands here, for every engine; torch only.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed", "pos_embed")
_AFTER_BACKBONE = "backbone.pyramid"  # of a plain vision transformer, which no pretrained weights hold


def parameter_groups(
    model: nn.Module,
    *,
    base_lr: float,
    weight_decay: float,
    weight_decay_norm: float,
    weight_decay_embed: float,
    backbone_multiplier: float,
) -> list[dict[str, Any]]:
    """Trainable parameters in as few groups as there are different (lr, weight decay) pairs.

    Args:
        model: its backbone's modules have "backbone" in their names.
        base_lr: learning rate.
        weight_decay: of everything but the following.
        weight_decay_norm: of normalisations.
        weight_decay_embed: of `torch.nn.Embedding`. Position tables of backbones always have 0.
        backbone_multiplier: factor on the learning rate of the backbone, but for a simple feature pyramid in it, which
            no pretrained weights hold.

    Returns:
        Dicts with "params", "lr" and "weight_decay", in the order of first appearance.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            decay = weight_decay
            if name in _POSITION_TABLES:
                decay = 0.0
            elif isinstance(module, _NORMS):
                decay = weight_decay_norm
            elif isinstance(module, nn.Embedding):
                decay = weight_decay_embed
            is_backbone = "backbone" in module_name and _AFTER_BACKBONE not in module_name
            lr = base_lr * backbone_multiplier if is_backbone else base_lr
            groups.setdefault((lr, decay), []).append(parameter)
    return [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]


def make_optimizer(
    model: nn.Module, *, optimizer: str, base_lr: float, momentum: float, **group_settings: float
) -> torch.optim.Optimizer:
    """AdamW ("ADAMW", in one pass over the memory) or SGD ("SGD") over `parameter_groups`.

    Raises:
        ValueError: if ``optimizer`` is another name.
    """
    groups = parameter_groups(model, base_lr=base_lr, **group_settings)
    if optimizer == "ADAMW":
        adamw = torch.optim.AdamW(groups, lr=base_lr, fused=True)
        adamw.register_load_state_dict_pre_hook(_keep_fused)
        return adamw
    if optimizer == "SGD":
        return torch.optim.SGD(groups, lr=base_lr, momentum=momentum)
    raise ValueError(f"optimizer must be 'ADAMW' or 'SGD', got {optimizer!r}")


def _keep_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer that was not fused, as of an earlier version, would switch this off."""
    return {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}


def clip_gradients(parameters: Iterable[nn.Parameter], *, type: str, value: float, norm_type: float) -> None:
    """Clip in place: the norm of the whole model, of each tensor, or each value.

    Args:
        parameters: those without a gradient are left out.
        type: "full_model", "norm" or "value".
        value: the largest norm or absolute value.
        norm_type: p of the norm.

    Raises:
        ValueError: if ``type`` is another name.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    if type == "full_model":
        nn.utils.clip_grad_norm_(with_gradient, value, norm_type)
    elif type == "norm":
        for parameter in with_gradient:
            nn.utils.clip_grad_norm_(parameter, value, norm_type)
    elif type == "value":
        nn.utils.clip_grad_value_(with_gradient, value)
    else:
        raise ValueError(f"type must be 'full_model', 'norm' or 'value', got {type!r}")


def lr_factor(
    *,
    name: str,
    max_iter: int,
    steps: Sequence[int] = (),
    gamma: float = 0.1,
    warmup_iters: int = 0,
    warmup_factor: float = 1.0,
    warmup_method: str = "linear",
    poly_power: float = 0.9,
    poly_constant_ending: float = 0.0,
) -> Callable[[int], float]:
    """The learning rate of an iteration over the base learning rate, for `torch.optim.lr_scheduler.LambdaLR`.

    Args:
        name: "WarmupMultiStepLR", "WarmupPolyLR" or "WarmupCosineLR".
        max_iter: iterations of the whole training.
        steps: iterations from which on the rate is ``gamma`` times smaller (multi-step).
        gamma: see ``steps``.
        warmup_iters: the rate is reduced before this iteration.
        warmup_factor: by so much at the start.
        warmup_method: "linear" growth to 1, or "constant".
        poly_power: exponent of (1 - iteration / max_iter).
        poly_constant_ending: if above 0, the smallest factor (poly).

    Raises:
        ValueError: if a name is unknown or ``steps`` do not grow.
    """
    if list(steps) != sorted(steps):
        raise ValueError(f"steps must grow, got {list(steps)}")
    if warmup_method not in ("linear", "constant"):
        raise ValueError(f"warmup_method must be 'linear' or 'constant', got {warmup_method!r}")

    def multi_step(iteration: int) -> float:
        return gamma ** sum(iteration >= step for step in steps)

    def poly(iteration: int) -> float:
        remaining = max(0.0, 1 - iteration / max_iter)
        return max(remaining**poly_power, poly_constant_ending)

    def cosine(iteration: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, iteration / max_iter)))

    schedules = {"WarmupMultiStepLR": multi_step, "WarmupPolyLR": poly, "WarmupCosineLR": cosine}
    if name not in schedules:
        raise ValueError(f"name must be one of {sorted(schedules)}, got {name!r}")

    def warmup(iteration: int) -> float:
        if iteration >= warmup_iters:
            return 1.0
        if warmup_method == "constant":
            return warmup_factor
        return warmup_factor + (1 - warmup_factor) * iteration / warmup_iters

    return lambda iteration: warmup(iteration) * schedules[name](iteration)


def seed_step(seed: int, iteration: int, rank: int = 0) -> None:
    """Make every random number of a training step a function of seed, iteration and rank.

    A run that was killed and resumed then draws what the uninterrupted run draws, without a random state in
    the checkpoint. The seeds of different (iteration, rank) are spread by a 64-bit mixing function.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + iteration * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) % 2**64
    torch.manual_seed((mixed ^ (mixed >> 32)) % 2**63)
