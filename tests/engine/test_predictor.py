"""From a config and its checkpoint to predictions and a model file, without Detectron2."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from mask2former.engine.config import ConfigError
from mask2former.engine.predictor import export_model, predictor_from_config
from mask2former.engine.trainer import Trainer
from mask2former.predictor import Predictor

from .conftest import ROOT, SMOKE

QUERIES = ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "20")
PICTURE = ROOT / "demo/pictures/yellow_bus.jpg"


@pytest.fixture
def weights(tiny):
    path = tiny.folder / "weights.pth"
    torch.save({"model": Trainer(tiny.cfg()).model.state_dict()}, path)
    return path


def test_model_file_predicts_as_the_config_does(tiny, weights):
    cfg = tiny.cfg(MODEL__WEIGHTS=weights)
    path = tiny.folder / "model.safetensors"
    export_model(cfg, path, dtype=torch.float32)
    ours, file = predictor_from_config(cfg), Predictor.from_file(path)
    assert ours.settings == file.settings
    assert ours.categories == file.categories
    assert ours.settings.shortest == 64
    assert np.array_equal(ours(PICTURE, "semantic").labels, file(PICTURE, "semantic").labels)


def test_precision_of_a_config_is_that_of_its_predictor(tiny, weights):
    cfg = tiny.cfg(MODEL__WEIGHTS=weights, MODEL__MASK_FORMER__PRECISION="fast")
    predictor = predictor_from_config(cfg)
    assert predictor.precision == predictor.model.precision == "fast"
    path = tiny.folder / "model.safetensors"
    export_model(cfg, path, dtype=torch.float32)
    assert Predictor.from_file(path).precision is None


def test_no_data_set_with_the_models_classes(tiny, weights):
    with pytest.raises(ConfigError, match="DATASETS must name a data set of 133 classes"):
        predictor_from_config(tiny.cfg(MODEL__WEIGHTS=weights, DATASETS__TRAIN="()", DATASETS__TEST="()"))


@pytest.mark.parametrize("kind", ["demo", "export"])
def test_commands_read_configs_without_detectron2(tiny, weights, kind):
    if kind == "demo":
        words = ["demo/demo.py", "--input", PICTURE, "--output", tiny.folder / "out", "--device", "cpu"]
        words += ["--config-file", SMOKE, "--opts", "MODEL.WEIGHTS", weights, "INPUT.MIN_SIZE_TEST", 64, *QUERIES]
    else:
        words = ["-m", "mask2former", "export", "--config-file", SMOKE, "--weights", weights]
        words += ["--to", tiny.folder / "out.safetensors", *QUERIES]
    start = "import runpy, sys; sys.modules.update(detectron2=None, fvcore=None); sys.argv = sys.argv[1:]; "
    module = words[0] == "-m"
    run = f"runpy.run_{'module' if module else 'path'}({str(words[1 if module else 0])!r}, run_name='__main__')"
    command = [sys.executable, "-c", start + run, *words[1 if module else 0 :]]
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, cwd=ROOT, env=tiny.environment)
    assert done.returncode == 0, done.stderr
    assert (tiny.folder / "out").is_dir() if kind == "demo" else (tiny.folder / "out.safetensors").is_file()
