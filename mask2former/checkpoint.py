"""Model files, which hold everything that prediction needs, and weights from elsewhere."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mask2former.atomic_files import atomic_file, write_atomically
from mask2former.build import Architecture, build_model
from mask2former.model_description import TASKS, ModelDescription, PredictionSettings, Task, check_threshold
from mask2former.modeling.mask2former import Mask2Former
from mask2former.weight_files import WEIGHT_SUFFIXES, read_safetensors, read_weights, state_dict_of, write_weights
from mask2former.weight_names import Naming, Renamed, check_naming, naming_of, to_published, to_transformers

__all__ = [
    "METADATA_KEY",
    "TASKS",
    "ModelDescription",
    "PredictionSettings",
    "ShapeMismatch",
    "Task",
    "WeightReport",
    "atomic_file",
    "category_names",
    "check_threshold",
    "load_model_file",
    "load_weights",
    "match_names",
    "save_model_file",
    "save_weights",
    "shortened",
    "state_for",
    "write_atomically",
]

# One name for all metadata: safetensors stores several in random order, but equal models give equal files.
METADATA_KEY = "mask2former"

_OF_TIMM = "backbone.model."  # where a backbone of timm has timm's names


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
        unused: in the file only, but no model computes anything with them; names of the file.
        naming: whose names the file has.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[ShapeMismatch, ...]
    unused: tuple[str, ...] = ()
    naming: Naming = "published"

    @property
    def complete(self) -> bool:
        """Whether every tensor of the model was loaded and none of the file was left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors fit"]
        if self.naming != "published":
            lines[0] += f", renamed from the names of {self.naming}"
        shapes = [f"{m.name} {m.in_file} in the file, {m.in_model} in the model" for m in self.mismatched]
        for title, names, limit in (
            ("not in the file", self.missing, 20),
            ("not in the model", self.unexpected, 20),
            ("of another shape", shapes, 20),
            ("left out, which no model here has and needs", self.unused, 3),
        ):
            if names:
                lines.append(f"{len(names)} {title}: {shortened(names, limit)}")
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
    metadata = {METADATA_KEY: description.to_json()}
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
        ValueError: if it is no model file, is damaged or has another version, or its backbone is one of timm, which
            is not installed; names the file.
    """
    tensors, metadata = _read_model_file(Path(path))
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors but no description of a model; to put them into a model that you built, "
            "use mask2former.checkpoint.load_weights"
        )
    try:
        description = ModelDescription.from_json(metadata[METADATA_KEY])
        with _AtMost(2 * sum(tensor.numel() for tensor in tensors.values()) + 100_000):
            model = _build(description.architecture)
        matched, report = _fit(model, tensors)
    except (ArithmeticError, LookupError, ModuleNotFoundError, RuntimeError, TypeError, ValueError) as error:
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
    if METADATA_KEY not in metadata:
        return None
    try:
        return tuple(category.name for category in ModelDescription.from_json(metadata[METADATA_KEY]).categories)
    except ValueError as error:
        raise ValueError(f"{where} has a description that cannot be used: {error}") from error


def save_weights(model: nn.Module, path: str | Path, names: Naming = "published") -> None:
    """Write the weights of a model, without a description, for Detectron2, transformers or others.

    The file appears complete or not at all; an older one is replaced. `load_weights` gives the same bits back.

    Args:
        model: on any device; not changed.
        path: what to write: ``.safetensors``, ``.pth`` as of `torch.save`, or ``.pkl`` as Detectron2 publishes them.
        names: "published", which are those of Detectron2, or "transformers", for `from_pretrained` of
            Mask2FormerForUniversalSegmentation, which takes safetensors and needs a configuration besides.

    Raises:
        ValueError: if the ending of the path or ``names`` is another, or the model has a tensor without a name in
            transformers.
        OSError: if the file cannot be written.
    """
    check_naming(names)
    state = model.state_dict()
    write_weights(path, state if names == "published" else to_transformers(state).tensors, naming=names)


def load_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], *, strict: bool = True
) -> WeightReport:
    """Copy weights into a model.

    A wrapping ``{"model": ...}`` and a leading ``module.`` of all names are taken off. Names are the published ones,
    which are also Detectron2's; those of transformers' Mask2FormerForUniversalSegmentation, which are recognised and
    translated; or those of the first published releases. A backbone's own weights go into ``model.backbone``, or into
    the whole model if the file has Detectron2's mark (``matching_heuristics``); those of a model of timm go into the
    timm backbone.

    Args:
        model: a model or a part of one.
        source: a `.pkl` file of Detectron2, a `.safetensors` file, the `.index.json` of several files of transformers,
            any other file as of `torch.save`, or a state dict.
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
    naming, renamed = state_for(model, content, where)
    matched, report = _fit(model, renamed.tensors)
    report = replace(report, unused=renamed.unused, naming=naming)
    if strict and not report.complete:
        raise ValueError(f"{where} does not fit the model:\n  {report}")
    if not report.loaded:
        raise ValueError(f"{where} has no tensor that the model could take:\n  {report}")
    model.load_state_dict(matched, strict=False)
    return report


def state_for(model: nn.Module, content: Mapping[str, Any], where: str) -> tuple[Naming, Renamed]:
    """The state dict in what `read_weights` gives, under published names.

    Returns:
        Whose names they were; and the tensors, a backbone's own weights under their names in the model.

    Raises:
        ValueError: as `state_dict_of` and `to_published`; names the source, ``where``.
    """
    state = state_dict_of(content, where)
    known = model.state_dict().keys()
    naming = naming_of(state)
    if naming == "transformers":
        try:
            return naming, to_published(state, known)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    for prefix in ("backbone.", _OF_TIMM) if content.get("matching_heuristics") else (_OF_TIMM,):
        state = {f"{prefix}{name}" if f"{prefix}{name}" in known else name: t for name, t in state.items()}
    return naming, Renamed(state, ())


def _read_model_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_safetensors(path)
    except ValueError as error:
        if path.is_file() and path.suffix != ".safetensors" and path.suffix in WEIGHT_SUFFIXES:
            raise ValueError(
                f"{path} is no model file, which ends with .safetensors; `python -m mask2former export` makes one "
                "of a checkpoint and its config"
            ) from error
        raise


class _AtMost(TorchFunctionMode):
    """Ends the building of a model with more numbers than its file can fill: it might take all memory."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._left = numbers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.ones, torch.zeros) and not result.is_meta:
            self._left -= result.numel()  # memory that nobody has written to is not taken yet
            if self._left < 0:
                raise ValueError("it describes a larger model than the file holds")
        return result


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
