"""Names of tensors: the published ones, which this project uses, and those of transformers, in both directions.

transformers has two sets of names for a Swin backbone: that of its files, which its releases 4 and 5 write and read,
and that of a model in memory, which release 5 changed. Both are read, the first is written.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mask2former.modeling.backbones.swin import relative_position_index

Naming = Literal["published", "transformers"]
NAMINGS: tuple[Naming, ...] = get_args(Naming)


class Renamed(NamedTuple):
    """Tensors under other names.

    Attributes:
        tensors: by name.
        unused: names, before renaming, of those without a counterpart; nothing that a model computes depends on them.
    """

    tensors: dict[str, Tensor]
    unused: tuple[str, ...]


def check_naming(naming: str) -> None:
    """Raise ValueError unless there are such names."""
    if naming not in NAMINGS:
        raise ValueError(f"names must be one of {', '.join(NAMINGS)}, got {naming!r}")


def naming_of(names: Iterable[str]) -> Naming:
    """Whose names these are: the published ones unless a name says otherwise."""
    return "transformers" if any(name.startswith(_TRANSFORMERS_PARTS) for name in names) else "published"


def to_transformers(tensors: Mapping[str, Tensor]) -> Renamed:
    """From published names to those in the files of transformers' Mask2FormerForUniversalSegmentation.

    `to_published` gives the same bits back. What transformers' model has and the published one lacks is added as it
    is in a new model of theirs: counters of batches, and the normalisation after Swin that nothing uses.

    Raises:
        ValueError: if a name is not known, query, key and value cannot be taken apart, or the position index of a
            window is not the usual one; names the tensors.
    """
    result: dict[str, Tensor] = {}
    unused, unknown = [], []
    for name, tensor in tensors.items():
        if targets := _names_in_transformers(name):
            result.update(zip(targets, _split(name, tensor, len(targets)), strict=True))
        elif _PUBLISHED_INDEX.fullmatch(name):
            _check_index(name, tensor)
            unused.append(name)
        else:
            unknown.append(name)
    _refuse(unknown, "published")
    return Renamed({**result, **_only_in_transformers(result)}, tuple(unused))


def to_published(tensors: Mapping[str, Tensor], wanted: Collection[str] | None = None) -> Renamed:
    """From names of transformers' Mask2FormerForUniversalSegmentation, in a file or in memory, to published ones.

    Position indices of windows are added. Counters of batches (``num_batches_tracked``) are left out where the
    published model has none, which only ``wanted`` can say for sure.

    Args:
        tensors: all of a model or some.
        wanted: names of the model that the tensors are for; None: counters are left out if all are 0, as they are
            where statistics are frozen.

    Raises:
        ValueError: if a name is not known, a tensor is there under both names of transformers, one of query, key and
            value is missing, or the position index of a window is not the usual one; names the tensors.
    """
    groups: dict[str, list[str]] = {}
    unused, unknown = [], []
    for name, tensor in tensors.items():
        if place := _place_in_published(name):
            group = groups.setdefault(place.name, [""] * place.parts)
            if group[place.part]:
                raise ValueError(f"names of transformers must not mean the same, got {group[place.part]} and {name}")
            group[place.part] = name
        elif _TRANSFORMERS_INDEX.fullmatch(name):
            _check_index(name, tensor)
        elif _TOP_NORM.fullmatch(name):
            unused.append(name)
        else:
            unknown.append(name)
    _refuse(unknown, "transformers")
    counters = {target: names[0] for target, names in groups.items() if target.endswith(_COUNTER)}
    if wanted is None and not any(tensors[name].any() for name in counters.values()):
        wanted = ()
    needless = {} if wanted is None else {t: name for t, name in counters.items() if t not in wanted}
    result = {t: _fused(t, names, tensors) for t, names in groups.items() if t not in needless}
    return Renamed({**result, **_indices_of(result)}, (*unused, *needless.values()))


# ---- the names


class _Rule(NamedTuple):
    """Templates of names of equal tensors: "#" stands for a number, "@" for weight or bias, "%" for any of a norm.

    Attributes:
        published: the name here.
        transformers: one name; or three, whose tensors lie one after the other in the published one.
        in_memory: the name or names in a model of transformers' release 5, where they are others.
    """

    published: str
    transformers: tuple[str, ...]
    in_memory: tuple[str, ...] = ()


class _Place(NamedTuple):
    """Where a tensor of transformers belongs: part ``part`` of ``parts`` in the published tensor ``name``."""

    name: str
    part: int
    parts: int


_COUNTER = "num_batches_tracked"
_PLACEHOLDERS = {"#": r"(\d+)", "@": "(weight|bias)", "%": f"(weight|bias|running_mean|running_var|{_COUNTER})"}
_TRANSFORMERS_PARTS = ("model.pixel_level_module.", "model.transformer_module.", "class_predictor.")
_ENCODER = "model.pixel_level_module.encoder."


def _prefixed(published: str, transformers: str, rules: Mapping[str, str]) -> list[_Rule]:
    return [_Rule(published + ours, (transformers + theirs,)) for ours, theirs in rules.items()]


def _pixel_decoder_rules() -> list[_Rule]:
    ours, theirs = "sem_seg_head.pixel_decoder.", "model.pixel_level_module.decoder."
    attention = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
    return [
        *_prefixed(
            ours,
            theirs,
            {
                "transformer.level_embed": "level_embed",
                "input_proj.#.#.@": "input_projections.#.#.@",
                "mask_features.@": "mask_projection.@",
                "adapter_1.weight": "adapter_1.0.weight",
                "adapter_1.norm.@": "adapter_1.1.@",
                "layer_1.weight": "layer_1.0.weight",
                "layer_1.norm.@": "layer_1.1.@",
            },
        ),
        *_prefixed(
            ours + "transformer.encoder.layers.#.",
            theirs + "encoder.layers.#.",
            {
                **{f"self_attn.{part}.@": f"self_attn.{part}.@" for part in attention},
                "norm1.@": "self_attn_layer_norm.@",
                "linear1.@": "fc1.@",
                "linear2.@": "fc2.@",
                "norm2.@": "final_layer_norm.@",
            },
        ),
    ]


def _transformer_decoder_rules() -> list[_Rule]:
    ours, theirs = "sem_seg_head.predictor.", "model.transformer_module."
    layer = theirs + "decoder.layers.#."
    fused = [
        _Rule(
            f"{ours}transformer_self_attention_layers.#.self_attn.in_proj_{kind}",
            tuple(f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv"),
        )
        for kind in ("weight", "bias")
    ]
    cross = {f"multihead_attn.in_proj_{kind}": f"cross_attn.in_proj_{kind}" for kind in ("weight", "bias")}
    return [
        *_prefixed(
            ours,
            theirs,
            {
                "query_feat.weight": "queries_features.weight",
                "query_embed.weight": "queries_embedder.weight",
                "level_embed.weight": "level_embed.weight",
                "input_proj.#.@": "input_projections.#.@",
                "decoder_norm.@": "decoder.layernorm.@",
                "mask_embed.layers.#.@": "decoder.mask_predictor.mask_embedder.#.0.@",
            },
        ),
        *fused,
        *_prefixed(
            ours + "transformer_self_attention_layers.#.",
            layer,
            {"self_attn.out_proj.@": "self_attn.out_proj.@", "norm.@": "self_attn_layer_norm.@"},
        ),
        *_prefixed(
            ours + "transformer_cross_attention_layers.#.",
            layer,
            {**cross, "multihead_attn.out_proj.@": "cross_attn.out_proj.@", "norm.@": "cross_attn_layer_norm.@"},
        ),
        *_prefixed(
            ours + "transformer_ffn_layers.#.",
            layer,
            {"linear1.@": "fc1.@", "linear2.@": "fc2.@", "norm.@": "final_layer_norm.@"},
        ),
        _Rule(ours + "class_embed.@", ("class_predictor.@",)),
        _Rule("criterion.empty_weight", ("criterion.empty_weight",)),
    ]


def _swin_rules() -> list[_Rule]:
    in_memory = _ENCODER + "swin."
    block = "encoder.layers.#.blocks.#."
    same = {
        "patch_embed.proj.@": "embeddings.patch_embeddings.projection.@",
        "patch_embed.norm.@": "embeddings.norm.@",
        "layers.#.downsample.reduction.weight": "encoder.layers.#.downsample.reduction.weight",
        "layers.#.downsample.norm.@": "encoder.layers.#.downsample.norm.@",
        "layers.#.blocks.#.norm1.@": block + "layernorm_before.@",
        "layers.#.blocks.#.norm2.@": block + "layernorm_after.@",
    }
    different = {
        "attn.relative_position_bias_table": (
            "attention.self.relative_position_bias_table",
            "attention.relative_position_bias.relative_position_bias_table",
        ),
        "attn.proj.@": ("attention.output.dense.@", "attention.o_proj.@"),
        "mlp.fc1.@": ("intermediate.dense.@", "mlp.fc1.@"),
        "mlp.fc2.@": ("output.dense.@", "mlp.fc2.@"),
    }
    norms = {f"norm{stage}.@": f"hidden_states_norms.stage{stage + 1}.@" for stage in range(4)}
    return [
        *(_Rule("backbone." + ours, (_ENCODER + theirs,), (in_memory + theirs,)) for ours, theirs in same.items()),
        *(
            _Rule("backbone.layers.#.blocks.#." + ours, (_ENCODER + block + file,), (in_memory + block + memory,))
            for ours, (file, memory) in different.items()
        ),
        _Rule(
            "backbone.layers.#.blocks.#.attn.qkv.@",
            tuple(f"{_ENCODER}{block}attention.self.{part}.@" for part in ("query", "key", "value")),
            tuple(f"{in_memory}{block}attention.{part}_proj.@" for part in "qkv"),
        ),
        *_prefixed("backbone.", _ENCODER, norms),
    ]


def _resnet_rules() -> list[_Rule]:
    rules = {"stem.conv1": "embedder.embedder"}
    for stage in range(4):
        ours, theirs = f"res{stage + 2}.#.", f"encoder.stages.{stage}.layers.#."
        rules[ours + "shortcut"] = theirs + "shortcut"
        rules |= {f"{ours}conv{place + 1}": f"{theirs}layer.{place}" for place in range(3)}
    return [
        rule
        for ours, theirs in rules.items()
        for rule in _prefixed(
            f"backbone.{ours}.", f"{_ENCODER}{theirs}.", {"weight": "convolution.weight", "norm.%": "normalization.%"}
        )
    ]


@cache
def _rules() -> tuple[_Rule, ...]:
    return (*_pixel_decoder_rules(), *_transformer_decoder_rules(), *_swin_rules(), *_resnet_rules())


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile("".join(_PLACEHOLDERS.get(part, re.escape(part)) for part in re.split("([#@%])", template)))


def _filled(template: str, values: Iterable[str]) -> str:
    values = iter(values)
    return "".join(next(values) if part in _PLACEHOLDERS else part for part in re.split("([#@%])", template))


@cache
def _published_patterns() -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    return tuple((_pattern(rule.published), rule.transformers) for rule in _rules())


@cache
def _transformers_patterns() -> tuple[tuple[re.Pattern[str], _Place], ...]:
    return tuple(
        (_pattern(template), _Place(rule.published, part, len(templates)))
        for rule in _rules()
        for templates in (rule.transformers, rule.in_memory)
        for part, template in enumerate(templates)
    )


def _names_in_transformers(name: str) -> tuple[str, ...]:
    """One name, or three, of a published tensor in files of transformers; none if it is not known."""
    for pattern, templates in _published_patterns():
        if found := pattern.fullmatch(name):
            return tuple(_filled(template, found.groups()) for template in templates)
    return ()


def _place_in_published(name: str) -> _Place | None:
    for pattern, place in _transformers_patterns():
        if found := pattern.fullmatch(name):
            return place._replace(name=_filled(place.name, found.groups()))
    return None


_PUBLISHED_INDEX = _pattern("backbone.layers.#.blocks.#.attn.relative_position_index")
_TRANSFORMERS_INDEX = _pattern(f"{_ENCODER}encoder.layers.#.blocks.#.attention.self.relative_position_index")
_TOP_NORM = _pattern(_ENCODER + "swin.layernorm.@")


def _refuse(unknown: Iterable[str], naming: Naming) -> None:
    unknown = list(unknown)
    if unknown:
        rest = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        raise ValueError(f"these are no {naming} names of a Mask2Former: {', '.join(unknown[:10])}{rest}")


# ---- the tensors


def _split(name: str, tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    if count == 1:
        return (tensor,)
    if tensor.dim() == 0 or len(tensor) % count:
        raise ValueError(f"{name} must hold query, key and value of equal size, got shape {tuple(tensor.shape)}")
    return tuple(part.clone() for part in tensor.chunk(count))


def _fused(target: str, names: Sequence[str], tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensors one after the other; an empty name stands for one that is not there."""
    if len(names) == 1:
        return tensors[names[0]]
    present = {name: tensors[name] for name in names if name}
    kinds = {(tensor.shape, tensor.dtype) for tensor in present.values()}
    if len(present) < len(names) or len(kinds) > 1 or () in {shape for shape, _ in kinds}:
        found = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in present.items())
        raise ValueError(f"{target} needs query, key and value of equal shape and type, got {found}")
    return torch.cat(list(present.values()))


def _only_in_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model of transformers has besides these, as it is in a new one."""
    added = {}
    for name in tensors:
        counter = f"{name.removesuffix('running_var')}{_COUNTER}"
        if name.endswith(".running_var") and counter not in tensors:
            added[counter] = torch.zeros((), dtype=torch.int64)
    last = tensors.get(_ENCODER + "hidden_states_norms.stage4.weight")
    if last is not None:
        added[_ENCODER + "swin.layernorm.weight"] = torch.ones_like(last)
        added[_ENCODER + "swin.layernorm.bias"] = torch.zeros_like(last)
    return added


def _indices_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The position index that belongs to each table of a Swin backbone."""
    indices = {}
    for name, tensor in tensors.items():
        if name.endswith(".relative_position_bias_table"):
            width = math.isqrt(len(tensor)) if tensor.dim() == 2 else 0
            if width * width != len(tensor) or width % 2 == 0:
                raise ValueError(f"{name} must have (2 * window - 1)^2 rows, got shape {tuple(tensor.shape)}")
            indices[name.replace("bias_table", "index")] = relative_position_index((width + 1) // 2)
    return indices


def _check_index(name: str, tensor: Tensor) -> None:
    side = math.isqrt(len(tensor)) if tensor.dim() == 2 else 0
    if tensor.shape != (side**2, side**2) or not torch.equal(tensor.cpu(), relative_position_index(side)):
        raise ValueError(f"{name} must be the usual index of a window, which follows from its size, got another")
