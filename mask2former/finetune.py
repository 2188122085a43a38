"""Starts a training from the weights of another one, which may have had other classes or another number of queries."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mask2former.checkpoint import category_names, match_names, shortened, state_for
from mask2former.modeling.backbones.timm_backbone import WEIGHTS_SCHEME, pretrained_weights
from mask2former.modeling.mask2former import Mask2Former
from mask2former.weight_files import read_safetensors, read_weights

OWN_ENTRY = "mask2former"
"""What training checkpoints hold under this name is this project's own; its "categories" are names of classes."""

_CLASS_HEAD = tuple(f"sem_seg_head.predictor.class_embed.{name}" for name in ("weight", "bias"))
_QUERIES = tuple(f"sem_seg_head.predictor.query_{name}.weight" for name in ("feat", "embed"))
_FROM_CONFIG = ("criterion.empty_weight",)  # the weight of "no object": a setting that stands in checkpoints


class PartOf(NamedTuple):
    """A tensor of the model that has some rows of the file's.

    Attributes:
        name: of the tensor.
        copied: number of rows from the file.
        rows: of the tensor; the others are as they were.
    """

    name: str
    copied: int
    rows: int


@dataclass(frozen=True)
class CategoryReport:
    """What became of the classes.

    Attributes:
        kept: names of the model's classes that the file knows, too.
        new: those that it does not; None for a class without a name.
        dropped: names of classes in the file only.
    """

    kept: tuple[str, ...]
    new: tuple[str | None, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class StartReport:
    """What became of every tensor. Each of the model's is in exactly one of the first five, under its own name.

    Attributes:
        copied: from the file.
        part_copied: rows of the classes whose names match, and of "no object".
        reinitialised: in the file, but made for other classes or queries; as they were, random. With the reason.
        from_config: a setting that stands in checkpoints; the config's value is kept.
        missing: not in the file; as they were.
        unused: in the file only.
        categories: None where classes were not matched by their names.
        note: what else the user should know of the class head; empty if nothing.
    """

    copied: tuple[str, ...]
    part_copied: tuple[PartOf, ...]
    reinitialised: dict[str, str]
    from_config: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    categories: CategoryReport | None
    note: str

    @property
    def needs_attention(self) -> bool:
        """Whether anything of the model is not from the file, or was copied on an assumption."""
        return bool(self.part_copied or self.reinitialised or self.missing or self.note)

    def __str__(self) -> str:
        parts = [f"{part.name} ({part.copied} of {part.rows} rows)" for part in self.part_copied]
        reasons = [f"{name} ({reason})" for name, reason in self.reinitialised.items()]
        lines = [f"{len(self.copied)} tensors copied: {_grouped(self.copied)}"]
        for names, title in (
            (parts, "copied by category names"),
            (reasons, "re-initialised"),
            (self.from_config, "set by the config"),
        ):
            if names:
                lines.append(f"{len(names)} {title}: {', '.join(names)}")
        for names, title in ((self.missing, "not in the file, re-initialised"), (self.unused, "in the file only")):
            if names:
                lines.append(f"{len(names)} {title}: {_grouped(names)}")
        if self.categories is not None:
            lines += _category_lines(self.categories)
        if self.note:
            lines.append(self.note)
        return "\n  ".join(lines)


def load_start(
    model: Mask2Former,
    source: str | Path | Mapping[str, Any],
    *,
    categories: Sequence[str | None] | None = None,
    source_categories: Sequence[str | None] | None = None,
) -> StartReport:
    """Copy weights into a model that is to be trained.

    Rows of the class head are copied by category name where both sides have names; upper and lower case, spaces,
    hyphens and underscores make no difference, and of several classes of one name the first belongs to the first. The
    row of "no object" goes with them. Without names a head of as many classes is copied as it is, another one not at
    all. Another number of queries re-initialises the learned queries. Everything else must fit or be missing.

    Args:
        model: freshly built; what is not copied stays as it is.
        source: as of `mask2former.checkpoint.load_weights`; or ``timm://`` and the name of a model of timm, for the
            weights that timm publishes.
        categories: names of the model's K classes, None for a class that has none; None: not known.
        source_categories: names of the classes that the weights were trained on (MODEL.WEIGHTS_DATASET); None: those
            that the file has itself, if it has any.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read as weights, has no tensor that the model could take, or a tensor has a
            shape for which there is no rule above; or if there is not one name for each class. The model is as it
            was then.
        OSError: if timm's weights cannot be fetched.
        ModuleNotFoundError: if they are wanted, and timm is not installed.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    content, own_names = _read(source)
    renamed = state_for(model, content, where)[1]
    found, surplus = match_names(model, renamed.tensors)
    unused = (*surplus, *renamed.unused)
    state = model.state_dict()
    _refuse_other_shapes(found, state, where)
    names = own_names if source_categories is None else source_categories
    head = _plan_head(found, state, categories, names, where)
    matched: dict[str, Tensor] = {}
    reinitialised: dict[str, str] = {}
    parts: list[PartOf] = []
    for name, tensor in found.items():
        own = state[name]
        if name in _FROM_CONFIG:
            continue
        if name in _CLASS_HEAD and head.rows is None:
            reinitialised[name] = head.reason
        elif name in _CLASS_HEAD and head.rows != _same_rows(tensor, own):
            matched[name] = _with_rows(own, tensor, head.rows or ())
            parts.append(PartOf(name, len(head.rows or ()), len(own)))
        elif tensor.shape == own.shape:
            matched[name] = tensor
        else:
            reinitialised[name] = f"{len(tensor)} queries in the file, {len(own)} in the model"
    if not matched:
        raise ValueError(f"{where} has no tensor that the model could take, only {_grouped(unused or found)}")
    model.load_state_dict(matched, strict=False)
    return StartReport(
        copied=tuple(name for name in state if name in matched and name not in {part.name for part in parts}),
        part_copied=tuple(parts),
        reinitialised=reinitialised,
        from_config=tuple(name for name in _FROM_CONFIG if name in state),
        missing=tuple(name for name in state if name not in found and name not in _FROM_CONFIG),
        unused=unused,
        categories=head.categories,
        note=head.note,
    )


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], Sequence[str | None] | None]:
    """A state dict, perhaps wrapped, and the names of its classes where they are known."""
    if isinstance(source, str) and source.startswith(WEIGHTS_SCHEME):
        return pretrained_weights(source.removeprefix(WEIGHTS_SCHEME)), None
    if isinstance(source, str | Path) and Path(source).suffix == ".safetensors":
        tensors, metadata = read_safetensors(Path(source))
        return tensors, category_names(metadata, str(source))
    content = source if isinstance(source, Mapping) else read_weights(Path(source))
    own = content.get(OWN_ENTRY)
    names = own.get("categories") if isinstance(own, Mapping) else None
    return content, names if isinstance(names, list) else None


def _refuse_other_shapes(found: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    wrong = []
    for name, tensor in found.items():
        first = 1 if name in _CLASS_HEAD + _QUERIES + _FROM_CONFIG else 0  # their number of rows may differ
        own = state[name]
        if tensor.dim() != own.dim() or tensor.shape[first:] != own.shape[first:]:
            wrong.append(f"{name} {tuple(tensor.shape)} in the file, {tuple(own.shape)} in the model")
    if wrong:
        rest = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"{where} was made for another architecture, of which no tensor is left out silently: "
            f"{'; '.join(wrong[:5])}{rest}. Set the config as that of the weights, or remove these from the file"
        )


class _HeadPlan(NamedTuple):
    """Which (row of the model, row of the file) of the class head are equal; None: none is, with the reason."""

    rows: tuple[tuple[int, int], ...] | None
    reason: str = ""
    categories: CategoryReport | None = None
    note: str = ""


def _plan_head(
    found: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    names: Sequence[str | None] | None,
    source_names: Sequence[str | None] | None,
    where: str,
) -> _HeadPlan:
    head = next((name for name in _CLASS_HEAD if name in found), None)
    if head is None:
        return _HeadPlan(None)
    count, source_count = len(state[head]) - 1, len(found[head]) - 1  # without "no object"
    if names is not None and source_names is not None:
        if len(names) != count:
            raise ValueError(f"categories must be one for each of the model's {count} classes, got {len(names)}")
        if len(source_names) != source_count:
            raise ValueError(
                f"MODEL.WEIGHTS_DATASET must name a data set of the {source_count} classes of {where}, "
                f"got one of {len(source_names)}"
            )
        return _plan_by_names(names, source_names)
    unknown = "of the weights' classes are not known: MODEL.WEIGHTS_DATASET can name their data set"
    if source_names is not None:
        unknown = "of the model's classes are not known: the data set has none"
    if count != source_count:
        return _HeadPlan(None, f"{source_count} classes in the file, {count} in the model, and the names {unknown}")
    note = f"class head: taken to have the same classes in the same order, for the names {unknown}"
    return _HeadPlan(tuple((row, row) for row in range(count + 1)), note=note)


def _plan_by_names(names: Sequence[str | None], source_names: Sequence[str | None]) -> _HeadPlan:
    places = {key: place for place, key in enumerate(_keys(source_names)) if key is not None}
    rows = [(row, places[key]) for row, key in enumerate(_keys(names)) if key in places]
    wanted, taken = {row for row, _ in rows}, {place for _, place in rows}
    categories = CategoryReport(
        kept=tuple(str(names[row]) for row, _ in rows),
        new=tuple(name for row, name in enumerate(names) if row not in wanted),
        dropped=tuple(str(name) for place, name in enumerate(source_names) if place not in taken),
    )
    if not rows:  # without a class that it was trained against, the row of "no object" means nothing either
        return _HeadPlan(None, "no category name in common", categories)
    return _HeadPlan((*rows, (len(names), len(source_names))), categories=categories)


def _keys(names: Sequence[str | None]) -> list[tuple[str, int] | None]:
    """What is equal for equal categories: the name without its spelling, and how often it was there before."""
    seen: Counter[str] = Counter()
    keys: list[tuple[str, int] | None] = []
    for name in names:
        plain = None if name is None else re.sub(r"[\s_-]+", " ", name).strip().casefold()
        keys.append(None if plain is None else (plain, seen[plain]))
        if plain is not None:
            seen[plain] += 1
    return keys


def _same_rows(tensor: Tensor, own: Tensor) -> tuple[tuple[int, int], ...] | None:
    """The plan of a tensor that is copied whole; None if it has another number of rows."""
    return tuple((row, row) for row in range(len(own))) if tensor.shape == own.shape else None


def _with_rows(own: Tensor, tensor: Tensor, rows: Iterable[tuple[int, int]]) -> Tensor:
    """The model's tensor with rows of the file's."""
    to, of = (torch.tensor(column) for column in zip(*rows, strict=True))
    return own.clone().index_copy_(0, to.to(own.device), tensor[of].to(own))


def _grouped(names: Iterable[str]) -> str:
    """Few names as they are; many by the parts of the model, with their numbers."""
    names = list(names)
    if len(names) <= 4:
        return ", ".join(names) or "none"
    parts = Counter(".".join(name.split(".")[: 2 if name.startswith("sem_seg_head.") else 1]) for name in names)
    return ", ".join(f"{part} ({count})" for part, count in parts.items())


def _category_lines(categories: CategoryReport) -> list[str]:
    new = [name or "one without a name" for name in categories.new]
    groups = (("kept", categories.kept), ("new", new), ("in the file only", categories.dropped))
    return [f"{len(names)} categories {title}: {shortened(names)}" for title, names in groups if names]
