"""Mistakes and failures end with a message that names key, rule and value, and lose nothing that was saved."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from mask2former.engine.checkpoints import CheckpointError, CheckpointFolder
from mask2former.engine.launch import main
from mask2former.engine.trainer import Trainer

from .conftest import ROOT, SMOKE

TASKS = ("SEMANTIC", "INSTANCE", "PANOPTIC")


def message(tiny, capsys, *flags, **changes):
    """What the engine says, in this process, when it refuses."""
    code = main([str(word) for word in (*flags, "--config-file", SMOKE, *tiny.overrides(**changes))])
    assert code == 1
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"SOLVER__BASE_LRR": 1}, ["SOLVER.BASE_LRR", "nearest is SOLVER.BASE_LR"]),
        ({"SOLVER__MAX_ITER": "many"}, ["SOLVER.MAX_ITER", "an integer", "'many'"]),
        ({"DATASETS__TRAIN": "('coco_sampel_train',)"}, ["DATASETS.TRAIN", "'coco_sampel_train'", "coco_sample_train"]),
        ({"DATASETS__TEST": "('no_such_set',)"}, ["DATASETS.TEST", "'no_such_set'"]),
        ({"DATASETS__TRAIN": "()"}, ["DATASETS.TRAIN", "at least one image"]),
        ({"MODEL__WEIGHTS": "no_such_file.pth"}, ["MODEL.WEIGHTS", "no_such_file.pth"]),
        ({"MODEL__SEM_SEG_HEAD__NUM_CLASSES": 80}, ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "must be 133", "got 80"]),
        ({"MODEL__DEVICE": "tpu"}, ["MODEL.DEVICE", "'tpu'"]),
        ({"MODEL__META_ARCHITECTURE": "GeneralizedRCNN"}, ["MODEL.META_ARCHITECTURE", "'GeneralizedRCNN'"]),
        ({"SOLVER__ACCUMULATION_STEPS": 3}, ["SOLVER.ACCUMULATION_STEPS", "got 3"]),
        ({"SOLVER__EMA__ENABLED": True, "SOLVER__EMA__DECAY": 1.5}, ["SOLVER.EMA.DECAY", "1.5"]),
        ({"DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}, ["DATALOADER.SAMPLER_TRAIN"]),
        ({"TEST__PRECISE_BN__ENABLED": True}, ["TEST.PRECISE_BN.ENABLED", "must be False", "got True"]),
        ({"INPUT__DATASET_MAPPER_NAME": "mask_former_typo"}, ["INPUT.DATASET_MAPPER_NAME", "mask_former_typo"]),
        ({f"MODEL__MASK_FORMER__TEST__{t}_ON": False for t in TASKS}, ["four_val_panoptic", "switches none on"]),
        ({"OUTPUT_DIR": "/proc/no/such"}, ["OUTPUT_DIR", "/proc/no/such"]),
        ({"FLOAT32_PRECISION": "best"}, ["FLOAT32_PRECISION", "'highest', 'high' or 'medium'", "'best'"]),
    ],
)  # fmt: skip
def test_settings(tiny, capsys, changes, parts):
    text = message(tiny, capsys, **changes)
    for part in parts:
        assert part in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny, capsys):
    text = message(tiny, capsys, MODEL__DEVICE="cuda")
    assert "MODEL.DEVICE must be cpu where PyTorch finds no GPU, got 'cuda'" in text


def test_files_of_a_data_set_that_are_missing(tiny, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tiny.folder))
    text = message(tiny, capsys, DATASETS__TRAIN="('coco_2017_train_panoptic',)")
    assert "coco_2017_train_panoptic" in text
    assert "DETECTRON2_DATASETS" in text


def test_weights_of_another_number_of_classes(tiny, make_tiny, capsys, caplog):
    """Evaluation and resuming refuse them; training starts from what fits, and says what does not."""
    trainer = Trainer(tiny.cfg())
    state = trainer.model.state_dict()
    state["sem_seg_head.predictor.class_embed.weight"] = torch.zeros(81, 128)
    path = tiny.folder / "other.pth"
    torch.save({"model": state}, path)
    text = message(tiny, capsys, "--eval-only", MODEL__WEIGHTS=path)
    assert "MODEL.WEIGHTS must be a checkpoint of the model in the config" in text
    assert "class_embed.weight (81, 128) in the file, (134, 128) in the model" in text
    with caplog.at_level("WARNING"):
        trainer = Trainer(make_tiny().cfg(MODEL__WEIGHTS=path))
        trainer.resume_or_load(resume=False)
    assert "2 re-initialised: sem_seg_head.predictor.class_embed.weight (" in caplog.text
    output = tiny.folder / "output"
    output.mkdir(exist_ok=True)
    shutil.copy(path, output / "model_0000001.pth")
    (output / "last_checkpoint").write_text("model_0000001.pth")
    assert "class_embed.weight" in message(tiny, capsys, "--resume")


def test_weights_alone_cannot_be_resumed_from(tiny, capsys):
    folder = CheckpointFolder(tiny.folder / "output")
    folder.prepare()
    folder.save("model_0000001", {"model": Trainer(tiny.cfg()).model.state_dict()})
    assert "holds weights only" in message(tiny, capsys, "--resume")


def test_evaluation_needs_weights(tiny, capsys):
    assert "MODEL.WEIGHTS must name a checkpoint to evaluate, got ''" in message(tiny, capsys, "--eval-only")


def test_a_file_that_would_run_code_is_no_weights(tiny, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tiny.folder}/proof",)

    torch.save({"model": Evil()}, tiny.folder / "evil.pth")
    assert "MODEL.WEIGHTS" in message(tiny, capsys, MODEL__WEIGHTS=tiny.folder / "evil.pth")
    assert not (tiny.folder / "proof").exists()


def test_a_loss_that_is_never_finite(tiny, capsys):
    path = tiny.folder / "nan.pth"
    state = Trainer(tiny.cfg()).model.state_dict()
    state["sem_seg_head.predictor.class_embed.bias"].fill_(float("nan"))
    torch.save({"model": state}, path)
    text = message(tiny, capsys, MODEL__WEIGHTS=path, SOLVER__MAX_ITER=20, SOLVER__CHECKPOINT_PERIOD=0)
    assert "matching costs were not finite in 10 iterations in a row" in text
    assert "lower SOLVER.BASE_LR" in text


def test_weights_and_biases_that_is_not_installed(tiny, capsys, monkeypatch):
    monkeypatch.setattr("mask2former.engine.progress.find_spec", lambda name: None)
    assert "LOGGING.WANDB_PROJECT needs the package wandb" in message(tiny, capsys, LOGGING__WANDB_PROJECT="x")


def test_flags_after_overrides_are_refused(tiny, capsys):
    assert main(["--config-file", str(SMOKE), "SEED", "1", "--resume"]) == 2
    assert "--resume after SEED" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 60 MB, of which this test has its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("a small file system can be mounted by the administrator only")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_loses_nothing(tiny, capsys, small_disk):
    """A checkpoint has 39 MB: the first fits, the second does not, and training can go on from the first."""
    changes = {"OUTPUT_DIR": small_disk, "SOLVER__CHECKPOINT_PERIOD": 1, "DATASETS__TEST": "()"}
    text = message(tiny, capsys, **changes)
    assert "model_0000001.pth could not be written: No space left on device" in text
    assert "the last checkpoint is model_0000000.pth" in text
    assert sorted(p.name for p in small_disk.glob("*.pth")) == ["model_0000000.pth"]
    assert not list(small_disk.glob(".*"))
    trainer = Trainer(tiny.cfg(**changes))
    trainer.resume_or_load(resume=True)
    assert trainer.start == 1


def test_a_log_that_cannot_be_written_does_not_end_the_training(tiny, caplog):
    (tiny.folder / "output/metrics.json").mkdir(parents=True)
    trainer = Trainer(tiny.cfg(DATASETS__TEST="()"))
    trainer.train()
    assert "metrics.json cannot be written, so the log ends here" in caplog.text
    assert (tiny.folder / "output/model_final.pth").exists()


def test_a_read_only_folder(tiny, capsys, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    text = message(tiny, capsys, OUTPUT_DIR=small_disk / "output")
    assert "OUTPUT_DIR must be a folder that can be written to" in text
    assert "Read-only file system" in text


def test_evaluation_into_a_folder_that_cannot_be_written_to_is_refused_before_it_starts(tiny, capsys):
    text = message(tiny, capsys, "--eval-only", MODEL__WEIGHTS="x.pth", OUTPUT_DIR="/proc/no/such")
    assert "OUTPUT_DIR must be a folder that can be written to" in text


def test_evaluation_leaves_what_a_training_is_writing(tiny, capsys):
    unfinished = tiny.folder / "output/.model_final.pth.1234abcd.tmp"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"half")
    assert "no_such_file.pth" in message(tiny, capsys, "--eval-only", MODEL__WEIGHTS="no_such_file.pth")
    assert unfinished.exists()


def test_a_fault_of_the_program_has_its_traceback(tiny, capsys, monkeypatch):
    """A ValueError from elsewhere does not say what the user should do."""
    monkeypatch.setattr("mask2former.engine.launch.Trainer", lambda cfg: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        message(tiny, capsys)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save("model_final", {"model": {}})

    class Unwritable:
        def __reduce__(self):
            raise RuntimeError("cannot be stored")

    with pytest.raises(CheckpointError, match=r"the last checkpoint is model_final\.pth"):
        folder.save("model_final", {"model": Unwritable()})
    assert folder.load(tmp_path / "model_final.pth") == {"model": {}}
    assert len(list(tmp_path.iterdir())) == 2


BLOCKED = """
import runpy, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("detectron2", "fvcore", "iopath", "torchvision"):
            raise AssertionError("imports " + name)
sys.argv = ["train_net.py", *sys.argv[1:]]
if "--engine" in sys.argv:
    sys.meta_path.insert(0, Blocker())
runpy.run_path("train_net.py", run_name="__main__")
"""


def test_train_net_never_imports_detectron2(tiny):
    """Train, resume and evaluate from the command line, with an import of Detectron2 forbidden."""
    settings = [*tiny.overrides(DATASETS__TRAIN="('coco_sample_val_sem_seg',)", DATASETS__TEST="()")]
    settings += ["INPUT.DATASET_MAPPER_NAME", "mask_former_semantic", "SOLVER.CHECKPOINT_PERIOD", "0"]
    settings += ["INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "(1,)"]
    words = ["--engine", "embedded", "--config-file", str(SMOKE)]

    def run(*flags, **environment):
        command = [sys.executable, "-c", BLOCKED, *words, *flags]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=tiny.environment, timeout=300)

    trained = run(*settings)
    assert trained.returncode == 0, trained.stderr
    assert "train_net.py: engine embedded (chosen)" in trained.stdout
    resumed = run("--resume", *settings, "SOLVER.MAX_ITER", "3")
    assert resumed.returncode == 0, resumed.stderr
    assert "at iteration 2" in resumed.stdout
    weights = str(tiny.folder / "output/model_final.pth")
    evaluated = run("--eval-only", *settings, "DATASETS.TEST", "('coco_sample_val_sem_seg',)", "MODEL.WEIGHTS", weights)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "copypaste: mIoU" in evaluated.stdout
