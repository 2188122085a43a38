"""Average recall of proposals: in closed form, and against pycocotools' COCOeval without categories."""

import contextlib
import io

import numpy as np
import pytest

from mask2former.evaluation import ProposalRecall
from mask2former.evaluation.average_precision import encode_masks
from mask2former.evaluation.proposal_recall import THRESHOLDS, mask_ious


def recall_of(*images, limits=(10, 100)):
    metric = ProposalRecall(limits=limits)
    for ious in images:
        metric.update(ious)
    return metric.compute()


def blobs(rng, count, height=37, width=53):
    """Rectangles, some of them empty."""
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        (y0, y1), (x0, x1) = (np.sort(rng.integers(0, edge + 1, 2)) for edge in (height, width))
        mask[y0:y1, x0:x1] = True
    return masks


def shaken(rng, masks):
    """Similar masks: moved by some pixels, with holes."""
    moved = np.zeros_like(masks)
    for new, mask in zip(moved, masks, strict=True):
        new[:] = np.roll(mask, rng.integers(-3, 4, 2), (0, 1))
    return moved & (rng.random(masks.shape) > 0.1)


def test_perfect_proposals_find_all_and_none_find_nothing():
    assert recall_of(np.eye(12)[::-1]) == {"AR@10": pytest.approx(1000 / 12), "AR@100": pytest.approx(100)}
    assert recall_of(np.zeros((0, 3))) == {"AR@10": 0, "AR@100": 0}
    assert recall_of(np.full((3, 3), 0.49)) == {"AR@10": 0, "AR@100": 0}
    assert np.isnan(recall_of(np.ones((5, 0)))["AR@100"])
    assert np.isnan(recall_of()["AR@10"])


@pytest.mark.parametrize("place", range(10))
def test_an_overlap_at_a_threshold_counts(place):
    """Found at the thresholds up to this one, and not at it with a little less."""
    assert recall_of([[THRESHOLDS[place]]])["AR@100"] == pytest.approx(10 * (place + 1))
    assert recall_of([[np.nextafter(THRESHOLDS[place], 0)]])["AR@100"] == pytest.approx(10 * place)


def test_better_ranks_choose_first():
    """The first takes the only object that the second overlaps; behind it, it takes the other one up to 0.7."""
    assert recall_of([[0.91, 0.81], [0.71, 0.0]])["AR@100"] == pytest.approx(100 * 9 / 20)
    assert recall_of([[0.71, 0.0], [0.91, 0.81]])["AR@100"] == pytest.approx(100 * (5 + 5 + 4) / 20)


def test_recall_is_of_all_images_together():
    """Three of four objects, not the mean of 1 and 2 / 3."""
    assert recall_of(np.eye(1), np.eye(3)[:2])["AR@100"] == pytest.approx(75)


def test_limits():
    ious = np.eye(20)
    assert recall_of(ious, limits=(1, 5, 30)) == {"AR@1": 5, "AR@5": 25, "AR@30": 100}
    for limits in ((), (0,), (5, -1)):
        with pytest.raises(ValueError, match="limits must be numbers from 1"):
            ProposalRecall(limits=limits)
    with pytest.raises(ValueError, match=r"\(P, N\), got \(3,\)"):
        ProposalRecall().update([1.0, 0.5, 0.0])


def test_merged_parts_equal_the_whole():
    rng = np.random.default_rng(0)
    images = [rng.random((rng.integers(0, 15), rng.integers(0, 7))) for _ in range(6)]
    parts = [ProposalRecall(), ProposalRecall()]
    for place, ious in enumerate(images):
        parts[place % 2].update(ious)
    parts[0].merge(parts[1])
    assert parts[0].compute() == recall_of(*images)
    assert parts[0].count == sum(ious.shape[1] for ious in images)
    with pytest.raises(ValueError, match=r"limits \(10, 100\), got \(3,\)"):
        parts[0].merge(ProposalRecall(limits=(3,)))


def test_overlaps_of_masks():
    """Larger than the part that is compared at a time, against a naive loop; empty masks overlap nothing."""
    rng = np.random.default_rng(1)
    a, b = rng.random((5, 200, 190)) > 0.4, rng.random((3, 200, 190)) > 0.7
    a[2], b[1] = False, False
    expected = [[(x & y).sum() / max((x | y).sum(), 1) for y in b] for x in a]
    np.testing.assert_array_equal(mask_ious(a, b), expected)
    assert mask_ious(a[:0], b).shape == (0, 3)
    assert mask_ious(a, b[:0]).shape == (5, 0)
    with pytest.raises(ValueError, match=r"objects .* got \(3, 199, 190\)"):
        mask_ious(a, b[:, 1:])
    with pytest.raises(TypeError, match="proposals must be bool, got uint8"):
        mask_ious(a.view(np.uint8), b)


def test_agreement_with_pycocotools():
    """Several proposals an object, equal overlaps, empty masks, crowds, images without either, more than the limit."""
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(2)
    metric = ProposalRecall(limits=(3, 100))
    truth, found = [], []
    for image in range(12):
        objects = blobs(rng, int(rng.integers(0, 9)))
        proposals = np.concatenate([shaken(rng, objects), objects[:2], shaken(rng, objects), blobs(rng, 3)])
        if image == 5:
            proposals = np.concatenate([blobs(rng, 120), proposals])
        proposals = proposals[rng.permutation(len(proposals))]
        is_crowd = rng.random(len(objects)) < 0.2
        metric.update(mask_ious(proposals, objects[~is_crowd]))
        truth += [
            {"image_id": image, "iscrowd": int(crowd), "segmentation": rle, "area": int(mask.sum())}
            for crowd, rle, mask in zip(is_crowd, encode_masks(objects), objects, strict=True)
        ]
        scores = np.linspace(1, 0, len(proposals))
        found += [
            {"image_id": image, "score": score, "segmentation": rle, "area": int(mask.sum())}
            for score, rle, mask in zip(scores, encode_masks(proposals), proposals, strict=True)
        ]
    expected = coco_recall(truth, found, limits=[3, 100])
    assert 5 < expected[0] < expected[1] < 95
    assert list(metric.compute().values()) == pytest.approx(expected, abs=1e-9)


def coco_recall(truth, found, limits):
    """COCOeval's AR in percent for objects of all sizes, whatever the categories."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": i, "height": 37, "width": 53} for i in sorted({row["image_id"] for row in (*truth, *found)})]
    sets = []
    for rows in (truth, found):
        coco = COCO()
        numbered = [{"id": i, "category_id": 1 + i % 3, "iscrowd": 0, **row} for i, row in enumerate(rows, start=1)]
        coco.dataset = {"images": images, "categories": [{"id": i} for i in (1, 2, 3)], "annotations": numbered}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        sets.append(coco)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*sets, "segm")
        evaluation.params.useCats, evaluation.params.maxDets = 0, limits
        evaluation.evaluate()
        evaluation.accumulate()
    recall = evaluation.eval["recall"][:, 0, 0]  # (T, limits), of all sizes
    assert (recall >= 0).all()
    return (100 * recall.mean(0)).tolist()
