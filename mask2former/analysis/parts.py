"""What a model is made of: numbers of parameters and constants, and the tree of its modules."""

from typing import Any, NamedTuple

from torch import nn

from mask2former.modeling.layers import FrozenBatchNorm2d

PARTS = ("backbone", "sem_seg_head.pixel_decoder", "sem_seg_head.predictor", "criterion")
"""The top-level parts, by name of the module; the predictor is the transformer decoder."""
OTHER = "other"
"""What is in none of them."""


class PartSize(NamedTuple):
    """How many numbers a part holds.

    Attributes:
        trainable: parameters with gradients: what is published as "parameters".
        fixed: parameters without gradients, such as those of frozen stages.
        frozen_norm: constants of `FrozenBatchNorm2d`, its statistics and affine parameters.
        other_constants: in other buffers, such as indices into Swin's bias tables and the weights of the classes.
    """

    trainable: int = 0
    fixed: int = 0
    frozen_norm: int = 0
    other_constants: int = 0


def part_sizes(model: nn.Module) -> dict[str, PartSize]:
    """The size of each of `PARTS` by name, and of `OTHER`, if it is not empty.

    What several modules share counts once, for the first.
    """
    sizes = {part: dict.fromkeys(PartSize._fields, 0) for part in (*PARTS, OTHER)}
    for name, parameter in model.named_parameters():
        sizes[part_of(name)]["trainable" if parameter.requires_grad else "fixed"] += parameter.numel()
    frozen = [f"{name}." for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)]
    for name, buffer in model.named_buffers():
        is_of_norm = name.startswith(tuple(frozen))
        sizes[part_of(name)]["frozen_norm" if is_of_norm else "other_constants"] += buffer.numel()
    return {part: PartSize(**size) for part, size in sizes.items() if any(size.values())}


def part_of(name: str) -> str:
    """The part that a module, parameter or buffer is in."""
    return next((part for part in PARTS if name == part or name.startswith(f"{part}.")), OTHER)


def module_tree(model: nn.Module, depth: int, name: str = "") -> dict[str, Any]:
    """The modules down to a depth, as plain values.

    Args:
        model: the root.
        depth: levels below it.
        name: of the root.

    Returns:
        "name", "class", "parameters" (trainable) and "children", a list of the same.
    """
    children = model.named_children() if depth > 0 else ()
    return {
        "name": name,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "children": [module_tree(child, depth - 1, child_name) for child_name, child in children],
    }
