"""Loaders over the core's catalog, and early checks that data sets and model fit."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mask2former import config
from mask2former.data import CatalogEntry, MappedDataset, Record, catalog
from mask2former.data.training import PackedRecords, TestImage, batch_sampler, training_mapper, training_records
from mask2former.engine.yaml_files import ConfigError
from mask2former.training import images_per_process

logger = logging.getLogger(__name__)


class TestSample(NamedTuple):
    """A test image.

    Attributes:
        record: with everything that the evaluators need.
        image: (3, h, w) uint8, resized.
        size: (height, width) of the image in the file.
    """

    record: Record
    image: Tensor
    size: tuple[int, int]


def dataset_entries(cfg: Any, key: str) -> list[CatalogEntry]:
    """The catalog's entries for "DATASETS.TRAIN" or "DATASETS.TEST", checked against the number of classes.

    Raises:
        ConfigError: if a name is not registered, or the model has another number of classes than a test set, or
            fewer than a training set.
    """
    names = cfg.DATASETS.TRAIN if key == "DATASETS.TRAIN" else cfg.DATASETS.TEST
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    entries = []
    for name in names:
        try:
            entry = catalog.get(name)
        except catalog.UnknownDatasetError as error:
            raise ConfigError(f"{key}: {error}") from error
        count = entry.metadata.num_classes
        if classes < count or (classes > count and key == "DATASETS.TEST"):
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES must be {count}, the number of classes of {name!r} in {key}, "
                f"got {classes}"
            )
        if classes > count:
            logger.warning("%s has %d classes, the model has %d: the others are not learned", name, count, classes)
        entries.append(entry)
    return entries


def is_thing_of(cfg: Any) -> list[bool]:
    """Which of the model's classes are things, as the first data set of the config says; none where it has fewer."""
    entries = [*dataset_entries(cfg, "DATASETS.TRAIN"), *dataset_entries(cfg, "DATASETS.TEST")]
    flags = [category.is_thing for category in entries[0].metadata.categories] if entries else []
    return flags + [False] * (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES - len(flags))


def class_names(cfg: Any) -> list[str | None] | None:
    """Names of the model's classes, as the first training set of the config says; None where it has fewer.

    None altogether without a training set.
    """
    entries = dataset_entries(cfg, "DATASETS.TRAIN")
    if not entries:
        return None
    names: list[str | None] = [category.name for category in entries[0].metadata.categories]
    return names + [None] * (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES - len(names))


def build_train_loader(
    cfg: Any, *, seed: int, rank: int = 0, world_size: int = 1, start_batch: int = 0
) -> DataLoader[Any]:
    """Endless batches for this process, lists of `MappedSample`: a function of seed and number of the batch alone.

    Raises:
        ConfigError: if a data set is unknown or does not fit the model.
        ValueError: if there is nothing to train on, or the batch cannot be shared out.
        FileNotFoundError: if the files of a data set are missing.
    """
    batch_size = images_per_process(cfg.SOLVER.IMS_PER_BATCH, world_size)
    everything = [record for entry in dataset_entries(cfg, "DATASETS.TRAIN") for record in entry.load()]
    without_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    records = training_records(everything, cfg.DATASETS.TRAIN, without_empty=without_empty)
    sampler = batch_sampler(
        records,
        group_by_aspect_ratio=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        start_batch=start_batch,
    )
    logger.info("Training on %d images in batches of %d a process", len(records), batch_size)
    mapper = training_mapper(**config.mapper_arguments(cfg))
    return DataLoader(
        MappedDataset(PackedRecords(records), mapper, seed),
        batch_sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_they_are,
        worker_init_fn=_leave_interrupts_to_the_trainer,
        pin_memory=cfg.MODEL.DEVICE == "cuda",
    )


def build_test_loader(cfg: Any, records: Sequence[Record], *, rank: int = 0, world_size: int = 1) -> DataLoader[Any]:
    """One `TestSample` at a time, in order; each process gets one stretch of the records."""
    image_format = config.input_arguments(cfg)["image_format"]
    read = TestImage(image_format=image_format, **config.test_resize_arguments(cfg))
    start, end = (len(records) * r // world_size for r in (rank, rank + 1))
    dataset = _TestDataset(records[start:end], read)
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_as_they_are,
        worker_init_fn=_leave_interrupts_to_the_trainer,
    )


class _TestDataset(Dataset[TestSample]):
    def __init__(self, records: Sequence[Record], read: Callable[[Mapping[str, Any]], tuple[Tensor, tuple[int, int]]]):
        self.records = PackedRecords(records)
        self.read = read

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> TestSample:
        record = self.records[index]
        return TestSample({k: v for k, v in record.items() if k != "annotations"}, *self.read(record))


def _as_they_are(samples: Any) -> Any:
    return samples


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches the workers too; they must not end before the trainer has saved, and it ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
