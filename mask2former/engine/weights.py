"""The weights that a training starts from, or that are evaluated: MODEL.WEIGHTS."""

import logging
from pathlib import Path
from urllib.error import URLError

import torch
from torch import nn

from mask2former.checkpoint import WeightReport, load_weights
from mask2former.engine.yaml_files import ConfigError

logger = logging.getLogger(__name__)

_DETECTRON2_FILES = "https://dl.fbaipublicfiles.com/detectron2/"


def load_start(model: nn.Module, weights: str) -> None:
    """Load MODEL.WEIGHTS for a training: what does not fit stays random, with a warning.

    Raises:
        ConfigError: if the file is missing, cannot be read or fits in no tensor.
    """
    if not weights:
        logger.info("MODEL.WEIGHTS is empty: training starts from random weights")
        return
    report = _load(model, weights)
    if report.missing or report.mismatched:
        logger.warning("MODEL.WEIGHTS %s does not hold the whole model; the rest stays random: %s", weights, report)
    else:
        logger.info("MODEL.WEIGHTS %s: %s", weights, report)


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
