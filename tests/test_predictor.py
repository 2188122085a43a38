"""The predictor: equal to its parts by hand, for every form of picture, task and threshold, and from threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mask2former.checkpoint import ModelDescription, PredictionSettings, save_model_file
from mask2former.data.catalog import Category
from mask2former.data.images import read_image
from mask2former.modeling.postprocessing import (
    MaskGeometry,
    instance_segmentation,
    panoptic_segmentation,
    semantic_segmentation,
)
from mask2former.predictor import (
    InstancePicture,
    PanopticPicture,
    Predictor,
    SemanticPicture,
    as_rgb,
)
from tests.tiny import K, architecture, assert_same_pictures, categories, lively_model, lively_predictor, picture

TASKS = ("panoptic", "instance", "semantic")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return lively_predictor()


# ---- the same as its parts


def by_hand(predictor: Predictor, pixels: np.ndarray, size: tuple[int, int]) -> tuple[Tensor, Tensor, MaskGeometry]:
    """Prediction of a picture resized to (height, width)."""
    resized = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    image = torch.tensor(resized).permute(2, 0, 1)
    model = predictor.model
    with torch.no_grad():
        batch = model.batch_images([image])
        final = model.predict(batch, all_layers=True)[-1]
    canvas = (batch.shape[2], batch.shape[3])
    return final.class_logits[0], final.mask_logits[0], MaskGeometry(canvas, size, pixels.shape[:2])


def test_panoptic_is_model_and_postprocessing(predictor: Predictor) -> None:
    pixels = picture(50, 70)
    expected = panoptic_segmentation(
        *by_hand(predictor, pixels, (64, 90)),
        is_thing=torch.tensor([True, False, True, False]),
        object_mask_threshold=0.3,
        overlap_threshold=0.2,
    )
    result = predictor(pixels)
    assert isinstance(result, PanopticPicture)
    assert len(result.segments) >= 2
    assert result.ids.shape == (50, 70)
    assert result.ids.dtype == np.int32
    np.testing.assert_array_equal(result.ids, expected.ids.numpy())
    for mine, other in zip(result.segments, expected.segments, strict=True):
        assert (mine.id, mine.category_id, mine.is_thing) == (other.id, other.category_id, other.is_thing)
        assert (mine.score, mine.area) == (other.score, other.area)
        assert mine.area == np.count_nonzero(result.ids == mine.id)
        assert mine.name == f"class {mine.category_id} é"


def test_instance_is_model_and_postprocessing(predictor: Predictor) -> None:
    pixels = picture(50, 70)
    expected = instance_segmentation(
        *by_hand(predictor, pixels, (64, 90)), top_k=100, is_thing=torch.tensor([True, False, True, False])
    )
    result = predictor(pixels, "instance")
    assert isinstance(result, InstancePicture)
    assert len(result.labels) >= 2
    for name in ("labels", "scores", "masks", "boxes"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name).numpy())
    assert result.masks.dtype == np.bool_
    assert result.masks.shape[1:] == (50, 70)
    assert set(result.labels.tolist()) <= {0, 2}
    assert result.names == tuple(f"class {label} é" for label in result.labels)


@pytest.mark.parametrize("resize_first", [True, False])
def test_semantic_is_model_and_postprocessing(resize_first: bool) -> None:
    predictor = lively_predictor(semantic_resize_first=resize_first)
    pixels = picture(50, 70)
    expected = semantic_segmentation(*by_hand(predictor, pixels, (64, 90)), resize_first=resize_first).argmax(0)
    result = predictor(pixels, "semantic")
    assert isinstance(result, SemanticPicture)
    assert result.labels.dtype == np.int32
    np.testing.assert_array_equal(result.labels, expected.numpy())
    assert len(np.unique(result.labels)) >= 2
    assert result.names == tuple(c.name for c in categories())


def test_bgr_models_get_bgr(predictor: Predictor) -> None:
    pixels = picture()
    swapped = lively_predictor(image_format="BGR")
    assert_same_pictures(swapped(pixels[..., ::-1]), predictor(pixels))
    assert not np.array_equal(swapped(pixels).ids, predictor(pixels).ids)


def test_longest_edge_wins() -> None:
    pixels = picture(20, 600)
    predictor = lively_predictor(shortest=800, longest=320)
    expected = semantic_segmentation(*by_hand(predictor, pixels, (11, 320))).argmax(0)
    np.testing.assert_array_equal(predictor(pixels, "semantic").labels, expected.numpy())


def test_only_things_are_instances_even_if_none() -> None:
    stuff = tuple(c._replace(is_thing=False) for c in categories())
    result = lively_predictor(categories=stuff)(picture(), "instance")
    assert result.masks.shape == (0, 50, 70)
    assert result.names == ()
    things = tuple(c._replace(is_thing=True) for c in categories())
    assert set(lively_predictor(categories=things)(picture(), "instance").labels.tolist()) == {0, 1, 2, 3}


# ---- forms of pictures


def test_grey_alpha_and_sixteen_bits(predictor: Predictor) -> None:
    rgb = picture()
    grey = rgb[..., 0].copy()
    expected = predictor(np.stack([grey] * 3, axis=-1))
    assert_same_pictures(predictor(grey), expected)
    assert_same_pictures(predictor(grey[..., None]), expected)
    assert_same_pictures(predictor(grey.astype(np.uint16) * 257), expected)
    assert_same_pictures(predictor((grey.astype(np.uint16) * 257).astype(">u2")), expected)
    alpha = np.random.default_rng(1).integers(0, 256, grey.shape, dtype=np.uint8)
    assert_same_pictures(predictor(np.dstack([rgb, alpha])), predictor(rgb))


def test_sixteen_bits_are_rounded_as_in_files(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(as_rgb(values), read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(as_rgb(Image.open(tmp_path / "a.png")), read_image(tmp_path / "a.png"))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
def test_images_and_paths(predictor: Predictor, tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(picture()).convert(mode)
    path = tmp_path / f"picture.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(path)
    expected = predictor(read_image(path))
    assert_same_pictures(predictor(image), expected)
    assert_same_pictures(predictor(path), expected)
    assert_same_pictures(predictor(str(path)), expected)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(picture(30, 40)).save(path, exif=exif)
    assert as_rgb(path).shape == (40, 30, 3)
    np.testing.assert_array_equal(as_rgb(Image.open(path)), as_rgb(path))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [(1, 1), (20, 600), (600, 20), (1, 300), (33, 65)])
def test_any_size(predictor: Predictor, task: str, size: tuple[int, int]) -> None:
    result = predictor(picture(*size), task)
    shape = {"panoptic": "ids", "instance": "masks", "semantic": "labels"}[task]
    assert getattr(result, shape).shape[-2:] == size


def test_read_only_and_odd_strides(predictor: Predictor) -> None:
    pixels = picture(64, 64)  # not resized
    pixels.setflags(write=False)
    before = pixels.copy()
    assert_same_pictures(predictor(pixels), predictor(before))
    assert_same_pictures(predictor(pixels[::-1, ::-1]), predictor(before[::-1, ::-1].copy()))
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "uint8 or uint16 .* got float32"),
        (np.zeros((4, 4, 3), np.int64), "got int64"),
        (np.zeros((4, 4, 3), bool), "got bool"),
        (np.zeros((4, 4, 3), np.uint32), "got uint32"),
        (torch.zeros(3, 4, 4), "got Tensor"),
        (None, "got NoneType"),
        ([[1, 2]], "got list"),
        (np.zeros((4, 4, 2), np.uint8), r"got shape \(4, 4, 2\)"),
        (np.zeros((3, 4, 4, 3), np.uint8), r"got shape \(3, 4, 4, 3\)"),
        (np.zeros(4, np.uint8), r"got shape \(4,\)"),
        (np.zeros((0, 4, 3), np.uint8), r"got shape \(0, 4, 3\)"),
        (np.zeros((0, 4), np.uint8), r"got shape \(0, 4\)"),
    ],
)
def test_other_pictures_are_refused(predictor: Predictor, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"image must be .*{message}"):
        predictor(image)


def test_files_that_are_no_pictures(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        predictor(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text\.png"):
        predictor(tmp_path / "text.png")


# ---- thresholds and settings


def test_panoptic_threshold(predictor: Predictor) -> None:
    pixels = picture()
    all_scores = [s.score for s in predictor(pixels, threshold=0.0).segments]
    middle = (min(all_scores) + max(all_scores)) / 2
    some = predictor(pixels, threshold=middle).segments
    assert 0 < len(some) < len(all_scores)
    assert min(s.score for s in some) > middle
    nothing = predictor(pixels, threshold=1.0)
    assert nothing.segments == ()
    assert not nothing.ids.any()
    assert_same_pictures(predictor(pixels, threshold=0.3), predictor(pixels))
    assert_same_pictures(lively_predictor(object_mask_threshold=middle)(pixels), predictor(pixels, threshold=middle))


def test_instance_threshold(predictor: Predictor) -> None:
    pixels = picture()
    all_scores = predictor(pixels, "instance").scores
    assert (np.diff(all_scores) <= 0).all()
    middle = float((all_scores[0] + all_scores[-1]) / 2)
    some = predictor(pixels, "instance", threshold=middle).scores
    np.testing.assert_array_equal(some, all_scores[all_scores >= middle])
    assert 0 < len(some) < len(all_scores)
    own = lively_predictor(score_threshold=middle)
    np.testing.assert_array_equal(own(pixels, "instance").scores, some)
    np.testing.assert_array_equal(own(pixels, "instance", threshold=0.0).scores, all_scores)


def test_top_k() -> None:
    everything = tuple(c._replace(is_thing=True) for c in categories())
    assert len(lively_predictor(categories=everything, top_k=3)(picture(), "instance").labels) == 3
    assert len(lively_predictor(categories=everything, top_k=1000)(picture(), "instance").labels) == 8 * K


def test_overlap_threshold() -> None:
    loose = lively_predictor(overlap_threshold=0.0)(picture())
    strict = lively_predictor(overlap_threshold=1.0)(picture())
    assert len(strict.segments) < len(loose.segments)


def test_refused_calls(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="task must be one of panoptic, instance, semantic, got 'depth'"):
        predictor(picture(), "depth")  # type: ignore[arg-type]
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"threshold must be in \[0, 1\], got {threshold}"):
            predictor(picture(), threshold=threshold)
    with pytest.raises(ValueError, match=r"threshold must be None for semantic segmentation, got 0\.5"):
        predictor(picture(), "semantic", threshold=0.5)


def test_tasks_of_the_model() -> None:
    predictor = lively_predictor(tasks=("semantic", "panoptic"))
    assert isinstance(predictor(picture()), SemanticPicture)
    with pytest.raises(ValueError, match="task must be one of semantic, panoptic, got 'instance'"):
        predictor(picture(), "instance")


@pytest.mark.parametrize("count", [0, K - 1, K + 1])
def test_number_of_categories(count: int) -> None:
    with pytest.raises(ValueError, match=f"each of the model's 4 classes, got {count}"):
        lively_predictor(categories=categories(count))


@pytest.mark.parametrize(
    "bad", [{"image_format": "GBR"}, {"top_k": 0}, {"shortest": -1}, {"score_threshold": 2.0}, {"tasks": ()}]
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        lively_predictor(**bad)


def test_model_is_in_evaluation_mode(predictor: Predictor) -> None:
    assert not predictor.model.training
    model = lively_model().train()
    assert not Predictor(model, categories=categories()).model.training


# ---- from a file


def test_from_file(tmp_path: Path, predictor: Predictor) -> None:
    path = tmp_path / "m.safetensors"
    settings = PredictionSettings(
        shortest=64, longest=160, object_mask_threshold=0.3, overlap_threshold=0.2, top_k=5, tasks=("panoptic",)
    )
    description = ModelDescription(architecture=architecture(), categories=categories(), settings=settings)
    save_model_file(path, lively_model(), description)
    loaded = Predictor.from_file(path)
    assert loaded.settings == settings
    assert loaded.categories == categories()
    assert_same_pictures(loaded(picture()), predictor(picture()))
    changed = Predictor.from_file(path, top_k=7, tasks=("instance",))
    assert changed.settings.top_k == 7
    assert len(changed(picture()).labels) <= 7
    with pytest.raises(TypeError, match="colour"):
        Predictor.from_file(path, colour=1)
    with pytest.raises(ValueError, match="top_k"):
        Predictor.from_file(path, top_k=0)
    with pytest.raises(FileNotFoundError):
        Predictor.from_file(tmp_path / "none.safetensors")


def test_from_file_keeps_the_channel_order(tmp_path: Path) -> None:
    layout = architecture(image_format="BGR")
    save_model_file(
        tmp_path / "m.safetensors",
        lively_model(),
        ModelDescription(architecture=layout, categories=categories()),
    )
    assert Predictor.from_file(tmp_path / "m.safetensors").image_format == "BGR"


# ---- threads


def test_threads_share_a_predictor(predictor: Predictor) -> None:
    jobs = [(picture(40 + 9 * i, 60, seed=i), task) for i in range(4) for task in TASKS]
    expected = [predictor(pixels, task) for pixels, task in jobs]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: predictor(*job), jobs * 3))
    for result, other in zip(results, expected * 3, strict=True):
        assert_same_pictures(result, other)


def test_results_are_frozen(predictor: Predictor) -> None:
    result = predictor(picture())
    with pytest.raises(FrozenInstanceError):
        result.ids = None  # type: ignore[misc]
    assert not torch.is_inference_mode_enabled()


# ---- drawing


@pytest.mark.parametrize("task", TASKS)
def test_draw(predictor: Predictor, task: str) -> None:
    pytest.importorskip("cv2")
    pixels = picture(90, 120)
    before = pixels.copy()
    drawn = predictor.draw(pixels, predictor(pixels, task))
    assert drawn.shape == pixels.shape
    assert drawn.dtype == np.uint8
    assert not np.array_equal(drawn, pixels)
    np.testing.assert_array_equal(pixels, before)


def test_draw_on_grey_and_a_wrong_size(predictor: Predictor) -> None:
    pytest.importorskip("cv2")
    grey = picture()[..., 0]
    result = predictor(grey)
    assert predictor.draw(grey, result).shape == (50, 70, 3)
    with pytest.raises(ValueError, match="shape"):
        predictor.draw(picture(51, 70), result)


def test_draw_paints_the_right_categories() -> None:
    pytest.importorskip("cv2")
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    predictor = lively_predictor(categories=[Category(i, "x", i < 2, c) for i, c in enumerate(colors)])
    labels = np.zeros((60, 60), np.int32)
    labels[:, 30:] = 2
    grey = np.full((60, 60, 3), 100, np.uint8)
    drawn = predictor.draw(grey, SemanticPicture(labels, predictor.categories))
    left, right = drawn[5, 5].astype(int), drawn[5, 55].astype(int)
    assert left[0] > left[2] + 60
    assert right[2] > right[0] + 60


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"device must be one that can be used here, got {device}: "):
        lively_predictor(device=device)
