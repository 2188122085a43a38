"""Model files and weights from elsewhere: round trips, damage, and files that try to run code."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from mask2former import atomic_files
from mask2former.build import build_model
from mask2former.checkpoint import (
    ModelDescription,
    PredictionSettings,
    load_model_file,
    save_model_file,
    write_atomically,
)
from mask2former.modeling.mask2former import Mask2Former
from tests.tiny import architecture, assert_equal_states, categories, fresh_model


def describe(**changes: Any) -> ModelDescription:
    settings = PredictionSettings(tasks=("semantic", "instance"), shortest=96, score_threshold=0.25)
    layout = architecture(image_format="BGR", pixel_mean=[120.0, 110.0, 100.0])
    values = {"architecture": layout, "categories": categories(), "settings": settings, **changes}
    return ModelDescription(**values)


@pytest.fixture(scope="module")
def model() -> Mask2Former:
    torch.manual_seed(3)
    return build_model(describe().architecture)


@pytest.fixture
def file(tmp_path: Path, model: Mask2Former) -> Path:
    path = tmp_path / "model.safetensors"
    save_model_file(path, model, describe())
    return path


# ---- model files


def test_float32_round_trip_is_exact(file: Path, model: Mask2Former) -> None:
    loaded, description = load_model_file(file)
    assert_equal_states(loaded.state_dict(), model.state_dict())
    assert not loaded.training
    assert torch.equal(loaded.pixel_mean.flatten(), torch.tensor([120.0, 110.0, 100.0]))
    assert description == describe()
    assert description.image_format == "BGR"
    image = torch.zeros(3, 40, 60)
    with torch.no_grad():
        model.eval()
        expected = model.predict(model.batch_images([image]))[-1]
        actual = loaded.predict(loaded.batch_images([image]))[-1]
    assert torch.equal(actual.mask_logits, expected.mask_logits)


def test_float16_halves_the_file_and_loads_as_float32(tmp_path: Path, file: Path, model: Mask2Former) -> None:
    half = tmp_path / "half.safetensors"
    save_model_file(half, model, describe(), dtype=torch.float16)
    assert half.stat().st_size < 0.6 * file.stat().st_size
    loaded = load_model_file(half)[0].state_dict()
    rounded = {n: t.half().float() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    rounded["criterion.empty_weight"] = model.criterion.empty_weight  # a setting, as exact as ever
    assert_equal_states(loaded, rounded)
    assert any(name.endswith("relative_position_index") for name in loaded)


def test_float16_keeps_what_it_cannot_hold(tmp_path: Path) -> None:
    big = fresh_model()
    weight = big.sem_seg_head.predictor.class_embed.bias
    with torch.no_grad():
        weight[0] = 1e6
    save_model_file(tmp_path / "m.safetensors", big, describe(), dtype=torch.float16)
    loaded = load_model_file(tmp_path / "m.safetensors")[0]
    assert torch.equal(loaded.sem_seg_head.predictor.class_embed.bias, weight)


def test_notes_and_unicode_survive(tmp_path: Path, model: Mask2Former) -> None:
    notes = {"command": "train --x 'ü'", "steps": 12, "nested": {"a": [1, None, True]}}
    save_model_file(tmp_path / "m.safetensors", model, describe(notes=notes))
    assert load_model_file(tmp_path / "m.safetensors")[1].notes == notes


def test_equal_models_give_equal_bytes(tmp_path: Path, file: Path, model: Mask2Former) -> None:
    save_model_file(tmp_path / "again.safetensors", model, describe())
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_saving_and_loading_leave_random_numbers_alone(tmp_path: Path, model: Mask2Former) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    save_model_file(tmp_path / "m.safetensors", model, describe())
    load_model_file(tmp_path / "m.safetensors")
    assert torch.equal(torch.rand(4), expected)


def test_other_dtypes_are_refused(tmp_path: Path, model: Mask2Former) -> None:
    with pytest.raises(ValueError, match=r"dtype must be .* got torch\.int8"):
        save_model_file(tmp_path / "m.safetensors", model, describe(), dtype=torch.int8)
    assert not list(tmp_path.iterdir())


def test_description_of_another_model_is_refused(tmp_path: Path, model: Mask2Former) -> None:
    other = describe(architecture=architecture(num_queries=9))
    with pytest.raises(ValueError, match=r"architecture must be that of the model.*query_feat\.weight"):
        try:
            save_model_file(tmp_path / "m.safetensors", model, other)
        except ValueError as error:
            raise ValueError(str(error).replace("\n", " ")) from error
    assert not list(tmp_path.iterdir())


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    broken = fresh_model()
    with torch.no_grad():
        broken.sem_seg_head.predictor.class_embed.bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"finite, got inf or nan in .*class_embed\.bias"):
        save_model_file(tmp_path / "m.safetensors", broken, describe())


def test_wrong_number_of_categories_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each of the 4 classes .* got 3"):
        describe(categories=categories(3))


@pytest.mark.parametrize("notes", [{"a": object()}, {"a": float("nan")}])
def test_notes_must_be_plain(notes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="notes must hold plain values"):
        describe(notes=notes)


@pytest.mark.parametrize(
    "bad",
    [
        {"tasks": ()},
        {"tasks": ("depth",)},
        {"longest": 0},
        {"shortest": -1},
        {"top_k": 0},
        {"overlap_threshold": 1.5},
        {"object_mask_threshold": float("nan")},
    ],
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        PredictionSettings(**bad)


# ---- atomic writing


def test_failed_write_leaves_the_old_file_and_no_other(
    file: Path, model: Mask2Former, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model_file(file, model, describe(notes={"new": 1}))
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.png", b"abc")
    assert not list(tmp_path.iterdir())


def test_data_are_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    seen = []

    def look(descriptor: int) -> None:
        status = os.fstat(descriptor)
        seen.append(("folder" if stat.S_ISDIR(status.st_mode) else status.st_size, target.read_bytes()))

    monkeypatch.setattr(atomic_files.os, "fsync", look)
    with target.open("rb") as reader:  # who has the old file open keeps it
        write_atomically(target, b"newer")
        assert reader.read() == b"old"
    assert seen == [(5, b"old"), ("folder", b"newer")]  # the second one makes the new name last
    assert target.read_bytes() == b"newer"


def test_missing_folder(tmp_path: Path, model: Mask2Former) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_model_file(tmp_path / "nowhere" / "m.safetensors", model, describe())


# ---- damaged model files


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_truncated_file(file: Path, keep: float) -> None:
    data = file.read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    file.write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file, or is damaged"):
        load_model_file(file)


@pytest.mark.parametrize("data", [b"PK\x03\x04" + b"0" * 400, b"\x80\x02}q\x00." * 90, b"GIF89a" * 99])
def test_wrong_magic(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "picture.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"picture\.safetensors is no safetensors file"):
        load_model_file(path)


def test_no_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none"):
        load_model_file(tmp_path / "none")
    with pytest.raises(ValueError, match="must be a file"):
        load_model_file(tmp_path)


def test_missing_metadata(tmp_path: Path, model: Mask2Former) -> None:
    path = tmp_path / "bare.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    with pytest.raises(ValueError, match=r"bare\.safetensors holds tensors but no description .*load_weights"):
        load_model_file(path)


def rewrite(file: Path, change: Any) -> None:
    """Change the description, a dict, inside a model file."""
    tensors = safetensors.torch.load_file(file)
    with safetensors.safe_open(file, framework="pt") as opened:
        document = json.loads(opened.metadata()["mask2former"])
    change(document)
    safetensors.torch.save_file(tensors, file, {"mask2former": json.dumps(document)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version must be 1, got 2"),
        (lambda d: d.pop("version"), "it lacks 'version'"),
        (lambda d: d.pop("categories"), "it lacks 'categories'"),
        (lambda d: d["categories"].pop(), "each of the 4 classes .* got 3"),
        (lambda d: d["categories"][0].pop("color"), "it lacks 'color'"),
        (lambda d: d["settings"].update(top_k=0), "top_k must be at least 1"),
        (lambda d: d["settings"].update(unknown=1), "unknown"),
        (lambda d: d.update(architecture=[1]), "list"),
        (lambda d: d["architecture"].pop("backbone"), "backbone"),
        (lambda d: d["architecture"]["backbone"].update(name="vit"), "vit"),
        (lambda d: d["architecture"]["backbone"].update(colour=1), "colour"),
    ],
)
def test_unusable_description(file: Path, change: Any, message: str) -> None:
    rewrite(file, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors has a description .* used: .*{message}"):
        load_model_file(file)


def test_metadata_that_are_no_json(file: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, file, {"mask2former": "{oops"})
    with pytest.raises(ValueError, match=r"model\.safetensors has a description that cannot be used"):
        load_model_file(file)


def test_deeply_nested_metadata(file: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, file, {"mask2former": "[" * 100_000})
    with pytest.raises(ValueError, match=r"model\.safetensors has a description .* nested too deeply"):
        load_model_file(file)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("transformer_decoder", "num_queries", 10**8),
        ("transformer_decoder", "num_queries", 10**30),
        ("transformer_decoder", "num_layers", 10**9),
        ("pixel_decoder", "dim_feedforward", 10**9),
        ("backbone", "embed_dim", -16),
    ],
)
def test_description_of_a_model_that_takes_all_memory(file: Path, part: str, key: str, value: int) -> None:
    rewrite(file, lambda d: d["architecture"][part].update({key: value}))
    with pytest.raises(ValueError, match=r"model\.safetensors has a description that cannot be used"):
        load_model_file(file)


@pytest.mark.parametrize("name", ["model_final.pth", "model_final.pkl"])
def test_checkpoint_instead_of_a_model_file(tmp_path: Path, model: Mask2Former, name: str) -> None:
    torch.save({"model": model.state_dict()}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name} is no model file, .*`python -m mask2former export`"):
        load_model_file(tmp_path / name)


def test_how_images_are_prepared_stands_in_every_file(tmp_path: Path, model: Mask2Former) -> None:
    """Also where it is the default, so that another program can prepare them without this project."""
    path = tmp_path / "m.safetensors"
    save_model_file(path, model, describe(architecture=architecture()))
    with safetensors.safe_open(path, framework="pt") as opened:
        document = json.loads(opened.metadata()["mask2former"])
    assert document["architecture"]["input"] == {
        "image_format": "RGB",
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "size_divisibility": 32,
    }
    assert document["settings"]["shortest"] == 96
    assert document["categories"][1] == {"id": 11, "name": "class 1 é", "is_thing": False, "color": [1, 40, 255]}


def test_weights_that_do_not_fit_their_description(file: Path) -> None:
    rewrite(file, lambda d: d["architecture"]["transformer_decoder"].update(num_queries=9))
    with pytest.raises(ValueError, match=r"do not fit its own description(.|\n)*query_embed\.weight \(8, 32\)"):
        load_model_file(file)
