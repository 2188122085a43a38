"""Counting in the background: the same numbers, in order, and what happens when something goes wrong."""

import logging
import threading
import time

import pytest

from mask2former.evaluation.background import BackgroundUpdates
from mask2former.evaluation.tasks import Task


class Sums(Task):
    """Notes what it is given, and by which thread; fails at an image that is told to."""

    def __init__(self):
        super().__init__({})
        self.taken, self.counted, self.threads = [], [], set()
        self.may_count = threading.Event()
        self.may_count.set()

    def take(self, result):
        assert threading.current_thread() is threading.main_thread()
        self.taken.append(result)
        return 10 * result

    def count(self, record, taken):
        self.may_count.wait(10)
        self.threads.add(threading.current_thread())
        if "error" in record:
            raise record["error"]
        self.counted.append((record["image_id"], taken))


def records(count):
    return [{"image_id": i, "file_name": f"pictures/{i}.jpg"} for i in range(count)]


def is_left():
    return [thread for thread in threading.enumerate() if thread.name.startswith("evaluation")]


def test_all_images_are_counted_in_order_by_one_other_thread():
    tasks = [Sums(), Sums()]
    with BackgroundUpdates(tasks) as counting:
        assert not is_left()  # before the first image: loaders fork
        for record in records(20):
            time.sleep(0.001 * (record["image_id"] % 3))
            counting.update(record, record["image_id"])
    for task in tasks:
        assert task.counted == [(i, 10 * i) for i in range(20)]
        assert len(task.threads) == 1 and threading.main_thread() not in task.threads
    assert not is_left()


def test_images_wait_only_so_many():
    task = Sums()
    task.may_count.clear()
    waits = threading.Timer(0.2, task.may_count.set)
    counting = BackgroundUpdates([task])
    for record in records(2):
        counting.update(record, 0)
    assert task.counted == []  # both wait
    waits.start()
    counting.update(records(3)[2], 0)  # comes back when the first one is done
    assert task.counted
    counting.finish()
    assert len(task.counted) == 3


@pytest.mark.parametrize("place", [0, 5, 9])
def test_an_error_has_the_name_of_its_image_and_ends_the_evaluation(caplog, place):
    task, images = Sums(), records(10)
    images[place]["error"] = KeyError("segments_info")
    with pytest.raises(KeyError, match="segments_info") as caught, BackgroundUpdates([task]) as counting:
        for record in images:
            counting.update(record, 0)
    assert caught.value is images[place]["error"]
    assert [record.message for record in caplog.records] == [f"Evaluating image pictures/{place}.jpg failed"]
    assert caplog.records[0].levelno == logging.ERROR
    assert task.counted[:place] == [(i, 0) for i in range(place)]
    assert len(task.taken) <= place + 4 and not is_left()


def test_an_image_without_a_file_is_named_by_its_id(caplog):
    with pytest.raises(ZeroDivisionError), BackgroundUpdates([Sums()]) as counting:
        counting.update({"image_id": 17, "error": ZeroDivisionError()}, 0)
    assert "image 17 failed" in caplog.text


def test_an_interruption_drops_what_waits():
    task = Sums()
    task.may_count.clear()
    with pytest.raises(KeyboardInterrupt), BackgroundUpdates([task]) as counting:
        for record in records(2):
            counting.update(record, 0)
        threading.Timer(0.1, task.may_count.set).start()
        raise KeyboardInterrupt
    assert len(task.counted) <= 1 and not is_left()


def test_it_goes_on_after_it_was_finished():
    task = Sums()
    counting = BackgroundUpdates([task])
    counting.finish()
    for record in records(2):
        counting.update(record, 1)
        counting.finish()
    assert task.counted == [(0, 10), (1, 10)] and not is_left()
