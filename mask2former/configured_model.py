"""A model that was built from a config: what both engines turn into a `Predictor` or a model file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mask2former import config
from mask2former.checkpoint import ModelDescription, save_model_file
from mask2former.data import Category
from mask2former.inference import prediction_settings
from mask2former.modeling.mask2former import Mask2Former
from mask2former.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class ConfiguredModel:
    """A model with its weights, and what belongs to it.

    Attributes:
        cfg: config of either engine.
        model: as the config describes it.
        categories: of its classes, by contiguous id.
    """

    cfg: Any
    model: Mask2Former
    categories: tuple[Category, ...]

    def predictor(self) -> Predictor:
        """Predicts on MODEL.DEVICE, as MODEL.MASK_FORMER.TEST and INPUT say."""
        return Predictor(
            self.model,
            categories=self.categories,
            image_format=config.input_arguments(self.cfg)["image_format"],
            device=self.cfg.MODEL.DEVICE,
            **asdict(prediction_settings(self.cfg)),
        )

    def export(
        self, path: str | Path, *, dtype: torch.dtype = torch.float16, notes: Mapping[str, Any] | None = None
    ) -> ModelDescription:
        """Write a model file, which needs neither config nor engine to be used.

        Args:
            path: of the file.
            dtype: of the stored weights, `torch.float16` or `torch.float32`.
            notes: for people, such as the training command; plain values.

        Returns:
            What the file says about the model.
        """
        description = self.describe(notes or {})
        save_model_file(path, self.model, description, dtype=dtype)
        return description

    def describe(self, notes: Mapping[str, Any]) -> ModelDescription:
        """What a model file says about the model; ``notes`` as in `export`."""
        return ModelDescription(
            architecture=config.architecture_arguments(self.cfg),
            categories=self.categories,
            settings=prediction_settings(self.cfg),
            notes=dict(notes),
        )
