"""train_net.py's embedded engine for tests: four images a data set, losses written down, death on demand.

    LOSSES=file      each step appends "iteration loss" with all bits of the loss; other ranks to file.1, ...
    DIE=step:N       SIGKILL to itself after step N; step:N:rank for one rank only
    DIE=raise:N:rank KeyError in one rank after step N
    DIE=stop:N:rank  SIGTERM to one rank after step N
    DIE=write:N:K    SIGKILL after K bytes of the N-th checkpoint
    DIE=rename:N     SIGKILL between flushing and renaming the N-th checkpoint
    STEP_SECONDS=s   each step takes so much longer; SAVE_SECONDS, IMAGE_SECONDS: each checkpoint, each test image
"""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch

from mask2former.data import catalog
from mask2former.data.coco_datasets import CocoSplit, sample_root
from mask2former.engine import checkpoints, evaluation, launch
from mask2former.engine.step import TrainingStep

for split in ("train", "val"):
    part = CocoSplit(root=sample_root, split=split, first=4)
    for name, make in (
        (f"four_{split}_panoptic", partial(part.panoptic, with_semantic=True)),
        (f"four_{split}_semantic", part.semantic),
    ):
        catalog.register_lazily(name, partial(make, name))

DEATH = os.environ.get("DIE", "").split(":")


def rank():
    return os.environ.get("RANK", "0")  # not known yet when a process imports this


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def recorded(run):
    def run_and_record(self, batch, iteration, **arguments):
        result = run(self, batch, iteration, **arguments)
        if "LOSSES" in os.environ:
            path = os.environ["LOSSES"] + ("" if rank() == "0" else f".{rank()}")
            with Path(path).open("a") as file:
                file.write(f"{iteration} {sum(result.losses.values()).hex()}\n")
        if DEATH[:2] == ["step", str(iteration)] and DEATH[2:] in ([], [rank()]):
            die()
        if ["raise", str(iteration), rank()] == DEATH:
            raise KeyError("asked for by the test")
        if ["stop", str(iteration), rank()] == DEATH:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        return result

    return run_and_record


class DyingFile:
    def __init__(self, file, left):
        self.file, self.left = file, left

    def write(self, data):
        data = bytes(data)
        self.file.write(data[: self.left])
        if len(data) >= self.left:
            self.file.flush()
            die()
        self.left -= len(data)
        return len(data)

    def flush(self):
        self.file.flush()


COUNT = 0
save = torch.save


def counted_save(content, file):
    global COUNT
    COUNT += 1
    time.sleep(float(os.environ.get("SAVE_SECONDS", "0")))
    if DEATH[:2] == ["write", str(COUNT)]:
        save(content, DyingFile(file, int(DEATH[2])))
    save(content, file)
    if DEATH[:2] == ["rename", str(COUNT)]:
        file.flush()
        die()


def slow(predict):
    def predict_slowly(*arguments):
        time.sleep(float(os.environ.get("IMAGE_SECONDS", "0")))
        return predict(*arguments)

    return predict_slowly


TrainingStep.run = recorded(TrainingStep.run)
evaluation.predict = slow(evaluation.predict)
checkpoints.torch.save = counted_save

if __name__ == "__main__":
    sys.exit(launch.main())
