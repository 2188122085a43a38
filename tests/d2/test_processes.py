"""Several processes of Detectron2's engine: they equal one with all their images, and find each other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

REPOSITORY = Path(__file__).parents[2]

DOUBLE = """
import os, sys, traceback
import torch, torch.distributed as dist
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
import mask2former.d2.trainer as d2
from mask2former.d2 import get_config
from tests.same_points import use_same_points

use_same_points()
torch.set_default_dtype(torch.float64)
ITERATIONS = 5

def with_large_objects(sample, empty):
    # which query gets which of two objects that no point hits is decided by the last bit of a sum
    instances = Instances(sample["instances"].image_size)
    masks, labels = sample["instances"].gt_masks.tensor, sample["instances"].gt_classes
    keep = masks.flatten(1).sum(1) >= 100
    instances.gt_masks, instances.gt_classes = (masks[keep], labels[keep]) if not empty else (masks[:0], labels[:0])
    return {**sample, "instances": instances}

def batches(cfg, kind):
    loader = iter(d2.build_train_loader(cfg))
    return [
        [with_large_objects(sample, kind == "empty" and place >= 2) for place, sample in enumerate(next(loader))]
        for _ in range(ITERATIONS)
    ]

def main(cfg, wholes, result):
    rank, share = comm.get_rank(), cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
    torch.manual_seed(0)
    d2.build_train_loader = lambda cfg: [whole[rank * share : (rank + 1) * share] for whole in wholes]
    trainer, losses = d2.Trainer(cfg), []
    with EventStorage() as storage:
        for iteration in range(ITERATIONS):
            trainer._trainer.iter = storage.iter = iteration
            trainer._trainer.run_step()
            losses.append({name: value for name, (value, _) in storage.latest().items() if "loss" in name})
    if rank == 0:
        model = getattr(trainer.model, "module", trainer.model)
        torch.save((losses, model.state_dict()), result)

def in_child(rank, count, port, *arguments):
    # as Detectron2's launcher starts it, but with all that was imported
    if child := os.fork():
        return child
    code = 1
    try:
        if count > 1:
            address = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", init_method=address, world_size=count, rank=rank)
            comm.create_local_process_group(count)
        main(*arguments)
        comm.synchronize()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)

if __name__ == "__main__":
    folder, kind, port, config_file, *words = sys.argv[1:]
    cfg = get_config(config_file, words)
    wholes = batches(cfg, kind)
    for count in (1, 2):
        children = [in_child(rank, count, port, cfg, wholes, f"{folder}/{count}.pth") for rank in range(count)]
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit(1)
"""


def settings(folder):
    values = {
        "OUTPUT_DIR": folder / "output",
        "DATASETS.TRAIN": "('coco_sample_train_panoptic_with_sem_seg',)",
        "DATASETS.TEST": "()",
        "INPUT.IMAGE_SIZE": 64,
        "MODEL.DEVICE": "cpu",
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 128,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 20,
    }
    return [str(word) for pair in values.items() for word in pair]


def start(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *(str(word) for word in words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=REPOSITORY, **streams)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def numbers(folder, count):
    return torch.load(folder / f"{count}.pth")


@pytest.mark.parametrize("kind", [pytest.param("full", marks=pytest.mark.slow), "empty"])
def test_two_processes_equal_one_with_the_double_batch(tmp_path, kind):
    """Losses and weights over five steps, also when the second process has images without any object.

    In float64, so that no threshold is near enough for a sum in another order to cross it.
    """
    program = tmp_path / "double.py"
    program.write_text(DOUBLE)
    config_file = REPOSITORY / "configs/quick_schedules/smoke.yaml"
    words = [tmp_path, kind, free_port(), config_file, *settings(tmp_path), "SOLVER.IMS_PER_BATCH", 4]
    process = start(program, *words)
    text, _ = process.communicate(timeout=200)
    assert process.returncode == 0, text
    (one, weights), (two, other) = numbers(tmp_path, 1), numbers(tmp_path, 2)
    assert weights["sem_seg_head.predictor.query_feat.weight"].dtype == torch.float64
    assert len(one) == 5
    assert one[0]["total_loss"] != one[4]["total_loss"]
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-9)
    for name in weights:
        torch.testing.assert_close(other[name], weights[name], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_two_machines(tmp_path):
    """Two launchers with one process each, as on two machines."""
    config_file = REPOSITORY / "configs/quick_schedules/smoke.yaml"
    flags = ["--num-gpus", 1, "--num-machines", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    both = [
        start(
            "train_net.py", "--engine", "detectron2", "--config-file", config_file, *flags, "--machine-rank", machine,
            *settings(tmp_path), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "(1,)", "SOLVER.IMS_PER_BATCH", 2,
        )
        for machine in (0, 1)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], texts
    state = torch.load(tmp_path / "output/model_final.pth", weights_only=False)
    assert state["iteration"] == 1
