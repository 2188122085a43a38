"""Model files, which hold everything that prediction needs, and weights from elsewhere."""

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import safetensors.torch
import torch
from torch import Tensor, nn

from mask2former.build import Architecture, build_model
from mask2former.data.catalog import Category
from mask2former.modeling.mask2former import Mask2Former
from mask2former.weight_files import read_safetensors, read_weights, state_dict_of

Task = Literal["panoptic", "instance", "semantic"]
TASKS: tuple[Task, ...] = get_args(Task)

# One name for all metadata: safetensors stores several in random order, but equal models give equal files.
_METADATA_KEY = "mask2former"
_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """How a model predicts, apart from its weights.

    Attributes:
        tasks: what it is good for; the first is the default.
        shortest, longest: size of the resized image, as in `ResizeShortestEdge`.
        object_mask_threshold, overlap_threshold: of panoptic segmentation, see `panoptic_segmentation`.
        top_k, score_threshold: of instance segmentation, see `instance_segmentation`.
        semantic_resize_first: of semantic segmentation, see `semantic_segmentation`.

    Raises:
        ValueError: if a value is out of its range.
    """

    tasks: tuple[Task, ...] = TASKS
    shortest: int = 800
    longest: int = 1333
    object_mask_threshold: float = 0.8
    overlap_threshold: float = 0.8
    top_k: int = 100
    score_threshold: float = 0.0
    semantic_resize_first: bool = True

    def __post_init__(self) -> None:
        if not self.tasks or not set(self.tasks) <= set(TASKS):
            raise ValueError(f"tasks must be some of {', '.join(TASKS)}, got {self.tasks!r}")
        for name, minimum in (("shortest", 0), ("longest", 1), ("top_k", 1)):
            value = getattr(self, name)
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        for name in ("object_mask_threshold", "overlap_threshold", "score_threshold"):
            check_threshold(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a model file says about its weights.

    Attributes:
        architecture: what `build_model` takes; plain values.
        categories: of the K classes, in the order of the contiguous ids.
        settings: how the model predicts.
        notes: anything else for people, such as the training command; plain values.

    Raises:
        ValueError: if there is not one category a class, or a value is not plain.
    """

    architecture: Architecture
    categories: tuple[Category, ...]
    settings: PredictionSettings = field(default_factory=PredictionSettings)
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_classes = self.architecture.get("transformer_decoder", {}).get("num_classes")
        if num_classes != len(self.categories):
            raise ValueError(
                f"categories must hold one category for each of the {num_classes} classes of "
                f"architecture['transformer_decoder'], got {len(self.categories)}"
            )
        for name in ("architecture", "notes"):
            try:  # tuples become lists, as they are when the description is read back
                plain = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} must hold plain values that JSON can store: {error}") from error
            object.__setattr__(self, name, plain)

    @property
    def image_format(self) -> str:
        """Channel order of the images that the model takes, "RGB" or "BGR"."""
        return str(self.architecture["input"].get("image_format", "RGB"))


class ShapeMismatch(NamedTuple):
    """A tensor that has one shape in the file and another in the model."""

    name: str
    in_file: tuple[int, ...]
    in_model: tuple[int, ...]


@dataclass(frozen=True)
class WeightReport:
    """What became of the tensors of model and file; names are those of the model where it has the tensor.

    Attributes:
        loaded: copied into the model.
        missing: in the model only; as they were.
        unexpected: in the file only.
        mismatched: in both, with different shapes; as they were.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[ShapeMismatch, ...]

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model was loaded and none of the file was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors fit"]
        shapes = [f"{m.name} {m.in_file} in the file, {m.in_model} in the model" for m in self.mismatched]
        for title, names in (
            ("not in the file", self.missing),
            ("not in the model", self.unexpected),
            ("of another shape", shapes),
        ):
            if names:
                lines.append(f"{len(names)} {title}: {shortened(names)}")
        return "\n  ".join(lines)


def save_model_file(
    path: str | Path,
    model: Mask2Former,
    description: ModelDescription,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a model file: safetensors, with the description as JSON in its metadata.

    The file appears complete or not at all; an older one is replaced. Equal models give equal bytes.

    Args:
        path: the file, in an existing folder.
        model: on any device; not changed.
        description: of this model.
        dtype: of the stored weights, float32 or float16. Integers stay as they are, and so do tensors with
            values beyond the range of float16.

    Raises:
        ValueError: if dtype is another, the description is that of another model, or a weight is not finite.
        OSError: if the file cannot be written.
    """
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype}")
    state = model.state_dict()
    report = _fit(_build(description.architecture), state)[1]
    if not report.complete:
        raise ValueError(f"description.architecture must be that of the model, got another:\n  {report}")
    tensors = {name: _stored(name, tensor, dtype) for name, tensor in state.items()}
    document = {"version": _FORMAT_VERSION, **asdict(description)}
    document["categories"] = [category._asdict() for category in description.categories]
    metadata = {_METADATA_KEY: json.dumps(document, ensure_ascii=False)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_model_file(
    path: str | Path, device: str | torch.device = "cpu"
) -> tuple[Mask2Former, ModelDescription]:
    """Read a model file.

    Args:
        path: a file from `save_model_file`.
        device: where to put the model.

    Returns:
        The model, in evaluation mode and float32, and its description.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no model file, is damaged or has another version; names the file.
    """
    tensors, metadata = read_safetensors(Path(path))
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors but no description of a model; to put them into a model that you built, "
            "use mask2former.checkpoint.load_weights"
        )
    try:
        description = _parse_description(metadata[_METADATA_KEY])
        model = _build(description.architecture)
        matched, report = _fit(model, tensors)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} has a description that cannot be used: {reason}") from error
    if not report.complete:
        raise ValueError(f"{path} holds weights that do not fit its own description:\n  {report}")
    model.load_state_dict(matched)
    return model.eval().to(device), description


def category_names(metadata: Mapping[str, str], where: str) -> tuple[str, ...] | None:
    """Names of the classes of a model file, from its metadata; None for another safetensors file.

    Raises:
        ValueError: if the description cannot be used; names the file, ``where``.
    """
    if _METADATA_KEY not in metadata:
        return None
    try:
        return tuple(category.name for category in _parse_description(metadata[_METADATA_KEY]).categories)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{where} has a description that cannot be used: {error}") from error


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], *, strict: bool = True
) -> WeightReport:
    """Copy weights into a model.

    A wrapping ``{"model": ...}`` and a leading ``module.`` of all names are taken off. Names of the first
    published releases are understood by the model itself. A backbone's own weights go into
    ``model.backbone``, or into the whole model if the file has Detectron2's mark (``matching_heuristics``).

    Args:
        model: a model or a part of one.
        source: a `.pkl` file of Detectron2, a `.safetensors` file, any other file as of `torch.save`, or a
            state dict.
        strict: every tensor of the model must be in the file, with its shape, and no other. Otherwise those
            that do not fit keep their values.

    Returns:
        What was loaded and what was not.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, holds anything but numbers and plain containers, or does not
            fit: not entirely when strict, in no tensor otherwise. The model is as it was then.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_weights(Path(source))
    matched, report = _fit(model, state_for(model, content, where))
    if strict and not report.complete:
        raise ValueError(f"{where} does not fit the model:\n  {report}")
    if not report.loaded:
        raise ValueError(f"{where} has no tensor that the model could take:\n  {report}")
    model.load_state_dict(matched, strict=False)
    return report


def state_for(model: nn.Module, content: Mapping[str, Any], where: str) -> dict[str, Tensor]:
    """The state dict in what `read_weights` gives; a backbone's own weights under their names in the model.

    Raises:
        ValueError: as `state_dict_of`.
    """
    state = state_dict_of(content, where)
    if not content.get("matching_heuristics"):
        return state
    known = model.state_dict().keys()
    return {f"backbone.{name}" if f"backbone.{name}" in known else name: t for name, t in state.items()}


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(data)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write to that appears complete or not at all, also when the power fails; an older one is replaced.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


def _flush_folder(folder: Path) -> None:
    """Make a rename last; where folders cannot be opened, as on Windows, the system does it in its own time."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_threshold(name: str, value: float) -> None:
    """Raise ValueError unless the value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def _build(architecture: Architecture) -> Mask2Former:
    """Build without a trace in the caller's random numbers."""
    with torch.random.fork_rng(devices=[]):
        return build_model(architecture)


def _stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.detach().cpu().contiguous()
    if not tensor.isfinite().all():
        raise ValueError(f"the model's weights must be finite, got inf or nan in {name}")
    stored = tensor.detach().to("cpu", dtype)
    return (stored if stored.isfinite().all() else tensor.detach().to("cpu", torch.float32)).contiguous()


def _parse_description(text: str) -> ModelDescription:
    """From JSON; AttributeError, LookupError, TypeError or ValueError if it is no description."""
    document = json.loads(text)
    if document["version"] != _FORMAT_VERSION:
        raise ValueError(
            f"its version must be {_FORMAT_VERSION}, got {document['version']!r}; another release wrote it"
        )
    settings = {**document["settings"], "tasks": tuple(document["settings"]["tasks"])}
    return ModelDescription(
        architecture=document["architecture"],
        categories=tuple(
            Category(id=c["id"], name=c["name"], is_thing=c["is_thing"], color=tuple(c["color"]))
            for c in document["categories"]
        ),
        settings=PredictionSettings(**settings),
        notes=document["notes"],
    )


def _fit(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], WeightReport]:
    """Which tensors fit the model, under the model's own names; the model is not changed."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found, unexpected = match_names(model, state)
    matched = {name: tensor for name, tensor in found.items() if tensor.shape == shapes[name]}
    return matched, WeightReport(
        loaded=tuple(n for n in shapes if n in matched),
        missing=tuple(n for n in shapes if n not in found),
        unexpected=unexpected,
        mismatched=tuple(
            ShapeMismatch(n, tuple(t.shape), shapes[n]) for n, t in found.items() if n not in matched
        ),
    )


def match_names(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Which tensors belong to the model, whatever their shapes.

    Only the modules' own loading code knows legacy names. So it runs, and hooks take each tensor out after
    the renaming and before the copy. The model is not changed.

    Returns:
        The tensors by the model's own names, and the names of those that it does not have.
    """
    own = model.state_dict().keys()
    found: dict[str, Tensor] = {}

    def take(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
        for name in [n for n in state_dict if n in own and n.startswith(prefix) and "." not in n[len(prefix) :]]:
            found[name] = state_dict.pop(name)

    # without the underscore from PyTorch 2.5 on
    hooks = [module._register_load_state_dict_pre_hook(take, with_module=True) for module in model.modules()]
    try:
        unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    finally:
        for hook in hooks:
            hook.remove()
    return found, tuple(unexpected)


def shortened(names: Iterable[str], limit: int = 20) -> str:
    """The first names of a list for a message, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
