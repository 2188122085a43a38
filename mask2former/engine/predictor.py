"""From a config and its checkpoint to a core `Predictor` or a model file."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mask2former import config
from mask2former.build import Architecture, build_model
from mask2former.checkpoint import ModelDescription, save_model_file
from mask2former.data import Category
from mask2former.engine.data import dataset_entries
from mask2former.engine.weights import load_for_evaluation
from mask2former.engine.yaml_files import ConfigError
from mask2former.inference import prediction_settings
from mask2former.modeling.mask2former import Mask2Former
from mask2former.predictor import Predictor


def predictor_from_config(cfg: Any) -> Predictor:
    """Build the model, load MODEL.WEIGHTS and take names and colours of the classes from the catalog.

    Raises:
        ConfigError: if the weights do not fit, or no data set of the config has as many classes as the model.
    """
    architecture, model = _load_model(cfg)
    return Predictor(
        model,
        categories=_categories(cfg),
        image_format=architecture["input"]["image_format"],
        device=cfg.MODEL.DEVICE,
        **asdict(prediction_settings(cfg)),
    )


def export_model(
    cfg: Any, path: str | Path, *, dtype: torch.dtype = torch.float16, notes: Mapping[str, Any] | None = None
) -> ModelDescription:
    """Write the model of a config and its MODEL.WEIGHTS as a model file, which needs no config to be used.

    Args:
        cfg: config.
        path: of the file.
        dtype: of the stored weights, `torch.float16` or `torch.float32`.
        notes: for people, such as the training command; plain values.

    Raises:
        ConfigError: as `predictor_from_config`.
    """
    architecture, model = _load_model(cfg)
    description = ModelDescription(
        architecture=architecture,
        categories=_categories(cfg),
        settings=prediction_settings(cfg),
        notes=dict(notes or {}),
    )
    save_model_file(path, model, description, dtype=dtype)
    return description


def _load_model(cfg: Any) -> tuple[Architecture, Mask2Former]:
    architecture = config.architecture_arguments(cfg)
    model = build_model(architecture)
    load_for_evaluation(model, cfg.MODEL.WEIGHTS)
    return architecture, model


def _categories(cfg: Any) -> tuple[Category, ...]:
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        for entry in dataset_entries(cfg, key):
            if entry.metadata.num_classes == classes:
                return entry.metadata.categories
    raise ConfigError(f"DATASETS must name a data set of {classes} classes, MODEL.SEM_SEG_HEAD.NUM_CLASSES, got none")
