"""Model files and weights from elsewhere: round trips, damage, and files that try to run code."""

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from mask2former import checkpoint
from mask2former.build import build_model
from mask2former.checkpoint import (
    ModelDescription,
    PredictionSettings,
    load_model_file,
    load_weights,
    save_model_file,
    write_atomically,
)
from mask2former.modeling.mask2former import Mask2Former
from tests.tiny import K, architecture, categories


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


def fresh_model(num_classes: int = K, num_queries: int = 8) -> Mask2Former:
    torch.manual_seed(99)
    return build_model(architecture(num_classes, num_queries))


def assert_equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def numpy_state(model: Mask2Former) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


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

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        save_model_file(file, model, describe(notes={"new": 1}))
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.png", b"abc")
    assert not list(tmp_path.iterdir())


def test_data_are_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    seen = []

    def look(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, target.read_bytes()))

    monkeypatch.setattr(checkpoint.os, "fsync", look)
    write_atomically(target, b"newer")
    assert seen == [(5, b"old")]
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


def test_weights_that_do_not_fit_their_description(file: Path) -> None:
    rewrite(file, lambda d: d["architecture"]["transformer_decoder"].update(num_queries=9))
    with pytest.raises(ValueError, match=r"do not fit its own description(.|\n)*query_embed\.weight \(8, 32\)"):
        load_model_file(file)


# ---- weights from elsewhere


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("as_arrays", [True, False])
def test_pickled_weights_as_detectron2_publishes_them(
    tmp_path: Path, model: Mask2Former, protocol: int, as_arrays: bool
) -> None:
    state = numpy_state(model) if as_arrays else model.state_dict()
    content = {"model": state, "__author__": "someone", "iteration": np.int64(5), "none": None}
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    target = fresh_model()
    report = load_weights(target, path)
    assert_equal_states(target.state_dict(), model.state_dict())
    assert report.complete
    assert set(report.loaded) == model.state_dict().keys()


@pytest.mark.parametrize("form", ["pth", "pth wrapped", "legacy pth", "safetensors", "dict", "pkl plain"])
def test_other_sources(tmp_path: Path, model: Mask2Former, form: str) -> None:
    state = model.state_dict()
    source: Any = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pkl" if "pkl" in form else "w.pth")
    if form == "safetensors":
        safetensors.torch.save_file(state, source)
    elif form == "dict":
        source = numpy_state(model)
    elif form == "pkl plain":
        source.write_bytes(pickle.dumps(OrderedDict(numpy_state(model))))
    else:
        optimizer = torch.optim.AdamW(model.parameters()).state_dict()
        content = {"model": state, "optimizer": optimizer, "iteration": 7} if "wrapped" in form else state
        torch.save(content, source, _use_new_zipfile_serialization="legacy" not in form)
    target = fresh_model()
    assert load_weights(target, source).complete
    assert_equal_states(target.state_dict(), state)


def test_a_model_file_is_a_source_of_weights(file: Path, model: Mask2Former) -> None:
    target = fresh_model()
    load_weights(target, str(file))
    assert_equal_states(target.state_dict(), model.state_dict())


def test_module_prefix_is_stripped_when_all_have_it(model: Mask2Former) -> None:
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    target = fresh_model()
    assert load_weights(target, {"model": state}).complete
    assert_equal_states(target.state_dict(), model.state_dict())
    state["extra"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"not in the model: .*module\."):
        load_weights(fresh_model(), state)


def test_big_endian_and_half_weights(model: Mask2Former) -> None:
    state = {n: a.astype(a.dtype.newbyteorder(">")) for n, a in numpy_state(model).items()}
    target = fresh_model()
    load_weights(target, state)
    assert_equal_states(target.state_dict(), model.state_dict())
    load_weights(target, {n: t.half() if t.is_floating_point() else t for n, t in model.state_dict().items()})
    assert target.sem_seg_head.predictor.class_embed.weight.dtype == torch.float32


def test_names_of_the_first_releases(model: Mask2Former) -> None:
    old = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query")
        old[name] = tensor
    assert old.keys() != model.state_dict().keys()
    target = fresh_model()
    report = load_weights(target, old)
    assert report.complete
    assert_equal_states(target.state_dict(), model.state_dict())
    report = load_weights(fresh_model(num_queries=9), old, strict=False)
    assert "sem_seg_head.predictor.query_feat.weight" in {m.name for m in report.mismatched}


@pytest.mark.parametrize("into_backbone", [True, False])
def test_backbone_weights(tmp_path: Path, model: Mask2Former, into_backbone: bool) -> None:
    arrays = {n: t.numpy() for n, t in model.backbone.state_dict().items()}
    content = {"model": {**arrays, "head.weight": np.ones((2, 2))}, "matching_heuristics": True}
    path = tmp_path / "swin.pkl"
    path.write_bytes(pickle.dumps(content))
    target = fresh_model()
    report = load_weights(target.backbone if into_backbone else target, path, strict=False)
    assert report.unexpected == ("head.weight",)
    assert len(report.loaded) == len(arrays)
    assert_equal_states(target.backbone.state_dict(), model.backbone.state_dict())
    assert bool(report.missing) != into_backbone


def test_strict_error_names_tensors_and_changes_nothing(model: Mask2Former) -> None:
    target = fresh_model(num_classes=5)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(target, model.state_dict())
    message = str(caught.value)
    assert "predictor.class_embed.weight (5, 32) in the file, (6, 32) in the model" in message
    assert "criterion.empty_weight (5,) in the file, (6,) in the model" in message
    assert "3 of another shape" in message
    assert_equal_states(target.state_dict(), before)


def test_report_of_a_partial_load(model: Mask2Former) -> None:
    target = fresh_model(num_classes=5)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    state = dict(model.state_dict())
    del state["backbone.patch_embed.proj.weight"]
    state["backbone.surplus"] = torch.ones(3)
    report = load_weights(target, state, strict=False)
    skipped = {
        "sem_seg_head.predictor.class_embed.weight",
        "sem_seg_head.predictor.class_embed.bias",
        "criterion.empty_weight",
    }
    assert {m.name for m in report.mismatched} == skipped
    assert report.missing == ("backbone.patch_embed.proj.weight",)
    assert report.unexpected == ("backbone.surplus",)
    assert not report.complete
    assert len(report.loaded) == len(before) - 4
    after = target.state_dict()
    for name in before:
        expected = before if name in skipped or name in report.missing else state
        assert torch.equal(after[name], expected[name]), name
    text = str(report)
    assert f"{len(report.loaded)} tensors fit" in text
    assert "1 not in the file: backbone.patch_embed.proj.weight" in text
    assert "1 not in the model: backbone.surplus" in text


def test_long_reports_are_shortened(model: Mask2Former) -> None:
    state = {"backbone.patch_embed.proj.weight": model.state_dict()["backbone.patch_embed.proj.weight"]}
    text = str(load_weights(fresh_model(), state, strict=False))
    assert f"and {len(model.state_dict()) - 21} more" in text


def test_loading_leaves_no_hooks_behind(model: Mask2Former) -> None:
    target = fresh_model()
    load_weights(target, model.state_dict())
    assert not any(module._load_state_dict_pre_hooks for module in target.modules())
    target.load_state_dict(model.state_dict())


def test_nothing_loaded_is_an_error_even_if_not_strict() -> None:
    with pytest.raises(ValueError, match="no tensor that the model could take"):
        load_weights(fresh_model(), {"conv1.weight": torch.ones(3)}, strict=False)
    with pytest.raises(ValueError, match="no tensor that the model could take"):
        load_weights(fresh_model(), {}, strict=False)


@pytest.mark.parametrize("value", ["text", None, [1, 2], np.array(["a"]), np.array([None])])
def test_values_that_are_no_tensors(value: Any) -> None:
    with pytest.raises(ValueError, match=r"must hold arrays or tensors of numbers, got .* as 'odd'"):
        load_weights(fresh_model(), {"odd": value})


def test_unreadable_weight_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(fresh_model(), tmp_path / "none.pth")
    for name in ("junk.pkl", "junk.pth", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"this is no file of weights" * 20)
        with pytest.raises(ValueError, match=name):
            load_weights(fresh_model(), tmp_path / name)
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"list\.pkl must hold a dict of tensors, got list"):
        load_weights(fresh_model(), tmp_path / "list.pkl")


def test_truncated_pickle(tmp_path: Path, model: Mask2Former) -> None:
    data = pickle.dumps({"model": numpy_state(model)})
    path = tmp_path / "cut.pkl"
    for size in (1, 10, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"cut\.pkl cannot be read as weights"):
            load_weights(fresh_model(), path)


# ---- files that try to run code


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class EvalBomb(Bomb):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').mkdir({str(self.path)!r})",)


class HiddenBomb(Bomb):
    """Inside the bytes that torch's own function for storages would unpickle."""

    def __reduce__(self) -> Any:
        import torch.storage

        inner = self.path.with_suffix(".inner")
        torch.save(Bomb(self.path), inner, _use_new_zipfile_serialization=False)
        return torch.storage._load_from_bytes, (inner.read_bytes(),)


class StateBomb(Bomb):
    """By way of an admitted class: its state would hold the call."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"x": Bomb(self.path)}


def write_bomb(path: Path, bomb: Any, protocol: int) -> None:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": {"weight": bomb}}, protocol=protocol))
    else:
        torch.save({"model": {"weight": bomb}}, path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", [Bomb, EvalBomb, HiddenBomb, StateBomb])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_pickle_bombs_do_not_go_off(tmp_path: Path, kind: type[Bomb], suffix: str, protocol: int) -> None:
    mark, path = tmp_path / "mark", tmp_path / f"bomb{suffix}"
    write_bomb(path, kind(mark), protocol)
    with pytest.raises(ValueError, match=rf"bomb\{suffix} cannot be read as weights"):
        load_weights(fresh_model(), path, strict=False)
    assert not mark.exists()


def test_the_bomb_is_real(tmp_path: Path) -> None:
    for number, kind in enumerate((Bomb, EvalBomb, HiddenBomb, StateBomb)):
        mark, path = tmp_path / f"mark{number}", tmp_path / "bomb.pkl"
        write_bomb(path, kind(mark), 2)
        if kind is HiddenBomb:
            torch.load(mark.with_suffix(".inner"), weights_only=False)
        else:
            pickle.loads(path.read_bytes())
        assert mark.exists(), kind


def test_bomb_in_an_object_array(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "bomb.pkl"
    path.write_bytes(pickle.dumps({"weight": np.array([Bomb(mark)], dtype=object)}))
    with pytest.raises(ValueError, match=r"it asks for (posix|nt)\.mkdir, but only arrays"):
        load_weights(fresh_model(), path)
    assert not mark.exists()


def test_renamed_model_file_with_a_pickle_inside(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "bomb.safetensors"
    path.write_bytes(pickle.dumps({"model": Bomb(mark)}))
    for load in (load_model_file, lambda p: load_weights(fresh_model(), p)):
        with pytest.raises(ValueError, match=r"bomb\.safetensors is no safetensors file"):
            load(path)
    assert not mark.exists()
