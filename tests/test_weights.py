"""Weights from elsewhere: every form they come in, what does not fit, and files that try to run code."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from mask2former.build import build_model
from mask2former.checkpoint import ModelDescription, load_model_file, load_weights, save_model_file
from mask2former.modeling.mask2former import Mask2Former
from mask2former.weight_files import read_weights
from tests.tiny import architecture, assert_equal_states, categories, fresh_model


@pytest.fixture(scope="module")
def model() -> Mask2Former:
    torch.manual_seed(3)
    return build_model(architecture())


def numpy_state(model: Mask2Former) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


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


def test_a_model_file_is_a_source_of_weights(tmp_path: Path, model: Mask2Former) -> None:
    file = tmp_path / "model.safetensors"
    save_model_file(file, model, ModelDescription(architecture=architecture(), categories=categories()))
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


@pytest.mark.parametrize("protocol", [2, 5])
def test_layouts_of_pickled_arrays(tmp_path: Path, model: Mask2Former, protocol: int) -> None:
    state = {n: np.asfortranarray(a).astype(a.dtype.newbyteorder(">")) for n, a in numpy_state(model).items()}
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(state, protocol=protocol))
    target = fresh_model()
    load_weights(target, path)
    assert_equal_states(target.state_dict(), model.state_dict())


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
    with pytest.raises(ValueError, match=rf"bomb\{suffix} cannot be read as weights: ") as caught:
        load_weights(fresh_model(), path, strict=False)
    assert not mark.exists()
    if suffix == ".pkl" and kind is not HiddenBomb:
        assert "it asks for" in str(caught.value)


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
    with pytest.raises(ValueError, match=r"arrays must hold numbers, got type 'O8'"):
        load_weights(fresh_model(), path)
    assert not mark.exists()


class ForgedArray:
    """Bytes that NumPy would take for pointers to objects: a structured type whose state hides the objects."""

    def __reduce__(self) -> Any:
        return np.zeros(1).__reduce_ex__(5)[0], (b"A" * 8, ForgedDtype(), (1,), "C")


class ForgedDtype:
    def __reduce__(self) -> Any:
        fields = {"a": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0)


def test_forged_types_of_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "forged.pkl"
    path.write_bytes(pickle.dumps({"weight": ForgedArray()}))
    with pytest.raises(ValueError, match=r"arrays must hold numbers, got type '[VO]8'"):
        load_weights(fresh_model(), path)


def test_damaged_pickles_are_never_worse_than_an_error(tmp_path: Path) -> None:
    arrays = {f"w{i}": np.full((2, 3), i, np.float32) for i in range(4)}
    rng = np.random.default_rng(0)
    for protocol in (2, 4, 5):
        whole = pickle.dumps({"model": arrays, "step": np.int64(1)}, protocol=protocol)
        for _ in range(150):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 2):
                data[place] = rng.integers(256)
            path = tmp_path / "damaged.pkl"
            path.write_bytes(data)
            try:
                read_weights(path)
            except ValueError as error:
                assert "damaged.pkl" in str(error)


# ---- files that would take all memory


def test_pickle_that_numbers_an_object_far_too_high(tmp_path: Path) -> None:
    """Python would make room for 2^31 objects."""
    path = tmp_path / "memo.pkl"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with pytest.raises(ValueError, match=r"memo\.pkl cannot be read as weights: it numbers an object 2147483647"):
        read_weights(path)


class ManyBytes:
    """A few bytes in the file, which ask for a terabyte."""

    def __reduce__(self) -> Any:
        return bytes, (10**12,)


def test_pickle_that_makes_bytes(tmp_path: Path) -> None:
    path = tmp_path / "bytes.pkl"
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"model": ManyBytes()}, protocol=protocol))
        with pytest.raises(ValueError, match=r"bytes\.pkl cannot be read as weights"):
            read_weights(path)
    path.write_bytes(pickle.dumps({"model": {}, "none": b""}, protocol=2))  # which calls bytes(), too
    assert read_weights(path) == {"model": {}, "none": b""}


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_tensors_that_repeat_one_number(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"expanded{suffix}"
    state = {"weight": torch.zeros(1).expand(10**12)}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": state}, protocol=2))
    else:
        torch.save(state, path)
    with pytest.raises(ValueError, match=rf"expanded\{suffix} must hold every value .* 'weight' \(1000000000000,\)"):
        load_weights(fresh_model(), path)


def test_compressed_archive_that_is_larger_inside(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain.pth", tmp_path / "zip.pth"
    torch.save({"weight": torch.zeros(10**6)}, plain)
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    assert path.stat().st_size < plain.stat().st_size / 100
    with pytest.raises(ValueError, match=r"zip\.pth cannot be read as weights: it would unpack to 400\d+ bytes"):
        read_weights(path)


@pytest.mark.parametrize("size", [0, 3, 200, -10])
def test_truncated_archive(tmp_path: Path, size: int, model: Mask2Former) -> None:
    path = tmp_path / "cut.pth"
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read as weights"):
        load_weights(fresh_model(), path)


@pytest.mark.parametrize("junk", [b"junk", b"a", b"\x00" * 50, b"RIFF" * 20, b"<html>", b"hello world, " * 9])
@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
def test_other_files_under_these_names(tmp_path: Path, junk: bytes, suffix: str) -> None:
    path = tmp_path / f"other{suffix}"
    path.write_bytes(junk)
    with pytest.raises(ValueError, match=rf"other\{suffix}"):
        read_weights(path)


def test_tensors_that_are_not_dense() -> None:
    with pytest.raises(ValueError, match=r"dense tensors, got torch\.sparse_coo of torch\.float32 as 'odd'"):
        load_weights(fresh_model(), {"odd": torch.eye(3).to_sparse()})


def test_renamed_model_file_with_a_pickle_inside(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "bomb.safetensors"
    path.write_bytes(pickle.dumps({"model": Bomb(mark)}))
    for load in (load_model_file, lambda p: load_weights(fresh_model(), p)):
        with pytest.raises(ValueError, match=r"bomb\.safetensors is no safetensors file"):
            load(path)
    assert not mark.exists()
