"""train_net.py takes the engine that is there, or says what is missing."""

import importlib.util
import re

import pytest

from .conftest import ROOT


@pytest.fixture
def train_net():
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def have(train_net, monkeypatch, *installed):
    monkeypatch.setattr(train_net, "find_spec", lambda name: name if name in installed else None)


def test_the_engine_that_is_there_is_taken(train_net, monkeypatch):
    have(train_net, monkeypatch, "detectron2", "lightning_fabric", "yaml")
    assert [train_net.choose(engine) for engine in train_net.ENGINES] == ["detectron2", "detectron2", "embedded"]
    have(train_net, monkeypatch, "lightning_fabric", "yaml")
    assert train_net.choose("auto") == "embedded"


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("auto", "--engine embedded needs lightning_fabric, yaml, .* pip install -r requirements-train.txt"),
        ("embedded", "--engine embedded needs lightning_fabric, yaml"),
        ("detectron2", "--engine detectron2 needs detectron2, which is not installed; README.md"),
    ],
)
def test_what_is_missing_is_told(train_net, monkeypatch, engine, message):
    have(train_net, monkeypatch)
    with pytest.raises(SystemExit) as caught:
        train_net.choose(engine)
    assert re.search(message, str(caught.value))
