"""From a Detectron2 config and its checkpoint to a core `Predictor` or a model file."""

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from mask2former.checkpoint import ModelDescription
from mask2former.configured_model import ConfiguredModel
from mask2former.d2.data import dataset_metadata, is_thing_of
from mask2former.d2.trainer import Trainer
from mask2former.data import Category
from mask2former.predictor import Predictor


def configured_model(cfg: Any) -> ConfiguredModel:
    """Build the model, load MODEL.WEIGHTS and take names and colours of the classes from the data set's metadata.

    Raises:
        ValueError: if MODEL.WEIGHTS is empty, or the metadata do not name as many classes as the model has.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS must name a checkpoint to predict with, got ''")
    model = Trainer.build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    categories = categories_of(dataset_metadata(model.dataset_name), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    return ConfiguredModel(cfg=cfg, model=model, categories=categories)


def predictor_from_config(cfg: Any) -> Predictor:
    """See `configured_model`."""
    return configured_model(cfg).predictor()


def export_model(cfg: Any, path: str | Path, **options: Any) -> ModelDescription:
    """See `configured_model` and `ConfiguredModel.export`."""
    return configured_model(cfg).export(path, **options)


def categories_of(metadata: Any, num_classes: int) -> tuple[Category, ...]:
    """The categories that a data set's metadata describe, by contiguous id.

    Raises:
        ValueError: if they are not as many as the model has classes.
    """
    kind = "stuff" if len(getattr(metadata, "stuff_classes", ())) == num_classes else "thing"
    names = list(getattr(metadata, f"{kind}_classes", ()))
    if len(names) != num_classes:
        raise ValueError(
            f"data set {metadata.name!r} must name MODEL.SEM_SEG_HEAD.NUM_CLASSES = {num_classes} classes, got "
            f"{len(names)}"
        )
    colors = getattr(metadata, f"{kind}_colors", [(128, 128, 128)] * num_classes)
    ids = {v: k for k, v in getattr(metadata, f"{kind}_dataset_id_to_contiguous_id", {}).items()}
    has_things = hasattr(metadata, "thing_dataset_id_to_contiguous_id")
    is_thing = is_thing_of(metadata, num_classes) if has_things else [kind == "thing"] * num_classes
    return tuple(
        Category(id=ids.get(i, i), name=names[i], is_thing=is_thing[i], color=tuple(colors[i]))
        for i in range(num_classes)
    )
