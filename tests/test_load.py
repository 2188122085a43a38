"""`mask2former.load`: a file or the name of a published model."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mask2former
from mask2former.checkpoint import ModelDescription, save_model_file
from tests.tiny import architecture, categories, fresh_model, picture


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A zoo of one model; what it is asked for."""
    calls: list[Any] = []

    def load_predictor(*arguments: Any, **overrides: Any) -> str:
        calls.append((*arguments, overrides))
        return "a predictor"

    models = {"coco-panoptic-r50": None}
    zoo = SimpleNamespace(MODELS=models, is_model_name=models.__contains__, load_predictor=load_predictor)
    monkeypatch.setitem(sys.modules, "mask2former.zoo", zoo)
    monkeypatch.setattr(mask2former, "zoo", zoo, raising=False)
    return calls


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model_file(path, fresh_model(), ModelDescription(architecture=architecture(), categories=categories()))
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_file(file: Path, fetched: list[Any], kind: type) -> None:
    predictor = mask2former.load(kind(file), shortest=64, longest=96)
    assert predictor.settings.shortest == 64
    assert predictor(picture(), "semantic").labels.shape == picture().shape[:2]
    assert not fetched


def test_name_of_a_published_model(fetched: list[Any]) -> None:
    assert mask2former.load("coco-panoptic-r50", "cuda", top_k=5) == "a predictor"
    assert fetched == [("coco-panoptic-r50", "cuda", {"top_k": 5})]


def test_file_of_such_a_name(file: Path, fetched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file.rename(file.with_name("coco-panoptic-r50"))
    monkeypatch.chdir(file.parent)
    for path in ("./coco-panoptic-r50", Path("coco-panoptic-r50")):
        assert mask2former.load(path).settings.shortest == 800
    assert not fetched


def test_neither(tmp_path: Path, file: Path, fetched: list[Any]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file coco-panoptic-r5, and no .* names: coco-panoptic-r50$"):
        mask2former.load("coco-panoptic-r5")
    with pytest.raises(FileNotFoundError, match=r"no file my\.safetensors, and .*mask2former models` lists"):
        mask2former.load("my.safetensors")
    with pytest.raises(ValueError, match="must be a file, got a folder"):
        mask2former.load(tmp_path)
    with pytest.raises(TypeError, match="colour"):
        mask2former.load(file, colour=1)
