"""The embedded engine's loop: a whole run, resuming, precision, accumulation, averages, losses that are not finite."""

import json

import pytest
import torch

from mask2former.data import MappedSample
from mask2former.engine.checkpoints import CheckpointError
from mask2former.engine.evaluation import evaluate
from mask2former.engine.trainer import Trainer
from mask2former.engine.yaml_files import ConfigError
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.structures import MaskTarget


def train(cfg, *, resume=False):
    """A finished trainer and the total loss of each iteration."""
    losses = {}
    trainer = Trainer(cfg, on_step=lambda i, result: losses.update({i: sum(result.losses.values())}))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, losses


def assert_equal_models(a, b):
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name]), name


def test_a_run_trains_evaluates_logs_and_resumes_exactly(tiny):
    trainer, losses = train(tiny.cfg())
    assert sorted(losses) == [0, 1, 2, 3]
    assert set(trainer.last_results) == {"panoptic_seg", "segm", "bbox", "sem_seg"}
    folder = tiny.folder / "output"
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    names = set().union(*lines)
    assert {"total_loss", "loss_ce", "loss_mask_0", "lr", "time", "data_time", "memory_mb", "eta_seconds"} <= names
    assert {"images_per_second", "panoptic_seg/PQ", "segm/AP50", "sem_seg/mIoU", "iteration"} <= names
    assert len(list((folder / "predictions/0000003").glob("*.jpg"))) == 4
    assert {p.name for p in folder.glob("*.pth")} >= {"model_0000001.pth", "model_final.pth"}
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert list(folder.glob("events.out.tfevents.*"))

    (folder / "last_checkpoint").write_text("model_0000001.pth")
    resumed_trainer, resumed = train(tiny.cfg(), resume=True)
    assert resumed == {2: losses[2], 3: losses[3]}
    assert_equal_models(resumed_trainer.model, trainer.model)


def test_a_config_for_more_processes_is_scaled(tiny):
    changes = {"IMS_PER_BATCH": 4, "REFERENCE_WORLD_SIZE": 4, "BASE_LR": 0.004, "MAX_ITER": 1, "STEPS": "()"}
    trainer = Trainer(tiny.cfg(**{f"SOLVER__{key}": value for key, value in changes.items()}))
    assert trainer.max_iter == 4
    assert trainer.cfg.SOLVER.IMS_PER_BATCH == 1
    assert {group["initial_lr"] for group in trainer.step.optimizer.param_groups} <= {0.001, 0.001 * 0.1}
    assert trainer.cfg.SOLVER.REFERENCE_WORLD_SIZE == 1


def test_the_model_is_compiled_if_that_is_wanted(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(Mask2Former, "compile", lambda model: calls.append(model))
    Trainer(tiny.cfg())
    assert not calls
    assert Trainer(tiny.cfg(SOLVER__COMPILE=True)).model is calls[0]


def test_without_a_seed_a_resumed_run_continues_all_the_same(tiny):
    _, losses = train(tiny.cfg(SEED=-1, DATASETS__TEST="()"))
    (tiny.folder / "output/last_checkpoint").write_text("model_0000001.pth")
    _, resumed = train(tiny.cfg(SEED=-1, DATASETS__TEST="()"), resume=True)
    assert resumed == {2: losses[2], 3: losses[3]}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_stays_close_to_float32_and_resumes(tiny, make_tiny, dtype):
    _, reference = train(make_tiny().cfg(DATASETS__TEST="()"))
    changes = {"DATASETS__TEST": "()", "SOLVER__AMP__ENABLED": True, "SOLVER__AMP__DTYPE": dtype}
    trainer, losses = train(tiny.cfg(**changes))
    assert (trainer.step.scaler is not None) == (dtype == "float16")
    # the scaler starts so high that float16 skips its first steps; before, all have the same weights
    for iteration in [0] if dtype == "float16" else list(losses):
        assert losses[iteration] == pytest.approx(reference[iteration], rel=0.05)
    assert losses[0] != reference[0]
    (tiny.folder / "output/last_checkpoint").write_text("model_0000001.pth")
    _, resumed = train(tiny.cfg(**changes), resume=True)
    assert resumed == {2: losses[2], 3: losses[3]}


def test_fast_training_needs_no_scaler_and_decides_over_mixed_precision(tiny, make_tiny, caplog):
    _, reference = train(make_tiny().cfg(DATASETS__TEST="()", SOLVER__MAX_ITER=1))
    changes = {"SOLVER__MAX_ITER": 1, "SOLVER__AMP__ENABLED": True, "MODEL__MASK_FORMER__PRECISION": "fast"}
    with caplog.at_level("INFO"):
        trainer, losses = train(tiny.cfg(DATASETS__TEST="()", **changes))
    assert "MODEL.MASK_FORMER.PRECISION is fast: it decides alone, SOLVER.AMP is not read" in caplog.text
    assert trainer.step.scaler is None
    assert trainer.model.precision == "fast"
    assert losses == {0: pytest.approx(reference[0], rel=0.05)}
    assert losses != reference
    for state in trainer.step.optimizer.state.values():
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {tensor.dtype for tensor in trainer.model.parameters()} == {torch.float32}


def test_strict_training_is_plain_float32(tiny, make_tiny):
    """Inside of a step, settings are those of the mode, also in the backward pass; they are put back after it."""
    _, reference = train(make_tiny().cfg(DATASETS__TEST="()", SOLVER__MAX_ITER=1))
    cfg = tiny.cfg(
        DATASETS__TEST="()", SOLVER__MAX_ITER=1, SOLVER__AMP__ENABLED=True, MODEL__MASK_FORMER__PRECISION="strict"
    )
    trainer, found, before = Trainer(cfg), [], torch.backends.cudnn.allow_tf32
    weight = trainer.model.backbone.patch_embed.proj.weight
    weight.register_hook(lambda gradient: found.append(torch.backends.cudnn.allow_tf32))
    losses = {}
    trainer._on_step = lambda i, result: losses.update({i: sum(result.losses.values())})
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert losses == reference
    assert before
    assert found == [False]
    assert torch.backends.cudnn.allow_tf32


def test_accumulation_adds_up_the_gradients_of_the_parts(tiny):
    trainer = Trainer(tiny.cfg(SOLVER__ACCUMULATION_STEPS=2, SOLVER__CLIP_GRADIENTS__ENABLED=False))
    from mask2former.engine.data import build_train_loader

    batch = next(iter(build_train_loader(trainer.cfg, seed=1)))
    trainer.step.optimizer.step = lambda *args, **kwargs: None
    result = trainer.step.run(batch, 0, seed=1)
    found = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    from mask2former import solver

    solver.seed_step(1, 0)
    total = 0.0
    for sample in batch:
        loss = sum(trainer.model.losses([sample.image], [sample.target]).values()) / 2
        loss.backward()
        total += loss.item()
    assert sum(result.losses.values()) == pytest.approx(total, rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_the_whole_models_gradient_is_clipped(tiny):
    trainer = Trainer(tiny.cfg())
    from mask2former.engine.data import build_train_loader

    batch = next(iter(build_train_loader(trainer.cfg, seed=1)))
    trainer.step.run(batch, 0, seed=1)
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).double().norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-4)


def nothing_to_find():
    target = MaskTarget(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64, dtype=torch.bool))
    return MappedSample(torch.zeros(3, 64, 64, dtype=torch.uint8), target)


def test_a_batch_without_targets_trains(tiny):
    trainer = Trainer(tiny.cfg())
    result = trainer.step.run([nothing_to_find()] * 2, 0, seed=1)
    assert not result.skipped
    assert all(p.grad is not None for p in trainer.model.parameters())


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_if_it_persists(tiny):
    trainer = Trainer(tiny.cfg())
    before = {n: t.clone() for n, t in trainer.model.state_dict().items()}
    trainer.model.losses = lambda *_: {"loss_ce": sum(p.sum() for p in trainer.model.parameters()) * float("nan")}
    results = []
    with pytest.raises(FloatingPointError, match="10 iterations in a row"):
        for iteration in range(20):
            results.append(trainer.step.run([nothing_to_find()], iteration, seed=1))
    assert len(results) == 9
    assert all(result.skipped for result in results)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_average_of_the_weights_is_kept_evaluated_and_resumed(tiny):
    changes = {"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 0.5}
    trainer, _ = train(tiny.cfg(**changes, SOLVER__CHECKPOINT_PERIOD=1))
    folder = tiny.folder / "output"
    # its closed form from the weights after each step: 1/2 of the last, 1/4 of the one before, ..., the first twice
    name = "sem_seg_head.predictor.class_embed.weight"
    files = [*(f"model_{i:07d}.pth" for i in range(3)), "model_final.pth"]
    weights = [torch.load(folder / file)["model"][name] for file in files]
    expected = weights[0]
    for tensor in weights[1:]:
        expected = (expected + tensor) / 2
    average = trainer.ema.module.state_dict()[name]
    torch.testing.assert_close(average, expected)
    assert trainer.evaluated_model is trainer.ema.module
    assert torch.equal(torch.load(folder / "model_best.pth")["model"][name], average)
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    resumed, _ = train(tiny.cfg(**changes), resume=True)
    assert_equal_models(resumed.ema.module, trainer.ema.module)


def test_last_checkpoints_are_kept(tiny):
    changes = {"SOLVER__CHECKPOINT_PERIOD": 1, "SOLVER__MAX_ITER": 6, "DATASETS__TEST": "()"}
    train(tiny.cfg(**changes, SOLVER__CHECKPOINTS_KEPT=2))
    files = {p.name for p in (tiny.folder / "output").glob("*.pth")}
    assert files == {"model_0000003.pth", "model_0000004.pth", "model_final.pth"}


def test_best_checkpoint_is_replaced_by_better_ones_only(tiny, monkeypatch):
    values = iter([10.0, 30.0, 20.0, float("nan")])
    monkeypatch.setattr(
        "mask2former.engine.trainer.evaluate", lambda *_, **__: {"panoptic_seg": {"PQ": next(values)}}
    )
    trainer, _ = train(tiny.cfg(TEST__EVAL_PERIOD=1))
    best = torch.load(tiny.folder / "output/model_best.pth")
    assert best["iteration"] == 1
    assert trainer.best == ("panoptic_seg/PQ", 30.0)


def test_the_best_metric_is_known_after_a_resume(tiny, monkeypatch):
    """Also that of an evaluation after the checkpoint: a worse model must not take its place."""
    values = iter([30.0, 40.0, 35.0])
    monkeypatch.setattr(
        "mask2former.engine.trainer.evaluate", lambda *_, **__: {"panoptic_seg": {"PQ": next(values)}}
    )
    train(tiny.cfg(TEST__EVAL_PERIOD=1, SOLVER__MAX_ITER=2, SOLVER__STEPS="()"))
    (tiny.folder / "output/last_checkpoint").write_text("model_0000000.pth")
    trainer, losses = train(tiny.cfg(TEST__EVAL_PERIOD=1, SOLVER__MAX_ITER=2, SOLVER__STEPS="()"), resume=True)
    assert sorted(losses) == [1]
    assert trainer.best == ("panoptic_seg/PQ", 40.0)


def test_a_best_checkpoint_that_cannot_be_read_does_not_keep_a_training_from_going_on(tiny, caplog):
    train(tiny.cfg(DATASETS__TEST="()"))
    (tiny.folder / "output/model_best.pth").write_bytes(b"half")
    trainer, _ = train(tiny.cfg(DATASETS__TEST="()"), resume=True)
    assert trainer.best is None
    assert "model_best.pth, which cannot be read" in caplog.text


def test_each_evaluation_has_a_checkpoint_before_it(tiny, monkeypatch):
    def evaluate(*_, **__):
        raise OSError("evaluation fails")

    monkeypatch.setattr("mask2former.engine.trainer.evaluate", evaluate)
    with pytest.raises(OSError, match="evaluation fails"):
        train(tiny.cfg(TEST__EVAL_PERIOD=3, SOLVER__CHECKPOINT_PERIOD=0))
    assert (tiny.folder / "output/last_checkpoint").read_text() == "model_0000002.pth"


def test_processes_that_see_other_checkpoints_are_told(tiny, monkeypatch):
    """As two machines do that do not share the folder."""
    trainer = Trainer(tiny.cfg())
    monkeypatch.setattr(trainer.fabric, "broadcast", lambda own: "model_0000001.pth")
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR must be one folder that all machines share, got .*output'"):
        trainer.resume_or_load(resume=True)


@pytest.mark.parametrize("schedule", ["WarmupMultiStepLR", "WarmupPolyLR"])
def test_learning_rates_follow_the_schedule(tiny, schedule):
    rates = []
    cfg = tiny.cfg(DATASETS__TEST="()", SOLVER__LR_SCHEDULER_NAME=schedule, SOLVER__BACKBONE_MULTIPLIER=0.1)
    trainer = Trainer(cfg, on_step=lambda *_: rates.append(max(g["lr"] for g in trainer.step.optimizer.param_groups)))
    trainer.train()
    # noted after the schedule's step
    step, poly = [5e-4, 5e-4, 5e-5, 5e-5], [5e-4 * (1 - (i + 1) / 4) ** 0.9 for i in range(4)]
    assert rates == pytest.approx(step if schedule == "WarmupMultiStepLR" else poly)


def test_activation_checkpointing_gives_the_same_losses(tiny, make_tiny):
    _, plain = train(tiny.cfg(DATASETS__TEST="()"))
    _, checkpointed = train(make_tiny().cfg(DATASETS__TEST="()", MODEL__SWIN__USE_CHECKPOINT=True))
    assert checkpointed == pytest.approx(plain, rel=1e-5)


def test_evaluation_of_each_task(tiny):
    for task, data in (("SEMANTIC", "four_val_semantic"), ("INSTANCE", "four_val_panoptic")):
        off = {f"MODEL__MASK_FORMER__TEST__{t}_ON": t == task for t in ("SEMANTIC", "INSTANCE", "PANOPTIC")}
        cfg = tiny.cfg(DATASETS__TEST=f"('{data}',)", **off)
        results = evaluate(cfg, Trainer(cfg).model)
        assert set(results) == ({"sem_seg"} if task == "SEMANTIC" else {"segm", "bbox"})


def test_two_data_sets_are_told_apart(tiny):
    cfg = tiny.cfg(DATASETS__TEST="('four_val_panoptic', 'four_val_semantic')")
    results = evaluate(cfg, Trainer(cfg).model)
    assert set(results) == {"four_val_panoptic", "four_val_semantic"}


def test_unfinished_files_are_removed_and_a_missing_checkpoint_is_told(tiny):
    folder = tiny.folder / "output"
    folder.mkdir()
    for name in ("model_final.pth", "last_checkpoint", "writable"):
        (folder / f".{name}.1234abcd.tmp").write_bytes(b"half")
    (folder / "last_checkpoint").write_text("model_0000007.pth")
    trainer = Trainer(tiny.cfg())
    assert not list(folder.glob(".*"))
    with pytest.raises(CheckpointError, match=r"names model_0000007.pth, which is not in the folder"):
        trainer.resume_or_load(resume=True)
    (folder / "model_0000007.pth").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model_0000007.pth cannot be read"):
        trainer.resume_or_load(resume=True)
