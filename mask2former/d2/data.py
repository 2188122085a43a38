"""The core's data sets in Detectron2's catalogs, and the core's mapper behind Detectron2's loaders."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog, build_detection_test_loader
from detectron2.data.common import DatasetFromList
from detectron2.structures import BitMasks, Instances
from detectron2.utils import comm
from torch import Tensor
from torch.utils.data import DataLoader

from mask2former import config
from mask2former.data import CatalogEntry, MappedDataset, Record, SegmentationMapper, catalog
from mask2former.data.catalog import Call
from mask2former.data.training import TestImage, batch_sampler, training_mapper, training_records
from mask2former.modeling.structures import PackedTarget
from mask2former.own_data import register_custom_datasets
from mask2former.training import images_per_process

logger = logging.getLogger(__name__)


# Loaders of the data sets that Detectron2 registers itself
_DETECTRON2S_LOADERS = "detectron2.data.datasets."


def register_datasets() -> None:
    """Put every data set of the core's catalog that Detectron2 does not have into its catalogs.

    A name that is taken, by Detectron2 or by another extension, is left as it is, metadata included. A name that
    another extension registers later becomes that extension's: Detectron2 would refuse it, and extensions register
    when they are imported, so that the second of two could not be imported.
    """
    for name in catalog.names():
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, Call(_core_records, (name,)))
            if len(MetadataCatalog.get(name).as_dict()) <= 1:  # nothing but the name
                MetadataCatalog[name] = _MirroredMetadata(**_fields(catalog.get(name)))
    DatasetCatalog.register = _register_over_mirrored


def dataset_records(name: str) -> list[Record]:
    """The records of a data set.

    Those of the core where Detectron2 itself has registered the name, or nobody has: then both engines see the same
    images in the same order, and records have all that the evaluators need. Detectron2's own loader of Cityscapes'
    instances even asks for a package that is not public.
    """
    return catalog.get(name).load() if _is_the_cores(name) else DatasetCatalog.get(name)


def dataset_metadata(name: str) -> Metadata:
    """The metadata of a data set: the core's in the cases of `dataset_records`, else those in Detectron2's catalog.

    Detectron2's own ones stay as they are, but lack what is needed here: the colours of ADE20K, the ids of
    Cityscapes and LVIS.
    """
    return Metadata(**_fields(catalog.get(name))) if _is_the_cores(name) else MetadataCatalog.get(name)


def _is_the_cores(name: str) -> bool:
    if name not in catalog.names():
        return False
    return name not in DatasetCatalog or str(DatasetCatalog[name].__module__).startswith(_DETECTRON2S_LOADERS)


class _MirroredMetadata(Metadata):
    """Gives way to whatever another extension sets for the same name, where Detectron2's refuses a second value."""

    def __setattr__(self, key: str, value: Any) -> None:
        self.__dict__[key] = value


def _register_over_mirrored(name: str, func: Callable[[], list[Record]]) -> None:
    """DatasetCatalog.register, but for a name that only the core's mirror has used."""
    if name in DatasetCatalog and DatasetCatalog[name] == Call(_core_records, (name,)):
        DatasetCatalog.remove(name)
        if isinstance(MetadataCatalog.get(name), _MirroredMetadata):
            MetadataCatalog.remove(name)
    type(DatasetCatalog).register(DatasetCatalog, name, func)


def _core_records(name: str) -> list[Record]:
    return catalog.get(name).load()


def register_datasets_of(cfg: Any) -> None:
    """Put DATASETS.CUSTOM of a config into the core's catalog and into Detectron2's.

    Raises:
        FileNotFoundError: if files of such a data set do not exist; Detectron2 wants to know its classes now.
        ValueError: if the list is wrong, or a name belongs to another data set.
    """
    register_custom_datasets(**config.custom_dataset_arguments(cfg))
    register_datasets()


def _fields(entry: CatalogEntry) -> dict[str, Any]:
    meta = entry.metadata
    things = {c.id: i for i, c in enumerate(meta.categories) if c.is_thing}
    fields = {
        "name": entry.name,
        "thing_classes": [c.name for c in meta.categories if c.is_thing],
        "thing_colors": [c.color for c in meta.categories if c.is_thing],
        "thing_dataset_id_to_contiguous_id": things,
        # all classes, stuff or not: the convention by which Detectron2's evaluators and drawing work
        "stuff_classes": [c.name for c in meta.categories],
        "stuff_colors": [c.color for c in meta.categories],
        "stuff_dataset_id_to_contiguous_id": {c.id: i for i, c in enumerate(meta.categories)},
        "json_file": _text(meta.instances_json),
        "image_root": _text(meta.image_root),
        "panoptic_json": _text(meta.panoptic_json),
        "panoptic_root": _text(meta.panoptic_root),
        "sem_seg_root": _text(meta.sem_seg_root),
        "evaluator_type": meta.evaluator_type,
        "ignore_label": meta.ignore_label,
        "label_divisor": meta.label_divisor,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _text(path: Any) -> str | None:
    return None if path is None else str(path)


def is_thing_of(metadata: Any, num_classes: int) -> list[bool]:
    """Which of the model's classes are things, by contiguous id.

    Raises:
        ValueError: if the metadata do not say, or an id does not fit the number of classes.
    """
    things = getattr(metadata, "thing_dataset_id_to_contiguous_id", None)
    if things is None:
        raise ValueError(
            f"the metadata of data set {metadata.name!r} must have thing_dataset_id_to_contiguous_id for panoptic "
            "results, got none: register the data set, or set MODEL.MASK_FORMER.TEST.PANOPTIC_ON False"
        )
    ids = set(things.values())
    if ids and max(ids) >= num_classes:
        raise ValueError(
            f"thing classes of data set {metadata.name!r} must be below MODEL.SEM_SEG_HEAD.NUM_CLASSES = "
            f"{num_classes}, got {max(ids)}"
        )
    return [i in ids for i in range(num_classes)]


class PackedMasks(BitMasks):
    """Detectron2's masks, made when something asks for their tensor: workers hand over, and GPUs get, label maps.

    Attributes:
        packed: with any labels; None once there is a tensor, which may have been changed.
    """

    def __init__(self, packed: PackedTarget) -> None:
        self.packed: PackedTarget | None = packed
        self.image_size = tuple(packed.maps.shape[1:])

    @property
    def tensor(self) -> Tensor:
        """(N, H, W) bool."""
        if self.packed is not None:
            self._tensor, self.packed = self.packed.masks, None
        return self._tensor

    @tensor.setter
    def tensor(self, masks: Tensor) -> None:
        self._tensor, self.packed = masks, None

    @property
    def device(self) -> torch.device:
        return self.tensor.device if self.packed is None else self.packed.maps.device

    def to(self, *args: Any, **kwargs: Any) -> BitMasks:
        if self.packed is None:
            return super().to(*args, **kwargs)
        return PackedMasks(PackedTarget(*(part.to(*args, **kwargs) for part in self.packed)))

    def pin_memory(self) -> BitMasks:
        if self.packed is None:
            return BitMasks(self.tensor.pin_memory())
        return PackedMasks(PackedTarget(*(part.pin_memory() for part in self.packed)))

    def __len__(self) -> int:
        return len(self.tensor) if self.packed is None else len(self.packed.objects)


class TrainingInstances(Instances):
    """Instances that PyTorch's loader can pin."""

    def pin_memory(self) -> "TrainingInstances":
        fields = self.get_fields().items()
        pinned = {name: value.pin_memory() if hasattr(value, "pin_memory") else value for name, value in fields}
        return TrainingInstances(self.image_size, **pinned)


class MaskFormerDatasetMapper:
    """The core's mapper with Detectron2's result, for every published INPUT.DATASET_MAPPER_NAME.

    May be passed to Detectron2's own loader too.
    """

    @configurable
    def __init__(self, *, mapper: SegmentationMapper) -> None:
        self.mapper = mapper

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        return {"mapper": training_mapper(**config.mapper_arguments(cfg))}

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> dict[str, Any]:
        """Map a training record.

        Args:
            record: in Detectron2's standard form.
            rng: source of the augmentation; None: seeded from numpy's global state, which Detectron2's
                workers seed.

        Returns:
            The record with "image" (3, H, W) uint8 and "instances" with ``gt_classes`` and ``gt_masks``, without
            its annotations.
        """
        if rng is None:
            rng = np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002
        image, target = self.mapper(record, rng)
        instances = TrainingInstances((image.shape[1], image.shape[2]))
        instances.gt_classes = target.labels
        instances.gt_masks = PackedMasks(target)
        kept = {k: v for k, v in record.items() if k not in ("annotations", "segments_info")}
        return kept | {"image": image, "instances": instances}


class TestMapper:
    """A test record with its resized image; whatever the evaluators need stays in it."""

    __test__ = False  # the name is no test class

    def __init__(self, cfg: Any) -> None:
        image_format = config.input_arguments(cfg)["image_format"]
        self.read = TestImage(image_format=image_format, **config.test_resize_arguments(cfg))

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        image, (height, width) = self.read(record)
        kept = {k: v for k, v in record.items() if k != "annotations"}
        return kept | {"image": image, "height": height, "width": width}


def build_train_loader(cfg: Any, start_batch: int = 0) -> DataLoader:
    """Endless batches for this process, a function of cfg.SEED and the number of the batch alone.

    Args:
        cfg: config.
        start_batch: the first batch; a resumed training passes its iteration.

    Raises:
        ValueError: if there is nothing to train on, or a key asks for what this loader cannot do.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(f"DATALOADER.SAMPLER_TRAIN must be 'TrainingSampler', got {cfg.DATALOADER.SAMPLER_TRAIN!r}")
    batch_size = images_per_process(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
    everything = [record for name in cfg.DATASETS.TRAIN for record in dataset_records(name)]
    without_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    records = training_records(everything, cfg.DATASETS.TRAIN, without_empty=without_empty)
    logger.info("Removed %d images without annotations, %d left", len(everything) - len(records), len(records))
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    sampler = batch_sampler(
        records,
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        batch_size=batch_size,
        seed=seed,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
        start_batch=start_batch,
    )
    logger.info("Training on %d images in batches of %d a process", len(records), batch_size)
    # Detectron2's list keeps the records serialised, so that workers share them
    dataset = MappedDataset(DatasetFromList(records), MaskFormerDatasetMapper(cfg), seed)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_list,
        pin_memory=cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
        persistent_workers=False,
    )


def build_test_loader(cfg: Any, dataset_name: str) -> DataLoader:
    """One image at a time, in order; the images are shared among the processes."""
    records = dataset_records(dataset_name)
    return build_detection_test_loader(records, mapper=TestMapper(cfg), num_workers=cfg.DATALOADER.NUM_WORKERS)


def _as_list(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return samples
