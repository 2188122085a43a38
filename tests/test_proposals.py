"""Proposals of every prediction against a naive computation, their recall in closed form, sheets, and the command."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mask2former
from mask2former.__main__ import main
from mask2former.build import build_model
from mask2former.data import catalog
from mask2former.data.catalog import CatalogEntry, DatasetMetadata, generated_color, register
from mask2former.own_data.registration import CustomDataset
from mask2former.proposals import Proposals, check_proposes, proposal_recall, proposal_sheet, propose
from mask2former.proposals import command as proposals_command
from mask2former.proposals.regions import object_logits
from mask2former.proposals.sheet import panel_picture
from tests.tiny import K, Q, architecture, categories, lively_model, lively_predictor, picture, random_image

LAYERS = ["queries", "layer 1", "layer 2", "layer 3"]


def model_with(**decoder):
    parts = architecture()
    parts["transformer_decoder"] |= decoder
    return build_model(parts).eval()


def per_pixel_model():
    parts = architecture()
    parts["transformer_decoder"] = {"name": "pixel_classifier", "num_classes": K, "mask_dim": 24}
    parts["criterion"] = {"name": "per_pixel", "num_classes": K}
    return build_model(parts).eval()


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


# ------------------------------------------------------------------------------------------------ regions


def test_all_classes_together_are_one_object():
    logits = 5 * torch.randn(20, K + 1)
    expected = 1 - logits.softmax(1)[:, -1]
    torch.testing.assert_close(object_logits(logits).softmax(1), torch.stack([expected, 1 - expected], 1))


def test_proposals_equal_a_naive_computation():
    model, image = lively_model(), random_image(64, 96)
    found = list(propose(model, image, (64, 96)))
    with torch.no_grad():
        predictions = model.predict(model.batch_images([image]), all_layers=True)
    assert [proposals.layer for proposals in found] == LAYERS
    for proposals, (class_logits, mask_logits) in zip(found, predictions, strict=True):
        probability = F.interpolate(mask_logits, (64, 96), mode="bilinear", align_corners=False)[0].sigmoid()
        objectness = 1 - class_logits[0].softmax(1)[:, -1]
        assert sorted(proposals.queries.tolist()) == list(range(Q))
        assert (proposals.scores.diff() <= 0).all()
        for query, score, mask in zip(*proposals[1:], strict=True):
            inside = probability[query] > 0.5
            assert torch.equal(mask, inside)
            quality = probability[query][inside].mean() if inside.any() else 0
            assert score == pytest.approx(float(objectness[query] * quality), abs=1e-5)
    assert len({proposals.scores[0].item() for proposals in found}) == len(LAYERS)


def test_a_limit_keeps_the_best():
    model, image = lively_model(), random_image(40, 70)
    for all_of_them, best in zip(
        propose(model, image, (20, 35)), propose(model, image, (20, 35), limit=3), strict=True
    ):
        assert best.masks.shape == (3, 20, 35)
        for a, b in zip(all_of_them[1:], best[1:], strict=True):
            assert torch.equal(a[:3], b)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        propose(model, image, (20, 35), limit=0)


STANDARD = {"name": "standard", "num_layers": 2}


@pytest.mark.parametrize(
    ("decoder", "layers"),
    [
        ({"num_test_layers": 1}, LAYERS[:2]),
        ({"num_test_layers": 0}, LAYERS[:1]),
        ({"learnable_queries": False}, LAYERS[1:]),
        ({"learnable_queries": False, "num_test_layers": 2}, LAYERS[1:3]),
        (STANDARD, LAYERS[1:3]),
    ],
)
def test_names_of_the_predictions(decoder, layers):
    model = model_with(**decoder)
    assert [found.layer for found in propose(model, random_image(32, 32), (32, 32))] == layers


def test_a_model_that_classifies_pixels_proposes_nothing():
    model = per_pixel_model()
    with pytest.raises(ValueError, match=r"this one classifies pixels \(PixelClassifier\)"):
        check_proposes(model)
    with pytest.raises(ValueError, match="predicts masks proposes regions"):
        propose(model, random_image(32, 32), (32, 32))


# ------------------------------------------------------------------------------------------------ recall


@pytest.fixture
def photo(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def regions(predictor):
    """Masks (N, 50, 70) of each layer for `picture`."""
    planes, size = predictor.model_input(picture())
    return {found.layer: found.masks.numpy() for found in propose(predictor.model, planes, size)}


def metadata(kind="coco", **more):
    return DatasetMetadata(categories=categories(), evaluator_type=kind, **more)


def record(photo, **truth):
    return {"file_name": str(photo), "height": 50, "width": 70, "image_id": 1, **truth}


def annotation(mask, category=0, iscrowd=0):
    return {"category_id": category, "segmentation": np.asarray(mask), "iscrowd": iscrowd}


def found_at(masks, target):
    """Recall in percent over the thresholds of one segment."""
    best = max(iou(mask, target) for mask in masks)
    return 100 * np.mean(best >= np.linspace(0.5, 0.95, 10))


def test_recall_of_objects(photo):
    """Three proposals of the last layer as objects, of which one is a crowd: that layer finds both others."""
    predictor = lively_predictor()
    masks = regions(predictor)
    last = [mask for mask in masks["layer 3"] if mask.any()]
    truth = [annotation(last[0], 0), annotation(~last[0], 1, iscrowd=1), annotation(last[1], 1)]
    report = proposal_recall(predictor, [record(photo, annotations=truth)], metadata())
    assert (report.images, report.segments) == (1, 2)
    assert list(report.layers) == LAYERS
    assert report.layers["layer 3"] == {"AR@10": 100, "AR@100": 100, "AR@100_th": 100, "AR@100_st": 100}
    assert any(numbers["AR@100"] < 100 for numbers in report.layers.values())
    for layer, numbers in report.layers.items():
        assert numbers["AR@100_th"] == pytest.approx(found_at(masks[layer], last[0]))
        assert numbers["AR@100_st"] == pytest.approx(found_at(masks[layer], last[1]))


def test_recall_of_classes_in_a_label_map(photo, tmp_path):
    predictor = lively_predictor()
    mask = regions(predictor)["layer 2"][0]
    Image.fromarray(np.where(mask, 2, 255).astype(np.uint8)).save(tmp_path / "labels.png")
    rows = [record(photo, sem_seg_file_name=str(tmp_path / "labels.png"))]
    report = proposal_recall(predictor, rows, metadata("sem_seg"))
    assert report.segments == 1
    assert report.layers["layer 2"]["AR@100"] == 100
    assert report.layers["layer 2"]["AR@100_th"] == 100
    assert np.isnan(report.layers["layer 2"]["AR@100_st"])


def test_recall_of_panoptic_segments(photo, tmp_path):
    """The best region, and its complement as a crowd; categories are none of the model's."""
    predictor = lively_predictor()
    mask = regions(predictor)["queries"][0]
    ids = np.where(mask, 300, 7)
    Image.fromarray(np.stack([ids % 256, ids // 256, 0 * ids], -1).astype(np.uint8)).save(tmp_path / "pan.png")
    segments = [{"id": 300, "category_id": 0, "iscrowd": 0}, {"id": 7, "category_id": 0, "iscrowd": 1}]
    rows = [record(photo, pan_seg_file_name=str(tmp_path / "pan.png"), segments_info=segments)]
    things = DatasetMetadata(categories=categories(1), evaluator_type="coco_panoptic_seg")
    report = proposal_recall(predictor, rows, things)
    assert report.segments == 1
    assert report.layers["queries"] == {"AR@10": 100, "AR@100": 100}


# ------------------------------------------------------------------------------------------------ sheets


def proposals_of(*rows, layer="queries"):
    """Proposals of 20 x 30 pixels from (query, score, rows of the mask)."""
    masks = torch.zeros(len(rows), 20, 30, dtype=torch.bool)
    for mask, (_, _, where) in zip(masks, rows, strict=True):
        mask[where] = True
    queries = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    return Proposals(layer, queries, torch.tensor([row[1] for row in rows]), masks)


def panels(sheet, count, height=20, width=30):
    """Cuts a sheet at the places that the module's own numbers give: two columns for three of them."""
    columns = {1: 1, 2: 2, 3: 2, 4: 2}[count]
    rows = -(-count // columns)
    step_y = (sheet.shape[0] - 14) // rows
    corners = [(step_y * (i // columns + 1) - height, 14 + (width + 14) * (i % columns)) for i in range(count)]
    return [sheet[y : y + height, x : x + width] for y, x in corners]


def test_a_query_keeps_its_colour():
    pytest.importorskip("cv2")
    image = np.full((20, 30, 3), 128, np.uint8)
    first = proposals_of((5, 0.9, slice(0, 9)), (2, 0.5, slice(12, 20)))
    second = proposals_of((2, 0.9, slice(0, 9)), (5, 0.05, slice(12, 20)), layer="layer 1")
    sheet = proposal_sheet(image, [first, second], threshold=0.1)
    original, a, b = panels(sheet, 3)
    assert np.array_equal(original, image)
    colors = {q: np.rint((128 + np.array(generated_color(q))) / 2) for q in (2, 5)}
    assert np.abs(a[3, 27] - colors[5]).max() <= 1
    assert np.abs(a[16, 27] - colors[2]).max() <= 1
    assert np.abs(b[3, 27] - colors[2]).max() <= 1
    assert np.array_equal(b[9:], image[9:])  # below the threshold
    assert np.array_equal(panels(proposal_sheet(image, [proposals_of()]), 2)[1], image)


def test_panels_have_the_shape_of_the_picture():
    assert panel_picture(picture(50, 70), 140).shape == (100, 140, 3)
    assert panel_picture(picture(300, 70), 30).shape == (30, 7, 3)
    assert panel_picture(picture(1, 900), 30).shape == (1, 30, 3)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def run(monkeypatch):
    def run(*arguments, predictor=None):
        monkeypatch.setattr(mask2former, "load", lambda name, device: predictor or lively_predictor())
        return main(["proposals", "--model", "m.safetensors", *map(str, arguments)])

    return run


def report_of(capsys):
    """The lines that the command printed; earlier tests may have set up a log, which writes there, too."""
    return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]


def test_command_draws(run, photo, tmp_path, capsys):
    """A folder, and a picture of the same name beside one that is damaged."""
    pytest.importorskip("cv2")
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.fromarray(picture(40, 30)).save(folder / "photo.jpg")
    (folder / "broken.png").write_text("no picture")
    (folder / "notes.txt").write_text("no picture")
    assert run("--input", photo, folder, "--output", tmp_path / "new" / "out", "--top", 2) == 1
    out, err = capsys.readouterr()
    assert "broken.png" in err
    written = [tmp_path / "new" / "out" / name for name in ("photo_proposals.jpg", "photo_proposals_2.jpg")]
    assert out.splitlines() == [str(path) for path in written]
    assert sorted((tmp_path / "new" / "out").iterdir()) == sorted(written)
    with Image.open(written[0]) as wide, Image.open(written[1]) as tall:
        assert wide.size == (2 * 480 + 3 * 14, 3 * (39 + 343) + 14)
        assert tall.size == (3 * 360 + 4 * 14, 2 * (39 + 480) + 14)


def test_command_measures(run, photo, tmp_path, capsys):
    last = regions(lively_predictor())["layer 3"]
    rows = [record(photo, annotations=[annotation(last[0])]), record(photo, annotations=[annotation(last[1], 2)])]
    register(CatalogEntry("proposals_test", lambda: rows, metadata()))
    file = tmp_path / "recall.json"
    assert run("--dataset", "proposals_test", "--json", file) == 0
    lines = report_of(capsys)
    assert lines[0] == "proposals_test: 2 images, 2 segments"
    assert lines[2].split("  ")[0] == "prediction"
    assert lines[-1].split() == ["layer", "3", "100.00", "100.00", "100.00", "nan"]
    document = json.loads(file.read_text("utf-8"))
    assert (document["dataset"], document["images"], document["segments"]) == ("proposals_test", 2, 2)
    assert document["layers"][-1] == {
        "prediction": "layer 3", "AR@10": 100, "AR@100": 100, "AR@100_th": 100, "AR@100_st": None,
    }  # fmt: skip
    assert run("--dataset", "proposals_test", "--first", 1) == 0
    assert report_of(capsys)[0] == "proposals_test: 1 images, 1 segments"


def test_command_reads_data_sets_of_a_config(run, photo, tmp_path, capsys, monkeypatch):
    """An image without objects: nothing can be found, which is not zero percent."""
    # without the broken ones of earlier tests, which Detectron2's engine would look at
    known = {name: made for name, made in catalog._factories.items() if not isinstance(made, CustomDataset)}
    monkeypatch.setattr(catalog, "_factories", known)
    pytest.importorskip("yaml")
    image = {"id": 1, "file_name": photo.name, "height": 50, "width": 70}
    truth = {"images": [image], "annotations": [], "categories": [{"id": 3, "name": "cell"}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    source = {"NAME": "proposals_custom", "IMAGES": str(tmp_path), "COCO_JSON": str(tmp_path / "truth.json")}
    (tmp_path / "config.yaml").write_text(json.dumps({"DATASETS": {"CUSTOM": [source]}}))  # JSON is YAML
    assert run("--dataset", "proposals_custom", "--config-file", tmp_path / "config.yaml") == 0
    lines = report_of(capsys)
    assert lines[0] == "proposals_custom: 1 images, 0 segments"
    assert lines[-1].split() == ["layer", "3", "nan", "nan"]


def test_command_says_what_is_wrong(run, photo, tmp_path, capsys):
    out = ("--output", tmp_path / "out")
    wrong = [
        ([], "--input with pictures, or --dataset, must be given"),
        (["--input", photo], "--input and --output go together"),
        (["--dataset", "a", *out], "--input and --output go together"),
        (["--input", tmp_path / "none.png", *out], f"--input: there is no file {tmp_path / 'none.png'}"),
        (["--input", photo, *out, "--first", 3], "--first is about a data set and needs --dataset"),
        (["--input", photo, *out, "--threshold", 2], "--threshold must be in [0, 1], got 2.0"),
        (["--dataset", "no_such_set"], "no data set is registered as 'no_such_set'"),
        (["--dataset", "a", "--config-file", "none.yaml"], "--config-file: there is no file none.yaml"),
        (["--dataset", "a", "--json", tmp_path / "no" / "f.json"], f"--json: there is no folder {tmp_path / 'no'}"),
    ]
    for arguments, message in wrong:
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}"), error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_refuses_models_without_proposals(run, photo, tmp_path, capsys):
    predictor = lively_predictor()
    predictor.model = per_pixel_model()
    assert run("--input", photo, "--output", tmp_path / "out", predictor=predictor) == 2
    assert "this one classifies pixels" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_can_be_interrupted(run, photo, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(proposals_command, "_sheet", interrupted)
    assert run("--input", photo, "--output", tmp_path / "out") == 130
    assert capsys.readouterr().err.startswith("interrupted")
    assert not list((tmp_path / "out").iterdir())
