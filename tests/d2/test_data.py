"""Detectron2's catalogs and loaders over the core's data."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks

from mask2former.d2.data import (
    MaskFormerDatasetMapper,
    PackedMasks,
    build_test_loader,
    build_train_loader,
    dataset_metadata,
    dataset_records,
    register_datasets,
)
from mask2former.d2.meta_arch import target_from_instances
from mask2former.data import catalog
from mask2former.data.catalog import CatalogEntry, Category, DatasetMetadata
from mask2former.modeling.structures import PackedTarget
from tests import miniatures


def test_registration_mirrors_the_catalog_and_leaves_other_metadata_alone():
    before = dict(MetadataCatalog.get("coco_2017_train_panoptic").as_dict())
    register_datasets()
    register_datasets()  # twice does no harm
    assert MetadataCatalog.get("coco_2017_train_panoptic").as_dict() == before
    for name in catalog.names():
        assert name in DatasetCatalog
    meta = MetadataCatalog.get("coco_2017_val_panoptic_with_sem_seg")
    assert len(meta.stuff_classes) == 133
    assert len(meta.thing_classes) == 80
    assert sorted(meta.thing_dataset_id_to_contiguous_id.values()) == list(range(80))
    assert len(meta.stuff_dataset_id_to_contiguous_id) == 133
    assert meta.evaluator_type == "coco_panoptic_seg"


@pytest.fixture
def toy(monkeypatch):
    """The name of a data set in the core's catalog that Detectron2 does not have yet; forgotten afterwards."""
    name = "toy_set"
    monkeypatch.setattr(catalog, "_entries", {})
    metadata = DatasetMetadata(categories=(Category(7, "cell", True, (1, 2, 3)),), evaluator_type="coco")
    catalog.register(CatalogEntry(name, lambda: ["from the core"], metadata))
    yield name
    for d2_catalog in (DatasetCatalog, MetadataCatalog):
        if name in d2_catalog:
            d2_catalog.remove(name)


def register_as_an_extension(name):
    """What extensions do at import, whatever there is."""
    DatasetCatalog.register(name, lambda: ["theirs"])
    MetadataCatalog.get(name).set(thing_classes=["nucleus"], evaluator_type="theirs", ignore_label=7)


def assert_theirs(name):
    assert DatasetCatalog.get(name) == dataset_records(name) == ["theirs"]
    fields = {"name": name, "thing_classes": ["nucleus"], "evaluator_type": "theirs", "ignore_label": 7}
    assert MetadataCatalog.get(name).as_dict() == dataset_metadata(name).as_dict() == fields


def test_another_extension_registers_the_name_before(toy):
    register_as_an_extension(toy)
    register_datasets()
    assert_theirs(toy)


def test_another_extension_registers_the_name_afterwards(toy):
    register_datasets()
    assert DatasetCatalog.get(toy) == dataset_records(toy) == ["from the core"]
    assert MetadataCatalog.get(toy).thing_classes == ["cell"]
    register_as_an_extension(toy)
    assert_theirs(toy)
    register_datasets()
    assert_theirs(toy)
    with pytest.raises(AssertionError, match="already registered"):  # a third time it is Detectron2's rule again
        register_as_an_extension(toy)


def test_another_extension_sets_metadata_first(toy):
    register_datasets()
    MetadataCatalog.get(toy).set(thing_classes=["nucleus"])
    assert MetadataCatalog.get(toy).thing_classes == ["nucleus"]


def test_metadata_that_stand_without_a_loader_are_left_alone(toy):
    MetadataCatalog.get(toy).thing_classes = ["nucleus"]
    register_datasets()
    assert MetadataCatalog.get(toy).as_dict() == {"name": toy, "thing_classes": ["nucleus"]}
    assert DatasetCatalog.get(toy) == ["from the core"]


def test_detectron2s_own_sets_are_untouched_but_read_by_the_core(monkeypatch, tmp_path):
    """Its loader of Cityscapes' instances cannot be imported; the core's says what is missing."""
    names = [n for n in catalog.names() if str(DatasetCatalog[n].__module__).startswith("detectron2.")]
    assert {n.rsplit("_", 1)[0] for n in names} == {
        "coco_2017", "ade20k_sem_seg", "lvis_v1", "cityscapes_fine_instance_seg", "cityscapes_fine_sem_seg",
        "cityscapes_fine_panoptic", "coco_2017_train", "coco_2017_val",
    }  # fmt: skip
    before = {name: MetadataCatalog.get(name).as_dict() for name in names}
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name in names:
        fields = dataset_metadata(name)
        expected = catalog.get(name).metadata
        assert fields.stuff_classes == [c.name for c in expected.categories]
        assert fields.evaluator_type == expected.evaluator_type
        assert len(fields.thing_dataset_id_to_contiguous_id) == sum(c.is_thing for c in expected.categories)
        with pytest.raises(FileNotFoundError, match=rf"'{name}' needs"):
            dataset_records(name)
    assert {name: MetadataCatalog.get(name).as_dict() for name in names} == before


@pytest.mark.parametrize("name", ["ade20k_sem_seg_val", "cityscapes_fine_sem_seg_val", "cityscapes_fine_panoptic_val",
                                  "cityscapes_fine_instance_seg_val", "lvis_v1_val", "coco_2017_val"])  # fmt: skip
def test_names_of_classes_and_kind_are_detectron2s(name):
    if name.startswith("lvis"):  # set by its loader
        from detectron2.data.datasets.lvis import get_lvis_instances_meta

        own = get_lvis_instances_meta("lvis_v1")["thing_classes"]
    else:
        metadata = MetadataCatalog.get(name)
        own = metadata.thing_classes if metadata.evaluator_type in ("coco", "cityscapes_instance") else (
            metadata.stuff_classes)  # fmt: skip
    metadata = catalog.get(name).metadata
    assert [c.name for c in metadata.categories] == list(own)
    assert metadata.evaluator_type == MetadataCatalog.get(name).evaluator_type


def test_colors_of_coco_and_cityscapes_are_detectron2s():
    for name in ("coco_2017_val", "cityscapes_fine_panoptic_val"):
        own = MetadataCatalog.get(name).thing_colors
        assert [c.color for c in catalog.get(name).metadata.categories] == [tuple(color) for color in own]


def test_same_contiguous_ids_as_detectron2s_own_panoptic_set():
    own = MetadataCatalog.get("coco_2017_train_panoptic")
    mirrored = MetadataCatalog.get("coco_2017_train_panoptic_with_sem_seg")
    assert dict(own.thing_dataset_id_to_contiguous_id) == dict(mirrored.thing_dataset_id_to_contiguous_id)
    for dataset_id, contiguous in own.stuff_dataset_id_to_contiguous_id.items():
        assert mirrored.stuff_dataset_id_to_contiguous_id[dataset_id] == contiguous


def samples_equal(a, b):
    same_masks = torch.equal(a["instances"].gt_masks.tensor, b["instances"].gt_masks.tensor)
    return a["file_name"] == b["file_name"] and torch.equal(a["image"], b["image"]) and same_masks


def take(loader, count):
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def test_training_loader_gives_detectron2s_form(tiny_cfg):
    batch = take(build_train_loader(tiny_cfg), 1)[0]
    assert len(batch) == 2
    sample = batch[0]
    assert sample["image"].shape == (3, 64, 64)
    assert sample["image"].dtype == torch.uint8
    assert isinstance(sample["instances"].gt_masks, BitMasks)
    assert len(sample["instances"].gt_classes) == len(sample["instances"].gt_masks) > 0
    assert {"file_name", "image_id", "height", "width"} <= set(sample)


def test_masks_are_packed_until_their_tensor_is_asked_for(tiny_cfg):
    sample = take(build_train_loader(tiny_cfg), 1)[0][0]
    instances = sample["instances"]
    masks = instances.gt_masks
    assert isinstance(masks, PackedMasks)
    packed = target_from_instances(instances)
    assert isinstance(packed, PackedTarget)
    assert masks.packed is not None
    assert len(masks) == len(packed.labels) > 1
    assert masks.device == torch.device("cpu")
    instances.gt_classes = instances.gt_classes + 1  # as somebody's own step may do
    assert torch.equal(target_from_instances(instances).labels, packed.labels + 1)
    moved = instances.to("cpu").gt_masks
    assert isinstance(moved, PackedMasks)

    masks.tensor[0] = False  # and this
    assert not masks.tensor[0].any()
    assert not target_from_instances(instances).masks[0].any()
    assert torch.equal(target_from_instances(instances).masks[1:], packed.masks[1:])
    assert isinstance(instances[1:].gt_masks, BitMasks)
    assert torch.equal(instances[1:].gt_masks.tensor, packed.masks[1:])
    assert torch.equal(moved.tensor, packed.masks)


def test_all_tensors_of_a_batch_can_be_pinned(tiny_cfg, monkeypatch):
    """What PyTorch's loader does in its thread, with a stand-in for the copy, which needs a GPU."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self.clone())
    batch = take(build_train_loader(tiny_cfg), 1)[0]
    for new, old in zip(pin_memory(batch), batch, strict=True):
        assert samples_equal(new, old)
        assert new["instances"].gt_masks is not old["instances"].gt_masks
        assert new["instances"].image_size == old["instances"].image_size
        for tensor in (old["image"], old["instances"].gt_classes):
            assert any(tensor is other for other in pinned)
    assert len(pinned) == 4 * len(batch)  # images, classes, and two tensors of the masks


def test_resumed_loader_continues_the_sequence_whatever_the_workers(tiny_cfg):
    """Batches 3 and 4 of one run are the first two of a run resumed at 3, with workers or without."""
    whole = take(build_train_loader(tiny_cfg), 5)
    resumed = take(build_train_loader(tiny_cfg, start_batch=3), 2)
    tiny_cfg.DATALOADER.NUM_WORKERS = 2
    in_workers = take(build_train_loader(tiny_cfg), 5)
    for expected, found, worker in zip(whole[3:], resumed, in_workers[3:], strict=True):
        assert all(samples_equal(a, b) for a, b in zip(expected, found, strict=True))
        assert all(samples_equal(a, b) for a, b in zip(expected, worker, strict=True))
    assert not samples_equal(whole[0][0], whole[1][0])


def test_another_seed_gives_other_samples(tiny_cfg):
    first = take(build_train_loader(tiny_cfg), 2)
    tiny_cfg.SEED = 2
    second = take(build_train_loader(tiny_cfg), 2)
    pairs = zip(first[0] + first[1], second[0] + second[1], strict=True)
    assert not all(samples_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("family", "mapper", "write", "num_classes"),
    [
        ("cityscapes_fine_instance_seg", "mask_former_instance", miniatures.cityscapes, 8),
        ("cityscapes_fine_panoptic", "mask_former_panoptic", miniatures.cityscapes, 19),
        ("cityscapes_fine_sem_seg", "mask_former_semantic", miniatures.cityscapes, 19),
        ("ade20k_sem_seg", "mask_former_semantic", miniatures.ade20k_prepared, 150),
        ("ade20k_panoptic", "mask_former_panoptic", miniatures.ade20k_prepared, 150),
        ("lvis_v1", "coco_instance_lsj", miniatures.lvis, 1203),
    ],
)
def test_both_loaders_work_with_names_of_detectron2_and_others(
    tiny_cfg, tmp_path, monkeypatch, family, mapper, write, num_classes
):
    scenes = write(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    tiny_cfg.merge_from_list([
        "DATASETS.TRAIN", f"('{family}_train',)", "DATASETS.TEST", f"('{family}_val',)",
        "INPUT.DATASET_MAPPER_NAME", mapper, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", num_classes,
        "INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "(64, 64)",
        "INPUT.MIN_SCALE", 1.0, "INPUT.MAX_SCALE", 1.0,
    ])  # fmt: skip
    expected = {"mask_former_panoptic": [r for r in scenes["train"][0].regions if not r.is_crowd],
                "mask_former_semantic": list(scenes["train"][0].labels)}  # fmt: skip
    for sample in take(build_train_loader(tiny_cfg), 1)[0]:
        instances = sample["instances"]
        assert len(instances) == len(expected.get(mapper, scenes["train"][0].objects))
        assert instances.gt_masks.tensor.flatten(1).any(dim=1).all()
        assert 0 <= instances.gt_classes.min() <= instances.gt_classes.max() < num_classes
    tests = take(build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST[0]), 2)
    names = {"cityscapes": "instance_ids_file_name", "lvis_v1": "neg_category_ids", "ade20k": "sem_seg_file_name"}
    key = next(key for start, key in names.items() if family.startswith(start))
    assert all(key in sample and "annotations" not in sample for batch in tests for sample in batch)
    assert [batch[0]["height"] for batch in tests] == [scene.size[0] for scene in scenes["val"]]


def test_mapper_works_in_detectron2s_own_loader(tiny_cfg):
    from detectron2.data import build_detection_train_loader

    loader = build_detection_train_loader(
        DatasetCatalog.get(tiny_cfg.DATASETS.TRAIN[0]),
        mapper=MaskFormerDatasetMapper(tiny_cfg),
        total_batch_size=2,
        num_workers=0,
    )
    batch = take(loader, 1)[0]
    assert len(batch) == 2
    assert batch[0]["image"].shape == (3, 64, 64)


def test_mapper_leaves_the_record_unchanged(tiny_cfg):
    record = DatasetCatalog.get(tiny_cfg.DATASETS.TRAIN[0])[0]
    before = repr(record)
    sample = MaskFormerDatasetMapper(tiny_cfg)(record, np.random.default_rng(0))
    assert repr(record) == before
    assert "segments_info" not in sample


def test_test_loader_gives_resized_images_and_original_sizes(tiny_cfg):
    batch = take(build_test_loader(tiny_cfg, tiny_cfg.DATASETS.TEST[0]), 1)[0]
    assert len(batch) == 1
    assert min(batch[0]["image"].shape[1:]) <= 64
    assert max(batch[0]["image"].shape[1:]) <= 96
    assert max(batch[0]["height"], batch[0]["width"]) > 96
    assert "segments_info" in batch[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "SAMPLER_TRAIN"),
        ("INPUT.DATASET_MAPPER_NAME", "mask_former_typo", "coco_panoptic_lsj"),
        ("DATASETS.TRAIN", "()", "at least one image"),
    ],
)
def test_refusals(tiny_cfg, key, value, message):
    tiny_cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_train_loader(tiny_cfg)


def test_images_without_objects_are_left_out_only_if_asked(tiny_cfg):
    def records():
        real = catalog.get("coco_sample_train").load()[:2]
        return [real[0], real[1] | {"annotations": []}]

    name = "sample_with_an_empty_image"
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, records)
    tiny_cfg.merge_from_list(["DATASETS.TRAIN", f"('{name}',)", "INPUT.DATASET_MAPPER_NAME", "coco_instance_lsj"])
    assert len(build_train_loader(tiny_cfg).dataset) == 1
    tiny_cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    loader = build_train_loader(tiny_cfg)
    assert len(loader.dataset) == 2
    counts = {len(s["instances"]) == 0 for batch in take(loader, 2) for s in batch}
    assert counts == {True, False}
