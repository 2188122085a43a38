"""Counts the arithmetic of a model while it runs, also on the meta device, where nothing is computed.

A multiply-add counts as one, as in fvcore, which the published numbers come from; so do the other rules of its counter:
four for a bilinear sample, two for an element of batch normalisation, five of layer or group normalisation. Biases,
sums, softmax and activation functions do not count. Unlike fvcore's, this counter knows deformable attention,
deformable convolution and fused attention.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from mask2former.modeling.layers import FrozenBatchNorm2d
from mask2former.modeling.pixel_decoders.deformable import MSDeformAttn

Kind = Literal["convolution", "matrix product", "deformable attention", "resampling", "normalisation"]


class Cost(NamedTuple):
    """Of one operator.

    Attributes:
        kind: what it is part of.
        flops: multiply-adds.
        activations: numbers that it gives, of convolutions and matrix products only.
    """

    kind: Kind
    flops: int
    activations: int = 0


_Formula = Callable[[Sequence[Any], Any], Cost]
"""From the arguments of an operator, by position, and what it gave."""


class OperationCounter(TorchDispatchMode):
    """Counts what runs inside a ``with`` block, for the whole and for each module; of any device.

    Attributes:
        flops: multiply-adds by name of the module, then by kind; "" is the whole. A module has those of its children.
        activations: by name of the module.
    """

    def __init__(self, model: nn.Module) -> None:
        """Set up.

        Args:
            model: whose modules are told apart. Call it, not its methods, without gradients and not in inference mode,
                in which PyTorch does not show what linear layers and attention are made of.
        """
        super().__init__()
        self.flops: defaultdict[str, Counter[Kind]] = defaultdict(Counter)
        self.activations: Counter[str] = Counter()
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "OperationCounter":
        for module in self._names:
            self._hooks.append(module.register_forward_pre_hook(self._begin))
            self._hooks.append(module.register_forward_hook(self._end))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._running.clear()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator of PyTorch, and count it."""
        name = operator.name().partition(".")[0]  # without that of the overload
        if name == "aten::grid_sampler_2d" and args[0].is_meta:
            # PyTorch finds the shape by doing the steps one by one, which would be half of the time of a count
            output = args[0].new_empty(*args[0].shape[:2], *args[1].shape[1:3])
        else:
            output = operator(*args, **(kwargs or {}))
        if name in _FORMULAS:
            self._add(_FORMULAS[name](args, output))
        return output

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._running.append(module)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, FrozenBatchNorm2d):
            self._add(Cost("normalisation", 2 * output.numel()))
        elif isinstance(module, MSDeformAttn):  # the samples are weighted; sampling is an operator
            self._add(Cost("deformable attention", output.numel() * module.num_levels * module.num_points))
        self._running.pop()

    def _add(self, cost: Cost) -> None:
        kind = cost.kind
        if kind == "resampling" and any(isinstance(module, MSDeformAttn) for module in self._running):
            kind = "deformable attention"  # without the compiled kernel
        for name in {"", *(self._names[module] for module in self._running)}:
            self.flops[name][kind] += cost.flops
            self.activations[name] += cost.activations


def count_operations(model: nn.Module, size: tuple[int, int], *, all_layers: bool = False) -> OperationCounter:
    """Count one image.

    Args:
        model: a `Mask2Former`, best on the meta device and in evaluation mode.
        size: (height, width) of the image as the model takes it, padded.
        all_layers: count the predictions of all decoder layers, which training and the published program make, instead
            of the last one alone.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), OperationCounter(model) as counter:
        model(torch.empty(1, 3, *size, device=device), all_layers)
    return counter


def _matrix_product(first: int) -> _Formula:
    """A product over the last axis of the argument at this place."""

    def cost(args: Sequence[Any], output: Tensor) -> Cost:
        return Cost("matrix product", output.numel() * args[first].shape[-1], output.numel())

    return cost


def _attention(args: Sequence[Any], outputs: Any) -> Cost:
    """Fused; activations are those of the two products that it is made of."""
    query, key, value = args[:3]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    flops = scores * (query.shape[-1] + value.shape[-1])
    return Cost("matrix product", flops, scores + outputs[0].numel())


def _convolution(args: Sequence[Any], output: Tensor) -> Cost:
    inputs, weight, is_transposed = args[0], args[1], args[6]
    places = inputs if is_transposed else output
    return Cost("convolution", places.numel() * weight[0].numel(), output.numel())


def _deformable_convolution(args: Sequence[Any], output: Tensor) -> Cost:
    inputs, weight = args[0], args[1]
    samples = output.numel() // output.shape[1] * inputs.shape[1] * weight[0, 0].numel()
    return Cost("convolution", output.numel() * weight[0].numel() + 4 * samples, output.numel())


def _deformable_attention(args: Sequence[Any], output: Tensor) -> Cost:
    value, _, _, scores = args  # (B, S, M, D) and (B, Q, M, L, P)
    return Cost("deformable attention", 4 * scores.numel() * value.shape[-1])


def _norm(weight: int) -> _Formula:
    """Of the layer or of groups; ``weight`` is the place of that argument."""

    def cost(args: Sequence[Any], outputs: Any) -> Cost:
        return Cost("normalisation", args[0].numel() * (4 if args[weight] is None else 5))

    return cost


def _batch_norm(args: Sequence[Any], outputs: Any) -> Cost:
    weight, is_training = args[1], args[5]
    of_one = (4 if is_training else 1) + (weight is not None)
    return Cost("normalisation", args[0].numel() * of_one)


def _resampling(of_output: int) -> _Formula:
    """So many multiply-adds for each number that comes out."""
    return lambda args, output: Cost("resampling", output.numel() * of_output)


_FORMULAS: dict[str, _Formula] = {
    "aten::mm": _matrix_product(0),
    "aten::bmm": _matrix_product(0),
    "aten::mv": _matrix_product(0),
    "aten::addmm": _matrix_product(1),
    "aten::baddbmm": _matrix_product(1),
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention": _attention,
    "aten::_scaled_dot_product_efficient_attention": _attention,
    "aten::_scaled_dot_product_cudnn_attention": _attention,
    "aten::convolution": _convolution,
    "torchvision::deform_conv2d": _deformable_convolution,
    "mask2former::ms_deform_attn_forward": _deformable_attention,
    "mask2former::ms_deform_attn_fused_forward": _deformable_attention,
    "aten::native_layer_norm": _norm(2),
    "aten::native_group_norm": _norm(1),
    "aten::native_batch_norm": _batch_norm,
    "aten::cudnn_batch_norm": _batch_norm,
    "aten::grid_sampler_2d": _resampling(4),
    "aten::upsample_bilinear2d": _resampling(4),
    "aten::upsample_nearest2d": _resampling(1),
    "aten::_adaptive_avg_pool2d": lambda args, output: Cost("resampling", args[0].numel()),
}
