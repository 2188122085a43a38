"""ResNet with bottleneck blocks, with Detectron2's state-dict names and numbers (He et al., 2016)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mask2former.modeling.layers import ConvNorm, FrozenBatchNorm2d, make_norm, uses_batch_statistics
from mask2former.ops import trained

_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_STAGES = ("res2", "res3", "res4", "res5")


class ResNet(nn.Module):
    """ResNet-50/101/152.

    Attributes:
        out_channels: channels of each output, by name.
        out_strides: stride of each output, by name.
    """

    def __init__(
        self,
        *,
        depth: int,
        norm: str = "FrozenBN",
        stride_in_1x1: bool = False,
        stem_out_channels: int = 64,
        res2_out_channels: int = 256,
        out_features: Sequence[str] = _STAGES,
        freeze_at: int = 0,
    ) -> None:
        """Build with random weights.

        Args:
            depth: 50, 101 or 152.
            norm: "FrozenBN", "BN" or "SyncBN".
            stride_in_1x1: put the stride of a downsampling block into its first convolution, not its 3x3.
            stem_out_channels: channels after the stem; a bottleneck of res2 has as many.
            res2_out_channels: channels of res2; each later stage has twice as many.
            out_features: names of the outputs.
            freeze_at: freeze the stem (1), and res2 (2), res3 (3), …; 0 freezes nothing.

        Raises:
            ValueError: if an argument is out of its range.
        """
        super().__init__()
        if depth not in _BLOCKS:
            raise ValueError(f"depth must be one of {sorted(_BLOCKS)}, got {depth}")
        if not set(out_features) <= set(_STAGES):
            raise ValueError(f"out_features must be among {_STAGES}, got {list(out_features)}")
        if not 0 <= freeze_at <= 5:
            raise ValueError(f"freeze_at must be from 0 to 5, got {freeze_at}")
        self.stem = _Stem(stem_out_channels, norm)
        channels, width, out = stem_out_channels, stem_out_channels, res2_out_channels
        for index, (name, blocks) in enumerate(zip(_STAGES, _BLOCKS[depth], strict=True)):
            stage = []
            for block in range(blocks):
                stride = 2 if block == 0 and index > 0 else 1
                stage.append(_Bottleneck(channels, width, out, stride, norm, stride_in_1x1))
                channels = out
            setattr(self, name, nn.Sequential(*stage))
            width, out = width * 2, out * 2
        self.out_channels = {n: res2_out_channels * 2 ** _STAGES.index(n) for n in out_features}
        self.out_strides = {n: 4 * 2 ** _STAGES.index(n) for n in out_features}
        self._freeze(freeze_at)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            x: (B, 3, H, W), normalised.

        Returns:
            Maps (B, C, ceil(H / stride), ceil(W / stride)) by name.
        """
        outputs = {}
        if trained.wants_channels_last(x) and not self._has_batch_statistics():
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        for name in _STAGES:
            x = getattr(self, name)(x)
            if name in self.out_channels:
                outputs[name] = x
        return outputs

    def _has_batch_statistics(self) -> bool:
        """Whether there are normalisations of batches, whose convolutions are plain ones (`ConvNorm`)."""
        return any(uses_batch_statistics(module) for module in self.modules())

    def _freeze(self, freeze_at: int) -> None:
        for name in ("stem", *_STAGES)[:freeze_at]:
            part = getattr(self, name)
            part.requires_grad_(False)
            _freeze_batch_norm(part)


class _Stem(nn.Module):
    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(3, channels, 7, stride=2, norm=norm, has_relu=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


class _Bottleneck(nn.Module):
    def __init__(
        self, in_channels: int, width: int, out_channels: int, stride: int, norm: str, stride_in_1x1: bool
    ) -> None:
        super().__init__()
        self.shortcut = (
            _conv(in_channels, out_channels, 1, stride=stride, norm=norm, has_relu=False)
            if in_channels != out_channels
            else None
        )
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = _conv(in_channels, width, 1, stride=stride_1x1, norm=norm, has_relu=True)
        self.conv2 = _conv(width, width, 3, stride=stride_3x3, norm=norm, has_relu=True)
        self.conv3 = _conv(width, out_channels, 1, stride=1, norm=norm, has_relu=True)  # after adding the shortcut

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv3(self.conv2(self.conv1(x)), shortcut)


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, stride: int, norm: str, has_relu: bool) -> ConvNorm:
    conv = ConvNorm(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        norm=make_norm(norm, out_channels),
        activation=F.relu if has_relu else None,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _freeze_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            # not read any more, but Detectron2's checkpoints of such a model have it
            frozen.register_buffer("num_batches_tracked", child.num_batches_tracked)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            _freeze_batch_norm(child)
