"""Evaluation in the embedded engine: what it writes and says, and a model that finds nothing."""

import json
import logging
import math

import pytest
import torch

from mask2former.build import build_model
from mask2former.config import architecture_arguments, inference_arguments
from mask2former.data import read_label_map
from mask2former.engine.data import build_test_loader, dataset_entries, is_thing_of
from mask2former.engine.evaluation import evaluate, predict
from mask2former.evaluation import tasks
from mask2former.inference import image_result, predict_image


def untrained(cfg):
    torch.manual_seed(0)
    return build_model(architecture_arguments(cfg)).eval()


def test_results_are_logged_and_written(tiny, caplog):
    cfg = tiny.cfg(MODEL__MASK_FORMER__TEST__BOUNDARY_METRICS=True)
    with caplog.at_level(logging.INFO, logger="mask2former"):
        results = evaluate(cfg, untrained(cfg))
    assert list(results) == ["panoptic_seg", "boundary_panoptic_seg", "segm", "bbox", "boundary", "sem_seg"]
    folder = tiny.folder / "output/inference/four_val_panoptic"
    assert {p.name for p in folder.iterdir()} == {"coco_instances_results.json", "results.json", "results.txt"}
    written = json.loads((folder / "results.json").read_text())
    for task, numbers in results.items():
        for name, value in numbers.items():
            found = written[task][name]
            assert found == value or (found is None and math.isnan(value)), (task, name)
    assert "PQ-person" in results["panoptic_seg"] and "person" in (folder / "results.txt").read_text()
    assert any("Predicted 4 images of four_val_panoptic" in message for message in caplog.messages)
    (table,) = (message for message in caplog.messages if message.startswith("Results of four_val_panoptic"))
    assert "panoptic_seg" in table and "person" not in table


def test_a_model_that_finds_nothing_gets_zeros(tiny):
    cfg = tiny.cfg(
        MODEL__MASK_FORMER__TEST__OBJECT_MASK_THRESHOLD=1.0,
        MODEL__MASK_FORMER__TEST__SCORE_THRESHOLD=2.0,
        MODEL__MASK_FORMER__TEST__BOUNDARY_METRICS=True,
    )
    results = evaluate(cfg, untrained(cfg))
    for task, name in (
        ("panoptic_seg", "PQ"), ("panoptic_seg", "PQ_th"), ("panoptic_seg", "PQ_st"), ("boundary_panoptic_seg", "PQ"),
        ("segm", "AP"), ("bbox", "AP"), ("boundary", "AP"),
    ):  # fmt: skip
        assert results[task][name] == 0, (task, name)
    assert results["sem_seg"]["mIoU"] >= 0
    assert (
        json.loads((tiny.folder / "output/inference/four_val_panoptic/coco_instances_results.json").read_text()) == []
    )


def test_semantic_results_are_labels_those_of_the_best_scores(tiny):
    cfg = tiny.cfg()
    model, settings, is_thing = untrained(cfg), inference_arguments(cfg), torch.tensor(is_thing_of(cfg))
    (entry,) = dataset_entries(cfg, "DATASETS.TEST")
    for sample in list(build_test_loader(cfg, entry.load()))[:1]:
        with torch.inference_mode():
            found = predict(model, sample, settings, is_thing)
            expected = image_result(*predict_image(model, sample.image, sample.size), settings, lambda: is_thing)
        assert found.semantic.shape == sample.size
        assert torch.equal(found.semantic_labels(), expected.semantic_labels().int())
        assert torch.equal(expected.semantic_labels(), expected.semantic.argmax(0))


def test_an_image_that_cannot_be_evaluated_is_named(tiny, caplog, monkeypatch):
    cfg = tiny.cfg()
    (entry,) = dataset_entries(cfg, "DATASETS.TEST")
    record = entry.load()[1]

    def read(path):
        if path == record["sem_seg_file_name"]:
            raise OSError(f"{path} is broken")
        return read_label_map(path)

    monkeypatch.setattr(tasks, "read_label_map", read)
    with pytest.raises(OSError, match="is broken"):
        evaluate(cfg, untrained(cfg))
    assert f"Evaluating image {record['file_name']} failed" in caplog.messages
    assert not (tiny.folder / "output/inference").exists()
