"""Data sets, augmentations and the mapping of records to training samples; needs numpy, Pillow and torch
(pycocotools where polygons or compressed RLE are read).
"""

from mask2former.data import catalog, coco_datasets
from mask2former.data.augmentations import LargeScaleJitter, ResizeCropColor, ResizeShortestEdge
from mask2former.data.catalog import CatalogEntry, Category, DatasetMetadata
from mask2former.data.images import read_image, read_label_map, read_panoptic_colors
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
    "catalog",
    "coco_datasets",
    "filter_empty",
    "load_coco_instances",
    "load_coco_panoptic",
    "load_semantic_folder",
    "read_image",
    "read_label_map",
    "read_panoptic_colors",
]
