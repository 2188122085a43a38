"""From a config and its checkpoint to a core `Predictor` or a model file."""

from pathlib import Path
from typing import Any

from mask2former import config
from mask2former.build import build_model
from mask2former.checkpoint import ModelDescription
from mask2former.configured_model import ConfiguredModel
from mask2former.data import Category
from mask2former.engine.data import dataset_entries
from mask2former.engine.weights import load_for_evaluation
from mask2former.engine.yaml_files import ConfigError
from mask2former.predictor import Predictor


def configured_model(cfg: Any) -> ConfiguredModel:
    """Build the model, load MODEL.WEIGHTS and take names and colours of the classes from the catalog.

    Raises:
        ConfigError: if the weights do not fit, or no data set of the config has as many classes as the model.
    """
    model = build_model(config.architecture_arguments(cfg), **config.precision_arguments(cfg))
    load_for_evaluation(model, cfg.MODEL.WEIGHTS)
    return ConfiguredModel(cfg=cfg, model=model, categories=_categories(cfg))


def predictor_from_config(cfg: Any) -> Predictor:
    """See `configured_model`."""
    return configured_model(cfg).predictor()


def export_model(cfg: Any, path: str | Path, **options: Any) -> ModelDescription:
    """See `configured_model` and `ConfiguredModel.export`."""
    return configured_model(cfg).export(path, **options)


def _categories(cfg: Any) -> tuple[Category, ...]:
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        for entry in dataset_entries(cfg, key):
            if entry.metadata.num_classes == classes:
                return entry.metadata.categories
    raise ConfigError(f"DATASETS must name a data set of {classes} classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES, got none")
