"""Batches, all tasks at once, half types and threads: each gives what single calls in float32 give."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mask2former
from mask2former import predictor as predictor_module
from mask2former.checkpoint import ModelDescription, save_model_file
from mask2former.predictor import InstancePicture, PanopticPicture, PictureResult, Predictor
from tests.tiny import architecture, assert_same_pictures, categories, lively_model, lively_predictor, picture

TASKS = ("panoptic", "instance", "semantic")
HALF = (torch.bfloat16, torch.float16)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return lively_predictor()


def pixels_of(result: PictureResult) -> np.ndarray:
    """What is at each pixel: (H, W), or (N, H, W) of instances."""
    if isinstance(result, PanopticPicture):
        return result.ids
    return result.masks if isinstance(result, InstancePicture) else result.labels


def assert_close(found: PictureResult, expected: PictureResult, *, score: float, share: float) -> None:
    """The same things, with scores that differ by ``score`` and pixels by a ``share`` at most."""
    assert type(found) is type(expected)
    here, there = pixels_of(found), pixels_of(expected)
    assert here.shape == there.shape
    assert here.dtype == there.dtype
    assert np.mean(here != there) <= share
    assert found.names == expected.names
    if hasattr(expected, "scores"):
        np.testing.assert_allclose(found.scores, expected.scores, atol=score)
        assert found.scores.dtype == np.float32


class Spy:
    """Notes the shape of each batch and the type of its logits."""

    def __init__(self, predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.dtypes: set[torch.dtype] = set()
        self.sizes: list[set[torch.Size]] = []
        predict, batch_images = predictor.model.predict, predictor.model.batch_images

        def noting_predict(batch: torch.Tensor, **options: Any) -> Any:
            predictions = predict(batch, **options)
            self.batches.append(tuple(batch.shape))
            self.dtypes |= {logits.dtype for logits in predictions[-1]}
            return predictions

        def noting_batch_images(images: list[torch.Tensor]) -> torch.Tensor:
            self.sizes.append({image.shape for image in images})
            return batch_images(images)

        monkeypatch.setattr(predictor.model, "predict", noting_predict)
        monkeypatch.setattr(predictor.model, "batch_images", noting_batch_images)


# ---- batches

# after the resize (64, 90), (91, 64), (64, 90), (64, 90), (64, 64), (91, 64), (96, 160)
SIZES = [(50, 70), (71, 50), (64, 90), (100, 140), (30, 30), (142, 100), (60, 100)]


@pytest.mark.parametrize("task", TASKS)
def test_batch_equals_single_calls(predictor: Predictor, monkeypatch: pytest.MonkeyPatch, task: Any) -> None:
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    expected = [predictor(pixels, task) for pixels in pictures]
    spy = Spy(predictor, monkeypatch)
    found = predictor.batch(pictures, task)
    assert sorted(batch[0] for batch in spy.batches) == [1, 1, 2, 3]
    assert all(len(sizes) == 1 for sizes in spy.sizes)
    assert len(found) == len(pictures)
    for result, other, size in zip(found, expected, SIZES, strict=True):
        assert pixels_of(result).shape[-2:] == size
        assert_close(result, other, score=1e-5, share=1e-3)


def test_pictures_on_one_canvas_but_of_different_sizes_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = lively_predictor(shortest=0)
    pictures = [picture(64, 60), picture(64, 64)]  # both are padded to (64, 64)
    expected = [predictor(pixels) for pixels in pictures]
    spy = Spy(predictor, monkeypatch)
    for result, other in zip(predictor.batch(pictures), expected, strict=True):
        assert_same_pictures(result, other)
    assert spy.batches == [(1, 3, 64, 64)] * 2


def test_batch_is_bounded_and_reads_as_it_goes(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "BATCH_PIXELS", 3 * 64 * 64)
    spy, asked = Spy(predictor, monkeypatch), []

    def pictures() -> Iterator[np.ndarray]:
        for seed, size in enumerate([64, 64, 64, 64, (64, 96), 64, 64, (64, 160), 64]):
            asked.append(len(spy.batches))
            yield picture(*((size, size) if isinstance(size, int) else size), seed=seed)

    found = predictor.batch(pictures())
    assert [batch[0] for batch in spy.batches] == [3, 1, 3, 1, 1]
    assert [batch[3] for batch in spy.batches] == [64, 96, 64, 160, 64]
    assert asked == [0, 0, 0, 0, 1, 1, 2, 2, 3]
    assert [result.ids.shape[1] for result in found] == [64, 64, 64, 64, 96, 64, 64, 160, 64]


def test_a_picture_larger_than_the_bound(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "BATCH_PIXELS", 10)
    spy = Spy(predictor, monkeypatch)
    assert len(predictor.batch([picture(), picture()])) == 2
    assert [batch[0] for batch in spy.batches] == [1, 1]


def test_batch_takes_all_forms(predictor: Predictor, tmp_path: Path) -> None:
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels]
    expected = predictor.batch([pixels] * 4, "semantic")
    for result, other in zip(predictor.batch(forms, "semantic"), expected, strict=True):
        assert_same_pictures(result, other)
    for result, other in zip(predictor.batch(np.stack([pixels] * 4), "semantic"), expected, strict=True):
        assert_same_pictures(result, other)
    assert predictor.batch([]) == []


def test_batch_of_a_bgr_model() -> None:
    pixels = picture()
    swapped = lively_predictor(image_format="BGR").batch([pixels[..., ::-1]] * 2)
    assert_same_pictures(swapped[1], lively_predictor().batch([pixels] * 2)[1])


def test_batch_takes_task_and_threshold(predictor: Predictor) -> None:
    pixels = picture()
    (found,) = predictor.batch([pixels], "instance", threshold=0.4)
    assert_same_pictures(found, predictor(pixels, "instance", threshold=0.4))
    assert len(found.scores) < len(predictor(pixels, "instance").scores)


SINGLE = ("a.png", Path("a.png"), picture(), picture()[..., 0], Image.new("RGB", (4, 4)), None)


@pytest.mark.parametrize("images", SINGLE)
def test_one_picture_is_no_batch(predictor: Predictor, images: Any) -> None:
    with pytest.raises(ValueError, match=f"images must be several pictures, .* got one {type(images).__name__}"):
        predictor.batch(images)


def test_batch_says_which_picture_is_wrong(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match=r"images\[1\]: image must be .* got bool"):
        predictor.batch([picture(), np.zeros((4, 4), bool)])
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        predictor.batch([picture(), "none.png"])
    with pytest.raises(ValueError, match="task must be one of"):
        predictor.batch([], "depth")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold must be None"):
        predictor.batch([], "semantic", threshold=0.5)


# ---- all tasks


def test_all_tasks_run_the_model_once(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture()
    expected = {task: predictor(pixels, task) for task in TASKS}
    spy = Spy(predictor, monkeypatch)
    found = predictor.all_tasks(pixels)
    assert len(spy.batches) == 1
    assert tuple(found) == TASKS
    for task in TASKS:
        assert_same_pictures(found[task], expected[task])


def test_all_tasks_are_those_of_the_model() -> None:
    assert tuple(lively_predictor(tasks=("semantic", "panoptic")).all_tasks(picture())) == ("semantic", "panoptic")


# ---- types and modes


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_types_are_close(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, task: Any
) -> None:
    # below 0.45 there is a query whose two best classes are 0.007 apart, which is less than half types round
    half = lively_predictor(dtype=dtype, score_threshold=0.45, object_mask_threshold=0.45)
    spy = Spy(half, monkeypatch)
    threshold = None if task == "semantic" else 0.45
    expected = predictor(picture(), task, threshold=threshold)
    assert_close(half(picture(), task), expected, score=0.05, share=0.03)
    assert spy.dtypes == {dtype}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}
    for result in half.batch([picture()] * 2, task):
        assert_close(result, expected, score=0.05, share=0.03)


def test_half_types_from_a_file(tmp_path: Path) -> None:
    description = ModelDescription(architecture=architecture(), categories=categories())
    save_model_file(tmp_path / "m.safetensors", lively_model(), description)
    loaded = Predictor.from_file(tmp_path / "m.safetensors", dtype=torch.bfloat16, shortest=64, longest=160)
    assert loaded.dtype is torch.bfloat16
    assert_same_pictures(loaded(picture(), "semantic"), lively_predictor(dtype=torch.bfloat16)(picture(), "semantic"))
    assert Predictor.from_file(tmp_path / "m.safetensors").dtype is torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64, torch.int8, None])
def test_other_types_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, torch\.bfloat16, torch\.float16, got "):
        lively_predictor(dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_modes_do_not_matter(dtype: torch.dtype) -> None:
    predictor, pixels = lively_predictor(dtype=dtype), picture()
    expected = predictor.all_tasks(pixels)
    with torch.autocast("cpu", torch.float16), torch.enable_grad():
        found = predictor.all_tasks(pixels)
        single = {task: predictor(pixels, task) for task in TASKS}
        (several,) = predictor.batch([pixels])
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.float16
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    for task in TASKS:
        assert_same_pictures(found[task], expected[task])
        assert_same_pictures(single[task], expected[task])
    assert_same_pictures(several, expected["panoptic"])


@pytest.mark.parametrize("task", TASKS)
def test_fast_is_close(predictor: Predictor, monkeypatch: pytest.MonkeyPatch, task: Any) -> None:
    fast = lively_predictor(precision="fast", score_threshold=0.7)
    assert (fast.precision, fast.dtype) == ("fast", torch.bfloat16)
    spy = Spy(fast, monkeypatch)
    threshold, pixels = 0.7 if task == "instance" else None, picture(seed=2)
    expected = predictor(pixels, task, threshold=threshold)
    for result in (fast(pixels, task), *fast.batch([pixels] * 2, task)):
        assert_close(result, expected, score=0.05, share=0.03)
    assert spy.dtypes == {torch.float32}
    assert fast.with_queries(pixels, task)[1].dtype == np.float32
    alone = fast(pixels, task)
    with torch.autocast("cpu", torch.float16), torch.enable_grad():
        assert_same_pictures(fast(pixels, task), alone)


@pytest.mark.parametrize("precision", ["strict", "tf32"])
def test_float32_modes_give_the_same_bits_on_a_cpu(predictor: Predictor, precision: Any) -> None:
    other = lively_predictor(precision=precision)
    assert (other.precision, other.dtype) == (precision, torch.float32)
    for task, expected in predictor.all_tasks(picture()).items():
        assert_same_pictures(other(picture(), task), expected)


def test_precision_is_a_setting_of_the_model() -> None:
    model = lively_model()
    assert Predictor(model, categories=categories()).precision is None
    assert Predictor(model, categories=categories(), precision="fast").precision == "fast"
    assert model.precision == "fast"
    assert Predictor(model, categories=categories()).precision == "fast"
    with pytest.raises(ValueError, match=r"dtype must be float32 where precision is 'fast', .* got torch\.bfloat16"):
        Predictor(model, categories=categories(), dtype=torch.bfloat16)


def test_one_of_the_two_switches_alone() -> None:
    with pytest.raises(ValueError, match=r"dtype must be float32 where precision is 'strict', .* got torch\.float16"):
        lively_predictor(precision="strict", dtype=torch.float16)
    with pytest.raises(ValueError, match="precision must be one of strict, tf32, fast or None, got 'bf16'"):
        lively_predictor(precision="bf16")


def test_precision_from_a_file(tmp_path: Path) -> None:
    description = ModelDescription(architecture=architecture(), categories=categories())
    save_model_file(tmp_path / "m.safetensors", lively_model(), description)
    loaded = mask2former.load(tmp_path / "m.safetensors", precision="fast", shortest=64, longest=160)
    assert_same_pictures(loaded(picture(), "semantic"), lively_predictor(precision="fast")(picture(), "semantic"))


def test_fast_on_the_bundled_model() -> None:
    """docs/compatibility.md has the numbers of more pictures."""
    model, file = ROOT / "demo/models/panoptic.safetensors", ROOT / "demo/pictures/yellow_bus.jpg"
    plain, fast = (mask2former.load(model, shortest=160, precision=mode).all_tasks(file) for mode in ("strict", "fast"))
    for task in ("panoptic", "semantic"):  # an instance that the model is undecided about can change as a whole
        assert_close(fast[task], plain[task], score=0.02, share=0.01)


def test_a_model_can_be_trained_after_a_prediction(predictor: Predictor) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = lively_predictor(dtype=dtype).model
        loss = model.predict(model.batch_images([torch.zeros(3, 64, 64)]))[-1].mask_logits.square().mean()
        loss.backward()
        assert any(parameter.grad is not None for parameter in model.parameters())


# ---- threads


@pytest.mark.parametrize(
    "mode", [{}, {"dtype": torch.bfloat16}, {"precision": "fast"}], ids=["float32", "bfloat16", "fast"]
)
def test_threads_share_one_predictor(mode: dict[str, Any]) -> None:
    predictor = lively_predictor(**mode)
    before = {name: tensor.clone() for name, tensor in predictor.model.state_dict().items()}
    attributes = dict(vars(predictor))
    pictures = [picture(40 + 9 * i, 60, seed=i) for i in range(3)]
    expected = [[*predictor.all_tasks(pixels).values()] for pixels in pictures]
    together = predictor.batch(pictures[:1] * 3)

    def work(number: int) -> None:
        """Every thread in modes of its own."""
        with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 0), torch.set_grad_enabled(number % 3 == 0):
            for place in range(2):
                pixels, results = pictures[(number + place) % 3], expected[(number + place) % 3]
                for task, result in zip(TASKS, results, strict=True):
                    assert_same_pictures(predictor(pixels, task), result)
                for found, result in zip(predictor.all_tasks(pixels).values(), results, strict=True):
                    assert_same_pictures(found, result)
            for found, result in zip(predictor.batch(pictures[:1] * 3), together, strict=True):
                assert_same_pictures(found, result)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert vars(predictor) == attributes
    for name, tensor in predictor.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(module.training for module in predictor.model.modules())


@pytest.mark.parametrize("number", [0, 1, 3, None])
def test_the_first_layers_alone(number: int | None, tmp_path: Path) -> None:
    model = lively_model().eval()
    description = ModelDescription(architecture=architecture(), categories=categories())
    save_model_file(tmp_path / "model.safetensors", model, description, dtype=torch.float32)
    reduced = Predictor.from_file(tmp_path / "model.safetensors", shortest=64, longest=160, num_test_layers=number)
    resized = reduced._resize(picture()).transpose(2, 0, 1)
    with torch.no_grad():
        everything = model.predict(model.batch_images([torch.from_numpy(resized.copy())]), all_layers=True)
    assert len(everything) == 4
    found, _ = reduced._predict_one(picture())
    torch.testing.assert_close(found.class_logits, everything[-1 if number is None else number].class_logits[0])


def test_layers_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_test_layers must be in \[0, 3\] or None, got 4"):
        lively_predictor(num_test_layers=4)
    model = lively_model()
    model.sem_seg_head.predictor = torch.nn.Identity()
    with pytest.raises(ValueError, match="num_test_layers must be None with Identity, got 1"):
        Predictor(model, categories=categories(), num_test_layers=1)
