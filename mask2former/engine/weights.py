"""The weights that a training starts from, or that are evaluated: MODEL.WEIGHTS."""

import logging
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import nn

from mask2former import finetune
from mask2former.checkpoint import WeightReport, load_weights
from mask2former.config import start_arguments
from mask2former.data import catalog
from mask2former.engine.data import class_names
from mask2former.engine.yaml_files import ConfigError
from mask2former.modeling.backbones.timm_backbone import WEIGHTS_SCHEME
from mask2former.modeling.mask2former import Mask2Former

logger = logging.getLogger(__name__)

_DETECTRON2_FILES = "https://dl.fbaipublicfiles.com/detectron2/"


def load_start(model: Mask2Former, cfg: Any) -> None:
    """Load MODEL.WEIGHTS for a training, see `mask2former.finetune.load_start`, and log what became of each tensor.

    Raises:
        ConfigError: if the file is missing, cannot be read or does not fit, timm's weights cannot be fetched, or
            MODEL.WEIGHTS_DATASET is not known.
    """
    arguments = start_arguments(cfg)
    weights = arguments["weights"]
    if weights is None:
        logger.info("MODEL.WEIGHTS is empty: training starts from random weights")
        return
    names, source_names = class_names(cfg), _names_of(arguments["source_dataset"])
    source = weights if weights.startswith(WEIGHTS_SCHEME) else local_file(weights)
    try:
        report = finetune.load_start(model, source, categories=names, source_categories=source_names)
    except (OSError, ValueError) as error:
        raise ConfigError(f"MODEL.WEIGHTS: {error}") from error
    level = logging.WARNING if report.needs_attention else logging.INFO
    logger.log(level, "MODEL.WEIGHTS %s: %s", weights, report)


def _names_of(dataset: str | None) -> list[str] | None:
    """Names of the classes of a data set; None without one."""
    if dataset is None:
        return None
    try:
        return [category.name for category in catalog.get(dataset).metadata.categories]
    except catalog.UnknownDatasetError as error:
        raise ConfigError(f"MODEL.WEIGHTS_DATASET: {error}") from error


def load_for_evaluation(model: nn.Module, weights: str) -> None:
    """Load all of a model.

    Raises:
        ConfigError: if ``weights`` is empty, the file is missing or cannot be read, or a tensor is missing or has
            another shape, as with another number of classes.
    """
    if not weights:
        raise ConfigError("MODEL.WEIGHTS must name a checkpoint to evaluate, got ''")
    report = _load(model, weights)
    if report.missing or report.mismatched:
        raise ConfigError(f"MODEL.WEIGHTS must be a checkpoint of the model in the config, got {weights}: {report}")


def _load(model: nn.Module, weights: str) -> WeightReport:
    try:
        return load_weights(model, local_file(weights), strict=False)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(f"MODEL.WEIGHTS: {error}") from error


def local_file(weights: str) -> Path:
    """The file that a path or an address means; what has to be fetched is kept in PyTorch's cache.

    Raises:
        ConfigError: if it cannot be fetched.
    """
    for prefix in ("detectron2://", "d2://"):
        if weights.startswith(prefix):
            weights = _DETECTRON2_FILES + weights.removeprefix(prefix)
    if not weights.startswith(("http://", "https://")):
        return Path(weights).expanduser()
    path = Path(torch.hub.get_dir()) / "checkpoints" / "mask2former" / weights.partition("://")[2]
    if not path.is_file():
        logger.info("Fetching %s", weights)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights, str(path), progress=False)
        except (URLError, OSError) as error:
            raise ConfigError(
                f"MODEL.WEIGHTS: {weights} cannot be fetched: {error}; fetch it by other means and set MODEL.WEIGHTS "
                "to the file"
            ) from error
    return path
