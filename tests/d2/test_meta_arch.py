"""The registered model: same numbers as the core's, Detectron2's inputs and outputs, its checkpoints."""

import pickle

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model
from detectron2.structures import BitMasks, Instances, PolygonMasks
from torch import nn

from mask2former import build
from mask2former.config import architecture_arguments
from mask2former.d2.meta_arch import target_from_instances
from mask2former.data import catalog
from mask2former.modeling.postprocessing import MaskGeometry, panoptic_segmentation


@pytest.fixture
def model(tiny_cfg):
    torch.manual_seed(0)
    return build_model(tiny_cfg)


def image_input(*size, **more):
    return {"image": torch.randint(0, 256, (3, *(size or (64, 96))), dtype=torch.uint8)} | more


def test_equals_the_core_model(tiny_cfg, model):
    """Both kinds of the same weights agree in every prediction, and so do the results made of them."""
    core = build.build_model(architecture_arguments(tiny_cfg))
    core.load_state_dict(model.state_dict(), strict=True)
    core.eval(), model.eval()
    inputs = [image_input(), image_input(48, 80, height=96, width=160)]
    with torch.no_grad():
        batch = core.batch_images([x["image"] for x in inputs])
        expected = core(batch, all_layers=True)
        for found, wanted in zip(model.predict(batch, all_layers=True), expected, strict=True):
            torch.testing.assert_close(found.class_logits, wanted.class_logits, rtol=0, atol=0)
            torch.testing.assert_close(found.mask_logits, wanted.mask_logits, rtol=0, atol=0)
        # a low threshold, so that the untrained model has segments to compare
        model.inference |= {"object_mask_threshold": 0.0, "overlap_threshold": 0.0}
        results = model(inputs)
    geometry = MaskGeometry((64, 96), (48, 80), (96, 160))
    last = expected[-1]
    panoptic = panoptic_segmentation(
        last.class_logits[1],
        last.mask_logits[1],
        geometry,
        is_thing=model.is_thing,
        object_mask_threshold=0.0,
        overlap_threshold=0.0,
    )
    ids, segments = results[1]["panoptic_seg"]
    assert panoptic.segments
    torch.testing.assert_close(ids, panoptic.ids)
    assert [(s["id"], s["category_id"], s["area"]) for s in segments] == [
        (s.id, s.category_id, s.area) for s in panoptic.segments
    ]


def test_outputs_have_the_wanted_size_and_only_things_as_instances(model):
    model.eval()
    with torch.no_grad():
        result = model([image_input(height=30, width=50)])[0]
    assert result["sem_seg"].shape == (133, 30, 50)
    assert result["panoptic_seg"][0].shape == (30, 50)
    instances = result["instances"]
    assert instances.image_size == (30, 50)
    assert instances.pred_masks.shape == (len(instances), 30, 50)
    assert instances.pred_boxes.tensor.shape == (len(instances), 4)
    assert len(instances) > 0
    assert model.is_thing[instances.pred_classes].all()


@pytest.mark.parametrize("before", [True, False])
def test_semantic_scores_before_or_after_the_resize(tiny_cfg, before):
    """Switching panoptic and instance results off leaves the order of resize and sum to its key."""
    tiny_cfg.MODEL.MASK_FORMER.TEST.merge_from_list(
        ["INSTANCE_ON", False, "PANOPTIC_ON", False, "SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE", before]
    )
    torch.manual_seed(0)
    model = build_model(tiny_cfg).eval()
    inputs = image_input(height=30, width=50)
    with torch.no_grad():
        result = model([inputs])[0]
        batch = model.batch_images([inputs["image"]])
        class_logits, mask_logits = model.predict(batch, all_layers=False)[-1]
        scores = class_logits[0].softmax(-1)[:, :-1]
        full = nn.functional.interpolate(mask_logits, (64, 96), mode="bilinear", align_corners=False)
        if before:
            full = nn.functional.interpolate(full, (30, 50), mode="bilinear", align_corners=False)
        expected = torch.einsum("qk,qhw->khw", scores, full[0].sigmoid())[None]
        if not before:
            expected = nn.functional.interpolate(expected, (30, 50), mode="bilinear", align_corners=False)
    assert set(result) == {"sem_seg"}
    torch.testing.assert_close(result["sem_seg"], expected[0])


def test_losses_of_every_kind_of_target_and_a_gradient_for_every_parameter(model):
    """Bit masks, polygons, a tensor, no masks and no instances at all, in one batch."""
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    masks[0, 10:40, 20:60] = True
    kinds = []
    for gt_masks in (BitMasks(masks), PolygonMasks([[np.array([20.0, 10, 60, 10, 60, 40, 20, 40])]]), masks):
        instances = Instances((64, 96), gt_classes=torch.tensor([3]))
        instances.gt_masks = gt_masks
        kinds.append({"instances": instances})
    kinds += [{"instances": Instances((64, 96))}, {}]
    model.train()
    losses = model([image_input() | kind for kind in kinds])
    total = sum(losses.values())
    assert torch.isfinite(total)
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_ce_2"} <= set(losses)
    total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_polygon_and_bit_mask_of_one_object_are_the_same_target():
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    masks[0, 10:40, 20:60] = True
    targets = []
    for gt_masks in (BitMasks(masks), PolygonMasks([[np.array([20.0, 10, 60, 10, 60, 40, 20, 40])]])):
        targets.append(target_from_instances(Instances((64, 96), gt_classes=torch.tensor([3]), gt_masks=gt_masks)))
    assert torch.equal(targets[0].masks, targets[1].masks)
    assert targets[0].masks.dtype == torch.bool


def test_instances_without_masks_are_refused():
    with pytest.raises(ValueError, match="gt_masks"):
        target_from_instances(Instances((4, 4), gt_classes=torch.tensor([1])))


def test_fed_by_detectron2s_own_mapper(tiny_cfg, model):
    """The published records through Detectron2's DatasetMapper with bit masks."""
    tiny_cfg.INPUT.MASK_FORMAT = "bitmask"
    tiny_cfg.MODEL.MASK_ON = True
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.MAX_SIZE_TRAIN = (64,), 96
    records = [r for r in catalog.get("coco_sample_train").load() if r["annotations"]][:2]
    mapper = DatasetMapper(tiny_cfg, is_train=True)
    model.train()
    losses = model([mapper(r) for r in records])
    assert torch.isfinite(sum(losses.values()))
    assert losses["loss_mask"] > 0


def test_published_pickle_loads_completely(tiny_cfg, model, tmp_path):
    """A checkpoint in the published form: a pickled dict of arrays, loaded by Detectron2's checkpointer."""
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    arrays["criterion.empty_weight"] = arrays["criterion.empty_weight"] * 0 + 0.7  # the config must win
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "third party"}))
    torch.manual_seed(1)
    fresh = build_model(tiny_cfg)
    incompatible = DetectionCheckpointer(fresh)._load_model({"model": {k: torch.tensor(v) for k, v in arrays.items()}})
    assert not incompatible.missing_keys
    assert not incompatible.unexpected_keys
    fresh = build_model(tiny_cfg)
    DetectionCheckpointer(fresh).load(str(path))
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_panoptic_without_metadata_is_a_clear_error(tiny_cfg):
    """The model builds without its data set; the first panoptic result says what is missing."""
    tiny_cfg.DATASETS.TRAIN = ("nowhere_registered",)
    model = build_model(tiny_cfg).eval()
    with pytest.raises(ValueError, match="thing_dataset_id_to_contiguous_id"):
        model([image_input()])
    MetadataCatalog.get("too_many_things").thing_dataset_id_to_contiguous_id = {1: 500}
    tiny_cfg.DATASETS.TRAIN = ("too_many_things",)
    model = build_model(tiny_cfg).eval()
    with pytest.raises(ValueError, match="NUM_CLASSES = 133"):
        model([image_input()])


def test_a_pixel_decoder_written_for_the_published_project_works(tiny_cfg):
    """Only ``forward_features`` and its triple are asked for."""

    class Published(nn.Module):
        def __init__(self, cfg, input_shape):
            super().__init__()
            dim = cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM
            self.convs = nn.ModuleDict({n: nn.Conv2d(s.channels, dim, 1) for n, s in input_shape.items()})

        def forward_features(self, features):
            maps = {n: conv(features[n]) for n, conv in self.convs.items()}
            return maps["res2"], None, [maps["res5"], maps["res4"], maps["res3"]]

    class NoContract(Published):
        forward_features = None

    for kind in (Published, NoContract):
        if kind.__name__ not in SEM_SEG_HEADS_REGISTRY:
            SEM_SEG_HEADS_REGISTRY.register(kind)
    tiny_cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "Published"
    model = build_model(tiny_cfg).eval()
    assert model([image_input()])[0]["sem_seg"].shape == (133, 64, 96)
    tiny_cfg.MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME = "NoContract"
    with pytest.raises(ValueError, match="forward_features"):
        build_model(tiny_cfg)


def test_a_wrong_feature_name_is_refused(tiny_cfg):
    tiny_cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res9"]
    tiny_cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES = ["res3", "res4"]
    with pytest.raises(ValueError, match="res9"):
        build_model(tiny_cfg)
