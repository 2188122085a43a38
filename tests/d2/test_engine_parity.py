"""The two engines: same settings from every config, same training from the same weights, each other's checkpoints."""

import json

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed, see requirements-train.txt")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.projects.deeplab import add_deeplab_config

from mask2former.config import DEFAULTS
from mask2former.d2 import Trainer as Detectron2Trainer
from mask2former.d2 import get_config as detectron2_config
from mask2former.data import SegmentationMapper, catalog
from mask2former.engine import defaults
from mask2former.engine.config import get_config
from mask2former.engine.trainer import Trainer
from tests.configs import FILES, TRANSLATIONS, flatten, name_of, value_of


def test_defaults_are_those_of_detectron2():
    theirs = flatten(get_cfg())
    for key, value in defaults.DETECTRON2_DEFAULTS.items():
        assert (type(value), value) == (type(theirs[key]), theirs[key]), key
    assert not defaults.DETECTRON2_DEFAULTS.keys() & DEFAULTS.keys()


def test_each_key_of_detectron2_is_read_refused_or_known_to_be_without_effect():
    cfg = get_cfg()
    add_deeplab_config(cfg)
    keys = flatten(cfg).keys()
    handled = defaults.DETECTRON2_DEFAULTS.keys() | DEFAULTS.keys()
    assert not {key for key in keys if key not in handled and not defaults.is_ignored(key)}
    assert not {key for key in handled if defaults.is_ignored(key)}
    assert keys >= defaults.IGNORED_KEYS
    assert all(any(key.startswith(f"{section}.") for key in keys) for section in defaults.IGNORED_SECTIONS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_config_resolves_to_the_same_settings(path, tmp_path):
    theirs, ours = detectron2_config(path), get_config(path)
    for key in [*defaults.DETECTRON2_DEFAULTS, *DEFAULTS]:
        a, b = value_of(theirs, key), value_of(ours, key)
        assert (type(a), a) == (type(b), b), key
    for translate in TRANSLATIONS:
        assert outcome(translate, theirs) == outcome(translate, ours)
    dump = tmp_path / "dump.yaml"
    dump.write_text(theirs.dump())
    assert get_config(dump) == ours
    dump.write_text(ours.dump())
    assert read_keys(detectron2_config(dump)) == read_keys(theirs)


def read_keys(cfg):
    """Without what the embedded engine drops unread."""
    return {key: value for key, value in flatten(cfg).items() if not defaults.is_ignored(key)}


def outcome(translate, cfg):
    """What a translation gives or, of a file that is no whole config or needs timm, says."""
    try:
        return translate(cfg)
    except (ModuleNotFoundError, ValueError) as error:
        return str(error)


@pytest.fixture
def both(tiny_cfg, tmp_path):
    """Makes the same tiny config for both engines; overrides as on a command line."""
    for name in (*tiny_cfg.DATASETS.TRAIN, *tiny_cfg.DATASETS.TEST):
        if name not in catalog.names():
            whole = catalog.get(name.removeprefix("four_of_"))
            entry = catalog.CatalogEntry(name, lambda name=name: DatasetCatalog.get(name), whole.metadata)
            catalog.register(entry)

    def make(folder, *overrides):
        cfg = tiny_cfg.clone()
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / folder), *overrides])
        dump = tmp_path / "config.yaml"
        dump.write_text(cfg.dump())
        return cfg, get_config(dump)

    return make


def train_with_detectron2(cfg, *, resume=False):
    trainer = Detectron2Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    losses, step = {}, trainer._trainer
    write = step._write_metrics

    def record(values, *args, **kwargs):
        losses[step.iter] = {name: loss.item() for name, loss in values.items()}
        return write(values, *args, **kwargs)

    step._write_metrics = record
    trainer.train()
    return trainer, losses


def train(cfg, *, resume=False):
    losses = {}
    trainer = Trainer(cfg, on_step=lambda iteration, result: losses.update({iteration: result.losses}))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer, losses


def start_weights(cfg, path):
    torch.manual_seed(3)
    torch.save({"model": Detectron2Trainer.build_model(cfg).state_dict()}, path)
    return ["MODEL.WEIGHTS", str(path)]


def assert_close_models(a, b, tolerance=1e-5):
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


OTHERS = ["SOLVER.ACCUMULATION_STEPS", "2", "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.OPTIMIZER", "SGD"]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        pytest.param(OTHERS, marks=pytest.mark.slow),
        pytest.param(["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"], marks=pytest.mark.slow),
    ],
    ids=["plain", "accumulation-poly-sgd", "bfloat16"],
)
def test_twenty_iterations_give_the_same_losses_weights_and_results(both, tmp_path, changes):
    settings = ["SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(12, 16)", "SOLVER.BACKBONE_MULTIPLIER", "0.5", *changes]
    settings += start_weights(both("start", *settings)[0], tmp_path / "start.pth")
    theirs, their_losses = train_with_detectron2(both("detectron2", *settings)[0])
    ours, our_losses = train(both("embedded", *settings)[1])
    assert sorted(our_losses) == list(range(20))
    for iteration, losses in their_losses.items():
        assert our_losses[iteration] == pytest.approx(losses, rel=1e-4), iteration
    assert_close_models(ours.model, theirs.model)
    assert len(set(map(json.dumps, our_losses.values()))) == 20
    for task, values in theirs._last_eval_results.items():
        assert ours.last_results[task] == pytest.approx(values, abs=1e-6, nan_ok=True)


RESNET = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "0"]


@pytest.fixture
def float64():
    """Models that are built in the test are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def large_objects(monkeypatch):
    """No small objects: several of one class that no point hits are the same to the matcher, which rounding decides."""
    whole = SegmentationMapper.__call__

    def mapped(self, record, rng):
        sample = whole(self, record, rng)
        keep = sample.target.masks.flatten(1).sum(1) >= 100
        return sample._replace(target=sample.target._replace(objects=sample.target.objects[keep]))

    monkeypatch.setattr(SegmentationMapper, "__call__", mapped)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [[], ["MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.RESNETS.NORM", "BN", "SOLVER.WEIGHT_DECAY_NORM", "0.1"]],
    ids=["frozen-statistics", "frozen-stages"],
)
@pytest.mark.usefixtures("float64", "large_objects")
def test_twenty_iterations_of_a_resnet(both, tmp_path, changes):
    """Detectron2 builds its own ResNet, equal up to rounding.

    In float64: in float32 AdamW's first steps, which are as large for tiny gradients, and thresholds (ReLU, attention
    masks, matching, choice of points) turn rounding into 1e-2 of the losses within ten iterations.
    """
    settings = [*RESNET, "SOLVER.MAX_ITER", "20", "SOLVER.STEPS", "(12, 16)", *changes]
    settings += start_weights(both("start", *settings)[0], tmp_path / "start.pth")
    theirs, their_losses = train_with_detectron2(both("detectron2", *settings)[0])
    ours, our_losses = train(both("embedded", *settings)[1])
    assert sorted(our_losses) == list(range(20))
    for iteration, losses in their_losses.items():
        assert our_losses[iteration] == pytest.approx(losses, rel=1e-9), iteration
    assert ours.model.state_dict()["backbone.stem.conv1.weight"].dtype == torch.float64
    assert_close_models(ours.model, theirs.model, tolerance=1e-7)


@pytest.mark.slow
def test_a_resnet_starts_with_the_same_losses_in_float32(both, tmp_path):
    """Before and after the first step; see the test above for those that follow."""
    settings = [*RESNET, "SOLVER.MAX_ITER", "2", "SOLVER.STEPS", "()"]
    settings += start_weights(both("start", *settings)[0], tmp_path / "start.pth")
    _, their_losses = train_with_detectron2(both("detectron2", *settings)[0])
    _, our_losses = train(both("embedded", *settings)[1])
    assert sorted(our_losses) == [0, 1]
    for iteration, losses in their_losses.items():
        assert our_losses[iteration] == pytest.approx(losses, rel=1e-5 if iteration == 0 else 1e-4), iteration


@pytest.mark.parametrize(
    "precision",
    [[], pytest.param(["SOLVER.AMP.ENABLED", "True"], marks=pytest.mark.slow)],
    ids=["float32", "float16"],
)
@pytest.mark.parametrize("first", ["detectron2", "embedded"])
def test_a_training_changes_engines(both, tmp_path, first, precision):
    """Stopped after two of four iterations in one engine and resumed in the other: as if it had not stopped."""
    settings = ["DATASETS.TEST", "()", "TEST.EVAL_PERIOD", "0", *precision]
    settings += start_weights(both("start", *settings)[0], tmp_path / "start.pth")
    whole, _ = train_with_detectron2(both("whole", *settings)[0])
    cfgs = both("changing", *settings)
    (train_with_detectron2 if first == "detectron2" else train)(cfgs[first != "detectron2"])
    (tmp_path / "changing/last_checkpoint").write_text("model_0000001.pth")
    if first == "detectron2":
        changed, losses = train(cfgs[1], resume=True)
        rates = [group["lr"] for group in changed.step.optimizer.param_groups]
    else:
        changed, losses = train_with_detectron2(cfgs[0], resume=True)
        rates = [group["lr"] for group in changed._trainer.optimizer.param_groups]
    assert sorted(losses) == [2, 3]
    assert rates == [group["lr"] for group in whole._trainer.optimizer.param_groups]
    assert_close_models(changed.model, whole.model)


def test_what_the_embedded_engine_alone_can_do_is_refused(tiny_cfg):
    tiny_cfg.SOLVER.EMA.ENABLED = True
    with pytest.raises(ValueError, match=r"SOLVER\.EMA\.ENABLED is on"):
        Detectron2Trainer(tiny_cfg)


def test_detectron2_keeps_as_many_checkpoints(both, tmp_path):
    settings = ["SOLVER.CHECKPOINTS_KEPT", "1", "SOLVER.CHECKPOINT_PERIOD", "1", "DATASETS.TEST", "()"]
    train_with_detectron2(both("kept", *settings)[0])
    assert {p.name for p in (tmp_path / "kept").glob("*.pth")} == {"model_0000003.pth", "model_final.pth"}
