"""What all scripts share: resuming, refusing, interruption, several processes, counting faults."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mask2former.data import preparation, prepared_files
from mask2former.data.preparation import Converted, Preparation
from mask2former.data.prepared_files import PreparationError
from tests.datasets import miniatures
from tests.datasets.miniatures import SCRIPTS, pixels_of, prepare, save, snapshot

SEMANTIC = "prepare_ade20k_sem_seg"
ALL = {
    "prepare_ade20k_sem_seg": miniatures.ade20k,
    "prepare_ade20k_pan_seg": miniatures.ade20k,
    "prepare_ade20k_ins_seg": miniatures.ade20k,
    "prepare_ade20k_full_sem_seg": miniatures.ade20k_full,
    "prepare_coco_semantic_annos_from_panoptic_annos": miniatures.coco_panoptic,
    "prepare_coco_stuff_10k_sem_seg": miniatures.coco_stuff_10k,
    "prepare_mapillary_vistas_ins_seg": miniatures.mapillary,
}
PATIENCE = 300


def program(name, *arguments, **options):
    """Starts a script as a user does, in its own group of processes as in a terminal."""
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, start_new_session=True, **streams, **options)


def wait_for(condition):
    """Until something is so; an endless wait is a failure."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@contextlib.contextmanager
def held_up(file):
    """Puts a pipe in a file's place: who reads it waits."""
    content = file.read_bytes()
    file.unlink()
    os.mkfifo(file)
    yield file
    file.unlink()
    file.write_bytes(content)


def test_every_script_is_tested():
    assert {path.stem for path in SCRIPTS.glob("prepare_*.py")} == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_second_run_writes_nothing(tmp_path, capsys, name):
    ALL[name](tmp_path)
    assert prepare(name, tmp_path) == 0
    before = snapshot(tmp_path)
    assert not [path for path in before if path.endswith(".partial")]
    written = int(capsys.readouterr().out.split(" files written")[0])
    assert prepare(name, tmp_path) == 0
    assert snapshot(tmp_path) == before
    assert f"0 files written, {written} were there already, 0 faults" in capsys.readouterr().out


@pytest.mark.parametrize("name", ALL)
def test_what_is_missing_is_made_again(tmp_path, capsys, name):
    """As after a run that was killed at any moment: the rest of the files, and the start of one."""
    raw = ALL[name](tmp_path)
    inputs = set(snapshot(raw))
    prepare(name, tmp_path)
    complete = snapshot(raw)
    for path in list(complete)[::2]:
        if path not in inputs:
            data = (raw / path).read_bytes()
            (raw / path).unlink()
            (raw / f"{path}.partial").write_bytes(data[: len(data) // 2])
    assert prepare(name, tmp_path) == 0
    assert {path: data for path, (data, _) in snapshot(raw).items()} == {p: data for p, (data, _) in complete.items()}


@pytest.mark.parametrize("name", ALL)
def test_an_empty_folder_is_a_fault(tmp_path, capsys, name):
    assert prepare(name, tmp_path) == 1
    errors = capsys.readouterr().err
    assert errors.count("fault: ") == 2
    assert f"fault: {tmp_path}/" in errors


@pytest.mark.parametrize("name", ALL)
def test_help_shows_the_layout(capsys, name):
    with pytest.raises(SystemExit) as end:
        miniatures.script(name).main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "Reads, below FOLDER/" in text
    assert "Writes" in text


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    root = miniatures.ade20k(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert miniatures.script(SEMANTIC).main(["--workers", "1"]) == 0
    assert (root / "annotations_detectron2").is_dir()


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 6), np.uint8), np.zeros((5, 6), np.uint8), np.zeros((4, 6), np.uint16), None]
)
def test_other_content_is_refused(tmp_path, capsys, wrong):
    root = miniatures.ade20k(tmp_path)
    prepare(SEMANTIC, tmp_path)
    right = snapshot(root)
    file = root / "annotations_detectron2/training/ADE_train_00000001.png"
    if wrong is None:
        file.write_bytes(file.read_bytes()[:50])
    else:
        save(file, wrong)
    before = snapshot(root)
    assert prepare(SEMANTIC, tmp_path) == 1
    assert f"fault: {file}: is there with different content; --overwrite would" in capsys.readouterr().err
    assert snapshot(root) == before
    assert prepare(SEMANTIC, tmp_path, "--overwrite") == 0
    assert "1 files written, 3 were there already" in capsys.readouterr().out
    assert {path: data for path, (data, _) in snapshot(root).items()} == {p: data for p, (data, _) in right.items()}


def test_equal_pixels_of_another_encoder_are_kept(tmp_path, capsys):
    root = miniatures.ade20k(tmp_path)
    prepare(SEMANTIC, tmp_path)
    prepare("prepare_ade20k_ins_seg", tmp_path)
    file = root / "annotations_detectron2/training/ADE_train_00000001.png"
    save(file, pixels_of(file)[0], compress_level=0)
    other = root / "annotations_detectron2/training/ADE_train_00000002.png"
    save(other, pixels_of(other)[0].astype(np.uint16))
    json_file = root / "ade20k_instance_val.json"
    json_file.write_text(json.dumps(json.loads(json_file.read_text()), indent=4))
    before = snapshot(root)
    assert prepare(SEMANTIC, tmp_path) == 0
    assert prepare("prepare_ade20k_ins_seg", tmp_path) == 0
    assert snapshot(root) == before


def test_another_json_or_image_is_refused(tmp_path, capsys):
    challenge = miniatures.ade20k(tmp_path)
    prepare("prepare_ade20k_ins_seg", tmp_path)
    for text in ('{"images": []}', "{"):
        (challenge / "ade20k_instance_val.json").write_text(text)
        assert prepare("prepare_ade20k_ins_seg", tmp_path) == 1
        errors = capsys.readouterr().err
        assert f"fault: {challenge}/ade20k_instance_val.json: is there with different content" in errors
        assert (challenge / "ade20k_instance_val.json").read_text() == text
    stuff = miniatures.coco_stuff_10k(tmp_path)
    image = stuff / "images_detectron2/test/COCO_train2014_9.jpg"
    miniatures.photo(image, height=9)
    assert prepare("prepare_coco_stuff_10k_sem_seg", tmp_path) == 1
    assert f"fault: {image}: is there with different content" in capsys.readouterr().err
    assert prepare("prepare_coco_stuff_10k_sem_seg", tmp_path, "--overwrite") == 0
    assert image.samefile(stuff / "images/COCO_train2014_9.jpg")


def test_missing_partners_are_named(tmp_path, capsys):
    root = miniatures.ade20k(tmp_path)
    (root / "images/training/ADE_train_00000001.jpg").unlink()
    (root / "annotations_instance/training/ADE_train_00000002.png").unlink()
    shutil.rmtree(root / "annotations/validation")
    assert prepare("prepare_ade20k_pan_seg", tmp_path) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fault: ")]
    assert lines == [
        f"fault: {root}/images/training/ADE_train_00000001.jpg: is missing, but there is "
        f"{root}/annotations/training/ADE_train_00000001.png",
        f"fault: {root}/annotations_instance/training/ADE_train_00000002.png: is missing, but there is "
        f"{root}/images/training/ADE_train_00000002.jpg",
        f"fault: {root}/annotations/validation: there is no such folder; datasets/README.md shows the expected folders",
    ]


def test_a_truncated_png_is_named(tmp_path, capsys):
    root = miniatures.ade20k(tmp_path)
    file = root / "annotations/validation/ADE_val_00000001.png"
    data = file.read_bytes()
    for size in (0, 20, len(data) - 22):  # without the last 21 bytes no pixel is missing
        file.write_bytes(data[:size])
        assert prepare(SEMANTIC, tmp_path) == 1
        assert f"cannot read the image {file}" in capsys.readouterr().err


def test_a_run_stops_after_many_faults(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preparation, "MOST_FAULTS", 3)
    root = miniatures.ade20k(tmp_path, count=5)
    for file in (root / "annotations/training").iterdir():
        file.write_bytes(b"")
    assert prepare(SEMANTIC, tmp_path) == 1
    lines = capsys.readouterr()
    assert lines.err.count("fault: ") == 3
    assert "stopped after 3 faults" in lines.err
    assert "3 faults" in lines.out
    assert not (root / "annotations_detectron2/validation").exists()


def test_mistakes_of_the_program_are_no_faults(tmp_path):
    def convert(job):
        raise ZeroDivisionError(job)

    with pytest.raises(ZeroDivisionError):
        Preparation(root=tmp_path, workers=1, overwrite=False).convert(convert, [1], "test")


def test_ctrl_c_in_one_process(tmp_path, capsys, monkeypatch):
    root = miniatures.ade20k(tmp_path)
    put = prepared_files.put_image
    calls = []

    def interrupted(path, pixels, *, overwrite):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put(path, pixels, overwrite=overwrite)

    monkeypatch.setattr(prepared_files, "put_image", interrupted)
    assert prepare(SEMANTIC, tmp_path) == 130
    assert "interrupted; what has been written is complete" in capsys.readouterr().err
    assert len(list(root.glob("annotations_detectron2/*/*"))) == 2


def test_nothing_stays_of_a_file_whose_writing_fails(tmp_path, monkeypatch):
    def full(path, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        prepared_files.put_image(tmp_path / "a" / "b.png", np.zeros((2, 2), np.uint8), overwrite=False)
    with pytest.raises(OSError, match="No space left"):
        prepared_files.put_json(tmp_path / "a" / "b.json", {}, overwrite=False)
    assert list((tmp_path / "a").iterdir()) == []


def test_faults_of_a_job_do_not_hide_what_it_wrote(tmp_path, capsys):
    label_map = np.zeros((2, 2), np.uint8)
    save(tmp_path / "there.png", label_map + 1)

    def convert(job):
        return Converted(images={tmp_path / "new.png": label_map, tmp_path / "there.png": label_map}, row=job)

    run = Preparation(root=tmp_path, workers=1, overwrite=False)
    assert run.convert(convert, ["job"], "test") == []
    assert run.finish() == 1
    assert "1 files written, 0 were there already, 1 faults" in capsys.readouterr().out


def test_sixteen_bit_and_colour_files(tmp_path):
    values = np.array([[0, 255, 256], [65534, 65535, 846]], np.uint16)
    colors = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    prepared_files.put_image(tmp_path / "a.tif", values, overwrite=False)
    prepared_files.put_image(tmp_path / "a.png", colors, overwrite=False)
    assert (pixels_of(tmp_path / "a.tif")[0] == values).all()
    assert (pixels_of(tmp_path / "a.png")[0] == colors).all()
    assert (prepared_files.read_segment_ids(tmp_path / "a.png")[0] == [131328, 328707, 526086]).all()


def test_values_out_of_range_are_listed(tmp_path):
    prepared_files.require_values(tmp_path, np.array([0, 7]), 7, "classes")
    with pytest.raises(PreparationError, match=r"must be in 0..7, got -1, 8, 9, 10, 11, 12, 13, 14 and 5 more$"):
        prepared_files.require_values(tmp_path, np.arange(-1, 20), 7, "classes")


def test_boxes():
    mask = np.zeros((5, 7), bool)
    mask[1, 6] = mask[4, 2] = True
    assert preparation.segment_box(mask) == [2, 1, 5, 4]
    annotation = preparation.instance_annotation(mask)
    assert (annotation["area"], annotation["bbox"]) == (2, [2, 1, 5, 4])
    assert annotation["segmentation"]["size"] == [5, 7]


def test_several_processes_give_the_same(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for root in (one, two):
        challenge = miniatures.ade20k(root, count=9)
        (challenge / "annotations/training/ADE_train_00000006.png").write_bytes(b"no image")
    assert prepare("prepare_ade20k_pan_seg", one) == 1
    process = program("prepare_ade20k_pan_seg", "--root", two, "--workers", 2)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, errors
    assert "18 files written, 0 were there already, 1 faults" in output  # 17 images and one JSON file
    assert "ADE20K panoptic train: " in errors
    assert errors.count("fault: ") == 1
    contents = [{path: data for path, (data, _) in snapshot(root).items()} for root in (one, two)]
    assert contents[0] == contents[1]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes to hold a process")
def test_ctrl_c_in_a_terminal(tmp_path):
    """The signal goes to all processes, while one of them reads a file that does not come."""
    root = miniatures.ade20k(tmp_path, count=9)
    output = root / "annotations_detectron2"
    with held_up(root / "annotations/training/ADE_train_00000007.png") as pipe:
        process = program(SEMANTIC, "--root", tmp_path, "--workers", 2)
        with contextlib.closing(process.stdout), contextlib.closing(process.stderr):
            wait_for((output / "training/ADE_train_00000006.png").exists)
            os.killpg(process.pid, signal.SIGINT)
            with pipe.open("wb") as writer:  # the worker finishes its file
                writer.write(b"no image")
            assert process.wait(timeout=PATIENCE) == 130
            errors = process.stderr.read()
    assert "interrupted; what has been written is complete" in errors
    assert "Traceback" not in errors
    done = snapshot(output)
    assert 6 <= len(done) < 18
    assert prepare(SEMANTIC, tmp_path) == 0
    assert len(snapshot(output)) == 18
    assert done.items() <= snapshot(output).items()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and named pipes to kill at a known moment")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_and_started_again(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    miniatures.ade20k(one, count=5)
    root = miniatures.ade20k(two, count=5)
    assert prepare("prepare_ade20k_pan_seg", one) == 0
    with held_up(root / "annotations_instance/training/ADE_train_00000004.png"):
        child = os.fork()
        if child == 0:
            os._exit(prepare("prepare_ade20k_pan_seg", two))
        wait_for((root / "ade20k_panoptic_train/ADE_train_00000003.png").exists)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (root / "ade20k_panoptic_train.json").exists()
    kept = snapshot(root / "ade20k_panoptic_train")
    assert len(kept) == 3
    assert prepare("prepare_ade20k_pan_seg", two) == 0
    assert kept.items() <= snapshot(root / "ade20k_panoptic_train").items()
    contents = [{path: data for path, (data, _) in snapshot(root).items()} for root in (one, two)]
    assert contents[0] == contents[1]


def test_wrong_command_lines(capsys):
    for arguments in (["--workers", "0"], ["--split", "testing"], ["--workers", "many"]):
        with pytest.raises(SystemExit) as end:
            miniatures.script(SEMANTIC).main(arguments)
        assert end.value.code == 2
