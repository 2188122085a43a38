"""Starting a Detectron2 training from other weights: names of classes from files, keys and metadata; the same as
with the embedded engine."""

import copy
import logging
import pickle

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog

from mask2former.d2 import Trainer
from mask2former.d2.weights import StartCheckpointer, class_names
from mask2former.data import catalog
from mask2former.data.coco_datasets import CocoSplit, sample_root
from mask2former.finetune import OWN_ENTRY

HEAD = "sem_seg_head.predictor.class_embed"
COCO = [c.name for c in catalog.get("coco_2017_val_panoptic").metadata.categories]


@pytest.fixture
def start_cfg(tiny_cfg):
    """Three classes, of which two are COCO's."""
    name = "three_classes_for_test_weights"
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(stuff_classes=["Teddy_Bear", "unicorn", "person"], evaluator_type="sem_seg")
    tiny_cfg.DATASETS.TRAIN = (name,)
    tiny_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
    return tiny_cfg


@pytest.fixture
def source(tiny_cfg):
    """State of a model for COCO's 133 classes, in whose head each row has its own number."""
    cfg = copy.deepcopy(tiny_cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(COCO)
    torch.manual_seed(5)
    state = Trainer.build_model(cfg).state_dict()
    state[f"{HEAD}.bias"] = torch.arange(len(COCO) + 1.0)
    return state


def start(cfg, weights, **keys):
    for name, value in keys.items():
        setattr(cfg.MODEL, name, value)
    cfg.MODEL.WEIGHTS = str(weights)
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    StartCheckpointer(model, cfg).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    return model.state_dict()


def assert_started_from_coco(state, source):
    bias = state[f"{HEAD}.bias"].tolist()
    assert [bias[0], bias[2], bias[3]] == [COCO.index("teddy bear"), COCO.index("person"), len(COCO)]
    assert bias[1] not in source[f"{HEAD}.bias"].tolist()
    for name, tensor in state.items():
        if not name.startswith((HEAD, "criterion.")):
            assert torch.equal(tensor, source[name]), name


def test_published_pickles_with_the_name_of_their_data_set(start_cfg, source, tmp_path, caplog):
    path = tmp_path / "model_final.pkl"
    arrays = {name: tensor.numpy() for name, tensor in source.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone"}))
    with caplog.at_level(logging.INFO, logger="mask2former"):
        state = start(start_cfg, path, WEIGHTS_DATASET="coco_2017_val_panoptic")
    assert_started_from_coco(state, source)
    assert "2 categories kept: Teddy_Bear, person" in caplog.text
    assert "MODEL.WEIGHTS_DATASET" in start_report(caplog, start_cfg, path)


def start_report(caplog, cfg, path):
    """What is logged without the key."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mask2former"):
        start(cfg, path, WEIGHTS_DATASET="")
    return caplog.text


def test_checkpoints_of_trainings_name_their_classes(start_cfg, source, tmp_path):
    path = tmp_path / "model_final.pth"
    torch.save({"model": source, OWN_ENTRY: {"categories": COCO}, "iteration": 3}, path)
    assert_started_from_coco(start(start_cfg, path), source)


def test_the_trainer_writes_the_names_and_starts_from_them(tiny_cfg, tmp_path):
    tiny_cfg.TEST.EVAL_PERIOD = 0
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.SOLVER.MAX_ITER = 1
    tiny_cfg.DATALOADER.NUM_WORKERS = 0
    trainer = Trainer(tiny_cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    path = tmp_path / "output/model_final.pth"
    content = torch.load(path, weights_only=False)
    assert content[OWN_ENTRY] == {"categories": COCO}

    tiny_cfg.MODEL.WEIGHTS = str(path)
    tiny_cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 7
    tiny_cfg.OUTPUT_DIR = str(tmp_path / "second")
    second = Trainer(tiny_cfg)
    second.resume_or_load(resume=False)
    state = second.model.state_dict()
    assert torch.equal(state[f"{HEAD}.weight"], content["model"][f"{HEAD}.weight"])
    assert len(state["sem_seg_head.predictor.query_feat.weight"]) == 7


def test_model_files_are_read_and_name_their_classes(start_cfg, source, tmp_path):
    """Both engines take the same rows from one file."""
    pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed, see requirements-train.txt")
    from mask2former import config
    from mask2former.build import build_model
    from mask2former.checkpoint import ModelDescription, save_model_file
    from mask2former.engine.config import get_config
    from mask2former.engine.weights import load_start

    cfg = copy.deepcopy(start_cfg)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(COCO)
    architecture = config.architecture_arguments(cfg)
    model = build_model(architecture)
    model.load_state_dict(source)
    categories = catalog.get("coco_2017_val_panoptic").metadata.categories
    path = tmp_path / "model.safetensors"
    save_model_file(path, model, ModelDescription(architecture=architecture, categories=categories))
    theirs = start(start_cfg, path)
    assert_started_from_coco(theirs, source)

    name = start_cfg.DATASETS.TRAIN[0]
    if name not in catalog.names():
        entry = CocoSplit(root=sample_root, split="val").semantic(name)
        names = MetadataCatalog.get(name).stuff_classes
        kept = tuple(c._replace(name=n) for c, n in zip(entry.metadata.categories, names, strict=False))
        metadata = type(entry.metadata)(categories=kept, evaluator_type="sem_seg")
        catalog.register(catalog.CatalogEntry(name, list, metadata))
    (tmp_path / "config.yaml").write_text(start_cfg.dump())
    torch.manual_seed(0)
    ours = build_model(config.architecture_arguments(start_cfg))
    load_start(ours, get_config(tmp_path / "config.yaml"))
    rows = [0, 2, 3]
    for tensor in ("weight", "bias"):
        assert torch.equal(ours.state_dict()[f"{HEAD}.{tensor}"][rows], theirs[f"{HEAD}.{tensor}"][rows])


def test_backbones_are_matched_as_detectron2_does(start_cfg, source, tmp_path, caplog):
    """A file of ImageNet weights, which has no norms of the four stages' outputs."""
    prefix = "backbone."
    inner = {n.removeprefix(prefix): t.numpy() for n, t in source.items() if n.startswith(prefix)}
    arrays = {n: array for n, array in inner.items() if not n.startswith("norm")}
    path = tmp_path / "swin.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "someone", "matching_heuristics": True}))
    with caplog.at_level(logging.WARNING, logger="mask2former"):
        state = start(start_cfg, path)
    for name, array in arrays.items():
        assert torch.equal(state[prefix + name], torch.from_numpy(array)), name
    assert "not in the file, re-initialised: backbone (8), sem_seg_head.pixel_decoder (" in caplog.text


@pytest.mark.parametrize("name", ["no_such_data_set", "nameless_for_test_weights"])
def test_a_data_set_that_does_not_name_its_classes_is_refused(start_cfg, tmp_path, name):
    if name.startswith("nameless") and name not in DatasetCatalog:
        DatasetCatalog.register(name, list)
    with pytest.raises(ValueError, match=rf"MODEL.WEIGHTS_DATASET must be .* got '{name}'"):
        start(start_cfg, tmp_path / "any.pth", WEIGHTS_DATASET=name)


def test_classes_that_are_named_when_the_data_set_is_read(start_cfg):
    name = "named_when_read_for_test_weights"

    def read():
        MetadataCatalog.get(name).set(thing_classes=["a", "b"])
        return []

    if name not in DatasetCatalog:
        DatasetCatalog.register(name, read)
        MetadataCatalog.get(name).set(evaluator_type="coco")
    start_cfg.DATASETS.TRAIN = (name,)
    assert class_names(start_cfg) == ["a", "b", None]
    start_cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 1
    assert class_names(start_cfg) is None
