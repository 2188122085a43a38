"""The models of the demo: bundled, from a file or a config, published."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from demo_inputs import CommandError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mask2former.checkpoint import Task
    from mask2former.predictor import PictureResult, Predictor

# Without it a model shows its 100 best guesses, however bad.
INSTANCE_THRESHOLD = 0.5
DEFAULT_MODEL = "panoptic"


class BundledModel(NamedTuple):
    """A model in this repository, and what it is good for."""

    file: Path
    purpose: str


_FOLDER = Path(__file__).resolve().parent / "models"
BUNDLED = {
    "panoptic": BundledModel(
        _FOLDER / "panoptic.safetensors",
        "the 133 COCO classes, learned from the 26 photos in datasets/sample only. It shows panoptic segmentation on "
        "those photos and is seldom right on others, for which published models are: --model coco-panoptic-r50",
    ),
    "nuclei": BundledModel(
        _FOLDER / "nuclei.safetensors",
        "cell nuclei in microscope pictures, fluorescent or stained; learned from 527 pictures of BBBC038, "
        "those in demo/pictures/microscope not among them",
    ),
}


@dataclass(frozen=True)
class Segmenter:
    """A predictor with the task and threshold that the user wants."""

    predictor: Predictor
    name: str
    task: Task
    threshold: float | None

    def __call__(self, pixels: NDArray[np.uint8]) -> PictureResult:
        """Segment (H, W, 3) uint8 RGB."""
        return self.predictor(pixels, self.task, threshold=self.threshold)

    def draw(self, pixels: NDArray[np.uint8], result: PictureResult) -> NDArray[np.uint8]:
        """Draw a result over its picture."""
        return self.predictor.draw(pixels, result)


def load_segmenter(args: argparse.Namespace) -> Segmenter:
    """Load the model that the arguments name.

    Raises:
        CommandError: if it cannot be loaded or is not for the task.
    """
    predictor = _load(args)
    tasks = predictor.settings.tasks
    task: Task = args.task or tasks[0]
    if task not in tasks:
        raise CommandError(f"--task must be one of {', '.join(tasks)} with this model, got {task}")
    threshold = args.confidence_threshold
    if task == "semantic" and threshold is not None:
        raise CommandError("--confidence-threshold has no meaning for semantic segmentation, the task of this model")
    if task == "instance" and threshold is None:
        threshold = predictor.settings.score_threshold or INSTANCE_THRESHOLD
    return Segmenter(predictor, _name(args), task, threshold)


def _name(args: argparse.Namespace) -> str:
    return args.config_file.stem if args.config_file is not None else Path(args.model or DEFAULT_MODEL).stem


def _load(args: argparse.Namespace) -> Predictor:
    import torch

    from mask2former.devices import device_problem

    try:
        import cv2  # noqa: F401
    except ImportError as error:
        raise CommandError(f"drawing needs OpenCV (pip install opencv-python-headless): {error}") from error
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if problem := device_problem(device):
        raise CommandError(f"--device {device} cannot be used: {problem}")
    if args.config_file is not None:
        return _predictor_from_config(args.config_file, args.opts, device)
    return _predictor_from_model(args.model or DEFAULT_MODEL, device)


def _predictor_from_model(model: str, device: str) -> Predictor:
    import mask2former

    bundled = BUNDLED.get(model)
    if bundled is not None:
        if not bundled.file.is_file():
            raise CommandError(f"--model {model}: this copy of the repository lacks its file {bundled.file}")
        print(f"Model: {model}, bundled (demo/models/{bundled.file.name}): {bundled.purpose}", flush=True)
    try:
        return mask2former.load(bundled.file if bundled is not None else model, device)
    except (OSError, ValueError) as error:
        hint = "" if Path(model).suffix else f"; bundled are {' and '.join(BUNDLED)}"
        raise CommandError(f"--model cannot be used: {error}{hint}") from error


def _predictor_from_config(config_file: Path, overrides: Sequence[str], device: str) -> Predictor:
    if not config_file.is_file():
        raise CommandError(f"--config-file: there is no file {config_file}")
    if importlib.util.find_spec("detectron2") is not None:
        from mask2former.d2 import predictor_from_config
        from mask2former.d2.config import get_config
    elif importlib.util.find_spec("yaml") is not None:
        from mask2former.engine.config import get_config
        from mask2former.engine.predictor import predictor_from_config
    else:
        raise CommandError(
            "--config-file needs PyYAML or Detectron2, and neither is installed (see README.md); "
            "--model with a model file works without them"
        )
    try:
        return predictor_from_config(get_config(config_file, ["MODEL.DEVICE", device, *overrides]))
    except (OSError, KeyError, ModuleNotFoundError, ValueError) as error:
        raise CommandError(f"--config-file {config_file} cannot be used: {error}") from error
