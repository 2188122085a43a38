"""Training with Detectron2: a whole run, resuming, precision, accumulation, and losses that are not finite."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.utils.events import EventStorage

from mask2former.d2.launch import main
from mask2former.d2.trainer import MaskFormerStep, Trainer
from mask2former.modeling.mask2former import Mask2Former

REPOSITORY = Path(__file__).parents[2]


class Recorder:
    """Wraps a trainer's step and keeps the total loss of each iteration."""

    def __init__(self, trainer):
        self.losses = {}
        step = trainer._trainer
        write = step._write_metrics

        def record(losses, *args, **kwargs):
            self.losses[step.iter] = sum(losses.values()).item()
            return write(losses, *args, **kwargs)

        step._write_metrics = record


def run(cfg, *, resume=False):
    torch.manual_seed(0)  # the same initial weights in every run
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    recorder = Recorder(trainer)
    results = trainer.train()
    return trainer, recorder.losses, results


def test_a_run_trains_evaluates_logs_and_resumes_exactly(tiny_cfg):
    """Four iterations in one go, and the same stopped after two: equal losses, to the last bit."""
    trainer, losses, _ = run(tiny_cfg)
    assert sorted(losses) == [0, 1, 2, 3]
    output = Path(tiny_cfg.OUTPUT_DIR)
    results = trainer._last_eval_results
    assert set(results) == {"panoptic_seg", "segm", "bbox", "sem_seg"}
    assert {"PQ", "PQ_th", "PQ_st"} <= set(results["panoptic_seg"])
    assert {"mIoU", "pACC"} <= set(results["sem_seg"])
    assert "AP50" in results["segm"]
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert {"total_loss", "loss_ce", "lr", "data_time", "memory_mb", "panoptic_seg/PQ"} <= set().union(*lines)
    assert list(output.glob("events.out.tfevents.*"))

    # as if killed after iteration 1: the last checkpoint is that of iteration 1
    (output / "last_checkpoint").write_text("model_0000001.pth")
    resumed_trainer, resumed, _ = run(tiny_cfg, resume=True)
    assert resumed == {2: losses[2], 3: losses[3]}
    for name, tensor in resumed_trainer.model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_mixed_precision_stays_close_to_float32(tiny_cfg):
    tiny_cfg.TEST.EVAL_PERIOD = 0
    _, reference, _ = run(tiny_cfg)
    tiny_cfg.SOLVER.AMP.ENABLED = True
    for dtype in ("bfloat16", "float16"):
        tiny_cfg.SOLVER.AMP.DTYPE = dtype
        trainer, losses, _ = run(tiny_cfg)
        assert trainer._trainer.grad_scaler.is_enabled() == (dtype == "float16")
        assert sorted(losses) == [0, 1, 2, 3]
        # the scaler starts so high that float16 skips its first steps; before, all have the same weights
        same_weights = [0] if dtype == "float16" else list(losses)
        for iteration in same_weights:
            assert losses[iteration] == pytest.approx(reference[iteration], rel=0.05), dtype
        assert losses[0] != reference[0]  # it was really used


def test_fast_training_needs_no_scaler_and_decides_over_mixed_precision(tiny_cfg):
    tiny_cfg.DATASETS.TEST = ()
    tiny_cfg.TEST.EVAL_PERIOD = 0
    tiny_cfg.SOLVER.MAX_ITER = 1
    _, reference, _ = run(tiny_cfg)
    tiny_cfg.SOLVER.AMP.ENABLED = True
    tiny_cfg.MODEL.MASK_FORMER.PRECISION = "fast"
    trainer, losses, _ = run(tiny_cfg)
    assert not trainer._trainer.grad_scaler.is_enabled()
    assert trainer.model.precision == "fast"
    assert losses == {0: pytest.approx(reference[0], rel=0.05)}
    assert losses != reference
    for state in trainer._trainer.optimizer.state.values():
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_accumulation_adds_up_the_gradients_of_the_parts(tiny_cfg):
    """The mean gradient of two parts: from one forward pass of each part by hand."""
    tiny_cfg.SOLVER.ACCUMULATION_STEPS = 2
    tiny_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    trainer = Trainer(tiny_cfg)
    step, model = trainer._trainer, trainer.model
    batch = next(iter(step.data_loader))
    torch.manual_seed(0)
    losses = step._backward(batch)
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    step.optimizer.zero_grad()
    torch.manual_seed(0)
    total = 0
    for sample in batch:
        loss = sum(model([sample]).values()) / 2
        loss.backward()
        total += loss.item()
    assert sum(losses.values()).item() == pytest.approx(total, rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_the_model_is_compiled_if_that_is_wanted(tiny_cfg, monkeypatch):
    calls = []
    monkeypatch.setattr(Mask2Former, "compile", lambda model: calls.append(model))
    tiny_cfg.SOLVER.COMPILE = True
    assert Trainer(tiny_cfg)._trainer.model is calls[0]


def test_accumulation_must_divide_the_batch(tiny_cfg):
    tiny_cfg.SOLVER.ACCUMULATION_STEPS = 3
    with pytest.raises(ValueError, match="ACCUMULATION_STEPS"):
        Trainer(tiny_cfg)


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_if_it_persists(tiny_cfg):
    trainer = Trainer(tiny_cfg)
    step, model = trainer._trainer, trainer.model
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.forward = lambda batch: {"loss_ce": sum(p.sum() for p in model.parameters()) * float("nan")}
    with EventStorage(), pytest.raises(FloatingPointError, match="10 iterations in a row"):
        for iteration in range(20):
            step.iter = iteration
            step.run_step()
    assert iteration == 9
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_whole_model_gradients_are_clipped(tiny_cfg):
    trainer = Trainer(tiny_cfg)
    step = trainer._trainer
    norms = []
    update = step.optimizer.step

    def watch(*args, **kwargs):
        grads = [p.grad for p in step.model.parameters()]
        norms.append(torch.cat([grad.flatten() for grad in grads]).double().norm().item())
        return update(*args, **kwargs)

    step.optimizer.step = watch
    with EventStorage():
        step.iter = 0
        step.run_step()
    assert norms[0] == pytest.approx(0.01, rel=1e-4)


def test_a_config_of_another_model_is_refused(tiny_cfg):
    tiny_cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    with pytest.raises(ValueError, match="GeneralizedRCNN"):
        Trainer(tiny_cfg)


def test_learning_rates_follow_the_schedule(tiny_cfg):
    tiny_cfg.TEST.EVAL_PERIOD = 0
    tiny_cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    trainer, _, _ = run(tiny_cfg)
    groups = {(g["initial_lr"], g["weight_decay"]) for g in trainer._trainer.optimizer.param_groups}
    assert groups == {(5e-5, 0.05), (5e-5, 0.0), (5e-4, 0.05), (5e-4, 0.0)}
    assert len(trainer._trainer.optimizer.param_groups) == 4
    assert {round(g["lr"] / g["initial_lr"], 6) for g in trainer._trainer.optimizer.param_groups} == {0.1}


@pytest.fixture
def config_file(tmp_path):
    """One iteration at 64 pixels, and an evaluation of eight images."""
    path = tmp_path / "config.yaml"
    path.write_text(
        f"_BASE_: {REPOSITORY}/configs/quick_schedules/smoke.yaml\n"
        "DATASETS: {TRAIN: [coco_sample_val], TEST: [coco_sample_train8_sem_seg]}\n"
        "INPUT: {DATASET_MAPPER_NAME: coco_instance_lsj, IMAGE_SIZE: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}\n"
        "SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 1, STEPS: [1]}\n"
        "MODEL: {MASK_FORMER: {TRAIN_NUM_POINTS: 64, TEST: {PANOPTIC_ON: False, INSTANCE_ON: False}}}\n"
        f"OUTPUT_DIR: {tmp_path}/out\n"
    )
    return path


def command_line(config_file, *arguments):
    return subprocess.run(
        [sys.executable, REPOSITORY / "train_net.py", "--config-file", config_file, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=300,
    )


def test_train_net_trains_in_two_processes_and_evaluates_in_one(config_file, tmp_path):
    """From the command line: train one iteration, then --eval-only from its checkpoint gives the same numbers.

    --num-gpus counts processes where there is no GPU.
    """
    trained = command_line(config_file, "--num-gpus", "2")
    assert trained.returncode == 0, trained.stderr
    again = command_line(config_file, "--eval-only", "MODEL.WEIGHTS", f"{tmp_path}/out/model_final.pth")
    assert again.returncode == 0, again.stderr
    numbers = [
        [line.split("copypaste:")[1] for line in (x.stdout + x.stderr).splitlines() if "copypaste:" in line]
        for x in (trained, again)
    ]
    assert any("mIoU" in line for line in numbers[0])
    assert numbers[0] == numbers[1]


def test_train_net_refuses_flags_after_overrides(config_file):
    with pytest.raises(SystemExit, match="--resume") as stopped:
        main(["--config-file", str(config_file), "SOLVER.MAX_ITER", "1", "--resume"])
    assert isinstance(stopped.value.code, str)  # which is printed, with exit code 1


def test_step_state_holds_the_loss_scaler(tiny_cfg):
    tiny_cfg.SOLVER.AMP.ENABLED = True
    trainer = Trainer(tiny_cfg)
    step = trainer._trainer
    assert isinstance(step, MaskFormerStep)
    state = step.state_dict()
    state["grad_scaler"]["scale"] = 8.0
    step.load_state_dict(state)
    assert step.grad_scaler.get_scale() == 8.0
