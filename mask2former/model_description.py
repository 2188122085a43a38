"""What a model file says about its weights: docs/model_files.md describes the format."""

import inspect
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from mask2former.build import Architecture
from mask2former.data.catalog import Category
from mask2former.modeling.mask2former import Mask2Former

Task = Literal["panoptic", "instance", "semantic"]
TASKS: tuple[Task, ...] = get_args(Task)

_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """How a model predicts, apart from its weights.

    Attributes:
        tasks: what it is good for; the first is the default.
        shortest, longest: size of the resized image, as in `ResizeShortestEdge`.
        object_mask_threshold, overlap_threshold: of panoptic segmentation, see `panoptic_segmentation`.
        top_k, score_threshold, matrix_nms_sigma: of instance segmentation, see `instance_segmentation`.
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
    matrix_nms_sigma: float = 0.0
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
        if not 0 <= self.matrix_nms_sigma < float("inf"):
            raise ValueError(f"matrix_nms_sigma must be finite and not negative, got {self.matrix_nms_sigma}")


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a model file says about its weights.

    Attributes:
        architecture: what `build_model` takes; plain values. Its "input" is completed: the mean, standard
            deviation and channel order of the images stand in every model file, also where they are the defaults.
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
        if "input" in self.architecture:
            completed = {"image_format": "RGB", **_input_defaults(), **self.architecture["input"]}
            object.__setattr__(self, "architecture", {**self.architecture, "input": completed})
        for name in ("architecture", "notes"):
            try:  # tuples become lists, as they are when the description is read back
                plain = json.loads(json.dumps(getattr(self, name), allow_nan=False))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} must hold plain values that JSON can store: {error}") from error
            object.__setattr__(self, name, plain)

    @property
    def image_format(self) -> str:
        """Channel order of the images that the model takes, "RGB" or "BGR"."""
        return str(self.architecture["input"]["image_format"])

    def to_json(self) -> str:
        """As it stands in model files."""
        document = {"version": _FORMAT_VERSION, **asdict(self)}
        document["categories"] = [category._asdict() for category in self.categories]
        return json.dumps(document, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "ModelDescription":
        """From what `to_json` gives.

        Raises:
            ValueError: if it is no description, or one of another version; says why.
        """
        try:
            return cls._from_document(json.loads(text))
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from error
        except RecursionError as error:
            raise ValueError("its values are nested too deeply") from error
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(str(error)) from error

    @classmethod
    def _from_document(cls, document: Any) -> "ModelDescription":
        if document["version"] != _FORMAT_VERSION:
            raise ValueError(
                f"its version must be {_FORMAT_VERSION}, got {document['version']!r}; another release wrote it"
            )
        settings = {**document["settings"], "tasks": tuple(document["settings"]["tasks"])}
        return cls(
            architecture=document["architecture"],
            categories=tuple(
                Category(id=c["id"], name=c["name"], is_thing=c["is_thing"], color=tuple(c["color"]))
                for c in document["categories"]
            ),
            settings=PredictionSettings(**settings),
            notes=document["notes"],
        )


def _input_defaults() -> dict[str, Any]:
    """How the model treats images if its architecture does not say."""
    parameters = inspect.signature(Mask2Former).parameters
    return {name: parameters[name].default for name in ("pixel_mean", "pixel_std", "size_divisibility")}



def check_threshold(name: str, value: float) -> None:
    """Raise ValueError unless the value is in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
