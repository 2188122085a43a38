"""Semantic IoU against closed forms and a naive loop."""

import math

import numpy as np
import pytest

from mask2former.evaluation.semantic_iou import SemanticIoU

NAMES = ["sky", "road", "car", "sign"]


def random_pair(rng, shape=(13, 17)):
    target = rng.choice([0, 1, 2, 255], shape, p=[0.5, 0.3, 0.1, 0.1]).astype(np.uint8)
    predicted = np.where(rng.random(shape) < 0.6, target, rng.integers(0, 4, shape))
    predicted[predicted == 255] = 3
    return predicted, target


def naive(predicted, target, num_classes):
    """Per class with boolean masks; means over the classes of the ground truth."""
    valid = target != 255
    iou, accuracy, weight = {}, {}, {}
    for k in range(num_classes):
        t, p = (target == k) & valid, (predicted == k) & valid
        if t.any():
            iou[k] = (t & p).sum() / (t | p).sum()
            accuracy[k] = (t & p).sum() / t.sum()
            weight[k] = t.sum() / valid.sum()
    results = {
        "mIoU": np.mean(list(iou.values())),
        "fwIoU": sum(iou[k] * weight[k] for k in iou),
        "mACC": np.mean(list(accuracy.values())),
        "pACC": (predicted == target)[valid].mean(),
    }
    results |= {f"IoU-{NAMES[k]}": iou.get(k, math.nan) for k in range(num_classes)}
    results |= {f"ACC-{NAMES[k]}": accuracy.get(k, math.nan) for k in range(num_classes)}
    return {name: 100 * value for name, value in results.items()}


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_naive_loop(seed):
    predicted, target = random_pair(np.random.default_rng(seed))
    metric = SemanticIoU(class_names=NAMES)
    metric.update(predicted, target)
    assert metric.compute() == pytest.approx(naive(predicted, target, 4), rel=1e-12, nan_ok=True)


def test_closed_form():
    # road: 2 pixels, 1 right, 1 called car; car: 2 pixels, both right. IoU 1/2 and 2/3.
    metric = SemanticIoU(class_names=NAMES)
    metric.update(np.array([[1, 2, 2, 2, 0]]), np.array([[1, 1, 2, 2, 255]]))
    results = metric.compute()
    assert results["IoU-road"] == pytest.approx(50)
    assert results["IoU-car"] == pytest.approx(200 / 3)
    assert results["mIoU"] == pytest.approx((50 + 200 / 3) / 2)
    assert results["fwIoU"] == pytest.approx((50 + 200 / 3) / 2)
    assert results["mACC"] == results["pACC"] == pytest.approx(75)
    assert math.isnan(results["IoU-sky"]) and math.isnan(results["ACC-sky"])
    assert list(results)[:2] == ["mIoU", "fwIoU"]


def test_counts_are_predicted_by_target():
    metric = SemanticIoU(class_names=NAMES)
    metric.update(np.array([[3]]), np.array([[1]]))
    assert metric.counts[3, 1] == 1 and metric.counts.sum() == 1


def test_perfect_prediction_is_100():
    labels = np.array([[0, 1], [2, 3]])
    metric = SemanticIoU(class_names=NAMES)
    metric.update(labels, labels)
    assert set(metric.compute().values()) == {100.0}


def test_200_classes_in_uint8_do_not_overflow():
    labels = np.arange(200, dtype=np.uint8).reshape(10, 20)
    metric = SemanticIoU(class_names=[str(i) for i in range(200)])
    metric.update(labels, labels)
    np.testing.assert_array_equal(metric.counts, np.eye(200))


def test_all_ignored_and_unused_metric_are_nan():
    metric = SemanticIoU(class_names=NAMES)
    metric.update(np.zeros((1, 1), int), np.full((1, 1), 255))
    assert all(math.isnan(value) for value in metric.compute().values())


def test_ignore_label_may_be_a_class():
    metric = SemanticIoU(class_names=NAMES, ignore_label=0)
    metric.update(np.array([[0, 1]]), np.array([[0, 1]]))
    assert metric.counts.sum() == 1


def test_without_ignore_label_every_pixel_counts():
    metric = SemanticIoU(class_names=NAMES, ignore_label=None)
    metric.update(np.array([[0, 1]]), np.array([[0, 1]]))
    assert metric.counts.sum() == 2


def test_merge_equals_one_run():
    rng = np.random.default_rng(0)
    joint, parts = SemanticIoU(class_names=NAMES), [SemanticIoU(class_names=NAMES) for _ in range(2)]
    for i in range(4):
        pair = random_pair(rng)
        joint.update(*pair)
        parts[i % 2].update(*pair)
    before = parts[1].counts.copy()
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].counts, joint.counts)
    np.testing.assert_array_equal(parts[1].counts, before)
    with pytest.raises(ValueError, match="class_names"):
        joint.merge(SemanticIoU(class_names=NAMES[:2]))


@pytest.mark.parametrize(
    ("predicted", "target", "error", "message"),
    [
        ([[4]], [[0]], ValueError, r"predicted.*\[0, 4\), got 4"),
        ([[-1]], [[0]], ValueError, "predicted.*got -1"),
        ([[0]], [[7]], ValueError, r"target.*\[0, 4\) or the ignore label 255, got 7"),
        ([[0]], [[-1]], ValueError, "target.*got -1"),
        ([[0, 0]], [[0]], ValueError, "one shape"),
        ([0], [0], ValueError, r"\(H, W\)"),
        ([[0.0]], [[0]], TypeError, "float64"),
    ],
)
def test_wrong_input_is_named_and_changes_nothing(predicted, target, error, message):
    metric = SemanticIoU(class_names=NAMES)
    with pytest.raises(error, match=message):
        metric.update(np.array(predicted), np.array(target))
    assert not metric.counts.any()


@pytest.mark.parametrize(("names", "message"), [([], "at least one"), (["a", "b", "a"], r"\['a'\]")])
def test_wrong_names_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        SemanticIoU(class_names=names)
