"""Swin transformer with the published state-dict names (Liu et al., 2021)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mask2former.modeling.layers import Conv2d, Linear, feed_forward
from mask2former.ops import attention, trained

_STAGES = ("res2", "res3", "res4", "res5")


class SwinTransformer(nn.Module):
    """Swin backbone; maps are kept channel-last (B, H, W, C) between the blocks.

    Attributes:
        out_channels: channels of each output, by name.
        out_strides: stride of each output, by name.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.3,
        patch_size: int = 4,
        patch_norm: bool = True,
        ape: bool = False,
        pretrain_image_size: int = 224,
        out_features: Sequence[str] = _STAGES,
        use_checkpoint: bool = False,
    ) -> None:
        """Build with random weights.

        Args:
            embed_dim: channels of the first stage; each later one has twice as many.
            depths: blocks of each stage, one to four stages.
            num_heads: heads of each stage.
            window_size: side of the attention window in tokens.
            mlp_ratio: width of the MLP over the channels.
            qkv_bias: bias in the projections.
            qk_scale: scale of the dot products; None is 1 / sqrt(channels of a head).
            drop_rate, attn_drop_rate: dropout after projections, and of attention weights.
            drop_path_rate: stochastic depth of the last block; grows linearly from 0.
            patch_size: side of a patch in pixels.
            patch_norm: LayerNorm after the patch embedding.
            ape: learned absolute position embedding, made for ``pretrain_image_size``.
            pretrain_image_size: image side that the absolute embedding was made for.
            out_features: names of the outputs, "res2" is the first stage.
            use_checkpoint: recompute each block in the backward pass to save memory.

        Raises:
            ValueError: if an argument is out of its range.
        """
        super().__init__()
        names = _STAGES[: len(depths)]
        if not 1 <= len(depths) <= 4 or len(num_heads) != len(depths):
            raise ValueError(
                f"depths and num_heads must hold one number a stage, 1 to 4 stages, got {list(depths)} and "
                f"{list(num_heads)}"
            )
        if not set(out_features) <= set(names):
            raise ValueError(f"out_features must be among {names}, got {list(out_features)}")
        self.patch_embed = _PatchEmbed(embed_dim, patch_size, patch_norm)
        self.absolute_pos_embed = None
        if ape:
            side = pretrain_image_size // patch_size
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, side, side))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        drop_paths = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.layers = nn.ModuleList()
        for index, depth in enumerate(depths):
            dim = embed_dim * 2**index
            first = sum(depths[:index])
            blocks = [
                _Block(
                    dim=dim,
                    num_heads=num_heads[index],
                    window_size=window_size,
                    shift=0 if block % 2 == 0 else window_size // 2,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_scale=qk_scale,
                    drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_paths[first + block],
                )
                for block in range(depth)
            ]
            self.layers.append(_Stage(blocks, dim, window_size, index + 1 < len(depths), use_checkpoint))
        self.out_channels = {n: embed_dim * 2 ** _STAGES.index(n) for n in out_features}
        self.out_strides = {n: patch_size * 2 ** _STAGES.index(n) for n in out_features}
        self._init_weights()
        for name, channels in self.out_channels.items():
            self.add_module(f"norm{_STAGES.index(name)}", nn.LayerNorm(channels))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            x: (B, 3, H, W), normalised.

        Returns:
            Maps (B, C, h, w) by name.
        """
        x = self.patch_embed(x)  # (B, H/4, W/4, C)
        if self.absolute_pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            embed = F.interpolate(self.absolute_pos_embed, size=size, mode="bicubic", align_corners=False)
            x = x + embed.permute(0, 2, 3, 1)  # (1, H/4, W/4, C)
        x = self.pos_drop(x)
        outputs = {}
        for index, stage in enumerate(self.layers):
            x = stage(x)
            name = _STAGES[index]
            if name in self.out_channels:
                norm = getattr(self, f"norm{index}")
                output = norm(x).permute(0, 3, 1, 2)  # (B, C, h, w)
                outputs[name] = output if trained.wants_channels_last(output) else output.contiguous()
            downsample = stage.downsample
            if isinstance(downsample, _PatchMerging):  # None in the last stage
                x = downsample(x)
        return outputs

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class _PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch_size: int, use_norm: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Conv2d(3, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if use_norm else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = (_windows_along(length, self.patch_size) * self.patch_size for length in x.shape[2:])
        x = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]))
        x = self.proj(x).permute(0, 2, 3, 1)  # (B, h, w, C)
        return x if self.norm is None else self.norm(x)


class _Stage(nn.Module):
    def __init__(
        self, blocks: list["_Block"], dim: int, window_size: int, downsample: bool, use_checkpoint: bool
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = _PatchMerging(dim) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        region_differs = None
        if not self._suits_kernels(x):
            region_differs = _shifted_window_mask(x.shape[1], x.shape[2], self.window_size, x.device)
        for block in self.blocks:
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, region_differs, use_reentrant=False)
            else:
                x = block(x, region_differs)
        return x

    def _suits_kernels(self, x: Tensor) -> bool:
        drops = self.training and any(block.attn.attn_drop for block in self.blocks)  # type: ignore[union-attr]
        return not drops and attention.has_kernels(x)


class _Block(nn.Module):
    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.attn = _WindowAttention(dim, num_heads, window_size, qkv_bias, qk_scale, attn_drop, drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _MLP(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, region_differs: Tensor | None) -> Tensor:
        branch = self._attend(x, region_differs)
        if self.training:
            x = x + self._drop(self.attn.project(branch))
            return x + self._drop(self.mlp(x, norm=self.norm2))
        x = self.attn.project(branch, x)
        return self.mlp(x, x, norm=self.norm2)

    def _attend(self, x: Tensor, region_differs: Tensor | None) -> Tensor:
        """Attention inside of the windows, not yet projected; padding is cut off before that.

        Without the mask by the kernels, which make no windows.
        """
        if region_differs is None:
            return self.attn.attend_map(x, self.norm1, self.window_size, self.shift)
        x = self.norm1(x)
        B, H, W, C = x.shape
        side = self.window_size
        rows, cols = _windows_along(H, side), _windows_along(W, side)
        x = F.pad(x, (0, 0, 0, cols * side - W, 0, rows * side - H))
        if self.shift:
            x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = x.view(B, rows, side, cols, side, C).transpose(2, 3)  # (B, rows, cols, side, side, C)
        tokens = windows.reshape(B, rows * cols, side * side, C)
        out = self.attn(tokens, region_differs if self.shift else None)
        out = out.view(B, rows, cols, side, side, C).transpose(2, 3).reshape(B, rows * side, cols * side, C)
        if self.shift:
            out = out.roll((self.shift, self.shift), dims=(1, 2))
        return out[:, :H, :W]

    def _drop(self, x: Tensor) -> Tensor:
        """Stochastic depth: drop the residual branch of some images."""
        if not self.training or self.drop_path == 0:
            return x
        keep = 1 - self.drop_path
        kept = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep)
        return x * kept / keep


class _WindowAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale
        self.attn_drop = attn_drop
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, region_differs: Tensor | None) -> Tensor:
        """Attend inside each window.

        Args:
            x: (B, windows, T, C), T tokens a window.
            region_differs: (windows, T, T) bool, True for token pairs that are no neighbours in the image.
        """
        B, windows, T, C = x.shape
        qkv = self.qkv(x).view(B * windows, T, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B*windows, M, T, C/M)
        bias = self._position_bias().unsqueeze(0)  # (1, M, T, T)
        if region_differs is not None:
            bias = bias - 100.0 * region_differs.unsqueeze(1).to(bias.dtype)  # (windows, M, T, T)
            bias = bias.expand(B, windows, -1, T, T).flatten(0, 1)  # (B*windows, M, T, T)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.to(q.dtype), dropout_p=dropout, scale=self.scale
        )
        return out.transpose(1, 2).reshape(B, windows, T, C)

    def attend_map(self, x: Tensor, norm: nn.LayerNorm, side: int, shift: int) -> Tensor:
        """The same for all windows of a map, which is not padded, shifted or cut for that; (B, H, W, C) to the same.

        It is normalised first.
        """
        padding = None if self.qkv.bias is None else self.qkv.bias.to(x.dtype)  # kept in float16 by some exports
        return attention.window_attention(
            self.qkv(x, before=norm),
            padding,
            self._position_bias().to(x.dtype),
            num_heads=self.num_heads,
            side=side,
            shift=shift,
            scale=self.scale,
        )

    def _position_bias(self) -> Tensor:
        """(M, T, T)."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)

    def project(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What follows the attention, a token at a time: (…, C) -> (…, C), plus a residual if not training."""
        return self.proj_drop(self.proj(x, residual))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim, activation="gelu")
        self.fc2 = Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, norm: nn.LayerNorm) -> Tensor:
        """Of what is normalised first; (…, C) -> (…, C), plus a residual if not training."""
        if not self.training or self.drop.p == 0:
            return feed_forward(self.fc1, self.fc2, x, residual, before=norm)
        return self.drop(self.fc2(self.drop(self.fc1(norm(x)))))


class _PatchMerging(nn.Module):
    """2x2 neighbours become one token of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        rows, cols = _windows_along(H, 2), _windows_along(W, 2)
        x = F.pad(x, (0, 0, 0, 2 * cols - W, 0, 2 * rows - H))
        # channel order: column offset outside, row offset inside
        x = x.view(B, rows, 2, cols, 2, C).permute(0, 1, 3, 4, 2, 5)  # (B, H/2, W/2, dx, dy, C)
        return self.reduction(self.norm(x.flatten(3)))  # (B, H/2, W/2, 2C)


def _windows_along(length: int, side: int) -> int:
    """Windows that cover a length.

    Padding up to a product of this number is what `torch.export` can follow for any length; it cannot divide a length
    that it knows as "with the rest to the next multiple".
    """
    return (length + side - 1) // side


def relative_position_index(side: int) -> Tensor:
    """(T, T) int64: row of the bias table for each pair of tokens of a side x side window."""
    axis = torch.arange(side)
    coords = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)  # (2, T)
    offset = coords[:, :, None] - coords[:, None, :] + side - 1  # (2, T, T), from 0
    return offset[0] * (2 * side - 1) + offset[1]


def _shifted_window_mask(height: int, width: int, side: int, device: torch.device) -> Tensor:
    """(windows, T, T) bool: True for pairs that meet in a shifted window without being neighbours.

    Computed on the padded size: tokens that were rolled around the border form their own regions.
    """

    def regions(windows: int) -> Tensor:
        padded = windows * side
        index = torch.arange(padded, device=device)
        return (index >= padded - side).long() + (index >= padded - side // 2).long()

    rows, cols = _windows_along(height, side), _windows_along(width, side)
    region = regions(rows)[:, None] * 3 + regions(cols)[None, :]  # (rows * side, cols * side)
    windows = region.view(rows, side, cols, side).transpose(1, 2).reshape(rows * cols, side * side)  # (windows, T)
    return windows[:, :, None] != windows[:, None, :]
