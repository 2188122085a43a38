"""Run lengths of masks are pycocotools' own, byte for byte."""

import numpy as np
import pytest

from mask2former.evaluation.average_precision import encode_masks

mask_api = pytest.importorskip("pycocotools.mask", reason="RLE needs pycocotools")
pytest.importorskip("cv2", reason="OpenCV is not installed")


def expected(masks):
    encoded = mask_api.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in encoded]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (7, 5), (64, 64), (33, 130)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_random_masks(size, density):
    masks = np.random.default_rng(0).random((6, *size)) < density
    assert encode_masks(masks) == expected(masks)


def test_masks_with_long_runs_and_at_the_borders():
    masks = np.zeros((9, 480, 640), bool)
    masks[0, 0, 0] = masks[1, -1, -1] = masks[2, 0, -1] = masks[3, -1, 0] = True
    masks[4, :, 10:20] = True  # whole columns are one run
    masks[5, 10:20] = True
    masks[6, 100:300, 200:500] = True
    masks[7, ::2, ::2] = True
    masks[8] = np.hypot(*np.mgrid[-240:240, -320:320]) < 200
    assert encode_masks(masks) == expected(masks)


@pytest.mark.parametrize("view", [np.s_[:, ::2, 1::3], np.s_[::-1], np.s_[:, ::-1, ::-1]])
def test_views(view):
    masks = np.random.default_rng(0).random((4, 30, 40)) < 0.3
    assert encode_masks(masks[view]) == expected(masks[view])
    turned = masks.transpose(0, 2, 1)
    assert encode_masks(turned) == expected(turned)


def test_no_mask():
    assert encode_masks(np.zeros((0, 30, 40), bool)) == []
