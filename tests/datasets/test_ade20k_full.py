"""ADE20K with 847 classes: index, names, labels, sizes."""

import os
import pickle

import numpy as np
import pytest

from mask2former.data import catalog
from mask2former.data.ade20k_raw import read_full_index
from mask2former.data.images import read_label_map
from mask2former.data.prepared_files import PreparationError
from tests.datasets import miniatures
from tests.datasets.miniatures import ade_class, ade_object_names, ade_seg, pixels_of, save, script, write_index

SCRIPT = "prepare_ade20k_full_sem_seg"


def prepare(root, *arguments):
    return miniatures.prepare(SCRIPT, root, *arguments)


def test_labels_and_images(tmp_path, monkeypatch):
    root = miniatures.ade20k_full(tmp_path)
    assert prepare(tmp_path) == 0
    labels, mode = pixels_of(root / "annotations_detectron2/training/ADE_train_00000001.tif")
    assert mode == "I;16"
    assert labels.tolist() == [[65535, 0, 65535], [300, 846, 65535]]
    image = root / "images_detectron2/training/ADE_train_00000001.jpg"
    assert image.samefile(root / "images/ADE/training/urban/street/ADE_train_00000001.jpg")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    records = catalog.get("ade20k_full_sem_seg_train").load()
    assert [record["image_id"] for record in records] == ["ADE_frame_00000007", "ADE_train_00000001"]
    assert (records[0]["height"], records[0]["width"]) == (2, 3)
    assert (read_label_map(records[0]["sem_seg_file_name"]) == 5).all()
    assert [r["image_id"] for r in catalog.get("ade20k_full_sem_seg_val").load()] == ["ADE_val_00000001"]


def test_large_images_are_made_smaller(tmp_path):
    root = miniatures.ade20k_full(tmp_path)
    scene = root / "images/ADE/validation/urban/street"
    # Four quarters of 1024 x 800 pixels become quarters of 655 x 512: the shorter side is 512, 1024 * 0.64 = 655.36.
    quarters = np.array([[0, 1], [2, 3]]).repeat(512, axis=0).repeat(400, axis=1)
    classes = ade_class(np.array([0, 846, 300, 3]))[quarters]
    save(scene / "ADE_val_00000001_seg.png", ade_seg(classes))
    save(scene / "ADE_val_00000001.jpg", (quarters[..., None] * [60, 60, 60]).astype(np.uint8), quality=100)
    assert prepare(tmp_path, "--split", "val") == 0
    labels, _ = pixels_of(root / "annotations_detectron2/validation/ADE_val_00000001.tif")
    assert labels.shape == (655, 512)
    assert np.unique(labels).tolist() == [0, 3, 300, 846]  # nothing in between
    assert (labels[:327, :256] == 0).all()
    assert (labels[:327, 256:] == 846).all()
    assert (labels[328:, :256] == 300).all()
    assert (labels[328:, 256:] == 3).all()
    pixels, mode = pixels_of(root / "images_detectron2/validation/ADE_val_00000001.jpg")
    assert (pixels.shape, mode) == ((655, 512, 3), "RGB")
    assert abs(pixels[300:310, 100:110].astype(int)).max() <= 3
    assert abs(pixels[400:410, 400:410].astype(int) - 180).max() <= 3
    before = miniatures.snapshot(root)
    assert prepare(tmp_path, "--split", "val") == 0
    assert miniatures.snapshot(root) == before


def test_long_but_low_images_stay(tmp_path):
    root = miniatures.ade20k_full(tmp_path)
    scene = root / "images/ADE/validation/urban/street"
    save(scene / "ADE_val_00000001_seg.png", ade_seg(np.full((512, 700), ade_class(9))))
    miniatures.photo(scene / "ADE_val_00000001.jpg", height=512, width=700)
    assert prepare(tmp_path, "--split", "val") == 0
    labels, _ = pixels_of(root / "annotations_detectron2/validation/ADE_val_00000001.tif")
    assert labels.shape == (512, 700)
    image = root / "images_detectron2/validation/ADE_val_00000001.jpg"
    assert image.samefile(scene / "ADE_val_00000001.jpg")


def test_sizes():
    smaller_size = script(SCRIPT).smaller_size
    assert smaller_size(1536, 2048) == (512, 683)
    assert smaller_size(2048, 1536) == (683, 512)
    assert smaller_size(600, 600) == (512, 512)


def test_images_are_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(f"no links: {source} {target}")

    monkeypatch.setattr(os, "link", refuse)
    root = miniatures.ade20k_full(tmp_path)
    assert prepare(tmp_path, "--split", "val") == 0
    image = root / "images_detectron2/validation/ADE_val_00000001.jpg"
    photo = root / "images/ADE/validation/urban/street/ADE_val_00000001.jpg"
    assert not image.samefile(photo)
    assert image.read_bytes() == photo.read_bytes()
    before = miniatures.snapshot(root)
    assert prepare(tmp_path, "--split", "val") == 0
    assert miniatures.snapshot(root) == before


@pytest.mark.parametrize("as_array", [list, lambda names: np.array(names), lambda names: np.array(names, object)])
def test_index_of_lists_and_arrays(tmp_path, as_array):
    content = {key: as_array(["ä", "b"]) for key in ("filename", "folder", "objectnames")}
    write_index(tmp_path, content | {"other": np.eye(3), "set": {1}, "path": pickle.PickleBuffer})
    index = read_full_index(tmp_path / "index_ade20k.pkl")
    assert [file.as_posix() for file in index.files] == ["ä/ä", "b/b"]
    assert index.object_names == ("ä", "b")


class Trap:
    """What runs when a careless reader meets it."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_index_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {key: ["a"] for key in ("filename", "folder", "objectnames")}
    write_index(tmp_path, names | {"trap": Trap()})
    assert read_full_index(tmp_path / "index_ade20k.pkl").object_names == ("a",)
    assert not (tmp_path / "sprung").exists()
    write_index(tmp_path, names | {"filename": Trap()})
    with pytest.raises(PreparationError, match="'filename' must be a list or an array of strings"):
        read_full_index(tmp_path / "index_ade20k.pkl")


def test_wrong_indices_are_named(tmp_path):
    file = tmp_path / "index_ade20k.pkl"
    with pytest.raises(PreparationError, match=r"index_ade20k.pkl: there is no such file"):
        read_full_index(file)
    for content, message in (
        ([], "must hold a dict, got list"),
        ({"filename": ["a"], "folder": ["b"]}, "'objectnames' must be"),
        ({"filename": ["a"], "folder": [], "objectnames": []}, "1 'filename' but 0 'folder'"),
        ({"filename": np.eye(2), "folder": [], "objectnames": []}, "'filename' must be"),
    ):
        write_index(tmp_path, content)
        with pytest.raises(PreparationError, match=message):
            read_full_index(file)
    file.write_bytes(pickle.dumps({"filename": ["a"] * 100})[:-9])
    with pytest.raises(PreparationError, match=r"index_ade20k.pkl: cannot be read"):
        read_full_index(file)


def test_names_that_the_index_lacks_are_refused(tmp_path, capsys):
    names = ade_object_names()
    names[names.index("sky")] = "heaven"
    root = miniatures.ade20k_full(tmp_path, index={"objectnames": names})
    assert prepare(tmp_path) == 1
    message = f"fault: {root}/index_ade20k.pkl: 'objectnames' lacks 1 of the 847 classes: sky\n"
    assert capsys.readouterr().err.count(message) == 2  # once a split
    assert not (root / "images_detectron2").exists()


def test_missing_and_wrong_files_are_named(tmp_path, capsys):
    root = miniatures.ade20k_full(tmp_path)
    street = root / "images/ADE/training/urban/street"
    (root / "images/ADE/training/nature/ADE_frame_00000007.jpg").unlink()
    save(street / "ADE_train_00000001_seg.png", ade_seg([[849, 1, 1]] * 2))
    (root / "images/ADE/validation/urban/street/ADE_val_00000001_seg.png").write_bytes(b"\x89PNG")
    assert prepare(tmp_path) == 1
    errors = capsys.readouterr().err
    assert "ADE_frame_00000007.jpg: there is no such file" in errors
    assert "ADE_train_00000001_seg.png: classes must be in 0..848, got 849" in errors
    assert "ADE_val_00000001_seg.png" in errors
    assert errors.count("fault: ") == 3


def test_names_are_compared_without_case_and_white_space(tmp_path):
    names = [f" {name.upper()} " for name in ade_object_names()]
    root = miniatures.ade20k_full(tmp_path, index={"objectnames": names})
    assert prepare(tmp_path, "--split", "train") == 0
    labels, _ = pixels_of(root / "annotations_detectron2/training/ADE_train_00000001.tif")
    assert labels.tolist() == [[65535, 0, 65535], [300, 846, 65535]]


def test_damaged_photos_and_wrong_sizes_are_named(tmp_path, capsys):
    root = miniatures.ade20k_full(tmp_path)
    photo = root / "images/ADE/training/urban/street/ADE_train_00000001.jpg"
    photo.write_bytes(photo.read_bytes()[:-30])
    miniatures.photo(root / "images/ADE/training/nature/ADE_frame_00000007.jpg", height=3, width=2)
    assert prepare(tmp_path, "--split", "train") == 1
    errors = capsys.readouterr().err
    assert "ADE_train_00000001.jpg" in errors
    assert "ADE_frame_00000007_seg.png: is 3 wide and 2 high, but " in errors
    assert errors.count("fault: ") == 2
    assert not (root / "annotations_detectron2").exists()


def test_an_index_without_images_of_a_split_is_a_fault(tmp_path, capsys):
    root = miniatures.ade20k_full(tmp_path, index={"filename": ["a.jpg"], "folder": ["b"]})
    assert prepare(tmp_path, "--split", "val") == 1
    assert f"fault: {root}/index_ade20k.pkl: lists no image of the split val\n" in capsys.readouterr().err
