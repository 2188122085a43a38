"""The log: medians as Detectron2 writes them, Weights & Biases when asked for, a bar on a terminal."""

import fcntl
import json
import os
import pty
import select
import statistics
import struct
import sys
import termios
from types import ModuleType

import pytest

from mask2former.engine.progress import TrainingLog

NUMBERS = {"lr": 0.1, "data_time": 0.0, "memory_mb": 5.0}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_lines_have_medians_of_twenty_iterations(tmp_path):
    log = TrainingLog(tmp_path, start=0, max_iter=45, images_per_batch=2)
    losses = [float(i * i % 17) for i in range(45)]
    for iteration, loss in enumerate(losses):
        log.step(iteration, {"total_loss": loss, **NUMBERS, "lr": 1.0 / (iteration + 1)})
    log.results(44, {"segm/AP": 12.0})
    log.close()
    lines = lines_of(tmp_path)
    assert [line["iteration"] for line in lines] == [19, 39, 44, 44]
    ends = (20, 40, 45)
    assert [line["total_loss"] for line in lines[:3]] == [statistics.median(losses[e - 20 : e]) for e in ends]
    assert [line["lr"] for line in lines[:3]] == [1 / e for e in ends]
    assert lines[2]["eta_seconds"] == 0
    assert lines[3] == {"segm/AP": 12.0, "iteration": 44}


def test_a_step_that_is_skipped_does_not_count(tmp_path):
    log = TrainingLog(tmp_path, start=0, max_iter=20, images_per_batch=2)
    for iteration in range(20):
        if iteration == 7:
            log.skip()
        else:
            log.step(iteration, {"total_loss": float(iteration), **NUMBERS})
    log.close()
    [line] = lines_of(tmp_path)
    assert line["total_loss"] == statistics.median(i for i in range(20) if i != 7)


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    seen = []
    run = type("Run", (), {"log": lambda self, *a, **k: seen.append((a, k)), "finish": lambda self: seen.append("end")})
    wandb = ModuleType("wandb")
    wandb.__spec__ = object()
    wandb.init = lambda **arguments: seen.append(arguments["project"]) or run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = TrainingLog(tmp_path, start=0, max_iter=1, images_per_batch=2, wandb_project="colours")
    log.step(0, {"total_loss": 3.0, **NUMBERS})
    log.close()
    assert seen[0] == "colours"
    assert seen[1][0][0]["total_loss"] == 3.0
    assert seen[1][1] == {"step": 0}
    assert seen[2] == "end"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a terminal as Linux has them")
def test_a_terminal_gets_a_bar(tmp_path, monkeypatch):
    own, other = pty.openpty()
    monkeypatch.setattr(sys, "stderr", os.fdopen(other, "w"))
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    log = TrainingLog(tmp_path, start=0, max_iter=20, images_per_batch=2)
    for iteration in range(20):
        log.step(iteration, {"total_loss": 3.0, **NUMBERS})
    log.close()
    text = ""
    while select.select([own], [], [], 1.0)[0]:
        text += os.read(own, 100_000).decode()
    assert "20/20" in text
    assert "loss 3.000" in text
