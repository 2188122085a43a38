"""The strict reference mode that benchmarks compare with: Mask2Former in plain float32 operations, one after the other.

It takes the weights of a built model and nothing else of it. What the project does to be fast is left out: deformable
attention is grid_sample, frozen normalisation a multiplication and an addition, attention a softmax written out with a
float mask a head, attention masks are mask logits at full size that are then made smaller, classes and masks are
predicted after every layer, and post-processing enlarges all masks at once and goes over the segments one by one.
It is written to be read, not to be slow.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mask2former.modeling.backbones import ResNet, SwinTransformer
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.position_encoding import sine_position_encoding
from mask2former.modeling.structures import MaskPrediction
from mask2former.ops.ms_deform_attn import ms_deform_attn_fused_reference

_STAGES = ("res2", "res3", "res4", "res5")


class Weights:
    """Tensors of a state dict below a prefix."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def get(self, name: str) -> Tensor | None:
        """A tensor, or None."""
        return self._tensors.get(self._prefix + name)

    def at(self, part: str | int) -> "Weights":
        """The tensors of a child."""
        return Weights(self._tensors, f"{self._prefix}{part}.")

    def __len__(self) -> int:
        """Number of children that are called 0, 1, 2, …"""
        names = {name[len(self._prefix) :].split(".")[0] for name in self._tensors if name.startswith(self._prefix)}
        return sum(name.isdigit() for name in names)


class PlainMask2Former:
    """A model of a ResNet with frozen normalisation or a Swin transformer, and the paper's two decoders.

    The numbers are those of the model that it was made from; its tensors are shared, not copied.
    """

    def __init__(self, model: Mask2Former) -> None:
        """Take the weights.

        Raises:
            ValueError: if the backbone is of another kind.
        """
        self._weights = Weights(model.state_dict())
        self._pixel_heads = model.sem_seg_head.pixel_decoder.transformer.encoder.layers[0].self_attn.num_heads
        self._query_heads = model.sem_seg_head.predictor.transformer_self_attention_layers[0].self_attn.num_heads
        if isinstance(model.backbone, SwinTransformer):
            self._window_heads = [stage.blocks[0].attn.num_heads for stage in model.backbone.layers]
        elif isinstance(model.backbone, ResNet):
            self._window_heads = []
        else:
            raise ValueError(f"backbone must be a ResNet or a SwinTransformer, got {type(model.backbone).__name__}")

    @torch.no_grad()
    def predict(self, batch: Tensor) -> list[MaskPrediction]:
        """Predictions of all layers, the last one final; ``batch`` (B, 3, H, W) as of `Mask2Former.batch_images`."""
        backbone = self._weights.at("backbone")
        maps = _swin(backbone, batch, self._window_heads) if self._window_heads else _resnet(backbone, batch)
        head = self._weights.at("sem_seg_head")
        mask_features, levels = _pixel_decoder(head.at("pixel_decoder"), maps, self._pixel_heads)
        return _decoder(head.at("predictor"), mask_features, levels, self._query_heads)


# ---- backbones


def _resnet(w: Weights, x: Tensor) -> dict[str, Tensor]:
    x = F.relu(_conv_norm(w.at("stem").at("conv1"), x, 2))
    x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    maps = {}
    for name in _STAGES:
        stage = w.at(name)
        for index in range(len(stage)):
            block = stage.at(index)
            stride = 2 if index == 0 and name != "res2" else 1
            shortcut = x if index else _conv_norm(block.at("shortcut"), x, stride)
            x = F.relu(_conv_norm(block.at("conv1"), x, 1))
            x = F.relu(_conv_norm(block.at("conv2"), x, stride))
            x = F.relu(_conv_norm(block.at("conv3"), x, 1) + shortcut)
        maps[name] = x
    return maps


def _conv_norm(w: Weights, x: Tensor, stride: int) -> Tensor:
    weight, norm = w["weight"], w.at("norm")
    x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    scale = norm["weight"] * (norm["running_var"] + 1e-5).rsqrt()
    shift = norm["bias"] - norm["running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def _swin(w: Weights, x: Tensor, heads: list[int]) -> dict[str, Tensor]:
    embed = w.at("patch_embed")
    stride = embed["proj.weight"].shape[-1]
    x = F.pad(x, (0, -x.shape[3] % stride, 0, -x.shape[2] % stride))
    x = F.conv2d(x, embed["proj.weight"], embed["proj.bias"], stride=stride).permute(0, 2, 3, 1)  # (B, H, W, C)
    x = _layer_norm(embed.at("norm"), x)
    maps = {}
    for index, name in enumerate(_STAGES):
        stage = w.at("layers").at(index)
        blocks = stage.at("blocks")
        for number in range(len(blocks)):
            x = _swin_block(blocks.at(number), x, heads[index], is_shifted=number % 2 == 1)
        maps[name] = _layer_norm(w.at(f"norm{index}"), x).permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
        if index + 1 < len(_STAGES):
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            corners = [x[:, dy::2, dx::2] for dx in (0, 1) for dy in (0, 1)]
            x = _layer_norm(stage.at("downsample.norm"), torch.cat(corners, -1))
            x = F.linear(x, stage["downsample.reduction.weight"])
    return maps


def _swin_block(w: Weights, x: Tensor, heads: int, *, is_shifted: bool) -> Tensor:
    side = round((w["attn.relative_position_bias_table"].shape[0] ** 0.5 + 1) / 2)
    _, H, W, _ = x.shape
    padded = F.pad(_layer_norm(w.at("norm1"), x), (0, 0, 0, -W % side, 0, -H % side))
    shift = side // 2 if is_shifted else 0
    padded = padded.roll((-shift, -shift), dims=(1, 2))
    size = padded.shape
    windows = _windows(padded, side)
    mask = _shift_mask(size[1], size[2], side, shift) if is_shifted else None
    attended = _window_attention(w.at("attn"), windows, heads, mask)
    attended = attended.view(size[0], size[1] // side, size[2] // side, side, side, -1).transpose(2, 3).reshape(size)
    x = x + attended.roll((shift, shift), dims=(1, 2))[:, :H, :W]
    hidden = F.gelu(_linear(w.at("mlp.fc1"), _layer_norm(w.at("norm2"), x)))
    return x + _linear(w.at("mlp.fc2"), hidden)


def _windows(x: Tensor, side: int) -> Tensor:
    """(B, H, W, C) -> (B * windows, side * side, C)."""
    B, H, W, C = x.shape
    return x.view(B, H // side, side, W // side, side, C).transpose(2, 3).reshape(-1, side * side, C)


def _shift_mask(height: int, width: int, side: int, shift: int) -> Tensor:
    """(windows, T, T) float: -100 for pairs that are neighbours only because the map was rolled."""
    region = torch.zeros(1, height, width, 1)
    parts = (slice(0, -side), slice(-side, -shift), slice(-shift, None))
    for number, (rows, columns) in enumerate((rows, columns) for rows in parts for columns in parts):
        region[:, rows, columns] = number
    region = _windows(region, side)[..., 0]  # (windows, T)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)


def _window_attention(w: Weights, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    windows, T, C = x.shape
    q, k, v = (
        _linear(w.at("qkv"), x).view(windows, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    )  # (windows, M, T, D)
    bias = w["relative_position_bias_table"][w["relative_position_index"].flatten()].view(T, T, heads)
    logits = (q * (C // heads) ** -0.5) @ k.transpose(2, 3) + bias.permute(2, 0, 1)  # (windows, M, T, T)
    if mask is not None:
        logits = (logits.view(-1, len(mask), heads, T, T) + mask[:, None]).view(logits.shape)
    out = logits.softmax(-1) @ v  # (windows, M, T, D)
    return _linear(w.at("proj"), out.transpose(1, 2).reshape(windows, T, C))


# ---- pixel decoder


def _pixel_decoder(w: Weights, maps: dict[str, Tensor], heads: int) -> tuple[Tensor, list[Tensor]]:
    """Mask features (B, C, H/4, W/4) and three levels, lowest resolution first."""
    projected = []
    for index, name in enumerate(("res5", "res4", "res3")):
        project = w.at("input_proj").at(index)
        x = F.conv2d(maps[name], project["0.weight"], project["0.bias"])
        projected.append(F.group_norm(x, 32, project["1.weight"], project["1.bias"]))
    levels = _encoder(w.at("transformer"), projected, heads)
    lateral = _conv_group_norm(w.at("adapter_1"), maps["res2"])
    finest = lateral + F.interpolate(levels[-1], lateral.shape[-2:], mode="bilinear", align_corners=False)
    finest = F.relu(_conv_group_norm(w.at("layer_1"), finest))
    return F.conv2d(finest, w["mask_features.weight"], w["mask_features.bias"]), levels


def _conv_group_norm(w: Weights, x: Tensor) -> Tensor:
    x = F.conv2d(x, w["weight"], padding=w["weight"].shape[-1] // 2)
    return F.group_norm(x, 32, w["norm.weight"], w["norm.bias"])


def _encoder(w: Weights, maps: list[Tensor], heads: int) -> list[Tensor]:
    shapes = [(m.shape[2], m.shape[3]) for m in maps]
    tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)  # (B, S, C)
    position = torch.cat([_positions(m) + embed for m, embed in zip(maps, w["level_embed"], strict=True)])  # (S, C)
    layers = w.at("encoder.layers")
    for index in range(len(layers)):
        layer = layers.at(index)
        attended = _deformable_attention(layer.at("self_attn"), tokens + position, tokens, shapes, heads)
        tokens = _layer_norm(layer.at("norm1"), tokens + attended)
        hidden = F.relu(_linear(layer.at("linear1"), tokens))
        tokens = _layer_norm(layer.at("norm2"), tokens + _linear(layer.at("linear2"), hidden))
    split = tokens.split([h * w for h, w in shapes], dim=1)
    return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(split, shapes, strict=True)]


def _deformable_attention(
    w: Weights, query: Tensor, tokens: Tensor, shapes: list[tuple[int, int]], heads: int
) -> Tensor:
    B, S, C = tokens.shape
    values = _linear(w.at("value_proj"), tokens).view(B, S, heads, C // heads)
    offsets = _linear(w.at("sampling_offsets"), query).view(B, S, heads, len(shapes), -1, 2)
    logits = _linear(w.at("attention_weights"), query).view(offsets.shape[:-1])
    return _linear(w.at("output_proj"), ms_deform_attn_fused_reference(values, shapes, offsets, logits))


# ---- transformer decoder


def _decoder(w: Weights, mask_features: Tensor, levels: list[Tensor], heads: int) -> list[MaskPrediction]:
    values, keys = [], []
    for level, embed in zip(levels, w["level_embed.weight"], strict=True):
        values.append(level.flatten(2).transpose(1, 2) + embed)  # (B, S, C)
        keys.append(values[-1] + _positions(level))
    batch = mask_features.shape[0]
    query_position = w["query_embed.weight"].expand(batch, -1, -1)
    queries = w["query_feat.weight"].expand(batch, -1, -1)
    predictions = [_predict(w, queries, mask_features)]
    for index in range(len(w.at("transformer_ffn_layers"))):
        place = index % len(levels)
        mask = _attention_mask(predictions[-1].mask_logits, levels[place].shape[-2:], heads)
        cross = w.at("transformer_cross_attention_layers").at(index)
        attended = _attention(
            cross.at("multihead_attn"), queries + query_position, keys[place], values[place], heads, mask
        )
        queries = _layer_norm(cross.at("norm"), queries + attended)
        own = w.at("transformer_self_attention_layers").at(index)
        positioned = queries + query_position
        attended = _attention(own.at("self_attn"), positioned, positioned, queries, heads)
        queries = _layer_norm(own.at("norm"), queries + attended)
        ffn = w.at("transformer_ffn_layers").at(index)
        hidden = F.relu(_linear(ffn.at("linear1"), queries))
        queries = _layer_norm(ffn.at("norm"), queries + _linear(ffn.at("linear2"), hidden))
        predictions.append(_predict(w, queries, mask_features))
    return predictions


def _predict(w: Weights, queries: Tensor, mask_features: Tensor) -> MaskPrediction:
    normed = _layer_norm(w.at("decoder_norm"), queries)
    embedding, layers = normed, w.at("mask_embed.layers")
    for index in range(len(layers)):
        embedding = _linear(layers.at(index), F.relu(embedding) if index else embedding)
    masks = torch.einsum("bqc,bchw->bqhw", embedding, mask_features)
    return MaskPrediction(_linear(w.at("class_embed"), normed), masks)


def _attention_mask(mask_logits: Tensor, size: torch.Size, heads: int) -> Tensor:
    """(B, M, Q, S) float: minus infinity where the mask is background, but nowhere if all of it is."""
    resized = F.interpolate(mask_logits, size, mode="bilinear", align_corners=False).flatten(2)
    blocked = resized.sigmoid() < 0.5  # (B, Q, S)
    blocked = torch.where(blocked.all(-1, keepdim=True), False, blocked)
    return torch.zeros_like(resized).masked_fill(blocked, -torch.inf)[:, None].repeat(1, heads, 1, 1)


def _attention(w: Weights, query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    C = query.shape[-1]
    weights, biases = w["in_proj_weight"].split(C), w["in_proj_bias"].split(C)
    q, k, v = (
        F.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, M, length, C / M)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    )
    logits = (q * (C // heads) ** -0.5) @ k.transpose(2, 3)  # (B, M, Q, S)
    if mask is not None:
        logits = logits + mask
    out = logits.softmax(-1) @ v
    return _linear(w.at("out_proj"), out.transpose(1, 2).flatten(2))


# ---- post-processing


class PlainSegment(NamedTuple):
    """One segment of a panoptic result."""

    id: int
    category_id: int
    area: int


def plain_panoptic(
    prediction: MaskPrediction,
    canvas: tuple[int, int],
    image_size: tuple[int, int],
    is_thing: Tensor,
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Tensor, list[PlainSegment]]:
    """Panoptic segmentation of one picture in its own size.

    Args:
        prediction: without the batch axis.
        canvas: (height, width) of the padded batch.
        image_size: (height, width) of the picture, the upper left part of it.
        is_thing: (K,) bool.
        object_mask_threshold, overlap_threshold: as of `mask2former.modeling.postprocessing.panoptic_segmentation`.

    Returns:
        Ids (H, W), 0 where nothing is, and the segments.
    """
    masks = F.interpolate(prediction.mask_logits[None], canvas, mode="bilinear", align_corners=False)[0]
    masks = masks[:, : image_size[0], : image_size[1]].sigmoid()
    scores, labels = prediction.class_logits.softmax(-1).max(-1)
    kept = (labels != len(is_thing)) & (scores > object_mask_threshold)
    ids = torch.zeros(image_size, dtype=torch.int32)
    segments: list[PlainSegment] = []
    if not kept.any():
        return ids, segments
    scores, labels, masks = scores[kept], labels[kept], masks[kept]
    winner = (scores[:, None, None] * masks).argmax(0)  # (H, W)
    stuff: dict[int, int] = {}
    for query, label in enumerate(labels.tolist()):
        own = masks[query] >= 0.5
        final = (winner == query) & own
        won, original, area = ((winner == query).sum().item(), own.sum().item(), final.sum().item())
        if not (won and original and area) or won / original < overlap_threshold:
            continue
        if not is_thing[label] and label in stuff:
            place = stuff[label]
            segments[place] = segments[place]._replace(area=segments[place].area + area)
            ids[final] = segments[place].id
            continue
        if not is_thing[label]:
            stuff[label] = len(segments)
        segments.append(PlainSegment(len(segments) + 1, label, area))
        ids[final] = len(segments)
    return ids, segments


# ---- shared


def _linear(w: Weights, x: Tensor) -> Tensor:
    return F.linear(x, w["weight"], w.get("bias"))


def _layer_norm(w: Weights, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w["weight"], w["bias"])


def _positions(level: Tensor) -> Tensor:
    """(h * w, C)."""
    h, w = level.shape[-2:]
    return sine_position_encoding(h, w, level.shape[1], device=level.device).flatten(1).t()
