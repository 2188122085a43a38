"""The weights that a Detectron2 training starts from, and names of classes in its checkpoints."""

import logging
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from mask2former import finetune
from mask2former.config import start_arguments
from mask2former.data import catalog
from mask2former.modeling.backbones.timm_backbone import WEIGHTS_SCHEME

logger = logging.getLogger(__name__)

# evaluators of data sets whose classes are things; by Detectron2's convention those of others are stuff_classes
_THINGS_ONLY = ("coco", "lvis", "cityscapes_instance")


class TrainingCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer; the files also name the classes, for trainings that start from them."""

    def __init__(self, model: nn.Module, save_dir: str, *, categories: list[str | None] | None, **others: Any) -> None:
        super().__init__(model, save_dir, **others)
        self._categories = categories

    def save(self, name: str, **content: Any) -> None:
        super().save(name, **{finetune.OWN_ENTRY: {"categories": self._categories}, **content})


class StartCheckpointer(DetectionCheckpointer):
    """Loads MODEL.WEIGHTS for a training, see `mask2former.finetune.load_start`; finds and reads as Detectron2 does.

    It reads model files (``.safetensors``), too. Weights whose names Detectron2 matches by their endings are matched
    by it first.
    """

    def __init__(self, model: nn.Module, cfg: Any) -> None:
        """Set up.

        Raises:
            ValueError: if MODEL.WEIGHTS_DATASET is not known.
        """
        super().__init__(model)
        self._weights = cfg.MODEL.WEIGHTS
        self._categories = class_names(cfg)
        dataset = start_arguments(cfg)["source_dataset"]
        self._source_categories = None if dataset is None else _names_of(dataset)
        if dataset is not None and self._source_categories is None:
            rule = "must be a registered data set with names of its classes"
            raise ValueError(f"MODEL.WEIGHTS_DATASET {rule}, got {dataset!r}")

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As Detectron2's, and ``timm://`` with the name of a model for the weights that timm publishes."""
        if not path.startswith(WEIGHTS_SCHEME):
            return super().load(path, checkpointables)
        self._load_model({"model": path})
        return {}

    def _load_file(self, filename: str) -> Any:
        # a model file is read, with the names in it, by the core
        return {"model": filename} if filename.endswith(".safetensors") else super()._load_file(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        source = checkpoint["model"]
        if not isinstance(source, str):
            if checkpoint.get("matching_heuristics"):
                self._convert_ndarray_to_tensor(source)
                is_caffe2 = checkpoint.get("__author__") == "Caffe2"
                source = align_and_update_state_dicts(self.model.state_dict(), source, c2_conversion=is_caffe2)
            source = {"model": source, finetune.OWN_ENTRY: checkpoint.get(finetune.OWN_ENTRY)}
        report = finetune.load_start(
            self.model, source, categories=self._categories, source_categories=self._source_categories
        )
        level = logging.WARNING if report.needs_attention else logging.INFO
        logger.log(level, "MODEL.WEIGHTS %s: %s", self._weights, report)


def class_names(cfg: Any) -> list[str | None] | None:
    """Names of the model's classes, as the first training set says; None where it has fewer.

    None altogether where it has none, or more than the model.
    """
    names = _names_of(cfg.DATASETS.TRAIN[0]) if cfg.DATASETS.TRAIN else None
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if names is None or len(names) > count:
        return None
    return [*names, *[None] * (count - len(names))]


def _names_of(dataset: str) -> list[str] | None:
    """Names of the classes of a data set, by contiguous id; None if it is not registered or does not say."""
    if dataset in catalog.names():
        return [category.name for category in catalog.get(dataset).metadata.categories]
    if dataset not in DatasetCatalog:
        return None
    metadata = MetadataCatalog.get(dataset)
    kinds = ("thing_classes",) if metadata.get("evaluator_type") in _THINGS_ONLY else ("stuff_classes", "thing_classes")
    if not any(metadata.get(kind) for kind in kinds):
        DatasetCatalog.get(dataset)  # some name their classes only when they are read
    return next((list(metadata.get(kind)) for kind in kinds if metadata.get(kind)), None)
