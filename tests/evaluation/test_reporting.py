"""Tables, files, flat numbers, the number by which checkpoints are compared, and progress."""

import json
import logging
import math

import pytest

from mask2former.evaluation import progress
from mask2former.evaluation.progress import with_progress
from mask2former.evaluation.reporting import flat, main_metric, report

RESULTS = {
    "panoptic_seg": {
        "PQ": 51.234, "SQ": 80.0, "PQ_th": 50.0, "SQ_th": 70.0, "PQ_st": math.nan, "SQ_st": math.nan,
        "PQ-cat": 12.5, "PQ-bus-stop": math.nan,
    },
    "segm": {"AP": 40.0, "AP50": 100.0, "AP-cat": 40.0},
    "sem_seg": {"mIoU": 33.333, "IoU-cat": 1.0, "ACC-cat": 2.0},
}  # fmt: skip

SUMMARY = """\
panoptic_seg     PQ     SQ
------------  -----  -----
all           51.23  80.00
things        50.00  70.00
stuff           nan    nan

segm     AP    AP50
----  -----  ------
      40.00  100.00

sem_seg   mIoU
-------  -----
         33.33
"""
CLASSES = """\
panoptic_seg     PQ
------------  -----
cat           12.50
bus-stop        nan

segm     AP
----  -----
cat   40.00

sem_seg   IoU   ACC
-------  ----  ----
cat      1.00  2.00
"""


def test_report_shows_tables_without_classes_and_writes_everything(tmp_path, caplog):
    class Part:
        def save(self, folder):
            (folder / "own.txt").write_text("own")

    folder = tmp_path / "inference" / "set"
    with caplog.at_level(logging.INFO, logger="mask2former"):
        report("set", RESULTS, folder, [Part()])
        report("set", RESULTS, folder)
    assert caplog.messages[0] == f"Results of set\n{SUMMARY}"
    assert (folder / "results.txt").read_text() == f"set\n\n{SUMMARY}\n{CLASSES}"
    content = json.loads((folder / "results.json").read_text())
    assert content["panoptic_seg"]["PQ"] == 51.234 and content["panoptic_seg"]["PQ_st"] is None
    assert content.keys() == RESULTS.keys() and content["sem_seg"] == RESULTS["sem_seg"]
    assert sorted(path.name for path in folder.iterdir()) == ["own.txt", "results.json", "results.txt"]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    report("set", RESULTS, tmp_path / "file" / "inference")
    assert "cannot be written into" in caplog.text


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report("set", {"segm": {}})
    assert not list(tmp_path.iterdir())


def test_flat():
    assert flat({"a": {"segm": {"AP": 1.0}}, "b": 2.0}) == {"a/segm/AP": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        (RESULTS, ("panoptic_seg/PQ", 51.234)),
        ({"boundary_panoptic_seg": {"PQ": 3.0}, "panoptic_seg": {"PQ": 4.0}}, ("panoptic_seg/PQ", 4.0)),
        ({"one": RESULTS, "two": RESULTS}, ("one/panoptic_seg/PQ", 51.234)),
        ({"panoptic_seg": {"PQ": math.nan}, "segm": {"AP": 4.0}}, ("segm/AP", 4.0)),
        ({"sem_seg": {"IoU": 5.0, "iIoU": 4.0}}, ("sem_seg/IoU", 5.0)),
        ({"sem_seg": {"mIoU": math.nan}}, None),
        ({}, None),
    ],
)
def test_main_metric(results, expected):
    assert main_metric(results) == expected


def test_progress_passes_images_on_and_ends_with_a_rate(caplog):
    with caplog.at_level(logging.INFO, logger="mask2former"):
        assert list(with_progress(iter("abc"), "set", here=3, overall=6)) == ["a", "b", "c"]
        assert list(with_progress(iter("abc"), "set", here=3, overall=6, is_shown=False)) == ["a", "b", "c"]
        assert list(with_progress([], "empty", here=0, overall=0)) == []
    assert [message.split(" in ")[0] for message in caplog.messages] == [
        "Predicted 6 images of set", "Predicted 0 images of empty",
    ]  # fmt: skip
    assert caplog.messages[0].endswith("images/s")


def test_progress_without_a_terminal_is_a_line_now_and_then(caplog, monkeypatch):
    now = iter(range(0, 1000, 20))  # seconds: each look at the clock is twenty later
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    with caplog.at_level(logging.INFO, logger="mask2former"):
        list(with_progress("abcd", "set", here=4, overall=8))
    # looks: start, then one after each image at 20, 40, ...; a line when more than 30 s have passed
    assert caplog.messages[:2] == [
        "set: 4 of 8 images, 0.1 images/s, 0:00:40 left", "set: 8 of 8 images, 0.1 images/s, 0:00:00 left",
    ]  # fmt: skip
