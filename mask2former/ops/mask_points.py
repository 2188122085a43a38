"""Masks at random points, where most of the time of the training loss goes (paper section 3.3).

Four functions, each with a PyTorch reference and a compiled kernel for float32 on CPUs (csrc/cpu/points_kernel.h),
which keeps what belongs to one mask in the cache instead of passing over the memory of all once an operation.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.ops import _extension


def uncertain_points(mask_logits: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Of random points those where a map, read bilinearly and zero outside, is closest to zero.

    Args:
        mask_logits: (T, h, w) float32 or float64.
        candidates: (T, M, 2), (x, y) in [0, 1].
        count: how many, at most M.

    Returns:
        (T, count, 2), in no particular order. Without gradient.
    """
    if _use_kernel(mask_logits):
        return torch.ops.mask2former.uncertain_points(mask_logits.detach(), candidates, count)
    return uncertain_points_reference(mask_logits, candidates, count)


@torch.no_grad()
def uncertain_points_reference(mask_logits: Tensor, candidates: Tensor, count: int) -> Tensor:
    """The same in plain PyTorch. Arguments as `uncertain_points`."""
    # The logits are sampled first and compared then. Taking the uncertainty of whole pixels and interpolating
    # it would be wrong: between logits -1 and 1 lies a 0, the most uncertain point of all, but both pixels
    # have the same certainty 1.
    certainty = maps_at_points(mask_logits.unsqueeze(1), candidates).squeeze(1).abs_()  # (T, M)
    chosen = certainty.topk(count, largest=False, sorted=False).indices  # (T, count)
    return candidates.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))


def drawn_points(mask_logits: Tensor, seed: int, *, candidates: int, uncertain: int, others: int) -> Tensor:
    """Random points of each map: the most uncertain of some candidates, which the kernel never keeps, and others.

    A point depends on the seed, the row of its map and its place among the row's points, and on nothing else.

    Args:
        mask_logits: (T, h, w) float32 or float64.
        seed: from 0 to 2^63 - 1.
        candidates: how many are drawn, see `uncertain_points`: those of `random_points` with ``use`` 0.
        uncertain: how many of these are taken.
        others: how many follow, with ``use`` 1.

    Returns:
        (T, uncertain + others, 2). Without gradient.
    """
    if _use_kernel(mask_logits):
        return torch.ops.mask2former.drawn_points(mask_logits.detach(), seed, candidates, uncertain, others)
    return drawn_points_reference(mask_logits, seed, candidates=candidates, uncertain=uncertain, others=others)


def drawn_points_reference(mask_logits: Tensor, seed: int, *, candidates: int, uncertain: int, others: int) -> Tensor:
    """The same in plain PyTorch. Arguments as `drawn_points`."""
    T, device = len(mask_logits), mask_logits.device
    first = uncertain_points_reference(mask_logits, random_points(seed, T, candidates, use=0, device=device), uncertain)
    return torch.cat([first, random_points(seed, T, others, use=1, device=device)], dim=1)


_WORD = 0xFFFFFFFF
_ROUNDS = 13
_TURNS = ((10, 26), (11, 21), (13, 27), (23, 5), (6, 20), (17, 11), (25, 10), (18, 20))


def threefry(counter: Sequence[Tensor | int], key: Sequence[int], rounds: int = _ROUNDS) -> list[Tensor]:
    """The counter-based generator Threefry4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    Args:
        counter: four words, int64 tensors in [0, 2^32) that broadcast.
        key: four words.
        rounds: 13 and more pass all known statistical tests; in the paper 20 leave a margin.

    Returns:
        Four words of random bits, int64 in [0, 2^32).
    """
    keys = [*key, 0x1BD11BDA ^ key[0] ^ key[1] ^ key[2] ^ key[3]]
    x: list[Any] = [(word + k) & _WORD for word, k in zip(counter, key, strict=True)]
    for step in range(rounds):
        one = 3 if step % 2 else 1
        for place, other, bits in ((0, one, _TURNS[step % 8][0]), (2, 4 - one, _TURNS[step % 8][1])):
            x[place] = (x[place] + x[other]) & _WORD
            x[other] = ((x[other] << bits) & _WORD | x[other] >> (32 - bits)) ^ x[place]
        if step % 4 == 3:
            turn = (step + 1) // 4
            x = [(word + keys[(turn + i) % 5] + (turn if i == 3 else 0)) & _WORD for i, word in enumerate(x)]
    return x


def random_points(seed: int, rows: int, count: int, *, use: int, device: torch.device | None = None) -> Tensor:
    """Uniform points that depend on their place alone: (rows, count, 2) float32 in [0, 1), multiples of 2^-24.

    Two points side by side are the four words of one counter (place of the two, row, 0, 0) with the key (seed's lower
    word, seed's upper word, use, 0).
    """
    place, row = torch.arange((count + 1) // 2, device=device), torch.arange(rows, device=device)[:, None]
    words = threefry([place + 0 * row, row, 0, 0], [seed & _WORD, seed >> 32, use, 0])  # (rows, count / 2) each
    points = torch.stack([word >> 8 for word in words], dim=-1).to(torch.float32) / (1 << 24)
    return points.view(rows, -1, 2)[:, :count]


def mask_loss_sums(
    mask_logits: Tensor,
    points: Tensor,
    masks: Sequence[Tensor],
    *,
    counts: Sequence[int],
    index: Tensor,
    canvas: tuple[int, int],
) -> Tensor:
    """What the losses of pairs of masks are made of: four sums over points, with x the logit and t the true mask.

    Args:
        mask_logits: (T, h, w) float32 or float64, covering the canvas.
        points: (T, P, 2), (x, y) in [0, 1] of the canvas.
        masks: (N_b, H_b, W_b) bool or uint8 of each image b, the upper left part of the canvas; zero elsewhere.
        counts: how many of the T pairs belong to each image; they lie one image after the other.
        index: (T,) int64, which mask of its image a pair has.
        canvas: (height, width).

    Returns:
        (T, 4), differentiable in ``mask_logits``: sums of softplus(x) - x t, which is the sigmoid cross-entropy, of
        sigmoid(x) t, of sigmoid(x) and of t.
    """
    if _use_kernel(mask_logits):
        entry = torch.ops.mask2former.mask_loss_sums
        return entry(mask_logits, points, list(masks), list(counts), index, list(canvas))[0]
    return mask_loss_sums_reference(mask_logits, points, masks, counts=counts, index=index, canvas=canvas)


def mask_loss_sums_reference(
    mask_logits: Tensor,
    points: Tensor,
    masks: Sequence[Tensor],
    *,
    counts: Sequence[int],
    index: Tensor,
    canvas: tuple[int, int],
) -> Tensor:
    """The same in plain PyTorch. Arguments as `mask_loss_sums`."""
    logits = maps_at_points(mask_logits.unsqueeze(1), points).squeeze(1)  # (T, P)
    rows = zip(masks, points.split(list(counts)), index.split(list(counts)), strict=True)
    targets = torch.cat([masks_at_points(m, p, canvas, i) for m, p, i in rows])  # (T, P)
    targets = targets.to(logits.dtype)  # of float32 targets and float64 logits the sums would be float32
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.stack(
        [cross_entropy.sum(-1), (probability * targets).sum(-1), probability.sum(-1), targets.sum(-1)], dim=-1
    )


@torch.no_grad()
def sigmoid_and_softplus_sum(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Sigmoid of each number, and the sum of softplus over the last axis: (..., P) -> (..., P), (...). No gradient."""
    if _use_kernel(logits):
        return torch.ops.mask2former.sigmoid_and_softplus_sum(logits)
    return logits.sigmoid(), F.softplus(logits).sum(-1)


def maps_at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Maps read bilinearly, zero outside: (N, C, h, w), (N, P, 2) in [0, 1] -> (N, C, P) in the type of the maps."""
    grid = (2 * points.to(maps.dtype).unsqueeze(1)).sub_(1)  # (N, 1, P, 2)
    return F.grid_sample(maps, grid, align_corners=False).squeeze(2)


def masks_at_points(masks: Tensor, points: Tensor, canvas: tuple[int, int], index: Tensor | None = None) -> Tensor:
    """Binary masks read bilinearly on a canvas that they are padded to with zeros, without padding them.

    Only the four neighbours of each point are read, so that no mask is converted or copied.

    Args:
        masks: (N, H, W) bool or uint8, the upper left part of the canvas.
        points: (P, 2) for the same points in every mask, or (T, P, 2); (x, y) in [0, 1] of the canvas.
        canvas: (height, width) that the points refer to.
        index: (T,) int64, which mask each row of ``points`` (T, P, 2) samples.

    Returns:
        (N, P) or (T, P) float32.
    """
    height, width = masks.shape[-2:]
    # one coordinate at a time: numbers of the host need no copy to the device
    left, in_left, in_right, fraction_x = _neighbours(points[..., 0], canvas[1], width)  # (..., P)
    top, in_top, in_bottom, fraction_y = _neighbours(points[..., 1], canvas[0], height)
    flat = masks.flatten()
    offset = torch.arange(len(masks), device=masks.device) if index is None else index  # (N,) or (T,)
    offset = offset[:, None] * (height * width)
    total = torch.zeros((), device=masks.device)
    for dy, inside_y, weight_y in ((0, in_top, 1 - fraction_y), (1, in_bottom, fraction_y)):
        for dx, inside_x, weight_x in ((0, in_left, 1 - fraction_x), (1, in_right, fraction_x)):
            cell = (top + dy).clamp(0, height - 1) * width + (left + dx).clamp(0, width - 1)  # (..., P)
            value = flat[offset + cell].to(torch.float32)  # (N, P) or (T, P)
            total = total + value * (weight_x * weight_y * (inside_x & inside_y))
    return total


def _neighbours(position: Tensor, length: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Along one axis of a canvas so long: the pixel before each position in [0, 1], whether it and the next one are
    within the first ``size`` pixels, and the weight of the next one."""
    pixels = position * length - 0.5  # pixel centres are whole numbers
    before = pixels.floor()
    fraction = pixels - before
    cell = before.long()
    return cell, (cell >= 0) & (cell < size), (cell >= -1) & (cell < size - 1), fraction


# An extension built from an earlier version of the sources lacks these operators.
has_kernels = _extension.extension.module is not None and hasattr(torch.ops.mask2former, "drawn_points")


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels take maps of this device and type."""
    return has_kernels and device.type == "cpu" and dtype == torch.float32 and _extension.kernel_applies(device, dtype)


def _use_kernel(maps: Tensor) -> bool:
    return has_kernel(maps.device, maps.dtype)


def _register() -> None:
    """Tell PyTorch shapes and gradients of the operators."""

    def uncertain_shape(mask_logits: Tensor, candidates: Tensor, count: int) -> Tensor:
        return candidates.new_empty((candidates.shape[0], count, 2))

    def drawn_shape(mask_logits: Tensor, seed: int, candidates: int, uncertain: int, others: int) -> Tensor:
        return mask_logits.new_empty((mask_logits.shape[0], uncertain + others, 2))

    def sums_shape(mask_logits: Tensor, points: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        T, P = points.shape[:2]
        return mask_logits.new_empty((T, 4)), mask_logits.new_empty((T, P)), mask_logits.new_empty((T, P))

    def sums_backward_shape(
        grad_sums: Tensor, probability: Tensor, target: Tensor, points: Tensor, size: list[int]
    ) -> Tensor:
        return points.new_empty((points.shape[0], *size))

    def sigmoid_shape(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.new_empty(logits.shape), logits.new_empty(logits.shape[:-1])

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        mask_logits, points, masks, *_ = inputs
        ctx.size, ctx.images = list(mask_logits.shape[1:]), len(masks)
        ctx.save_for_backward(*output[1:], points)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_sums: Tensor | None, *_: Any) -> tuple[Any, ...]:
        gradient = None
        if grad_sums is not None:
            gradient = torch.ops.mask2former.mask_loss_sums_backward(grad_sums, *ctx.saved_tensors, ctx.size)
        return gradient, None, [None] * ctx.images, None, None, None

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise NotImplementedError(
            "mask_loss_sums: the compiled kernel has no second derivatives; MASK2FORMER_KERNEL=0 selects the PyTorch "
            "reference"
        )

    torch.library.register_fake("mask2former::uncertain_points", uncertain_shape)
    torch.library.register_fake("mask2former::drawn_points", drawn_shape)
    torch.library.register_fake("mask2former::mask_loss_sums", sums_shape)
    torch.library.register_fake("mask2former::mask_loss_sums_backward", sums_backward_shape)
    torch.library.register_fake("mask2former::sigmoid_and_softplus_sum", sigmoid_shape)
    torch.library.register_autograd("mask2former::mask_loss_sums", differentiate, setup_context=save)
    torch.library.register_autograd("mask2former::mask_loss_sums_backward", refuse)


if has_kernels:
    _register()
