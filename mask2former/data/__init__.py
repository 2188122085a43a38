"""Data sets, augmentations and the mapping of records to training samples; needs numpy, Pillow and torch
(pycocotools where polygons or compressed RLE are read).
"""

from mask2former.data import (
    ade20k_datasets,
    catalog,
    cityscapes_datasets,
    coco_datasets,
    lvis_datasets,
    mapillary_datasets,
)
from mask2former.data.augmentations import LargeScaleJitter, ResizeCropColor, ResizeShortestEdge
from mask2former.data.catalog import CatalogEntry, Category, DatasetMetadata
from mask2former.data.images import read_image, read_label_map, read_panoptic_colors, read_panoptic_ids
from mask2former.data.mapper import MappedSample, SegmentationMapper
from mask2former.data.records import (
    Record,
    filter_empty,
    load_coco_instances,
    load_coco_panoptic,
    load_semantic_folder,
)
from mask2former.data.sampling import MappedDataset, TrainingBatchSampler

__all__ = [
    "CatalogEntry",
    "Category",
    "DatasetMetadata",
    "LargeScaleJitter",
    "MappedDataset",
    "MappedSample",
    "Record",
    "ResizeCropColor",
    "ResizeShortestEdge",
    "SegmentationMapper",
    "TrainingBatchSampler",
    "ade20k_datasets",
    "catalog",
    "cityscapes_datasets",
    "coco_datasets",
    "filter_empty",
    "load_coco_instances",
    "load_coco_panoptic",
    "load_semantic_folder",
    "lvis_datasets",
    "mapillary_datasets",
    "read_image",
    "read_label_map",
    "read_panoptic_colors",
    "read_panoptic_ids",
]

for _datasets in (coco_datasets, ade20k_datasets, cityscapes_datasets, mapillary_datasets, lvis_datasets):
    _datasets.register_all()
