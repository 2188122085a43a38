"""COCO's semantic label maps and COCO-Stuff 10k, checked pixel by pixel and through the catalog."""

import json
from pathlib import Path

import numpy as np
import pytest

from mask2former.data import catalog
from mask2former.data.images import read_label_map
from tests.datasets import miniatures
from tests.datasets.miniatures import pixels_of, prepare, save, segment_colors

SEMANTIC = "prepare_coco_semantic_annos_from_panoptic_annos"
STUFF = "prepare_coco_stuff_10k_sem_seg"
SAMPLE = Path(__file__).resolve().parents[2] / "datasets" / "sample"


def test_semantic(tmp_path):
    root = miniatures.coco_panoptic(tmp_path)
    assert prepare(SEMANTIC, tmp_path) == 0
    labels, mode = pixels_of(root / "panoptic_semseg_val2017" / "b.png")
    assert mode == "L"
    assert labels.tolist() == [
        [0, 0, 255, 132, 132, 132],
        [0, 0, 255, 132, 132, 132],
        [79, 79, 79, 132, 132, 132],
        [79, 79, 79, 255, 255, 80],
    ]


def test_semantic_of_the_sample(tmp_path, monkeypatch):
    """The committed label maps of real images."""
    root = tmp_path / "coco"
    root.mkdir()
    for name in ("annotations", "panoptic_train2017", "panoptic_val2017", "train2017", "val2017"):
        (root / name).symlink_to(SAMPLE / name)
    assert prepare(SEMANTIC, tmp_path) == 0
    for split, count in (("train", 26), ("val", 27)):
        made = sorted((root / f"panoptic_semseg_{split}2017").iterdir())
        assert len(made) == count
        for path in made:
            expected = read_label_map(SAMPLE / f"panoptic_semseg_{split}2017" / path.name)
            assert (read_label_map(path) == expected).all(), path.name
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    records = catalog.get("coco_2017_val_panoptic_with_sem_seg").load()
    assert all(Path(record["sem_seg_file_name"]).is_file() for record in records)


def change_segments(root, change):
    """Changes the first annotation of the training JSON."""
    file = root / "annotations" / "panoptic_train2017.json"
    content = json.loads(file.read_text())
    change(content["annotations"][0]["segments_info"])
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[0].update(category_id=12), "the annotation of a.png has segments of unknown categories: 12"),
        (lambda s: s.append(s[0]), "the annotation of a.png has two segments with one id"),
        (lambda s: s[0].pop("id"), "'id' is missing in {'category_id': 1, 'iscrowd': 1}"),
        (lambda s: s[0].update(id=9), "has no pixel of segments that {file} has: 9"),
        (lambda s: s.pop(), "has segments that {file} has not: 301"),
    ],
)
def test_semantic_names_wrong_segments(tmp_path, capsys, change, message):
    root = miniatures.coco_panoptic(tmp_path)
    file = change_segments(root, change)
    assert prepare(SEMANTIC, tmp_path) == 1
    errors = capsys.readouterr().err
    [fault] = [line for line in errors.splitlines() if line.startswith("fault: ")]
    assert message.replace("{file}", str(file)) in fault
    assert "a.png" in fault
    assert not (root / "panoptic_semseg_train2017/a.png").exists()
    assert (root / "panoptic_semseg_train2017/b.png").exists()


def test_semantic_names_wrong_files(tmp_path, capsys):
    root = miniatures.coco_panoptic(tmp_path)
    (root / "panoptic_train2017/a.png").unlink()
    save(root / "panoptic_train2017/b.png", segment_colors(miniatures.COCO_IDS[:3]))
    file = root / "panoptic_val2017/a.png"
    file.write_bytes(file.read_bytes()[:-30])
    assert prepare(SEMANTIC, tmp_path) == 1
    errors = capsys.readouterr().err
    assert errors.count("fault: ") == 3
    assert f"{root}/panoptic_train2017/a.png: there is no such file" in errors
    assert f"{root}/panoptic_train2017/b.png: is 6 wide and 3 high, but {root}/annotations/panoptic_train" in errors
    assert f"cannot read the image {file}" in errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "is no panoptic JSON file, it holds a list"),
        ('{"images": []}', "'annotations' must be a list of objects"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "'file_name' is missing in {'id': 1}"),
    ],
)
def test_semantic_names_a_wrong_json_file(tmp_path, capsys, content, message):
    root = miniatures.coco_panoptic(tmp_path)
    file = root / "annotations" / "panoptic_val2017.json"
    file.write_text(content)
    assert prepare(SEMANTIC, tmp_path) == 1
    assert f"fault: {file}: {message}" in capsys.readouterr().err
    assert len(list((root / "panoptic_semseg_train2017").iterdir())) == 2
    file.unlink()
    assert prepare(SEMANTIC, tmp_path) == 1
    assert f"fault: {file}: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "num_names"), [(miniatures.STUFF_LABELS, 182), (miniatures.STUFF_LABELS_1_0, 172)], ids=["1.1", "1.0"]
)
def test_stuff(tmp_path, monkeypatch, labels, num_names):
    root = miniatures.coco_stuff_10k(tmp_path, labels=labels, num_names=num_names)
    assert prepare(STUFF, tmp_path) == 0
    pixels, mode = pixels_of(root / "annotations_detectron2/train/COCO_train2014_000000000084.png")
    assert mode == "L"
    assert pixels.tolist() == [
        [255, 0, 0, 10, 10, 11],
        [255, 0, 0, 10, 10, 11],
        [79, 79, 79, 80, 80, 80],
        [170, 170, 170, 170, 170, 170],
    ]
    names = [category.name for category in catalog.read_categories("coco_stuff")]
    assert [names[i] for i in (0, 10, 11, 79, 80, 170)] == [
        "person", "fire hydrant", "stop sign", "toothbrush", "banner", "wood"
    ]  # fmt: skip
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    [record] = catalog.get("coco_2017_test_stuff_10k_sem_seg").load()
    assert Path(record["file_name"]).samefile(root / "images/COCO_train2014_9.jpg")
    assert (read_label_map(record["sem_seg_file_name"]) == pixels).all()
    assert len(catalog.get("coco_2017_train_stuff_10k_sem_seg").load()) == 2


def test_stuff_names_what_is_wrong(tmp_path, capsys):
    root = miniatures.coco_stuff_10k(tmp_path)
    first, second = (root / f"annotations/COCO_train2014_0000000000{number}.mat" for number in (77, 84))
    last = root / "annotations/COCO_train2014_9.mat"
    for file, labels, num_names in (
        (first, np.full((4, 6), 12, np.uint16), 182),  # a class that is never marked
        (second, np.full((5, 6), 1, np.uint16), 182),
        (last, miniatures.STUFF_LABELS, 80),
    ):
        miniatures.mat(file, labels, num_names)
    assert prepare(STUFF, tmp_path) == 1
    errors = capsys.readouterr().err
    assert f"fault: {first}: has values that are no class: 12\n" in errors
    assert f"fault: {second}: is 6 wide and 5 high, but" in errors
    assert f"fault: {last}: must have 182 names (v1.1) or 172 (v1.0), got 80\n" in errors
    first.write_bytes(first.read_bytes()[:200])
    second.unlink()
    last.write_bytes(b"no mat file" * 30)
    (root / "images/COCO_train2014_9.jpg").unlink()
    assert prepare(STUFF, tmp_path) == 1
    errors = capsys.readouterr().err
    assert f"fault: {first}: cannot be read: " in errors
    assert f"fault: {second}: there is no such file\n" in errors
    assert f"fault: {last}: cannot be read: " in errors
    (root / "imageLists/train.txt").write_text("\n")
    (root / "imageLists/test.txt").unlink()
    assert prepare(STUFF, tmp_path) == 1
    errors = capsys.readouterr().err
    assert f"fault: {root}/imageLists/train.txt: has no lines\n" in errors
    assert f"fault: {root}/imageLists/test.txt: there is no such file\n" in errors
    assert not (root / "annotations_detectron2").exists()


@pytest.mark.parametrize("size", range(0, 700, 23))
def test_any_truncated_mat_is_a_fault(tmp_path, size):
    module = miniatures.script(STUFF)
    file = tmp_path / "a.mat"
    miniatures.mat(file, miniatures.STUFF_LABELS, 182)
    data = file.read_bytes()
    assert len(data) > 700
    file.write_bytes(data[:size])
    with pytest.raises(module.PreparationError, match=r"a.mat: "):
        module.read_mat(file)
