"""Other forms of operators while a model is traced; the model itself does not know of them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mask2former.modeling.layers import Attention


class PlainAttention(TorchFunctionMode):
    """Attention in products and a softmax: PyTorch's own form asks for sizes that are not known while exporting."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class HalfWeights(TorchFunctionMode):
    """Convolutions and linear layers whose weights are float16, between float32 tensors.

    Args:
        compute_half: take the products in float16; otherwise the weights become float32 where they are used.
    """

    def __init__(self, *, compute_half: bool) -> None:
        super().__init__()
        self._compute_half = compute_half

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.linear, F.conv2d) and args[1].dtype == torch.float16:
            dtype = torch.float16 if self._compute_half else torch.float32
            tensors = [None if x is None else x.to(dtype) for x in args[:3]]
            return func(*tensors, *args[3:], **(kwargs or {})).float()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def halve_weights(model: nn.Module) -> None:
    """Store the weights of convolutions and linear layers as float16, in place.

    A layer with a weight beyond the range of float16 stays as it is. So do normalisations, tables and embeddings,
    which are small.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            parameters = [module.weight, module.bias]
        elif isinstance(module, Attention):
            parameters = [module.in_proj_weight, module.in_proj_bias]
        else:
            continue
        present = [p for p in parameters if p is not None]
        if all(p.to(torch.float16).isfinite().all() for p in present):
            for parameter in present:
                parameter.data = parameter.data.to(torch.float16)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """`scaled_dot_product_attention` of a model that is not training."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1) @ v
