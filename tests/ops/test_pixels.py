"""The compiled kernels of post-processing against their references: bit by bit where no sums round, else float64."""

import pytest
import torch
from torch import Tensor

from mask2former.ops import _extension, pixels
from mask2former.ops.pixels import Axis

pytestmark = pytest.mark.skipif(
    not pixels._has_kernels, reason="the extension is not built, or the processor has no AVX2"
)


def axis(source: int, target: int) -> Axis:
    first, weight = torch.randint(source, (target,)), torch.rand(target)
    return Axis(first, (first + 1).clamp_max(source - 1), 1 - weight, weight)


@pytest.mark.parametrize("has_columns", [True, False])
@pytest.mark.parametrize("has_rows", [True, False])
@pytest.mark.parametrize("sizes", [(5, 3, 4, 9, 17), (40, 20, 30, 64, 200), (0, 3, 4, 5, 6), (2, 7, 300, 2, 5)])
def test_blend(sizes: tuple[int, int, int, int, int], has_columns: bool, has_rows: bool) -> None:
    N, h, w, H, W = sizes
    maps = torch.randn(N, h + 2, w + 3)[:, 1:-1, :w]  # rows and maps that are apart
    columns, rows = axis(w, W) if has_columns else None, axis(h, H) if has_rows else None
    width = min(W, w)
    expected = pixels.blend_reference(maps, columns, rows, width)
    kept = maps.clone()
    assert torch.equal(pixels.blend(maps, columns, rows, width), expected)
    assert torch.equal(maps, kept)


@pytest.mark.parametrize("shape", [(1, 2, 3), (100, 8, 512), (3, 1, 4097), (133, 9, 71)])
def test_largest(shape: tuple[int, int, int]) -> None:
    scores = torch.rand(shape).mul(50).round()  # many are equal: the first one counts
    values, places = pixels.largest(scores)
    expected, expected_places = pixels.largest_reference(scores)
    assert torch.equal(values, expected)
    assert torch.equal(places, expected_places)
    assert torch.equal(places, (scores == scores.amax(0)).int().argmax(0))


def test_largest_of_what_is_not_a_number() -> None:
    scores = torch.rand(5, 10, 70)
    scores[2, 3, 4] = scores[0, 1, 2] = scores[4, 9, 69] = torch.nan
    scores[1, 5, 5], scores[:, 6, 6] = torch.inf, -torch.inf
    found, expected = pixels.largest(scores), pixels.largest_reference(scores)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], expected[1])


# classes and pixels that fill no tile, one and no query
CLASS_SIZES = [(100, 133, 8, 75), (1, 1, 1, 1), (7, 6, 3, 64), (20, 19, 5, 13), (3, 13, 1, 4097), (0, 2, 3, 4)]


def class_case(Q: int, K: int, R: int, W: int) -> tuple[Tensor, Tensor]:
    """Logits in rows that are apart, many of them large, and probabilities."""
    return (torch.randn(Q, R + 2, W) * 20)[:, 1:-1], torch.rand(Q, K + 1).softmax(-1)[:, :-1]


@pytest.mark.parametrize("sizes", CLASS_SIZES)
def test_class_scores(sizes: tuple[int, int, int, int]) -> None:
    logits, probability = class_case(*sizes)
    kept = logits.clone()
    found = pixels.class_scores(logits, probability)
    assert torch.equal(logits, kept)
    expected = torch.einsum("qk,qrw->krw", probability.double(), logits.double().sigmoid())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    reference = pixels.class_scores_reference(logits.clone(), probability)
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # of the model, not of what follows it
        assert torch.equal(pixels.class_scores_reference(logits.clone(), probability), reference)


@pytest.mark.parametrize("sizes", CLASS_SIZES)
def test_class_labels_are_those_of_the_scores(sizes: tuple[int, int, int, int]) -> None:
    logits, probability = class_case(*sizes)
    labels = pixels.class_labels(logits, probability)
    assert labels.dtype == torch.int32
    assert torch.equal(labels.long(), pixels.largest(pixels.class_scores(logits, probability))[1])


def test_the_first_of_equal_classes_and_what_is_not_a_number() -> None:
    logits, probability = class_case(5, 8, 4, 30)
    logits = logits.contiguous()
    probability = torch.cat([probability, probability], dim=1)
    assert pixels.class_labels(logits, probability).max() < 8
    logits[2, 1, 7] = torch.nan
    logits[3, 2, 29], logits[4, 0, 0] = torch.inf, -torch.inf
    scores = pixels.class_scores(logits, probability)
    expected = pixels.class_scores_reference(logits.clone(), probability)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert scores.isnan().sum() == 16
    assert pixels.class_labels(logits, probability)[1, 7] == 15


@pytest.mark.parametrize("shape", [(3, 5, 40), (1, 1, 1), (20, 8, 133), (2, 7, 8), (0, 3, 4)])
def test_inside(shape: tuple[int, int, int]) -> None:
    logits = torch.randn(shape) * 5
    logits[:1] = -1  # empty
    logits[1:2, :, 1:] = 0  # zero is not inside
    found, expected = pixels.inside(logits), pixels.inside_reference(logits.clone())
    for name in ("masks", "in_column", "in_row", "areas"):
        part, expected_part = getattr(found, name), getattr(expected, name)
        assert part.dtype == expected_part.dtype
        assert torch.equal(part, expected_part), name
    sums = torch.where(logits > 0, logits.double().sigmoid(), 0).flatten(1).sum(1)
    torch.testing.assert_close(found.sums.double(), sums, rtol=1e-6, atol=0)


def test_a_logit_that_is_not_a_number_is_not_inside_and_spoils_the_sum() -> None:
    logits = torch.randn(3, 6, 21)
    logits[0, 2, 3] = logits[2, 5, 20] = torch.nan
    logits[2, :, :20] = -1  # nothing else inside
    found, expected = pixels.inside(logits), pixels.inside_reference(logits.clone())
    assert torch.equal(found.masks, expected.masks)
    assert torch.equal(found.areas, expected.areas)
    assert found.sums.isnan().tolist() == expected.sums.isnan().tolist() == [True, False, True]


def test_scores_of_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="logits must have as many rows as probability"):
        pixels.class_scores(torch.rand(3, 4, 5), torch.rand(2, 6))
    with pytest.raises(ValueError, match="logits and probability must be"):
        pixels.class_scores(torch.rand(3, 4, 5), torch.rand(3, 6).double())


def test_when_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(pixels, "largest_reference", lambda scores: calls.append(scores) or scores.max(0))
    scores = torch.rand(3, 4, 5)
    pixels.largest(scores)
    assert not calls
    pixels.largest(scores.double())
    with _extension.reference_only():
        pixels.largest(scores)
    assert len(calls) == 2


def test_places_that_are_not_there_are_refused() -> None:
    maps, good = torch.rand(2, 3, 4), axis(4, 6)
    with pytest.raises(ValueError, match=r"columns must be places in \[0, 4\), got 4"):
        pixels.blend(maps, good._replace(first=torch.tensor([0, 1, 4, 0, 0, 0])), None, 4)
    with pytest.raises(ValueError, match="rows must be two int64 and two float32 vectors of one size"):
        pixels.blend(maps, good, axis(3, 5)._replace(second=torch.zeros(4, dtype=torch.int64)), 4)
    with pytest.raises(ValueError, match="columns must have places for more than 4 numbers"):
        pixels.blend(maps, None, axis(3, 5), 5)
